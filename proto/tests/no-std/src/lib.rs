//! A program without std, which reads messages and writes verdicts
//!
//! It has its own panic handler, so it does not build if a dependency links std ("found duplicate
//! lang item `panic_impl`") or `alloc` ("no global memory allocator found").
#![no_std]

use core::panic::PanicInfo;

use nfqnl_proto::{EncodeError, Message, Messages, RequestHeader, Verdict};

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {
        core::hint::spin_loop();
    }
}

/// Accepts each packet in a datagram, and returns the total length of the verdicts
///
/// # Errors
/// `out` has no room for a verdict.
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

/// Makes the linker keep [`answer`] and everything that it calls
#[unsafe(no_mangle)]
pub extern "C" fn answer_nothing() -> usize {
    let mut out = [0; 80];
    answer(&[], &mut out).unwrap_or_default()
}
