//! A firewall daemon: stops without losing a packet, reloads, reports, and decides in a worker
//!
//! ```text
//! iptables -A INPUT -p udp --dport 5000 -j NFQUEUE --queue-num 1 --queue-bypass
//! cargo run --example daemon -- words.txt
//! kill -HUP PID     # reads words.txt again
//! kill -TERM PID    # stops
//! ```
//!
//! The daemon drops packets that contain a word of the file, and accepts the others. One thread
//! receives. It accepts packets of at most 28 bytes at once: they have no contents. A worker
//! thread searches the others. A packet that makes the worker panic is dropped. Each second the
//! daemon prints its counters.
//!
//! To stop, the daemon lets new packets pass by, and decides the waiting ones. After its end the
//! rule's `--queue-bypass` lets packets pass.

use std::error::Error;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use nfqnl::{Event, OwnedPacket, Packet, RecvBatch, SendBatch, Socket, Verdict, VerdictGuard};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;
/// The words of the file
type Words = Arc<Vec<Vec<u8>>>;
/// A packet for the worker
type Work = (OwnedPacket, VerdictGuard, Words);

const NUMBER: u16 = 1;
const SECOND: Duration = Duration::from_secs(1);

fn main() -> Result<()> {
    let path = std::env::args().nth(1).ok_or("usage: daemon FILE")?;
    let words = read_words(&path)?;
    let socket = Socket::open()?;
    let (send, signals) = mpsc::channel();
    let waker = socket.waker();
    let mut caught = Signals::new([SIGHUP, SIGINT, SIGTERM])?;
    thread::spawn(move || {
        for signal in &mut caught {
            let _ = send.send(signal);
            waker.wake(); // ends the receive call
        }
    });
    let (work, packets) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| work_off(packets));
        serve(&socket, &path, words, work, &signals)
    })
}

fn read_words(path: &str) -> std::io::Result<Words> {
    let text = std::fs::read_to_string(path)?;
    let words = text.split_whitespace().map(|word| word.as_bytes().to_vec());
    Ok(Arc::new(words.collect()))
}

/// The worker: takes the slow decisions
fn work_off(packets: Receiver<Work>) {
    for (packet, guard, words) in packets {
        // After a panic the guard drops the packet, and the worker goes on.
        let answer = AssertUnwindSafe(|| guard.set_verdict(search(packet.packet(), &words)));
        if let Ok(Err(error)) = catch_unwind(answer) {
            eprintln!("{error}");
        }
    }
}

fn search(packet: Packet<'_>, words: &Words) -> Verdict {
    let has = |word: &Vec<u8>| {
        packet
            .payload()
            .windows(word.len())
            .any(|bytes| bytes == word)
    };
    if words.iter().any(has) {
        Verdict::Drop
    } else {
        Verdict::Accept
    }
}

/// Filters until a signal ends it, and stops the queue
fn serve(
    socket: &Socket,
    path: &str,
    mut words: Words,
    work: Sender<Work>,
    signals: &Receiver<i32>,
) -> Result<()> {
    let queue = socket.bind(NUMBER)?;
    println!("queue {NUMBER} is bound");
    let sender = socket.verdict_sender();
    let decide = |event: Event<'_>, words: &Words, verdicts: &mut SendBatch| match event {
        Event::Packet(packet) if packet.payload().len() <= 28 => {
            verdicts.push(packet.key(), Verdict::Accept)
        }
        Event::Packet(packet) => {
            let guard = sender.guard(packet.key(), Verdict::Drop);
            let _ = work.send((packet.into(), guard, Arc::clone(words)));
            Ok(())
        }
        other => {
            eprintln!("{other}"); // lost packets and refused verdicts
            Ok(())
        }
    };
    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
    let mut printed = Instant::now();
    loop {
        for event in socket.recv_timeout(&mut batch, SECOND)? {
            decide(event, &words, &mut verdicts)?;
        }
        socket.send(&mut verdicts)?;
        for signal in signals.try_iter() {
            if signal != SIGHUP {
                let decide =
                    |event: Event<'_>, verdicts: &mut SendBatch| decide(event, &words, verdicts);
                let lost = socket.drain(queue, &mut batch, 5 * SECOND, decide)?;
                println!("stopped; {lost} packets lost");
                return Ok(());
            }
            match read_words(path) {
                Ok(new) => words = new,
                Err(error) => eprintln!("{path}: {error}; the words stay"),
            }
            println!("{} words", words.len());
        }
        if printed.elapsed() >= SECOND {
            println!("{:?}", socket.stats());
            printed = Instant::now();
        }
    }
}
