//! What can be wrong with bytes: offsets and lengths, never a `String`

use core::fmt;

use thiserror::Error;

/// Why a datagram or a message could not be decoded
///
/// Offsets count from the start of the datagram when the error comes from [`Messages`](crate::Messages), and from the
/// start of the message when it comes from [`Packet::parse`](crate::Packet::parse). [`Vlan::parse`](crate::Vlan::parse)
/// and [`Attrs`](crate::Attrs) see no more than the bytes they are given, and count from the first of those.
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
    #[error(
        "attribute {kind}{} at byte {offset} says it is {len} bytes long, {had} are left",
        Within(.within)
    )]
    AttributeLength {
        /// Attribute number, without flags
        kind: u16,
        /// The number of the attribute that nests it; `None` in the message itself, and from [`Attrs`](crate::Attrs),
        /// which don't know what they stand in
        within: Option<u16>,
        /// Where the attribute begins
        offset: usize,
        /// What `nla_len` says, header included
        len: usize,
        /// What was left, header included
        had: usize,
    },
    /// An attribute of fixed size is too short
    #[error(
        "attribute {kind}{} at byte {offset} needs {needed} bytes of value, has {had}",
        Within(.within)
    )]
    AttributeShort {
        /// Attribute number, without flags
        kind: u16,
        /// The number of the attribute that nests it; `None` in the message itself
        within: Option<u16>,
        /// Where the attribute begins
        offset: usize,
        /// The size of its value
        needed: usize,
        /// The size that it has
        had: usize,
    },
    /// An attribute that is always there is missing
    #[error("attribute {kind} is missing from {} at byte {offset}", Holder(.within))]
    MissingAttribute {
        /// Attribute number
        kind: u16,
        /// The number of the attribute that should nest it; `None` for the message itself
        within: Option<u16>,
        /// Where that attribute's value begins, or the message
        offset: usize,
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
    pub(crate) const fn at(mut self, base: usize) -> Self {
        match &mut self {
            Self::Short { offset, .. }
            | Self::MessageLength { offset, .. }
            | Self::Truncated { offset, .. }
            | Self::AttributeLength { offset, .. }
            | Self::AttributeShort { offset, .. }
            | Self::MissingAttribute { offset, .. } => *offset += base,
            Self::NotAPacket { .. } | Self::TooLong { .. } => {}
        }
        self
    }

    /// The same error about an attribute that attribute `kind` nests
    #[must_use]
    pub(crate) const fn within(mut self, kind: u16) -> Self {
        if let Self::AttributeLength { within, .. }
        | Self::AttributeShort { within, .. }
        | Self::MissingAttribute { within, .. } = &mut self
        {
            *within = Some(kind);
        }
        self
    }
}

const _: () = assert!(size_of::<DecodeError>() <= 32, "four words");

/// What an attribute's number is followed by where another nests it
struct Within<'a>(&'a Option<u16>);

impl fmt::Display for Within<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(kind) => write!(f, " within attribute {kind}"),
            None => Ok(()),
        }
    }
}

/// What an attribute is missing from
struct Holder<'a>(&'a Option<u16>);

impl fmt::Display for Holder<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(kind) => write!(f, "the value of attribute {kind}"),
            None => f.write_str("the message"),
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
