//! The list of system calls in `docs/deployment.md`, tried by a filter that allows nothing else
//!
//! Each test forks. The child serves a queue under the filter, and the parent sends the packets.

use std::thread;
use std::time::{Duration, Instant};

use nfqnl::{Error, Event, QueueStats, RecvBatch, SendBatch, Socket, Verdict};
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::process::{allow_only, fork};
use nfqnl_testkit::queue::is_bound;
use nfqnl_testkit::traffic::TIMEOUT;

use crate::lab::{Lab, QUEUE};

const DOC: &str = include_str!("../../docs/deployment.md");
/// The line before the list
const HEADING: &str = "System calls on x86-64, by group:";
/// Packets for each binding; more than one default batch
const PACKETS: u32 = 100;
/// The queue that the child binds once it has bound [`QUEUE`] again
const READY: u16 = 2;

/// The number of a system call on this architecture
fn number_of(name: &str) -> i64 {
    match name {
        "brk" => libc::SYS_brk,
        "clock_gettime" => libc::SYS_clock_gettime,
        "clock_nanosleep" => libc::SYS_clock_nanosleep,
        "clone" => libc::SYS_clone,
        "clone3" => libc::SYS_clone3,
        "close" => libc::SYS_close,
        "connect" => libc::SYS_connect,
        "exit" => libc::SYS_exit,
        "exit_group" => libc::SYS_exit_group,
        "fcntl" => libc::SYS_fcntl,
        "fstat" => libc::SYS_fstat,
        "futex" => libc::SYS_futex,
        "getpid" => libc::SYS_getpid,
        "getsockopt" => libc::SYS_getsockopt,
        "gettid" => libc::SYS_gettid,
        "lseek" => libc::SYS_lseek,
        "madvise" => libc::SYS_madvise,
        "membarrier" => libc::SYS_membarrier,
        "mmap" => libc::SYS_mmap,
        "mprotect" => libc::SYS_mprotect,
        "mremap" => libc::SYS_mremap,
        "munmap" => libc::SYS_munmap,
        "open" => libc::SYS_open,
        "openat" => libc::SYS_openat,
        "poll" => libc::SYS_poll,
        "read" => libc::SYS_read,
        "recvfrom" => libc::SYS_recvfrom,
        "recvmmsg" => libc::SYS_recvmmsg,
        "restart_syscall" => libc::SYS_restart_syscall,
        "rseq" => libc::SYS_rseq,
        "rt_sigaction" => libc::SYS_rt_sigaction,
        "rt_sigprocmask" => libc::SYS_rt_sigprocmask,
        "rt_sigreturn" => libc::SYS_rt_sigreturn,
        "sched_getaffinity" => libc::SYS_sched_getaffinity,
        "sendto" => libc::SYS_sendto,
        "set_robust_list" => libc::SYS_set_robust_list,
        "setsockopt" => libc::SYS_setsockopt,
        "sigaltstack" => libc::SYS_sigaltstack,
        "socket" => libc::SYS_socket,
        "statx" => libc::SYS_statx,
        "write" => libc::SYS_write,
        other => panic!("no number for {other}"),
    }
}

/// Returns the list of the document: each group's name, and the numbers of its calls
///
/// A line begins with the name of a group, or with a space if it continues the line before.
fn listed() -> Vec<(&'static str, Vec<i64>)> {
    let (_, list) = DOC.split_once(HEADING).expect("the document has the list");
    let list = list.split("```").nth(1).expect("a fenced block");
    let mut groups: Vec<(&str, Vec<i64>)> = Vec::new();
    for line in list.lines().skip(1) {
        let mut words = line.split_ascii_whitespace();
        if !line.starts_with(' ') {
            groups.extend(words.next().map(|name| (name, Vec::new())));
        }
        let (_, calls) = groups.last_mut().expect("a group's name comes first");
        calls.extend(words.map(number_of));
    }
    let names = Vec::from_iter(groups.iter().map(|(name, _)| *name));
    assert_eq!(
        names,
        ["open", "run", "memory", "threads", "files", "program"]
    );
    groups
}

/// Returns the numbers of all groups but one
fn all_but(left_out: &str) -> Vec<i64> {
    let groups = listed().into_iter();
    let kept = groups.filter(|(name, _)| *name != left_out);
    kept.flat_map(|(_, calls)| calls).collect()
}

/// The packets of both bindings; the parent's part
///
/// Every packet with a number divisible by 4 is dropped.
fn send_and_expect(lab: &Lab) {
    for (round, queue) in (0..).zip([QUEUE, READY]) {
        let end = Instant::now() + TIMEOUT;
        while !is_bound(queue).unwrap() {
            assert!(Instant::now() < end, "queue {queue} is not bound in time");
            thread::sleep(Duration::from_millis(2));
        }
        let numbers = round * PACKETS..(round + 1) * PACKETS;
        lab.send_numbered(numbers.clone());
        lab.expect_numbered(numbers.filter(|number| number % 4 != 0));
    }
}

/// Receives and answers the packets of one binding, in batches and one by one
///
/// Also answers one packet twice, and waits for the refusal.
fn serve(socket: &Socket, first: u32) {
    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
    let (mut packets, mut refused) = (0, 0);
    while packets < PACKETS || refused == 0 {
        for event in socket.recv(&mut batch).unwrap() {
            let packet = match event {
                Event::Packet(packet) => packet,
                Event::Refused(_) => {
                    refused += 1;
                    continue;
                }
                other => panic!("{other}"),
            };
            let number = first + packets;
            packets += 1;
            match number % 4 {
                0 => verdicts.push(packet.key(), Verdict::Drop).unwrap(),
                1 => verdicts
                    .push(packet.key(), Verdict::Accept.with_mark(number))
                    .unwrap(),
                2 => verdicts.push(packet.key(), Verdict::Accept).unwrap(),
                _ => {
                    // The packets before it first, because the parent expects them in order
                    socket.send(&mut verdicts).unwrap();
                    socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
                }
            }
            if number == first + 3 {
                socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
            }
        }
        socket.send(&mut verdicts).unwrap();
    }
}

/// A wait that ends in time, and a thread that a wake ends
fn wait_and_wake(socket: &Socket) {
    let mut batch = RecvBatch::new(1, 4096);
    for _ in 0..20 {
        let wait = Duration::from_millis(10);
        assert!(
            socket
                .recv_timeout(&mut batch, wait)
                .unwrap()
                .next()
                .is_none()
        );
    }
    thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let mut batch = RecvBatch::default();
            assert!(socket.recv(&mut batch).unwrap().next().is_none());
        });
        thread::sleep(Duration::from_millis(20));
        socket.waker().wake_all();
        waiting.join().unwrap();
    });
    // The same without a thread
    socket.waker().wake();
    assert!(socket.recv(&mut batch).unwrap().next().is_none());
}

/// Serves the queue, binds it again, and serves it once more; the child's part
fn use_everything(socket: Socket) {
    let queue = socket.bind(QUEUE).unwrap();
    serve(&socket, 0);
    wait_and_wake(&socket);
    socket.sync().unwrap();
    assert_eq!(socket.stats().packets, u64::from(PACKETS));
    assert!(socket.recv_buffer().unwrap() > 0);
    match QueueStats::read(QUEUE) {
        Ok(stats) => assert_eq!(stats.unwrap().last_id, PACKETS),
        // Root of a user namespace may not read the file.
        Err(Error::Io { source, .. }) => {
            assert_eq!(source.kind(), std::io::ErrorKind::PermissionDenied);
        }
        Err(other) => panic!("{other:?}"),
    }
    queue.destroy().unwrap();
    let queue = socket.bind(QUEUE).unwrap();
    let ready = socket.bind(READY).unwrap();
    serve(&socket, PACKETS);
    ready.destroy().unwrap();
    drop(queue);
    socket.close().unwrap();
}

/// Runs the child's part in a child, stopped and continued as by a debugger
fn with_traffic(child: impl FnOnce()) {
    let lab = Lab::new();
    let child = fork(child).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| send_and_expect(&lab));
        let (pause, interval) = (Duration::from_millis(1), Duration::from_millis(15));
        assert!(child.wait_while_stopping(pause, interval).unwrap());
    });
}

#[test]
fn the_listed_system_calls_are_enough() {
    isolated(|| {
        let calls = all_but("nothing");
        with_traffic(|| {
            allow_only(&calls).unwrap();
            use_everything(Socket::open().unwrap());
        });
    });
}

#[test]
fn an_open_socket_needs_no_calls_to_open() {
    isolated(|| {
        let calls = all_but("open");
        with_traffic(|| {
            let socket = Socket::open().unwrap();
            allow_only(&calls).unwrap();
            use_everything(socket);
        });
    });
}

#[test]
fn a_call_outside_the_list_ends_the_process() {
    isolated(|| {
        let calls = all_but("open");
        let child = fork(|| {
            allow_only(&calls).unwrap();
            let _ = Socket::open();
        });
        assert!(!child.unwrap().wait().unwrap());
    });
}
