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
use nfqnl::rewrite::{Rewrite, RewriteError};
use nfqnl::{Event, Packet, RecvBatch, SendBatch, Socket, Verdict};

const HEADER_LEN: usize = 12;
/// Type and class behind the name in a question
const QUESTION_TAIL: usize = 4;
const NXDOMAIN: u8 = 3;

/// Returns the name in the first question, and the end of this question
fn question(message: &[u8]) -> Option<(String, usize)> {
    let mut name = String::new();
    let mut at = HEADER_LEN;
    loop {
        let len = usize::from(*message.get(at)?);
        at += 1;
        match len {
            0 => return Some((name, at + QUESTION_TAIL)),
            64.. => return None, // a pointer, which a question does not need
            _ => {}
        }
        let label = message.get(at..at + len)?;
        name.push_str(&String::from_utf8_lossy(label).to_ascii_lowercase());
        name.push('.');
        at += len;
    }
}

fn is_below(name: &str, domain: &str) -> bool {
    let name = name.trim_end_matches('.');
    let domain = domain.trim_end_matches('.');
    name == domain || name.ends_with(&format!(".{domain}"))
}

/// Returns the changed answer in `buf`; `None` if its name is wanted
fn filter<'b>(
    packet: &Packet<'_>,
    domains: &[String],
    buf: &'b mut [u8],
) -> Result<Option<&'b [u8]>, RewriteError> {
    let mut rewrite = Rewrite::new(packet, buf)?;
    let message = rewrite.payload();
    let is_answer = message.get(2).is_some_and(|flags| flags & 0x80 != 0);
    let Some((name, end)) = question(message).filter(|_| is_answer) else {
        return Ok(None);
    };
    if !domains.iter().any(|domain| is_below(&name, domain)) {
        return Ok(None);
    }
    let len = message.len();
    let code = message[3] & 0xf0 | NXDOMAIN;
    println!("no {name}");
    rewrite.replace(3..4, &[code])?;
    // One question; no answers, name servers or additional records
    rewrite.replace(4..HEADER_LEN, &[0, 1, 0, 0, 0, 0, 0, 0])?;
    rewrite.replace(end.min(len)..len, &[])?;
    rewrite.finish().map(Some)
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
    loop {
        for event in socket.recv(&mut batch)? {
            let Event::Packet(packet) = event else {
                eprintln!("{event}");
                continue;
            };
            match filter(&packet, &domains, &mut buf) {
                Ok(Some(new)) => verdicts.push(packet.key(), Verdict::Accept.with_payload(new))?,
                Ok(None) => verdicts.push(packet.key(), Verdict::Accept)?,
                Err(error) => {
                    eprintln!("{error}");
                    verdicts.push(packet.key(), Verdict::Drop)?;
                }
            }
        }
        socket.send(&mut verdicts)?;
    }
}
