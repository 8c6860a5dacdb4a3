//! Giving a socket and its queues to another process

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::str::FromStr;
use std::sync::Arc;

use nfqnl_proto::{ConfigFlags, PlainVerdict, Verdict};

use crate::engine::Engine;
use crate::error::{Error, Operation, Result};
use crate::queue::Queue;
use crate::socket::{Socket, SocketBuilder};

/// The queues of a socket that was given away, for the process that takes over
///
/// [`Socket::into_fd`] makes it, and [`Socket::adopt`] takes it. Between processes it travels as
/// text, for instance in an environment variable: it implements `Display` and `FromStr`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[must_use]
pub struct Handover {
    /// Number, newest id if known, and flags of each queue
    queues: Vec<(u16, Option<u32>, ConfigFlags)>,
}

impl Handover {
    /// Returns the numbers of the queues
    pub fn queues(&self) -> impl Iterator<Item = u16> {
        self.queues.iter().map(|&(num, ..)| num)
    }
}

const VERSION: &str = "nfqnl1";

impl fmt::Display for Handover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(VERSION)?;
        for (num, newest, flags) in &self.queues {
            match newest {
                Some(newest) => write!(f, " {num}/{newest}/{}", flags.bits())?,
                None => write!(f, " {num}/-/{}", flags.bits())?,
            }
        }
        Ok(())
    }
}

/// A text that is not a [`Handover`] of this version
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("not a handover of this version of nfqnl")]
#[non_exhaustive]
pub struct ParseHandoverError;

impl FromStr for Handover {
    type Err = ParseHandoverError;

    fn from_str(text: &str) -> Result<Self, ParseHandoverError> {
        let queue = |text: &str| {
            let mut numbers = text.split('/');
            let num = numbers.next()?.parse().ok()?;
            let newest = match numbers.next()? {
                "-" => None,
                newest => Some(newest.parse().ok()?),
            };
            let flags = ConfigFlags::from_bits_retain(numbers.next()?.parse().ok()?);
            numbers.next().is_none().then_some((num, newest, flags))
        };
        let mut words = text.split(' ');
        let queues = match words.next() {
            Some(VERSION) => words.map(queue).collect(),
            _ => None,
        };
        queues
            .map(|queues| Self { queues })
            .ok_or(ParseHandoverError)
    }
}

/// The packets of an adopted queue that the process before received and did not answer
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Orphans {
    /// This process receives them again, with new ids, behind the packets that wait in the socket
    ///
    /// The rules do not see them again. The receive buffer and the queue need room for all of them
    /// at once; the kernel drops the others. With
    /// [`FAIL_OPEN`](ConfigFlags::FAIL_OPEN) it accepts them. The time that they have waited
    /// already is not known: a [`Pending`](crate::Pending) begins anew.
    Again,
    /// All are accepted
    Accept,
    /// All are dropped
    Drop,
}

impl Orphans {
    const fn verdict(self, num: u16) -> PlainVerdict {
        PlainVerdict::new(match self {
            Self::Again => Verdict::Queue { num, bypass: false },
            Self::Accept => Verdict::Accept,
            Self::Drop => Verdict::Drop,
        })
    }
}

/// Giving a socket away, and taking it over
impl Socket {
    /// Gives the socket away without unbinding its queues
    ///
    /// The descriptor goes to another process: by `SCM_RIGHTS` over a Unix socket, by exec with an
    /// inherited descriptor (clear close-on-exec), or by a supervisor that keeps it. That process
    /// calls [`adopt`](Self::adopt). Packets keep waiting in between, as many as the queue and the
    /// receive buffer hold.
    ///
    /// Packets that this process has received and not answered, also those left in a batch, are
    /// orphans: the new process decides about them. Send all verdicts first.
    /// [`VerdictSender`](crate::VerdictSender)s, guards and wakers may live on in other threads:
    /// their verdicts are [`Error::Unbound`], and their packets are orphans.
    ///
    /// Keep every [`Queue`] until this call returns, because a queue dropped before is unbound.
    /// Afterwards a drop does nothing. If the new process cannot be started, this process adopts
    /// the descriptor again.
    ///
    /// # Errors
    /// [`Error::Io`] if no descriptor is left; the queues are unbound then.
    pub fn into_fd(self) -> Result<(OwnedFd, Handover)> {
        let fd = self.engine.as_fd().try_clone_to_owned();
        let fd = fd.map_err(Error::io(Operation::HandOver))?;
        let queues = self.engine.give_away();
        Ok((fd, Handover { queues }))
    }

    /// Takes over a socket with bound queues: see [`SocketBuilder::adopt`]
    ///
    /// # Errors
    /// As [`SocketBuilder::adopt`].
    pub fn adopt(
        fd: OwnedFd,
        handover: Option<&Handover>,
        queues: &[(u16, Orphans)],
    ) -> Result<(Self, Vec<Queue>)> {
        Self::builder().adopt(fd, handover, queues)
    }
}

impl SocketBuilder {
    /// Takes over a socket with bound queues, from [`Socket::into_fd`] or from a process that died
    ///
    /// Of the settings, [`merge_verdicts`](Self::merge_verdicts),
    /// [`unbind_on_drop`](Self::unbind_on_drop) and [`busy_poll`](Self::busy_poll) count. The
    /// socket keeps its receive buffer and its reports of overruns. The descriptor gets
    /// close-on-exec.
    ///
    /// **The queues keep their settings.** If the process before was killed in [`Socket::drain`] or
    /// after [`Queue::pass_by`], all new packets pass by. After an adoption without a handover, set
    /// the maximum length ([`Queue::set_maxlen`]), and clear
    /// [`FAIL_OPEN`](nfqnl_proto::ConfigFlags::FAIL_OPEN) unless the program wants it
    /// ([`Queue::set_flags`]).
    ///
    /// `queues` names the queues to serve, and the fate of their orphans: the packets that the
    /// process before received and did not answer. Queues of the handover that are not in `queues`
    /// are unbound. Without a handover, name all: the others stay bound, and no process answers
    /// their packets.
    ///
    /// Keep each returned [`Queue`]: a dropped one is unbound.
    ///
    /// With a handover the orphans get their verdict at once. A handover is good for one call:
    /// after a crash of this process the next one gets `None`. Without a handover the orphans wait
    /// for the next packet of their queue, because its id shows the older packets. A sender that
    /// repeats its packet ends this wait. [`Queue::pass_by`] and [`Socket::drain`] end it too. The
    /// first packet that reaches the library decides: all older ones count as orphans. So if your
    /// own threads receive on the descriptor, run only one until it has passed on a packet of each
    /// queue.
    ///
    /// # Errors
    /// [`Error::Refused`] with [`NotBound`](crate::ErrorKind::NotBound) or
    /// [`NoCapability`](crate::ErrorKind::NoCapability) if this socket has not bound a queue, with
    /// [`AlreadyBound`](crate::ErrorKind::AlreadyBound) if `queues` names one twice.
    /// [`Error::NotNetfilter`]; [`Error::NoAck`]; [`Error::Io`]. The descriptor is closed then: if
    /// it was the last copy, the kernel unbinds the queues. Otherwise adopt a copy again, with
    /// `None` and [`Orphans::Again`]: the failed call may have read packets, which are orphans now,
    /// and answered earlier orphans.
    pub fn adopt(
        self,
        fd: OwnedFd,
        handover: Option<&Handover>,
        queues: &[(u16, Orphans)],
    ) -> Result<(Socket, Vec<Queue>)> {
        let socket = self.wrap(fd)?;
        match adopt_queues(&socket.engine, handover, queues) {
            Ok(queues) => Ok((socket, queues)),
            Err(error) => {
                // Copies of the descriptor keep the queues.
                socket.engine.give_away();
                Err(error)
            }
        }
    }
}

fn adopt_queues(
    engine: &Arc<Engine>,
    handover: Option<&Handover>,
    queues: &[(u16, Orphans)],
) -> Result<Vec<Queue>> {
    let before = |num| {
        let queues = handover.map_or(&[][..], |handover| &handover.queues);
        queues.iter().find(|(before, ..)| *before == num)
    };
    // All are registered before the first message is read.
    let bindings: Result<Vec<_>> = queues
        .iter()
        .map(|&(num, orphans)| {
            let newest = before(num).and_then(|&(_, newest, _)| newest);
            let flags = before(num).map_or(ConfigFlags::empty(), |&(.., flags)| flags);
            engine.adopt(num, newest, flags, orphans.verdict(num))
        })
        .collect();
    let bindings = bindings?;
    engine.check_adopted(&bindings)?;
    for num in handover.into_iter().flat_map(Handover::queues) {
        if !queues.iter().any(|(adopted, _)| *adopted == num) {
            engine.unbind_unadopted(num)?;
        }
    }
    let queues = bindings.into_iter();
    Ok(queues.map(|binding| Queue::new(engine, binding)).collect())
}
