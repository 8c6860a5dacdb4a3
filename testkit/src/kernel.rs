//! The running kernel, where tests have to know what it can

use std::{env, fs};

use crate::netns::is_rootless;

/// Whether the running kernel is this version or a later one
///
/// For what a kernel is expected to do differently: tests assert both, and skip neither.
///
/// # Panics
/// Without /proc.
#[must_use]
pub fn is_at_least(major: u32, minor: u32) -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("what uname -r says");
    version(&release).expect("a version") >= (major, minor)
}

/// Whether the running kernel drops what gets a new payload, without a word: since Linux 7.2, in the network namespace of an
/// ordinary user
#[must_use]
pub fn refuses_payloads() -> bool {
    is_rootless() && is_at_least(7, 2)
}

/// Whether `NFQNL_COMPLETE_KERNEL=1` says that the running kernel has all that can be asked for, as `tests/kernels/run` says
/// of Debian's; then what is not there is a failure
#[must_use]
pub fn is_complete() -> bool {
    env::var_os("NFQNL_COMPLETE_KERNEL").is_some_and(|value| value == "1")
}

/// Whether the running kernel has a function, in itself or in a loaded module; `None` if it does not say
#[must_use]
pub fn has_function(name: &str) -> Option<bool> {
    /// In every kernel that has queues
    const KNOWN: &str = "nfqnl_recv_verdict";
    if is_complete() {
        return Some(true);
    }
    let symbols = fs::read_to_string("/proc/kallsyms").ok()?;
    let has = |name| {
        symbols
            .lines()
            .any(|line| line.split_ascii_whitespace().nth(2) == Some(name))
    };
    has(KNOWN).then(|| has(name))
}

/// The first two numbers of a release like `6.12.95+deb12-s390x` or `7.3-rc1`
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release
        .split(|character: char| !character.is_ascii_digit())
        .map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert_eq!(version("5.10.0-46-cloud-amd64\n"), Some((5, 10)));
        assert_eq!(version("7.3-rc1\n"), Some((7, 3)));
        assert_eq!(version("6.18.44-fc"), Some((6, 18)));
        assert_eq!(version("Linux"), None);
        assert!(is_at_least(3, 8) && !is_at_least(u32::MAX, 0));
    }
}
