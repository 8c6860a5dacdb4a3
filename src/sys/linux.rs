//! The system calls of the packet path, and those missing in netlink-sys: all `unsafe` of the
//! crate
//!
//! Each function takes borrowed descriptors and slices, and returns the kernel's answer.
#![allow(unsafe_code, reason = "system calls; the rest of the crate denies it")]

use std::alloc::{Layout, handle_alloc_error};
use std::fs::File;
use std::io;
use std::mem::{self, MaybeUninit};
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

use netlink_sys::Socket as Netlink;

/// Sends messages; the kernel has processed them when this call returns
#[inline]
pub(crate) fn send(fd: BorrowedFd<'_>, messages: &[u8]) -> io::Result<usize> {
    // SAFETY: the slice is alive during the call, and its length is given.
    let sent = unsafe { libc::send(fd.as_raw_fd(), messages.as_ptr().cast(), messages.len(), 0) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Sends a message from a signal handler, and leaves `errno` as it was
///
/// Returns true if the message was sent.
pub(crate) fn send_in_signal_handler(fd: RawFd, message: &[u8]) -> bool {
    // SAFETY: `errno` has a place in each thread. The slice is alive during the call, and its
    // length is given; a descriptor that is not open gives an error.
    unsafe {
        let errno = *libc::__errno_location();
        let sent = libc::send(fd, message.as_ptr().cast(), message.len(), 0);
        *libc::__errno_location() = errno;
        sent >= 0
    }
}

/// The maximum number of datagrams for one [`recv_many`]
pub(crate) const RECV_MAX: usize = 64;

/// The length of the first part of a slot: enough for a full Ethernet frame with its attributes
///
/// An odd number of cache lines, so the slots do not all begin in the same lines of a CPU's cache.
#[cfg(not(nfqnl_fuzzing))]
pub(crate) const HEAD_LEN: usize = 2 * 1024 + 64;

/// The behaviour of a receive call if nothing is there
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Block {
    No,
    /// Blocks until one datagram is there, unless the descriptor is non-blocking
    ForFirst,
}

/// Receives one datagram into each of `slots`, at most [`RECV_MAX`], until none is left
///
/// A slot has two parts; the second one may be empty. Datagram `i` goes to the start of slot `i`. A
/// longer datagram is truncated, and its netlink header has its full length. `lens[i]` is the
/// length in the slot. Returns the number of datagrams.
pub(crate) fn recv_many<'s>(
    fd: BorrowedFd<'_>,
    block: Block,
    slots: impl Iterator<Item = [&'s mut [u8]; 2]>,
    lens: &mut [usize],
) -> io::Result<usize> {
    let mut vecs = [const { MaybeUninit::uninit() }; RECV_MAX];
    let mut headers = [const { MaybeUninit::uninit() }; RECV_MAX];

    let mut wanted: libc::c_uint = 0;
    for ((header, vec), slot) in headers
        .iter_mut()
        .zip(&mut vecs)
        .zip(slots)
        .take(lens.len())
    {
        header.write(header_for(vec.write(slot.map(iovec_of))));
        wanted += 1;
    }
    let flags = match block {
        Block::No => libc::MSG_DONTWAIT,
        Block::ForFirst => libc::MSG_WAITFORONE,
    };
    // SAFETY: the first `wanted` headers are written. Each points to one or two iovecs of this
    // frame, and each iovec to a part of a slot, mutably borrowed for `'s`, with its length. The
    // kernel writes there only during the call.
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
    for (len, header) in lens.iter_mut().zip(&headers).take(n) {
        // SAFETY: at most `wanted` headers were filled in, all written before the call.
        let header = unsafe { header.assume_init_ref() };
        *len = usize::try_from(header.msg_len).unwrap_or(usize::MAX);
    }
    Ok(n)
}

fn iovec_of(slot: &mut [u8]) -> libc::iovec {
    libc::iovec {
        iov_base: slot.as_mut_ptr().cast(),
        iov_len: slot.len(),
    }
}

fn header_for(vec: &mut [libc::iovec; 2]) -> libc::mmsghdr {
    // SAFETY: a `mmsghdr` is integers and pointers, for which all zeroes is a value.
    let mut header: libc::mmsghdr = unsafe { mem::zeroed() };
    header.msg_hdr.msg_iov = vec.as_mut_ptr();
    header.msg_hdr.msg_iovlen = if vec[1].iov_len == 0 { 1 } else { 2 };
    header
}

/// Receives one datagram and returns its length in `slot`; cheaper than [`recv_many`]
pub(crate) fn recv_one(fd: BorrowedFd<'_>, block: Block, slot: &mut [u8]) -> io::Result<usize> {
    let flags = match block {
        Block::No => libc::MSG_DONTWAIT,
        Block::ForFirst => 0,
    };
    // SAFETY: the slot is exclusive and alive during the call, and its length is given.
    let len = unsafe { libc::recv(fd.as_raw_fd(), slot.as_mut_ptr().cast(), slot.len(), flags) };
    usize::try_from(len).map_err(|_| io::Error::last_os_error())
}

/// Receives one datagram without blocking; returns its length and the sender's port id (kernel: 0)
pub(crate) fn recv_from(fd: BorrowedFd<'_>, slot: &mut [u8]) -> io::Result<(usize, u32)> {
    const NAME_LEN: libc::socklen_t = 12;
    const _: () = assert!(mem::size_of::<libc::sockaddr_nl>() == NAME_LEN as usize);
    // SAFETY: a `sockaddr_nl` is integers, for which all zeroes is a value.
    let mut name: libc::sockaddr_nl = unsafe { mem::zeroed() };
    let mut name_len = NAME_LEN;
    // SAFETY: slot and address are exclusive and alive during the call, and their sizes are given.
    let len = unsafe {
        libc::recvfrom(
            fd.as_raw_fd(),
            slot.as_mut_ptr().cast(),
            slot.len(),
            libc::MSG_DONTWAIT,
            (&raw mut name).cast(),
            &raw mut name_len,
        )
    };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    Ok((len, name.nl_pid))
}

/// Waits until the descriptor is readable or has an error; returns false after the timeout
///
/// The timeout is in milliseconds; -1 waits without end.
pub(crate) fn wait_readable(fd: BorrowedFd<'_>, timeout: libc::c_int) -> io::Result<bool> {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one `pollfd`, alive and exclusive during the call.
    let n = unsafe { libc::poll(&raw mut poll, 1, timeout) };
    if n >= 0 {
        return Ok(n > 0);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::EINVAL) {
        // A sandbox with RLIMIT_NOFILE 0 forbids `poll`, so the caller tries every millisecond.
        std::thread::sleep(Duration::from_millis(1));
        return Ok(true);
    }
    Err(error)
}

/// Sets the receive buffer's size, above the system's limit if the process may, else up to it
pub(crate) fn set_recv_buffer(fd: BorrowedFd<'_>, bytes: libc::c_int) -> io::Result<()> {
    set_option(fd, libc::SO_RCVBUFFORCE, bytes).or_else(|_| set_option(fd, libc::SO_RCVBUF, bytes))
}

/// Returns a descriptor of a socket's network namespace
pub(crate) fn namespace_of(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    /// `linux/sockios.h`
    const SIOCGSKNS: libc::c_int = 0x894c;
    // SAFETY: no memory is involved.
    let namespace = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSKNS as _) };
    if namespace < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made the descriptor for this call.
    Ok(unsafe { OwnedFd::from_raw_fd(namespace) })
}

/// Calls a function in a network namespace: in this thread if it is there, else in a thread that
/// enters the namespace
pub(crate) fn in_namespace<T: Send>(
    namespace: BorrowedFd<'_>,
    f: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    let there = File::from(namespace.try_clone_to_owned()?).metadata()?;
    let here = std::fs::metadata("/proc/thread-self/ns/net");
    if here.is_ok_and(|here| (here.dev(), here.ino()) == (there.dev(), there.ino())) {
        return Ok(f());
    }
    let enter = || {
        // SAFETY: the descriptor is open; only this thread, which ends soon, changes its namespace.
        match unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } {
            0 => Ok(f()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    let entered = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, enter)?;
        Ok(thread.join())
    });
    entered.and_then(|entered| entered.unwrap_or_else(|_| Err(io::ErrorKind::Other.into())))
}

/// Returns the name of an interface in the socket's network namespace, padded with NULs
pub(crate) fn interface_name(fd: BorrowedFd<'_>, index: u32) -> io::Result<[u8; libc::IFNAMSIZ]> {
    // SAFETY: an `ifreq` is integers, bytes and pointers, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    request.ifr_ifru.ifru_ifindex = libc::c_int::try_from(index).unwrap_or(0);
    // SAFETY: the request is exclusive and alive during the call; the kernel writes the name.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCGIFNAME as _, &raw mut request) };
    match result {
        0 => Ok(request.ifr_name.map(|byte| byte.to_ne_bytes()[0])),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Returns the size of the receive buffer as the kernel counts it
pub(crate) fn recv_buffer(fd: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    option(fd, libc::SO_RCVBUF)
}

/// Makes the send buffer large enough for a message, as far as the process may
#[cfg(feature = "rules")]
pub(crate) fn make_send_buffer(fd: BorrowedFd<'_>, len: usize) {
    let wanted = len.saturating_mul(2); // with the kernel's own overhead
    if send_buffer(fd).is_ok_and(|had| had >= wanted) {
        return;
    }
    let wanted = libc::c_int::try_from(len).unwrap_or(libc::c_int::MAX / 2);
    // The first needs CAP_NET_ADMIN in the initial user namespace. A send that does not fit fails.
    let _ = set_option(fd, libc::SO_SNDBUFFORCE, wanted)
        .or_else(|_| set_option(fd, libc::SO_SNDBUF, wanted));
}

/// Returns true if a process of this PID namespace has this number, also if it cannot be seen
#[cfg(feature = "rules")]
pub(crate) fn process_exists(pid: u32) -> bool {
    let Ok(pid) = libc::pid_t::try_from(pid) else {
        return false;
    };
    // SAFETY: signal 0 only checks; no memory is involved.
    let found = unsafe { libc::kill(pid, 0) } == 0;
    found || io::Error::last_os_error().raw_os_error() != Some(libc::ESRCH)
}

/// Returns the size of the send buffer as the kernel counts it
pub(crate) fn send_buffer(fd: BorrowedFd<'_>) -> io::Result<usize> {
    Ok(usize::try_from(option(fd, libc::SO_SNDBUF)?).unwrap_or(0))
}

/// Returns domain and protocol of a socket
pub(crate) fn domain_and_protocol(fd: BorrowedFd<'_>) -> io::Result<(libc::c_int, libc::c_int)> {
    Ok((option(fd, libc::SO_DOMAIN)?, option(fd, libc::SO_PROTOCOL)?))
}

fn set_option(fd: BorrowedFd<'_>, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the value is an int, alive during the call, and its size is given.
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
    // SAFETY: the kernel writes at most `len` bytes, the size of `value`.
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

/// Zeroed memory in its own pages; only the written pages take physical memory
///
/// Huge pages are off: with them, touching one byte would make 2 MiB resident.
pub(crate) struct Arena {
    memory: NonNull<u8>,
    len: usize,
}

// SAFETY: only this value owns the memory, like a `Box<[u8]>`.
unsafe impl Send for Arena {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Arena {}

impl Arena {
    /// Maps `len` bytes; aborts if no address space is left, as a `Vec` would
    pub(crate) fn new(len: usize) -> Self {
        let len = len.max(1);
        // SAFETY: a new private mapping without a file, at an address chosen by the kernel.
        let memory = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        match NonNull::new(memory.cast::<u8>()) {
            Some(start) if memory != libc::MAP_FAILED => {
                // SAFETY: the pages were just mapped. A kernel without huge pages refuses the
                // advice.
                unsafe { libc::madvise(memory, len, libc::MADV_NOHUGEPAGE) };
                Self { memory: start, len }
            }
            _ => handle_alloc_error(Layout::array::<u8>(len).unwrap_or(Layout::new::<u8>())),
        }
    }
}

impl Deref for Arena {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes are mapped, readable and initialised to zero, until the drop.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.len) }
    }
}

impl DerefMut for Arena {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and exclusive by `&mut self`.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.len) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: `new` made the whole mapping, and nothing borrows it any more.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), self.len) };
    }
}

/// Returns room for a message of this length
pub(crate) fn room_for(longest: usize) -> Vec<u8> {
    vec![0; longest]
}

/// Returns the current time, for waits
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Waits until `changed` is signalled, at most for this time
///
/// A panic elsewhere must leave the guarded state consistent.
pub(crate) fn wait_for<'g, T>(
    changed: &Condvar,
    guard: MutexGuard<'g, T>,
    at_most: Duration,
) -> MutexGuard<'g, T> {
    let waited = changed.wait_timeout(guard, at_most);
    waited.unwrap_or_else(PoisonError::into_inner).0
}

/// Returns true if there is only one CPU, or the number is unknown
pub(crate) fn is_single_cpu() -> bool {
    // SAFETY: no memory is involved.
    unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) < 2 }
}

/// Pins the calling thread to those CPUs of its mask that `is_wanted` names, if there are any
pub(crate) fn pin_to_cpus(is_wanted: impl Fn(usize) -> bool) {
    let size = mem::size_of::<libc::cpu_set_t>();
    // SAFETY: a set of CPUs is an array of integers, for which all zeroes is a value.
    let (mut allowed, mut wanted): (libc::cpu_set_t, libc::cpu_set_t) = unsafe { mem::zeroed() };
    // SAFETY: the set is exclusive and alive during the call, and its size is given.
    if unsafe { libc::sched_getaffinity(0, size, &raw mut allowed) } != 0 {
        return; // more CPUs than the set has room for
    }
    let mut has_any = false;
    for cpu in (0..8 * size).filter(|&cpu| is_wanted(cpu)) {
        // SAFETY: the number is below the number of bits.
        if unsafe { libc::CPU_ISSET(cpu, &allowed) } {
            has_any = true;
            // SAFETY: as above.
            unsafe { libc::CPU_SET(cpu, &mut wanted) };
        }
    }
    if has_any {
        // SAFETY: the set is alive during the call, and its size is given. It is a part of the
        // mask of this thread, so the call does not fail unless the mask has just changed.
        unsafe { libc::sched_setaffinity(0, size, &raw const wanted) };
    }
}

/// Waits for all current RCU read locks in the kernel to end (`synchronize_rcu`)
///
/// The kernel refuses this with `nohz_full`, and with one CPU returns at once. Since Linux 4.3.
/// Before 4.20 a preemptible kernel may not wait long enough.
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

/// Calls of fork(2) since the first socket was opened, counted in parent and child
static FORKS: AtomicU32 = AtomicU32::new(0);
/// The same count in the child only: the generation of this process
static GENERATION: AtomicU32 = AtomicU32::new(0);

/// Begins to count forks
pub(crate) fn watch_forks() {
    extern "C" fn in_parent() {
        FORKS.fetch_add(1, Ordering::Relaxed);
    }
    extern "C" fn in_child() {
        FORKS.fetch_add(1, Ordering::Relaxed);
        GENERATION.fetch_add(1, Ordering::Relaxed);
    }
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handlers only add to atomics, as a child of a threaded process may do.
        unsafe { libc::pthread_atfork(None, Some(in_parent), Some(in_child)) };
    });
}

/// Returns the number of forks so far; it changes in the parent and in the child
pub(crate) fn forks() -> u32 {
    FORKS.load(Ordering::Relaxed)
}

/// Returns the generation of this process; it changes only in the child
#[inline]
pub(crate) fn generation() -> u32 {
    GENERATION.load(Ordering::Relaxed)
}

/// Returns a number for the calling thread, unique among living threads; never 0
#[inline]
pub(crate) fn thread_mark() -> usize {
    thread_local!(static MARK: u8 = const { 0 });
    MARK.with(|mark| ptr::from_ref(mark).addr())
}

/// Sets close-on-exec
pub(crate) fn set_cloexec(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no memory is involved.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Wraps a socket opened by the caller
pub(crate) fn netlink_from(fd: OwnedFd) -> Netlink {
    // SAFETY: the descriptor was owned, and now only `Netlink` owns it.
    unsafe { Netlink::from_raw_fd(fd.into_raw_fd()) }
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
    fn each_datagram_gets_its_own_slot_and_length() {
        let (here, there) = UnixDatagram::pair().unwrap();
        let sent: [&[u8]; 4] = [b"first", b"", b"too long for its slot", b"left"];
        for datagram in sent {
            there.send(datagram).unwrap();
        }
        let mut slots = [[0_u8; 8]; 3];
        let mut lens = [usize::MAX; 3];
        let n = recv_many(
            here.as_fd(),
            Block::ForFirst,
            slots.iter_mut().map(|slot| slot.split_at_mut(3).into()),
            &mut lens,
        );
        assert_eq!(n.unwrap(), 3);
        assert_eq!(lens, [5, 0, 8]);
        assert_eq!(slots, [*b"first\0\0\0", [0; 8], *b"too long"]);
        let mut slot = [0; 8];
        let len = recv_one(here.as_fd(), Block::No, &mut slot).unwrap();
        assert_eq!(len, 4);
        assert_eq!(&slot[..4], b"left");
        let none = recv_many(
            here.as_fd(),
            Block::No,
            [[&mut slot[..], &mut []]].into_iter(),
            &mut lens,
        );
        assert_eq!(none.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_wait_ends_at_its_timeout_or_when_readable() {
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
    fn a_receive_buffer_of_any_size_is_set_and_read() {
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
