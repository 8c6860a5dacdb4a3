//! A port of the kernel's selftest program `nf_queue`
//!
//! It has the command line, the output and the exit codes of `nf_queue` in
//! `tools/testing/selftests/net/netfilter` of the Linux sources. The script `nft_queue.sh` there
//! runs it unchanged; `tests/kernels/run selftest` does that.
//!
//! | option | |
//! |---|---|
//! | `-q N` | the queue; 0 if not given |
//! | `-Q N` | moves the packets to queue N instead of accepting them |
//! | `-t SECONDS` | ends after this time without a packet; never if not given |
//! | `-d MILLISECONDS` | waits before each verdict |
//! | `-O` | answers out of order: sixteen packets at once, the last one first |
//! | `-b` | also sends bogus verdicts, for packet ids that do not exist |
//! | `-G` | asks the kernel to split large packets into segments first |
//! | `-o` | fail-open: the kernel accepts packets when the queue is full |
//! | `-c` | counts packets, and prints the count of each hook at the end |
//! | `-v` | prints a line for each packet |

use std::error::Error;
use std::thread::sleep;
use std::time::{Duration, Instant};

use lexopt::{Parser, ValueExt};
use nfqnl::{
    ConfigFlags, CopyMode, ErrorKind, Event, Packet, PacketKey, Queue, QueueConfig, RecvBatch,
    SendBatch, SkbInfo, Socket, Verdict,
};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const USAGE: &str = "Usage: nf_queue [-c] [-v] [-o] [-O] [-b] [-G] [-t seconds] [-q queue] \
                     [-Q other_queue] [-d milliseconds]";

struct Options {
    queue: u16,
    flags: ConfigFlags,
    verdict: Verdict,
    timeout: Option<Duration>,
    delay: Option<Duration>,
    out_of_order: bool,
    bogus: bool,
    count: bool,
    verbose: bool,
}

/// Reads the command line; `None` for `-h`
fn options() -> Result<Option<Options>> {
    use lexopt::Arg::Short;

    let mut options = Options {
        queue: 0,
        flags: ConfigFlags::GSO | ConfigFlags::UID_GID,
        verdict: Verdict::Accept,
        timeout: None,
        delay: None,
        out_of_order: false,
        bogus: false,
        count: false,
        verbose: false,
    };
    let mut parser = Parser::from_env();
    while let Some(option) = parser.next()? {
        match option {
            // As in the original, an excessive number becomes 0.
            Short('q') => options.queue = number(&mut parser)?.try_into().unwrap_or(0),
            Short('Q') => {
                let num = number(&mut parser)?.try_into();
                let num = num.map_err(|_| "Expected destination queue number")?;
                options.verdict = Verdict::Queue { num, bypass: false };
            }
            Short('t') => {
                let timeout = Duration::from_secs(number(&mut parser)?.into());
                options.timeout = Some(timeout).filter(|timeout| !timeout.is_zero());
            }
            Short('d') => match number(&mut parser)? {
                0 => return Err("Expected nonzero delay (in milliseconds)".into()),
                delay => options.delay = Some(Duration::from_millis(delay.into())),
            },
            Short('O') => options.out_of_order = true,
            Short('b') => options.bogus = true,
            Short('G') => options.flags -= ConfigFlags::GSO,
            Short('o') => options.flags |= ConfigFlags::FAIL_OPEN,
            Short('c') => options.count = true,
            Short('v') => options.verbose = true,
            Short('h') => return Ok(None),
            other => return Err(other.unexpected().into()),
        }
    }
    match options.verdict {
        Verdict::Queue { num, .. } if num == options.queue => {
            Err("Cannot use same destination and source queue".into())
        }
        _ => Ok(Some(options)),
    }
}

fn number(parser: &mut Parser) -> Result<u32> {
    Ok(parser.value()?.parse()?)
}

fn main() -> Result<()> {
    let Some(options) = options()? else {
        println!("{USAGE}");
        return Ok(());
    };
    let counts = answer_packets(&options)?;
    if options.count {
        for (hook, count) in counts.iter().enumerate() {
            println!("hook {hook} packets {count:08}");
        }
        println!("{} packets total", counts.iter().sum::<usize>());
    }
    Ok(())
}

/// Answers packets until none has come for some time; returns the number of packets of each hook
fn answer_packets(options: &Options) -> Result<[usize; 5]> {
    let socket = Socket::open()?;
    let config = QueueConfig::new()
        .copy_mode(CopyMode::Packet, 0xffff)
        .enable(options.flags);
    let queue = socket.bind_with(options.queue, &config)?;

    // One packet at a time if each waits for its verdict, or if refusals must not fill the buffer
    let slots = if options.delay.is_some() || options.bogus {
        1
    } else {
        RecvBatch::DEFAULT_SLOTS
    };
    let mut batch = RecvBatch::new(slots, RecvBatch::DEFAULT_SLOT_LEN);
    let mut verdicts = SendBatch::new();
    let mut held = Vec::new();
    let mut counts = [0; 5];
    let mut last_event = Instant::now();
    loop {
        let events = match options.timeout {
            Some(timeout) => {
                let Some(rest) = timeout.checked_sub(last_event.elapsed()) else {
                    return Ok(counts);
                };
                socket.recv_timeout(&mut batch, rest)?
            }
            None => socket.recv(&mut batch)?,
        };
        for event in events {
            match event {
                Event::Packet(packet) => {
                    let count = counts.get_mut(usize::from(packet.hook().0));
                    *count.ok_or_else(|| format!("Unknown hook {}", packet.hook().0))? += 1;
                    if options.verbose {
                        println!("{}", description(&packet));
                    }
                    if let Some(delay) = options.delay {
                        sleep(delay);
                    }
                    if options.bogus {
                        for key in bogus_keys(&queue, packet.id()) {
                            verdicts.push(key, options.verdict)?;
                        }
                    }
                    held.push(packet.key());
                    if !options.out_of_order || held.len() == 16 {
                        for key in held.drain(..).rev() {
                            verdicts.push(key, options.verdict)?;
                        }
                    }
                }
                Event::Overrun => {}
                Event::Refused(refusal)
                    if options.bogus && refusal.kind() == ErrorKind::NoSuchPacket => {}
                Event::Refused(refusal) => return Err(Box::new(refusal)),
                other => return Err(format!("{other}").into()),
            }
            last_event = Instant::now();
        }
        socket.send(&mut verdicts)?;
    }
}

/// The line of the original: the protocol follows the word "hook", and the hook follows "hwproto"
fn description(packet: &Packet<'_>) -> String {
    let states = [
        (SkbInfo::CSUM_NOT_READY, " csumnotready"),
        (SkbInfo::GSO, " gso"),
        (SkbInfo::CSUM_NOT_VERIFIED, " csumnotverified"),
    ];
    let info = packet.skb_info();
    let states = states
        .into_iter()
        .filter(|(state, _)| info.contains(*state));
    format!(
        "packet hook={}, hwproto {:#x}{}",
        packet.hw_protocol().0,
        packet.hook().0,
        states.map(|(_, words)| words).collect::<String>()
    )
}

/// Keys of nonexistent packets: their ids are half the id space away from this one
fn bogus_keys(queue: &Queue, id: u32) -> impl Iterator<Item = PacketKey> {
    (0..50).map(move |n| queue.key(id.wrapping_add(0x7fff_ffff + n)))
}
