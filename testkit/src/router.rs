//! Three hosts in a row: the calling process forwards between two namespaces

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::link;
use crate::netns::Namespace;

/// This process's namespace as a router, with a host on either side
///
/// ```text
/// client 10.0.0.2, fd00::2 ── to-client 10.0.0.1, fd00::1 ┐
///                                                         │ the calling process
/// server 10.0.1.2, fd01::2 ── to-server 10.0.1.1, fd01::1 ┘
/// ```
#[derive(Debug)]
pub struct Router {
    /// A host
    pub client: Host,
    /// Another
    pub server: Host,
}

/// A host behind the router
#[derive(Debug)]
pub struct Host {
    /// Where it lives
    pub namespace: Namespace,
    /// Its IPv4 address
    pub v4: IpAddr,
    /// Its IPv6 address
    pub v6: IpAddr,
    /// Name of the router's link to it; its own end is called `eth0`
    pub link: &'static str,
}

impl Router {
    /// Makes both hosts, links, addresses and routes
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new() -> io::Result<Self> {
        let router = Self {
            client: Host::new("to-client", 0)?,
            server: Host::new("to-server", 1)?,
        };
        link::forward()?;
        Ok(router)
    }
}

impl Host {
    fn new(link_name: &'static str, subnet: u8) -> io::Result<Self> {
        let [gateway, own] = [1, 2].map(|host| {
            let v4 = Ipv4Addr::new(10, 0, subnet, host);
            let v6 = Ipv6Addr::new(0xfd00 + u16::from(subnet), 0, 0, 0, 0, 0, 0, host.into());
            [(IpAddr::from(v4), 24), (IpAddr::from(v6), 64)]
        });
        let namespace = Namespace::new()?;
        link::veth(link_name, "eth0", &namespace)?;
        link::up(link_name)?;
        for (address, prefix) in gateway {
            link::address(link_name, address, prefix)?;
        }
        namespace.run(|| -> io::Result<()> {
            link::up("eth0")?;
            for (address, prefix) in own {
                link::address("eth0", address, prefix)?;
            }
            gateway
                .into_iter()
                .try_for_each(|(address, _)| link::default_route(address))
        })?;
        let [(v4, _), (v6, _)] = own;
        Ok(Self {
            namespace,
            v4,
            v6,
            link: link_name,
        })
    }
}
