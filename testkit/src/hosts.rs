//! Other hosts, each a network namespace behind a link
//!
//! The namespace of this process is the router or the bridge between them.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::link;
use crate::netns::Namespace;

/// A host behind a link
#[derive(Debug)]
pub struct Host {
    /// The host's network namespace
    pub namespace: Namespace,
    /// The host's IPv4 address
    pub v4: IpAddr,
    /// The host's IPv6 address
    pub v6: IpAddr,
    /// Name of this end of the link; the host's end is called `eth0`
    pub link: &'static str,
}

impl Host {
    /// Makes host number `number` of a subnet, and the link to the host
    fn new(link: &'static str, subnet: u8, number: u8) -> io::Result<Self> {
        let namespace = Namespace::new()?;
        link::veth(link, "eth0", &namespace)?;
        link::up(link)?;
        let [v4, v6] = addresses(subnet, number);
        namespace.run(|| {
            link::up("eth0")?;
            link::address("eth0", v4, V4_PREFIX)?;
            link::address("eth0", v6, V6_PREFIX)?;
            link::wait_for_carrier("eth0")
        })?;
        link::wait_for_carrier(link)?;
        Ok(Self {
            namespace,
            v4,
            v6,
            link,
        })
    }
}

const V4_PREFIX: u8 = 24;
const V6_PREFIX: u8 = 64;

fn addresses(subnet: u8, host: u8) -> [IpAddr; 2] {
    [
        Ipv4Addr::new(10, 0, subnet, host).into(),
        Ipv6Addr::new(0xfd00 + u16::from(subnet), 0, 0, 0, 0, 0, 0, host.into()).into(),
    ]
}

/// This process's namespace as a router between two hosts in different subnets
///
/// ```text
/// client 10.0.0.2, fd00::2 ── to-client 10.0.0.1, fd00::1 ┐
///                                                         │ the calling process
/// server 10.0.1.2, fd01::2 ── to-server 10.0.1.1, fd01::1 ┘
/// ```
#[derive(Debug)]
pub struct Router {
    /// The first host
    pub client: Host,
    /// The second host
    pub server: Host,
}

impl Router {
    /// Makes both hosts, links, addresses and routes
    ///
    /// # Errors
    /// The kernel's error.
    pub fn new() -> io::Result<Self> {
        link::no_duplicate_detection()?;
        let host = |link, subnet| -> io::Result<Host> {
            let host = Host::new(link, subnet, 2)?;
            let [v4, v6] = addresses(subnet, 1);
            link::address(link, v4, V4_PREFIX)?;
            link::address(link, v6, V6_PREFIX)?;
            host.namespace.run(|| {
                link::default_route(v4)?;
                link::default_route(v6)
            })?;
            Ok(host)
        };
        let router = Self {
            client: host("to-client", 0)?,
            server: host("to-server", 1)?,
        };
        link::forward()?;
        Ok(router)
    }
}

/// This process's namespace as a bridge between two hosts in one subnet
///
/// The bridge's packets pass the IP hooks (`br_netfilter`).
///
/// ```text
/// left  10.0.2.2, fd02::2 ── to-left  ┐
///                                     ├─ br0, the calling process
/// right 10.0.2.3, fd02::3 ── to-right ┘
/// ```
#[derive(Debug)]
pub struct Bridge {
    /// The first host
    pub left: Host,
    /// The second host
    pub right: Host,
}

impl Bridge {
    /// Name of the bridge itself
    pub const LINK: &str = "br0";

    /// Makes both hosts, links and the bridge
    ///
    /// # Errors
    /// The kernel's error; `NotFound` with a hint if `br_netfilter` is not loaded.
    pub fn new() -> io::Result<Self> {
        let bridge = Self {
            left: Host::new("to-left", 2, 2)?,
            right: Host::new("to-right", 2, 3)?,
        };
        link::bridge(Self::LINK)?;
        link::up(Self::LINK)?;
        for host in [&bridge.left, &bridge.right] {
            link::set_master(host.link, Self::LINK)?;
        }
        for tables in ["iptables", "ip6tables"] {
            let setting = format!("/proc/sys/net/bridge/bridge-nf-call-{tables}");
            fs::write(&setting, "1").map_err(|error| {
                let reason = format!("{setting}: {error}; try `modprobe br_netfilter`");
                io::Error::new(error.kind(), reason)
            })?;
        }
        Ok(bridge)
    }
}
