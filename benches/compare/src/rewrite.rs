//! Rewriting of UDP packets: every side makes the same changed copies of the same packets
//!
//! The sides in Rust are functions here. `peers/pktb.c` is the one in C, a process.

use std::fmt::Write as _;
use std::hint::black_box;
use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use etherparse::{NetHeaders, PacketBuilder, PacketHeaders};
use nfqnl::Packet;
use nfqnl::consts::{NFQA_PACKET_HDR, NFQA_PAYLOAD, NFQNL_MSG_PACKET, message_type};
use nfqnl::rewrite::Rewriter;

use crate::{C, IP_AND_UDP, Result};

pub(crate) const ETHERPARSE: &str = "etherparse";
pub(crate) const NFQNL: &str = "nfqnl Rewrite";
/// The first is the base of the ratios
pub(crate) const SIDES: [&str; 3] = [C, ETHERPARSE, NFQNL];
/// The length of the packet, and of the bytes that replace [`OLD_LEN`] others
pub(crate) const CHANGES: [(usize, usize); 4] = [(64, 8), (64, 12), (1400, 8), (1400, 12)];
pub(crate) const OLD_LEN: usize = 8;
/// In the UDP payload
const OFFSET: usize = 8;
const REPLACEMENT: &[u8] = b"ABCDEFGHIJKL";

/// All sides
pub(crate) struct Sides {
    process: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Sides {
    pub(crate) fn start(built: &Path) -> Result<Self> {
        let mut process = Command::new(built.join("pktb"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        Ok(Self {
            commands: process.stdin.take().ok_or("no input")?,
            answers: BufReader::new(process.stdout.take().ok_or("no output")?),
            process,
        })
    }

    /// Rewrites a packet `count` times, and returns the nanoseconds and the result in hexadecimal
    pub(crate) fn run(
        &mut self,
        side: &str,
        (len, new_len): (usize, usize),
        count: usize,
    ) -> Result<(f64, String)> {
        match side {
            C => {
                writeln!(self.commands, "{len} {new_len} {count}")?;
                let mut answer = String::new();
                self.answers.read_line(&mut answer)?;
                let (time, result) = answer.trim_end().split_once(' ').ok_or("no answer")?;
                Ok((time.parse()?, result.to_owned()))
            }
            ETHERPARSE => with_etherparse(len, new_len, count),
            _ => with_nfqnl(len, new_len, count),
        }
    }
}

impl Drop for Sides {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Returns the same packet as `build` in `peers/pktb.c`
fn packet(len: usize) -> Result<Vec<u8>> {
    let payload: Vec<u8> = (0..=u8::MAX).cycle().take(len - IP_AND_UDP).collect();
    let mut packet = Vec::new();
    PacketBuilder::ipv4([127, 0, 0, 1], [127, 0, 0, 1], 64)
        .udp(7, 7)
        .write(&mut packet, &payload)?;
    Ok(packet)
}

/// Returns the message of the kernel with this packet
fn message(packet: &[u8]) -> Result<Vec<u8>> {
    let attributes = [
        &11u16.to_ne_bytes()[..],
        &NFQA_PACKET_HDR.to_ne_bytes(),
        &[0, 0, 0, 1, 8, 0, 1, 0],
        &u16::try_from(4 + packet.len())?.to_ne_bytes(),
        &NFQA_PAYLOAD.to_ne_bytes(),
        packet,
    ]
    .concat();
    Ok([
        &u32::try_from(20 + attributes.len())?.to_ne_bytes()[..],
        &message_type(NFQNL_MSG_PACKET).to_ne_bytes(),
        &[0; 10],
        &[2, 0, 0, 1], // struct nfgenmsg: IPv4, queue 1
        &attributes,
    ]
    .concat())
}

fn new_bytes(len: usize) -> Result<&'static [u8]> {
    Ok(REPLACEMENT.get(..len).ok_or("too many bytes")?)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Calls `rewrite` some times, and returns the nanoseconds
fn time(count: usize, mut rewrite: impl FnMut() -> Result<()>) -> Result<f64> {
    let begin = Instant::now();
    for _ in 0..count {
        rewrite()?;
    }
    Ok(begin.elapsed().as_nanos() as f64)
}

fn with_etherparse(len: usize, new_len: usize, count: usize) -> Result<(f64, String)> {
    let (packet, new, mut out) = (packet(len)?, new_bytes(new_len)?, Vec::new());
    let time = time(count, || {
        let headers = PacketHeaders::from_ip_slice(black_box(&packet))?;
        let old = headers.payload.slice();
        let (Some(NetHeaders::Ipv4(mut ip, _)), Some(mut transport)) =
            (headers.net, headers.transport)
        else {
            return Err("not a UDP packet".into());
        };
        let (Some(before), Some(behind)) = (old.get(..OFFSET), old.get(OFFSET + OLD_LEN..)) else {
            return Err("a short packet".into());
        };
        // The payload is copied once: the headers are written in front of it at the end.
        let headers_len = ip.header_len() + transport.header_len();
        out.clear();
        out.resize(headers_len, 0);
        out.extend_from_slice(before);
        out.extend_from_slice(new);
        out.extend_from_slice(behind);
        let (mut head, payload) = out.split_at_mut(headers_len);
        let udp_len = transport.header_len() + payload.len();
        transport.mut_udp().ok_or("not a UDP packet")?.length = udp_len.try_into()?;
        ip.set_payload_len(udp_len)?;
        ip.header_checksum = ip.calc_header_checksum();
        transport.update_checksum_ipv4(&ip, payload)?;
        ip.write(&mut head)?;
        transport.write(&mut head)?;
        black_box(&mut out);
        Ok(())
    })?;
    Ok((time, hex(&out)))
}

fn with_nfqnl(len: usize, new_len: usize, count: usize) -> Result<(f64, String)> {
    let (message, new) = (message(&packet(len)?)?, new_bytes(new_len)?);
    let packet = Packet::parse(&message)?;
    let (mut buf, mut result_len) = (vec![0; len + new_len], 0);
    let mut rewriter = Rewriter::new(&mut buf);
    let time = time(count, || {
        let mut rewrite = rewriter.begin(black_box(&packet))?;
        rewrite.replace(OFFSET..OFFSET + OLD_LEN, new)?;
        result_len = black_box(rewrite.finish()?).len();
        Ok(())
    })?;
    Ok((time, hex(buf.get(..result_len).unwrap_or_default())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sides_in_rust_have_equal_results() {
        for (len, new_len) in CHANGES {
            let (_, etherparse) = with_etherparse(len, new_len, 1).unwrap();
            let (_, nfqnl) = with_nfqnl(len, new_len, 1).unwrap();
            assert_eq!(nfqnl, etherparse);
            assert_eq!(nfqnl.len(), (len - OLD_LEN + new_len) * 2);
        }
    }
}
