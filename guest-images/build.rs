//! Compiles the guest agent and the guest's vfio program: statically linked, with nothing but std,
//! so that they run in every guest whatever its C library. The image builder embeds the results.

use std::env;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    for folder in ["agent", "vfio-nvme"] {
        println!("cargo::rerun-if-changed={folder}");
    }
    let version = env::var("CARGO_PKG_VERSION").expect("cargo sets the version");
    // Also for the copy of the agent that cargo compiles as an example (see Cargo.toml).
    println!("cargo::rustc-env=RINGSIDE_AGENT_VERSION={version}");
    println!("cargo::rerun-if-changed=src/image");
    println!(
        "cargo::rustc-env=RINGSIDE_RECIPE={:016x}",
        hash_of_sources(Path::new("src/image"))
    );
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    compile("agent/main.rs", &out.join("ringside-agent"), &version);
    compile("vfio-nvme/main.rs", &out.join("vfio-nvme"), &version);
}

fn compile(source: &str, program: &Path, version: &str) {
    let rustc = env::var_os("RUSTC").expect("cargo sets RUSTC");
    let status = Command::new(rustc)
        .env("RINGSIDE_AGENT_VERSION", version)
        .args(["--edition=2024", "--crate-type=bin"])
        .args([
            "-Copt-level=s",
            "-Clto=fat",
            "-Cpanic=abort",
            "-Cstrip=symbols",
        ])
        .args(["-Ccodegen-units=1", "-Ctarget-feature=+crt-static"])
        .args(["--crate-name", "ringside_guest_program"])
        .arg("-o")
        .arg(program)
        .arg(source)
        .status()
        .expect("rustc can be run");
    assert!(
        status.success(),
        "{source} does not compile (a static C library is needed)"
    );
}

/// Identifies the image builder's source: an image that another source made is made again.
fn hash_of_sources(dir: &Path) -> u64 {
    let mut files: Vec<PathBuf> = fs::read_dir(dir)
        .expect("the sources are there")
        .map(|entry| entry.expect("the sources are there").path())
        .collect();
    files.sort();
    let mut hasher = DefaultHasher::new();
    for file in files {
        fs::read(file)
            .expect("a source is a file")
            .hash(&mut hasher);
    }
    hasher.finish()
}
