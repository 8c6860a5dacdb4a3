//! Splitting a datagram into messages

use byteorder::{ByteOrder, NativeEndian};

use crate::attr::Attrs;
use crate::consts::{
    ERROR_LEN, MESSAGE_HEADER_LEN, NFNL_SUBSYS_QUEUE, NFQNL_MSG_PACKET, NLM_F_ACK_TLVS,
    NLM_F_CAPPED, NLMSG_DONE, NLMSG_ERROR, NLMSG_NOOP, NLMSG_OVERRUN, NLMSGERR_ATTR_MSG,
    NLMSGERR_ATTR_OFFS, align, message_type,
};
use crate::error::{DecodeError, Header};
use crate::packet::Packet;

/// One message of a datagram
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Message<'a> {
    /// A packet waits for a verdict
    Packet(Packet<'a>),
    /// The kernel's reply to a request: an acknowledgement or an error
    Reply(Reply<'a>),
    /// Messages were lost (`NLMSG_OVERRUN`)
    Overrun,
    /// The end of a dump (`NLMSG_DONE`); the queue subsystem has no dumps
    Done,
    /// An empty message (`NLMSG_NOOP`)
    Noop,
    /// Any other message
    Other(Other<'a>),
}

/// A message of a type unknown to this crate
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Other<'a> {
    /// `nlmsg_type`
    pub message_type: u16,
    /// `nlmsg_flags`
    pub flags: u16,
    /// The bytes behind the netlink header
    pub body: &'a [u8],
}

/// The outcome of a request (`NLMSG_ERROR`), and the header of the request
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Reply<'a> {
    /// The kernel's error number, positive as in C's `errno`; 0 is an acknowledgement
    ///
    /// The kernel also sends numbers without a name in user space, such as 524 (`ENOTSUPP`).
    pub errno: i32,
    /// `nlmsg_type` of the request
    pub request_type: u16,
    /// `nlmsg_flags` of the request
    pub request_flags: u16,
    /// `nlmsg_seq` of the request
    pub seq: u32,
    /// `nlmsg_pid` of the request, as its sender wrote it
    pub pid: u32,
    /// The kernel's error text, without the NUL
    ///
    /// `None` if the socket lacks `NETLINK_EXT_ACK`, or if the kernel has no text for the error.
    /// Since Linux 4.12.
    pub text: Option<&'a [u8]>,
    /// The offset of the fault in the request, in bytes from its netlink header
    ///
    /// `None` if the kernel does not report it. Since Linux 4.12.
    pub offset: Option<u32>,
}

impl<'a> Reply<'a> {
    /// Returns true if the kernel carried out the request
    #[must_use]
    pub const fn is_ack(&self) -> bool {
        self.errno == 0
    }

    /// Decodes the body of a `NLMSG_ERROR` with these flags
    fn parse(body: &'a [u8], flags: u16) -> Result<Self, DecodeError> {
        let Some((fixed, rest)) = body.split_first_chunk::<ERROR_LEN>() else {
            return Err(DecodeError::Short {
                what: Header::Error,
                offset: MESSAGE_HEADER_LEN,
                needed: ERROR_LEN,
                had: body.len(),
            });
        };
        let mut reply = Self {
            errno: NativeEndian::read_i32(&fixed[..4]).saturating_neg(),
            request_type: NativeEndian::read_u16(&fixed[8..]),
            request_flags: NativeEndian::read_u16(&fixed[10..]),
            seq: NativeEndian::read_u32(&fixed[12..]),
            pid: NativeEndian::read_u32(&fixed[16..]),
            text: None,
            offset: None,
        };
        if flags & NLM_F_ACK_TLVS != 0 {
            let request_len =
                usize::try_from(NativeEndian::read_u32(&fixed[4..])).unwrap_or(usize::MAX);
            // An error that is not capped repeats the whole request first.
            let echoed = if flags & NLM_F_CAPPED != 0 {
                0
            } else {
                align(request_len.saturating_sub(MESSAGE_HEADER_LEN))
            };
            for attr in Attrs::new(rest.get(echoed..).unwrap_or_default()).map_while(Result::ok) {
                match attr.kind {
                    NLMSGERR_ATTR_MSG => {
                        let text = attr.value.split(|&byte| byte == 0).next();
                        reply.text = text.filter(|text| !text.is_empty());
                    }
                    NLMSGERR_ATTR_OFFS => {
                        reply.offset = attr
                            .value
                            .first_chunk::<4>()
                            .map(|b| NativeEndian::read_u32(b));
                    }
                    _ => {}
                }
            }
        }
        Ok(reply)
    }
}

impl core::fmt::Debug for Reply<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Reply")
            .field("errno", &self.errno)
            .field("request_type", &format_args!("{:#06x}", self.request_type))
            .field("request_flags", &self.request_flags)
            .field("seq", &self.seq)
            .field("pid", &self.pid)
            .field(
                "text",
                &self
                    .text
                    .map(|t| core::str::from_utf8(t).unwrap_or("not UTF-8")),
            )
            .field("offset", &self.offset)
            .finish()
    }
}

/// The messages of a datagram, in order
///
/// A message with a broken body is one `Err`, and the iterator goes on with the next message. A
/// message with a broken length is the last item, because the next message cannot be found.
#[derive(Clone, Debug)]
pub struct Messages<'a> {
    rest: &'a [u8],
    offset: usize,
}

impl<'a> Messages<'a> {
    /// The messages in `datagram`, the bytes from one receive call
    #[must_use]
    pub const fn new(datagram: &'a [u8]) -> Self {
        Self {
            rest: datagram,
            offset: 0,
        }
    }

    /// The bytes that have not been read yet
    #[must_use]
    pub const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    fn end_with(&mut self, error: DecodeError) -> Option<Result<Message<'a>, DecodeError>> {
        self.rest = &[];
        Some(Err(error))
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Result<Message<'a>, DecodeError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let (rest, offset) = (self.rest, self.offset);
        let Some((header, _)) = rest.split_first_chunk::<MESSAGE_HEADER_LEN>() else {
            let (what, needed) = (Header::Message, MESSAGE_HEADER_LEN);
            return self.end_with(DecodeError::Short {
                what,
                offset,
                needed,
                had: rest.len(),
            });
        };
        let len = usize::try_from(NativeEndian::read_u32(header)).unwrap_or(usize::MAX);
        if len < MESSAGE_HEADER_LEN {
            return self.end_with(DecodeError::MessageLength {
                offset,
                len,
                needed: MESSAGE_HEADER_LEN,
            });
        }
        let Some(message) = rest.get(..len) else {
            return self.end_with(DecodeError::Truncated {
                offset,
                needed: len,
                had: rest.len(),
            });
        };
        self.rest = rest.get(align(len)..).unwrap_or_default();
        self.offset = offset.saturating_add(align(len));
        let kind = NativeEndian::read_u16(&header[4..]);
        if kind == PACKET {
            // In place, for the reason given in `Packet::parse`
            let mut item = Some(Ok(Message::Packet(Packet::unindexed(message))));
            if let Some(Ok(Message::Packet(packet))) = &mut item {
                if packet.index() {
                    return item;
                }
            }
        }
        let flags = NativeEndian::read_u16(&header[6..]);
        Some(decode(message, kind, flags).map_err(|error| error.at(offset)))
    }
}

impl core::iter::FusedIterator for Messages<'_> {}

const PACKET: u16 = message_type(NFQNL_MSG_PACKET);
const _: () = assert!(PACKET.to_be_bytes()[0] == NFNL_SUBSYS_QUEUE);

/// Decodes any message, except packets that [`Packet::index`] can read
#[inline]
fn decode(message: &[u8], kind: u16, flags: u16) -> Result<Message<'_>, DecodeError> {
    let body = message.get(MESSAGE_HEADER_LEN..).unwrap_or_default();
    Ok(match kind {
        PACKET => Message::Packet(Packet::parse_carefully(message)?),
        NLMSG_ERROR => Message::Reply(Reply::parse(body, flags)?),
        NLMSG_OVERRUN => Message::Overrun,
        NLMSG_DONE => Message::Done,
        NLMSG_NOOP => Message::Noop,
        message_type => Message::Other(Other {
            message_type,
            flags,
            body,
        }),
    })
}
