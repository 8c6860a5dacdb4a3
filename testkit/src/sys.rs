//! System calls that std, netlink-sys and rustix have not, or not without: all of this crate's `unsafe`
#![allow(unsafe_code, reason = "system calls; the rest of the crate denies it")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::CStr;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::panic::{self, AssertUnwindSafe};
use std::process::Command;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustix::fs::{self, Mode, OFlags};
use rustix::process::{self, Pid, Signal, WaitOptions};
use rustix::thread;

/// Has the child make namespaces of its own before it runs its program, when it is still single-threaded
///
/// With `maps`, a user namespace too, in which the child is root.
pub(crate) fn isolate(command: &mut Command, maps: Option<UserMaps>) -> &mut Command {
    let before_exec = move || {
        let user = if maps.is_some() {
            libc::CLONE_NEWUSER
        } else {
            0
        };
        unshare(user | libc::CLONE_NEWNET)?;
        if let Some(maps) = &maps {
            maps.write()?;
        }
        process::set_parent_process_death_signal(Some(Signal::KILL))?;
        Ok(())
    };
    // SAFETY: between fork and exec, the closure makes async-signal-safe system calls alone and allocates nothing.
    unsafe { command.pre_exec(before_exec) }
}

/// What a new user namespace's root is outside
pub(crate) struct UserMaps {
    uid_map: Vec<u8>,
    gid_map: Vec<u8>,
}

impl UserMaps {
    /// The present user
    pub(crate) fn new() -> Self {
        let (uid, gid) = (process::geteuid().as_raw(), process::getegid().as_raw());
        Self {
            uid_map: format!("0 {uid} 1").into_bytes(),
            gid_map: format!("0 {gid} 1").into_bytes(),
        }
    }

    fn write(&self) -> io::Result<()> {
        write_file(c"/proc/self/setgroups", b"deny")?;
        write_file(c"/proc/self/uid_map", &self.uid_map)?;
        write_file(c"/proc/self/gid_map", &self.gid_map)
    }
}

/// Writes a file of /proc with one call, and without allocating
fn write_file(path: &CStr, content: &[u8]) -> io::Result<()> {
    let file = fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(file, content)?;
    Ok(())
}

/// Moves the calling thread into new namespaces
pub(crate) fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::unshare(flags) })?;
    Ok(())
}

/// Forks; the child does this, and ends without returning
pub(crate) fn fork(f: impl FnOnce()) -> io::Result<Option<Pid>> {
    // SAFETY: the child has this thread alone, so it must not wait for a lock that another one has now. libc sees to its own,
    // the allocator's among them; and the other threads of a test wait for it, and have none.
    match check(unsafe { libc::fork() })? {
        0 => {
            let ended = panic::catch_unwind(AssertUnwindSafe(f));
            // SAFETY: this call takes a number and does not return.
            unsafe { libc::_exit(ended.is_err().into()) }
        }
        child => Ok(Pid::from_raw(child)),
    }
}

/// Has every send of the calling thread fail with this error from here on
pub(crate) fn fail_sends(errno: u16) -> io::Result<()> {
    let step = |code: u32, k: u32, if_not: u8| libc::sock_filter {
        code: u16::try_from(code).unwrap_or(u16::MAX),
        jt: 0,
        jf: if_not,
        k,
    };
    let send = u32::try_from(libc::SYS_sendto).unwrap_or(u32::MAX);
    let mut steps = [
        // The number of the system call is the first field of `struct seccomp_data` (`linux/seccomp.h`).
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, send, 1),
        step(libc::BPF_RET, libc::SECCOMP_RET_ERRNO | u32::from(errno), 0),
        step(libc::BPF_RET, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let program = libc::sock_fprog {
        len: 4,
        filter: steps.as_mut_ptr(),
    };
    thread::set_no_new_privs(true)?;
    // SAFETY: the kernel reads the program and its steps, as many as it says, which live during the call.
    check(unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    })?;
    Ok(())
}

/// Takes a capability out of the calling thread's effective set
///
/// rustix has these calls without `unsafe`, but valgrind does not see the second word that the kernel writes for it.
pub(crate) fn drop_capability(capability: u32) -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: libc::c_int,
    }
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Sets {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    /// `_LINUX_CAPABILITY_VERSION_3` (`linux/capability.h`): two words of each set
    const VERSION: u32 = 0x2008_0522;
    let mut header = Header {
        version: VERSION,
        pid: 0,
    };
    let mut words = [Sets::default(); 2];
    // SAFETY: version 3 takes the header and two words of sets, all alive and exclusive during the call.
    if unsafe { libc::syscall(libc::SYS_capget, &raw mut header, words.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let (word, bit) = (capability / u32::BITS, capability % u32::BITS);
    if let Some(word) = words.get_mut(usize::try_from(word).unwrap_or(usize::MAX)) {
        word.effective &= !(1 << bit);
    }
    // SAFETY: as above; the kernel only reads.
    if unsafe { libc::syscall(libc::SYS_capset, &raw mut header, words.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Has SIGALRM counted from here on, and end whatever system call its thread waits in
pub(crate) fn count_signals() -> io::Result<()> {
    let handler: extern "C" fn(libc::c_int) = count_signal;
    // SAFETY: a `sigaction` is integers and pointers, for which all zeroes is a value: nothing is blocked, and no flag
    // has system calls started again.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = handler as *const () as libc::sighandler_t;
    // SAFETY: the action lives during the call. Its handler has the type that goes with its flags. It adds to an
    // atomic number and calls what `call_on_signal` was given.
    check(unsafe { libc::sigaction(libc::SIGALRM, &raw const action, ptr::null_mut()) })?;
    Ok(())
}

static SIGNALS: AtomicUsize = AtomicUsize::new(0);
static ON_SIGNAL: OnceLock<fn()> = OnceLock::new();

/// Has the handler of SIGALRM call a function; only the first call counts
///
/// The function must be async-signal-safe. What it does to `errno` is seen by the interrupted thread.
pub(crate) fn call_on_signal(f: fn()) {
    let _ = ON_SIGNAL.set(f);
}

extern "C" fn count_signal(_: libc::c_int) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
    if let Some(f) = ON_SIGNAL.get() {
        f();
    }
}

static HOLD: AtomicBool = AtomicBool::new(false);
static IS_HELD: AtomicBool = AtomicBool::new(false);

/// Has a thread of this process stay in a signal handler until [`release`]; returns once it is there
pub(crate) fn hold(thread: i32) -> io::Result<()> {
    let handler: extern "C" fn(libc::c_int) = stay;
    // SAFETY: as in `count_signals`.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = handler as *const () as libc::sighandler_t;
    // SAFETY: the action lives during the call. Its handler has the type that goes with its flags. It calls only
    // poll(2), and restores `errno`.
    check(unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, ptr::null_mut()) })?;
    HOLD.store(true, Ordering::SeqCst);
    let thread = Pid::from_raw(thread).ok_or(io::ErrorKind::InvalidInput)?;
    Thread(thread).send(libc::SIGUSR1);
    while !IS_HELD.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    Ok(())
}

/// Lets the held thread go on; returns once it has left the handler
pub(crate) fn release() {
    HOLD.store(false, Ordering::SeqCst);
    while IS_HELD.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
}

extern "C" fn stay(_: libc::c_int) {
    // SAFETY: the location is the calling thread's own.
    let errno = unsafe { *libc::__errno_location() };
    IS_HELD.store(true, Ordering::SeqCst);
    while HOLD.load(Ordering::SeqCst) {
        // SAFETY: there are no descriptors to read or write.
        unsafe { libc::poll(ptr::null_mut(), 0, 1) };
    }
    IS_HELD.store(false, Ordering::SeqCst);
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// How many signals have been counted
pub(crate) fn signals() -> usize {
    SIGNALS.load(Ordering::Relaxed)
}

/// A thread of this process, for others to interrupt
pub(crate) struct Thread(Pid);

impl Thread {
    pub(crate) fn current() -> Self {
        Self(thread::gettid())
    }

    /// Sends it SIGALRM; to a thread that has ended, nothing
    pub(crate) fn signal(&self) {
        self.send(libc::SIGALRM);
    }

    fn send(&self, signal: libc::c_int) {
        let [process, thread, signal] = [
            process::getpid().as_raw_nonzero().get(),
            self.0.as_raw_nonzero().get(),
            signal,
        ]
        .map(libc::c_long::from);
        // SAFETY: no memory is involved.
        unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) };
    }
}

/// The system's allocator, and a count of what is asked of it
#[derive(Debug, Default)]
pub struct CountingAllocator {
    allocations: AtomicUsize,
    bytes: AtomicUsize,
}

impl CountingAllocator {
    /// With nothing counted
    #[must_use]
    pub const fn new() -> Self {
        Self {
            allocations: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
        }
    }

    /// How many times memory was taken in all threads, or a piece of it made longer or shorter
    #[must_use]
    pub fn allocations(&self) -> usize {
        self.allocations.load(Ordering::Relaxed)
    }

    /// How many bytes are taken now
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    fn count(&self, layout: Layout) {
        self.allocations.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(layout.size(), Ordering::Relaxed);
    }
}

// SAFETY: everything is the system allocator's own, called with what the caller has promised. Counting touches two atomic
// numbers: it allocates nothing, and does not panic.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.count(layout);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.count(layout);
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        self.allocations.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(size, Ordering::Relaxed);
        self.bytes.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        self.bytes.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// A thread of another process that this one traces
#[derive(Debug)]
pub(crate) struct Traced {
    thread: libc::pid_t,
    /// The signal that has stopped it, which it shall get when it goes on; 0 for none
    signal: libc::c_int,
}

/// What a thread has stopped at
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The entry of the system call with this number
    Call(u64),
    /// Anything else
    Other,
    /// It has ended
    Ended,
}

impl Traced {
    const SEIZE: libc::c_long = 0x4206;
    const INTERRUPT: libc::c_long = 0x4207;
    const GET_SYSCALL_INFO: libc::c_long = 0x420e;
    const SYSCALL: libc::c_long = 24;
    const DETACH: libc::c_long = 17;
    /// `PTRACE_O_TRACESYSGOOD`: system calls stop with a signal number that is nothing else's
    const MARK_CALLS: usize = 1;

    /// Begins to trace a thread, and stops it
    pub(crate) fn seize(thread: libc::pid_t) -> io::Result<Self> {
        let options = ptr::without_provenance_mut(Self::MARK_CALLS);
        ptrace(Self::SEIZE, thread, 0, options)?;
        let traced = Self { thread, signal: 0 };
        ptrace(Self::INTERRUPT, thread, 0, ptr::null_mut())?;
        traced.wait()?;
        Ok(traced)
    }

    /// Lets the stopped thread go on, and returns at its next stop
    pub(crate) fn go_on(&mut self) -> io::Result<Stop> {
        /// `SIGTRAP`, with the bit that [`Traced::MARK_CALLS`] asks for
        const AT_CALL: libc::c_int = libc::SIGTRAP | 0x80;
        let signal = usize::try_from(mem::take(&mut self.signal)).unwrap_or(0);
        let signal = ptr::without_provenance_mut(signal);
        ptrace(Self::SYSCALL, self.thread, 0, signal)?;
        let status = self.wait()?;
        if !libc::WIFSTOPPED(status) {
            return Ok(Stop::Ended);
        }
        match libc::WSTOPSIG(status) {
            AT_CALL => return Ok(self.call()?.map_or(Stop::Other, Stop::Call)),
            // The numbers above are for stops without a signal.
            signal if status >> 16 == 0 => self.signal = signal,
            _ => {}
        }
        Ok(Stop::Other)
    }

    /// The system call that the thread is about to make; none if it has just made one. Linux 5.3
    fn call(&self) -> io::Result<Option<u64>> {
        /// `PTRACE_SYSCALL_INFO_ENTRY`
        const ENTRY: u8 = 1;
        /// As far as the number of `struct ptrace_syscall_info` (`linux/ptrace.h`)
        #[repr(C)]
        #[derive(Default)]
        struct Info {
            op: u8,
            _pad: [u8; 3],
            _arch: u32,
            _instruction_pointer: u64,
            _stack_pointer: u64,
            number: u64,
        }
        let mut info = Info::default();
        let room = mem::size_of_val(&info);
        let place = (&raw mut info).cast();
        ptrace(Self::GET_SYSCALL_INFO, self.thread, room, place)?;
        Ok((info.op == ENTRY).then_some(info.number))
    }

    fn wait(&self) -> io::Result<libc::c_int> {
        let stopped = process::waitpid(Pid::from_raw(self.thread), WaitOptions::empty())?;
        stopped
            .map(|(_, status)| status.as_raw())
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// Lets the thread run on as if nothing had been
impl Drop for Traced {
    fn drop(&mut self) {
        let _ = ptrace(Self::DETACH, self.thread, 0, ptr::null_mut());
    }
}

/// By number, since libraries differ in the type of a request
fn ptrace(
    request: libc::c_long,
    thread: libc::pid_t,
    address: usize,
    data: *mut libc::c_void,
) -> io::Result<()> {
    let thread = libc::c_long::from(thread);
    // SAFETY: of the requests above only `GET_SYSCALL_INFO` writes memory of this process: to `data`, which its caller has
    // alive and exclusive, and no more than the size in `address`.
    let result = unsafe { libc::syscall(libc::SYS_ptrace, request, thread, address, data) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Sets an integer socket option
pub(crate) fn set_option(
    socket: &impl AsFd,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the value is an int that lives during the call, and its size is given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            INT_LEN,
        )
    };
    check(result)?;
    Ok(())
}

const INT_LEN: libc::socklen_t = 4;
const _: () = assert!(mem::size_of::<libc::c_int>() == 4);

/// Wraps a netlink socket that somebody else opened
pub(crate) fn netlink(fd: OwnedFd) -> netlink_sys::Socket {
    // SAFETY: the descriptor was owned, and from here on `Socket` alone owns it.
    unsafe { netlink_sys::Socket::from_raw_fd(fd.into_raw_fd()) }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
