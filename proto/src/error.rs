//! Errors of decoding and encoding, with offsets and lengths

use core::fmt;

use thiserror::Error;

/// An error from decoding a datagram or a message
///
/// Offsets count from the first byte of the input: the datagram for errors from
/// [`Messages`](crate::Messages), the message for errors from
/// [`Packet::parse`](crate::Packet::parse), and the given bytes for errors from
/// [`Vlan::parse`](crate::Vlan::parse) and [`Attrs`](crate::Attrs).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The bytes end within a header
    #[error("{what} at byte {offset} needs {needed} bytes, {had} left")]
    Short {
        /// The header
        what: Header,
        /// Its offset
        offset: usize,
        /// Its length
        needed: usize,
        /// The number of bytes left in the datagram or message
        had: usize,
    },
    /// `nlmsg_len` is shorter than the message's header, so the next message cannot be found
    #[error(
        "netlink message at byte {offset} says it is {len} bytes long, its header alone takes {needed}"
    )]
    MessageLength {
        /// The offset of the message
        offset: usize,
        /// The value of `nlmsg_len`
        len: usize,
        /// The length of the header
        needed: usize,
    },
    /// The message is longer than the datagram: the receive buffer was too small
    #[error(
        "netlink message at byte {offset} is {needed} bytes long, the buffer holds {had} of them"
    )]
    Truncated {
        /// The offset of the message
        offset: usize,
        /// The value of `nlmsg_len`: the buffer size for this message
        needed: usize,
        /// The number of bytes received
        had: usize,
    },
    /// An attribute's `nla_len` is below 4, or longer than the rest of the message or attribute
    #[error(
        "attribute {kind}{} at byte {offset} says it is {len} bytes long, {had} are left",
        Within(.within)
    )]
    AttributeLength {
        /// Attribute number, without flags
        kind: u16,
        /// The number of the outer attribute; `None` if the attribute is not nested, and in errors
        /// from [`Attrs`](crate::Attrs)
        within: Option<u16>,
        /// The offset of the attribute's header
        offset: usize,
        /// The value of `nla_len`, which includes the header
        len: usize,
        /// The number of bytes left, including the header
        had: usize,
    },
    /// An attribute is shorter than its type
    #[error(
        "attribute {kind}{} at byte {offset} needs {needed} bytes of value, has {had}",
        Within(.within)
    )]
    AttributeShort {
        /// Attribute number, without flags
        kind: u16,
        /// The number of the outer attribute; `None` if the attribute is not nested
        within: Option<u16>,
        /// The offset of the attribute's header
        offset: usize,
        /// The minimum size of its value
        needed: usize,
        /// The actual size of its value
        had: usize,
    },
    /// A mandatory attribute is missing
    #[error("attribute {kind} is missing from {} at byte {offset}", Holder(.within))]
    MissingAttribute {
        /// Attribute number
        kind: u16,
        /// The number of the outer attribute; `None` if the attribute is not nested
        within: Option<u16>,
        /// The offset of the outer attribute's value, or of the message
        offset: usize,
    },
    /// Not a packet message of the queue subsystem
    #[error("message type {message_type:#06x} is not NFQNL_MSG_PACKET")]
    NotAPacket {
        /// The value of `nlmsg_type`
        message_type: u16,
    },
    /// The message is longer than 256 KiB, the limit of [`Packet`](crate::Packet)
    #[error("message of {had} bytes, at most {max} can be indexed")]
    TooLong {
        /// The length of the message
        had: usize,
        /// The limit
        max: usize,
    },
}

impl DecodeError {
    /// The same error with `base` added to its offset
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

    /// The same error, for an attribute nested in attribute `kind`
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

/// Displays the outer attribute of a nested one
struct Within<'a>(&'a Option<u16>);

impl fmt::Display for Within<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(kind) => write!(f, " within attribute {kind}"),
            None => Ok(()),
        }
    }
}

/// Displays the place from which an attribute is missing
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

/// An error from encoding a request
///
/// The contents of the buffer are unspecified after an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The buffer is too small
    #[error("the message needs {needed} bytes, the buffer has {had}")]
    NoSpace {
        /// The length of the whole message
        needed: usize,
        /// The length of the buffer
        had: usize,
    },
    /// An attribute's value is too long for its 16-bit length field
    #[error("attribute {kind} has {had} bytes of value, at most {max} fit")]
    AttributeTooLong {
        /// Attribute number
        kind: u16,
        /// The length of the value
        had: usize,
        /// The limit, 65531
        max: usize,
    },
}
