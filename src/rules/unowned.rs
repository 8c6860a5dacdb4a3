//! Tables without an owner, for Linux before 5.12
//!
//! The name of such a table contains the process, and tables of ended processes are removed.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::message::Connection;
use super::{delete_table, tables};
use crate::error::{Error, Operation, Result};
use crate::sys;

/// Returns the name of a table of this process: the name, the PID namespace, the process, the time
/// of its start, and a number
pub(super) fn name(name: &str) -> io::Result<String> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let pid = std::process::id();
    let start = start_time(pid).ok_or(io::ErrorKind::InvalidData)?;
    let next = NEXT.fetch_add(1, Relaxed);
    Ok(format!("{name}.{}.{pid}.{start}.{next}", pid_namespace()?))
}

/// Removes the tables of this name whose process has ended
pub(super) fn sweep(connection: &mut Connection, name: &str) -> Result<()> {
    for (family, found, _) in tables(connection)? {
        if !is_of_ended_process(&found, name) {
            continue;
        }
        match connection.commit(Operation::RemoveTable, vec![delete_table(family, &found)]) {
            // Another program has swept it.
            Err(Error::Refused(refusal)) if refusal.errno() == libc::ENOENT => {}
            result => result?,
        }
    }
    Ok(())
}

fn is_of_ended_process(found: &str, name: &str) -> bool {
    let numbers = found
        .strip_prefix(name)
        .and_then(|rest| rest.strip_prefix('.'));
    let numbers: Option<Vec<u64>> =
        numbers.and_then(|text| text.split('.').map(|number| number.parse().ok()).collect());
    let (Some(numbers), Ok(here)) = (numbers, pid_namespace()) else {
        return false;
    };
    match *numbers {
        // Processes of another namespace cannot be seen.
        [namespace, pid, start, _] if namespace == here => {
            let has_ended = |pid| match start_time(pid) {
                Some(other) => other != start,
                None => !sys::process_exists(pid), // /proc may hide it
            };
            u32::try_from(pid).is_ok_and(has_ended)
        }
        _ => false,
    }
}

/// Returns the number of the PID namespace
fn pid_namespace() -> io::Result<u64> {
    let link = std::fs::read_link("/proc/self/ns/pid")?; // pid:[4026531836]
    let digits = |c: &char| c.is_ascii_digit();
    let number: String = link.to_string_lossy().chars().filter(digits).collect();
    number
        .parse()
        .map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Returns the start time of a process (field 22 of proc_pid_stat(5)); `None` if it has ended
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(") ")?; // the second field may contain anything
    fields.split(' ').nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tables_of_ended_processes_are_swept() {
        let own = name("filter").unwrap();
        assert_ne!(name("filter").unwrap(), own);
        assert!(!is_of_ended_process(&own, "filter"));
        assert!(!is_of_ended_process(&own, "filt"));
        let parts: Vec<&str> = own.split('.').collect();
        let of = |pid: &str, start: &str| format!("filter.{}.{pid}.{start}.0", parts[1]);
        assert!(
            is_of_ended_process(&of(parts[2], "1"), "filter"),
            "another start"
        );
        let no_process = u32::MAX.to_string();
        assert!(is_of_ended_process(&of(&no_process, "1"), "filter"));
        assert!(!is_of_ended_process("filter", "filter"));
        let elsewhere = "filter.1.1.1.1";
        assert!(
            !is_of_ended_process(elsewhere, "filter"),
            "another namespace"
        );
    }
}
