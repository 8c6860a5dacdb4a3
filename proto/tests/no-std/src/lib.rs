//! A program without std that reads messages and writes verdicts
//!
//! It brings its own panic handler, so it does not build if std comes in by any way ("found duplicate lang item
//! `panic_impl`"), nor if `alloc` does ("no global memory allocator found").
#![no_std]

use core::panic::PanicInfo;

use nfqnl_proto::{EncodeError, Message, Messages, RequestHeader, Verdict};

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {
        core::hint::spin_loop();
    }
}

/// Accepts the packets in a datagram, each with its own verdict behind the last
///
/// # Errors
/// No room left for a verdict.
pub fn answer(datagram: &[u8], mut out: &mut [u8]) -> Result<usize, EncodeError> {
    let mut written = 0;
    for message in Messages::new(datagram) {
        if let Ok(Message::Packet(packet)) = message {
            let header = RequestHeader {
                seq: packet.id(),
                ..RequestHeader::default()
            };
            let verdict = Verdict::Accept.with_mark(packet.mark());
            let len = verdict.encode(out, packet.queue(), packet.id(), header)?;
            out = &mut out[len..];
            written += len;
        }
    }
    Ok(written)
}

/// [`answer`] for the linker, which leaves nothing out that is reached from here
#[unsafe(no_mangle)]
pub extern "C" fn answer_nothing() -> usize {
    let mut out = [0; 80];
    answer(&[], &mut out).unwrap_or_default()
}
