//! Version and features of the running kernel

use std::{env, fs};

use crate::netns::is_rootless;

/// Returns whether the running kernel is this version or a later one
///
/// If kernels behave differently, tests assert both behaviours and skip neither.
///
/// # Panics
/// Without /proc.
#[must_use]
pub fn is_at_least(major: u32, minor: u32) -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("what uname -r says");
    version(&release).expect("a version") >= (major, minor)
}

/// Returns whether the running kernel silently drops packets with a new payload
///
/// Linux 7.1 and later do so in the network namespace of an ordinary user.
#[must_use]
pub fn refuses_payloads() -> bool {
    is_rootless() && is_at_least(7, 1)
}

/// Returns whether `NFQNL_COMPLETE_KERNEL=1` is set: the running kernel must have every feature
///
/// `tests/kernels/run` sets it for Debian's kernels. A missing feature is then a failure.
#[must_use]
pub fn is_complete() -> bool {
    env::var_os("NFQNL_COMPLETE_KERNEL").is_some_and(|value| value == "1")
}

/// Returns whether the running kernel or a loaded module has a function
///
/// `None` if /proc/kallsyms does not list the kernel's functions.
#[must_use]
pub fn has_function(name: &str) -> Option<bool> {
    /// Part of every kernel with NFQUEUE
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

/// Returns the first two numbers of a release like `6.12.95+deb12-s390x` or `7.3-rc1`
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
