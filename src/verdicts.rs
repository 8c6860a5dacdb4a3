//! Collected verdicts, and how they become few messages

use std::ops::Deref;

use nfqnl_proto::{
    BatchVerdict, Decision, EncodeError, PacketKey, RequestHeader, Verdict, consts::align,
};

use crate::bindings::{BindingId, Bindings};
use crate::error::{Error, Operation, Result};
use crate::event::{said_again_header, verdict_header};
use crate::waiting::{Unproven, Waiting};

/// Verdicts to be sent together
///
/// [`Handle::send`](crate::Handle::send) hands them to the kernel in as few system calls and messages as it can. The
/// memory is kept, so make one per loop and reuse it.
///
/// ```no_run
/// use nfqnl::{Handle, RecvBatch, Verdict, VerdictBatch};
///
/// # fn main() -> nfqnl::Result<()> {
/// let handle = Handle::open()?;
/// let _queue = handle.bind_queue(1)?;
/// let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
/// loop {
///     for packet in handle.recv(&mut batch)?.packets() {
///         verdicts.push(packet.key(), Verdict::Accept)?;
///     }
///     handle.send(&mut verdicts)?;
/// }
/// # }
/// ```
///
/// # Order
/// The verdicts on one queue's packets are carried out in the order they were pushed. Push them in the order of the
/// packets unless you mean to reorder: the kernel drops a later segment of a new connection that is released before an
/// earlier one.
///
/// # Runs
/// Equal verdicts on packets that follow each other leave as one message (`NFQNL_MSG_VERDICT_BATCH`), which the kernel
/// carries out on every waiting packet up to an id. That is done only where it is certain that each of these packets has
/// this verdict: one that is held back, or in another thread's or another batch's hands, ends the run, and so does a
/// different verdict, mark or priority, and everything else that a [`Decision`] can carry. A run's packets that have gone
/// meanwhile are not reported as refused, unless all of them have.
///
/// Some things leave a queue without runs until it is bound again: verdicts that were sent one by one before any were sent
/// together, if they differ or have a new payload; verdicts that the kernel has refused for want of `CAP_NET_ADMIN`; packets
/// that others have received; some 262 000 gaps between those that wait; and, since numbers wrap, half a billion packets
/// behind the oldest that waits, or a billion lost messages that no gap between packets accounts for yet.
///
/// [`HandleBuilder::coalesce`](crate::HandleBuilder::coalesce) turns runs off.
#[derive(Debug, Default)]
pub struct VerdictBatch {
    entries: Vec<Entry>,
    /// How many verdicts that is
    len: usize,
    /// Encoded messages of those verdicts that are more than a [`BatchVerdict`]
    raw: Vec<u8>,
    /// Whether there are verdicts on several queues, or bindings of one
    is_mixed: bool,
    /// What is sent next
    out: Vec<u8>,
    /// What it settles: for each of these bindings, the usual verdict on all packets up to this one
    settled: Vec<(BindingId, u32)>,
}

/// The same verdict on packets that were numbered one after the other
#[derive(Clone, Copy, Debug)]
struct Entry {
    first: PacketKey,
    /// From 1 to [`Entry::MOST`]
    len: u8,
    what: What,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum What {
    Common(BatchVerdict),
    /// Where its message stands in `raw`; on one packet
    Raw {
        start: usize,
        end: usize,
        verdict: Verdict,
    },
}

impl Entry {
    /// So many that a part has room for the verdicts of one entry, each in a message of its own
    const MOST: u8 = 64;

    fn binding(&self) -> BindingId {
        self.first.into()
    }

    fn last_id(&self) -> u32 {
        behind(self.first, u32::from(self.len) - 1).id
    }

    /// The verdict, if a batch verdict can say all of it
    fn common(&self) -> Option<BatchVerdict> {
        match self.what {
            What::Common(verdict) => Some(verdict),
            What::Raw { .. } => None,
        }
    }

    /// Whether the packets are no longer there once the kernel has had this: it refuses STOLEN, and they go on waiting
    fn is_answer(&self) -> bool {
        let verdict = match self.what {
            What::Common(common) => common.verdict(),
            What::Raw { verdict, .. } => verdict,
        };
        verdict != Verdict::Stolen
    }

    /// How many bytes its messages take at most
    fn encoded_len(&self) -> usize {
        match self.what {
            What::Common(_) => usize::from(self.len) * BatchVerdict::MAX_LEN,
            What::Raw { start, end, .. } => align(end - start),
        }
    }
}

impl VerdictBatch {
    /// An empty one
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a verdict; a new payload is copied
    ///
    /// Of two verdicts on a packet the first counts; the second is refused.
    ///
    /// # Errors
    /// [`Error::Encode`] or [`Error::PayloadTooShort`] for a payload that can't be; nothing is added then.
    #[inline]
    pub fn push<'p>(&mut self, key: PacketKey, decision: impl Into<Decision<'p>>) -> Result<()> {
        let decision = decision.into();
        let what = match decision.as_batch() {
            Some(common) => What::Common(common),
            None => self.encode_raw(key, &decision)?,
        };
        self.add(key, what);
        Ok(())
    }

    #[inline]
    fn add(&mut self, key: PacketKey, what: What) {
        self.len += 1;
        if let Some(newest) = self.entries.last_mut() {
            let is_same_binding = newest.binding() == BindingId::from(key);
            let follows = key.id == newest.last_id().wrapping_add(1);
            let has_room = newest.len < Entry::MOST;
            if is_same_binding && follows && has_room && newest.what == what {
                newest.len += 1;
                return;
            }
            self.is_mixed |= !is_same_binding;
        }
        let first = key;
        self.entries.push(Entry {
            first,
            len: 1,
            what,
        });
    }

    fn encode_raw(&mut self, key: PacketKey, decision: &Decision<'_>) -> Result<What> {
        if let Some(payload) = decision.payload() {
            check_payload(key, payload)?;
        }
        let header = verdict_header(key);
        let refused = |source| Error::Encode {
            op: Operation::Verdict(key),
            source,
        };
        // Nothing is too long, or it is refused before there is memory for it.
        let len = match decision.encode(&mut [], key.queue, key.id, header) {
            Ok(len) => len,
            Err(EncodeError::NoSpace { needed, .. }) => needed,
            Err(error) => return Err(refused(error)),
        };
        let start = self.raw.len();
        let end = start + len;
        self.raw.resize(end, 0);
        let room = self.raw.get_mut(start..).unwrap_or_default();
        decision
            .encode(room, key.queue, key.id, header)
            .map_err(refused)?;
        Ok(What::Raw {
            start,
            end,
            verdict: decision.verdict(),
        })
    }

    /// How many verdicts are in it
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The only verdict in it, if that is no more than verdict, mark and priority
    #[inline]
    pub(crate) fn single(&self) -> Option<(PacketKey, BatchVerdict)> {
        match self.entries[..] {
            [
                Entry {
                    first,
                    len: 1,
                    what: What::Common(common),
                },
            ] => Some((first, common)),
            _ => None,
        }
    }

    /// Whether none is in it
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes all verdicts out, unsent; the memory is kept
    pub fn clear(&mut self) {
        self.entries.clear();
        self.len = 0;
        self.raw.clear();
        self.is_mixed = false;
    }

    /// Adds a verdict, in place of the last if there are more than `before`; if that fails, nothing is changed
    #[inline]
    pub(crate) fn set<'p>(
        &mut self,
        before: usize,
        key: PacketKey,
        decision: impl Into<Decision<'p>>,
    ) -> Result<()> {
        let decision = decision.into();
        let what = match decision.as_batch() {
            Some(common) => What::Common(common),
            None => self.encode_raw(key, &decision)?,
        };
        if self.len > before {
            self.remove_last();
        }
        self.add(key, what);
        Ok(())
    }

    fn remove_last(&mut self) {
        self.len -= 1;
        if let Some(newest) = self.entries.last_mut() {
            newest.len -= 1;
            if newest.len == 0 {
                self.entries.pop();
            }
        }
    }
}

/// The least that a replaced payload must have: its network header
fn check_payload(key: PacketKey, payload: &[u8]) -> Result<()> {
    const IPV4_HEADER_LEN: usize = 20;
    const IPV6_HEADER_LEN: usize = 40;
    let first = payload.first().copied().unwrap_or(0);
    let needed = match first >> 4 {
        4 => IPV4_HEADER_LEN.max(usize::from(first & 0xf) * 4),
        6 => IPV6_HEADER_LEN,
        _ => IPV4_HEADER_LEN,
    };
    if payload.len() < needed {
        return Err(Error::PayloadTooShort {
            key,
            needed,
            had: payload.len(),
        });
    }
    Ok(())
}

// Sending.

impl VerdictBatch {
    /// What sending comes to when there is no socket any more
    pub(crate) fn give_up(&mut self) -> Result<()> {
        let first = self.entries.first().map(|entry| entry.first);
        self.clear();
        first.map_or(Ok(()), |key| Err(Error::Stale { key }))
    }

    /// Sends everything by `send`, a part at a time, each at most `max_len` bytes unless a single message is longer
    ///
    /// `bindings` lends the bindings that stand, for the whole of a part. What was sent is no longer in the batch, and
    /// neither is what can't be: it belongs to a binding that has ended, or is too long for any system call. The first of
    /// these is returned as the error, after everything else has been sent. If `send` fails in another way, what was not
    /// sent stays.
    ///
    /// `send` gets the packet of the first message, the messages, and whether to find out if the kernel has carried them
    /// out; it says whether that is certain.
    pub(crate) fn send<B: Deref<Target = Bindings>>(
        &mut self,
        max_len: usize,
        coalesce: bool,
        mut bindings: impl FnMut() -> B,
        mut send: impl FnMut(PacketKey, &[u8], bool) -> Result<bool>,
    ) -> Result<()> {
        if self.is_mixed {
            // Stable, so the order within each queue stays.
            self.entries
                .sort_by_key(|entry| (entry.first.queue, entry.first.binding));
        }
        let mut given_up = None;
        let mut limit = max_len;
        let mut rest = &self.entries[..];
        while !rest.is_empty() {
            let bindings = bindings();
            let mut part = Part {
                raw: &self.raw,
                out: &mut self.out,
                settled: &mut self.settled,
                first: None,
                needs_proof: false,
                max_len: limit,
            };
            let len = part.fill(rest, coalesce, &bindings, &mut given_up);
            let (done, behind) = rest.split_at_checked(len).unwrap_or((rest, &[]));
            let sent = match part.first {
                Some(first) => send(first, part.out, part.needs_proof),
                None => Ok(false),
            };
            match sent {
                Ok(is_proven) if coalesce => {
                    note_sent(done, &self.settled, &bindings, is_proven);
                }
                Ok(_) => {}
                // One entry at a time, then, to see which it is
                Err(error) if error.is_too_long() && limit > 0 => {
                    limit = 0;
                    continue;
                }
                Err(error) if error.is_too_long() => {
                    given_up.get_or_insert(error);
                    limit = max_len;
                }
                Err(error) => {
                    self.len = rest.iter().map(|entry| usize::from(entry.len)).sum();
                    let done = self.entries.len() - rest.len();
                    self.entries.drain(..done);
                    return Err(error);
                }
            }
            rest = behind;
        }
        self.clear();
        given_up.map_or(Ok(()), Err)
    }
}

/// The packet that was numbered so many behind this one
fn behind(key: PacketKey, n: u32) -> PacketKey {
    PacketKey {
        id: key.id.wrapping_add(n),
        ..key
    }
}

/// The entries that stand together and belong to the same binding
fn by_binding(entries: &[Entry]) -> impl Iterator<Item = (BindingId, &[Entry])> {
    let groups = entries.chunk_by(|a, b| a.binding() == b.binding());
    groups.filter_map(|group| Some((group.first()?.binding(), group)))
}

fn note_sent(
    entries: &[Entry],
    settled: &[(BindingId, u32)],
    bindings: &Bindings,
    is_proven: bool,
) {
    for (id, group) in by_binding(entries) {
        let Some(binding) = bindings.current(id) else {
            continue;
        };
        let mut waiting = binding.waiting();
        for entry in group.iter().filter(|entry| entry.is_answer()) {
            waiting.note_sent(entry.first.id, entry.last_id(), entry.common(), is_proven);
        }
        for (_, last) in settled.iter().filter(|(of, _)| is_proven && *of == id) {
            waiting.note_settled(*last);
        }
    }
}

/// What goes out in one send: the kernel carries out all of it, in its order, or none of it
struct Part<'o> {
    raw: &'o [u8],
    out: &'o mut Vec<u8>,
    settled: &'o mut Vec<(BindingId, u32)>,
    /// The packet of the first message in it
    first: Option<PacketKey>,
    /// Whether it will matter if the kernel has carried it out
    needs_proof: bool,
    max_len: usize,
}

impl Part<'_> {
    /// Encodes as many entries as there is room for, at least one, and says how many that were
    fn fill(
        &mut self,
        entries: &[Entry],
        coalesce: bool,
        bindings: &Bindings,
        given_up: &mut Option<Error>,
    ) -> usize {
        self.out.clear();
        self.settled.clear();
        let mut all = 0;
        for (id, group) in by_binding(entries) {
            let taken = match bindings.current(id) {
                Some(binding) if coalesce => self.fill_runs(group, &mut binding.waiting()),
                Some(_) => self.fill_runs(group, &mut Waiting::blind()),
                None => {
                    if let Some(&Entry { first: key, .. }) = group.first() {
                        given_up.get_or_insert(Error::Stale { key });
                    }
                    group.len()
                }
            };
            all += taken;
            if taken < group.len() {
                break;
            }
        }
        all
    }

    /// Encodes one binding's verdicts
    ///
    /// The cursor stands behind the oldest waiting packets that have their verdict in this part: a batch verdict on the
    /// next one finds them gone, since the kernel carries out the messages of a send in their order.
    fn fill_runs(&mut self, entries: &[Entry], waiting: &mut Waiting) -> usize {
        let answers = entries.iter().filter(|entry| entry.is_answer());
        let needs_proof = waiting.needs_proof(answers.map(Entry::common));
        let mut cursor = waiting.cursor();
        let mut runs = Runs {
            part: self,
            unproven: waiting.unproven(),
            run: None,
        };
        for (taken, entry) in entries.iter().enumerate() {
            if !runs.part.has_room_for(entry) {
                runs.end();
                return taken;
            }
            runs.part.first.get_or_insert(entry.first);
            runs.part.needs_proof |= needs_proof;
            let mut key = entry.first;
            let mut left = u32::from(entry.len);
            while left > 0 {
                let next = match entry.is_answer() {
                    true => cursor.advance_over(key.id, left),
                    false => 0,
                };
                match entry.what {
                    What::Common(verdict) => runs.add(verdict, key, next),
                    What::Raw { start, end, .. } => runs.add_raw(start, end),
                }
                let done = next.max(1);
                key = behind(key, done);
                left -= done;
            }
        }
        runs.end();
        entries.len()
    }

    fn has_room_for(&self, entry: &Entry) -> bool {
        /// A run that has not ended yet, and what may have to be said again before it
        const RUN: usize = 2 * BatchVerdict::MAX_LEN;
        self.first.is_none() || self.out.len() + RUN + entry.encoded_len() <= self.max_len
    }

    /// Encodes a verdict on one packet, or on all up to it
    fn encode(&mut self, verdict: BatchVerdict, form: Form, key: PacketKey, header: RequestHeader) {
        let start = self.out.len();
        self.out.resize(start + BatchVerdict::MAX_LEN, 0);
        let room = self.out.get_mut(start..).unwrap_or_default();
        let len = match form {
            Form::Single => verdict.encode_single(room, key.queue, key.id, header),
            Form::Batch => verdict.encode(room, key.queue, key.id, header),
        };
        // It always fits: `MAX_LEN` is room for any of these.
        self.out.truncate(start + len.unwrap_or(0));
        self.pad();
    }

    /// Messages begin at multiples of 4
    fn pad(&mut self) {
        self.out.resize(align(self.out.len()), 0);
    }
}

#[derive(Clone, Copy)]
enum Form {
    Single,
    Batch,
}

/// The verdicts of one binding on their way into a part, those that can share a message together
struct Runs<'p, 'o> {
    part: &'p mut Part<'o>,
    unproven: Option<Unproven>,
    run: Option<Run>,
}

/// The same verdict on the oldest packets that wait
struct Run {
    verdict: BatchVerdict,
    first: PacketKey,
    last: PacketKey,
}

impl Runs<'_, '_> {
    /// Adds a verdict on so many packets, one after the other, if all older ones that wait have theirs before it; 0 if
    /// they have not, for one packet
    fn add(&mut self, verdict: BatchVerdict, first: PacketKey, next: u32) {
        let last = behind(first, next.saturating_sub(1));
        match &mut self.run {
            Some(run) if next > 0 && run.verdict == verdict => {
                run.last = last;
                return;
            }
            _ => self.end(),
        }
        let is_in_the_way = |unproven: Unproven| !unproven.lets_pass(verdict, first.id);
        if next > 0 && !self.unproven.is_some_and(is_in_the_way) {
            self.run = Some(Run {
                verdict,
                first,
                last,
            });
        } else {
            for key in (0..next.max(1)).map(|n| behind(first, n)) {
                self.part
                    .encode(verdict, Form::Single, key, verdict_header(key));
            }
        }
    }

    fn add_raw(&mut self, start: usize, end: usize) {
        self.end();
        let message = self.part.raw.get(start..end).unwrap_or_default();
        self.part.out.extend_from_slice(message);
        self.part.pad();
    }

    /// Encodes the run, if there is one
    fn end(&mut self) {
        let Some(Run {
            verdict,
            first,
            last,
        }) = self.run.take()
        else {
            return;
        };
        if first == last {
            return self
                .part
                .encode(verdict, Form::Single, last, verdict_header(last));
        }
        // Whatever of the usual verdicts the kernel has not carried out, it does now: this run does it, or, before another
        // one, the verdict is said again.
        let is_within =
            |unproven: &mut Unproven| unproven.verdict != verdict || unproven.is_within(last.id);
        if let Some(unproven) = self.unproven.take_if(is_within) {
            self.part.settled.push((last.into(), unproven.last));
            if unproven.verdict != verdict {
                let again = PacketKey {
                    id: unproven.last,
                    ..last
                };
                self.part.encode(
                    unproven.verdict,
                    Form::Batch,
                    again,
                    said_again_header(last),
                );
            }
        }
        self.part
            .encode(verdict, Form::Batch, last, verdict_header(last));
    }
}

#[cfg(test)]
mod tests;
