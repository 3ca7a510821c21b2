//! Stores that signal eventfds, as KVM's ioeventfd does it.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pci::{IoEvent, IoEventHub, IoLength};
use vmm_sys_util::eventfd::EventFd;

struct Registered {
    address: u64,
    length: IoLength,
    value: Option<u64>,
    event: EventFd,
}

impl Registered {
    fn is(&self, address: u64, event: &IoEvent) -> bool {
        (self.address, self.length, self.value) == (address, event.length, event.value)
    }

    fn matches(&self, address: u64, data: &[u8]) -> bool {
        let mut bytes = [0; 8];
        let Some(low) = bytes.get_mut(..data.len()) else {
            return false;
        };
        low.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let length = match self.length {
            IoLength::Any => true,
            IoLength::U16 | IoLength::U32 | IoLength::U64 => {
                self.length.bytes() == data.len() as u64
            }
        };
        self.address == address && length && self.value.is_none_or(|wanted| wanted == value)
    }
}

/// The machine's table of I/O events. It refuses duplicates, and removing what is not there panics,
/// since that is a mistake of the bus.
#[derive(Default)]
pub struct EventTable {
    registered: Mutex<Vec<Registered>>,
}

impl EventTable {
    /// A CPU's store; true if it signalled an event, which ends the store.
    pub fn store(&self, address: u64, data: &[u8]) -> bool {
        let registered = self.lock();
        let hit = registered.iter().find(|r| r.matches(address, data));
        if let Some(hit) = hit {
            hit.event.write(1).expect("eventfd");
        }
        hit.is_some()
    }

    /// Addresses of the registered events, in ascending order.
    pub fn addresses(&self) -> Vec<u64> {
        let mut addresses: Vec<u64> = self.lock().iter().map(|r| r.address).collect();
        addresses.sort_unstable();
        addresses
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Registered>> {
        self.registered
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl IoEventHub for EventTable {
    fn add(&self, address: u64, event: &IoEvent) -> io::Result<()> {
        let mut registered = self.lock();
        if registered.iter().any(|r| r.is(address, event)) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        registered.push(Registered {
            address,
            length: event.length,
            value: event.value,
            event: event.event.try_clone()?,
        });
        Ok(())
    }

    fn remove(&self, address: u64, event: &IoEvent) {
        let mut registered = self.lock();
        let index = registered
            .iter()
            .position(|r| r.is(address, event))
            .expect("removed an I/O event that was not registered");
        registered.remove(index);
    }
}
