//! Requests, and the answers to them: configuration and sync

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nfqnl_proto::consts::{MESSAGE_HEADER_LEN, NFQNL_MSG_CONFIG, NLMSG_NOOP, message_type};
use nfqnl_proto::{ConfigRequest, Reply, RequestHeader, encode_noop};

use super::receive::RECHECK;
use super::{Shared, State};
use crate::batch::{RecvBatch, Stashed};
use crate::error::{Error, Operation, Refusal, Result};
use crate::event::sole_packet;
use crate::sys::{self, Sender, Wait};

/// A request that was sent, and its answer when that has come
#[derive(Debug)]
pub(super) struct Request {
    pub(super) seq: u32,
    op: Operation,
    answer: Option<Result<(), Refusal>>,
}

/// A request that was sent, in the hands of who waits for the answer
pub(super) struct Pending {
    op: Operation,
    pub(super) seq: u32,
    /// The kernel's count of lost messages before it was sent
    drops: Option<u32>,
}

/// A request reads whatever comes on the way, so it needs room for any message
const REQUEST_BUFFER_LEN: usize = RecvBatch::DEFAULT_SLOT_LEN;

impl Shared {
    /// Sends a configuration request and waits for the answer
    pub(crate) fn configure(&self, op: Operation, request: &ConfigRequest) -> Result<()> {
        let pending = self.begin(&mut self.state(), op, Some(request))?;
        self.finish(pending)
    }

    /// Waits until the kernel has processed everything that was sent before, and every refusal has arrived
    pub(crate) fn sync(&self, op: Operation) -> Result<()> {
        let pending = self.begin(&mut self.state(), op, None)?;
        self.finish(pending)
    }

    /// Sends a request, or a message that does nothing but be acknowledged
    pub(super) fn begin(
        &self,
        state: &mut State,
        op: Operation,
        request: Option<&ConfigRequest>,
    ) -> Result<Pending> {
        state.last_seq = state.last_seq.wrapping_add(1).max(1);
        let seq = state.last_seq;
        let header = RequestHeader {
            ack: true,
            echo: false,
            seq,
            pid: 0,
        };
        let mut buf = [0; ConfigRequest::MAX_LEN];
        let encoded = match request {
            Some(request) => request.encode(&mut buf, header),
            None => encode_noop(&mut buf, header),
        };
        let len = encoded.map_err(|source| Error::Encode { op, source })?;
        let drops = sys::drops(self.as_fd()).ok();
        state.requests.push(Request {
            seq,
            op,
            answer: None,
        });
        let sent = self.send(op, buf.get(..len).unwrap_or_default());
        if sent.is_err() {
            state.requests.retain(|request| request.seq != seq);
        }
        sent.map(|()| Pending { op, seq, drops })
    }

    /// Waits for the answer to a request
    pub(super) fn finish(&self, pending: Pending) -> Result<()> {
        let seq = pending.seq;
        let answer = self.wait_for_answer(pending);
        let mut state = self.state();
        state.requests.retain(|request| request.seq != seq);
        let stashed = !state.stash.is_empty();
        drop(state);
        if stashed {
            self.wake();
        }
        answer
    }

    /// Reads until the answer is there; the kernel has sent it before our send returned, unless its buffer was full
    fn wait_for_answer(&self, Pending { op, seq, drops }: Pending) -> Result<()> {
        /// The longest time between two looks that counts: in more this process did not run, and could not look
        const LONGEST: Duration = RECHECK.saturating_mul(2);
        let (mut last_look, mut waited) = (sys::now(), Duration::ZERO);
        let mut buf = sys::room_for(REQUEST_BUFFER_LEN);
        let mut state = self.state();
        loop {
            // What another thread has read may hold our answer, so look before every read.
            if let Some(answer) = state.take_answer(seq) {
                return Ok(answer?);
            }
            let now = sys::now();
            waited += now.saturating_duration_since(last_look).min(LONGEST);
            last_look = now;
            let is_empty = !state.has_reader && self.read_to_stash(&mut state, &mut buf)?;
            // Nobody else has it, and it is not there: the kernel had no room for it.
            let is_lost = is_empty
                && drops != sys::drops(self.as_fd()).ok()
                && !self.is_read_outside.load(Ordering::Relaxed)
                && !state.bindings.have_callbacks();
            if is_lost || waited >= self.ack_timeout {
                let answer = state.take_answer(seq);
                return Ok(answer.ok_or(Error::NoAck { op, waited })??);
            }
            if is_empty || state.has_reader {
                let left = self.ack_timeout.saturating_sub(waited);
                state = self.wait_for_others(state, left.min(RECHECK));
            }
        }
    }

    /// Reads one datagram, and says whether there was none
    fn read_to_stash(&self, state: &mut State, buf: &mut [u8]) -> Result<bool> {
        self.look_before_receiving(state);
        let received = sys::recv_one(self.as_fd(), Wait::No, state.sender(), buf);
        self.stash_from(state, received, buf)
    }

    /// Throws away what other processes have sent to the socket before it was connected, after which none can begin to
    ///
    /// A message of the kernel that came before then is kept, as by any request; but what had no room then is no loss of
    /// this handle, and others can see to that.
    pub(crate) fn discard_foreign(&self) -> Result<()> {
        let mut buf = sys::room_for(REQUEST_BUFFER_LEN);
        let mut state = self.state();
        loop {
            let received = sys::recv_one(self.as_fd(), Wait::No, Sender::IsAsked, &mut buf);
            let is_empty = match received {
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => false,
                received => self.stash_from(&mut state, received, &buf)?,
            };
            if is_empty {
                break;
            }
        }
        if !state.stash.is_empty() {
            self.wake();
        }
        Ok(())
    }

    /// Counts what another process has sent, and stashes everything else
    fn stash_from(
        &self,
        state: &mut State,
        received: io::Result<Option<usize>>,
        buf: &[u8],
    ) -> Result<bool> {
        match received {
            Ok(None) => {
                state.stats.foreign += 1;
                Ok(false)
            }
            Ok(Some(len)) => self.stash(state, Ok(buf.get(..len).unwrap_or_default())),
            Err(error) => self.stash(state, Err(error)),
        }
    }

    /// Sees what was received, keeps it if there is an event in it, and says whether nothing was there
    pub(super) fn stash(&self, state: &mut State, received: io::Result<&[u8]>) -> Result<bool> {
        match received {
            Ok(datagram) => {
                if self.note(state, datagram, sole_packet(datagram).as_ref()) {
                    let State {
                        stash, bindings, ..
                    } = state;
                    stash.extend(Stashed::each(datagram, bindings));
                }
                self.look_after_receiving(state, false);
                Ok(false)
            }
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOBUFS) => {
                    state.note_overrun();
                    state.stash.push_back(Stashed::Overrun);
                    Ok(false)
                }
                Some(libc::EINTR) => Ok(false),
                Some(libc::EAGAIN) => {
                    self.look_after_receiving(state, true);
                    Ok(true)
                }
                _ => Err(Error::Io {
                    op: Operation::Receive,
                    source: error,
                }),
            },
        }
    }

    /// Makes the descriptor readable: the kernel answers this message at once
    ///
    /// If the answer finds no room, the receive buffer is full, and the descriptor readable without it.
    pub(crate) fn wake(&self) {
        let mut buf = [0; MESSAGE_HEADER_LEN];
        let header = RequestHeader {
            ack: true,
            echo: false,
            seq: 0,
            pid: 0,
        };
        if encode_noop(&mut buf, header).is_ok() {
            let _ = self.send(Operation::Sync, &buf);
        }
    }
}

impl State {
    fn take_answer(&mut self, seq: u32) -> Option<Result<(), Refusal>> {
        self.requests
            .iter_mut()
            .find(|request| request.seq == seq)?
            .answer
            .take()
    }

    pub(super) fn note_answer(&mut self, reply: &Reply<'_>) -> bool {
        if ![message_type(NFQNL_MSG_CONFIG), NLMSG_NOOP].contains(&reply.request_type) {
            return false;
        }
        let Some(request) = self
            .requests
            .iter_mut()
            .find(|request| request.seq == reply.seq)
        else {
            return false; // a wake, or a request that has given up
        };
        let answer = if reply.is_ack() {
            Ok(())
        } else {
            Err(Refusal::new(request.op, reply))
        };
        request.answer = Some(answer);
        true
    }
}
