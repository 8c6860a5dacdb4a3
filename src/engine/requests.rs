//! Requests and their answers: configuration and sync

use std::os::fd::AsFd;
use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use nfqnl_proto::consts::{NFQNL_MSG_CONFIG, NLMSG_NOOP, message_type};
use nfqnl_proto::{ConfigRequest, Reply, RequestHeader, encode_noop};

use super::wake::WAKE_SEQ;
use super::{Engine, State};
use crate::error::{Error, Operation, Refusal, Result};
use crate::recv_batch::RecvBatch;
use crate::sys;

/// A sent request
#[derive(Debug)]
pub(super) struct Request {
    seq: u32,
    op: Operation,
    /// [`State::bytes_read`] at which all messages are read that the buffer held at the send
    lost_at: u64,
    answer: Answer,
}

#[derive(Debug)]
enum Answer {
    Awaited,
    Came(Result<(), Refusal>),
    /// Not in the socket, and not read: the kernel had no room for the answer
    Lost,
}

/// A request also reads packets, so it needs room for any message
const REQUEST_BUFFER_LEN: usize = RecvBatch::DEFAULT_SLOT_LEN;

/// The time for other code to pass on an answer that it received
const OUTSIDE_GRACE: Duration = Duration::from_secs(1);

/// The time for a thread blocked in the receive call to come back with an answer
const READER_GRACE: Duration = Duration::from_millis(5);

/// Makes a request again if its acknowledgement is lost
///
/// A full receive buffer loses the acknowledgement, and the wait for it reads what the buffer held.
pub(crate) fn retry_lost_ack(mut request: impl FnMut() -> Result<()>) -> Result<()> {
    match request() {
        Err(Error::NoAck { .. }) => request(),
        result => result,
    }
}

impl Engine {
    /// Sends a configuration request and waits for the answer
    pub(crate) fn configure(&self, op: Operation, request: &ConfigRequest) -> Result<()> {
        let mut state = self.state();
        let seq = self.begin(&mut state, op, Some(request))?;
        self.finish(state, op, seq)
    }

    /// Waits until the kernel has processed everything sent so far, and every refusal has arrived
    pub(crate) fn sync(&self, op: Operation) -> Result<()> {
        let mut state = self.state();
        let seq = self.begin(&mut state, op, None)?;
        self.finish(state, op, seq)
    }

    /// Sends a request, or a message only to be acknowledged; returns its sequence number
    pub(super) fn begin(
        &self,
        state: &mut State,
        op: Operation,
        request: Option<&ConfigRequest>,
    ) -> Result<u32> {
        let seq = self.send_request(state, op, request, true)?;
        // The program may have set the size since the socket was opened.
        let buffer = sys::recv_buffer(self.as_fd()).unwrap_or(libc::c_int::MAX);
        let buffer = u64::try_from(buffer).unwrap_or(0);
        // A thread blocked in the receive call may have filled its slots before this request.
        let unread = buffer + state.unlocked_room().unwrap_or(0);
        state.requests.push(Request {
            seq,
            op,
            lost_at: state.bytes_read + unread,
            answer: Answer::Awaited,
        });
        Ok(seq)
    }

    /// Sends a request; the kernel has processed it when this call returns
    pub(super) fn send_request(
        &self,
        state: &mut State,
        op: Operation,
        request: Option<&ConfigRequest>,
        ack: bool,
    ) -> Result<u32> {
        state.note_thread();
        let seq = state.last_seq.wrapping_add(1).max(WAKE_SEQ + 1);
        state.last_seq = seq;
        let header = RequestHeader {
            ack,
            seq,
            pid: self.wake.mark(),
        };
        let mut buf = [0; ConfigRequest::MAX_LEN];
        let encoded = match request {
            Some(request) => request.encode(&mut buf, header),
            None => encode_noop(&mut buf, header),
        };
        let len = encoded.map_err(|source| Error::Encode { op, source })?;
        self.send(op, buf.get(..len).unwrap_or_default())?;
        Ok(seq)
    }

    /// Waits for the answer to a request
    pub(super) fn finish<'s>(
        &'s self,
        mut state: MutexGuard<'s, State>,
        op: Operation,
        seq: u32,
    ) -> Result<()> {
        let mut has_read = false;
        let answer;
        (state, answer) = self.wait_for_answer(state, seq, &mut has_read);
        state.requests.retain(|request| request.seq != seq);
        // Another thread may have seen the descriptor readable because of a message read here.
        if has_read && state.has_met_others {
            self.wake.make_readable();
        }
        self.leave(&mut state);
        match answer? {
            Answer::Came(answer) => Ok(answer?),
            Answer::Awaited | Answer::Lost => Err(Error::NoAck { op }),
        }
    }

    /// Reads until the answer is there
    ///
    /// The kernel put the answer into the socket before the send returned, or had no room for it.
    fn wait_for_answer<'s>(
        &'s self,
        mut state: MutexGuard<'s, State>,
        seq: u32,
        has_read: &mut bool,
    ) -> (MutexGuard<'s, State>, Result<Answer>) {
        let mut buf = sys::room_for(REQUEST_BUFFER_LEN);
        let mut deadline: Option<Instant> = None;
        let mut has_waited = false;
        loop {
            match state.take_answer(seq) {
                Answer::Awaited => {}
                answer => return (state, Ok(answer)),
            }
            let is_read_unlocked = state.is_read_unlocked();
            // The first packet after a crash shows which packets are older, so it is read in order.
            let waits_for_first = is_read_unlocked && state.has_orphans();
            if (!is_read_unlocked || has_waited) && !waits_for_first {
                // A thread blocked in the receive call does not run. It may have messages from
                // before those that are read here.
                match self.read_to_stash(&mut state, &mut buf) {
                    Ok(true) => {
                        state.is_out_of_order |= is_read_unlocked;
                        *has_read = true;
                        continue;
                    }
                    Ok(false) if !is_read_unlocked && !self.may_be_read_elsewhere() => {
                        return (state, Ok(Answer::Lost));
                    }
                    Ok(false) => {}
                    Err(error) => return (state, Err(error)),
                }
            }
            // Three others may have the answer: a thread blocked in the receive call, the program
            // itself, or another process with the same socket.
            let mut left = READER_GRACE;
            if is_read_unlocked {
                self.wake_reader(); // the thread may be blocked for good otherwise
            } else {
                let now = sys::now();
                let deadline = *deadline.get_or_insert(now + OUTSIDE_GRACE);
                left = deadline.saturating_duration_since(now);
                if left.is_zero() {
                    return (state, Ok(Answer::Lost));
                }
            }
            state = self.wait_for_answers(state, left);
            has_waited = true;
        }
    }

    fn wait_for_answers<'s>(
        &'s self,
        mut state: MutexGuard<'s, State>,
        left: Duration,
    ) -> MutexGuard<'s, State> {
        state.waiting_requests += 1;
        state = sys::wait_for(&self.answered, state, left);
        state.waiting_requests -= 1;
        state
    }

    /// Waits until a thread blocked in the receive call has recorded the messages it received
    pub(crate) fn wait_for_reader(&self) {
        let mut state = self.state();
        state.note_thread(); // other threads poll from here on
        while state.is_read_unlocked() {
            self.wake_reader();
            state = self.wait_for_answers(state, READER_GRACE);
        }
    }

    /// Wakes a thread blocked in the receive call
    fn wake_reader(&self) {
        if self.may_be_read_elsewhere() {
            self.wake.clear_outstanding(); // the other process may have the answer to a wake
        }
        self.wake.make_readable();
    }

    /// Reads all messages in the socket to the stash, so that refusals do not fill the buffer
    ///
    /// A thread blocked in the receive call reads them anyway.
    pub(super) fn drain_to_stash(&self) -> Result<()> {
        let mut buf = sys::room_for(REQUEST_BUFFER_LEN);
        let mut state = self.state();
        while !state.is_read_unlocked() && self.read_to_stash(&mut state, &mut buf)? {}
        self.leave(&mut state);
        Ok(())
    }

    /// Reads the messages sent to a new socket before it was connected, and drops those of other
    /// processes
    pub(crate) fn discard_foreign(&self) -> Result<()> {
        let mut buf = sys::room_for(REQUEST_BUFFER_LEN);
        let mut state = self.state();
        loop {
            let read = match sys::recv_from(self.as_fd(), &mut buf) {
                Ok((len, 0)) => Ok(buf.get(..len).unwrap_or_default()),
                Ok(_) => {
                    state.stats.from_other_process += 1;
                    continue;
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => continue,
                Err(error) => Err(error),
            };
            if !self.stash(&mut state, read)? {
                break;
            }
        }
        self.leave(&mut state);
        Ok(())
    }
}

impl State {
    fn has_orphans(&self) -> bool {
        self.bindings
            .iter()
            .any(|binding| binding.outstanding().has_orphans())
    }

    /// Takes the answer to a request, if it has come
    fn take_answer(&mut self, seq: u32) -> Answer {
        let bytes_read = self.bytes_read;
        let Some(request) = self.requests.iter_mut().find(|request| request.seq == seq) else {
            return Answer::Lost;
        };
        // More was read since the request than the buffer holds, so the answer was not in it.
        if matches!(request.answer, Answer::Awaited) && bytes_read > request.lost_at {
            request.answer = Answer::Lost;
        }
        std::mem::replace(&mut request.answer, Answer::Awaited)
    }
}

impl Engine {
    /// Records the kernel's answer to a request, or to a wake message
    pub(super) fn record_answer(&self, state: &mut State, reply: &Reply<'_>) {
        let is_request = [message_type(NFQNL_MSG_CONFIG), NLMSG_NOOP].contains(&reply.request_type);
        if !is_request || reply.pid != self.wake.mark() {
            return; // the answer to another process
        }
        if reply.seq == WAKE_SEQ {
            return self.wake.clear_outstanding();
        }
        // Answers come in the order of the requests, so the answers to earlier requests are lost,
        // unless a thread blocked in the receive call has them.
        let may_be_in_hand = state.is_read_unlocked();
        for request in &mut state.requests {
            if request.seq == reply.seq {
                request.answer = Answer::Came(match reply.is_ack() {
                    true => Ok(()),
                    false => Err(Refusal::new(request.op, reply)),
                });
                return;
            }
            // A later request: its answer is behind this one, which no request waits for.
            if request.seq.wrapping_sub(reply.seq) < u32::MAX / 2 {
                return;
            }
            if !may_be_in_hand && matches!(request.answer, Answer::Awaited) {
                request.answer = Answer::Lost;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use nfqnl_proto::consts::NLMSG_ERROR;
    use nfqnl_proto::{ConfigFlags, Message, Messages, PlainVerdict, Verdict};

    use std::sync::atomic::Ordering::Relaxed;

    use super::*;
    use crate::engine::receive::Reader;

    fn state(seqs: &[u32]) -> State {
        let requests = seqs.iter().map(|&seq| Request {
            seq,
            op: Operation::Sync,
            lost_at: 600,
            answer: Answer::Awaited,
        });
        State {
            requests: requests.collect(),
            bytes_read: 100,
            ..State::default()
        }
    }

    #[test]
    fn an_answer_is_lost_once_the_buffer_was_read() {
        let mut state = state(&[1]);
        state.bytes_read = 600;
        assert!(matches!(state.take_answer(1), Answer::Awaited));
        state.bytes_read += 1;
        assert!(matches!(state.take_answer(1), Answer::Lost));
    }

    /// An engine over a socket that is not netlink, and the other end
    fn engine() -> (Engine, UnixDatagram) {
        let (here, there) = UnixDatagram::pair().unwrap();
        let engine = Engine::new(sys::netlink_from(here.into()), true, true);
        (engine.unwrap(), there)
    }

    /// Records the acknowledgement of a request
    fn acknowledge(engine: &Engine, state: &mut State, kind: u16, seq: u32) {
        let answer = [
            &36_u32.to_ne_bytes()[..],
            &NLMSG_ERROR.to_ne_bytes(),
            &[0; 14],
            &16_u32.to_ne_bytes(),
            &kind.to_ne_bytes(),
            &[0; 2],
            &seq.to_ne_bytes(),
            &engine.wake.mark().to_ne_bytes(),
        ];
        match Messages::new(&answer.concat()).next() {
            Some(Ok(Message::Reply(reply))) => engine.record_answer(state, &reply),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_later_answer_means_that_earlier_are_lost() {
        let (engine, _there) = engine();
        let mut state = state(&[1, 2, 3, 4]);
        acknowledge(&engine, &mut state, message_type(NFQNL_MSG_CONFIG), 2);
        acknowledge(&engine, &mut state, NLMSG_NOOP, 3);
        acknowledge(&engine, &mut state, NFQNL_MSG_CONFIG.into(), 4); // of another subsystem
        assert!(matches!(state.take_answer(1), Answer::Lost));
        assert!(matches!(state.take_answer(2), Answer::Came(Ok(()))));
        assert!(matches!(state.take_answer(3), Answer::Came(Ok(()))));
        assert!(matches!(state.take_answer(4), Answer::Awaited));
        assert!(matches!(state.take_answer(5), Answer::Lost), "never asked");
    }

    fn blocked_reader() -> Option<Reader> {
        Some(Reader {
            process: sys::generation(),
            unlocked_room: Some(5000),
            all: 0,
        })
    }

    #[test]
    fn an_answer_in_a_threads_hand_is_not_lost() {
        let (engine, _there) = engine();
        let mut state = state(&[1, 2]);
        state.reader = blocked_reader();
        acknowledge(&engine, &mut state, NLMSG_NOOP, 2);
        assert!(matches!(state.take_answer(1), Answer::Awaited));
        state.reader = None;
        acknowledge(&engine, &mut state, NLMSG_NOOP, 1);
        assert!(matches!(state.take_answer(1), Answer::Came(Ok(()))));

        state = State {
            reader: blocked_reader(),
            ..State::default()
        };
        let seq = engine.begin(&mut state, Operation::Sync, None).unwrap();
        let buffer = sys::recv_buffer(engine.as_fd()).unwrap();
        state.bytes_read = u64::try_from(buffer).unwrap() + 5000;
        assert!(matches!(state.take_answer(seq), Answer::Awaited));
    }

    /// After a fork the other process may receive the answer to a wake message
    #[test]
    fn a_blocked_reader_is_woken_until_it_returns() {
        let (engine, there) = engine();
        engine.may_be_read_outside.store(true, Relaxed);
        engine.state().reader = blocked_reader();
        std::thread::scope(|scope| {
            scope.spawn(|| engine.wait_for_reader());
            for _ in 0..3 {
                assert_eq!(there.recv(&mut [0; 64]).unwrap(), 16);
            }
            engine.state().reader = None;
        });
    }

    /// A packet read out of order would not show which packets are older
    #[test]
    fn a_request_waits_while_orphans_are_not_known() {
        let (engine, there) = engine();
        engine.may_be_read_outside.store(true, Relaxed);
        let orphans = PlainVerdict::new(Verdict::Drop);
        engine
            .adopt(7, None, ConfigFlags::empty(), orphans)
            .unwrap();
        engine.state().reader = blocked_reader();
        std::thread::scope(|scope| {
            let request = scope.spawn(|| engine.sync(Operation::Sync));
            // The request, and wake messages: another process may have read an answer.
            for _ in 0..3 {
                there.recv(&mut [0; 64]).unwrap();
            }
            there.send(b"a message").unwrap();
            std::thread::sleep(4 * READER_GRACE);
            assert_eq!(engine.state().bytes_read, 0);
            engine.state().reader = None;
            assert!(matches!(request.join().unwrap(), Err(Error::NoAck { .. })));
            assert_eq!(engine.state().bytes_read, 9);
        });
    }

    #[test]
    fn one_wake_message_is_on_its_way_at_a_time() {
        let (engine, there) = engine();
        there.set_nonblocking(true).unwrap();
        let mut state = state(&[1]);
        for _ in 0..2 {
            engine.wake.make_readable();
            engine.wake.make_readable();
            assert!(engine.wake.is_outstanding());
            assert_eq!(there.recv(&mut [0; 64]).unwrap(), 16);
            assert!(there.recv(&mut [0; 64]).is_err());
            acknowledge(&engine, &mut state, NLMSG_NOOP, WAKE_SEQ);
            assert!(!engine.wake.is_outstanding());
        }
        assert!(
            matches!(state.take_answer(1), Answer::Awaited),
            "not its answer"
        );
    }
}
