//! Encoding of requests into the caller's buffer

use byteorder::{BigEndian, ByteOrder, NativeEndian};

use crate::consts::{
    ATTR_HEADER_LEN, MAX_PAYLOAD, MESSAGE_HEADER_LEN, NFQA_VERDICT_HDR, NLA_F_NESTED, NLM_F_ACK,
    NLM_F_REQUEST, NLMSG_NOOP, VERDICT_HDR_LEN, align, message_type,
};
use crate::error::EncodeError;

/// The caller's part of a request's netlink header
///
/// The kernel uses only `ack`. It repeats the header in the acknowledgement or error
/// ([`Reply`](crate::Reply)), so `seq` and `pid` can identify the request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_structs, reason = "struct nlmsghdr does not change")]
pub struct RequestHeader {
    /// Asks for an acknowledgement of success (`NLM_F_ACK`); the kernel always reports errors
    pub ack: bool,
    /// The sequence number, `nlmsg_seq`
    pub seq: u32,
    /// The port id, `nlmsg_pid`
    pub pid: u32,
}

/// Encodes a `NLMSG_NOOP`, and returns its length
///
/// With `ack` the kernel replies at once, after its replies to earlier requests. This makes the
/// message a barrier, and a way to make one's own socket readable. Like every message to netfilter
/// it needs `CAP_NET_ADMIN`.
///
/// Since Linux 2.6.22, when netlink began to handle control messages itself (`netlink_rcv_skb` in
/// `net/netlink/af_netlink.c`). Tested on Linux 6.18.
///
/// # Errors
/// [`EncodeError::NoSpace`] if `buf` is shorter than 16 bytes.
#[doc(alias = "NLMSG_NOOP")]
pub fn encode_noop(buf: &mut [u8], header: RequestHeader) -> Result<usize, EncodeError> {
    MessageWriter::control(buf, NLMSG_NOOP, header).finish()
}

/// Appends to a buffer; counts on when the buffer is full, so that the error has the size needed
#[derive(Debug)]
pub(crate) struct MessageWriter<'b> {
    buf: &'b mut [u8],
    len: usize,
    too_long: Option<EncodeError>,
}

impl<'b> MessageWriter<'b> {
    /// Begins a message of the queue subsystem
    #[inline]
    pub(crate) fn new(
        buf: &'b mut [u8],
        message: u8,
        family: u8,
        queue: u16,
        header: RequestHeader,
    ) -> Self {
        let mut writer = Self::control(buf, message_type(message), header);
        let [high, low] = queue.to_be_bytes();
        writer.array([family, 0, high, low]);
        writer
    }

    #[inline]
    fn control(buf: &'b mut [u8], message_type: u16, header: RequestHeader) -> Self {
        let mut bytes = [0; MESSAGE_HEADER_LEN]; // `finish` writes the length
        NativeEndian::write_u16(&mut bytes[4..6], message_type);
        let ack = if header.ack { NLM_F_ACK } else { 0 };
        NativeEndian::write_u16(&mut bytes[6..8], NLM_F_REQUEST | ack);
        NativeEndian::write_u32(&mut bytes[8..12], header.seq);
        NativeEndian::write_u32(&mut bytes[12..16], header.pid);
        let mut writer = Self {
            buf,
            len: 0,
            too_long: None,
        };
        writer.array(bytes);
        writer
    }

    /// Appends an attribute. The next one adds the padding: the last one of a message has none.
    pub(crate) fn attr(&mut self, kind: u16, value: &[u8]) {
        self.attr_header(kind, value.len());
        self.bytes(value);
    }

    #[inline]
    pub(crate) fn be32(&mut self, kind: u16, value: u32) {
        const LEN: u16 = 4 + 4;
        let mut attr = [0; LEN as usize];
        NativeEndian::write_u16(&mut attr[..2], LEN);
        NativeEndian::write_u16(&mut attr[2..4], kind);
        BigEndian::write_u32(&mut attr[4..], value);
        self.pad();
        self.array(attr);
    }

    /// Appends `NFQA_VERDICT_HDR`
    #[inline]
    pub(crate) fn verdict_hdr(&mut self, verdict: u32, id: u32) {
        const LEN: u16 = 4 + 4 + 4;
        const _: () = assert!(LEN as usize == ATTR_HEADER_LEN + VERDICT_HDR_LEN);
        let mut attr = [0; LEN as usize];
        NativeEndian::write_u16(&mut attr[..2], LEN);
        NativeEndian::write_u16(&mut attr[2..4], NFQA_VERDICT_HDR);
        BigEndian::write_u32(&mut attr[4..8], verdict);
        BigEndian::write_u32(&mut attr[8..], id);
        self.pad();
        self.array(attr);
    }

    /// Appends an attribute with nested ones
    pub(crate) fn nested(&mut self, kind: u16, members: impl FnOnce(&mut Self)) {
        self.pad();
        let start = self.len;
        self.bytes(&[0; ATTR_HEADER_LEN]);
        members(self);
        self.pad(); // part of the outer value
        let header = self.buf.get_mut(start..);
        if let Some(header) = header.and_then(<[u8]>::first_chunk_mut::<ATTR_HEADER_LEN>) {
            let len = u16::try_from(self.len - start).unwrap_or_default(); // they are few
            NativeEndian::write_u16(&mut header[..2], len);
            NativeEndian::write_u16(&mut header[2..], kind | NLA_F_NESTED);
        }
    }

    /// Writes the message's length, and returns it
    #[inline]
    pub(crate) fn finish(self) -> Result<usize, EncodeError> {
        if let Some(error) = self.too_long {
            return Err(error);
        }
        let no_space = EncodeError::NoSpace {
            needed: self.len,
            had: self.buf.len(),
        };
        let len = u32::try_from(self.len).map_err(|_| no_space)?;
        if self.len > self.buf.len() {
            return Err(no_space);
        }
        let (field, _) = self.buf.split_first_chunk_mut::<4>().ok_or(no_space)?;
        NativeEndian::write_u32(field, len);
        Ok(self.len)
    }

    fn attr_header(&mut self, kind: u16, value_len: usize) {
        self.pad();
        match u16::try_from(value_len + ATTR_HEADER_LEN) {
            Ok(len) => {
                self.bytes(&len.to_ne_bytes());
                self.bytes(&kind.to_ne_bytes());
            }
            Err(_) => {
                let error = EncodeError::AttributeTooLong {
                    kind,
                    had: value_len,
                    max: MAX_PAYLOAD,
                };
                self.too_long.get_or_insert(error);
            }
        }
    }

    #[inline]
    fn pad(&mut self) {
        let gap = align(self.len) - self.len;
        if gap > 0 {
            self.bytes([0; 3].get(..gap).unwrap_or_default());
        }
    }

    #[inline]
    fn array<const N: usize>(&mut self, bytes: [u8; N]) {
        let room = self.buf.get_mut(self.len..);
        if let Some(room) = room.and_then(<[u8]>::first_chunk_mut) {
            *room = bytes;
        }
        self.len = self.len.saturating_add(N);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        let end = self.len.saturating_add(bytes.len());
        if let Some(room) = self.buf.get_mut(self.len..end) {
            room.copy_from_slice(bytes);
        }
        self.len = end;
    }
}
