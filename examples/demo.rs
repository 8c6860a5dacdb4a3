//! The kernel holds real packets, shows them, and does with them what it is told
//!
//! ```text
//! cargo run --release --example demo                 # in a network namespace of its own, with its own rules
//! cargo run --release --example demo -- --queue 1    # shows and accepts what this host's rules put in queue 1
//! ```
//!
//! Alone, it sends itself UDP, TCP and ICMP over IPv4 and IPv6, and ends with 0 only if every packet met the fate that
//! it was meant to.

use std::error::Error;
use std::net::{IpAddr, TcpListener};
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use etherparse::{SlicedPacket, TransportSlice};
use nfqnl::{
    ConfigFlags, CopyMode, Event, Family, Handle, Packet, QueueConfig, QueueStats, RecvBatch,
    Verdict,
};
use nfqnl_testkit::rules::{self, Chain, Hook, Rule, Table};
use nfqnl_testkit::traffic::{self, SILENCE, TIMEOUT, Udp, V4, V6};
use nfqnl_testkit::{kernel, link, netns};

mod support;

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

/// Shows and accepts the packets of a queue of the host's own rules, until interrupted
fn attached(number: u16) -> Result<bool> {
    let handle = Handle::open()?;
    let _queue = handle.bind_queue(number)?;
    println!("queue {number} is bound; its packets are shown and accepted until Ctrl-C");
    let mut batch = RecvBatch::default();
    loop {
        for event in handle.recv(&mut batch)? {
            match event {
                Event::Packet(packet) => {
                    show(&packet, "accepted");
                    handle.verdict(packet.key(), Verdict::Accept)?;
                }
                Event::Overrun => println!("packets were lost: the receive buffer was full"),
                other => println!("{other}"),
            }
        }
    }
}

/// Prints a held packet: who sends it to whom, what the kernel tells about it, and what becomes of it
fn show(packet: &Packet<'_>, fate: &str) {
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
    println!(
        "  queue {} packet {}: {}",
        packet.queue(),
        packet.id(),
        support::endpoints(packet.payload())
    );
    println!(
        "    {} {}, {way}, mark {}, {} bytes; {}",
        packet.family(),
        packet.hook(),
        packet.mark(),
        packet.payload().len(),
        attributes.join(" ")
    );
    println!("    {fate}");
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

// The demonstration in a namespace of its own.

/// The queue that the rules put packets in
const FIRST: u16 = 1;
/// The queue for packets that come a second time
const SECOND: u16 = 2;
/// The mark that a verdict gives, and a later chain counts
const MARK: u32 = 7;
/// The mark that keeps a repeated packet from going round for ever
const REPEATED: u32 = 9;
/// What a rewritten datagram says: longer than what was sent
const REWRITTEN: &[u8] = b"rewritten by the demo, and longer than it was";
/// What is sent, one datagram each
const DATAGRAMS: [&[u8]; 2] = [b"first datagram", b"second"];

/// One kind of traffic, and what shall become of it
struct Job {
    name: &'static str,
    traffic: Traffic,
    /// Of each packet or exchange that is sent; TCP is another matter
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

/// How often a packet is held, accepted, dropped, rewritten and received
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

/// The two families: address to send to, tables to put rules in, and a name
const FAMILIES: [(Family, rules::Family, IpAddr, &str); 2] = [
    (Family::INET, rules::Family::Ip, V4, "IPv4"),
    (Family::INET6, rules::Family::Ip6, V6, "IPv6"),
];

type Counted = [[Counts; JOBS.len()]; FAMILIES.len()];

fn alone() -> Result<bool> {
    netns::enter()?;
    let tables = [
        Table::new(rules::Family::Ip, "demo")?,
        Table::new(rules::Family::Ip6, "demo")?,
    ];
    let later = tables.each_ref().map(install_rules);
    let handle = Handle::open()?;
    // Everything in one message each: no packet finds a queue half made.
    let config = QueueConfig::new()
        .copy_mode(CopyMode::PACKET, u32::MAX)
        .flags(ConfigFlags::UID_GID, ConfigFlags::UID_GID);
    let _queues = [
        handle.bind_queue_with(FIRST, &config)?,
        handle.bind_queue_with(SECOND, &config)?,
    ];

    let (traffic, traffic_is_over) = mpsc::channel();
    let (sent, held) = thread::scope(|scope| {
        let handle = &handle;
        let firewall = scope.spawn(move || firewall(handle, &traffic_is_over));
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
    for (chain, (.., family)) in later.into_iter().zip(FAMILIES) {
        let marked = chain?.count("marked")?;
        fine &= marked == DATAGRAMS.len() as u64;
        println!("{family}: a later chain counted {marked} packets with mark {MARK}");
    }
    fine &= report_counters(&handle);
    println!(
        "{}",
        if fine {
            "Every packet met its fate."
        } else {
            "FAILED: see above."
        }
    );
    Ok(fine)
}

/// Puts the jobs' packets in queues as they come in; returns the chain behind, which counts and drops
fn install_rules(table: &Table) -> std::io::Result<Chain<'_>> {
    let queue = table.chain("queue", Hook::Input, 0)?;
    let later = table.chain("later", Hook::Input, 10)?;
    later.add(&Rule::new().mark(MARK).counted("marked"))?;
    for job in &JOBS {
        match job.traffic {
            Traffic::Udp(port, fate) => {
                let udp = Rule::new().udp().dport(port);
                queue.add(&udp.clone().mark_not(REPEATED).queue(FIRST))?;
                match fate {
                    Fate::Repeat => queue.add(&udp.mark(REPEATED).queue(SECOND))?,
                    Fate::Stop => later.add(&udp.drop())?,
                    _ => {}
                }
            }
            Traffic::Tcp(port) => {
                queue.add(&Rule::new().tcp().dport(port).queue(FIRST))?;
                queue.add(&Rule::new().tcp().sport(port).queue(FIRST))?;
            }
            Traffic::Icmp => {
                queue.add(&Rule::new().icmp().queue(FIRST))?;
                queue.add(&Rule::new().icmp6().queue(FIRST))?;
            }
        }
    }
    Ok(later)
}

/// Answers every packet until the other end of the channel is dropped
fn firewall(handle: &Handle, traffic_is_over: &Receiver<()>) -> Result<Counted> {
    const LOOK: Duration = Duration::from_millis(20);
    let mut counted = Counted::default();
    let mut batch = RecvBatch::default();
    while traffic_is_over.try_recv() != Err(TryRecvError::Disconnected) {
        for event in handle.recv_deadline(&mut batch, Instant::now() + LOOK)? {
            match event {
                Event::Packet(packet) => {
                    if let Some(counts) = place(&packet, &mut counted) {
                        answer(handle, &packet, counts)?;
                    }
                }
                // STOLEN, which the kernel has for its own use. The packet still waits.
                Event::Refused(refusal) => {
                    println!("    {refusal}");
                    if let Some(key) = refusal.packet() {
                        println!("    so it is dropped instead");
                        handle.verdict(key, Verdict::Drop)?;
                    }
                }
                other => return Err(format!("unexpected: {other}").into()),
            }
        }
    }
    Ok(counted)
}

/// The job that a packet belongs to, and where it is counted
fn place<'c>(
    packet: &Packet<'_>,
    counted: &'c mut Counted,
) -> Option<(&'static Job, &'c mut Counts)> {
    let family = FAMILIES
        .iter()
        .position(|(family, ..)| *family == packet.family())?;
    let transport = SlicedPacket::from_ip(packet.payload()).ok()?.transport?;
    let job = JOBS
        .iter()
        .position(|job| match (job.traffic, &transport) {
            (Traffic::Udp(port, _), TransportSlice::Udp(udp)) => udp.destination_port() == port,
            (Traffic::Tcp(_), TransportSlice::Tcp(_)) => true,
            (Traffic::Icmp, transport) => matches!(
                transport,
                TransportSlice::Icmpv4(_) | TransportSlice::Icmpv6(_)
            ),
            _ => false,
        })?;
    Some((JOBS.get(job)?, counted.get_mut(family)?.get_mut(job)?))
}

/// Shows a packet and decides on it
fn answer(handle: &Handle, packet: &Packet<'_>, (job, counts): (&Job, &mut Counts)) -> Result<()> {
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
            handle.verdict(key, Verdict::Accept)?;
        }
        Fate::Drop => {
            show(packet, "dropped");
            handle.verdict(key, Verdict::Drop)?;
        }
        Fate::Mark => {
            show(packet, &format!("accepted with mark {MARK}"));
            handle.verdict(key, Verdict::Accept.with_mark(MARK))?;
        }
        Fate::Rewrite => {
            let new = support::with_udp_payload(packet.payload(), REWRITTEN).ok_or("no UDP")?;
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
            handle.verdict(key, Verdict::Accept.with_payload(&new))?;
        }
        Fate::Requeue => {
            show(packet, &format!("handed on to queue {SECOND}"));
            let second = Verdict::Queue {
                num: SECOND,
                bypass: false,
            };
            handle.verdict(key, second)?;
        }
        Fate::Repeat => {
            show(
                packet,
                &format!("sent through the chain again with mark {REPEATED}"),
            );
            handle.verdict(key, Verdict::Repeat.with_mark(REPEATED))?;
        }
        Fate::Stop => {
            show(packet, "accepted past the later chain, which would drop it");
            handle.verdict(key, Verdict::Stop)?;
        }
        Fate::Steal => {
            show(packet, "stolen, or so we wish");
            handle.verdict(key, Verdict::Stolen)?;
        }
    }
    Ok(())
}

/// Sends every job's traffic over both families, and counts what is received; drops the sender when it is done
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

/// Prints the table, and says whether everything is as it was meant to be
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

/// How many of a job's packets are received, for each that is sent
fn received(job: &Job) -> usize {
    match job.traffic {
        Traffic::Udp(_, Fate::Rewrite) if kernel::refuses_payloads() => 0,
        _ => job.expected.received,
    }
}

fn as_expected(job: &Job, counts: &Counts) -> bool {
    if let Traffic::Tcp(_) = job.traffic {
        /// Three for the handshake, one with data each way at least, and a FIN each way
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

/// Prints what the library and the kernel have counted, and says whether nothing is lost or waits
fn report_counters(handle: &Handle) -> bool {
    let stats = handle.stats();
    println!(
        "the library received {} packets, lost {}, and had {} verdicts refused, as STOLEN must be",
        stats.packets, stats.lost_packets, stats.refused_verdicts
    );
    let stolen = FAMILIES.len() * DATAGRAMS.len();
    let mut fine = stats.lost_packets == 0 && stats.refused_verdicts == stolen as u64;
    match QueueStats::read_all() {
        Ok(queues) => {
            for queue in queues {
                println!("the kernel on {queue}");
                fine &= queue.waiting + queue.queue_dropped + queue.user_dropped == 0;
            }
        }
        Err(error) => println!("the kernel's counters are for the machine's root alone: {error}"),
    }
    fine
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_count_that_is_not_as_meant_fails_the_demo() {
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
