//! Netlink attributes: type, length, value

use byteorder::{ByteOrder, NativeEndian};

use crate::consts::{ATTR_HEADER_LEN, NLA_TYPE_MASK, align};
use crate::error::DecodeError;

/// One attribute: its number, and its value in wire format
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Attr<'a> {
    /// The number, without [`NLA_F_NESTED`](crate::consts::NLA_F_NESTED) and
    /// [`NLA_F_NET_BYTEORDER`](crate::consts::NLA_F_NET_BYTEORDER)
    pub kind: u16,
    /// The value, without padding
    pub value: &'a [u8],
    /// The offset of the attribute's header in the bytes given to [`Attrs::new`]
    pub offset: usize,
}

impl core::fmt::Debug for Attr<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Attr")
            .field("kind", &self.kind)
            .field("offset", &self.offset)
            .field("len", &self.value.len())
            .finish()
    }
}

/// The attributes of a message, or the ones nested in an attribute, in wire order
///
/// The last attribute may lack padding, and the iterator skips up to three stray bytes behind it,
/// as the kernel's `nla_for_each_attr` does. An attribute with a broken length is one `Err` and
/// the last item, because the next attribute cannot be found.
#[derive(Clone, Debug)]
pub struct Attrs<'a> {
    rest: &'a [u8],
    offset: usize,
}

impl<'a> Attrs<'a> {
    /// The attributes in `bytes`, which begin with the header of the first one
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self {
            rest: bytes,
            offset: 0,
        }
    }

    /// Finds the last attribute with this number, as the kernel's parser does
    #[must_use]
    #[inline]
    pub fn last(mut self, kind: u16) -> Option<Attr<'a>> {
        let mut last = None;
        while let Some(attr) = self.next_whole() {
            if attr.kind == kind {
                last = Some(attr);
            }
        }
        last
    }

    /// The next attribute, unless it is broken
    #[inline]
    fn next_whole(&mut self) -> Option<Attr<'a>> {
        let (header, _) = self.rest.split_first_chunk::<ATTR_HEADER_LEN>()?;
        let len = usize::from(NativeEndian::read_u16(header));
        let kind = NativeEndian::read_u16(&header[2..]) & NLA_TYPE_MASK;
        let offset = self.offset;
        let value = self.rest.get(ATTR_HEADER_LEN..len)?;
        self.rest = self.rest.get(align(len)..).unwrap_or_default();
        self.offset += align(len);
        Some(Attr {
            kind,
            value,
            offset,
        })
    }
}

impl Attrs<'_> {
    #[cold]
    fn end_at_broken(&mut self, kind: u16, len: usize) -> DecodeError {
        DecodeError::AttributeLength {
            kind,
            within: None,
            offset: self.offset,
            len,
            had: core::mem::take(&mut self.rest).len(),
        }
    }
}

impl<'a> Iterator for Attrs<'a> {
    type Item = Result<Attr<'a>, DecodeError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if let Some(attr) = self.next_whole() {
            return Some(Ok(attr));
        }
        let (header, _) = self.rest.split_first_chunk::<ATTR_HEADER_LEN>()?;
        let len = usize::from(NativeEndian::read_u16(header));
        let kind = NativeEndian::read_u16(&header[2..]) & NLA_TYPE_MASK;
        Some(Err(self.end_at_broken(kind, len)))
    }
}

impl core::iter::FusedIterator for Attrs<'_> {}
