//! The examples as programs, on real packets
//!
//! Apart from the live tests, because those can be built for a target without the examples.
#![allow(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use nfqnl::{Event, RecvBatch, Socket, Verdict};
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::rules::{Family, Hook, Queues, Rule, Table};
use nfqnl_testkit::traffic::{SILENCE, TIMEOUT, Udp, V4, V6};
use nfqnl_testkit::{cpu, queue};
use rustix::process::{Pid, Signal, kill_process};

// Runs the example's unit test here: with `test = true`, Cargo would build the example only as a
// test, not as a program.
#[allow(dead_code, reason = "only the unit test is used here")]
#[path = "../examples/demo.rs"]
mod demo;

const PORT: u16 = 5000;

/// A running example and its output
struct Example {
    process: Child,
    lines: Receiver<String>,
}

impl Example {
    /// Starts an example from `target/debug/examples`; this test is in `target/debug/deps`
    fn start(name: &str, arguments: &[&str]) -> Self {
        let test = std::env::current_exe().unwrap();
        let built = test.parent().and_then(|deps| deps.parent()).unwrap();
        let program = built.join("examples").join(name);
        assert!(
            program.is_file(),
            "there is no {}: `cargo test` builds it, `cargo test --test …` does not; run `cargo build --example {name}`, \
             with the options that this test was built with",
            program.display()
        );
        let mut process = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let (send, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let _ = send.send(line);
            }
        });
        Self { process, lines }
    }

    /// Returns the next line; fails if it lacks these words or does not come in time
    #[track_caller]
    fn expect(&self, words: &str) -> String {
        let line = self.lines.recv_timeout(TIMEOUT).expect("a line in time");
        assert!(line.contains(words), "no {words:?} in {line:?}");
        line
    }

    /// Skips lines without these words
    fn skip_to(&self, words: &str) -> String {
        let line = || self.lines.recv_timeout(TIMEOUT).expect("a line in time");
        std::iter::repeat_with(line)
            .find(|line| line.contains(words))
            .unwrap()
    }

    /// Expects this line
    #[track_caller]
    fn expect_line(&self, whole: &str) {
        assert_eq!(self.expect(whole), whole);
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.process)
    }

    /// Waits for the end of the process; fails if it does not end in time
    fn wait(mut self) -> ExitStatus {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Queues incoming UDP to [`PORT`]; returns a socket of each family, and its printed address
fn sockets_into(queue: u16) -> [(Udp, &'static str); 2] {
    [(Family::Ip, V4, "127.0.0.1"), (Family::Ip6, V6, "[::1]")].map(|(family, address, shown)| {
        let table = Table::new(family, "t").unwrap();
        let chain = table.chain("in", Hook::Input, 0).unwrap();
        chain
            .add(&Rule::new().udp_dport(PORT).queue(queue))
            .unwrap();
        (Udp::bind(address, PORT).unwrap(), shown)
    })
}

#[test]
fn print_packets_prints_and_accepts() {
    isolated(|| {
        let sockets = sockets_into(1);
        let example = Example::start("print_packets", &["--count", "4"]);
        example.expect("queue 1 is bound");
        let mut id = 0;
        for payload in [&b"first"[..], b"second"] {
            for (socket, address) in &sockets {
                id += 1;
                socket.send(payload, socket.address()).unwrap();
                let line = example.expect(&format!("packet {id}: 00:00:00:00:00:00, UDP "));
                let way = format!("{address}:{PORT} -> {address}:{PORT}");
                assert!(line.ends_with(&way), "no {way:?} in {line:?}");
                assert_eq!(socket.recv().as_deref(), Some(payload));
            }
        }
        let bytes = 2 * (28 + 48) + 2 * (b"first".len() + b"second".len());
        example.expect_line(&format!("4 packets, {bytes} bytes"));
        assert!(example.wait().success());
    });
}

#[test]
fn print_packets_survives_overruns() {
    isolated(|| {
        // More than its receive buffer holds, and fewer than its queue holds
        const FLOOD: usize = 960;
        let [(socket, _), _] = sockets_into(1);
        let example = Example::start("print_packets", &[]);
        example.expect("queue 1 is bound");
        let process = example.pid();
        kill_process(process, Signal::STOP).unwrap();
        // Several senders, because a waiting packet counts against the buffer of its sender.
        for _ in 0..16 {
            let sender = Udp::bind(V4, 0).unwrap();
            for _ in 0..FLOOD / 16 {
                sender.send(&[0; 4000], socket.address()).unwrap();
            }
        }
        kill_process(process, Signal::CONT).unwrap();
        let mut arrived = 0;
        while socket.recv_within(SILENCE).is_some() {
            arrived += 1;
        }
        assert!(0 < arrived && arrived < FLOOD, "{arrived} packets");
        socket.send(b"after", socket.address()).unwrap();
        assert_eq!(socket.recv().as_deref(), Some(&b"after"[..]));
    });
}

#[test]
fn the_demo_accepts_the_packets_of_a_queue() {
    isolated(|| {
        const QUEUE: u16 = 77;
        let sockets = sockets_into(QUEUE);
        let mut example = Example::start("demo", &["--queue", "77"]);
        example.expect("queue 77 is bound");
        let mut id = 0;
        for payload in [&b"first"[..], b"second"] {
            for (socket, address) in &sockets {
                id += 1;
                socket.set_mark(5).unwrap();
                socket.send(payload, socket.address()).unwrap();
                let way = format!("UDP {address}:{PORT} -> {address}:{PORT}");
                example.expect(&format!("queue 77 packet {id}: {way}"));
                let headers = if address.starts_with('[') { 48 } else { 28 };
                let len = headers + payload.len();
                let line = example.expect(&format!("from lo, mark 5, {len} bytes; PACKET_HDR "));
                assert!(line.ends_with(" PAYLOAD"), "{line:?}");
                example.expect("accepted");
                assert_eq!(socket.recv().as_deref(), Some(payload));
            }
        }
        assert_eq!(example.process.try_wait().unwrap(), None, "it runs on");
    });
}

#[test]
fn batch_drops_marks_and_accepts() {
    isolated(|| {
        const DISCARD: u16 = 9;
        const DNS: u16 = 53;
        let table = Table::new(Family::Ip, "t").unwrap();
        let input = table.chain("in", Hook::Input, 0).unwrap();
        input.add(&Rule::new().udp().queue(7)).unwrap();
        let later = table.chain("later", Hook::Input, 10).unwrap();
        let marked = Rule::new().udp_dport(DNS).mark(1, u32::MAX);
        later.add(&marked.counter("marked")).unwrap();
        let any_marked = Rule::new().udp().mark(1, u32::MAX);
        later.add(&any_marked.counter("any marked")).unwrap();
        let sockets = [DISCARD, DNS, PORT].map(|port| Udp::bind(V4, port).unwrap());
        let example = Example::start("batch", &["--queue", "7", "--count", "30"]);
        example.expect("queue 7 is bound");
        for round in 0..10 {
            for socket in &sockets {
                socket.send(&[round], socket.address()).unwrap();
            }
        }
        assert!(example.wait().success());
        let [discard, dns, other] = sockets;
        assert_eq!((dns.drain(), other.drain()), (10, 10));
        assert!(discard.is_silent());
        assert_eq!(later.count("marked").unwrap(), 10);
        assert_eq!(later.count("any marked").unwrap(), 10);
    });
}

/// Tests an accepting example with bursts and with single packets
fn accepts_everything(name: &str) {
    const BURST: u8 = 100;
    const SINGLE: u8 = 10;
    let sockets = sockets_into(7);
    let count = (usize::from(BURST + SINGLE) * sockets.len()).to_string();
    let example = Example::start(name, &["--queue", "7", "--count", &count]);
    example.expect("queue 7 is bound");
    for (socket, _) in &sockets {
        for number in 0..BURST {
            socket.send(&[number], socket.address()).unwrap();
        }
        for number in 0..BURST {
            assert_eq!(socket.recv(), Some(vec![number]));
        }
        for number in 0..SINGLE {
            socket.send(&[number], socket.address()).unwrap();
            assert_eq!(socket.recv(), Some(vec![number]));
        }
    }
    assert!(example.wait().success());
}

#[test]
fn mio_accepts_everything() {
    isolated(|| accepts_everything("mio"));
}

#[test]
fn async_io_accepts_everything() {
    isolated(|| accepts_everything("async_io"));
}

#[cfg(feature = "tokio")]
#[test]
fn tokio_accepts_at_once_and_after_a_look_up() {
    isolated(|| {
        const DNS: u16 = 53;
        accepts_everything("tokio");

        let table = Table::new(Family::Ip, "more").unwrap();
        let input = table.chain("in", Hook::Input, 0).unwrap();
        let rule = |port| Rule::new().udp_dport(port).queue(8);
        for port in [DNS, PORT + 1] {
            input.add(&rule(port)).unwrap();
        }
        let [slow, fast] = [DNS, PORT + 1].map(|port| Udp::bind(V4, port).unwrap());
        let example = Example::start("tokio", &["--queue", "8", "--count", "2"]);
        example.expect("queue 8 is bound");
        let begin = Instant::now();
        slow.send(b"looked up", slow.address()).unwrap();
        fast.send(b"accepted", fast.address()).unwrap();
        assert_eq!(fast.recv().as_deref(), Some(&b"accepted"[..]));
        assert_eq!(slow.recv().as_deref(), Some(&b"looked up"[..]));
        assert!(begin.elapsed() >= Duration::from_millis(20));
        assert!(example.wait().success());
    });
}

#[test]
fn workers_serve_a_range_of_queues() {
    isolated(|| {
        const EACH: u8 = 20;
        let cpus = cpu::allowed().unwrap();
        let cpus = &cpus[..cpus.len().min(4)];
        let count = (usize::from(EACH) * cpus.len()).to_string();
        let arguments = ["--workers", "2", "--pin", "1", "--count", &count];
        let example = Example::start("workers", &arguments);
        example.expect_line("queues 1..=2 are bound");
        let socket = Udp::bind(V4, PORT).unwrap();
        for &cpu in cpus {
            let send = |number| socket.send(&[number], socket.address());
            let sent = cpu::on(cpu, || (0..EACH).try_for_each(send));
            sent.unwrap().unwrap();
            for number in 0..EACH {
                assert_eq!(socket.recv(), Some(vec![number]), "from CPU {cpu}");
            }
        }
        // The last counters are complete.
        let mut counted = [String::new(), String::new()];
        let last = loop {
            let line = example.expect("packets");
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["queue", "1:", number, _] => counted[0] = number.to_owned(),
                ["queue", "2:", number, _] => counted[1] = number.to_owned(),
                _ => break line,
            }
        };
        let counted = counted.map(|number| number.parse::<usize>().unwrap());
        assert_eq!(counted.iter().sum::<usize>(), count.parse().unwrap());
        assert_eq!(last, "0 packets undecided");
        assert!(example.wait().success());
    });
}

#[test]
fn workers_end_when_a_queue_is_taken() {
    isolated(|| {
        let other = nfqnl::Socket::open().unwrap();
        let _queue = other.bind(2).unwrap();
        let example = Example::start("workers", &["--workers", "3"]);
        assert!(!example.wait().success());
    });
}

#[test]
fn examples_refuse_unknown_arguments() {
    isolated(|| {
        for arguments in [
            &["--queue"][..],
            &["--queue", "one"],
            &["--cuont", "4"],
            &["4"],
        ] {
            assert!(!Example::start("batch", arguments).wait().success());
        }
    });
}

#[test]
fn rewrite_changes_and_describes_packets() {
    isolated(|| {
        for (family, address) in [(Family::Ip, V4), (Family::Ip6, V6)] {
            let table = Table::new(family, "t").unwrap();
            let rule = || Rule::new().udp_dport(PORT);
            let chain = table.chain("out", Hook::Output, 0).unwrap();
            chain.add(&rule().queue(1)).unwrap();
            let chain = table.chain("in", Hook::Input, 0).unwrap();
            chain.add(&rule().queue(2)).unwrap();
            let example = Example::start("rewrite", &["--count", "3"]);
            example.expect("queue 1 is bound");
            let socket = Socket::open().unwrap();
            let queue = socket.bind(2).unwrap();
            let mut batch = RecvBatch::default();
            let udp = Udp::bind(address, PORT).unwrap();
            let payloads = [
                ("a secret here", "a (hidden) here"),
                ("odd secret", "odd (hidden)"),
                ("nothing", "nothing"),
            ];
            for (sent, received) in payloads {
                udp.send(sent.as_bytes(), udp.address()).unwrap();
                let line = example.expect(&format!("UDP {0} -> {0}", udp.address()));
                assert!(line.contains(", user ") && line.contains(", lo"), "{line}");
                let mut events = socket.recv_timeout(&mut batch, TIMEOUT).unwrap();
                let packet = events.find_map(Event::packet).unwrap();
                let ttl = packet.payload()[if address == V4 { 8 } else { 7 }];
                assert_eq!(ttl, 42);
                socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
                // The receiver verifies the checksum in software.
                assert_eq!(udp.recv().as_deref(), Some(received.as_bytes()));
            }
            assert!(example.wait().success());
            queue.destroy().unwrap();
            table.delete().unwrap();
        }
    });
}

#[test]
fn first_bytes_inspects_only_the_first_bytes() {
    isolated(|| {
        const LONG: usize = 8 << 20;
        let table = Table::new(Family::Ip, "t").unwrap();
        let inspect = table.chain("inspect", Hook::Input, 0).unwrap();
        let rule = Rule::new().tcp_dport(PORT).ct_mark_not(1, u32::MAX);
        inspect.add(&rule.counter("queued").queue(1)).unwrap();
        let save = table.chain("save", Hook::Input, 10).unwrap();
        save.add(&Rule::new().tcp().mark(1, u32::MAX).save_mark())
            .unwrap();
        let example = Example::start("first_bytes", &[]);
        example.expect("queue 1 is bound");
        let listener = TcpListener::bind((V4, PORT)).unwrap();
        let to = listener.local_addr().unwrap();
        let sender = thread::spawn(move || {
            let mut client = TcpStream::connect(to).unwrap();
            client.write_all(&vec![7; LONG]).unwrap();
        });
        let (mut server, _) = listener.accept().unwrap();
        let mut received = Vec::new();
        server.read_to_end(&mut received).unwrap();
        assert!(received == [7; LONG]);
        sender.join().unwrap();
        example.expect("inspected: TCP 127.0.0.1");
        let queued = inspect.count("queued").unwrap();
        assert!(queued < 20, "{queued} packets");

        // The word is in two segments.
        let mut client = TcpStream::connect(to).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.set_nodelay(true).unwrap();
        client.write_all(b"this is blo").unwrap();
        let mut buf = [0; 64];
        assert_eq!(server.read(&mut buf).unwrap(), 11);
        client.write_all(b"cked!").unwrap();
        while !example.expect("TCP 127.0.0.1").starts_with("cut") {}
        // Longer than the sender waits before it sends again
        server
            .set_read_timeout(Some(Duration::from_secs(3)))
            .unwrap();
        assert!(server.read(&mut buf).is_err(), "nothing more arrives");
    });
}

/// Answers queries for A and AAAA records with one address, and runs until the socket is closed
fn serve_dns(udp: &UdpSocket) {
    let mut buf = [0; 512];
    while let Ok((len, from)) = udp.recv_from(&mut buf) {
        let query = &buf[..len];
        let name = query[12..].iter().position(|&byte| byte == 0).unwrap();
        let end = 12 + name + 5;
        let kind = query[end - 3];
        let address: &[u8] = match kind {
            1 => &[192, 0, 2, 7],
            28 => &[0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7],
            _ => &[],
        };
        let mut answer = query[..end].to_vec();
        answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
        answer.extend([
            0xc0,
            12,
            0,
            kind,
            0,
            1,
            0,
            0,
            0,
            60,
            0,
            u8::try_from(address.len()).unwrap(),
        ]);
        answer.extend(address);
        udp.send_to(&answer, from).unwrap();
    }
}

/// Asks the C library's resolver, with this name server
fn resolve(server: IpAddr, name: &str) -> String {
    let config = std::env::temp_dir().join(format!("nfqnl-resolv-{}", std::process::id()));
    std::fs::write(&config, format!("nameserver {server}\noptions timeout:5\n")).unwrap();
    let script = "mount --bind \"$1\" /etc/resolv.conf && exec getent ahosts \"$2\"";
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", script, "sh"])
        .arg(&config)
        .arg(name)
        .output()
        .unwrap();
    std::fs::remove_file(config).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.is_empty(), "{errors}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn dns_filter_hides_names_from_a_resolver() {
    isolated(|| {
        for (family, address) in [(Family::Ip, V4), (Family::Ip6, V6)] {
            let table = Table::new(family, "t").unwrap();
            let chain = table.chain("in", Hook::Input, 0).unwrap();
            chain.add(&Rule::new().udp_sport(53).queue(1)).unwrap();
            let example = Example::start("dns_filter", &["ads.example"]);
            example.expect("queue 1 is bound");
            let server = UdpSocket::bind((address, 53)).unwrap();
            thread::spawn(move || serve_dns(&server));
            for name in ["www.example", "ads.example.org", "myads.example"] {
                let found = resolve(address, name);
                assert!(found.contains("192.0.2.7"), "{name}: {found:?}");
                assert!(found.contains("2001:db8::7"), "{name}: {found:?}");
            }
            for name in ["ads.example", "a.b.Ads.Example"] {
                assert_eq!(resolve(address, name), "", "{name}");
                let line = example.expect("no ");
                assert!(
                    line.ends_with(&format!("{}.\"", name.to_lowercase())),
                    "{line}"
                );
                let _ = example.expect("no "); // the other type of address
            }
            table.delete().unwrap();
        }
    });
}

#[test]
fn upgrade_delivers_every_datagram_once() {
    isolated(|| {
        const N: u32 = 400;
        let [(socket, _), _] = sockets_into(1);
        let example = Example::start("upgrade", &[]);
        example.expect("queue 1 is bound");
        thread::scope(|scope| {
            scope.spawn(|| {
                for number in 0..N {
                    let payload = number.to_be_bytes();
                    socket.send(&payload, socket.address()).unwrap();
                    thread::sleep(Duration::from_micros(200));
                }
            });
            let received = (0..N).map(|_| socket.recv().unwrap());
            let numbers: BTreeSet<Vec<u8>> = received.collect();
            assert_eq!(numbers.len(), usize::try_from(N).unwrap());
        });
        for _ in 0..3 {
            example.expect("queue 1 is taken over");
        }
        assert!(example.wait().success());
    });
}

#[test]
fn rules_brings_its_rules_and_removes_them() {
    isolated(|| {
        const N: u32 = 1000;
        let sockets = [V4, V6].map(|address| Udp::bind(address, PORT).unwrap());
        let example = Example::start("rules", &["--count", "500"]);
        example.expect_line("UDP to port 5000 is queued");
        for number in 0..N {
            for socket in &sockets {
                socket
                    .send(&number.to_be_bytes(), socket.address())
                    .unwrap();
                assert_eq!(socket.recv().unwrap(), number.to_be_bytes());
            }
        }
        let line = example.expect("the rule has seen ");
        assert!(line.contains(" packets, "), "{line}");
        example.expect_line("0 packets lost");
        assert!(example.wait().success());
        assert!(!queue::is_bound(1).unwrap());
    });
}

#[test]
fn daemon_reloads_reports_and_stops() {
    isolated(|| {
        const N: u32 = 2000;
        let table = Table::new(Family::Ip, "t").unwrap();
        let chain = table.chain("in", Hook::Input, 0).unwrap();
        let rule = Rule::new().udp_dport(PORT);
        chain.add(&rule.queue(Queues::new(1).bypass())).unwrap();
        let socket = Udp::bind(V4, PORT).unwrap();
        let send = |payload: &[u8]| socket.send(payload, socket.address()).unwrap();
        let words = std::env::temp_dir().join(format!("nfqnl-words-{}", std::process::id()));
        std::fs::write(&words, "evil worm").unwrap();

        let example = Example::start("daemon", &[words.to_str().unwrap()]);
        example.expect("queue 1 is bound");
        send(b"an evil packet");
        send(b"");
        send(b"a good packet");
        let received = [socket.recv().unwrap(), socket.recv().unwrap()];
        assert!(received.contains(&b"".to_vec()) && received.contains(&b"a good packet".to_vec()));
        assert!(socket.is_silent());
        example.skip_to("Stats { packets: 3, waiting: 0, missing_packets: 0");

        std::fs::write(&words, "good").unwrap();
        kill_process(example.pid(), Signal::HUP).unwrap();
        example.skip_to("1 words");
        send(b"a good packet");
        send(b"an evil packet");
        assert_eq!(socket.recv().unwrap(), b"an evil packet");
        std::fs::remove_file(&words).unwrap();
        kill_process(example.pid(), Signal::HUP).unwrap();
        example.skip_to("1 words"); // they stay

        thread::scope(|scope| {
            scope.spawn(|| {
                for number in 0..N {
                    send(&number.to_be_bytes());
                    thread::sleep(Duration::from_micros(20));
                }
            });
            let mut received: Vec<_> = (0..N / 4).map(|_| socket.recv().unwrap()).collect();
            kill_process(example.pid(), Signal::TERM).unwrap();
            received.extend((N / 4..N).map(|_| socket.recv().unwrap()));
            received.sort_unstable();
            assert!(received.into_iter().eq((0..N).map(u32::to_be_bytes)));
        });
        assert_eq!(example.skip_to("stopped"), "stopped; 0 packets lost");
        assert!(example.wait().success());
    });
}

/// The output read by Linux's `nft_queue.sh`; `tests/kernels/run selftest` runs the script
mod nf_queue {
    use super::*;

    const QUEUE: u16 = 7;

    impl Example {
        /// Returns the rest of the output; fails if the example fails
        fn rest(self) -> Vec<String> {
            let rest = self.lines.iter().collect();
            assert!(self.wait().success());
            rest
        }
    }

    /// Starts the example and waits for its queue, because the example does not report the bind
    fn start(queue: u16, arguments: &[&str]) -> Example {
        let number = format!("-q{queue}");
        let example = Example::start("nf_queue", &[arguments, &[&number]].concat());
        let deadline = Instant::now() + TIMEOUT;
        while !queue::is_bound(queue).unwrap() {
            assert!(Instant::now() < deadline, "it does not bind its queue");
            thread::sleep(Duration::from_millis(1));
        }
        example
    }

    fn counts(hooks: [usize; 5]) -> Vec<String> {
        let lines = hooks.iter().enumerate();
        let lines = lines.map(|(hook, count)| format!("hook {hook} packets {count:08}"));
        let total = format!("{} packets total", hooks.iter().sum::<usize>());
        lines.chain([total]).collect()
    }

    #[test]
    fn prints_packets_and_counts_them_by_hook() {
        isolated(|| {
            let [(v4, _), (v6, _)] = sockets_into(QUEUE);
            let table = Table::new(Family::Ip, "later").unwrap();
            let later = table.chain("out", Hook::Output, 0).unwrap();
            let unfinished = " csumnotready";
            // With -G the kernel finishes the checksum for the first queue, and does not check it
            // for the next one.
            for (options, state, next) in [
                ("-cvt2", unfinished, unfinished),
                ("-Gcvt2", "", " csumnotverified"),
            ] {
                let example = start(QUEUE, &[options]);
                v6.send(b"v6", v6.address()).unwrap();
                example.expect_line(&format!("packet hook=34525, hwproto 0x1{state}"));
                later.add(&Rule::new().udp().queue(QUEUE)).unwrap();
                v4.send(b"v4", v4.address()).unwrap();
                example.expect_line(&format!("packet hook=2048, hwproto 0x3{state}"));
                example.expect_line(&format!("packet hook=2048, hwproto 0x1{next}"));
                later.flush().unwrap();
                assert_eq!(example.rest(), counts([0, 2, 0, 1, 0]));
                assert_eq!((v4.drain(), v6.drain()), (1, 1));
            }
        });
    }

    #[test]
    fn moves_packets_to_another_queue_after_a_delay() {
        isolated(|| {
            const N: u8 = 3;
            const DELAY: Duration = Duration::from_millis(150);
            let [(socket, _), _] = sockets_into(QUEUE);
            let second = start(QUEUE + 1, &["-vc", "-t5"]);
            let first = start(QUEUE, &["-c", "-t5", "-d150", "-Q8"]);
            let begin = Instant::now();
            (0..N).for_each(|number| socket.send(&[number], socket.address()).unwrap());
            for number in 0..N {
                assert_eq!(socket.recv(), Some(vec![number]));
                second.expect("packet hook=2048, hwproto 0x1");
            }
            assert!(begin.elapsed() >= DELAY * N.into());
            let expected = counts([0, N.into(), 0, 0, 0]);
            assert_eq!(first.rest(), expected);
            assert_eq!(second.rest(), expected);
        });
    }

    /// The last packets, fewer than sixteen, are dropped at the end.
    #[test]
    fn answers_out_of_order_with_bogus_verdicts() {
        isolated(|| {
            const N: u8 = 16 + 16 + 5;
            let [(socket, _), _] = sockets_into(QUEUE);
            let example = start(QUEUE, &["-Ob", "-vct2"]);
            for number in 0..N {
                socket.send(&[number], socket.address()).unwrap();
                // Each packet brings fifty refusals. Those of many packets could fill the buffer.
                example.expect("packet ");
            }
            for start in [0, 16] {
                for number in (start..start + 16).rev() {
                    assert_eq!(socket.recv(), Some(vec![number]));
                }
            }
            assert_eq!(example.rest(), counts([0, N.into(), 0, 0, 0]));
            assert!(socket.is_silent());
        });
    }

    #[test]
    fn fails_with_status_1() {
        isolated(|| {
            let other = nfqnl::Socket::open().unwrap();
            let _queue = other.bind(QUEUE).unwrap();
            for arguments in [
                &["-q7"][..],
                &["-q", "1", "-Q", "1"],
                &["-Q"],
                &["-Q65536"],
                &["-d", "0"],
                &["-t", "soon"],
                &["-x"],
                &["7"],
            ] {
                let status = Example::start("nf_queue", arguments).wait();
                assert_eq!(status.code(), Some(1), "{arguments:?}");
            }
            let example = Example::start("nf_queue", &["-h"]);
            example.expect("Usage: nf_queue [-c] ");
            assert!(example.wait().success());
        });
    }
}
