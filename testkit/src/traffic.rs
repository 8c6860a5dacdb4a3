//! UDP, TCP and ICMP traffic; every operation has a timeout
//!
//! A queued packet stays charged to its sender's buffer. A plain blocking sender would stop after
//! about 250 packets without a verdict. These senders have a large buffer and do not block.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};

use crate::sys;

/// Timeout of receivers
pub const TIMEOUT: Duration = Duration::from_secs(5);
/// Waiting time for packets expected not to arrive
pub const SILENCE: Duration = Duration::from_millis(200);
/// `127.0.0.1`
pub const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// `::1`
pub const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// A UDP socket; sends block for a millisecond at most, and receives have a timeout
#[derive(Debug)]
pub struct Udp(UdpSocket);

impl Udp {
    /// Binds to an address; port 0 chooses a free port
    ///
    /// # Errors
    /// The system call's error.
    pub fn bind(address: IpAddr, port: u16) -> io::Result<Self> {
        const SEND_BUFFER: libc::c_int = 1 << 26;
        let socket = UdpSocket::bind((address, port))?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        // Non-blocking mode would also affect receiving.
        socket.set_write_timeout(Some(Duration::from_millis(1)))?;
        for buffer in [libc::SO_SNDBUF, libc::SO_RCVBUF] {
            sys::set_option(&socket, libc::SOL_SOCKET, buffer, SEND_BUFFER)?;
        }
        // Only root of the machine may exceed the system's limit.
        for buffer in [libc::SO_SNDBUFFORCE, libc::SO_RCVBUFFORCE] {
            let _ = sys::set_option(&socket, libc::SOL_SOCKET, buffer, SEND_BUFFER);
        }
        Ok(Self(socket))
    }

    /// Returns the local address
    ///
    /// # Panics
    /// Never: the socket is bound.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.0.local_addr().expect("a bound socket has an address")
    }

    /// Sets the mark of sent packets (`SO_MARK`)
    ///
    /// # Errors
    /// EPERM without CAP_NET_ADMIN.
    pub fn set_mark(&self, mark: u32) -> io::Result<()> {
        self.set(
            libc::SO_MARK,
            libc::c_int::from_ne_bytes(mark.to_ne_bytes()),
        )
    }

    /// Sets the priority of sent packets (`SO_PRIORITY`)
    ///
    /// # Errors
    /// EPERM above 6 without CAP_NET_ADMIN.
    pub fn set_priority(&self, priority: u8) -> io::Result<()> {
        self.set(libc::SO_PRIORITY, priority.into())
    }

    /// Turns on GSO for sending (`UDP_SEGMENT`) and GRO for receiving (`UDP_GRO`); Linux 5.0
    ///
    /// The kernel cuts a sent payload into datagrams of `bytes` bytes as late as possible. Until
    /// then it handles one large packet. It does not cut a large packet for this receiver.
    ///
    /// # Errors
    /// The system call's error.
    pub fn send_segmented(&self, bytes: u16) -> io::Result<()> {
        for (option, value) in [(libc::UDP_SEGMENT, bytes.into()), (libc::UDP_GRO, 1)] {
            sys::set_option(&self.0, libc::SOL_UDP, option, value)?;
        }
        Ok(())
    }

    /// Turns on receive timestamps (`SO_TIMESTAMP`)
    ///
    /// While one socket has the option, the kernel takes a timestamp of every packet.
    ///
    /// # Errors
    /// The system call's error.
    pub fn want_timestamps(&self) -> io::Result<()> {
        self.set(libc::SO_TIMESTAMP, 1)
    }

    fn set(&self, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
        sys::set_option(&self.0, libc::SOL_SOCKET, option, value)
    }

    /// Sends a datagram
    ///
    /// # Errors
    /// The system call's error; `WouldBlock` when queued packets fill the send buffer.
    pub fn send(&self, payload: &[u8], to: SocketAddr) -> io::Result<()> {
        self.0.send_to(payload, to).map(|_| ())
    }

    /// Receives a datagram's payload; `None` after [`TIMEOUT`]
    #[must_use]
    pub fn recv(&self) -> Option<Vec<u8>> {
        self.recv_within(TIMEOUT)
    }

    /// Receives a datagram's payload; `None` after `timeout`
    ///
    /// # Panics
    /// For a timeout of 0.
    #[must_use]
    pub fn recv_within(&self, timeout: Duration) -> Option<Vec<u8>> {
        let mut buf = vec![0; usize::from(u16::MAX)];
        let len = self.recv_into(&mut buf, timeout)?;
        buf.truncate(len);
        Some(buf)
    }

    /// Receives a datagram's payload into `buf` and returns its length; `None` after `timeout`
    ///
    /// # Panics
    /// For a timeout of 0.
    #[must_use]
    pub fn recv_into(&self, buf: &mut [u8], timeout: Duration) -> Option<usize> {
        self.0
            .set_read_timeout(Some(timeout))
            .expect("a timeout above 0");
        self.0.recv_from(buf).ok().map(|(len, _)| len)
    }

    /// Returns whether no datagram arrives within [`SILENCE`]
    #[must_use]
    pub fn is_silent(&self) -> bool {
        self.recv_within(SILENCE).is_none()
    }

    /// Discards and counts the datagrams in the receive buffer; no other thread may receive
    /// meanwhile
    ///
    /// # Errors
    /// The system call's error.
    pub fn drain_now(&self) -> io::Result<usize> {
        let mut count = 0;
        self.take_in(|_| count += 1)?;
        Ok(count)
    }

    /// Passes the datagrams in the receive buffer to `each`, up to 64 bytes of each datagram
    ///
    /// No other thread may receive meanwhile, because the socket is non-blocking during the call.
    ///
    /// # Errors
    /// The system call's error.
    pub fn take_in(&self, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        let mut buf = [0; 64];
        self.0.set_nonblocking(true)?;
        loop {
            match self.0.recv(&mut buf) {
                Ok(len) => each(buf.get(..len).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        self.0.set_nonblocking(false)
    }

    /// Discards and counts datagrams until none arrives within [`SILENCE`]
    #[must_use]
    pub fn drain(&self) -> usize {
        std::iter::from_fn(|| self.recv_within(SILENCE)).count()
    }
}

/// Sends numbered datagrams to the socket itself and receives them in any order, until `stop`;
/// returns the number of sent and of lost ones
///
/// At most 100 are on their way, so that no buffer overflows. It sends nothing while another thread
/// holds `gate`. A datagram is lost if nothing arrives for `patience`.
///
/// # Panics
/// If a datagram arrives twice, or a system call fails.
pub fn numbered(
    udp: &Udp,
    stop: &AtomicBool,
    gate: &Mutex<()>,
    patience: Duration,
) -> (u32, usize) {
    const AT_ONCE: usize = 100;
    let mut missing: VecDeque<u32> = VecDeque::new();
    let (mut number, mut lost, mut last) = (0_u32, 0, Instant::now());
    while !stop.load(Relaxed) || !missing.is_empty() {
        while !stop.load(Relaxed) && missing.len() < AT_ONCE {
            let _open = gate.lock().expect("no thread panics with it");
            let sent = udp.send(&number.to_be_bytes(), udp.address());
            sent.expect("the buffer has room");
            missing.push_back(number);
            number += 1;
        }
        if let Some(payload) = udp.recv_within(Duration::from_millis(5)) {
            let number = payload.try_into().map(u32::from_be_bytes);
            let place = missing.iter().position(|&missing| Ok(missing) == number);
            missing.remove(place.expect("each arrives once"));
            last = Instant::now();
        } else if last.elapsed() > patience {
            lost += missing.len();
            missing.clear();
        }
    }
    (number, lost)
}

/// Accepts one TCP connection, echoes all data, and returns their total length at the end
///
/// # Errors
/// The system call's error; `WouldBlock` if no peer connects, or the peer is silent, for
/// [`TIMEOUT`].
pub fn tcp_echo(listener: &TcpListener) -> io::Result<usize> {
    tcp_echo_within(listener, TIMEOUT)
}

/// Like [`tcp_echo`], with another timeout
///
/// # Errors
/// As [`tcp_echo`].
pub fn tcp_echo_within(listener: &TcpListener, timeout: Duration) -> io::Result<usize> {
    // On Linux a receive timeout also limits `accept`, but std does not offer it on listeners.
    UdpSocket::from(listener.as_fd().try_clone_to_owned()?).set_read_timeout(Some(timeout))?;
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    let mut buf = [0; 4096];
    let mut total = 0;
    loop {
        let len = stream.read(&mut buf)?;
        if len == 0 {
            return Ok(total);
        }
        stream.write_all(buf.get(..len).unwrap_or_default())?;
        total += len;
    }
}

/// Connects, sends `data` and returns the answer
///
/// # Errors
/// The system call's error; `TimedOut` or `WouldBlock` after [`TIMEOUT`].
pub fn tcp_exchange(to: SocketAddr, data: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&to, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.write_all(data)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut back = Vec::new();
    stream.read_to_end(&mut back)?;
    Ok(back)
}

/// Sends an ICMP echo request from a raw socket
///
/// Returns whether the reply with the same data arrives within `timeout`.
///
/// # Errors
/// EPERM without CAP_NET_RAW; otherwise the system call's error.
pub fn ping(to: IpAddr, data: &[u8], timeout: Duration) -> io::Result<bool> {
    let (domain, protocol, request, reply, header_len) = match to {
        IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP, 8, 0, 20),
        // A raw IPv6 socket gets no IP header, and the kernel fills in the checksum.
        IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6, 128, 129, 0),
    };
    let raw = socket_with(
        domain,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(protocol),
    )?;
    // std has no raw sockets; `connect`, `send` and timeouts work alike through `UdpSocket`.
    let socket = UdpSocket::from(raw);
    socket.connect((to, 0))?;
    let id = socket.as_fd().as_raw_fd().to_be_bytes();
    let mut message = vec![request, 0, 0, 0, id[2], id[3], 0, 1];
    message.extend(data);
    if to.is_ipv4() {
        let checksum = internet_checksum(&message);
        message.splice(2..4, checksum.to_be_bytes());
    }
    socket.send(&message)?;

    let deadline = Instant::now() + timeout;
    let mut buf = vec![0; usize::from(u16::MAX)];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        socket.set_read_timeout(Some(left))?;
        let len = match socket.recv(&mut buf) {
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        };
        let got = buf.get(header_len..len).unwrap_or_default();
        if got.first() == Some(&reply) && got.get(4..) == message.get(4..) {
            return Ok(true);
        }
    }
}

/// Returns the checksum of RFC 1071
fn internet_checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    !u16::try_from(folded).expect("twice folded, it fits")
}
