//! Privileges to be without

use std::thread;

use crate::sys;

/// `CAP_NET_ADMIN` (`linux/capability.h`)
const CAP_NET_ADMIN: u32 = 12;

/// Gives the calling thread's `CAP_NET_ADMIN` up, and with it that of a process with one thread
///
/// # Panics
/// Never: a thread may.
pub fn drop_net_admin() {
    sys::drop_capability(CAP_NET_ADMIN).expect("a thread may give up a capability");
}

/// Runs something in a thread that has no `CAP_NET_ADMIN`
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
