//! The control socket of a running guest: JSON over HTTP/1.1 on a Unix socket, so that `curl
//! --unix-socket` and every HTTP library can speak to it.
//!
//! | Request | Effect |
//! |---|---|
//! | `GET /status` | who the guest is and how it does |
//! | `GET /stats` | counters of vCPUs and devices |
//! | `POST /power-button` | presses the power button: the guest shuts down if it listens |
//! | `POST /quit` | ends the guest at once |
//!
//! One request a connection. Errors are `{"error": "..."}` with a status of 400 and up.

mod client;
mod http;
mod runtime;
mod server;

pub use client::{ControlError, request};
pub use http::Method;
pub use runtime::{GuestFiles, RuntimeDir, RuntimeError, find, list, wait_for_end};
pub use server::ControlServer;

use serde_json::Value;

/// What the control socket controls.
pub trait Target: Send + Sync + 'static {
    /// Who the guest is and how it does.
    fn status(&self) -> Value;

    /// Counters, as a tree.
    fn stats(&self) -> Value;

    /// Presses the power button.
    ///
    /// # Errors
    /// Why it cannot be pressed.
    fn power_button(&self) -> Result<(), String>;

    /// Ends the guest at once. The socket answers before the process ends.
    fn quit(&self);
}
