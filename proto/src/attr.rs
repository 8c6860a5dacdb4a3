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
    pub fn last(self, kind: u16) -> Option<Attr<'a>> {
        self.map_while(Result::ok)
            .filter(|attr| attr.kind == kind)
            .last()
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
        let (header, _) = self.rest.split_first_chunk::<ATTR_HEADER_LEN>()?;
        let len = usize::from(NativeEndian::read_u16(header));
        let kind = NativeEndian::read_u16(&header[2..]) & NLA_TYPE_MASK;
        let offset = self.offset;
        let Some(value) = self.rest.get(ATTR_HEADER_LEN..len) else {
            return Some(Err(self.end_at_broken(kind, len)));
        };
        self.rest = self.rest.get(align(len)..).unwrap_or_default();
        self.offset += align(len);
        Some(Ok(Attr {
            kind,
            value,
            offset,
        }))
    }
}

impl core::iter::FusedIterator for Attrs<'_> {}
