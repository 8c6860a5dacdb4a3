//! Links, addresses and routes (`linux/rtnetlink.h`, `linux/if_link.h`)

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use crate::netlink::{Message, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, attr, query, transact};
use crate::netns::Namespace;

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_OPERSTATE: u16 = 16;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IF_OPER_UP: u8 = 6;
const VETH_INFO_PEER: u16 = 1;
const IFLA_VLAN_ID: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// No duplicate address detection: an IPv6 address is usable immediately
const IFA_F_NODAD: u8 = 0x02;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RTN_UNICAST: u8 = 1;

/// Brings a link up
///
/// # Errors
/// The kernel's error, with the link's name.
pub fn up(name: &str) -> io::Result<()> {
    set_flags(name, IFF_UP)
}

/// Takes a link down; the kernel drops the link's packets from all queues
///
/// # Errors
/// The kernel's error, with the link's name.
pub fn down(name: &str) -> io::Result<()> {
    set_flags(name, 0)
}

const IFF_UP: u32 = 1;

fn set_flags(name: &str, flags: u32) -> io::Result<()> {
    let mut message = Message::new(RTM_NEWLINK, NLM_F_ACK, &ifinfo(flags, IFF_UP));
    message.text(IFLA_IFNAME, name);
    route_request(message, name)
}

/// Gives a link another name
///
/// # Errors
/// The kernel's error, with the link's name.
pub fn rename(name: &str, new: &str) -> io::Result<()> {
    let mut info = ifinfo(0, 0);
    info[4..8].copy_from_slice(&index(name)?.to_ne_bytes());
    let mut message = Message::new(RTM_NEWLINK, NLM_F_ACK, &info);
    message.text(IFLA_IFNAME, new);
    route_request(message, name)
}

/// Sets a link's MTU
///
/// # Errors
/// The kernel's error, with the link's name.
pub fn set_mtu(name: &str, mtu: u32) -> io::Result<()> {
    let mut message = Message::new(RTM_NEWLINK, NLM_F_ACK, &ifinfo(0, 0));
    message
        .text(IFLA_IFNAME, name)
        .attr(IFLA_MTU, &mtu.to_ne_bytes());
    route_request(message, name)
}

/// Makes a pair of Ethernet links: `name` here, and `peer` in another namespace
///
/// # Errors
/// The kernel's error, with the link's name.
pub fn veth(name: &str, peer: &str, namespace: &Namespace) -> io::Result<()> {
    let mut message = Message::new(
        RTM_NEWLINK,
        NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL,
        &ifinfo(0, 0),
    );
    let fd = namespace.file().as_raw_fd();
    message.text(IFLA_IFNAME, name).nest(IFLA_LINKINFO, |info| {
        info.text(IFLA_INFO_KIND, "veth")
            .nest(IFLA_INFO_DATA, |data| {
                data.nest(VETH_INFO_PEER, |other| {
                    other
                        .raw(&ifinfo(0, 0))
                        .text(IFLA_IFNAME, peer)
                        .attr(IFLA_NET_NS_FD, &fd.to_ne_bytes());
                });
            });
    });
    route_request(message, name)
}

/// Makes a link for the frames of `parent` with the tag of VLAN `id`
///
/// # Errors
/// The kernel's error, with the link's name.
pub fn vlan(name: &str, parent: &str, id: u16) -> io::Result<()> {
    let mut message = Message::new(
        RTM_NEWLINK,
        NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL,
        &ifinfo(0, 0),
    );
    message
        .text(IFLA_IFNAME, name)
        .attr(IFLA_LINK, &index(parent)?.to_ne_bytes())
        .nest(IFLA_LINKINFO, |info| {
            info.text(IFLA_INFO_KIND, "vlan")
                .nest(IFLA_INFO_DATA, |data| {
                    data.attr(IFLA_VLAN_ID, &id.to_ne_bytes());
                });
        });
    route_request(message, name)
}

/// Makes a bridge
///
/// # Errors
/// The kernel's error, with the link's name.
pub fn bridge(name: &str) -> io::Result<()> {
    let mut message = Message::new(
        RTM_NEWLINK,
        NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL,
        &ifinfo(0, 0),
    );
    message.text(IFLA_IFNAME, name).nest(IFLA_LINKINFO, |info| {
        info.text(IFLA_INFO_KIND, "bridge");
    });
    route_request(message, name)
}

/// Makes a link the port of a bridge
///
/// # Errors
/// The kernel's error, with the link's name.
pub fn set_master(name: &str, bridge: &str) -> io::Result<()> {
    let mut message = Message::new(RTM_NEWLINK, NLM_F_ACK, &ifinfo(0, 0));
    message
        .text(IFLA_IFNAME, name)
        .attr(IFLA_MASTER, &index(bridge)?.to_ne_bytes());
    route_request(message, name)
}

/// Gives a link an address
///
/// # Errors
/// The kernel's error, with the link's name.
pub fn address(name: &str, address: IpAddr, prefix: u8) -> io::Result<()> {
    let family = family(address);
    let mut ifaddr = vec![family, prefix, IFA_F_NODAD, 0];
    ifaddr.extend(index(name)?.to_ne_bytes());
    let mut message = Message::new(RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, &ifaddr);
    let bytes = octets(address);
    message.attr(IFA_LOCAL, &bytes).attr(IFA_ADDRESS, &bytes);
    route_request(message, name)
}

/// Adds the default route through a gateway
///
/// # Errors
/// The kernel's error.
pub fn default_route(gateway: IpAddr) -> io::Result<()> {
    let route = [
        family(gateway),
        0,
        0,
        0,
        RT_TABLE_MAIN,
        RTPROT_STATIC,
        0,
        RTN_UNICAST,
        0,
        0,
        0,
        0,
    ];
    let mut message = Message::new(RTM_NEWROUTE, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, &route);
    message.attr(RTA_GATEWAY, &octets(gateway));
    route_request(message, "default route")
}

/// Turns duplicate address detection off for links added later
///
/// Without this, the first packet is lost at times. A router asks for a neighbour from its
/// link-local address. Duplicate address detection delays the use of this address by up to two
/// seconds, and the router gives up after three.
///
/// # Errors
/// If /proc/sys is not writable.
pub fn no_duplicate_detection() -> io::Result<()> {
    // The kernel uses the larger value of the link and of `all`.
    fs::write("/proc/sys/net/ipv6/conf/all/accept_dad", "0")?;
    fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0")
}

/// Makes this namespace forward IPv4 and IPv6
///
/// # Errors
/// If /proc/sys is not writable.
pub fn forward() -> io::Result<()> {
    // /proc/sys shows the calling thread's namespace.
    fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")
}

/// Returns a link's index
///
/// # Errors
/// If the link does not exist.
pub fn index(name: &str) -> io::Result<u32> {
    let answer = get(name)?;
    let index = answer.get(4..).and_then(|rest| rest.first_chunk());
    index
        .map(|index| u32::from_ne_bytes(*index))
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Returns a link's name by its index
#[must_use]
pub fn name(index: u32) -> Option<String> {
    let mut ifinfo = ifinfo(0, 0);
    ifinfo[4..8].copy_from_slice(&index.to_ne_bytes());
    let message = Message::new(RTM_GETLINK, 0, &ifinfo);
    let answer = query(libc::NETLINK_ROUTE, message).ok()?.pop()?;
    let name = attr(answer.get(IFINFO_LEN..)?, IFLA_IFNAME)?;
    let name = name.strip_suffix(&[0]).unwrap_or(name);
    String::from_utf8(name.to_vec()).ok()
}

/// Waits until a link carries packets
///
/// The kernel drops packets until a moment after both ends are up.
///
/// # Errors
/// If the link does not exist, or its other end stays down.
pub fn wait_for_carrier(name: &str) -> io::Result<()> {
    const LIMIT: Duration = Duration::from_secs(30);
    let end = Instant::now() + LIMIT;
    loop {
        let answer = get(name)?;
        let state = attr(answer.get(IFINFO_LEN..).unwrap_or_default(), IFLA_OPERSTATE);
        if state == Some(&[IF_OPER_UP]) {
            return Ok(());
        }
        if Instant::now() >= end {
            return Err(about(name, &io::ErrorKind::TimedOut.into()));
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Returns a link's hardware address
///
/// # Errors
/// If the link does not exist.
pub fn mac(name: &str) -> io::Result<Vec<u8>> {
    let answer = get(name)?;
    attr(answer.get(IFINFO_LEN..).unwrap_or_default(), IFLA_ADDRESS)
        .map(<[u8]>::to_vec)
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn get(name: &str) -> io::Result<Vec<u8>> {
    let mut message = Message::new(RTM_GETLINK, 0, &ifinfo(0, 0));
    message.text(IFLA_IFNAME, name);
    let answer = query(libc::NETLINK_ROUTE, message).map_err(|error| about(name, &error))?;
    answer
        .into_iter()
        .next()
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

const IFINFO_LEN: usize = 16;

/// `struct ifinfomsg`
fn ifinfo(flags: u32, change: u32) -> [u8; IFINFO_LEN] {
    let mut bytes = [0; IFINFO_LEN];
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes[12..].copy_from_slice(&change.to_ne_bytes());
    bytes
}

fn family(address: IpAddr) -> u8 {
    let family = match address {
        IpAddr::V4(_) => libc::AF_INET,
        IpAddr::V6(_) => libc::AF_INET6,
    };
    u8::try_from(family).expect("a small number")
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn route_request(message: Message, what: &str) -> io::Result<()> {
    transact(libc::NETLINK_ROUTE, vec![message]).map_err(|error| about(what, &error))
}

fn about(what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}
