//! Prints and accepts the packets of queue 1 with callbacks and its own receive loop
//!
//! It follows the README program of python-libnetfilter-queue, method by method.
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

use nfqnl::{CopyMode, Family, QueueData, RecvBatch, Verdict};

fn print_and_accept(data: &mut QueueData<'_>) {
    let mac = data
        .get_packet_hw()
        .map_or_else(|| "no MAC".to_owned(), |mac| mac.to_string());
    let flow = data
        .packet()
        .flow()
        .map_or_else(|| "not IP".to_owned(), |flow| flow.to_string());
    println!("packet {}: {mac}, {flow}", data.get_packet_id());
    data.set_verdict(Verdict::Accept, None);
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let count = count_argument()?;
    // The callback borrows this, and the handle owns the callback: declare it before the handle.
    let mut bytes = 0;

    let handle = nfqnl::open()?;
    for family in [Family::INET, Family::INET6] {
        // Linux before 3.8 needs these calls, newer kernels ignore them. A failure is harmless.
        for result in [handle.unbind_pf(family), handle.bind_pf(family)] {
            if let Err(error) = result {
                eprintln!("{error}");
            }
        }
    }
    let queue = handle.create_queue(1, |data| {
        bytes += data.get_payload().len();
        print_and_accept(data);
    })?;
    queue.set_mode(CopyMode::Packet, 0xffff)?;
    println!("queue {} is bound", queue.num());

    // The program may receive on the descriptor in any way: `read` on a socket is `recv`.
    let mut socket = File::from(handle.as_fd().try_clone_to_owned()?);
    let mut buf = vec![0; RecvBatch::DEFAULT_SLOT_LEN];
    let mut seen = 0;
    while seen < count {
        match socket.read(&mut buf) {
            Ok(len) => seen += handle.handle_packet(&buf[..len])?,
            // A signal (EINTR) does not end the loop.
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if nfqnl::ErrorKind::of(&error) == nfqnl::ErrorKind::NoBuffers => {
                eprintln!("packets were lost: the receive buffer was full (ENOBUFS)");
            }
            Err(error) => return Err(error.into()),
        }
    }

    queue.destroy()?;
    handle.close()?;
    println!("{seen} packets, {bytes} bytes");
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
