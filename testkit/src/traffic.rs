//! UDP, TCP and ICMP traffic, none of which waits for ever
//!
//! A packet that waits in a queue stays charged to its sender's buffer. So senders here have a large one and don't
//! block: without a verdict for some 250 packets, a plain blocking sender would stand still.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};

use crate::sys;

/// How long receivers wait
pub const TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for what should not come
pub const SILENCE: Duration = Duration::from_millis(200);
/// `127.0.0.1`
pub const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// `::1`
pub const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// A UDP socket that sends all but without blocking, and receives with a timeout
#[derive(Debug)]
pub struct Udp(UdpSocket);

impl Udp {
    /// Binds to an address; port 0 for any
    ///
    /// # Errors
    /// What the system says.
    pub fn bind(address: IpAddr, port: u16) -> io::Result<Self> {
        const SEND_BUFFER: libc::c_int = 1 << 26;
        let socket = UdpSocket::bind((address, port))?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        // Non-blocking mode would be for receiving too.
        socket.set_write_timeout(Some(Duration::from_millis(1)))?;
        for buffer in [libc::SO_SNDBUF, libc::SO_RCVBUF] {
            sys::set_option(&socket, libc::SOL_SOCKET, buffer, SEND_BUFFER)?;
        }
        // Beyond the system's limit for the machine's root alone.
        for buffer in [libc::SO_SNDBUFFORCE, libc::SO_RCVBUFFORCE] {
            let _ = sys::set_option(&socket, libc::SOL_SOCKET, buffer, SEND_BUFFER);
        }
        Ok(Self(socket))
    }

    /// Where it is bound
    ///
    /// # Panics
    /// Never: it is bound.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.0.local_addr().expect("a bound socket has an address")
    }

    /// Marks what it sends (`SO_MARK`)
    ///
    /// # Errors
    /// EPERM without CAP_NET_ADMIN.
    pub fn set_mark(&self, mark: u32) -> io::Result<()> {
        self.set(
            libc::SO_MARK,
            libc::c_int::from_ne_bytes(mark.to_ne_bytes()),
        )
    }

    /// Gives what it sends a priority (`SO_PRIORITY`)
    ///
    /// # Errors
    /// EPERM above 6 without CAP_NET_ADMIN.
    pub fn set_priority(&self, priority: u8) -> io::Result<()> {
        self.set(libc::SO_PRIORITY, priority.into())
    }

    /// Has the kernel cut what it sends into datagrams of so many bytes, as late as it can: until then, one large packet
    /// goes its way (`UDP_SEGMENT`, "GSO"); and has it not cut what it receives (`UDP_GRO`). Linux 5.0
    ///
    /// # Errors
    /// What the system says.
    pub fn send_segmented(&self, bytes: u16) -> io::Result<()> {
        for (option, value) in [(libc::UDP_SEGMENT, bytes.into()), (libc::UDP_GRO, 1)] {
            sys::set_option(&self.0, libc::SOL_UDP, option, value)?;
        }
        Ok(())
    }

    /// Asks for times of receipt (`SO_TIMESTAMP`); while any socket does, the kernel takes them for every packet
    ///
    /// # Errors
    /// What the system says.
    pub fn want_timestamps(&self) -> io::Result<()> {
        self.set(libc::SO_TIMESTAMP, 1)
    }

    fn set(&self, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
        sys::set_option(&self.0, libc::SOL_SOCKET, option, value)
    }

    /// Sends a datagram
    ///
    /// # Errors
    /// What the system says; `WouldBlock` when the send buffer is full of packets that wait.
    pub fn send(&self, payload: &[u8], to: SocketAddr) -> io::Result<()> {
        self.0.send_to(payload, to).map(|_| ())
    }

    /// Receives a datagram's payload; `None` if none comes in [`TIMEOUT`]
    #[must_use]
    pub fn recv(&self) -> Option<Vec<u8>> {
        self.recv_within(TIMEOUT)
    }

    /// Receives a datagram's payload; `None` if none comes in time
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

    /// Receives a datagram's payload into `buf`, and returns how long it is; `None` if none comes in time
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

    /// Whether nothing comes for a moment
    #[must_use]
    pub fn is_silent(&self) -> bool {
        self.recv_within(SILENCE).is_none()
    }

    /// How many datagrams are there already; not while another thread receives
    ///
    /// # Errors
    /// What the system says.
    pub fn drain_now(&self) -> io::Result<usize> {
        let mut count = 0;
        self.take_in(|_| count += 1)?;
        Ok(count)
    }

    /// Receives the datagrams that are there already, as far as 64 bytes of each; not while another thread receives
    ///
    /// # Errors
    /// What the system says.
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

    /// How many datagrams come until none does for a moment
    #[must_use]
    pub fn drain(&self) -> usize {
        std::iter::from_fn(|| self.recv_within(SILENCE)).count()
    }
}

/// Waits for one TCP connection, sends back what it gets, and returns when the peer is done
///
/// # Errors
/// What the system says; `WouldBlock` if nobody connects in [`TIMEOUT`], or the peer stands still for as long.
pub fn tcp_echo(listener: &TcpListener) -> io::Result<usize> {
    tcp_echo_within(listener, TIMEOUT)
}

/// The same, with another timeout
///
/// # Errors
/// As [`tcp_echo`].
pub fn tcp_echo_within(listener: &TcpListener, timeout: Duration) -> io::Result<usize> {
    // On Linux a receive timeout is for `accept` too; only std does not offer it on listeners.
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

/// Connects, sends `data` and returns what comes back
///
/// # Errors
/// What the system says; `TimedOut` or `WouldBlock` after [`TIMEOUT`].
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

/// Sends an ICMP echo request from a raw socket, and says whether the reply with the same data comes in time
///
/// # Errors
/// EPERM without CAP_NET_RAW; else what the system says.
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
    // For `connect`, `send` and timeouts a raw socket is as good as a UDP one; only std has no name for it.
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

/// RFC 1071
fn internet_checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    !u16::try_from(folded).expect("twice folded, it fits")
}
