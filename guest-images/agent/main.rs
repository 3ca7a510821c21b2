//! The guest agent: the guest's first process, and the server that the host talks to.
//!
//! It has no dependencies but std, is linked statically and is the `/init` of Ringside's images.
//!
//! ```text
//! /init                         as process 1: set the guest up, start the server and a shell
//! /init serve                   serve on vsock port 1024 (as a child of process 1)
//! ringside-agent serve --unix P serve on a Unix socket (for tests; it cannot shut down)
//! ```

#![allow(
    unsafe_code,
    reason = "the C library's functions, each with a safe face in sys.rs"
)]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "constants of the C interface in the types that it wants"
)]

mod exec;
mod files;
mod init;
mod modules;
#[allow(dead_code, reason = "the host uses the rest")]
mod protocol;
mod serve;
#[allow(dead_code, reason = "signal numbers for completeness")]
mod sys;

use std::env;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments.as_slice() {
        ["serve"] => serve::on_vsock(),
        ["serve", "--unix", path] => serve::on_unix(Path::new(path)),
        // The kernel passes unknown words of its command line on to process 1.
        _ if std::process::id() == 1 => init::run(),
        _ => {
            eprintln!("usage: ringside-agent serve [--unix PATH]");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ringside-agent: {error}");
            ExitCode::FAILURE
        }
    }
}
