//! Guest images: kernels, initramfs and the guest agent, made from the distribution's own packages.
//!
//! * [`apt`] fetches Debian packages through a private apt configuration: signature- and
//!   hash-checked by apt itself, without root, without touching the machine's own apt state.
//! * [`progress`] reports long work: a bar on a terminal, plain lines elsewhere.
//! * [`agent`] talks to the agent in a running guest: run programs, copy files, shut down.
//! * [`image`] builds images: a kernel as shipped and an initramfs with tools and the agent.
//! * [`lab`] is the nested host, in which guests run where the machine's own KVM cannot.
//! * [`cache`] is the folder where all of this is kept, with its locks and atomic builds.

pub mod agent;
pub mod apt;
pub mod cache;
mod error;
pub mod image;
pub mod lab;
pub mod progress;
#[path = "../agent/protocol.rs"]
mod protocol;

pub use cache::CacheDir;
pub use error::{Error, Result};
pub use image::{Image, Images, Release};
pub use progress::Progress;
