//! The proof that the crate needs no std: the package in `no-std` builds

use std::path::Path;
use std::process::Command;

#[test]
fn builds_without_std() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/no-std");
    let lock = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.lock");
    // The workspace's versions are those that building this test has downloaded already, so no network is needed.
    std::fs::copy(lock, package.join("Cargo.lock")).unwrap();
    let output = Command::new(env!("CARGO"))
        .args(["build", "--offline", "--manifest-path"])
        .arg(package.join("Cargo.toml"))
        .args(["--target-dir", env!("CARGO_TARGET_TMPDIR")])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{stderr}", output.status);
}
