//! Configuration of queues (`NFQNL_MSG_CONFIG`)

use byteorder::{BigEndian, ByteOrder};

use crate::consts::{
    CONFIG_CMD_LEN, CONFIG_PARAMS_LEN, NFQA_CFG_CMD, NFQA_CFG_FLAGS, NFQA_CFG_MASK,
    NFQA_CFG_PARAMS, NFQA_CFG_QUEUE_MAXLEN, NFQNL_CFG_CMD_BIND, NFQNL_CFG_CMD_PF_BIND,
    NFQNL_CFG_CMD_PF_UNBIND, NFQNL_CFG_CMD_UNBIND, NFQNL_MSG_CONFIG,
};
use crate::error::EncodeError;
use crate::types::{ConfigFlags, CopyMode, Family};
use crate::write::{MessageWriter, RequestHeader};

/// Settings of a queue; the kernel keeps its setting for each one not named here
///
/// A new queue has [`CopyMode::None`], a maximum length of 1024 packets and no flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct QueueConfig {
    copy: Option<(CopyMode, u32)>,
    maxlen: Option<u32>,
    flags: Option<(ConfigFlags, ConfigFlags)>,
    optional_flags: ConfigFlags,
}

impl QueueConfig {
    /// No settings
    #[must_use]
    pub const fn new() -> Self {
        Self {
            copy: None,
            maxlen: None,
            flags: None,
            optional_flags: ConfigFlags::empty(),
        }
    }

    /// Sets how much of each packet the kernel sends
    ///
    /// `range` is the maximum number of payload bytes, counted from the network header; only
    /// [`CopyMode::Packet`] uses it. 0 and any range above 65531
    /// ([`MAX_PAYLOAD`](crate::consts::MAX_PAYLOAD)) mean 65531, so the kernel always truncates a
    /// longer packet.
    #[must_use]
    #[doc(alias = "NFQA_CFG_PARAMS")]
    #[doc(alias = "nfq_set_mode")]
    pub const fn copy_mode(mut self, mode: CopyMode, range: u32) -> Self {
        self.copy = Some((mode, range));
        self
    }

    /// Sets the maximum number of packets in the queue
    ///
    /// The default is 1024. When the queue is full, the kernel drops further packets, or accepts
    /// them with [`ConfigFlags::FAIL_OPEN`]. A queue with a maximum of 0 is always full, so the
    /// kernel drops or accepts every packet.
    ///
    /// Linux 6.12.83, 6.18.24, 7.0 and later kernels keep at most 65,536 waiting packets in a
    /// queue, even if the maximum is higher. Since Linux 2.6.20.
    #[must_use]
    #[doc(alias = "NFQA_CFG_QUEUE_MAXLEN")]
    #[doc(alias = "nfq_set_queue_maxlen")]
    pub const fn maxlen(mut self, packets: u32) -> Self {
        self.maxlen = Some(packets);
        self
    }

    /// Switches each flag in `mask` on if it is in `flags`, and off otherwise
    ///
    /// Repeated calls add up, and the latest call wins for each flag. Since Linux 3.6; each of
    /// [`ConfigFlags`] has its own minimum version, and a kernel without the flag refuses the
    /// request.
    #[must_use]
    #[doc(alias = "NFQA_CFG_FLAGS")]
    #[doc(alias = "NFQA_CFG_MASK")]
    #[doc(alias = "nfq_set_queue_flags")]
    pub const fn flags(mut self, mask: ConfigFlags, flags: ConfigFlags) -> Self {
        let (old_mask, old_flags) = match self.flags {
            Some(named) => named,
            None => (ConfigFlags::empty(), ConfigFlags::empty()),
        };
        let kept = old_flags.difference(mask);
        self.flags = Some((old_mask.union(mask), kept.union(flags.intersection(mask))));
        self.optional_flags = self.optional_flags.difference(mask);
        self
    }

    /// Switches flags on: short for [`flags(flags, flags)`](Self::flags)
    #[must_use]
    pub const fn enable(self, flags: ConfigFlags) -> Self {
        self.flags(flags, flags)
    }

    /// Switches flags on if the kernel supports them
    ///
    /// [`ConfigRequest::encode`] leaves these flags out. The crate `nfqnl` sends a message for each
    /// of them after the bind, and goes on without the flags that the kernel refuses. The first
    /// packets may come before these flags are on.
    #[must_use]
    pub const fn enable_if_supported(mut self, flags: ConfigFlags) -> Self {
        if let Some((mask, on)) = self.flags {
            self.flags = Some((mask.difference(flags), on.difference(flags)));
        }
        self.optional_flags = self.optional_flags.union(flags);
        self
    }

    /// The copy mode and range, if named
    #[must_use]
    pub const fn get_copy_mode(&self) -> Option<(CopyMode, u32)> {
        self.copy
    }

    /// The maximum length, if named
    #[must_use]
    pub const fn get_maxlen(&self) -> Option<u32> {
        self.maxlen
    }

    /// The mask and the flags, if named; without the flags of
    /// [`enable_if_supported`](Self::enable_if_supported)
    #[must_use]
    pub const fn get_flags(&self) -> Option<(ConfigFlags, ConfigFlags)> {
        self.flags
    }

    /// The flags of [`enable_if_supported`](Self::enable_if_supported)
    #[must_use]
    pub const fn get_optional_flags(&self) -> ConfigFlags {
        self.optional_flags
    }
}

/// One CONFIG message: a command, settings, or both
///
/// A [`bind`](Self::bind) with settings creates the queue with the settings in force, so that no
/// packet meets the queue without them. If the kernel lacks one of the flags, it refuses the whole
/// message and does not create the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConfigRequest {
    queue: u16,
    command: Option<(u8, Family)>,
    config: QueueConfig,
}

impl ConfigRequest {
    /// Binds a queue to the sending socket, and applies settings
    #[must_use]
    pub const fn bind(queue: u16, config: QueueConfig) -> Self {
        Self {
            queue,
            command: Some((NFQNL_CFG_CMD_BIND, Family::UNSPEC)),
            config,
        }
    }

    /// Unbinds a queue; the kernel drops its waiting packets
    #[must_use]
    pub const fn unbind(queue: u16) -> Self {
        let command = Some((NFQNL_CFG_CMD_UNBIND, Family::UNSPEC));
        Self {
            queue,
            command,
            config: QueueConfig::new(),
        }
    }

    /// Binds a protocol family; since Linux 3.8 the kernel only acknowledges it
    #[must_use]
    pub const fn bind_pf(family: Family) -> Self {
        Self {
            queue: 0,
            command: Some((NFQNL_CFG_CMD_PF_BIND, family)),
            config: QueueConfig::new(),
        }
    }

    /// Unbinds a protocol family; since Linux 3.8 the kernel only acknowledges it
    #[must_use]
    pub const fn unbind_pf(family: Family) -> Self {
        let command = Some((NFQNL_CFG_CMD_PF_UNBIND, family));
        Self {
            queue: 0,
            command,
            config: QueueConfig::new(),
        }
    }

    /// Changes the settings of a bound queue
    #[must_use]
    pub const fn update(queue: u16, config: QueueConfig) -> Self {
        Self {
            queue,
            command: None,
            config,
        }
    }

    /// A buffer of this size has room for any request
    pub const MAX_LEN: usize = 64;

    /// Writes the message to the front of `buf`, and returns its length
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
            params[4] = mode.to_raw();
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
