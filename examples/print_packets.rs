//! Prints and accepts the packets of queue 1, with a receive loop of its own: the README program of
//! python-libnetfilter-queue, method for method
//!
//! ```text
//! iptables -A OUTPUT -p udp -j NFQUEUE --queue-num 1      # or: nft … queue num 1
//! cargo run --example print_packets
//! ```
//!
//! `--count N` ends after N packets.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;

use nfqnl::{CopyMode, Family, QueueData, Situation, Verdict};

mod support;

fn callback(data: &mut QueueData<'_>) {
    let mac = data
        .get_packet_hw()
        .map_or_else(|| "no MAC".to_owned(), |mac| mac.to_string());
    println!(
        "packet {}: {mac}, {}",
        data.get_packet_id(),
        support::endpoints(data.get_payload())
    );
    data.set_verdict(Verdict::Accept, None);
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let count = count_argument()?;

    let mut handle = nfqnl::open()?;
    for family in [Family::INET, Family::INET6] {
        // Old kernels want this, newer ones do nothing; failing is no reason to stop.
        for result in [handle.unbind_pf(family), handle.bind_pf(family)] {
            if let Err(error) = result {
                eprintln!("{error}");
            }
        }
    }
    let queue = handle.create_queue(1, callback)?;
    queue.set_mode(CopyMode::PACKET, 0xffff)?;
    println!("queue {} is bound", queue.num());

    // The loop is ours: any way to receive on the descriptor will do. `read` on a socket is `recv` without flags.
    let mut socket = File::from(handle.as_fd().try_clone_to_owned()?);
    let mut buf = vec![0; nfqnl::RecvBatch::DEFAULT_SLOT_LEN];
    let mut seen = 0;
    while seen < count {
        match socket.read(&mut buf) {
            Ok(len) => seen += handle.handle_packet(&buf[..len])?,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if Situation::of(&error) == Situation::NoBuffers => {
                eprintln!("packets were lost: the socket's receive buffer was full (ENOBUFS)");
            }
            Err(error) => return Err(error.into()),
        }
    }

    queue.destroy()?;
    handle.close()?;
    Ok(())
}

fn count_argument() -> Result<usize, Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next()) {
        (None, _) => Ok(usize::MAX),
        (Some("--count"), Some(count)) => Ok(count.parse()?),
        _ => Err("usage: print_packets [--count N]".into()),
    }
}
