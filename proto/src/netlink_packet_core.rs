//! Owned messages for the rust-netlink stack
//!
//! [`QueueMessage`] is the inner message of a `netlink_packet_core::NetlinkMessage`, so that
//! `netlink-proto` and related crates can carry NFQUEUE messages. A [`QueueMessage`] copies its
//! bytes, unlike the views of this crate.

use std::{vec, vec::Vec};

use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};

use crate::consts::{MESSAGE_HEADER_LEN, message_type};
use crate::{
    ConfigRequest, Decision, DecodeError, EncodeError, Packet, PacketKey, PlainVerdict,
    RequestHeader, consts::NFQNL_MSG_PACKET,
};

/// An owned message of the queue subsystem
///
/// Messages are equal if their types and bodies are equal. The flags, the sequence number and the
/// port id belong to the `NetlinkHeader`.
#[derive(Clone, Debug)]
pub struct QueueMessage {
    /// The whole message, including the netlink header
    bytes: Vec<u8>,
    message_type: u16,
}

impl QueueMessage {
    /// A verdict on one packet
    ///
    /// # Errors
    /// [`EncodeError::AttributeTooLong`] if the payload or a raw attribute is longer than 65531
    /// bytes.
    pub fn verdict(key: PacketKey, decision: &Decision<'_>) -> Result<Self, EncodeError> {
        Self::encode(
            crate::consts::NFQNL_MSG_VERDICT,
            decision.max_len(),
            |buf| decision.encode(buf, key.queue(), key.id(), RequestHeader::default()),
        )
    }

    /// A verdict on every waiting packet up to `last`
    ///
    /// # Errors
    /// Currently none.
    pub fn batch_verdict(last: PacketKey, verdict: &PlainVerdict) -> Result<Self, EncodeError> {
        Self::encode(
            crate::consts::NFQNL_MSG_VERDICT_BATCH,
            Decision::SMALL_LEN,
            |buf| verdict.encode_batch(buf, last.queue(), last.id(), RequestHeader::default()),
        )
    }

    /// A configuration request
    ///
    /// # Errors
    /// Currently none.
    pub fn config(request: &ConfigRequest) -> Result<Self, EncodeError> {
        Self::encode(
            crate::consts::NFQNL_MSG_CONFIG,
            ConfigRequest::MAX_LEN,
            |buf| request.encode(buf, RequestHeader::default()),
        )
    }

    fn encode(
        message: u8,
        max_len: usize,
        encode: impl FnOnce(&mut [u8]) -> Result<usize, EncodeError>,
    ) -> Result<Self, EncodeError> {
        let mut bytes = vec![0; max_len];
        let len = encode(&mut bytes)?;
        bytes.truncate(len);
        Ok(Self {
            bytes,
            message_type: message_type(message),
        })
    }

    /// The packet, if this is a packet message
    #[must_use]
    pub fn packet(&self) -> Option<Packet<'_>> {
        Packet::parse(&self.bytes).ok()
    }

    /// The bytes behind the netlink header
    #[must_use]
    pub fn body(&self) -> &[u8] {
        self.bytes.get(MESSAGE_HEADER_LEN..).unwrap_or_default()
    }
}

impl PartialEq for QueueMessage {
    fn eq(&self, other: &Self) -> bool {
        (self.message_type, self.body()) == (other.message_type, other.body())
    }
}

impl Eq for QueueMessage {}

impl core::hash::Hash for QueueMessage {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        (self.message_type, self.body()).hash(state);
    }
}

impl NetlinkSerializable for QueueMessage {
    fn message_type(&self) -> u16 {
        self.message_type
    }

    fn buffer_len(&self) -> usize {
        self.body().len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(self.body());
    }
}

impl NetlinkDeserializable for QueueMessage {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let len = u32::try_from(MESSAGE_HEADER_LEN + payload.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(MESSAGE_HEADER_LEN + payload.len());
        bytes.extend_from_slice(&len.to_ne_bytes());
        bytes.extend_from_slice(&header.message_type.to_ne_bytes());
        bytes.extend_from_slice(&header.flags.to_ne_bytes());
        bytes.extend_from_slice(&header.sequence_number.to_ne_bytes());
        bytes.extend_from_slice(&header.port_number.to_ne_bytes());
        bytes.extend_from_slice(payload);
        if header.message_type == message_type(NFQNL_MSG_PACKET) {
            Packet::parse(&bytes)?;
        }
        Ok(Self {
            bytes,
            message_type: header.message_type,
        })
    }
}
