//! The other side of the guest's network card: a tap interface and an iperf3 server.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use guest_images::HostTools;

use super::Failure;

/// The tap interface, in the demo's own namespace.
pub(super) const TAP: &str = "ringside0";
/// The two ends; 192.0.2.0/24 is for documentation (RFC 5737), nobody routes it.
pub(super) const HOST_ADDRESS: &str = "192.0.2.1";
pub(super) const GUEST_ADDRESS: &str = "192.0.2.2";

/// A program of the demo's tools.
fn program(tools: &Path, name: &str) -> Result<Command, Failure> {
    let words = HostTools::at(tools)
        .command(name)
        .ok_or_else(|| Failure::Other(format!("{} has no {name}", tools.display())))?;
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).stdin(Stdio::null());
    Ok(command)
}

/// Makes the tap interface. It goes with the namespace.
pub(super) fn make_tap(tools: &Path) -> Result<(), Failure> {
    let address = format!("{HOST_ADDRESS}/24");
    for words in [
        &["link", "set", "lo", "up"][..],
        &[
            "tuntap",
            "add",
            TAP,
            "mode",
            "tap",
            "multi_queue",
            "vnet_hdr",
        ],
        &["address", "add", &address, "dev", TAP],
        &["link", "set", TAP, "up"],
    ] {
        let output = program(tools, "ip")?.args(words).output()?;
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr);
            return Err(Failure::Other(format!(
                "ip {} failed: {}",
                words.join(" "),
                why.trim()
            )));
        }
    }
    Ok(())
}

/// A process that is ended when this is dropped.
pub(super) struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // Both fail only when it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts the iperf3 server and returns when it listens.
pub(super) fn serve_iperf(tools: &Path) -> Result<Ended, Failure> {
    let mut child = program(tools, "iperf3")?
        .args(["--server", "--forceflush", "--bind", HOST_ADDRESS])
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()?;
    let output = child.stdout.take();
    let server = Ended(child);
    let mut lines = BufReader::new(
        output.ok_or_else(|| Failure::Other("the iperf3 server has no output".into()))?,
    )
    .lines();
    let listening = lines
        .by_ref()
        .map_while(Result::ok)
        .any(|line| line.contains("listening"));
    if !listening {
        return Err(Failure::Other("the iperf3 server did not start".into()));
    }
    // The rest is read, so that the server never waits for us.
    std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
    Ok(server)
}
