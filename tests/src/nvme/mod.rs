//! A fake NVMe driver: brings a controller up as Linux does, drives its queues, and takes its
//! interrupts from the machine's recorder. It knows the controller by its registers and rings only.
//!
//! ```
//! use std::sync::Arc;
//! use devices::block::MemoryBackend;
//! use tests::Machine;
//! use tests::nvme::{Driver, Transfer, attach, config};
//!
//! let machine = Machine::new();
//! let disk = MemoryBackend::new(1 << 20).unwrap();
//! let _nvme = attach(&machine, 4, config(vec![(1, disk, 512)]));
//! let mut driver = Driver::bring_up(&machine, 4);
//! let mut queue = driver.create_pair(1, 16);
//! let data = Transfer::new(&machine, 4096);
//! data.set(&[0x5a; 4096]);
//! queue.write(1, 0, &data);
//! data.set(&[0; 4096]);
//! queue.read(1, 0, &data);
//! assert_eq!(data.get(), [0x5a; 4096]);
//! ```

mod command;
mod driver;
mod queue;
mod spy;
mod transfer;

use std::sync::Arc;

use devices::block::BlockBackend;
use devices::nvme::{Config, NamespaceConfig, Nvme};
use iommu::Bdf;

use crate::Machine;

pub use command::Command;
pub use driver::{Driver, Enable};
pub use queue::{CompletionRing, Pair, SubmissionRing};
pub use spy::{Spy, SpyBackend};
pub use transfer::Transfer;

/// A configuration with these namespaces (id, back end, block size) and small queues for tests.
pub fn config(namespaces: Vec<(u32, Arc<dyn BlockBackend>, u32)>) -> Config {
    let namespaces = namespaces.into_iter();
    Config {
        serial: "test-1".into(),
        namespaces: namespaces
            .map(|(nsid, backend, lba_size)| NamespaceConfig {
                nsid,
                backend,
                lba_size,
            })
            .collect(),
        ..Config::default()
    }
}

/// Puts a controller on the bus, in slot `device`.
pub fn attach(machine: &Machine, device: u8, config: Config) -> Arc<Nvme> {
    let bdf = Bdf::new(0, device, 0).expect("device number");
    let (endpoint, nvme) = Nvme::new(config, bdf, machine.upstream()).expect("controller");
    machine.attach(endpoint, Arc::<Nvme>::clone(&nvme));
    nvme
}
