//! Assembles the bare guest for the KVM tests.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=bare");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let guest = out.join("bare-guest");
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let mut command = Command::new(&compiler);
    command
        .args(["-m64", "-nostdlib", "-static", "-no-pie"])
        .args([
            "-Wl,--build-id=none",
            "-Wl,-T,bare/guest.ld",
            "-Wl,--no-warn-rwx-segments",
        ])
        .arg("-o")
        .arg(&guest)
        .arg("bare/guest.S");
    let status = command
        .status()
        .unwrap_or_else(|e| panic!("{} cannot be run: {e}", compiler.display()));
    assert!(status.success(), "{command:?} failed");
    println!("cargo::rustc-env=BARE_GUEST={}", guest.display());
}
