//! Network namespaces beside the calling thread's own

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Operation, Result};
use crate::sys;

/// A network namespace, for [`SocketBuilder::netns`](crate::SocketBuilder::netns)
///
/// A socket belongs to the namespace in which it was opened, for its whole life. A short-lived
/// thread opens it there, and the calling thread stays where it is. Clones are cheap, and keep the
/// namespace alive.
///
/// Entering a namespace needs `CAP_SYS_ADMIN` in the process's user namespace, and in the user
/// namespace that owns the network namespace. Root has both. For a namespace of another user
/// (`unshare -Urn`, rootless containers) an ordinary user opens a netfilter socket inside, and
/// passes its descriptor to [`SocketBuilder::open_fd`](crate::SocketBuilder::open_fd).
///
/// ```no_run
/// use nfqnl::{Netns, Socket};
///
/// # fn main() -> nfqnl::Result<()> {
/// let blue = Netns::named("blue")?; // made by `ip netns add blue`
/// let socket = Socket::builder().netns(&blue).open()?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[doc(alias = "setns")]
pub struct Netns(Arc<OwnedFd>);

impl Netns {
    /// Opens a namespace by its name, a file in `/run/netns`, as `ip netns` has it
    ///
    /// # Errors
    /// [`Error::Io`], also if the name is a path.
    pub fn named(name: &str) -> Result<Self> {
        if name.contains('/') || ["", ".", ".."].contains(&name) {
            let source = io::ErrorKind::NotFound.into();
            let op = Operation::EnterNetns;
            return Err(Error::Io { op, source });
        }
        Self::open(Path::new("/run/netns").join(name))
    }

    /// Opens the namespace of a process
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn of_process(pid: u32) -> Result<Self> {
        Self::open(format!("/proc/{pid}/ns/net"))
    }

    /// Opens a namespace by its file, for instance `/proc/thread-self/ns/net`
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(Operation::EnterNetns))?;
        Ok(OwnedFd::from(file).into())
    }

    /// Returns the namespace of a socket
    ///
    /// # Errors
    /// [`Error::Io`]: no `CAP_NET_ADMIN` in the namespace; no socket.
    #[doc(alias = "SIOCGSKNS")]
    pub fn of_socket(socket: impl AsFd) -> Result<Self> {
        let fd = sys::namespace_of(socket.as_fd()).map_err(Error::io(Operation::EnterNetns))?;
        Ok(fd.into())
    }

    /// Calls a function in the namespace
    pub(crate) fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        sys::in_namespace(self.0.as_fd(), f)
    }

    /// Opens something in the namespace
    pub(crate) fn open_in<T: Send>(
        &self,
        open: impl FnOnce() -> io::Result<T> + Send,
    ) -> Result<T> {
        let opened = self.enter(open).map_err(Error::io(Operation::EnterNetns))?;
        opened.map_err(Error::io(Operation::Open))
    }
}

impl From<OwnedFd> for Netns {
    /// Takes a descriptor of a namespace; another descriptor is an error when it is used
    fn from(fd: OwnedFd) -> Self {
        Self(Arc::new(fd))
    }
}
