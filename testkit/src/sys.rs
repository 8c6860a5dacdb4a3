//! System calls missing from or unsafe in std, netlink-sys and rustix: all of this crate's `unsafe`
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

/// Makes the child unshare its namespaces before exec, while it is single-threaded
///
/// With `maps`, the child also gets a user namespace and is root there.
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
    // SAFETY: between fork and exec, the closure makes only async-signal-safe system calls and
    // allocates nothing.
    unsafe { command.pre_exec(before_exec) }
}

/// The outside user and group of a new user namespace's root
pub(crate) struct UserMaps {
    uid_map: Vec<u8>,
    gid_map: Vec<u8>,
}

impl UserMaps {
    /// Maps root to the present user
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

/// Writes a file of /proc with one call, without allocating
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

/// Forks; the child runs `f` and exits
pub(crate) fn fork(f: impl FnOnce()) -> io::Result<Option<Pid>> {
    // SAFETY: the child has only this thread, so it must not wait for a lock held by another
    // thread. libc handles its own locks, including the allocator's. The other threads of a test
    // wait for this one and hold no lock.
    match check(unsafe { libc::fork() })? {
        0 => {
            let ended = panic::catch_unwind(AssertUnwindSafe(f));
            // SAFETY: the call takes a number and does not return.
            unsafe { libc::_exit(ended.is_err().into()) }
        }
        child => Ok(Pid::from_raw(child)),
    }
}

/// Makes every later send of the calling thread fail with this error
pub(crate) fn fail_sends(errno: u16) -> io::Result<()> {
    let step = |code: u32, k: u32, if_not: u8| libc::sock_filter {
        code: u16::try_from(code).unwrap_or(u16::MAX),
        jt: 0,
        jf: if_not,
        k,
    };
    let send = u32::try_from(libc::SYS_sendto).unwrap_or(u32::MAX);
    let mut steps = [
        // The first field of `struct seccomp_data` (`linux/seccomp.h`) is the system call's number.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, send, 1),
        step(libc::BPF_RET, libc::SECCOMP_RET_ERRNO | u32::from(errno), 0),
        step(libc::BPF_RET, libc::SECCOMP_RET_ALLOW, 0),
    ];
    set_filter(&mut steps)
}

/// Sets a filter of system calls for the calling thread
fn set_filter(steps: &mut [libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(steps.len()).map_err(io::Error::other)?,
        filter: steps.as_mut_ptr(),
    };
    thread::set_no_new_privs(true)?;
    // SAFETY: the kernel reads the program and its `len` steps, and both live during the call.
    check(unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    })?;
    Ok(())
}

/// Allows the calling thread, and threads that it starts, only these system calls
///
/// Any other call ends the process with status 1. It then prints the call's number, for which it
/// needs `write` and `exit_group`; without them it ends by a signal.
#[cfg(target_arch = "x86_64")]
pub(crate) fn allow_only(calls: &[libc::c_long]) -> io::Result<()> {
    /// `AUDIT_ARCH_X86_64` (`linux/audit.h`)
    const ARCH: u32 = 0xc000_003e;
    /// Skips the next step unless the loaded number is `k`
    const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let step = |code: u32, k: u32| libc::sock_filter {
        code: u16::try_from(code).unwrap_or(u16::MAX),
        jt: 0,
        jf: u8::from(code == IF_EQUAL),
        k,
    };
    // `struct seccomp_data` (`linux/seccomp.h`): the number, then the architecture
    let mut steps = vec![step(LOAD, 4), step(IF_EQUAL, ARCH), step(LOAD, 0)];
    for &call in calls {
        let number = u32::try_from(call).map_err(io::Error::other)?;
        steps.push(step(IF_EQUAL, number));
        steps.push(step(libc::BPF_RET, libc::SECCOMP_RET_ALLOW));
    }
    // With another architecture the number was not loaded, so nothing above has matched.
    steps.push(step(libc::BPF_RET, libc::SECCOMP_RET_TRAP));
    let handler: extern "C" fn(libc::c_int, *const SigSys, *const libc::c_void) = report_call;
    // SAFETY: a `sigaction` is integers and pointers, for which all zeroes is a value.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = handler as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the action lives during the call. With `SA_SIGINFO` the kernel calls a handler of
    // this type. It makes two system calls and allocates nothing.
    check(unsafe { libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) })?;
    set_filter(&mut steps)
}

/// `siginfo_t` of a SIGSYS, as far as the number of the call (`asm-generic/siginfo.h`)
#[cfg(target_arch = "x86_64")]
#[repr(C)]
struct SigSys {
    _signal: [libc::c_int; 3],
    _address: *const libc::c_void,
    number: libc::c_int,
}

/// Prints the number of a forbidden system call, and ends the process
#[cfg(target_arch = "x86_64")]
extern "C" fn report_call(_: libc::c_int, info: *const SigSys, _: *const libc::c_void) {
    let mut text = *b"forbidden: system call 0000\n";
    // SAFETY: the kernel gives the handler of a SIGSYS this structure.
    let mut number = unsafe { (*info).number };
    for digit in text.iter_mut().rev().skip(1).take(4) {
        *digit += u8::try_from(number % 10).unwrap_or(0);
        number /= 10;
    }
    // SAFETY: the text lives during the call, and its length is given. `_exit` does not return.
    unsafe {
        libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len());
        libc::_exit(1);
    }
}

/// Removes a capability from the calling thread's effective set
///
/// rustix has safe functions for these calls, but valgrind does not see the kernel's write to the
/// second word in them.
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
    // SAFETY: version 3 uses the header and two words of sets, alive and exclusive during the call.
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

/// Counts SIGALRM from here on; the signal interrupts the waiting system call of its thread
pub(crate) fn count_signals() -> io::Result<()> {
    let handler: extern "C" fn(libc::c_int) = count_signal;
    // SAFETY: a `sigaction` has only integers and pointers, and zero is a valid value for both. The
    // zeroes block no signal and, without `SA_RESTART`, restart no system call.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = handler as *const () as libc::sighandler_t;
    // SAFETY: the action lives during the call. The handler's type fits the flags. The handler
    // adds to an atomic number and calls the function given to `call_on_signal`.
    check(unsafe { libc::sigaction(libc::SIGALRM, &raw const action, ptr::null_mut()) })?;
    Ok(())
}

static SIGNALS: AtomicUsize = AtomicUsize::new(0);
static ON_SIGNAL: OnceLock<fn()> = OnceLock::new();

/// Makes the handler of SIGALRM call a function; only the first function counts
///
/// The function must be async-signal-safe. The interrupted thread sees its changes to `errno`.
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

/// Sends a thread of this process into a signal handler until [`release`]
///
/// Returns when the thread is in the handler.
pub(crate) fn hold(thread: i32) -> io::Result<()> {
    let handler: extern "C" fn(libc::c_int) = stay;
    // SAFETY: as in `count_signals`.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = handler as *const () as libc::sighandler_t;
    // SAFETY: the action lives during the call. The handler's type fits the flags. The handler
    // calls only poll(2), and restores `errno`.
    check(unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, ptr::null_mut()) })?;
    HOLD.store(true, Ordering::SeqCst);
    let thread = Pid::from_raw(thread).ok_or(io::ErrorKind::InvalidInput)?;
    Thread(thread).send(libc::SIGUSR1);
    while !IS_HELD.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    Ok(())
}

/// Releases the held thread; returns when the thread has left the handler
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
        // SAFETY: the null pointer is valid for zero descriptors.
        unsafe { libc::poll(ptr::null_mut(), 0, 1) };
    }
    IS_HELD.store(false, Ordering::SeqCst);
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Returns the number of counted signals
pub(crate) fn signals() -> usize {
    SIGNALS.load(Ordering::Relaxed)
}

/// A thread of this process, to be interrupted by other threads
pub(crate) struct Thread(Pid);

impl Thread {
    pub(crate) fn current() -> Self {
        Self(thread::gettid())
    }

    /// Sends SIGALRM to the thread; does nothing if the thread has ended
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

/// The system's allocator with counters
#[derive(Debug, Default)]
pub struct CountingAllocator {
    allocations: AtomicUsize,
    bytes: AtomicUsize,
}

impl CountingAllocator {
    /// Makes an allocator with counters at zero
    #[must_use]
    pub const fn new() -> Self {
        Self {
            allocations: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
        }
    }

    /// Returns the number of allocations and reallocations in all threads
    #[must_use]
    pub fn allocations(&self) -> usize {
        self.allocations.load(Ordering::Relaxed)
    }

    /// Returns the number of allocated bytes
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    fn count(&self, layout: Layout) {
        self.allocations.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(layout.size(), Ordering::Relaxed);
    }
}

// SAFETY: each method calls the system allocator's method with the caller's arguments. Counting
// changes two atomic numbers; it allocates nothing and does not panic.
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

/// A thread of another process, traced by this one
#[derive(Debug)]
pub(crate) struct Traced {
    thread: libc::pid_t,
    /// The signal to deliver when the thread continues; 0 for none
    signal: libc::c_int,
}

/// The reason of a thread's stop
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The entry of the system call with this number
    Call(u64),
    /// Anything else
    Other,
    /// The end of the thread
    Ended,
}

impl Traced {
    const SEIZE: libc::c_long = 0x4206;
    const INTERRUPT: libc::c_long = 0x4207;
    const GET_SYSCALL_INFO: libc::c_long = 0x420e;
    const SYSCALL: libc::c_long = 24;
    const DETACH: libc::c_long = 17;
    /// `PTRACE_O_TRACESYSGOOD`: stops at system calls have their own signal number
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

    /// Continues the stopped thread, and returns at its next stop
    pub(crate) fn go_on(&mut self) -> io::Result<Stop> {
        /// `SIGTRAP`, with the bit set because of [`Traced::MARK_CALLS`]
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
            // Stops without a signal have an event number in the upper bits.
            signal if status >> 16 == 0 => self.signal = signal,
            _ => {}
        }
        Ok(Stop::Other)
    }

    /// Returns the system call at whose entry the thread stopped, or `None` at an exit; Linux 5.3
    fn call(&self) -> io::Result<Option<u64>> {
        /// `PTRACE_SYSCALL_INFO_ENTRY`
        const ENTRY: u8 = 1;
        /// `struct ptrace_syscall_info` (`linux/ptrace.h`) up to `number`
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

/// Detaches from the thread, and the thread continues
impl Drop for Traced {
    fn drop(&mut self) {
        let _ = ptrace(Self::DETACH, self.thread, 0, ptr::null_mut());
    }
}

/// Calls ptrace(2) by number, because the type of a request differs between C libraries
fn ptrace(
    request: libc::c_long,
    thread: libc::pid_t,
    address: usize,
    data: *mut libc::c_void,
) -> io::Result<()> {
    let thread = libc::c_long::from(thread);
    // SAFETY: only the request `GET_SYSCALL_INFO` writes memory of this process. It writes at most
    // `address` bytes to `data`, and its caller passes a live, exclusive buffer of this size.
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
    // SAFETY: the value is an int of the given size and lives during the call.
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

/// Wraps the descriptor of a netlink socket
pub(crate) fn netlink(fd: OwnedFd) -> netlink_sys::Socket {
    // SAFETY: the caller owned the descriptor, and now only `Socket` owns it.
    unsafe { netlink_sys::Socket::from_raw_fd(fd.into_raw_fd()) }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
