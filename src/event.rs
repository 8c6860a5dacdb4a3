//! What receiving yields: packets, and everything else that can come out of the socket

use std::fmt;

use nfqnl_proto::consts::{
    MESSAGE_HEADER_LEN, NFQNL_MSG_VERDICT, NFQNL_MSG_VERDICT_BATCH, NLM_F_ECHO, message_type,
};
use nfqnl_proto::{
    DecodeError, Message, Messages, Packet, PacketIndex, PacketKey, Reply, RequestHeader,
};

use crate::bindings::Bindings;
use crate::error::{Error, Operation, Refusal};

/// One thing that was received; none of them ends a receive loop
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'b> {
    /// A packet waits for a verdict
    Packet(Packet<'b>),
    /// The kernel refused a verdict; [`Refusal::packet`] names its packet, or the last of a run of equal verdicts
    ///
    /// Of a run ([`VerdictBatch`](crate::VerdictBatch)) the kernel refuses all or, if any of its packets is there, none: so
    /// packets that have gone amid a run are told of by nothing.
    ///
    /// With [`Situation::NotPermitted`](crate::Situation::NotPermitted) the thread had no `CAP_NET_ADMIN`. Then the kernel has
    /// looked at no verdict of that send, and this names the first of them: answer all of its packets again. Some may be gone
    /// by then, with the verdict that was meant for them: until this event has come, it stands, and a run of the same verdict
    /// takes them along.
    ///
    /// Refusals are lost in overruns, too.
    ///
    /// [`Situation::NoSuchPacket`](crate::Situation::NoSuchPacket) is part of normal operation: the kernel drops
    /// waiting packets when a device goes down or a base chain is deleted.
    Refused(Refusal),
    /// Messages were lost because the receive buffer was full (`ENOBUFS`)
    ///
    /// The packets are dropped, or accepted with [`ConfigFlags::FAIL_OPEN`](crate::ConfigFlags::FAIL_OPEN).
    /// [`Stats::lost_packets`](crate::Stats::lost_packets) knows how many. Unless overruns are hidden
    /// ([`HandleBuilder::report_overruns`](crate::HandleBuilder::report_overruns)), the kernel goes on dropping until
    /// the buffer is empty.
    #[doc(alias = "ENOBUFS")]
    Overrun,
    /// A message was longer than its slot; the packet still waits, and can be answered by its key
    #[non_exhaustive]
    Truncated {
        /// The packet, if the slot has its id
        key: Option<PacketKey>,
        /// The slot length that this message takes
        needed: usize,
        /// The slot length
        had: usize,
    },
    /// Bytes that are no message; the messages before it are not affected, nor those behind it unless its length is wrong
    #[non_exhaustive]
    Malformed {
        /// The packet, if they are a packet message as far as its id: it waits
        key: Option<PacketKey>,
        /// What is wrong with them
        error: DecodeError,
    },
}

/// A line for a log: what came, and what to do about it
impl fmt::Display for Event<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Packet(packet) => {
                let (id, queue, len) = (packet.id(), packet.queue(), packet.payload().len());
                write!(f, "packet {id} of queue {queue}: {len} bytes")
            }
            Self::Refused(refusal) => refusal.fmt(f),
            Self::Overrun => f.write_str(
                "receive: the receive buffer was full and messages were lost (ENOBUFS); receive more often, or raise \
                 the receive buffer",
            ),
            &Self::Truncated { key, needed, had } => Error::Truncated { key, needed, had }.fmt(f),
            &Self::Malformed { key, error: source } => Error::Decode { key, source }.fmt(f),
        }
    }
}

impl<'b> Event<'b> {
    /// The packet, if it is one
    #[must_use]
    pub fn packet(self) -> Option<Packet<'b>> {
        match self {
            Self::Packet(packet) => Some(packet),
            _ => None,
        }
    }
}

/// The next event among the messages of a datagram
///
/// Answers to configuration requests are none: the requests wait for them. Packets of queues that are not bound (any
/// more) are none, whole or not: the kernel has dropped them, and a later binding's they must not become.
#[inline]
pub(crate) fn next_event<'b>(
    messages: &mut Messages<'b>,
    bindings: &Bindings,
) -> Option<Event<'b>> {
    if let Some(packet) = sole_packet(messages.rest()) {
        *messages = Messages::new(&[]);
        return packet_event(packet, bindings);
    }
    loop {
        let (bytes, message) = next_message(messages)?;
        let event = match message {
            Ok(Message::Packet(packet)) => packet_event(packet, bindings),
            Ok(Message::Reply(reply)) => refusal(&reply).map(Event::Refused),
            Ok(Message::Overrun) => Some(Event::Overrun),
            Ok(_) => None,
            Err(error) => match PacketKey::peek(bytes) {
                Some(key) => bindings
                    .get(key.queue)
                    .map(|binding| broken_event(Some(binding.key(key.id)), error)),
                None => Some(broken_event(None, error)),
            },
        };
        if event.is_some() {
            return event;
        }
    }
}

/// The next message, and its bytes: all that are left if no length says where it ends
pub(crate) fn next_message<'b>(
    messages: &mut Messages<'b>,
) -> Option<(&'b [u8], Result<Message<'b>, DecodeError>)> {
    let rest = messages.rest();
    let message = messages.next()?;
    let len = rest.first_chunk().map(|len| u32::from_ne_bytes(*len));
    let len = len.and_then(|len| usize::try_from(len).ok());
    let bytes = len.filter(|len| *len >= MESSAGE_HEADER_LEN);
    Some((
        bytes.and_then(|len| rest.get(..len)).unwrap_or(rest),
        message,
    ))
}

fn broken_event<'b>(key: Option<PacketKey>, error: DecodeError) -> Event<'b> {
    match error {
        DecodeError::Truncated { needed, had, .. } => Event::Truncated { key, needed, had },
        error => Event::Malformed { key, error },
    }
}

/// What a packet is: nothing, if its queue is not bound (any more)
#[inline]
pub(crate) fn packet_event<'b>(packet: Packet<'b>, bindings: &Bindings) -> Option<Event<'b>> {
    let binding = bindings.get(packet.queue())?;
    Some(Event::Packet(packet.with_binding(binding.id.number)))
}

/// The packet, if these bytes are one whole packet message, as nearly all datagrams are
#[inline]
pub(crate) fn sole_packet(datagram: &[u8]) -> Option<Packet<'_>> {
    let mut index = PacketIndex::default();
    index_sole_packet(datagram, &mut index).then(|| index.over(datagram))
}

/// The same in place: says whether these bytes are one, and `index` is its index
#[inline]
pub(crate) fn index_sole_packet(datagram: &[u8], index: &mut PacketIndex) -> bool {
    let len = datagram.first_chunk().map(|len| u32::from_ne_bytes(*len));
    let is_sole = len.is_some_and(|len| usize::try_from(len) == Ok(datagram.len()));
    is_sole && index.parse(datagram).is_ok()
}

/// The netlink header of a verdict: it says which packet a refusal is about, with no table kept
///
/// The kernel looks at neither number and returns both. The sequence number is the packet's id, the sender's port
/// field is the queue and its binding.
pub(crate) fn verdict_header(key: PacketKey) -> RequestHeader {
    let [b0, b1] = key.binding.to_be_bytes();
    let [q0, q1] = key.queue.to_be_bytes();
    RequestHeader {
        ack: false,
        echo: false,
        seq: key.id,
        pid: u32::from_be_bytes([b0, b1, q0, q1]),
    }
}

/// The same for a batch verdict that was sent before, and is said again before one on this packet
///
/// Mostly none waits for it any more: that is no event. If the kernel looks at nothing of the send, it names the first.
pub(crate) fn said_again_header(key: PacketKey) -> RequestHeader {
    RequestHeader {
        echo: true,
        ..verdict_header(key)
    }
}

fn is_said_again(reply: &Reply<'_>) -> bool {
    reply.request_flags & NLM_F_ECHO != 0
}

fn refusal(reply: &Reply<'_>) -> Option<Refusal> {
    const VERDICT: u16 = message_type(NFQNL_MSG_VERDICT);
    const VERDICT_BATCH: u16 = message_type(NFQNL_MSG_VERDICT_BATCH);
    let [b0, b1, q0, q1] = reply.pid.to_be_bytes();
    let key = PacketKey {
        queue: u16::from_be_bytes([q0, q1]),
        binding: u16::from_be_bytes([b0, b1]),
        id: reply.seq,
    };
    let op = match reply.request_type {
        VERDICT => Operation::Verdict(key),
        VERDICT_BATCH if reply.errno == libc::ENOENT && is_said_again(reply) => return None,
        VERDICT_BATCH => Operation::BatchVerdict(key),
        _ => return None,
    };
    (!reply.is_ack()).then(|| Refusal::new(op, reply))
}

#[cfg(test)]
mod tests {
    use nfqnl_proto::consts::NFQNL_MSG_PACKET;

    use super::*;
    use crate::bindings::Binding;

    /// The 32 bits of the sender's port hold the queue and its binding, and the sequence number is the packet's id: none
    /// reaches into another, up to the last of each
    #[test]
    fn a_refusal_names_the_last_queue_binding_and_id_whole() {
        let ends = [0, 1, u16::MAX - 1, u16::MAX];
        let ids = [0, 1, u32::MAX / 2, u32::MAX / 2 + 1, u32::MAX];
        for (queue, binding) in ends.into_iter().flat_map(|q| ends.map(|b| (q, b))) {
            for id in ids {
                let key = PacketKey { queue, binding, id };
                let header = verdict_header(key);
                // struct nlmsgerr in a message: ENOENT, and the header of a verdict
                let message = [
                    &36_u32.to_ne_bytes()[..],
                    &2_u16.to_ne_bytes(),
                    &[0; 10],
                    &(-libc::ENOENT).to_ne_bytes(),
                    &32_u32.to_ne_bytes(),
                    &message_type(NFQNL_MSG_VERDICT).to_ne_bytes(),
                    &1_u16.to_ne_bytes(),
                    &header.seq.to_ne_bytes(),
                    &header.pid.to_ne_bytes(),
                ];
                let message = message.concat();
                let event = next_event(&mut Messages::new(&message), &Bindings::default());
                match event {
                    Some(Event::Refused(refusal)) => assert_eq!(refusal.packet(), Some(key)),
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    /// It may have come before its queue was bound once more: then its id is another packet's there
    #[test]
    fn a_broken_packet_is_an_event_of_its_binding_alone() {
        // Queue 7, packet 3, and an attribute that says it is shorter than its own header
        let message = [
            &36_u32.to_ne_bytes()[..],
            &message_type(NFQNL_MSG_PACKET).to_ne_bytes(),
            &[0; 10],
            &[2, 0, 0, 7],
            &11_u16.to_ne_bytes(),
            &1_u16.to_ne_bytes(),
            &[0, 0, 0, 3, 8, 0, 1, 0],
            &3_u16.to_ne_bytes(),
            &[0; 2],
        ];
        let message = message.concat();
        let mut bindings = Bindings::default();
        assert!(next_event(&mut Messages::new(&message), &bindings).is_none());
        assert!(next_event(&mut Messages::new(&message[..34]), &bindings).is_none());
        bindings.insert(Binding::new(7, false));
        let key = bindings.get(7).map(|binding| binding.key(3));
        let event = next_event(&mut Messages::new(&message), &bindings);
        assert!(matches!(event, Some(Event::Malformed { key: of, .. }) if of == key));
        let says = event.map(|event| event.to_string()).unwrap_or_default();
        assert!(
            says.starts_with("receive: packet 3 of queue 7, which still waits: attribute"),
            "{says}"
        );
        let event = next_event(&mut Messages::new(&message[..34]), &bindings);
        assert!(matches!(event, Some(Event::Truncated { key: of, .. }) if of == key));
        let event = next_event(&mut Messages::new(&message[..19]), &Bindings::default());
        assert!(matches!(event, Some(Event::Truncated { key: None, .. })));
    }

    #[test]
    fn a_broken_packet_has_no_key_of_what_follows_it() {
        let broken = [
            &20_u32.to_ne_bytes()[..],
            &message_type(NFQNL_MSG_PACKET).to_ne_bytes(),
            &[0; 10],
            &[2, 0, 0, 7],
        ]
        .concat();
        // To who reads on a long attribute, and then a packet header
        let following = [
            &16_u32.to_ne_bytes()[..],
            &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &11_u16.to_ne_bytes(),
            &1_u16.to_ne_bytes(),
            &[0, 0, 0, 3, 8, 0, 1, 0],
        ]
        .concat();
        let datagram = [broken, following].concat();
        let mut bindings = Bindings::default();
        bindings.insert(Binding::new(7, false));
        let event = next_event(&mut Messages::new(&datagram), &bindings);
        assert!(
            matches!(event, Some(Event::Malformed { key: None, .. })),
            "{event:?}"
        );
    }
}
