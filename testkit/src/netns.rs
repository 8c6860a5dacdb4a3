//! Network namespaces: one for the process of a test or a program, and more for the far ends of
//! links
//!
//! Only a single-threaded process can make a user namespace. A test or a program therefore runs
//! itself again, and the child makes its namespaces between fork and exec.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, geteuid, kill_process_group};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::{link, sys};

/// Set in a process with its own namespaces; the value names the test, or is `program`
const MARK: &str = "NFQNL_TESTKIT_ISOLATED";
/// The value of [`MARK`] in a process started by [`idle`]
const IDLE: &str = "idle";
/// Set in a process started by [`part_in_another_process`], to the name of its part
const PART: &str = "NFQNL_TESTKIT_PART";
/// Set to 1 to skip tests in namespaces; each skipped test is printed
const SKIP: &str = "NFQNL_SKIP_LIVE";
/// Longer than every test takes on a slow machine
const TEST_TIMEOUT: Duration = Duration::from_secs(180);

/// Runs a test in its own process and network namespace, with loopback up
///
/// Call this as the only statement of a `#[test]` function, with a closure written there. The
/// closure's type contains the test's name, and the test binary runs again for this test only.
/// An ordinary user also gets a user namespace and is root there. The test's output appears in
/// the output of the calling process.
///
/// # Panics
/// If the test fails or takes too long. If no namespace can be made and `NFQNL_SKIP_LIVE=1` is
/// not set.
#[track_caller]
pub fn isolated<F: FnOnce()>(test: F) {
    let name = test_name::<F>();
    if std::env::var(MARK).is_ok_and(|mark| mark == IDLE) {
        loop {
            thread::park();
        }
    }
    if std::env::var(MARK).is_ok_and(|mark| mark == name) {
        link::up("lo").expect("loopback goes up in a new namespace");
        return test();
    }
    if std::env::var_os(SKIP).is_some_and(|value| value == "1") {
        // libtest captures `eprintln!`, but not a direct write.
        let _ = io::Write::write_all(
            &mut io::stderr(),
            format!("SKIPPED by {SKIP}=1: {name}\n").as_bytes(),
        );
        return;
    }
    let arguments = [
        name,
        "--exact",
        "--nocapture",
        "--include-ignored",
        "--test-threads=1",
    ];
    let mut command = again(arguments.map(OsString::from), name);
    command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let child = match spawn(command) {
        Ok(child) => child,
        Err(error) => panic!("{error}; to leave out live tests on purpose, set {SKIP}=1"),
    };
    let (status, output) = wait(child, TEST_TIMEOUT);
    print!("{output}");
    match status {
        None => panic!("{name} took longer than {TEST_TIMEOUT:?}"),
        Some(status) if !status.success() => panic!("{name} failed: {status}"),
        Some(_) => assert!(
            output.contains("test result: ok. 1 passed"),
            "{name} did not run: its closure is not in the test function"
        ),
    }
}

/// Starts a process within [`isolated`] which sleeps until it is killed
///
/// The process ends with its test at the latest. It has only `stdin` and the descriptors without
/// `O_CLOEXEC`, like every other started program.
///
/// # Errors
/// The system call's error.
pub fn idle(stdin: impl Into<Stdio>) -> io::Result<Child> {
    // The same arguments lead to the same test, and the process parks in `isolated`.
    again(std::env::args_os().skip(1), IDLE)
        .stdin(stdin)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
}

/// Starts a process within [`isolated`] which runs the same test in the same namespaces
///
/// [`part`] returns `part` in the new process. The process ends with its test at the latest. It has
/// only `stdin` and the descriptors without `O_CLOEXEC`, like every other started program.
///
/// # Errors
/// The system call's error.
pub fn part_in_another_process(part: &str, stdin: impl Into<Stdio>) -> io::Result<Child> {
    let mark = std::env::var(MARK).map_err(io::Error::other)?;
    again(std::env::args_os().skip(1), &mark)
        .env(PART, part)
        .stdin(stdin)
        .stdout(Stdio::null())
        .spawn()
}

/// Returns this process's part of the test, if [`part_in_another_process`] started the process
#[must_use]
pub fn part() -> Option<String> {
    std::env::var(PART).ok()
}

/// Runs the whole program again in its own network namespace, with loopback up
///
/// Returns in the new process. The old process waits for the new one and exits with its status.
/// Call this first in `main`.
///
/// # Errors
/// If no namespace can be made.
pub fn enter() -> Result<(), NamespaceError> {
    if std::env::var_os(MARK).is_some() {
        return link::up("lo").map_err(NamespaceError::new);
    }
    let mut child = spawn(again(std::env::args_os().skip(1), "program"))?;
    let status = child.wait().map_err(NamespaceError::new)?;
    std::process::exit(status.code().unwrap_or(1))
}

/// Returns whether this process is root only of a user namespace, not of the machine
#[must_use]
pub fn is_rootless() -> bool {
    const ALL: u32 = u32::MAX;
    fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| {
        let numbers: Vec<u32> = map
            .split_ascii_whitespace()
            .filter_map(|number| number.parse().ok())
            .collect();
        numbers != [0, 0, ALL]
    })
}

/// Returns the path of the test around a closure
///
/// The closure's type is called `binary::module::test::{{closure}}`.
fn test_name<F>() -> &'static str {
    let path = std::any::type_name::<F>();
    let (_, path) = path.split_once("::").unwrap_or(("", path));
    path.trim_end_matches("::{{closure}}")
}

/// Returns a command for this program, with [`MARK`] set
fn again(arguments: impl IntoIterator<Item = OsString>, mark: &str) -> Command {
    let program = std::env::current_exe().unwrap_or_else(|_| "/proc/self/exe".into());
    let mut command = Command::new(program);
    command.args(arguments).env(MARK, mark);
    command
}

/// Starts a program in its own namespaces
fn spawn(mut command: Command) -> Result<Child, NamespaceError> {
    let maps = (!geteuid().is_root()).then(sys::UserMaps::new);
    sys::isolate(&mut command, maps)
        .spawn()
        .map_err(NamespaceError::new)
}

/// Waits for a child and collects its output
///
/// Kills the child at the deadline, and always kills the processes started by the child.
fn wait(mut child: Child, timeout: Duration) -> (Option<ExitStatus>, String) {
    /// Interval between checks for the child's end
    const LOOK: Duration = Duration::from_millis(2);
    let (send, chunks) = mpsc::channel();
    let pipes: [Option<Box<dyn Read + Send>>; 2] = [
        child.stdout.take().map(|pipe| Box::new(pipe) as _),
        child.stderr.take().map(|pipe| Box::new(pipe) as _),
    ];
    for pipe in pipes.into_iter().flatten() {
        let send = send.clone();
        thread::spawn(move || {
            for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
                let _ = send.send(line);
            }
        });
    }
    drop(send);
    let deadline = Instant::now() + timeout;
    let mut ended = None;
    while ended.is_none() && Instant::now() < deadline {
        thread::sleep(LOOK);
        ended = child.try_wait().ok().flatten();
    }
    let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
    let _ = child.wait();
    // All writers of the pipes are dead, so the loop ends at the end of their contents.
    let mut output = String::new();
    for line in chunks {
        output.push_str(&String::from_utf8_lossy(&line));
        output.push('\n');
    }
    (ended, output)
}

/// Another network namespace; it lives as long as this value or a process or socket in it
#[derive(Debug)]
pub struct Namespace(File);

impl Namespace {
    /// Makes a namespace, with loopback up
    ///
    /// # Errors
    /// The kernel's error; EPERM for an ordinary user outside [`isolated`] and [`enter`].
    pub fn new() -> io::Result<Self> {
        thread::scope(|scope| {
            let made = scope.spawn(|| {
                sys::unshare(libc::CLONE_NEWNET)?;
                link::up("lo")?;
                Self::current()
            });
            made.join().expect("no panics in there")
        })
    }

    /// Returns the calling thread's namespace
    ///
    /// # Errors
    /// Without /proc.
    pub fn current() -> io::Result<Self> {
        File::open("/proc/thread-self/ns/net").map(Self)
    }

    /// Runs `f` in this namespace, in a new thread
    ///
    /// # Panics
    /// When `f` panics.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        let result = thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("a namespace that this process has made");
                f()
            });
            thread.join()
        });
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    pub(crate) fn file(&self) -> &File {
        &self.0
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Failure to make a namespace, with the setting responsible
#[derive(Debug)]
pub struct NamespaceError {
    source: io::Error,
    reason: String,
}

impl NamespaceError {
    fn new(source: io::Error) -> Self {
        let reason = forbidding_setting().unwrap_or_else(|| {
            match source.raw_os_error() {
                Some(libc::EINVAL | libc::ENOSYS) => {
                    "the kernel was built without CONFIG_USER_NS or CONFIG_NET_NS"
                }
                Some(libc::EPERM) => {
                    "no sysctl forbids it, so most likely a container's seccomp profile or a security module does \
                     (docker: --privileged, or --security-opt seccomp=unconfined with --cap-add NET_ADMIN,SYS_ADMIN)"
                }
                _ => "no setting is known that forbids it",
            }
            .to_owned()
        });
        Self { source, reason }
    }
}

/// Returns the sysctl which forbids namespaces to this user
fn forbidding_setting() -> Option<String> {
    const FORBIDDING: [(&str, &str, &str); 4] = [
        ("user/max_user_namespaces", "0", "a number above 0"),
        ("user/max_net_namespaces", "0", "a number above 0"),
        ("kernel/unprivileged_userns_clone", "0", "1"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
    ];
    let root = geteuid().is_root();
    FORBIDDING
        .iter()
        .filter(|(path, ..)| !root || path.ends_with("net_namespaces"))
        .find(|(path, forbidding, _)| {
            fs::read_to_string(format!("/proc/sys/{path}"))
                .is_ok_and(|value| value.trim() == *forbidding)
        })
        .map(|(path, forbidding, allowing)| {
            let name = path.replace('/', ".");
            format!("sysctl {name} is {forbidding} here, and has to be {allowing}")
        })
}

impl fmt::Display for NamespaceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "can't make a network namespace ({}): {}",
            self.source, self.reason
        )
    }
}

impl std::error::Error for NamespaceError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}
