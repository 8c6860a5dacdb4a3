//! The kernel's own test program for packet queues, in this crate's terms: its test script runs over it unchanged
//!
//! It has the command line, the output and the exit codes of `nf_queue` in `tools/testing/selftests/net/netfilter` of
//! Linux's sources, which `nft_queue.sh` there needs; `tests/kernels/run selftest` puts the two together.
//!
//! | option | |
//! |---|---|
//! | `-q N` | the queue; 0 if not given |
//! | `-Q N` | hands the packets to that queue, instead of accepting them |
//! | `-t SECONDS` | ends when nothing has come for so long; never, if not given |
//! | `-d MILLISECONDS` | waits that long before each verdict |
//! | `-O` | answers out of order: sixteen packets at once, the last one first |
//! | `-b` | sends bogus verdicts too, on packets that are none |
//! | `-G` | has the kernel cut large packets into segments first |
//! | `-o` | fail-open: what finds the queue full is accepted |
//! | `-c` | counts packets, and prints at the end how many came from each hook |
//! | `-v` | prints a line for each packet |

use std::error::Error;
use std::thread::sleep;
use std::time::{Duration, Instant};

use lexopt::{Parser, ValueExt};
use nfqnl::{
    ConfigFlags, CopyMode, Event, Handle, Packet, PacketKey, QueueConfig, RecvBatch, Situation,
    SkbInfo, Verdict, VerdictBatch,
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

/// What the command line says; `None` if it asks how to be used
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
            // What is too large is 0 there.
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

/// Answers packets until none has come for some time, and says how many came from each hook
fn answer_packets(options: &Options) -> Result<[usize; 5]> {
    let handle = Handle::open()?;
    let config = QueueConfig::new()
        .copy_mode(CopyMode::PACKET, 0xffff)
        .flags(options.flags, options.flags);
    let _queue = handle.bind_queue_with(options.queue, &config)?;

    // One at a time, if each is answered late, or has many refusals come before the next one
    let slots = if options.delay.is_some() || options.bogus {
        1
    } else {
        RecvBatch::DEFAULT_SLOTS
    };
    let mut batch = RecvBatch::new(slots, RecvBatch::DEFAULT_SLOT_LEN);
    let mut verdicts = VerdictBatch::new();
    let mut held = Vec::new();
    let mut counts = [0; 5];
    loop {
        let deadline = options.timeout.map(|timeout| Instant::now() + timeout);
        let events = match deadline {
            Some(deadline) => handle.recv_deadline(&mut batch, deadline)?,
            None => handle.recv(&mut batch)?,
        };
        let mut is_idle = true;
        for event in events {
            is_idle = false;
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
                        for key in bogus_keys(packet.key()) {
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
                    if options.bogus && refusal.situation() == Situation::NoSuchPacket => {}
                Event::Refused(refusal) => return Err(Box::new(refusal)),
                other => return Err(format!("{other}").into()),
            }
        }
        handle.send(&mut verdicts)?;
        if is_idle && deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Ok(counts);
        }
    }
}

/// The line that is expected of this program: where it says "hook" is the protocol, and the hook behind the other word
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
        packet.hw_protocol(),
        packet.hook().0,
        states.map(|(_, words)| words).collect::<String>()
    )
}

/// Packets that the kernel will number in a long time, and has numbered a long time ago
fn bogus_keys(key: PacketKey) -> impl Iterator<Item = PacketKey> {
    (0..50).map(move |n| PacketKey {
        id: key.id.wrapping_add(0x7fff_ffff + n),
        ..key
    })
}
