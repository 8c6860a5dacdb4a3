//! Events: packets, and everything else that a receive call yields

use std::fmt;

use nfqnl_proto::consts::{NFQNL_MSG_VERDICT, NFQNL_MSG_VERDICT_BATCH, message_type};
use nfqnl_proto::{DecodeError, Message, Messages, Packet, PacketKey, Reply};

use crate::engine::Kind;
use crate::error::{Error, Operation, Refusal};

/// A packet, or another thing that was received; no event ends a receive loop
#[derive(Debug)]
#[non_exhaustive]
#[must_use = "a packet that is not answered waits until its queue ends"]
pub enum Event<'b> {
    /// A packet waits for a verdict
    Packet(Packet<'b>),
    /// The kernel refused a verdict; [`Refusal::packet`] names its packet, or the last one of a
    /// merged verdict ([`SendBatch`](crate::SendBatch))
    ///
    /// [`ErrorKind::NoSuchPacket`](crate::ErrorKind::NoSuchPacket) is part of normal operation:
    /// the kernel drops waiting packets when a device goes down or a base chain is deleted. A
    /// merged verdict is refused only if none of its packets was waiting.
    ///
    /// With [`ErrorKind::NoCapability`](crate::ErrorKind::NoCapability) the kernel executed none
    /// of the verdicts in the same send, and reports only the first. Answer all packets of the
    /// send again.
    ///
    /// An overrun can lose refusals, too.
    Refused(Refusal),
    /// The receive buffer was full, and messages were lost (`ENOBUFS`)
    ///
    /// The kernel dropped the packets, or accepted them with
    /// [`ConfigFlags::FAIL_OPEN`](crate::ConfigFlags::FAIL_OPEN). The next packet shows the gap of
    /// ids, and [`Stats::missing_packets`](crate::Stats::missing_packets) counts it. Unless
    /// overruns are hidden
    /// ([`SocketBuilder::report_overruns`](crate::SocketBuilder::report_overruns)), the kernel
    /// then drops every packet until the buffer has been read empty.
    #[doc(alias = "ENOBUFS")]
    Overrun,
    /// A message was longer than its slot; the packet still waits, and its key can answer it
    #[non_exhaustive]
    BufferTooSmall {
        /// The packet, if the slot has its id
        key: Option<PacketKey>,
        /// The slot length that this message needs
        needed: usize,
        /// The slot length
        had: usize,
    },
    /// Bytes that are not a message of the queue subsystem; no known kernel sends any
    #[non_exhaustive]
    Malformed {
        /// The waiting packet, if the bytes are a packet message up to its id
        key: Option<PacketKey>,
        /// The fault
        error: DecodeError,
    },
}

/// One line for a log
impl fmt::Display for Event<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Packet(packet) => {
                let (id, queue) = (packet.id(), packet.queue());
                let len = packet.len().unwrap_or(0);
                write!(f, "packet {id} of queue {queue}: {len} bytes")
            }
            Self::Refused(refusal) => refusal.fmt(f),
            Self::Overrun => {
                f.write_str("receive: the receive buffer was full, messages were lost")
            }
            &Self::BufferTooSmall { key, needed, had } => {
                Error::BufferTooSmall { key, needed, had }.fmt(f)
            }
            &Self::Malformed { key, error } => {
                write!(f, "{}: {error}", Error::Decode { key, source: error })
            }
        }
    }
}

impl<'b> Event<'b> {
    /// Returns the packet, if the event is one
    #[must_use]
    #[inline]
    pub fn packet(self) -> Option<Packet<'b>> {
        match self {
            Self::Packet(packet) => Some(packet),
            _ => None,
        }
    }
}

/// Returns the event in a datagram of this kind
#[inline]
pub(crate) fn decode(datagram: &[u8], kind: Kind) -> Option<Event<'_>> {
    match kind {
        Kind::Nothing => None,
        Kind::Packet(binding) => {
            if let Some(message) = datagram.get(..message_len(datagram)) {
                // In place, for the reason given in `Packet::parse`
                let packet = Packet::unindexed(message).with_binding(binding);
                let mut event = Some(Event::Packet(packet));
                if let Some(Event::Packet(packet)) = &mut event {
                    if packet.index() {
                        return event;
                    }
                }
            }
            Some(decode_carefully(datagram, binding))
        }
        Kind::Other => decode_other(datagram),
    }
}

/// Returns the length in the header of the first message
#[inline]
fn message_len(datagram: &[u8]) -> usize {
    let len = datagram.first_chunk().map(|len| u32::from_ne_bytes(*len));
    len.and_then(|len| usize::try_from(len).ok()).unwrap_or(0)
}

/// Does the same as [`decode`] for any datagram of a packet, and finds the error
#[cold]
fn decode_carefully(datagram: &[u8], binding: u16) -> Event<'_> {
    let needed = message_len(datagram);
    let key = || PacketKey::peek(datagram).map(|key| key.with_binding(binding));
    let Some(message) = datagram.get(..needed) else {
        return Event::BufferTooSmall {
            key: key(),
            needed,
            had: datagram.len(),
        };
    };
    match Packet::parse_carefully(message) {
        Ok(packet) => Event::Packet(packet.with_binding(binding)),
        Err(error) => Event::Malformed { key: key(), error },
    }
}

fn decode_other(datagram: &[u8]) -> Option<Event<'_>> {
    match Messages::new(datagram).next()? {
        Ok(Message::Reply(reply)) => refusal(&reply).map(Event::Refused),
        Ok(Message::Overrun) => Some(Event::Overrun),
        Ok(_) => None,
        Err(DecodeError::Truncated { needed, had, .. }) => Some(Event::BufferTooSmall {
            key: None,
            needed,
            had,
        }),
        Err(error) => Some(Event::Malformed { key: None, error }),
    }
}

/// Returns the refusal of a verdict, if the reply is one; see
/// [`send_header`](crate::verdict::send_header)
pub(crate) fn refusal(reply: &Reply<'_>) -> Option<Refusal> {
    const VERDICT: u16 = message_type(NFQNL_MSG_VERDICT);
    const VERDICT_BATCH: u16 = message_type(NFQNL_MSG_VERDICT_BATCH);
    let [b0, b1, q0, q1] = reply.pid.to_be_bytes();
    let key = PacketKey::new(u16::from_be_bytes([q0, q1]), reply.seq)
        .with_binding(u16::from_be_bytes([b0, b1]));
    let op = match reply.request_type {
        VERDICT => Operation::Verdict(key),
        VERDICT_BATCH => Operation::BatchVerdict(key),
        _ => return None,
    };
    (!reply.is_ack()).then(|| Refusal::new(op, reply))
}

#[cfg(test)]
mod tests {
    use nfqnl_proto::consts::{NFQA_PACKET_HDR, NFQA_PAYLOAD, NFQNL_MSG_PACKET, NLMSG_ERROR};

    use super::*;
    use crate::verdict::send_header;

    fn message(kind: u16, body: &[&[u8]]) -> Vec<u8> {
        let body = body.concat();
        let len = u32::try_from(16 + body.len()).unwrap();
        let header = [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 10]];
        [header.concat(), body].concat()
    }

    /// A packet of queue 7, with this id and one more attribute
    fn packet(id: u8, attr_len: u16, attr: u16, value: &[u8]) -> Vec<u8> {
        let body = [
            &[2, 0, 0, 7][..],
            &11_u16.to_ne_bytes(),
            &NFQA_PACKET_HDR.to_ne_bytes(),
            &[0, 0, 0, id, 8, 0, 1, 0],
            &attr_len.to_ne_bytes(),
            &attr.to_ne_bytes(),
            value,
        ];
        message(message_type(NFQNL_MSG_PACKET), &body)
    }

    /// A refusal with `ENOENT`, as the kernel returns the header of a verdict
    fn refusal_of(kind: u8, key: PacketKey) -> Vec<u8> {
        let header = send_header(key);
        let body = [
            &(-libc::ENOENT).to_ne_bytes()[..],
            &32_u32.to_ne_bytes(),
            &message_type(kind).to_ne_bytes(),
            &1_u16.to_ne_bytes(),
            &header.seq.to_ne_bytes(),
            &header.pid.to_ne_bytes(),
        ];
        message(NLMSG_ERROR, &body)
    }

    fn line(datagram: &[u8], kind: Kind) -> String {
        decode(datagram, kind).unwrap().to_string()
    }

    #[test]
    fn a_refusal_names_queue_binding_and_id_whole() {
        let ends = [0, 1, u16::MAX - 1, u16::MAX];
        let ids = [0, 1, u32::MAX / 2, u32::MAX / 2 + 1, u32::MAX];
        for (queue, binding) in ends.into_iter().flat_map(|q| ends.map(|b| (q, b))) {
            for key in ids.map(|id| PacketKey::new(queue, id).with_binding(binding)) {
                for kind in [NFQNL_MSG_VERDICT, NFQNL_MSG_VERDICT_BATCH] {
                    let datagram = refusal_of(kind, key);
                    match decode(&datagram, Kind::Other) {
                        Some(Event::Refused(refusal)) => {
                            assert_eq!(refusal.packet(), Some(key));
                            let is_of_orphans = binding == 0 && kind == NFQNL_MSG_VERDICT_BATCH;
                            assert_eq!(refusal.is_of_orphans(), is_of_orphans);
                        }
                        other => panic!("{other:?}"),
                    }
                }
            }
        }
        assert!(
            decode(
                &refusal_of(NFQNL_MSG_PACKET, PacketKey::new(7, 3)),
                Kind::Other
            )
            .is_none()
        );
    }

    #[test]
    fn a_broken_packet_has_the_key_of_its_binding() {
        // The attribute's length is shorter than its header.
        let broken = packet(3, 3, 0, &[]);
        let its_key = PacketKey::new(7, 3).with_binding(9);
        let event = decode(&broken, Kind::Packet(9));
        assert!(matches!(event, Some(Event::Malformed { key, .. }) if key == Some(its_key)));
        match decode(&broken[..34], Kind::Packet(9)) {
            Some(Event::BufferTooSmall {
                key,
                needed: 36,
                had: 34,
            }) => {
                assert_eq!(key, Some(its_key));
            }
            other => panic!("{other:?}"),
        }
        for cut in [&broken[..31], &broken[..19]] {
            let event = decode(cut, Kind::Other);
            assert!(matches!(
                event,
                Some(Event::BufferTooSmall {
                    key: None,
                    needed: 36,
                    ..
                })
            ));
        }
    }

    #[test]
    fn bytes_behind_the_first_message_are_ignored() {
        let (first, second) = (packet(3, 8, NFQA_PAYLOAD, b"some"), packet(4, 4, 0, &[]));
        let datagram = [&first[..], &second].concat();
        let packet = decode(&datagram, Kind::Packet(9)).and_then(Event::packet);
        let its_key = PacketKey::new(7, 3).with_binding(9);
        let found = packet.map(|packet| (packet.key(), packet.payload()));
        assert_eq!(found, Some((its_key, &b"some"[..])));

        let refusal = refusal_of(NFQNL_MSG_VERDICT, its_key);
        let datagram = [&refusal[..], &first].concat();
        let event = decode(&datagram, Kind::Other);
        assert!(matches!(event, Some(Event::Refused(_))), "{event:?}");

        // A packet without an id gets none from the bytes behind it.
        let bare = message(message_type(NFQNL_MSG_PACKET), &[&[2, 0, 0, 7]]);
        let datagram = [&bare[..], &first].concat();
        let event = decode(&datagram, Kind::Other);
        assert!(
            matches!(event, Some(Event::Malformed { key: None, .. })),
            "{event:?}"
        );
        assert_eq!(PacketKey::peek(&datagram), None);
    }

    #[test]
    fn each_event_is_one_line() {
        let (whole, broken) = (packet(3, 8, NFQA_PAYLOAD, b"some"), packet(3, 3, 0, &[]));
        assert_eq!(
            line(&whole, Kind::Packet(9)),
            "packet 3 of queue 7: 4 bytes"
        );
        assert_eq!(
            line(&broken, Kind::Packet(9)),
            "receive: packet 3 of queue 7: malformed message: \
                attribute 0 at byte 32 says it is 3 bytes long, 4 are left"
        );
        assert_eq!(
            line(&whole[..35], Kind::Packet(9)),
            "receive: packet 3 of queue 7: needs a buffer of 40 bytes, had 35"
        );
        assert_eq!(
            line(&whole[..19], Kind::Other),
            "receive: needs a buffer of 40 bytes, had 19"
        );
        let key = PacketKey::new(7, 42).with_binding(9);
        assert_eq!(
            line(&refusal_of(NFQNL_MSG_VERDICT_BATCH, key), Kind::Other),
            "verdict on packets up to 42 of queue 7: the packet does not wait any more"
        );
        assert_eq!(
            Event::Overrun.to_string(),
            "receive: the receive buffer was full, messages were lost"
        );
        assert!(decode(&whole, Kind::Nothing).is_none());
    }
}
