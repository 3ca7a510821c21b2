//! `ringside exec`: runs a command in a guest.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use guest_images::agent::{
    AgentClient, AgentError, Control, ExecIo, ExecSpec, Exit, Window, control,
};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;

use super::{Done, Failure};
use crate::config::BadInput;
use crate::control::{RuntimeError, find};

/// The command could not be found or run (as env(1) and shells have it), or the guest not reached.
const NOT_FOUND: u8 = 127;
const NOT_RUN: u8 = 126;
const NOT_REACHED: u8 = 125;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit codes: that of the command; 128 and the number of the signal that ended it; 125 the guest cannot \
be reached; 126 the command cannot be run; 127 there is no such command; 2 bad input.

Examples:
  ringside exec lab -- nvme list
  ringside exec lab --tty -- sh
  ringside exec lab --wait 60 -- fio --name=x --filename=/dev/nvme0n1 --rw=randread
  tar c . | ringside exec lab --cwd /tmp -- tar x")]
pub(super) struct ExecArgs {
    /// The guest
    name: String,

    /// Give the command a terminal: for shells, editors and top
    #[arg(short, long)]
    tty: bool,

    /// Seconds to wait for the guest to be started and to boot [default: 10, and
    /// only if it runs already]
    #[arg(short, long, value_name = "SECONDS")]
    wait: Option<u32>,

    /// Set an environment variable; may be repeated
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,

    /// Working folder in the guest
    #[arg(long, value_name = "PATH")]
    cwd: Option<PathBuf>,

    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<std::ffi::OsString>,
}

/// How long a guest that runs may take to answer if the user has not said.
const PATIENCE: u32 = 10;
/// How often it is looked for a guest that is to be started.
const LOOK: Duration = Duration::from_millis(50);

/// The agent of a guest, which is waited for. A name that nobody has is only waited for if the user
/// asked for it: mostly it is a mistake.
pub(super) fn connect(
    name: &str,
    wait: Option<u32>,
) -> Result<Result<AgentClient, AgentError>, Failure> {
    let patience = Duration::from_secs(wait.unwrap_or(PATIENCE).into());
    let start = Instant::now();
    let guest = loop {
        match find(name) {
            Err(RuntimeError::BadInput(_)) if wait.is_some() && start.elapsed() < patience => {
                thread::sleep(LOOK);
            }
            found => break found?,
        }
    };
    let socket = guest.vsock.ok_or_else(|| {
        let problem = "the guest has no vsock device: start it without --vsock off";
        BadInput::new(name, problem)
    })?;
    let patience = patience.saturating_sub(start.elapsed());
    Ok(AgentClient::connect(&socket, patience))
}

pub(super) fn main(args: ExecArgs) -> Done {
    let mut spec = ExecSpec::new(&args.command);
    for variable in &args.env {
        let (name, value) = variable
            .split_once('=')
            .filter(|(name, _)| !name.is_empty())
            .ok_or_else(|| BadInput::new(format!("--env {variable}"), "use the form NAME=VALUE"))?;
        spec = spec.env(name, value);
    }
    if let Some(cwd) = &args.cwd {
        spec = spec.cwd(cwd);
    }
    let stdin = io::stdin();
    if args.tty && !(stdin.is_terminal() && io::stdout().is_terminal()) {
        return Err(BadInput::new(
            "--tty",
            "standard input and output are no terminal: leave it out",
        )
        .into());
    }
    let client = match connect(&args.name, args.wait)? {
        Ok(client) => client,
        Err(error) => {
            super::complain(&error.to_string());
            return Ok(NOT_REACHED);
        }
    };
    let mut raw = None;
    if args.tty {
        spec = spec.tty(window(&stdin));
        raw = Some(RawMode::enter()?);
    }
    let (sender, receiver) = control()?;
    let signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGWINCH])?;
    let handle = signals.handle();
    let forwarder = thread::spawn(move || forward(signals, &sender));
    let result = client.exec(
        &spec,
        ExecIo {
            stdin: Some(stdin.as_fd()),
            stdout: &mut io::stdout().lock(),
            stderr: &mut io::stderr().lock(),
            control: Some(&receiver),
        },
    );
    handle.close();
    let _ = forwarder.join();
    drop(raw);
    // At least one word: clap demands it.
    let command = args.command.first().map(|word| word.to_string_lossy());
    Ok(exit_code(&command.unwrap_or_default(), result))
}

fn exit_code(command: &str, result: Result<Exit, AgentError>) -> u8 {
    match result {
        Ok(Exit::Code(code)) => code,
        Ok(Exit::Signal(signal)) => signal.saturating_add(128),
        Err(error @ AgentError::Refused { errno, .. }) => {
            super::complain(&format!("{command} cannot be run: {error}"));
            if errno == libc::ENOENT {
                NOT_FOUND
            } else {
                NOT_RUN
            }
        }
        Err(error) => {
            super::complain(&error.to_string());
            NOT_REACHED
        }
    }
}

fn forward(mut signals: Signals, sender: &Control) {
    for signal in signals.forever() {
        // It fails only when the command has ended, and then the loop is about to.
        let _ = match (signal, u8::try_from(signal)) {
            (SIGWINCH, _) => sender.window(window(&io::stdin())),
            (_, Ok(signal)) => sender.signal(signal),
            (_, Err(_)) => Ok(()),
        };
    }
}

fn window(terminal: &impl AsFd) -> Window {
    match tcgetwinsize(terminal) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => Window {
            rows: size.ws_row,
            columns: size.ws_col,
        },
        _ => Window {
            rows: 24,
            columns: 80,
        },
    }
}

/// Standard input in raw mode, until this is dropped.
struct RawMode {
    old: Termios,
}

impl RawMode {
    fn enter() -> io::Result<Self> {
        let old = tcgetattr(io::stdin())?;
        let mut raw = old.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self { old })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that is gone has no mode.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.old);
    }
}
