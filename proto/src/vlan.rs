//! The VLAN tag of a bridged packet

use byteorder::{BigEndian, ByteOrder};

use crate::attr::Attrs;
use crate::consts::{NFQA_VLAN, NFQA_VLAN_PROTO, NFQA_VLAN_TCI};
use crate::error::DecodeError;

/// A VLAN tag, which the kernel has removed from the link-layer header (`NFQA_VLAN`)
///
/// Always both halves: the kernel sends both. It refuses a verdict with one half, and drops the
/// packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_structs, reason = "a tag is these 32 bits")]
pub struct Vlan {
    /// Tag protocol identifier: `0x8100` (802.1Q), `0x88a8` (802.1ad)
    pub proto: u16,
    /// Tag control information: priority (3 bits), drop eligible (1), VLAN id (12)
    pub tci: u16,
}

impl Vlan {
    /// The VLAN id: the low 12 bits of the tag control information
    #[must_use]
    pub const fn id(self) -> u16 {
        self.tci & 0x0fff
    }

    /// Decodes the value of the attribute, with its members in any order
    ///
    /// # Errors
    /// A member is broken, too short or missing. Offsets count from the start of `nested`.
    pub fn parse(nested: &[u8]) -> Result<Self, DecodeError> {
        let (mut proto, mut tci) = (None, None);
        for attr in Attrs::new(nested) {
            let attr = attr.map_err(|error| error.within(NFQA_VLAN))?;
            let member = match attr.kind {
                NFQA_VLAN_PROTO => &mut proto,
                NFQA_VLAN_TCI => &mut tci,
                _ => continue,
            };
            let value = attr
                .value
                .first_chunk::<2>()
                .ok_or(DecodeError::AttributeShort {
                    kind: attr.kind,
                    within: Some(NFQA_VLAN),
                    offset: attr.offset,
                    needed: 2,
                    had: attr.value.len(),
                })?;
            *member = Some(BigEndian::read_u16(value));
        }
        let missing = |kind| DecodeError::MissingAttribute {
            kind,
            within: Some(NFQA_VLAN),
            offset: 0,
        };
        Ok(Self {
            proto: proto.ok_or(missing(NFQA_VLAN_PROTO))?,
            tci: tci.ok_or(missing(NFQA_VLAN_TCI))?,
        })
    }
}
