//! The system calls on the packet path, and those that netlink-sys has not: all of the crate's `unsafe`
//!
//! Every function takes borrowed descriptors and slices, and returns what the kernel said.
#![allow(unsafe_code, reason = "system calls; the rest of the crate denies it")]

use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::ptr;
use std::sync::{Condvar, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use netlink_sys::Socket;
#[cfg(feature = "tokio")]
use tokio::io::unix::AsyncFd;

#[cfg(feature = "tokio")]
use crate::{async_handle::INTEREST, handle::Handle};

/// Sends messages, which the kernel has processed when this returns
#[inline]
pub(crate) fn send(socket: &Socket, messages: &[u8]) -> io::Result<usize> {
    socket.send(messages, 0)
}

/// How many datagrams one [`recv_many`] takes at most
pub(crate) const RECV_MAX: usize = 64;

/// Whether a receive call waits if nothing is there
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    No,
    /// For one datagram, and not for those behind it; not if the descriptor is non-blocking
    ForFirst,
}

/// Whether a receive call asks who has sent what comes, which takes some 60 ns each time
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sender {
    /// Nobody but the kernel can have
    IsKernel,
    /// Another process may have
    IsAsked,
}

/// Receives what is there, up to one datagram for each of `slots` and `lens`, and at most [`RECV_MAX`]
///
/// Datagram `i` goes to the start of slot `i`, cut if it is longer: its netlink header then says how long it was. `lens[i]`
/// says how much of the slot it takes, which is nothing if another process has sent it. Returns how many came, and how many
/// of these others have sent.
pub(crate) fn recv_many<'s>(
    fd: BorrowedFd<'_>,
    wait: Wait,
    sender: Sender,
    slots: impl Iterator<Item = &'s mut [u8]>,
    lens: &mut [usize],
) -> io::Result<(usize, u64)> {
    let mut names = [const { MaybeUninit::uninit() }; RECV_MAX];
    let mut vecs = [const { MaybeUninit::uninit() }; RECV_MAX];
    let mut headers = [const { MaybeUninit::uninit() }; RECV_MAX];

    let mut wanted: libc::c_uint = 0;
    let parts = headers.iter_mut().zip(&mut names).zip(&mut vecs).zip(slots);
    for (((header, name), vec), slot) in parts.take(lens.len()) {
        let header = header.write(header_for(vec.write(iovec_of(slot))));
        let name = name.write(no_name());
        if sender == Sender::IsAsked {
            header.msg_hdr.msg_name = ptr::from_mut(name).cast();
            header.msg_hdr.msg_namelen = NAME_LEN;
        }
        wanted += 1;
    }
    let flags = match wait {
        Wait::No => libc::MSG_DONTWAIT,
        Wait::ForFirst => libc::MSG_WAITFORONE,
    };
    // SAFETY: the first `wanted` headers are written, and point to an iovec of this frame, and that to a slot that is mutably
    // borrowed for `'s`, and perhaps to a name of this frame, each with its length. The kernel writes there only during the
    // call.
    let n = unsafe {
        libc::recvmmsg(
            fd.as_raw_fd(),
            headers.as_mut_ptr().cast(),
            wanted,
            flags as _,
            ptr::null_mut(),
        )
    };
    let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
    let mut foreign = 0;
    for ((len, header), name) in lens.iter_mut().zip(&headers).zip(&names).take(n) {
        // SAFETY: of at most `wanted` headers and names, which were written, the kernel has filled in the first `n`.
        let (header, name) = unsafe { (header.assume_init_ref(), name.assume_init_ref()) };
        if is_kernel(name) {
            *len = usize::try_from(header.msg_len).unwrap_or(usize::MAX);
        } else {
            *len = 0;
            foreign += 1;
        }
    }
    Ok((n, foreign))
}

const NAME_LEN: libc::socklen_t = 12;
const _: () = assert!(mem::size_of::<libc::sockaddr_nl>() == NAME_LEN as usize);

/// For the kernel to put a sender's address in; its own one
fn no_name() -> libc::sockaddr_nl {
    // SAFETY: a `sockaddr_nl` is integers, for which all zeroes is a value.
    unsafe { mem::zeroed() }
}

/// Whether the kernel has sent what came with this address, and not another process
const fn is_kernel(name: &libc::sockaddr_nl) -> bool {
    name.nl_pid == 0
}

fn iovec_of(slot: &mut [u8]) -> libc::iovec {
    libc::iovec {
        iov_base: slot.as_mut_ptr().cast(),
        iov_len: slot.len(),
    }
}

fn header_for(vec: &mut libc::iovec) -> libc::mmsghdr {
    // SAFETY: a `mmsghdr` is integers and pointers, for which all zeroes is a value.
    let mut header: libc::mmsghdr = unsafe { mem::zeroed() };
    header.msg_hdr.msg_iov = vec;
    header.msg_hdr.msg_iovlen = 1;
    header
}

/// Receives one datagram, and says how much of `slot` it takes, or that another process has sent it: `recvfrom(2)`, which is
/// cheaper than asking for many
pub(crate) fn recv_one(
    fd: BorrowedFd<'_>,
    wait: Wait,
    sender: Sender,
    slot: &mut [u8],
) -> io::Result<Option<usize>> {
    let flags = match wait {
        Wait::No => libc::MSG_DONTWAIT,
        Wait::ForFirst => 0,
    };
    let (mut name, mut name_len) = (no_name(), NAME_LEN);
    let place = match sender {
        Sender::IsKernel => ptr::null_mut(),
        Sender::IsAsked => (&raw mut name).cast(),
    };
    // SAFETY: slot and address are exclusive and alive during the call, and their sizes are given.
    let len = unsafe {
        libc::recvfrom(
            fd.as_raw_fd(),
            slot.as_mut_ptr().cast(),
            slot.len(),
            flags,
            place,
            &raw mut name_len,
        )
    };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    Ok(is_kernel(&name).then_some(len))
}

/// Waits until the descriptor is readable or has an error; `false` when `timeout` milliseconds ran out (-1: never)
pub(crate) fn wait_readable(fd: BorrowedFd<'_>, timeout: libc::c_int) -> io::Result<bool> {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one `pollfd`, alive and exclusive during the call.
    let n = unsafe { libc::poll(&raw mut poll, 1, timeout) };
    if n < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(n > 0)
    }
}

/// Sets the receive buffer's size: beyond the system's limit where the process may, else up to it
pub(crate) fn set_recv_buffer(fd: BorrowedFd<'_>, bytes: libc::c_int) -> io::Result<()> {
    set_option(fd, libc::SO_RCVBUFFORCE, bytes).or_else(|_| set_option(fd, libc::SO_RCVBUF, bytes))
}

/// The size of the receive buffer as the kernel counts it
pub(crate) fn recv_buffer(fd: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    option(fd, libc::SO_RCVBUF)
}

/// The size of the send buffer as the kernel counts it
pub(crate) fn send_buffer(fd: BorrowedFd<'_>) -> io::Result<usize> {
    Ok(usize::try_from(option(fd, libc::SO_SNDBUF)?).unwrap_or(0))
}

/// How many messages the kernel could not put in the receive buffer, so far, modulo 2^32. Linux 4.12
pub(crate) fn drops(fd: BorrowedFd<'_>) -> io::Result<u32> {
    /// `SK_MEMINFO_DROPS` (`linux/sock_diag.h`)
    const DROPS: usize = 8;
    const LEN: libc::socklen_t = 36;
    let mut info = [0_u32; DROPS + 1];
    const _: () = assert!(mem::size_of::<[u32; DROPS + 1]>() == LEN as usize);
    let mut len = LEN;
    // SAFETY: the kernel writes at most `len` bytes, which is the size of `info`.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            info.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    match result {
        0 if len == LEN => Ok(info[DROPS]),
        0 => Err(io::ErrorKind::Unsupported.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Domain and protocol of a socket
pub(crate) fn domain_and_protocol(fd: BorrowedFd<'_>) -> io::Result<(libc::c_int, libc::c_int)> {
    Ok((option(fd, libc::SO_DOMAIN)?, option(fd, libc::SO_PROTOCOL)?))
}

fn set_option(fd: BorrowedFd<'_>, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the value is an int that lives during the call, and its size is given.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            (&raw const value).cast(),
            INT_LEN,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn option(fd: BorrowedFd<'_>, name: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = INT_LEN;
    // SAFETY: the kernel writes at most `len` bytes, which is the size of `value`.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    if result == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}

const INT_LEN: libc::socklen_t = 4;
const _: () = assert!(mem::size_of::<libc::c_int>() == 4);

/// Keeps the kernel from giving huge pages for this memory, 2 MiB for a byte that is touched; as far as it has whole pages,
/// and the kernel can
pub(crate) fn no_huge_pages(memory: &mut [u8]) {
    /// Less than one has not the room for it; and may be part of the allocator's heap, which is no business of ours
    const HUGE: usize = 2 << 20;
    if memory.len() < HUGE {
        return;
    }
    // SAFETY: no memory is involved.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(1);
    let begin = memory.as_ptr().align_offset(page);
    let Some(pages) = memory.get_mut(begin..) else {
        return;
    };
    // SAFETY: the pages are borrowed mutably, and keep what is in them.
    unsafe {
        libc::madvise(
            pages.as_mut_ptr().cast(),
            pages.len() / page * page,
            libc::MADV_NOHUGEPAGE,
        )
    };
}

/// Room for a message of this length
pub(crate) fn room_for(longest: usize) -> Vec<u8> {
    vec![0; longest]
}

/// What a wait is measured by
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Waits until `changed` is signalled, no longer than `at_most`; under a mutex whose state is consistent after a panic
pub(crate) fn wait_for<'g, T>(
    changed: &Condvar,
    guard: MutexGuard<'g, T>,
    at_most: Duration,
) -> MutexGuard<'g, T> {
    let waited = changed.wait_timeout(guard, at_most);
    waited.unwrap_or_else(PoisonError::into_inner).0
}

/// Whether one CPU is all that there is, or that can be counted
pub(crate) fn is_single_cpu() -> bool {
    // SAFETY: no memory is involved.
    unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) < 2 }
}

/// Waits until everything that runs in the kernel under an RCU read lock now has ended (`synchronize_rcu`)
///
/// Not with `nohz_full`, where it is refused, nor with one CPU, where it returns at once. Linux 4.3; before 4.20 a kernel
/// that preempts itself may not wait long enough.
pub(crate) fn wait_for_rcu() -> io::Result<()> {
    /// `MEMBARRIER_CMD_GLOBAL` (`linux/membarrier.h`)
    const GLOBAL: libc::c_int = 1;
    // SAFETY: no memory is involved.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether the calling thread has `CAP_NET_ADMIN` in its user namespace
pub(crate) fn has_net_admin() -> bool {
    /// `_LINUX_CAPABILITY_VERSION_3` (`linux/capability.h`)
    const VERSION: u32 = 0x2008_0522;
    /// `CAP_NET_ADMIN`
    const BIT: u32 = 12;
    let mut header = [VERSION, 0]; // struct __user_cap_header_struct: version, and 0 for the calling thread
    let mut sets = [[0_u32; 3]; 2]; // struct __user_cap_data_struct: effective, permitted, inheritable, 32 bits each
    // SAFETY: the kernel reads and writes the header and writes two structs of three integers, for this version.
    let result = unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()) };
    let [[effective, ..], _] = sets;
    result == 0 && effective & 1 << BIT != 0
}

/// Sets or clears close-on-exec
pub(crate) fn set_cloexec(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no memory is involved.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Wraps a socket that somebody else opened
pub(crate) fn socket_from(fd: OwnedFd) -> Socket {
    // SAFETY: the descriptor was owned, and from here on `Socket` alone owns it.
    unsafe { Socket::from_raw_fd(fd.into_raw_fd()) }
}

/// Registers a handle with the tokio runtime that the caller runs in
///
/// Nobody may put another handle in place of it by the result's `get_mut`.
#[cfg(feature = "tokio")]
#[track_caller]
pub(crate) fn register(handle: Handle) -> io::Result<AsyncFd<Handle>> {
    // SAFETY: a `Handle` has one socket from beginning to end, which is closed when it is dropped, and no earlier;
    // `AsyncHandle`, which alone calls this, lends the handle out shared alone, so it stays the same one.
    let registered = unsafe { AsyncFd::register_with_interest(handle, INTEREST) };
    registered.map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    //! The calls as this target's C library has them: its structs, and its 32 bits
    #![allow(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn many_datagrams_come_each_into_its_slot_with_its_length() {
        let (here, there) = UnixDatagram::pair().unwrap();
        let sent: [&[u8]; 4] = [b"first", b"", b"too long for its slot", b"left"];
        for datagram in sent {
            there.send(datagram).unwrap();
        }
        let mut slots = [[0_u8; 8]; 3];
        let mut lens = [usize::MAX; 3];
        let n = recv_many(
            here.as_fd(),
            Wait::ForFirst,
            Sender::IsAsked,
            slots.iter_mut().map(|slot| &mut slot[..]),
            &mut lens,
        );
        assert_eq!(n.unwrap(), (3, 0));
        assert_eq!(lens, [5, 0, 8]);
        assert_eq!(slots, [*b"first\0\0\0", [0; 8], *b"too long"]);
        let mut slot = [0; 8];
        let len = recv_one(here.as_fd(), Wait::No, Sender::IsKernel, &mut slot).unwrap();
        assert_eq!(len, Some(4));
        assert_eq!(&slot[..4], b"left");
        let none = recv_many(
            here.as_fd(),
            Wait::No,
            Sender::IsKernel,
            [&mut slot[..]].into_iter(),
            &mut lens,
        );
        assert_eq!(none.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_wait_takes_as_long_as_it_says_and_no_longer_than_it_must() {
        let (here, there) = UnixDatagram::pair().unwrap();
        let begin = Instant::now();
        assert!(!wait_readable(here.as_fd(), 0).unwrap());
        assert!(!wait_readable(here.as_fd(), 20).unwrap());
        assert!(begin.elapsed() >= Duration::from_millis(20));
        there.send(b"now").unwrap();
        for timeout in [0, libc::c_int::MAX, -1] {
            assert!(wait_readable(here.as_fd(), timeout).unwrap());
        }
    }

    #[test]
    fn the_receive_buffer_is_set_and_read_up_to_the_last_int() {
        let (here, _there) = UnixDatagram::pair().unwrap();
        set_recv_buffer(here.as_fd(), 1 << 14).unwrap();
        assert_eq!(recv_buffer(here.as_fd()).unwrap(), 1 << 15);
        set_recv_buffer(here.as_fd(), libc::c_int::MAX / 2).unwrap();
        assert!(recv_buffer(here.as_fd()).unwrap() > 1 << 15);
        assert_eq!(
            domain_and_protocol(here.as_fd()).unwrap(),
            (libc::AF_UNIX, 0)
        );
    }
}
