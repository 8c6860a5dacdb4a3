//! Network namespaces, firewall rules and traffic for nfqnl's tests, benches and examples
//!
//! The crate uses only system calls, and needs no other programs.
//!
//! ```no_run
//! use nfqnl_testkit::rules::{Family, Hook, Rule, Table};
//! use nfqnl_testkit::traffic::{self, Udp};
//!
//! # fn f() -> std::io::Result<()> {
//! nfqnl_testkit::netns::enter().expect("namespaces"); // the process now has its own namespace
//! let table = Table::new(Family::Ip, "demo")?;
//! table
//!     .chain("in", Hook::Input, 0)?
//!     .add(&Rule::new().udp_dport(5000).queue(1))?;
//! let socket = Udp::bind(traffic::V4, 5000)?;
//! socket.send(b"to be held in queue 1", socket.address())?;
//! # Ok(())
//! # }
//! ```
#![deny(unsafe_code)]
#![allow(
    clippy::exhaustive_enums,
    reason = "not published: whoever adds a variant sees every match"
)]

pub mod alloc;
pub mod cpu;
pub mod hosts;
pub mod kernel;
pub mod ledger;
pub mod link;
mod netlink;
pub mod netns;
pub mod process;
pub mod queue;
pub mod rules;
pub mod signal;
pub mod socket;
mod sys;
pub mod trace;
pub mod traffic;
pub mod user;
