//! Packets that outlive their receive buffer

use nfqnl_proto::{Packet, PacketIndex, PacketKey};

/// A copy of a packet, for other threads and later times
///
/// The one place where this crate copies a packet. Where the [`PacketKey`] is enough, keep that: it is 8 bytes, and
/// `Copy`.
#[derive(Clone)]
pub struct OwnedPacket {
    bytes: Box<[u8]>,
    index: PacketIndex,
}

impl OwnedPacket {
    /// Copies a packet
    #[must_use]
    pub fn new(packet: &Packet<'_>) -> Self {
        Self {
            bytes: packet.as_bytes().into(),
            index: packet.index(),
        }
    }

    /// The packet
    #[must_use]
    pub fn packet(&self) -> Packet<'_> {
        self.index.over(&self.bytes)
    }

    /// What it is answered by
    #[must_use]
    pub fn key(&self) -> PacketKey {
        self.packet().key()
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
