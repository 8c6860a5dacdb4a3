//! Proves that the crate does not need std: the package in `no-std` builds

use std::path::Path;
use std::process::Command;

#[test]
fn builds_without_std() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/no-std");
    let lock = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.lock");
    // Cargo has downloaded the versions in the workspace's lock file to build this test, so the
    // build works offline.
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
