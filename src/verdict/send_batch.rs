//! Collected verdicts, and how they become messages

use nfqnl_proto::{
    Decision, EncodeError, IpProtocol, Packet, PacketKey, PlainVerdict, RequestHeader, Verdict,
    consts::align,
};

use super::outstanding::Cursor;
use crate::engine::{BindingId, Bindings};
use crate::error::{Error, Operation, Result};

/// Verdicts to send together
///
/// [`Socket::send`](crate::Socket::send) sends them in the order of the pushes, with as few system
/// calls and messages as possible. Make one batch per loop and reuse it: it keeps its memory. The
/// packets of unsent verdicts keep waiting.
///
/// ```no_run
/// use nfqnl::{Event, RecvBatch, SendBatch, Socket, Verdict};
///
/// # fn main() -> nfqnl::Result<()> {
/// let socket = Socket::open()?;
/// let _queue = socket.bind(1)?;
/// let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
/// loop {
///     for event in socket.recv(&mut batch)? {
///         match event {
///             Event::Packet(packet) => verdicts.push(packet.key(), Verdict::Accept)?,
///             other => eprintln!("{other}"),
///         }
///     }
///     socket.send(&mut verdicts)?;
/// }
/// # }
/// ```
///
/// # Order
/// The kernel executes the verdicts in the order of the pushes, also across queues. Push them in
/// the order of the packets: for a new connection, the kernel drops a segment that is released
/// before an earlier one.
///
/// # Merged verdicts
/// Equal verdicts on consecutive packets leave as one message (`NFQNL_MSG_VERDICT_BATCH`). The
/// message answers every waiting packet of the queue up to an id, so it is sent only if all of
/// these packets have this verdict. A packet without a verdict ends the message; for example,
/// another thread holds the packet. A different verdict, mark or priority ends it too, and so does
/// anything else in a [`Decision`]. If some packets of a merged verdict are gone, the kernel does
/// not report this, unless all of them are gone.
///
/// Merging ends for a queue, until it is bound again, when another process reads from the same
/// socket, when more than 65,536 packets wait (the kernel then skips ids), and when a packet waits
/// while half a billion others pass. Merging ends for the socket when the kernel refuses a verdict
/// with `EPERM`, and with the first call of
/// [`Handle::handle_packet`](crate::Handle::handle_packet). Only speed is lost.
/// [`Stats::merging_ended`](crate::Stats::merging_ended) counts these queues.
/// [`SocketBuilder::merge_verdicts`](crate::SocketBuilder::merge_verdicts) turns merging off.
#[derive(Default)]
#[must_use = "verdicts that are not sent leave their packets waiting"]
pub struct SendBatch {
    entries: Vec<Entry>,
    /// The number of verdicts in the entries
    len: usize,
    /// Encoded messages of verdicts beyond a [`PlainVerdict`]
    raw: Vec<u8>,
    /// The messages of the next send
    out: Vec<u8>,
}

/// One verdict, or equal plain verdicts on consecutive packets
#[derive(Clone, Copy)]
struct Entry {
    /// The first packet
    key: PacketKey,
    /// The number of packets
    len: u32,
    form: Form,
}

#[derive(Clone, Copy, PartialEq)]
enum Form {
    Plain(PlainVerdict),
    /// Encoded in `raw`
    Raw {
        start: usize,
        end: usize,
        verdict: Verdict,
    },
}

impl Entry {
    /// Each packet may need a message of its own, and a part has room for this many
    const MAX: u32 = Part::MAX_MESSAGES;

    /// Adds a packet if it is the next one and has the same verdict; returns true if it does
    #[inline]
    fn extend(&mut self, key: PacketKey, form: Form) -> bool {
        let extends = self.form == form
            && key == self.packet(self.len)
            && self.len < Self::MAX
            && matches!(form, Form::Plain(_));
        self.len += u32::from(extends);
        extends
    }

    /// Returns the key of its packet at this index
    const fn packet(&self, index: u32) -> PacketKey {
        self.key.with_id(self.key.id().wrapping_add(index))
    }

    /// Returns true unless the verdict is STOLEN: the kernel refuses it, and the packet keeps
    /// waiting
    fn is_answer(&self) -> bool {
        let verdict = match self.form {
            Form::Plain(plain) => plain.verdict(),
            Form::Raw { verdict, .. } => verdict,
        };
        verdict != Verdict::Stolen
    }

    /// Returns the length of its encoded message, if it has one
    fn raw_len(&self) -> usize {
        match self.form {
            Form::Plain(_) => 0,
            Form::Raw { start, end, .. } => align(end - start),
        }
    }
}

impl SendBatch {
    /// Returns an empty batch
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a verdict; a new payload is copied
    ///
    /// A [`PlainVerdict`] (at most mark and priority) never fails. The first verdict on a packet
    /// counts; the kernel refuses a second one.
    ///
    /// # Errors
    /// [`Error::Encode`] or [`Error::PayloadTooShort`] for an invalid payload. The batch is
    /// unchanged then, and the packet still waits.
    #[inline]
    pub fn push<'p>(&mut self, key: PacketKey, decision: impl Into<Decision<'p>>) -> Result<()> {
        let decision = decision.into();
        let form = match decision.as_plain() {
            Some(plain) => Form::Plain(plain),
            None => self.encode_raw(key, &decision)?,
        };
        self.add(key, form);
        Ok(())
    }

    /// [`push`](Self::push) for a verdict that cannot fail
    pub(crate) fn push_plain(&mut self, key: PacketKey, verdict: PlainVerdict) {
        self.add(key, Form::Plain(verdict));
    }

    #[inline]
    fn add(&mut self, key: PacketKey, form: Form) {
        self.len += 1;
        if self
            .entries
            .last_mut()
            .is_some_and(|last| last.extend(key, form))
        {
            return;
        }
        self.entries.push(Entry { key, len: 1, form });
    }

    fn encode_raw(&mut self, key: PacketKey, decision: &Decision<'_>) -> Result<Form> {
        if let Some(payload) = decision.payload() {
            check_payload(key, payload)?;
        }
        let header = send_header(key);
        let refused = |source| Error::Encode {
            op: Operation::Verdict(key),
            source,
        };
        let len = match decision.encode(&mut [], key.queue(), key.id(), header) {
            Ok(len) => len,
            Err(EncodeError::NoSpace { needed, .. }) => needed,
            Err(error) => return Err(refused(error)),
        };
        let start = self.raw.len();
        let end = start + len;
        self.raw.resize(end, 0);
        let room = self.raw.get_mut(start..).unwrap_or_default();
        decision
            .encode(room, key.queue(), key.id(), header)
            .map_err(refused)?;
        Ok(Form::Raw {
            start,
            end,
            verdict: decision.verdict(),
        })
    }

    /// Adds a verdict on this packet, and checks a new payload against it
    ///
    /// [`push`](Self::push) knows only the key. So use this for verdicts with a payload.
    ///
    /// # Errors
    /// As [`push`](Self::push). [`Error::TruncatedPacket`] for a new payload of a truncated packet.
    /// [`Error::ConntrackAndLength`] for a payload of another length beside a change of the
    /// conntrack entry, except in UDP, and except a raw change. [`Error::PayloadTooShort`] also for
    /// a payload shorter than the old packet's network header. Nothing is added then.
    pub fn answer<'p>(
        &mut self,
        packet: &Packet<'_>,
        decision: impl Into<Decision<'p>>,
    ) -> Result<()> {
        let decision = decision.into();
        check_decision(packet, &decision)?;
        self.push(packet.key(), decision)
    }

    /// Returns the number of verdicts
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns true if the batch has no verdicts
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Removes all verdicts without sending them; the memory is kept
    pub fn clear(&mut self) {
        self.entries.clear();
        self.len = 0;
        self.raw.clear();
    }

    /// Returns the verdict of a batch with one plain verdict only
    #[inline]
    pub(crate) fn single_plain(&self) -> Option<(PacketKey, PlainVerdict)> {
        match self.entries[..] {
            [
                Entry {
                    key,
                    len: 1,
                    form: Form::Plain(verdict),
                },
            ] => Some((key, verdict)),
            _ => None,
        }
    }

    /// Adds or replaces the verdict at index `before`; changes nothing on failure
    #[inline]
    pub(crate) fn set(
        &mut self,
        before: usize,
        key: PacketKey,
        decision: Decision<'_>,
    ) -> Result<()> {
        let form = match decision.as_plain() {
            Some(plain) => Form::Plain(plain),
            None => self.encode_raw(key, &decision)?,
        };
        if self.len > before {
            self.remove_last();
        }
        self.add(key, form);
        Ok(())
    }

    fn remove_last(&mut self) {
        self.len -= 1;
        if let Some(last) = self.entries.last_mut() {
            last.len -= 1;
            if last.len == 0 {
                self.entries.pop();
            }
        }
    }
}

impl SendBatch {
    /// Returns true if entries are left behind the first `done`
    pub(crate) fn has_more(&self, done: usize) -> bool {
        done < self.entries.len()
    }

    /// Encodes as many entries behind the first `done` as one send takes, at least one
    pub(crate) fn encode_part(
        &mut self,
        done: usize,
        bindings: &Bindings,
        overruns: u32,
        max_len: usize,
        max_entries: usize,
    ) -> Part {
        let mut part = Part::default();
        let out = &mut self.out;
        out.clear();
        let entries = self.entries.get(done..).unwrap_or_default();
        for group in entries.chunk_by(is_same_binding) {
            let binding = group.first().and_then(|e| bindings.current(e.key.into()));
            let Some(binding) = binding else {
                let keys = |entry: &Entry| (0..entry.len).map(|n| entry.packet(n)).collect();
                part.unbound
                    .extend(group.iter().flat_map::<Vec<_>, _>(keys));
                part.entries += group.len();
                continue;
            };
            let outstanding = binding.outstanding();
            // The oldest outstanding packet without a verdict in this part. The kernel executes
            // the messages of a send in order, so a batch verdict up to this packet finds the
            // older ones answered.
            let mut cursor: Option<Cursor> = outstanding.oldest(overruns);
            let mut merged: Option<Merged> = None;
            for entry in group {
                let joins = match entry.is_answer() {
                    true => outstanding.advance(&mut cursor, entry.key.id(), entry.len),
                    false => 0,
                };
                let extends = joins > 0
                    && matches!((&merged, entry.form),
                        (Some(merged), Form::Plain(verdict)) if merged.verdict == verdict);
                // A message for the merged verdict so far, unless the entry extends it; one for
                // the packets that join, and one for each other packet
                let messages = u32::from(merged.is_some() && !extends)
                    + u32::from(joins > 0)
                    + (entry.len - joins);
                let len = out.len() + messages as usize * PlainVerdict::MAX_LEN + entry.raw_len();
                let has_room = part.messages + messages <= Part::MAX_MESSAGES && len <= max_len;
                let is_empty = part.messages == 0 && merged.is_none();
                if part.sent_entries == max_entries || !(has_room || is_empty) {
                    part.end_merged(merged, out);
                    return part;
                }
                part.entries += 1;
                part.sent_entries += 1;
                part.first.get_or_insert(entry.key);
                if !extends {
                    part.end_merged(merged.take(), out);
                }
                let verdict = match entry.form {
                    Form::Plain(verdict) => verdict,
                    Form::Raw { start, end, .. } => {
                        out.extend_from_slice(self.raw.get(start..end).unwrap_or_default());
                        out.resize(align(out.len()), 0);
                        part.messages += 1;
                        continue;
                    }
                };
                if joins > 0 {
                    let last = entry.packet(joins - 1);
                    let first = merged.map_or(entry.key, |merged| merged.first);
                    merged = Some(Merged {
                        verdict,
                        first,
                        last,
                    });
                }
                for index in joins..entry.len {
                    part.end_merged(merged.take(), out);
                    part.push(out, verdict, entry.packet(index), false);
                }
            }
            part.end_merged(merged, out);
        }
        part
    }

    /// Returns the messages of the last [`Part`]
    pub(crate) fn encoded(&self) -> &[u8] {
        &self.out
    }

    /// Records the verdicts of a part as sent
    pub(crate) fn record_sent(&self, done: usize, count: usize, bindings: &Bindings) {
        let sent = self.entries.get(done..done + count).unwrap_or_default();
        for group in sent.chunk_by(is_same_binding) {
            let Some(binding) = group.first().and_then(|e| bindings.current(e.key.into())) else {
                continue;
            };
            let mut outstanding = binding.outstanding();
            for entry in group.iter().filter(|entry| entry.is_answer()) {
                outstanding.answer(entry.key.id(), entry.packet(entry.len - 1).id());
            }
        }
    }

    /// Removes all verdicts except those of these bindings
    pub(crate) fn keep(&mut self, bindings: &[BindingId]) {
        if bindings.is_empty() {
            return self.clear();
        }
        let is_kept = |entry: &Entry| bindings.contains(&entry.key.into());
        self.entries.retain(is_kept);
        self.len = self.entries.iter().map(|entry| entry.len as usize).sum();
    }

    /// Removes the first `done` entries, which were sent
    pub(crate) fn remove_first(&mut self, done: usize) {
        let sent = self.entries.drain(..done);
        self.len -= sent.map(|entry| entry.len as usize).sum::<usize>();
    }
}

fn is_same_binding(a: &Entry, b: &Entry) -> bool {
    BindingId::from(a.key) == b.key.into()
}

/// The messages of one send: the kernel executes all of them, in their order, or none
#[derive(Default)]
pub(crate) struct Part {
    /// Entries processed, including those without a binding
    pub(crate) entries: usize,
    /// Entries encoded in the messages
    pub(crate) sent_entries: usize,
    pub(crate) messages: u32,
    /// The packet of the first message
    pub(crate) first: Option<PacketKey>,
    /// Keys without a binding
    pub(crate) unbound: Vec<PacketKey>,
}

/// Equal verdicts on the oldest outstanding packets, to be sent as one message
#[derive(Clone, Copy)]
struct Merged {
    verdict: PlainVerdict,
    first: PacketKey,
    last: PacketKey,
}

impl Part {
    /// More messages in one send gain nothing measurable, and each can cause a refusal
    const MAX_MESSAGES: u32 = 64;

    /// Encodes the merged verdict, if there is one
    fn end_merged(&mut self, merged: Option<Merged>, out: &mut Vec<u8>) {
        if let Some(Merged {
            verdict,
            first,
            last,
        }) = merged
        {
            self.push(out, verdict, last, first != last);
        }
    }

    /// Encodes a verdict on one packet, or on all up to it
    fn push(&mut self, out: &mut Vec<u8>, verdict: PlainVerdict, key: PacketKey, is_batch: bool) {
        let start = out.len();
        out.resize(start + PlainVerdict::MAX_LEN, 0);
        let room = out.get_mut(start..).unwrap_or_default();
        let len = encode_plain(room, verdict, key, is_batch);
        // A plain verdict fits `MAX_LEN`. Its length is a multiple of 4.
        out.truncate(start + len.unwrap_or(0));
        self.messages += 1;
    }
}

/// Encodes a verdict on one packet, or on all up to it
pub(crate) fn encode_plain(
    room: &mut [u8],
    verdict: PlainVerdict,
    key: PacketKey,
    is_batch: bool,
) -> Result<usize, EncodeError> {
    let (queue, id, header) = (key.queue(), key.id(), send_header(key));
    match is_batch {
        false => verdict.encode(room, queue, id, header),
        true => verdict.encode_batch(room, queue, id, header),
    }
}

/// Returns the netlink header of a verdict: it names the packet, so a refusal needs no table
///
/// The sequence number is the packet's id. The port field is the queue and its binding. The kernel
/// returns both numbers unchanged.
pub(crate) fn send_header(key: PacketKey) -> RequestHeader {
    let [b0, b1] = key.binding().to_be_bytes();
    let [q0, q1] = key.queue().to_be_bytes();
    RequestHeader {
        ack: false,
        seq: key.id(),
        pid: u32::from_be_bytes([b0, b1, q0, q1]),
    }
}

/// Checks a decision against its packet
pub(crate) fn check_decision(packet: &Packet<'_>, decision: &Decision<'_>) -> Result<()> {
    let Some(payload) = decision.payload() else {
        return Ok(());
    };
    let (key, old) = (packet.key(), packet.payload());
    if let (true, Some(needed)) = (packet.is_truncated(), packet.len()) {
        let had = old.len();
        return Err(Error::TruncatedPacket { key, needed, had });
    }
    let needed = network_header_len(old);
    let had = payload.len();
    if had < needed {
        return Err(Error::PayloadTooShort { key, needed, had });
    }
    let changes_entry = decision.ct_mark().is_some() || decision.conntrack().is_some();
    // The kernel adjusts nothing in UDP. The entry of an ICMP error can be one of TCP.
    let is_udp = || packet.flow().map(|flow| flow.protocol()) == Some(IpProtocol::UDP);
    if changes_entry && had != old.len() && !is_udp() {
        return Err(Error::ConntrackAndLength { key });
    }
    Ok(())
}

/// Refuses a payload shorter than its own network header
fn check_payload(key: PacketKey, payload: &[u8]) -> Result<()> {
    let needed = network_header_len(payload);
    if payload.len() < needed {
        return Err(Error::PayloadTooShort {
            key,
            needed,
            had: payload.len(),
        });
    }
    Ok(())
}

/// Returns the length of the network header: with options in IPv4, with the extension headers
/// before the transport header in IPv6
fn network_header_len(packet: &[u8]) -> usize {
    const IPV4_HEADER_LEN: usize = 20;
    const IPV6_HEADER_LEN: usize = 40;
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const DESTINATION_OPTIONS: u8 = 60;
    let byte = |index: usize| packet.get(index).copied().unwrap_or(0);
    if byte(0) >> 4 != 6 {
        let words = usize::from(byte(0) & 0xf);
        return IPV4_HEADER_LEN.max(if byte(0) >> 4 == 4 { words * 4 } else { 0 });
    }
    let (mut len, mut next) = (IPV6_HEADER_LEN, byte(6));
    while matches!(next, HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS) && len < packet.len() {
        next = byte(len);
        len += (usize::from(byte(len + 1)) + 1) * 8;
    }
    len
}

impl std::fmt::Debug for SendBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SendBatch")
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}
