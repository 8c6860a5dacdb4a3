//! Names of network interfaces

use std::fmt;
use std::os::fd::AsFd;
use std::str::FromStr;

use crate::error::{Error, Operation, Result};
use crate::socket::Socket;
use crate::sys;

/// The name of a network interface: up to 15 bytes, rarely other than ASCII
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[doc(alias = "IFNAMSIZ")]
pub struct InterfaceName {
    padded: [u8; libc::IFNAMSIZ],
}

impl InterfaceName {
    /// Returns the name without the NUL at its end
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        let mut parts = self.padded.split(|&byte| byte == 0);
        parts.next().unwrap_or_default()
    }

    #[cfg(feature = "rules")]
    pub(crate) const fn padded(&self) -> &[u8] {
        &self.padded
    }
}

impl FromStr for InterfaceName {
    type Err = ParseInterfaceNameError;

    fn from_str(name: &str) -> Result<Self, ParseInterfaceNameError> {
        let is_valid = |byte: u8| !matches!(byte, 0 | b'/' | b':') && !byte.is_ascii_whitespace();
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || !name.bytes().all(is_valid) {
            return Err(ParseInterfaceNameError);
        }
        let mut bytes = name.bytes();
        let padded = std::array::from_fn(|_| bytes.next().unwrap_or(0));
        Ok(Self { padded })
    }
}

/// A text that cannot be the name of an interface: 1 to 15 bytes, without `/`, `:` and spaces
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not the name of an interface")]
#[non_exhaustive]
pub struct ParseInterfaceNameError;

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&String::from_utf8_lossy(self.as_bytes()))
    }
}

impl fmt::Debug for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&String::from_utf8_lossy(self.as_bytes()), f)
    }
}

impl PartialEq<str> for InterfaceName {
    fn eq(&self, name: &str) -> bool {
        self.as_bytes() == name.as_bytes()
    }
}

impl PartialEq<&str> for InterfaceName {
    fn eq(&self, name: &&str) -> bool {
        self == *name
    }
}

/// Names of devices
impl Socket {
    /// Returns the name of an interface by its index, as in [`Packet::indev`](crate::Packet::indev)
    ///
    /// The index counts in the network namespace of the socket, and so does this method, also in
    /// a thread of another namespace. It asks the kernel in each call, so a new name is seen at
    /// once. `None` if there is no such interface any more.
    ///
    /// ```no_run
    /// # fn f(socket: &nfqnl::Socket, packet: &nfqnl::Packet<'_>) -> nfqnl::Result<()> {
    /// if let Some(index) = packet.indev() {
    ///     match socket.interface_name(index)? {
    ///         Some(name) => println!("from {name}"),
    ///         None => println!("from interface {index}, which is gone"),
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Io`].
    #[doc(alias = "nfq_get_indev_name")]
    #[doc(alias = "nfq_get_outdev_name")]
    #[doc(alias = "nfq_get_physindev_name")]
    #[doc(alias = "nfq_get_physoutdev_name")]
    #[doc(alias = "nlif_index2name")]
    #[doc(alias = "SIOCGIFNAME")]
    pub fn interface_name(&self, index: u32) -> Result<Option<InterfaceName>> {
        match sys::interface_name(self.as_fd(), index) {
            Ok(padded) => Ok(Some(InterfaceName { padded })),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(Error::io(Operation::GetInterfaceName)(error)),
        }
    }
}
