//! The programs in README.md and docs/porting.md: all build, and the README's programs handle real
//! packets as documented
#![allow(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::rules::{Family, Hook, Queues, Rule, Table};
use nfqnl_testkit::traffic::{TIMEOUT, Udp, V4};
use rustix::process::{Pid, Signal, kill_process};

/// The queue and the port of the README's rule
const QUEUE: u16 = 1;
const PORT: u16 = 5000;
/// More than the README's loop accepts
const LARGE: usize = 1200;

const DOCUMENTS: [(&str, &str); 2] = [
    ("readme", include_str!("../README.md")),
    ("porting", include_str!("../docs/porting.md")),
];

/// Returns the Rust programs of a document, except those marked with `ignore`
fn programs(document: &str) -> Vec<String> {
    let mut programs = Vec::new();
    let mut lines = document.lines();
    while let Some(line) = lines.next() {
        let Some(language) = line.strip_prefix("```") else {
            continue;
        };
        let block: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
        if language.starts_with("rust") && !language.contains("ignore") {
            programs.push(block.join("\n") + "\n");
        }
    }
    programs
}

/// Writes a file unless it has this content; other processes see either all of it or nothing
fn write(path: &Path, content: &str) {
    if fs::read_to_string(path).is_ok_and(|present| present == content) {
        return;
    }
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let new = path.with_extension(format!("{}.new", std::process::id()));
    fs::write(&new, content).unwrap();
    fs::rename(new, path).unwrap();
}

/// Builds all programs in a project of their own, once; returns the directory of the executables
fn build() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let crate_dir = env!("CARGO_MANIFEST_DIR");
        let project = Path::new(env!("CARGO_TARGET_TMPDIR")).join("readme");
        let mut manifest = format!(
            "[package]\nname = \"readme\"\nedition = \"2024\"\nautobins = false\n\n\
             [dependencies]\nnfqnl.path = {crate_dir:?}\n\n[workspace]\n"
        );
        for (document, text) in DOCUMENTS {
            for (number, program) in (1..).zip(programs(text)) {
                let name = format!("{document}_{number}");
                write(&project.join(format!("src/{name}.rs")), &program);
                let path = format!("src/{name}.rs");
                write!(manifest, "\n[[bin]]\nname = {name:?}\npath = {path:?}\n").unwrap();
            }
        }
        write(&project.join("Cargo.toml"), &manifest);
        // Cargo removes the packages not needed by this project from the lock file.
        let lock = fs::read_to_string(Path::new(crate_dir).join("Cargo.lock")).unwrap();
        let copied = project.join("copied.lock");
        if fs::read_to_string(&copied).is_ok_and(|copied| copied == lock) {
            // Written by an earlier run
        } else {
            write(&project.join("Cargo.lock"), &lock);
            write(&copied, &lock);
        }
        let target = project.join("target");
        let status = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--offline", "--target-dir"])
            .arg(&target)
            .current_dir(&project)
            .env_remove("CARGO_BUILD_TARGET")
            .status()
            .unwrap();
        assert!(
            status.success(),
            "the programs of the documents do not build"
        );
        target.join("debug")
    })
}

/// A running program, and the lines of its output and error output
struct Program {
    process: Child,
    lines: Receiver<String>,
}

impl Program {
    fn start(directory: &Path, name: &str) -> Self {
        let mut process = Command::new(directory.join(name))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (send, lines) = mpsc::channel();
        forward(process.stdout.take().unwrap(), send.clone());
        forward(process.stderr.take().unwrap(), send);
        Self { process, lines }
    }

    /// Waits for a line with these words
    #[track_caller]
    fn expect(&self, words: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(TIMEOUT);
            let line = line.unwrap_or_else(|_| panic!("no {words:?} in time"));
            if line.contains(words) {
                return line;
            }
        }
    }

    /// Stops the program, sends more packets than the receive buffer holds, and continues it;
    /// returns
    /// the number of arriving packets
    fn flood(&self, target: &Udp) -> usize {
        let process = Pid::from_child(&self.process);
        kill_process(process, Signal::STOP).unwrap();
        // Several senders, because a waiting packet counts against the buffer of its sender.
        for _ in 0..16 {
            let sender = Udp::bind(V4, 0).unwrap();
            for _ in 0..FLOOD / 16 {
                sender.send(&[0; 4000], target.address()).unwrap();
            }
        }
        kill_process(process, Signal::CONT).unwrap();
        target.drain()
    }
}

/// Packets in a flood: fewer than a queue holds
const FLOOD: usize = 960;

fn forward(output: impl Read + Send + 'static, lines: Sender<String>) {
    thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            let _ = lines.send(line);
        }
    });
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Runs something with the README's rule in place, and a socket at its port
fn with_rule(bypass: bool, run: impl FnOnce(&Udp)) {
    let table = Table::new(Family::Ip, "t").unwrap();
    let input = table.chain("in", Hook::Input, 0).unwrap();
    let fanout = false;
    let mut queues = Queues::new(QUEUE);
    if bypass {
        queues = queues.bypass();
    }
    if fanout {
        queues = queues.fanout();
    }
    let rule = Rule::new().udp_dport(PORT);
    input.add(&rule.queue(queues)).unwrap();
    run(&Udp::bind(V4, PORT).unwrap());
    table.delete().unwrap();
}

/// Sends packets until the program accepts one
fn wait_until_accepted(socket: &Udp) {
    let deadline = Instant::now() + TIMEOUT;
    while {
        socket.send(b"ready?", socket.address()).unwrap();
        socket.recv_within(Duration::from_millis(20)).is_none()
    } {
        assert!(Instant::now() < deadline, "it accepts no packet");
    }
    let _ = socket.drain();
}

/// Expects that the program accepts a packet
#[track_caller]
fn passes(socket: &Udp, payload: &[u8]) {
    socket.send(payload, socket.address()).unwrap();
    let received = socket.recv().expect("the packet arrives");
    assert!(
        received == payload,
        "another packet of {} bytes arrives",
        received.len()
    );
}

#[test]
fn each_document_has_its_programs() {
    let counts = DOCUMENTS.map(|(_, text)| programs(text).len());
    assert_eq!(counts[0], 2, "the README's loop and its callbacks");
    assert!(counts[1] >= 2, "docs/porting.md has {} programs", counts[1]);
    for program in programs(DOCUMENTS[0].1) {
        assert!(program.lines().count() <= 15, "over 15 lines:\n{program}");
    }
    build();
}

#[test]
fn the_loop_drops_only_large_packets() {
    let built = build();
    isolated(|| {
        with_rule(false, |socket| {
            let program = Program::start(built, "readme_1");
            wait_until_accepted(socket);
            socket.send(&[0; LARGE], socket.address()).unwrap();
            passes(socket, b"small");
            assert!(socket.is_silent(), "a large packet passed");

            assert_eq!(program.flood(socket), 0);
            program.expect("the receive buffer was full");
            passes(socket, b"after the overrun");
        });
    });
}

#[test]
fn the_callbacks_count_and_accept() {
    let built = build();
    isolated(|| {
        with_rule(false, |socket| {
            let program = Program::start(built, "readme_2");
            wait_until_accepted(socket);
            passes(socket, &[0; LARGE]);
            let line = program.expect("packet ");
            assert!(line.ends_with(" bytes so far"), "{line:?}");

            let arrived = program.flood(socket);
            assert!(0 < arrived && arrived < FLOOD, "{arrived} packets");
            passes(socket, b"after the overrun");
        });
    });
}

#[test]
fn without_a_program_only_bypass_lets_pass() {
    let built = build();
    isolated(|| {
        with_rule(false, |socket| {
            socket.send(b"dropped", socket.address()).unwrap();
            assert!(socket.is_silent());
        });
        with_rule(true, |socket| {
            passes(socket, &[0; LARGE]);
            let program = Program::start(built, "readme_1");
            let deadline = Instant::now() + TIMEOUT;
            while {
                socket.send(&[0; LARGE], socket.address()).unwrap();
                !socket.is_silent()
            } {
                assert!(Instant::now() < deadline, "it drops no packet");
            }
            passes(socket, b"small");
            drop(program);
            passes(socket, &[0; LARGE]);
        });
    });
}

#[test]
fn the_ported_programs_mark_and_accept() {
    let built = build();
    isolated(|| {
        let table = Table::new(Family::Ip, "later").unwrap();
        let later = table.chain("in", Hook::Input, 10).unwrap();
        let marked = Rule::new().udp_dport(PORT).mark(7, u32::MAX);
        later.add(&marked.counter("marked")).unwrap();
        later
            .add(&Rule::new().udp_dport(PORT).counter("all"))
            .unwrap();
        for number in 1..=programs(DOCUMENTS[1].1).len() {
            with_rule(false, |socket| {
                let _program = Program::start(built, &format!("porting_{number}"));
                wait_until_accepted(socket);
                passes(socket, b"accepted");
            });
        }
        let all = later.count("all").unwrap();
        assert!(all > 0 && later.count("marked").unwrap() == all);
    });
}
