//! Compiles the guest agent: statically linked, with nothing but std, so that it runs in every
//! guest whatever its C library. The image builder embeds the result.

use std::env;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=agent");
    let version = env::var("CARGO_PKG_VERSION").expect("cargo sets the version");
    // Also for the copy of the agent that cargo compiles as an example (see Cargo.toml).
    println!("cargo::rustc-env=RINGSIDE_AGENT_VERSION={version}");
    println!("cargo::rerun-if-changed=src/image");
    println!(
        "cargo::rustc-env=RINGSIDE_RECIPE={:016x}",
        hash_of_sources(Path::new("src/image"))
    );
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let rustc = env::var_os("RUSTC").expect("cargo sets RUSTC");
    let status = Command::new(rustc)
        .env("RINGSIDE_AGENT_VERSION", version)
        .args([
            "--edition=2024",
            "--crate-name=ringside_agent",
            "--crate-type=bin",
        ])
        .args([
            "-Copt-level=s",
            "-Clto=fat",
            "-Cpanic=abort",
            "-Cstrip=symbols",
        ])
        .args(["-Ccodegen-units=1", "-Ctarget-feature=+crt-static"])
        .arg("-o")
        .arg(out.join("ringside-agent"))
        .arg("agent/main.rs")
        .status()
        .expect("rustc can be run");
    assert!(
        status.success(),
        "the guest agent does not compile (a static C library is needed)"
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
