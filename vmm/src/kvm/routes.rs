//! Interrupt messages through KVM: one irqfd and one entry of the VM's GSI routing table per line.
//!
//! KVM replaces the whole routing table at each change and switches irqfds over under its own lock,
//! so an interrupt fired during a change takes the old route or the new one and is never lost.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommu::{MsiLine, MsiMessage, MsiSink, SourceId};
use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_msi};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use crate::ioapic;

/// Entries in KVM's routing table (`KVM_MAX_IRQ_ROUTES`).
const MAX_ROUTES: u32 = 4096;

/// Opens MSI lines on a VM.
pub struct KvmMsiSink {
    shared: Arc<Shared>,
}

struct Shared {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

/// The routing table as KVM has it, and which GSIs are taken.
struct Table {
    routes: BTreeMap<u32, MsiMessage>,
    free: Vec<u32>,
    next: u32,
}

impl KvmMsiSink {
    /// A sink with all lines free. The first GSIs are kept for the IOAPIC's pins: KVM reports end of
    /// interrupt for level-triggered routes of these alone.
    pub fn new(vm: Arc<VmFd>) -> KvmMsiSink {
        KvmMsiSink {
            shared: Arc::new(Shared {
                vm,
                table: Mutex::new(Table {
                    routes: BTreeMap::new(),
                    free: Vec::new(),
                    next: u32::from(ioapic::PINS),
                }),
            }),
        }
    }

    /// Opens the lines of the IOAPIC's pins. To be called once.
    ///
    /// # Errors
    ///
    /// The host is out of file descriptors, or the lines are open already.
    pub fn open_ioapic_pins(&self) -> io::Result<Vec<Arc<dyn MsiLine>>> {
        (0..u32::from(ioapic::PINS))
            .map(|gsi| Ok(self.shared.line(gsi, false)? as Arc<dyn MsiLine>))
            .collect()
    }
}

impl MsiSink for KvmMsiSink {
    fn open(&self, _source: SourceId) -> io::Result<Arc<dyn MsiLine>> {
        let gsi = {
            let mut table = self.shared.table();
            match table.free.pop() {
                Some(gsi) => gsi,
                None if table.next < MAX_ROUTES => {
                    table.next += 1;
                    table.next - 1
                }
                None => {
                    return Err(io::Error::other(format!(
                        "all {MAX_ROUTES} interrupt routes of the VM are taken"
                    )));
                }
            }
        };
        match self.shared.line(gsi, true) {
            Ok(line) => Ok(line),
            Err(error) => {
                self.shared.table().free.push(gsi);
                Err(error)
            }
        }
    }

    fn send(&self, _source: SourceId, message: MsiMessage) -> io::Result<()> {
        let [a, b, c, d, e, f, g, h] = message.address.to_le_bytes();
        let msi = kvm_msi {
            address_lo: u32::from_le_bytes([a, b, c, d]),
            address_hi: u32::from_le_bytes([e, f, g, h]),
            data: message.data,
            ..Default::default()
        };
        // Zero: the guest blocked it, as when no local APIC has the id.
        self.shared
            .vm
            .signal_msi(msi)
            .map(drop)
            .map_err(|e| io::Error::from_raw_os_error(e.errno()))
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn line(self: &Arc<Self>, gsi: u32, recycle: bool) -> io::Result<Arc<KvmMsiLine>> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        self.vm
            .register_irqfd(&event, gsi)
            .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        Ok(Arc::new(KvmMsiLine {
            shared: Arc::clone(self),
            event,
            gsi,
            recycle,
        }))
    }

    /// Makes `gsi` deliver `message`, or nothing. Leaves the table as it was if KVM refuses.
    fn set(&self, gsi: u32, message: Option<MsiMessage>) -> io::Result<()> {
        let mut table = self.table();
        let old = match message {
            Some(message) => table.routes.insert(gsi, message),
            None => table.routes.remove(&gsi),
        };
        if old == message {
            return Ok(());
        }
        let result = self.publish(&table);
        if result.is_err() {
            match old {
                Some(old) => table.routes.insert(gsi, old),
                None => table.routes.remove(&gsi),
            };
        }
        result
    }

    fn publish(&self, table: &Table) -> io::Result<()> {
        let entries: Vec<_> = table.routes.iter().map(entry).collect();
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|e| io::Error::other(format!("{e:?}")))?;
        self.vm
            .set_gsi_routing(&routing)
            .map_err(|e| io::Error::from_raw_os_error(e.errno()))
    }
}

fn entry((&gsi, message): (&u32, &MsiMessage)) -> kvm_irq_routing_entry {
    let [a, b, c, d, e, f, g, h] = message.address.to_le_bytes();
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi.address_lo = u32::from_le_bytes([a, b, c, d]);
    entry.u.msi.address_hi = u32::from_le_bytes([e, f, g, h]);
    entry.u.msi.data = message.data;
    entry
}

/// One line: firing it is one write to an eventfd, with no exit and no lock of ours.
struct KvmMsiLine {
    shared: Arc<Shared>,
    event: EventFd,
    gsi: u32,
    recycle: bool,
}

impl MsiLine for KvmMsiLine {
    fn retarget(&self, message: MsiMessage) -> io::Result<()> {
        self.shared.set(self.gsi, Some(message))
    }

    fn fire(&self) {
        // Fails only when the counter is full, and then the interrupt is pending already. Without a
        // route KVM drops the signal.
        let _ = self.event.write(1);
    }
}

/// KVM lets go of an irqfd when its eventfd is closed, which is when the fields are dropped. Asking
/// for it would be milliseconds slower for each line.
impl Drop for KvmMsiLine {
    fn drop(&mut self) {
        match self.shared.set(self.gsi, None) {
            Ok(()) if self.recycle => self.shared.table().free.push(self.gsi),
            Ok(()) => {}
            Err(error) => {
                tracing::warn!(%error, gsi = self.gsi, "cannot remove an interrupt route");
            }
        }
    }
}
