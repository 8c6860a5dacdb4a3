//! Options and properties of a library's sockets

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use crate::sys;

/// Sets the size of a send buffer; the kernel doubles the value
///
/// # Errors
/// The system call's error.
pub fn set_send_buffer(socket: &impl AsFd, bytes: i32) -> io::Result<()> {
    sys::set_option(socket, libc::SOL_SOCKET, libc::SO_SNDBUF, bytes)
}

/// Makes a socket non-blocking
///
/// # Errors
/// The system call's error.
pub fn set_nonblocking(socket: &impl AsFd) -> io::Result<()> {
    netlink(socket.as_fd().try_clone_to_owned()?).set_non_blocking(true)
}

/// Wraps the descriptor of a netlink socket
#[must_use]
pub fn netlink(fd: OwnedFd) -> netlink_sys::Socket {
    sys::netlink(fd)
}

/// Returns whether a descriptor has `O_CLOEXEC`
///
/// # Errors
/// Without /proc.
pub fn is_cloexec(socket: &impl AsFd) -> io::Result<bool> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", socket.as_fd().as_raw_fd()))?;
    let flags = info
        .lines()
        .find_map(|line| line.strip_prefix("flags:"))
        .and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok())
        .ok_or(io::ErrorKind::InvalidData)?;
    Ok(flags & libc::O_CLOEXEC.unsigned_abs() != 0)
}

/// Returns the port id of a netlink socket, from the inode's line in `/proc/net/netlink`
///
/// # Errors
/// Without /proc, or if the socket is in another network namespace.
pub fn netlink_port(socket: &impl AsFd) -> io::Result<u32> {
    let link = fs::read_link(format!("/proc/self/fd/{}", socket.as_fd().as_raw_fd()))?;
    let link = link.to_string_lossy();
    let inode = link
        .strip_prefix("socket:[")
        .and_then(|rest| rest.strip_suffix(']'))
        .ok_or(io::ErrorKind::InvalidData)?;
    let table = fs::read_to_string("/proc/thread-self/net/netlink")?;
    table
        .lines()
        .map(|line| line.split_ascii_whitespace().collect::<Vec<_>>())
        .find(|columns| columns.last() == Some(&inode))
        .and_then(|columns| columns.get(2)?.parse().ok())
        .ok_or_else(|| io::ErrorKind::NotFound.into())
}
