//! The command line.

mod cp;
mod demo;
mod doctor;
mod exec;
mod guests;
mod here;
mod image;
mod nested;
mod run;

use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use guest_images::lab;
use tracing_subscriber::EnvFilter;

use crate::config::BadInput;
use crate::control::RuntimeError;

const AFTER_HELP: &str = "\
Exit codes: 0 the guest switched itself off, or the command did its work; 1 an error of the host or \
of Ringside; 2 bad input, nothing was created or changed; 10 the guest rebooted; 11 its kernel \
panicked; 12 the guest's CPU or KVM failed; 13 it was killed (Ctrl-A x, a signal, `ringside stop \
--kill`). `ringside exec` ends with the exit code of the command.

Sizes are whole numbers of MiB, or have the suffix K, M, G or T (powers of 1024).

Guests are found by name in $XDG_RUNTIME_DIR/ringside, or /tmp/ringside-UID; images and packages \
are kept in $RINGSIDE_CACHE, $XDG_CACHE_HOME/ringside or ~/.cache/ringside.";

/// A virtual machine monitor that is an I/O laboratory: boots Linux guests on KVM and emulates the
/// NVMe disks and network cards below their drivers.
#[derive(Debug, Parser)]
#[command(name = "ringside", version, after_help = AFTER_HELP)]
struct Cli {
    /// Say more on standard error; twice for everything (RINGSIDE_LOG sets a filter instead)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a guest, and run it to its end
    Run(Box<run::RunArgs>),
    /// Run a command in a running guest
    Exec(exec::ExecArgs),
    /// Copy a file into a running guest or out of one
    Cp(cp::CpArgs),
    /// List running guests
    List(guests::ListArgs),
    /// Print counters of a running guest: VM exits, devices, queues
    Stats(guests::StatsArgs),
    /// Shut a running guest down
    Stop(guests::StopArgs),
    /// Boot Debian, run I/O through NVMe and virtio-net, check it, and print what it cost
    Demo(demo::DemoArgs),
    /// Build, list and remove guest images
    Image(image::ImageArgs),
    /// Say what this host's KVM can do, and why
    Doctor(doctor::DoctorArgs),
    /// The first process of a nested host
    #[command(hide = true)]
    LabRelay,
}

/// Why a command did not do its work.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The user can put it right; nothing was created or changed.
    BadInput(BadInput),
    /// Anything else, in one line.
    Other(String),
}

impl Failure {
    fn other(error: impl fmt::Display) -> Self {
        Failure::Other(error.to_string())
    }

    fn code(&self) -> u8 {
        match self {
            Failure::BadInput(_) => 2,
            Failure::Other(_) => 1,
        }
    }
}

impl From<BadInput> for Failure {
    fn from(bad: BadInput) -> Self {
        Failure::BadInput(bad)
    }
}

impl From<RuntimeError> for Failure {
    fn from(error: RuntimeError) -> Self {
        match error {
            RuntimeError::BadInput(bad) => Failure::BadInput(bad),
            error @ RuntimeError::Io { .. } => Failure::other(error),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::other(error)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::BadInput(bad) => bad.fmt(f),
            Failure::Other(text) => f.write_str(text),
        }
    }
}

/// What a command gives: the process's exit code.
type Done = Result<u8, Failure>;

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    start_log(cli.verbose);
    let done = match cli.command {
        Command::Run(args) => run::main(*args),
        Command::Exec(args) => exec::main(args),
        Command::Cp(args) => cp::main(&args),
        Command::List(args) => guests::list_main(&args),
        Command::Stats(args) => guests::stats_main(&args),
        Command::Stop(args) => guests::stop_main(&args),
        Command::Demo(args) => demo::main(&args),
        Command::Image(args) => image::main(&args),
        Command::Doctor(args) => doctor::main(&args),
        Command::LabRelay => return lab::relay_main(),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            complain(&failure.to_string());
            ExitCode::from(failure.code())
        }
    }
}

/// One line on standard error. That it cannot be written is no reason to fail.
fn complain(line: &str) {
    let _ = writeln!(io::stderr(), "ringside: {line}");
}

/// Help goes out as it is; a mistake becomes one line.
fn usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp
        | ErrorKind::DisplayVersion
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            ExitCode::from(if error.use_stderr() { 2 } else { 0 })
        }
        _ => {
            complain(&one_line(&error.to_string()));
            ExitCode::from(2)
        }
    }
}

/// The message and its tip, without usage and pointers to help.
fn one_line(text: &str) -> String {
    let parts: Vec<_> = text
        .split("\n\n")
        .map(|part| part.split_whitespace().collect::<Vec<_>>().join(" "))
        .filter(|part| {
            !part.is_empty() && !part.starts_with("Usage:") && !part.starts_with("For more")
        })
        .collect();
    let line = parts.join("; ");
    line.strip_prefix("error: ").unwrap_or(&line).to_owned()
}

fn start_log(verbose: u8) {
    let default = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = std::env::var("RINGSIDE_LOG").unwrap_or_else(|_| default.to_owned());
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new(default));
    // Fails only if a log was started before, which then stays.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_target(verbose > 1)
        .without_time()
        .try_init();
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn mistakes_become_one_line() {
        let error = Cli::try_parse_from(["ringside", "doctor", "--jsn"]).unwrap_err();
        assert_eq!(
            one_line(&error.to_string()),
            "unexpected argument '--jsn' found; tip: a similar argument exists: '--json'"
        );
    }
}
