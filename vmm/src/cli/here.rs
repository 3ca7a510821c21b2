//! A guest on this host's KVM, in this process.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use super::{Done, Failure};
use crate::config::{BadInput, BootFiles, Checked};
use crate::control::{ControlServer, Target};
use crate::machine::{ExitReason, Machine, MachineError, MachineHandle, MachineSpec};

/// Runs the guest to its end.
pub(super) fn run(checked: &Checked, boot: &BootFiles, control: &Path, vsock: &Path) -> Done {
    let spec = checked.machine(boot, vsock);
    let machine = Machine::new(&spec).map_err(failure)?;
    let target = Guest {
        status: status(&spec),
        handle: machine.handle(),
    };
    let server = ControlServer::start(control, Arc::new(target)).map_err(|error| {
        let path = control.display();
        Failure::Other(format!("cannot make the control socket {path}: {error}"))
    })?;
    let reason = machine.run().map_err(failure)?;
    drop(server);
    match &reason {
        ExitReason::Error(text) => super::complain(text),
        ExitReason::DebugExit(result) => {
            super::complain(&format!("the test kernel ended with {result}"));
        }
        _ => {}
    }
    Ok(reason.code())
}

/// Some of what the host refuses is a matter of the user's options.
fn failure(error: MachineError) -> Failure {
    match error.option() {
        Some(option) => BadInput::new(option, error.to_string()).into(),
        None => Failure::other(error),
    }
}

struct Guest {
    status: Value,
    handle: MachineHandle,
}

fn status(spec: &MachineSpec) -> Value {
    json!({
        "name": spec.name,
        "pid": std::process::id(),
        "version": env!("CARGO_PKG_VERSION"),
        "kernel": spec.kernel,
        "initrd": spec.initrd,
        "cmdline": spec.cmdline,
        "vcpus": spec.vcpus,
        "memory": spec.memory,
        "nvme": spec.nvme.iter().map(|nvme| &nvme.name).collect::<Vec<_>>(),
        "net": spec.net.iter().map(|net| &net.name).collect::<Vec<_>>(),
        "vsock": spec.vsock.as_ref().map(|vsock| &vsock.socket),
    })
}

impl Target for Guest {
    fn status(&self) -> Value {
        let mut status = self.status.clone();
        if let Value::Object(map) = &mut status {
            map.insert("uptime_s".into(), json!(self.handle.stats().uptime_s));
        }
        status
    }

    fn stats(&self) -> Value {
        serde_json::to_value(self.handle.stats())
            .unwrap_or_else(|error| json!({ "error": error.to_string() }))
    }

    fn power_button(&self) -> Result<(), String> {
        if self.handle.press_power_button() {
            Ok(())
        } else {
            Err(
                "the guest does not listen to its power button (yet, or it lacks the driver)"
                    .into(),
            )
        }
    }

    fn quit(&self) {
        self.handle.kill();
    }
}
