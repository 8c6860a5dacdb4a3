//! Configuring queues (`NFQNL_MSG_CONFIG`)

use byteorder::{BigEndian, ByteOrder};

use crate::consts::{
    CONFIG_CMD_LEN, CONFIG_PARAMS_LEN, NFQA_CFG_CMD, NFQA_CFG_FLAGS, NFQA_CFG_MASK,
    NFQA_CFG_PARAMS, NFQA_CFG_QUEUE_MAXLEN, NFQNL_CFG_CMD_BIND, NFQNL_CFG_CMD_PF_BIND,
    NFQNL_CFG_CMD_PF_UNBIND, NFQNL_CFG_CMD_UNBIND, NFQNL_MSG_CONFIG,
};
use crate::error::EncodeError;
use crate::types::{ConfigFlags, CopyMode, Family};
use crate::write::{MessageWriter, RequestHeader};

/// Settings of a queue; what is not named is left as it is
///
/// A queue is born with [`CopyMode::NONE`], a length of 1024 packets and no flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct QueueConfig {
    copy: Option<(CopyMode, u32)>,
    maxlen: Option<u32>,
    flags: Option<(ConfigFlags, ConfigFlags)>,
}

impl QueueConfig {
    /// No settings
    #[must_use]
    pub const fn new() -> Self {
        Self {
            copy: None,
            maxlen: None,
            flags: None,
        }
    }

    /// How much of each packet the kernel sends: the mode, and for [`CopyMode::PACKET`] the number of payload bytes
    ///
    /// The range counts from the network header. 0 and everything above 65531
    /// ([`MAX_PAYLOAD`](crate::consts::MAX_PAYLOAD)) mean 65531, so a longer packet is always cut. The other modes
    /// have no range. The kernel acknowledges an unknown mode and ignores it.
    #[must_use]
    #[doc(alias = "NFQA_CFG_PARAMS")]
    #[doc(alias = "nfq_set_mode")]
    pub const fn copy_mode(mut self, mode: CopyMode, range: u32) -> Self {
        self.copy = Some((mode, range));
        self
    }

    /// How many packets may wait at once; 0 makes the kernel drop everything. Linux 2.6.20
    #[must_use]
    #[doc(alias = "NFQA_CFG_QUEUE_MAXLEN")]
    #[doc(alias = "nfq_set_queue_maxlen")]
    pub const fn maxlen(mut self, packets: u32) -> Self {
        self.maxlen = Some(packets);
        self
    }

    /// Sets the switches named in `mask` as they stand in `flags`. Linux 3.6, and see each of [`ConfigFlags`]
    #[must_use]
    #[doc(alias = "NFQA_CFG_FLAGS")]
    #[doc(alias = "NFQA_CFG_MASK")]
    #[doc(alias = "nfq_set_queue_flags")]
    pub const fn flags(mut self, mask: ConfigFlags, flags: ConfigFlags) -> Self {
        self.flags = Some((mask, flags));
        self
    }

    /// The mode and range, if named
    #[must_use]
    pub const fn get_copy_mode(&self) -> Option<(CopyMode, u32)> {
        self.copy
    }

    /// The length limit, if named
    #[must_use]
    pub const fn get_maxlen(&self) -> Option<u32> {
        self.maxlen
    }

    /// Mask and flags, if named
    #[must_use]
    pub const fn get_flags(&self) -> Option<(ConfigFlags, ConfigFlags)> {
        self.flags
    }
}

/// One CONFIG message: a command, settings, or both at once
///
/// The kernel refuses the whole of [`bind`](Self::bind) with settings if it does not know a flag; otherwise the queue
/// begins to exist with its settings in force, and no packet falls into the gap between two messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConfigRequest {
    queue: u16,
    command: Option<(u8, Family)>,
    config: QueueConfig,
}

impl ConfigRequest {
    /// Binds a queue to the sending socket, with settings
    #[must_use]
    pub const fn bind(queue: u16, config: QueueConfig) -> Self {
        Self {
            queue,
            command: Some((NFQNL_CFG_CMD_BIND, Family::UNSPEC)),
            config,
        }
    }

    /// Gives a queue up: the kernel drops the packets that wait in it
    #[must_use]
    pub const fn unbind(queue: u16) -> Self {
        let command = Some((NFQNL_CFG_CMD_UNBIND, Family::UNSPEC));
        Self {
            queue,
            command,
            config: QueueConfig::new(),
        }
    }

    /// Binds a protocol family; Linux acknowledges and does nothing since 3.8
    #[must_use]
    pub const fn bind_pf(family: Family) -> Self {
        Self {
            queue: 0,
            command: Some((NFQNL_CFG_CMD_PF_BIND, family)),
            config: QueueConfig::new(),
        }
    }

    /// Unbinds a protocol family; Linux acknowledges and does nothing since 3.8
    #[must_use]
    pub const fn unbind_pf(family: Family) -> Self {
        let command = Some((NFQNL_CFG_CMD_PF_UNBIND, family));
        Self {
            queue: 0,
            command,
            config: QueueConfig::new(),
        }
    }

    /// Changes settings of a queue that is bound
    #[must_use]
    pub const fn update(queue: u16, config: QueueConfig) -> Self {
        Self {
            queue,
            command: None,
            config,
        }
    }

    /// Room enough for any request
    pub const MAX_LEN: usize = 64;

    /// Writes the message to the front of `buf`, and says how long it is
    ///
    /// # Errors
    /// [`EncodeError::NoSpace`] if `buf` is too small.
    pub fn encode(&self, buf: &mut [u8], header: RequestHeader) -> Result<usize, EncodeError> {
        let mut message = MessageWriter::new(buf, NFQNL_MSG_CONFIG, 0, self.queue, header);
        if let Some((command, family)) = self.command {
            let mut cmd = [0; CONFIG_CMD_LEN];
            cmd[0] = command;
            BigEndian::write_u16(&mut cmd[2..], u16::from(family.0));
            message.attr(NFQA_CFG_CMD, &cmd);
        }
        if let Some((mode, range)) = self.config.copy {
            let mut params = [0; CONFIG_PARAMS_LEN];
            BigEndian::write_u32(&mut params[..4], range);
            params[4] = mode.0;
            message.attr(NFQA_CFG_PARAMS, &params);
        }
        if let Some(maxlen) = self.config.maxlen {
            message.be32(NFQA_CFG_QUEUE_MAXLEN, maxlen);
        }
        if let Some((mask, flags)) = self.config.flags {
            message.be32(NFQA_CFG_MASK, mask.bits());
            message.be32(NFQA_CFG_FLAGS, flags.bits());
        }
        message.finish()
    }
}
