//! Every verdict on real packets
//!
//! ```text
//! cargo run --release --example demo                 # in its own network namespace
//! cargo run --release --example demo -- --queue 1    # on queue 1 of this host
//! ```
//!
//! Without arguments the program makes its own rules and sends itself UDP, TCP and ICMP over IPv4
//! and IPv6. It exits with 0 only if every packet got the expected verdict. With `--queue N` it
//! prints and accepts the packets in queue N of this host.

use std::error::Error;
use std::net::{IpAddr, TcpListener};
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread;
use std::time::Duration;

use nfqnl::rewrite::Rewriter;
use nfqnl::rules::{Chain, ChainConfig, Rule, Table};
use nfqnl::{
    ConfigFlags, CopyMode, Event, Family, Hook, IpProtocol, Packet, QueueConfig, QueueStats,
    RecvBatch, Socket, Verdict,
};
use nfqnl_testkit::traffic::{self, SILENCE, TIMEOUT, Udp, V4, V6};
use nfqnl_testkit::{kernel, link, netns};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments[..] {
        [] => alone(),
        ["--queue", number] => match number.parse() {
            Ok(number) => attached(number),
            Err(_) => usage(),
        },
        _ => usage(),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> Result<bool> {
    Err("usage: demo [--queue NUMBER]".into())
}

/// Prints and accepts the packets of a queue of this host, until interrupted
fn attached(number: u16) -> Result<bool> {
    let socket = Socket::open()?;
    let _queue = socket.bind(number)?;
    println!("queue {number} is bound; its packets are shown and accepted until Ctrl-C");
    let mut batch = RecvBatch::default();
    loop {
        for event in socket.recv(&mut batch)? {
            match event {
                Event::Packet(packet) => {
                    show(&packet, "accepted");
                    socket.set_verdict(packet.key(), Verdict::Accept)?;
                }
                other => eprintln!("{other}"),
            }
        }
    }
}

/// Prints a held packet: its addresses, the kernel's attributes, and its verdict
fn show(packet: &Packet<'_>, verdict: &str) {
    let device = |index: Option<u32>| index.map(|i| link::name(i).unwrap_or_else(|| i.to_string()));
    let way = match (device(packet.indev()), device(packet.outdev())) {
        (Some(from), Some(to)) => format!("from {from} to {to}"),
        (Some(from), None) => format!("from {from}"),
        (None, Some(to)) => format!("to {to}"),
        (None, None) => "no device".to_owned(),
    };
    let attributes: Vec<&str> = packet
        .attrs()
        .flatten()
        .map(|attr| attribute_name(attr.kind))
        .collect();
    let flow = packet.flow();
    println!(
        "  queue {} packet {}: {}",
        packet.queue(),
        packet.id(),
        flow.map_or_else(|| "not IP".to_owned(), |flow| flow.to_string())
    );
    println!(
        "    {} {}, {way}, mark {}, {} bytes; {}",
        packet.family(),
        packet.hook(),
        packet.mark(),
        packet.payload().len(),
        attributes.join(" ")
    );
    println!("    {verdict}");
}

/// The name in `linux/netfilter/nfnetlink_queue.h`, without `NFQA_`
fn attribute_name(kind: u16) -> &'static str {
    const NAMES: [&str; 23] = [
        "UNSPEC",
        "PACKET_HDR",
        "VERDICT_HDR",
        "MARK",
        "TIMESTAMP",
        "IFINDEX_INDEV",
        "IFINDEX_OUTDEV",
        "IFINDEX_PHYSINDEV",
        "IFINDEX_PHYSOUTDEV",
        "HWADDR",
        "PAYLOAD",
        "CT",
        "CT_INFO",
        "CAP_LEN",
        "SKB_INFO",
        "EXP",
        "UID",
        "GID",
        "SECCTX",
        "VLAN",
        "L2HDR",
        "PRIORITY",
        "CGROUP_CLASSID",
    ];
    NAMES.get(usize::from(kind)).unwrap_or(&"unknown")
}

// The demonstration in its own namespace

/// The queue of the rules for new packets
const FIRST: u16 = 1;
/// The queue for requeued and repeated packets
const SECOND: u16 = 2;
/// The mark of a verdict; a later chain counts it
const MARK: u32 = 7;
/// The mark of repeated packets, which keeps them out of the first queue
const REPEATED: u32 = 9;
/// A new payload, longer than the old ones
const REWRITTEN: &[u8] = b"rewritten by the demo, and longer than it was";
/// The number of datagrams of each UDP job
const DATAGRAMS: [&[u8]; 2] = [b"first datagram", b"second"];

/// One kind of traffic, and its expected result
struct Job {
    name: &'static str,
    traffic: Traffic,
    /// For each packet or exchange; TCP is counted differently
    expected: Counts,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Traffic {
    Udp(u16, Fate),
    Tcp(u16),
    Icmp,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Accept,
    Drop,
    Mark,
    Rewrite,
    Requeue,
    Repeat,
    Stop,
    Steal,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Counts {
    sent: usize,
    held: usize,
    accepted: usize,
    dropped: usize,
    rewritten: usize,
    received: usize,
}

/// The counts of one packet: held, accepted, dropped, rewritten and received
const fn each(
    held: usize,
    accepted: usize,
    dropped: usize,
    rewritten: usize,
    received: usize,
) -> Counts {
    Counts {
        sent: 1,
        held,
        accepted,
        dropped,
        rewritten,
        received,
    }
}

const JOBS: [Job; 10] = [
    Job {
        name: "UDP accepted",
        traffic: Traffic::Udp(5001, Fate::Accept),
        expected: each(1, 1, 0, 0, 1),
    },
    Job {
        name: "UDP dropped",
        traffic: Traffic::Udp(5002, Fate::Drop),
        expected: each(1, 0, 1, 0, 0),
    },
    Job {
        name: "UDP marked",
        traffic: Traffic::Udp(5003, Fate::Mark),
        expected: each(1, 1, 0, 0, 1),
    },
    Job {
        name: "UDP rewritten",
        traffic: Traffic::Udp(5004, Fate::Rewrite),
        expected: each(1, 1, 0, 1, 1),
    },
    Job {
        name: "UDP requeued",
        traffic: Traffic::Udp(5005, Fate::Requeue),
        expected: each(2, 1, 0, 0, 1),
    },
    Job {
        name: "UDP repeated",
        traffic: Traffic::Udp(5006, Fate::Repeat),
        expected: each(2, 1, 0, 0, 1),
    },
    Job {
        name: "UDP stop",
        traffic: Traffic::Udp(5007, Fate::Stop),
        expected: each(1, 1, 0, 0, 1),
    },
    Job {
        name: "UDP stolen",
        traffic: Traffic::Udp(5008, Fate::Steal),
        expected: each(1, 0, 1, 0, 0),
    },
    Job {
        name: "TCP exchange",
        traffic: Traffic::Tcp(5010),
        expected: each(0, 0, 0, 0, 1),
    },
    Job {
        name: "ICMP echo",
        traffic: Traffic::Icmp,
        expected: each(2, 2, 0, 0, 1),
    },
];

/// The two families, with an address and a name
const FAMILIES: [(Family, IpAddr, &str); 2] =
    [(Family::INET, V4, "IPv4"), (Family::INET6, V6, "IPv6")];

type Counted = [[Counts; JOBS.len()]; FAMILIES.len()];

fn alone() -> Result<bool> {
    netns::enter()?;
    let socket = Socket::open()?;
    // One message binds and configures a queue, so no packet meets a half-made queue.
    let config = QueueConfig::new()
        .copy_mode(CopyMode::Packet, u32::MAX)
        .enable(ConfigFlags::UID_GID);
    let _queues = [
        socket.bind_with(FIRST, &config)?,
        socket.bind_with(SECOND, &config)?,
    ];
    let table = Table::new("demo")?; // after the binds: the table vanishes with the program
    let later = install_rules(&table)?;

    let (traffic, traffic_is_over) = mpsc::channel();
    let (sent, held) = thread::scope(|scope| {
        let socket = &socket;
        let firewall = scope.spawn(move || firewall(socket, &traffic_is_over));
        (send_everything(traffic), firewall.join())
    });
    let mut counted = held.map_err(|_| "the firewall thread panicked")??;
    for (counts, sent) in counted
        .as_flattened_mut()
        .iter_mut()
        .zip(sent?.as_flattened())
    {
        (counts.sent, counts.received) = (sent.sent, sent.received);
    }
    let mut fine = report(&counted);
    let marked = later.counter("marked")?.ok_or("no counter")?.packets;
    fine &= marked == (FAMILIES.len() * DATAGRAMS.len()) as u64;
    println!("a later chain counted {marked} packets with mark {MARK}");
    fine &= report_counters(&socket);
    println!(
        "{}",
        if fine {
            "Every packet got the expected verdict."
        } else {
            "FAILED: see above."
        }
    );
    Ok(fine)
}

/// Adds the rules for queueing the jobs' packets; returns the later chain, which counts and drops
fn install_rules(table: &Table) -> Result<Chain> {
    let queue = table.chain("queue", Hook::INPUT)?;
    let later = table.chain("later", ChainConfig::new(Hook::INPUT).priority(10))?;
    later.add(&Rule::new().mark(MARK, u32::MAX).counter("marked"))?;
    for job in &JOBS {
        match job.traffic {
            Traffic::Udp(port, fate) => {
                let udp = Rule::new().udp_dport(port);
                queue.add(&udp.clone().mark_not(REPEATED, u32::MAX).queue(FIRST))?;
                match fate {
                    Fate::Repeat => queue.add(&udp.mark(REPEATED, u32::MAX).queue(SECOND))?,
                    Fate::Stop => later.add(&udp.drop())?,
                    _ => {}
                }
            }
            Traffic::Tcp(port) => {
                queue.add(&Rule::new().tcp_dport(port).queue(FIRST))?;
                queue.add(&Rule::new().tcp_sport(port).queue(FIRST))?;
            }
            Traffic::Icmp => {
                queue.add(&Rule::new().protocol(IpProtocol::ICMP).queue(FIRST))?;
                queue.add(&Rule::new().protocol(IpProtocol::ICMPV6).queue(FIRST))?;
            }
        }
    }
    Ok(later)
}

/// Answers every packet until the sending end of the channel is dropped
fn firewall(socket: &Socket, traffic_is_over: &Receiver<()>) -> Result<Counted> {
    const LOOK: Duration = Duration::from_millis(20);
    let mut counted = Counted::default();
    let mut batch = RecvBatch::default();
    while traffic_is_over.try_recv() != Err(TryRecvError::Disconnected) {
        for event in socket.recv_timeout(&mut batch, LOOK)? {
            match event {
                Event::Packet(packet) => {
                    if let Some(counts) = place(&packet, &mut counted) {
                        answer(socket, &packet, counts)?;
                    }
                }
                // The kernel reserves STOLEN for itself. The packet still waits.
                Event::Refused(refusal) => {
                    println!("    {refusal}");
                    if let Some(key) = refusal.packet() {
                        println!("    so it is dropped instead");
                        socket.set_verdict(key, Verdict::Drop)?;
                    }
                }
                other => return Err(format!("unexpected: {other}").into()),
            }
        }
    }
    Ok(counted)
}

/// The job of a packet, and its counts
fn place<'c>(
    packet: &Packet<'_>,
    counted: &'c mut Counted,
) -> Option<(&'static Job, &'c mut Counts)> {
    let family = FAMILIES
        .iter()
        .position(|(family, ..)| *family == packet.family())?;
    let flow = packet.flow()?;
    let job = JOBS
        .iter()
        .position(|job| match (job.traffic, flow.protocol()) {
            (Traffic::Udp(port, _), IpProtocol::UDP) => {
                flow.ports().is_some_and(|(_, to)| to == port)
            }
            (Traffic::Tcp(_), IpProtocol::TCP) => true,
            (Traffic::Icmp, IpProtocol::ICMP | IpProtocol::ICMPV6) => true,
            _ => false,
        })?;
    Some((JOBS.get(job)?, counted.get_mut(family)?.get_mut(job)?))
}

/// Prints a packet and sends its verdict
fn answer(socket: &Socket, packet: &Packet<'_>, (job, counts): (&Job, &mut Counts)) -> Result<()> {
    let key = packet.key();
    counts.held += 1;
    let fate = match job.traffic {
        Traffic::Udp(_, fate) if packet.queue() == FIRST => fate,
        _ => Fate::Accept,
    };
    match fate {
        Fate::Requeue | Fate::Repeat => {}
        Fate::Drop | Fate::Steal => counts.dropped += 1,
        _ => counts.accepted += 1,
    }
    match fate {
        Fate::Accept => {
            show(packet, "accepted");
            socket.set_verdict(key, Verdict::Accept)?;
        }
        Fate::Drop => {
            show(packet, "dropped");
            socket.set_verdict(key, Verdict::Drop)?;
        }
        Fate::Mark => {
            show(packet, &format!("accepted with mark {MARK}"));
            socket.set_verdict(key, Verdict::Accept.with_mark(MARK))?;
        }
        Fate::Rewrite => {
            let mut buf = [0; 1500];
            let mut rewriter = Rewriter::new(&mut buf);
            let mut rewrite = rewriter.begin(packet)?;
            rewrite.replace(0..rewrite.payload()?.len(), REWRITTEN)?;
            let new = rewrite.finish()?;
            let refused = if kernel::refuses_payloads() {
                ", which this kernel refuses in an ordinary user's namespace"
            } else {
                ""
            };
            show(
                packet,
                &format!("rewritten, now {} bytes{refused}", new.len()),
            );
            counts.rewritten += 1;
            socket.set_verdict(key, Verdict::Accept.with_payload(new))?;
        }
        Fate::Requeue => {
            show(packet, &format!("moved to queue {SECOND}"));
            let second = Verdict::Queue {
                num: SECOND,
                bypass: false,
            };
            socket.set_verdict(key, second)?;
        }
        Fate::Repeat => {
            show(
                packet,
                &format!("sent through the chain again with mark {REPEATED}"),
            );
            socket.set_verdict(key, Verdict::Repeat.with_mark(REPEATED))?;
        }
        Fate::Stop => {
            show(packet, "accepted past the later chain, which would drop it");
            socket.set_verdict(key, Verdict::Stop)?;
        }
        Fate::Steal => {
            show(packet, "stolen, which the kernel refuses");
            socket.set_verdict(key, Verdict::Stolen)?;
        }
    }
    Ok(())
}

/// Sends every job's traffic over both families and counts replies; drops the channel at the end
fn send_everything(_traffic: Sender<()>) -> Result<Counted> {
    let mut counted = Counted::default();
    for ((.., address, family), counts) in FAMILIES.into_iter().zip(&mut counted) {
        for (job, counts) in JOBS.iter().zip(counts) {
            println!("{} over {family}", job.name);
            match job.traffic {
                Traffic::Udp(port, fate) => {
                    let socket = Udp::bind(address, port)?;
                    for sent in DATAGRAMS {
                        counts.sent += 1;
                        socket.send(sent, socket.address())?;
                        let patience = if received(job) > 0 { TIMEOUT } else { SILENCE };
                        let received = socket.recv_within(patience);
                        match &received {
                            Some(text) => println!("    received: {}", text.escape_ascii()),
                            None => println!("    nothing is received"),
                        }
                        let wanted = if fate == Fate::Rewrite {
                            REWRITTEN
                        } else {
                            sent
                        };
                        counts.received += usize::from(received.as_deref() == Some(wanted));
                    }
                }
                Traffic::Tcp(port) => {
                    let listener = TcpListener::bind((address, port))?;
                    let echo = thread::spawn(move || traffic::tcp_echo(&listener));
                    let sent = DATAGRAMS.concat();
                    counts.sent = 1;
                    let back = traffic::tcp_exchange((address, port).into(), &sent)?;
                    counts.received = usize::from(back == sent);
                    echo.join().map_err(|_| "the TCP server panicked")??;
                    println!("    received back: {}", back.escape_ascii());
                    thread::sleep(SILENCE); // the last acknowledgements
                }
                Traffic::Icmp => {
                    counts.sent = 1;
                    counts.received = usize::from(traffic::ping(address, b"echo", TIMEOUT)?);
                }
            }
        }
    }
    Ok(counted)
}

/// Prints the table; true if every count is as expected
fn report(counted: &Counted) -> bool {
    let mut fine = true;
    println!();
    println!(
        "{:<20} {:>8} {:>8} {:>8} {:>8} {:>9} {:>8}",
        "", "sent", "held", "accepted", "dropped", "rewritten", "received"
    );
    for ((.., family), counted) in FAMILIES.into_iter().zip(counted) {
        for (job, c) in JOBS.iter().zip(counted) {
            let ok = as_expected(job, c);
            fine &= ok;
            println!(
                "{:<20} {:>8} {:>8} {:>8} {:>8} {:>9} {:>8}  {}",
                format!("{family} {}", job.name),
                c.sent,
                c.held,
                c.accepted,
                c.dropped,
                c.rewritten,
                c.received,
                if ok { "ok" } else { "NOT AS EXPECTED" }
            );
        }
    }
    println!();
    fine
}

/// Returns the expected number of received packets per sent packet
fn received(job: &Job) -> usize {
    match job.traffic {
        Traffic::Udp(_, Fate::Rewrite) if kernel::refuses_payloads() => 0,
        _ => job.expected.received,
    }
}

fn as_expected(job: &Job, counts: &Counts) -> bool {
    if let Traffic::Tcp(_) = job.traffic {
        /// Three for the handshake, one with data each way, and a FIN each way
        const LEAST: usize = 7;
        return counts.received == counts.sent
            && counts.held == counts.accepted
            && counts.held >= LEAST;
    }
    let Counts {
        sent: _,
        held,
        accepted,
        dropped,
        rewritten,
        received: _,
    } = job.expected;
    let sent = counts.sent;
    let expected = Counts {
        sent,
        held: held * sent,
        accepted: accepted * sent,
        dropped: dropped * sent,
        rewritten: rewritten * sent,
        received: received(job) * sent,
    };
    sent > 0 && *counts == expected
}

/// Prints the counters of library and kernel; true if no packet is lost and none waits
fn report_counters(socket: &Socket) -> bool {
    let stats = socket.stats();
    println!(
        "the library received {} packets, {} are missing, and {} verdicts (STOLEN) were refused",
        stats.packets, stats.missing_packets, stats.refused_verdicts
    );
    let stolen = FAMILIES.len() * DATAGRAMS.len();
    let mut fine = stats.missing_packets == 0 && stats.refused_verdicts == stolen as u64;
    match QueueStats::read_all() {
        Ok(queues) => {
            for queue in queues {
                println!("the kernel on {queue}");
                fine &= queue.waiting + queue.queue_dropped + queue.user_dropped == 0;
            }
        }
        Err(error) => println!("only the machine's root may read the kernel's counters: {error}"),
    }
    fine
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_count_fails_the_demo() {
        let fine = JOBS.map(|job| {
            let mut counts = job.expected;
            counts.received = received(&job);
            if let Traffic::Tcp(_) = job.traffic {
                (counts.held, counts.accepted) = (9, 9);
            }
            counts
        });
        let counted = [fine; FAMILIES.len()];
        assert!(report(&counted));
        for family in 0..FAMILIES.len() {
            for job in 0..JOBS.len() {
                let fields: [fn(&mut Counts); 4] = [
                    |counts| counts.sent += 1,
                    |counts| counts.held += 1,
                    |counts| counts.accepted += 1,
                    |counts| counts.received += 1,
                ];
                for change in fields {
                    let mut counted = counted;
                    change(&mut counted[family][job]);
                    assert!(!report(&counted), "{} {family}", JOBS[job].name);
                }
            }
        }
    }
}
