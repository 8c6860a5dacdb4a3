//! Packets that outlive their receive buffer

use nfqnl_proto::{Packet, PacketKey};

/// A copy of a packet, to keep or to send to another thread
///
/// To answer a packet later, its [`PacketKey`] is enough: 8 bytes, and `Copy`. Apart from this
/// type, the library copies only packets read by requests.
#[derive(Clone)]
pub struct OwnedPacket {
    bytes: Box<[u8]>,
    /// The parsed packet, without its bytes
    packet: Packet<'static>,
}

impl OwnedPacket {
    /// Copies a packet
    #[must_use]
    pub fn new(packet: &Packet<'_>) -> Self {
        Self {
            bytes: packet.as_bytes().into(),
            packet: packet.over(&[]),
        }
    }

    /// Returns the packet
    #[must_use]
    pub fn packet(&self) -> Packet<'_> {
        self.packet.over(&self.bytes)
    }

    /// Returns the key to answer the packet
    #[must_use]
    pub fn key(&self) -> PacketKey {
        self.packet().key()
    }
}

impl From<&Packet<'_>> for OwnedPacket {
    fn from(packet: &Packet<'_>) -> Self {
        Self::new(packet)
    }
}

impl From<Packet<'_>> for OwnedPacket {
    fn from(packet: Packet<'_>) -> Self {
        Self::new(&packet)
    }
}

impl std::fmt::Debug for OwnedPacket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("OwnedPacket").field(&self.packet()).finish()
    }
}
