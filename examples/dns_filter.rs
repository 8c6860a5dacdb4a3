//! Answers DNS queries for unwanted names with "no such name"
//!
//! ```text
//! iptables -A INPUT -p udp --sport 53 -j NFQUEUE --queue-num 1 --queue-bypass    # and ip6tables
//! cargo run --release --example dns_filter ads.example tracker.example
//! ```
//!
//! On a router, use the chain FORWARD. The arguments are domains: their names, and all names below
//! them, do not exist. The program changes the server's answer: it sets the code NXDOMAIN and cuts
//! the records behind the question. DNS over TCP, TLS and HTTPS passes.

use std::error::Error;

use nfqnl::consts::MAX_PAYLOAD;
use nfqnl::rewrite::{RewriteError, Rewriter};
use nfqnl::{Decision, Event, Packet, RecvBatch, SendBatch, Socket, Verdict};

const HEADER_LEN: usize = 12;
/// Type and class behind the name in a question
const QUESTION_TAIL: usize = 4;
const NXDOMAIN: u8 = 3;

/// Returns the name in the question, and the end of the question; `None` if there is not one
fn question(message: &[u8]) -> Option<(String, usize)> {
    let mut name = String::new();
    let mut at = HEADER_LEN;
    if message.get(4..6)? != [0, 1] {
        return None;
    }
    loop {
        let len = usize::from(*message.get(at)?);
        at += 1;
        match len {
            0 => break,
            64.. => return None, // a pointer, which a question does not need
            _ => {}
        }
        let label = message.get(at..at + len)?;
        name.push_str(&String::from_utf8_lossy(label).to_ascii_lowercase());
        name.push('.');
        at += len;
    }
    let end = at + QUESTION_TAIL;
    (end <= message.len()).then_some((name, end))
}

fn is_below(name: &str, domain: &str) -> bool {
    let name = name.trim_end_matches('.');
    let domain = domain.trim_end_matches('.');
    name == domain || name.ends_with(&format!(".{domain}"))
}

/// Returns the verdict on an answer, changed if its name is unwanted
fn filter<'r>(
    packet: &Packet<'_>,
    domains: &[String],
    rewriter: &'r mut Rewriter<'_>,
) -> Result<Decision<'r>, RewriteError> {
    let mut rewrite = rewriter.begin(packet)?;
    let message = rewrite.payload()?;
    let Some((name, end)) = question(message) else {
        return Ok(Verdict::Drop.into()); // it cannot be inspected
    };
    if !domains.iter().any(|domain| is_below(&name, domain)) {
        return Ok(Verdict::Accept.into());
    }
    println!("no {name:?}");
    let len = message.len();
    // Not truncated, not authenticated, no such name
    let flags = [message[2] & !0x02, message[3] & 0xd0 | NXDOMAIN];
    // One question; no answers, name servers or additional records
    let counts = [0, 1, 0, 0, 0, 0, 0, 0];
    rewrite.replace(2..HEADER_LEN, &[&flags[..], &counts].concat())?;
    rewrite.replace(end..len, &[])?;
    Ok(Verdict::Accept.with_payload(rewrite.finish()?))
}

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let domains: Vec<String> = std::env::args()
        .skip(1)
        .map(|domain| domain.to_ascii_lowercase())
        .collect();
    let socket = Socket::open()?;
    let queue = socket.bind(1)?;
    println!("queue {} is bound", queue.num());
    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
    let mut buf = vec![0; MAX_PAYLOAD];
    let mut rewriter = Rewriter::new(&mut buf);
    loop {
        for event in socket.recv(&mut batch)? {
            let Event::Packet(packet) = event else {
                eprintln!("{event}");
                continue;
            };
            match filter(&packet, &domains, &mut rewriter) {
                Ok(decision) => verdicts.answer(&packet, decision)?,
                // A fragment, a truncated copy, …: it cannot be inspected.
                Err(error) => {
                    eprintln!("{error}");
                    verdicts.push(packet.key(), Verdict::Drop)?;
                }
            }
        }
        socket.send(&mut verdicts)?;
    }
}
