//! Collected verdicts, and how they become few messages

use nfqnl_proto::{BatchVerdict, Decision, EncodeError, PacketKey, Verdict, consts::align};

use crate::bindings::{BindingId, Bindings};
use crate::error::{Error, Result};
use crate::event::verdict_header;
use crate::waiting::Waiting;

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
/// carries out on every waiting packet up to an id. That is done only where it is known that each of these packets has
/// this verdict: one that is held back, or in another thread's or another batch's hands, ends the run, and so does a
/// different verdict, mark or priority, and everything else that a [`Decision`] can carry. A run's packets that have gone
/// meanwhile are not reported as refused, unless all of them have. [`HandleBuilder::coalesce`](crate::HandleBuilder::coalesce)
/// turns runs off.
#[derive(Debug, Default)]
pub struct VerdictBatch {
    entries: Vec<Entry>,
    /// Encoded messages of those verdicts that are more than a [`BatchVerdict`]
    raw: Vec<u8>,
    /// Whether there are verdicts on several queues, or bindings of one
    is_mixed: bool,
    /// What is sent next
    out: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    key: PacketKey,
    what: What,
    /// Whether the packet is no longer there once the kernel has had this verdict: it refuses STOLEN, and the packet
    /// goes on waiting
    is_answer: bool,
}

#[derive(Clone, Copy, Debug)]
enum What {
    Common(BatchVerdict),
    /// Where its message stands in `raw`
    Raw {
        start: usize,
        end: usize,
    },
}

impl VerdictBatch {
    /// An empty one
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a verdict; a new payload is copied
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
        let binding = BindingId::from(key);
        self.is_mixed |= self
            .entries
            .last()
            .is_some_and(|last| BindingId::from(last.key) != binding);
        let is_answer = decision.verdict() != Verdict::Stolen;
        self.entries.push(Entry {
            key,
            what,
            is_answer,
        });
        Ok(())
    }

    fn encode_raw(&mut self, key: PacketKey, decision: &Decision<'_>) -> Result<What> {
        if let Some(payload) = decision.payload() {
            check_payload(payload)?;
        }
        let header = verdict_header(key);
        // Nothing is too long, or it is refused before there is memory for it.
        let len = match decision.encode(&mut [], key.queue, key.id, header) {
            Ok(len) => len,
            Err(EncodeError::NoSpace { needed, .. }) => needed,
            Err(error) => return Err(error.into()),
        };
        let start = self.raw.len();
        let end = start + len;
        self.raw.resize(end, 0);
        let room = self.raw.get_mut(start..).unwrap_or_default();
        decision.encode(room, key.queue, key.id, header)?;
        Ok(What::Raw { start, end })
    }

    /// How many verdicts are in it
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// The only verdict in it, if that is no more than verdict, mark and priority
    #[inline]
    pub(crate) fn single(&self) -> Option<(PacketKey, BatchVerdict)> {
        match self.entries[..] {
            [
                Entry {
                    key,
                    what: What::Common(common),
                    ..
                },
            ] => Some((key, common)),
            _ => None,
        }
    }

    /// Whether none is in it
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Takes all verdicts out, unsent; the memory is kept
    pub fn clear(&mut self) {
        self.entries.clear();
        self.raw.clear();
        self.is_mixed = false;
    }

    /// Adds a verdict in place of the one at `index`, if there is one; if that fails, nothing is changed
    #[inline]
    pub(crate) fn set<'p>(
        &mut self,
        index: usize,
        key: PacketKey,
        decision: impl Into<Decision<'p>>,
    ) -> Result<()> {
        self.push(key, decision)?;
        if self.entries.len() > index + 1 {
            self.entries.swap_remove(index);
        }
        Ok(())
    }
}

/// The least that a replaced payload must have: its network header
fn check_payload(payload: &[u8]) -> Result<()> {
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
        let first = self.entries.first().map(|entry| entry.key);
        self.clear();
        first.map_or(Ok(()), |key| Err(Error::Stale { key }))
    }

    /// Sends everything by `send`, a part at a time, each at most `max_len` bytes unless a single message is longer
    ///
    /// `bindings` lends the bindings that stand, for the whole of a part. What was sent is no longer in the batch, and
    /// neither is what can't be: it belongs to a binding that has ended, or is too long for any system call. The first of
    /// these is returned as the error, after everything else has been sent. If `send` fails in another way, what was not
    /// sent stays.
    pub(crate) fn send<B: std::ops::Deref<Target = Bindings>>(
        &mut self,
        max_len: usize,
        coalesce: bool,
        mut bindings: impl FnMut() -> B,
        mut send: impl FnMut(PacketKey, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let is_mixed = std::mem::take(&mut self.is_mixed);
        if is_mixed {
            // Stable, so the order within each queue stays.
            self.entries
                .sort_by_key(|entry| (entry.key.queue, entry.key.binding));
        }
        let mut given_up = None;
        let mut limit = max_len;
        let mut done = 0;
        while let Some(rest @ [_, ..]) = self.entries.get(done..) {
            let bindings = bindings();
            self.out.clear();
            let mut part = Part {
                raw: &self.raw,
                out: &mut self.out,
                first: None,
                max_len: limit,
                is_mixed,
            };
            let len = part.fill(rest, coalesce, &bindings, &mut given_up);
            let sent = match part.first {
                Some(first) => send(first, part.out),
                None => Ok(()),
            };
            match sent {
                Ok(()) if coalesce => {
                    note_answers(rest.get(..len).unwrap_or_default(), is_mixed, &bindings);
                }
                Ok(()) => {}
                // One message at a time, then, to see which it is
                Err(error) if error.is_too_long() && limit > 0 => {
                    limit = 0;
                    continue;
                }
                Err(error) if error.is_too_long() => {
                    given_up.get_or_insert(error);
                    limit = max_len;
                }
                Err(error) => {
                    self.entries.drain(..done);
                    self.is_mixed = true;
                    return Err(error);
                }
            }
            done += len;
        }
        self.clear();
        given_up.map_or(Ok(()), Err)
    }
}

/// The verdicts at the front that belong to the same binding, and the rest
fn split_binding(entries: &[Entry], is_mixed: bool) -> Option<(BindingId, &[Entry], &[Entry])> {
    let binding = BindingId::from(entries.first()?.key);
    if !is_mixed {
        return Some((binding, entries, &[]));
    }
    let len = entries
        .iter()
        .take_while(|entry| BindingId::from(entry.key) == binding)
        .count();
    let (group, rest) = entries.split_at_checked(len)?;
    Some((binding, group, rest))
}

fn note_answers(mut entries: &[Entry], is_mixed: bool, bindings: &Bindings) {
    while let Some((binding, group, rest)) = split_binding(entries, is_mixed) {
        if let Some(binding) = bindings.current(binding) {
            let mut waiting = binding.waiting();
            let mut answered = group.iter().filter(|entry| entry.is_answer);
            if let Some(Entry { key, .. }) = answered.next() {
                let (mut first, mut last) = (key.id, key.id);
                for Entry { key, .. } in answered {
                    if key.id != last.wrapping_add(1) {
                        waiting.answer(first, last);
                        first = key.id;
                    }
                    last = key.id;
                }
                waiting.answer(first, last);
            }
        }
        entries = rest;
    }
}

/// What goes out in one send
struct Part<'o> {
    raw: &'o [u8],
    out: &'o mut Vec<u8>,
    /// The packet of the first message in it
    first: Option<PacketKey>,
    max_len: usize,
    is_mixed: bool,
}

impl Part<'_> {
    /// Encodes as many verdicts as there is room for, and says how many that were
    fn fill(
        &mut self,
        mut entries: &[Entry],
        coalesce: bool,
        bindings: &Bindings,
        given_up: &mut Option<Error>,
    ) -> usize {
        let all = entries.len();
        while let Some((id, group, rest)) = split_binding(entries, self.is_mixed) {
            let taken = match bindings.current(id) {
                Some(binding) if coalesce => self.fill_runs(group, &binding.waiting()),
                Some(_) => self.fill_runs(group, &Waiting::default()),
                None => {
                    if let Some(&Entry { key, .. }) = group.first() {
                        given_up.get_or_insert(Error::Stale { key });
                    }
                    group.len()
                }
            };
            if taken < group.len() {
                return all - (entries.len() - taken);
            }
            entries = rest;
        }
        all
    }

    /// Encodes one binding's verdicts
    ///
    /// The cursor stands behind the oldest waiting packets that have their verdict in this part: a batch verdict on the
    /// next one finds them gone, since the kernel carries out the messages of a send in their order.
    fn fill_runs(&mut self, entries: &[Entry], waiting: &Waiting) -> usize {
        let mut cursor = waiting.cursor();
        let mut rest = entries;
        while let [entry, behind @ ..] = rest {
            let len = match entry.what {
                What::Common(_) => BatchVerdict::MAX_LEN,
                What::Raw { start, end } => align(end - start),
            };
            if !self.out.is_empty() && self.out.len() + len > self.max_len {
                break;
            }
            let is_next = entry.is_answer && cursor.advance_over(entry.key.id);
            rest = behind;
            self.first.get_or_insert(entry.key);
            match entry.what {
                What::Raw { start, end } => {
                    self.out
                        .extend_from_slice(self.raw.get(start..end).unwrap_or_default());
                    self.pad();
                }
                // Whatever is not next in line, or may stay there, is no beginning of a run.
                What::Common(common) if !is_next => self.encode(common, entry.key, false),
                What::Common(common) => {
                    let mut last = entry.key;
                    while let [entry, behind @ ..] = rest {
                        let is_equal = matches!(entry.what, What::Common(other) if other == common);
                        if !is_equal || !cursor.advance_over(entry.key.id) {
                            break;
                        }
                        last = entry.key;
                        rest = behind;
                    }
                    self.encode(common, last, last != entry.key);
                }
            }
        }
        entries.len() - rest.len()
    }

    /// Encodes a verdict on one packet, or on all up to it
    fn encode(&mut self, common: BatchVerdict, key: PacketKey, is_run: bool) {
        let start = self.out.len();
        self.out.resize(start + BatchVerdict::MAX_LEN, 0);
        let room = self.out.get_mut(start..).unwrap_or_default();
        let header = verdict_header(key);
        let len = if is_run {
            common.encode(room, key.queue, key.id, header)
        } else {
            common.encode_single(room, key.queue, key.id, header)
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

#[cfg(test)]
mod tests;
