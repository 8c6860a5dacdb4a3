//! Tests against the running kernel, each in a network namespace of its own
//!
//! They run as root, and as an ordinary user with a user namespace.
#![allow(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

mod batch;
mod busy_poll;
mod callback;
#[path = "../../proto/tests/common/mod.rs"]
mod common;
mod config;
mod conntrack;
mod drain;
mod faults;
mod handover;
mod hostile;
mod lab;
mod lifetime;
mod names;
mod optional;
mod packets;
mod raw;
mod rewrite;
mod rules;
mod runtimes;
#[cfg(target_arch = "x86_64")]
mod seccomp;
mod stream;
mod threads;
mod verdicts;
mod waker;
mod workers;
