//! `ringside list`, `stats` and `stop`: guests that run.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use guest_images::agent::{AgentClient, Shutdown};
use serde_json::Value;

use super::{Done, Failure};
use crate::config::Accel;
use crate::control::{Method, find, list, request, wait_for_end};

#[derive(Debug, clap::Args)]
pub(super) struct ListArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct StatsArgs {
    /// The guest
    name: String,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct StopArgs {
    /// The guest
    name: String,

    /// End it at once, like pulling the plug: what it has not flushed is lost
    #[arg(long)]
    kill: bool,

    /// Seconds to wait for its end
    #[arg(short, long, value_name = "SECONDS", default_value_t = 60)]
    wait: u32,
}

/// How long the guest's agent may take to answer before the power button is pressed instead.
const AGENT_PATIENCE: Duration = Duration::from_secs(5);

pub(super) fn list_main(args: &ListArgs) -> Done {
    let guests = list()?;
    let mut text = String::new();
    if args.json {
        text = serde_json::to_string_pretty(&guests).map_err(Failure::other)? + "\n";
    } else if guests.is_empty() {
        // Standard output stays empty, so that scripts can count lines.
        super::complain("no guest runs");
    } else {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |now| now.as_secs());
        let _ = writeln!(
            text,
            "{:<20} {:>8} {:<7} {:>9}  CONTROL",
            "NAME", "PID", "ACCEL", "UP"
        );
        for guest in guests {
            let accel = match guest.accel {
                Accel::Nested => "nested",
                _ => "kvm",
            };
            let up = uptime(now.saturating_sub(guest.started));
            let control = guest.control.display();
            let _ = writeln!(
                text,
                "{:<20} {:>8} {accel:<7} {up:>9}  {control}",
                guest.name, guest.pid
            );
        }
    }
    io::stdout().write_all(text.as_bytes())?;
    Ok(0)
}

fn uptime(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
    }
}

pub(super) fn stats_main(args: &StatsArgs) -> Done {
    let guest = find(&args.name)?;
    let stats = request(&guest.control, Method::Get, "/stats").map_err(Failure::other)?;
    let text = if args.json {
        serde_json::to_string_pretty(&stats).map_err(Failure::other)? + "\n"
    } else {
        let mut text = String::new();
        flatten(&mut text, "", &stats);
        text
    };
    io::stdout().write_all(text.as_bytes())?;
    Ok(0)
}

/// One line a leaf: its path, a space, its value.
fn flatten(text: &mut String, path: &str, value: &Value) {
    let join = |key: &str| match path {
        "" => key.to_owned(),
        path => format!("{path}.{key}"),
    };
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                flatten(text, &join(key), value);
            }
        }
        Value::Array(values) => {
            for (index, value) in values.iter().enumerate() {
                flatten(text, &join(&index.to_string()), value);
            }
        }
        Value::String(leaf) => {
            let _ = writeln!(text, "{path} {leaf}");
        }
        leaf => {
            let _ = writeln!(text, "{path} {leaf}");
        }
    }
}

pub(super) fn stop_main(args: &StopArgs) -> Done {
    let guest = find(&args.name)?;
    let deadline = Instant::now() + Duration::from_secs(args.wait.into());
    if args.kill {
        request(&guest.control, Method::Post, "/quit").map_err(Failure::other)?;
    } else {
        // The agent ends processes and writes disks; a guest without one has a power button.
        let agent = guest
            .vsock
            .as_deref()
            .and_then(|socket| AgentClient::connect(socket, AGENT_PATIENCE).ok());
        let asked = agent.is_some_and(|agent| agent.shutdown(Shutdown::PowerOff).is_ok());
        if !asked {
            request(&guest.control, Method::Post, "/power-button").map_err(Failure::other)?;
        }
    }
    if wait_for_end(&guest, deadline)? {
        return Ok(0);
    }
    Err(Failure::Other(format!(
        "{} still runs after {} seconds: `ringside stop --kill {}` ends it at once",
        args.name, args.wait, args.name
    )))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_tree_becomes_lines() {
        let mut text = String::new();
        let tree = json!({"exits": 5, "nvme": [{"reads": 1, "name": "a b"}], "ok": true});
        flatten(&mut text, "", &tree);
        assert_eq!(text, "exits 5\nnvme.0.name a b\nnvme.0.reads 1\nok true\n");
    }

    #[test]
    fn times_are_short() {
        for (seconds, text) in [(0, "0s"), (59, "59s"), (61, "1m01s"), (7260, "2h01m")] {
            assert_eq!(uptime(seconds), text);
        }
    }
}
