//! Tables without an owner, for Linux before 5.12: their name has the process, and those of ended
//! processes are removed

use std::io;

use nfqnl_proto::Attrs;

use super::message::{Connection, FAMILY_HEADER_LEN, NFT_MSG_DELTABLE, NFT_MSG_GETTABLE, Request};
use super::{NFTA_TABLE_NAME, TableFamily};
use crate::error::{Operation, Result};

/// Returns the name of this process's table: the name, the PID namespace, the process, and the time
/// of its start
pub(super) fn name(name: &str) -> io::Result<String> {
    let pid = std::process::id();
    let start = start_time(pid).ok_or(io::ErrorKind::InvalidData)?;
    Ok(format!("{name}.{}.{pid}.{start}", pid_namespace()?))
}

/// Removes the tables of this name whose process has ended
pub(super) fn sweep(connection: &mut Connection, name: &str) -> Result<()> {
    let mut ended = Vec::new();
    let all = Request::new(Operation::AddTable, None, NFT_MSG_GETTABLE, 0, |_| {});
    connection.dump(all, |body| {
        let family = body.first().copied().and_then(TableFamily::from_number);
        let attributes = Attrs::new(body.get(FAMILY_HEADER_LEN..).unwrap_or_default());
        let found = attributes.last(NFTA_TABLE_NAME).and_then(|attr| {
            let found = std::str::from_utf8(attr.value).ok()?.trim_end_matches('\0');
            is_of_ended_process(found, name).then(|| found.to_owned())
        });
        ended.extend(family.zip(found));
    })?;
    for (family, name) in ended {
        let attributes = |table: &mut super::Attributes| {
            table.text(NFTA_TABLE_NAME, &name);
        };
        let op = Operation::RemoveTable;
        connection.commit(vec![Request::new(
            op,
            Some(family),
            NFT_MSG_DELTABLE,
            0,
            attributes,
        )])?;
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
        [namespace, pid, start] if namespace == here => {
            u32::try_from(pid).is_ok_and(|pid| start_time(pid) != Some(start))
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
        assert!(!is_of_ended_process(&own, "filter"));
        let later = format!("{own}1");
        assert!(is_of_ended_process(&later, "filter"), "another start time");
        assert!(!is_of_ended_process(&later, "filt"));
        assert!(!is_of_ended_process("filter", "filter"));
        assert!(
            !is_of_ended_process("filter.1.1.1", "filter"),
            "another namespace"
        );
        let ended = format!("filter.{}.{}.1", pid_namespace().unwrap(), u32::MAX);
        assert!(is_of_ended_process(&ended, "filter"));
    }
}
