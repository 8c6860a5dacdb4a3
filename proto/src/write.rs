//! Writing a request into the caller's buffer

use byteorder::{BigEndian, ByteOrder, NativeEndian};

use crate::consts::{
    ATTR_HEADER_LEN, MAX_PAYLOAD, MESSAGE_HEADER_LEN, NFQA_VERDICT_HDR, NLA_F_NESTED, NLM_F_ACK,
    NLM_F_ECHO, NLM_F_REQUEST, NLMSG_NOOP, VERDICT_HDR_LEN, align, message_type,
};
use crate::error::EncodeError;

/// What the netlink header of a request carries beside type and length
///
/// The kernel looks at none of these but `ack`. It returns all in the header that an acknowledgement or an error echoes
/// ([`Reply`](crate::Reply)), so they can say what a reply belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_structs, reason = "struct nlmsghdr does not change")]
pub struct RequestHeader {
    /// Whether success is acknowledged too (`NLM_F_ACK`); errors are always reported
    pub ack: bool,
    /// A mark of the sender's own (`NLM_F_ECHO`), which the queue subsystem returns as it does the numbers
    pub echo: bool,
    /// `nlmsg_seq`
    pub seq: u32,
    /// `nlmsg_pid`
    pub pid: u32,
}

/// Encodes a `NLMSG_NOOP`, and says how long it is
///
/// With `ack` the kernel answers at once, behind everything it has to say to earlier requests: a barrier, and a way to
/// make one's own socket readable. It needs `CAP_NET_ADMIN`, like every message to netfilter.
///
/// Linux 2.6.22: from there on netlink takes care of control messages itself (`netlink_rcv_skb` in
/// `net/netlink/af_netlink.c`). Tried on Linux 6.18.
///
/// # Errors
/// [`EncodeError::NoSpace`] below 16 bytes of buffer.
#[doc(alias = "NLMSG_NOOP")]
pub fn encode_noop(buf: &mut [u8], header: RequestHeader) -> Result<usize, EncodeError> {
    MessageWriter::control(buf, NLMSG_NOOP, header).finish()
}

/// Appends to a buffer and goes on counting when it is full, so that the error can say how much was needed
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
        let mut bytes = [0; MESSAGE_HEADER_LEN]; // its length is written by `finish`
        NativeEndian::write_u16(&mut bytes[4..6], message_type);
        let ack = if header.ack { NLM_F_ACK } else { 0 };
        let echo = if header.echo { NLM_F_ECHO } else { 0 };
        NativeEndian::write_u16(&mut bytes[6..8], NLM_F_REQUEST | ack | echo);
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

    /// Appends an attribute. Its padding is left to the next one: the last of a message has none.
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

    /// Appends an attribute that nests two of 16 bits
    pub(crate) fn nested_be16(&mut self, kind: u16, members: [(u16, u16); 2]) {
        self.attr_header(
            kind | NLA_F_NESTED,
            members.len() * align(ATTR_HEADER_LEN + 2),
        );
        for (member, value) in members {
            self.attr(member, &value.to_be_bytes());
            self.pad(); // counts as value here
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
