//! Builds the guests without an operating system for the KVM tests.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=bare");
    link(
        "BARE_GUEST",
        "bare-guest",
        "bare/guest.ld",
        &["-m64", "bare/guest.S"],
    );
    // Ring 0 may be emulated: integer instructions alone.
    link(
        "MULTIBOOT_GUEST",
        "multiboot-guest",
        "bare/multiboot/kernel.ld",
        &[
            "-m32",
            "-march=i686",
            "-mgeneral-regs-only",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-ffreestanding",
            "-fno-pic",
            "-fno-stack-protector",
            "-fno-asynchronous-unwind-tables",
            "-fcf-protection=none",
            "bare/multiboot/start.S",
            "bare/multiboot/main.c",
            "bare/multiboot/vtd.c",
        ],
    );
}

/// Links a guest by its linker script and tells the tests where it is, in `variable`.
fn link(variable: &str, name: &str, script: &str, arguments: &[&str]) {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let guest = out.join(name);
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let mut command = Command::new(&compiler);
    command
        .args(["-nostdlib", "-static", "-no-pie"])
        .args(["-Wl,--build-id=none", "-Wl,--no-warn-rwx-segments"])
        .arg(format!("-Wl,-T,{script}"))
        .args(arguments)
        .arg("-o")
        .arg(&guest);
    let status = command
        .status()
        .unwrap_or_else(|e| panic!("{} cannot be run: {e}", compiler.display()));
    assert!(status.success(), "{command:?} failed");
    println!("cargo::rustc-env={variable}={}", guest.display());
}
