//! What can be wrong with bytes: offsets and lengths, never a `String`

use thiserror::Error;

/// Why a datagram or a message could not be decoded
///
/// Offsets count from the start of the datagram when the error comes from [`Messages`](crate::Messages), and from the
/// start of the message when it comes from [`Packet::parse`](crate::Packet::parse).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Fewer bytes than a header takes
    #[error("{what} at byte {offset} needs {needed} bytes, {had} left")]
    Short {
        /// Which header
        what: Header,
        /// Where it begins
        offset: usize,
        /// Its length
        needed: usize,
        /// What was left of the datagram or message
        had: usize,
    },
    /// `nlmsg_len` is shorter than the message's own header, so the next message can't be found
    #[error(
        "netlink message at byte {offset} says it is {len} bytes long, its header alone takes {needed}"
    )]
    MessageLength {
        /// Where the message begins
        offset: usize,
        /// What `nlmsg_len` says
        len: usize,
        /// The least it can be
        needed: usize,
    },
    /// The message goes on beyond the end of the bytes: the receive buffer was too small
    #[error(
        "netlink message at byte {offset} is {needed} bytes long, the buffer holds {had} of them"
    )]
    Truncated {
        /// Where the message begins
        offset: usize,
        /// What `nlmsg_len` says: the receive buffer this message needs
        needed: usize,
        /// What was received of it
        had: usize,
    },
    /// An attribute's `nla_len` is below 4 or beyond the end of what holds it
    #[error("attribute {kind} at byte {offset} says it is {len} bytes long, {had} are left")]
    AttributeLength {
        /// Attribute number, without flags
        kind: u16,
        /// Where the attribute begins
        offset: usize,
        /// What `nla_len` says, header included
        len: usize,
        /// What was left, header included
        had: usize,
    },
    /// An attribute of fixed size is too short
    #[error("attribute {kind} at byte {offset} needs {needed} bytes of value, has {had}")]
    AttributeShort {
        /// Attribute number, without flags
        kind: u16,
        /// Where the attribute begins
        offset: usize,
        /// The size of its value
        needed: usize,
        /// The size that it has
        had: usize,
    },
    /// An attribute that is always there is missing
    #[error("attribute {kind} is missing")]
    MissingAttribute {
        /// Attribute number
        kind: u16,
    },
    /// Not a packet message of the queue subsystem
    #[error("message type {message_type:#06x} is not NFQNL_MSG_PACKET")]
    NotAPacket {
        /// What `nlmsg_type` says
        message_type: u16,
    },
    /// The message is longer than any that the kernel can make (256 KiB)
    #[error("message of {had} bytes, at most {max} can be indexed")]
    TooLong {
        /// Its length
        had: usize,
        /// The limit
        max: usize,
    },
}

impl DecodeError {
    /// The same error with offsets that count from `base` bytes further back
    #[must_use]
    pub(crate) const fn at(self, base: usize) -> Self {
        match self {
            Self::Short {
                what,
                offset,
                needed,
                had,
            } => Self::Short {
                what,
                offset: offset + base,
                needed,
                had,
            },
            Self::AttributeLength {
                kind,
                offset,
                len,
                had,
            } => Self::AttributeLength {
                kind,
                offset: offset + base,
                len,
                had,
            },
            Self::AttributeShort {
                kind,
                offset,
                needed,
                had,
            } => Self::AttributeShort {
                kind,
                offset: offset + base,
                needed,
                had,
            },
            Self::Truncated {
                offset,
                needed,
                had,
            } => Self::Truncated {
                offset: offset + base,
                needed,
                had,
            },
            Self::MessageLength {
                offset,
                len,
                needed,
            } => Self::MessageLength {
                offset: offset + base,
                len,
                needed,
            },
            Self::MissingAttribute { .. } | Self::NotAPacket { .. } | Self::TooLong { .. } => self,
        }
    }
}

/// The fixed parts of a message, for [`DecodeError::Short`]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum Header {
    /// `struct nlmsghdr`
    #[error("netlink header")]
    Message,
    /// `struct nfgenmsg`
    #[error("netfilter header")]
    Family,
    /// `struct nlmsgerr`
    #[error("error message")]
    Error,
}

/// Why a request could not be encoded; nothing useful is in the buffer then
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The caller's buffer is too small
    #[error("the message needs {needed} bytes, the buffer has {had}")]
    NoSpace {
        /// The length of the whole message
        needed: usize,
        /// The length of the buffer
        had: usize,
    },
    /// An attribute's value is longer than its 16-bit length can say
    #[error("attribute {kind} has {had} bytes of value, at most {max} fit")]
    AttributeTooLong {
        /// Attribute number
        kind: u16,
        /// Its length
        had: usize,
        /// The limit, 65531
        max: usize,
    },
}
