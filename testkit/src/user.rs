//! Dropping privileges

use std::thread;

use crate::sys;

/// `CAP_NET_ADMIN` (`linux/capability.h`)
const CAP_NET_ADMIN: u32 = 12;

/// Drops `CAP_NET_ADMIN` from the calling thread
///
/// # Panics
/// Never: every thread may drop a capability.
pub fn drop_net_admin() {
    sys::drop_capability(CAP_NET_ADMIN).expect("a thread may give up a capability");
}

/// Runs `f` in a thread without `CAP_NET_ADMIN`
///
/// # Panics
/// When `f` panics.
pub fn without_net_admin<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    let result = thread::scope(|scope| {
        let thread = scope.spawn(|| {
            drop_net_admin();
            f()
        });
        thread.join()
    });
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
