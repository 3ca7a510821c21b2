//! ACPI tables of the machine (ACPI 6.5), hardware-reduced: no legacy fixed registers, no SCI.
//!
//! Power-off goes through the sleep control register, reset through the reset register, and the
//! power button arrives as an interrupt of a Generic Event Device.

mod dmar;
mod dsdt;

use std::ops::Range;

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use iommu::GuestRam;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{Immutable, IntoBytes};

use crate::layout;

pub use dmar::DmarConfig;

const OEM: [u8; 6] = *b"RNGSDE";
const TABLE: [u8; 8] = *b"RINGSIDE";
const REVISION: u32 = 1;
/// The IOAPIC's id in the MADT, by which the DMAR table names it too.
const IOAPIC_ID: u8 = 0;

/// FADT `IAPC_BOOT_ARCH` (5.2.9.3): no VGA.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
/// FADT `IAPC_BOOT_ARCH`: the CMOS clock is not for the operating system; kvmclock is.
const BOOT_ARCH_NO_CMOS_RTC: u16 = 1 << 5;
/// What the reset register takes: hard reset.
pub const RESET_VALUE: u8 = 0x06;
/// `SLP_TYP` of S5.
pub const SLEEP_TYPE_S5: u8 = 5;

/// What the tables depend on.
#[derive(Clone, Debug)]
pub struct AcpiConfig {
    /// Virtual CPUs; their APIC ids are 0 up to this less one.
    pub vcpus: u8,
    /// Memory window for 64-bit BARs.
    pub pci_window_64: Range<u64>,
    /// The remapping unit, if there is one.
    pub iommu: Option<DmarConfig>,
}

/// The tables do not fit in their area.
#[derive(Debug, thiserror::Error)]
#[error("the ACPI tables do not fit in guest memory")]
pub struct AcpiError;

/// Writes all tables and gives the address of the root pointer.
///
/// # Errors
///
/// Guest memory is smaller than 1 MiB.
pub fn write(ram: &GuestRam, config: &AcpiConfig) -> Result<u64, AcpiError> {
    let mut area = Area {
        ram,
        next: layout::ACPI_TABLES.start + u64::try_from(Rsdp::len()).map_err(|_| AcpiError)?,
    };
    let dsdt = area.put(&dsdt::table(config))?;
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(area.put(&bytes(&fadt(dsdt)))?);
    xsdt.add_entry(area.put(&bytes(&madt(config.vcpus)))?);
    xsdt.add_entry(area.put(&bytes(&mcfg()))?);
    if let Some(iommu) = &config.iommu {
        xsdt.add_entry(area.put(&dmar::table(iommu))?);
    }
    let xsdt = area.put(&bytes(&xsdt))?;
    let root = bytes(&Rsdp::new(OEM, xsdt));
    ram.write_slice(&root, GuestAddress(layout::ACPI_TABLES.start))
        .map_err(|_| AcpiError)?;
    Ok(layout::ACPI_TABLES.start)
}

struct Area<'a> {
    ram: &'a GuestRam,
    next: u64,
}

impl Area<'_> {
    fn put(&mut self, table: &[u8]) -> Result<u64, AcpiError> {
        let start = self.next.next_multiple_of(64);
        let len = u64::try_from(table.len()).map_err(|_| AcpiError)?;
        if start + len > layout::ACPI_TABLES.end {
            return Err(AcpiError);
        }
        self.ram
            .write_slice(table, GuestAddress(start))
            .map_err(|_| AcpiError)?;
        self.next = start + len;
        Ok(start)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |port: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            port.into(),
        )
    };
    let mut table = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // Set means "no fixed button": the power button is a device in the DSDT.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    table.iapc_boot_arch = (BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_CMOS_RTC).into();
    table.reset_reg = port(layout::RESET_CONTROL);
    table.reset_value = RESET_VALUE;
    table.sleep_control_reg = port(layout::SLEEP_CONTROL);
    table.sleep_status_reg = port(layout::SLEEP_STATUS);
    table.finalize()
}

/// Local APIC NMI structure (5.2.12.7).
#[repr(C, packed)]
#[derive(Clone, Copy, IntoBytes, Immutable)]
struct LocalApicNmi {
    kind: u8,
    length: u8,
    /// 0xff: all processors.
    processor: u8,
    flags: [u8; 2],
    lint: u8,
}

impl Aml for LocalApicNmi {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.as_bytes());
    }
}

/// Every APIC id here is under 255, for which the specification wants the plain local APIC
/// structures also on machines with x2APIC (5.2.12.12).
fn madt(vcpus: u8) -> MADT {
    let local = u32::try_from(layout::LOCAL_APIC).unwrap_or(0);
    let ioapic = u32::try_from(layout::IOAPIC.start).unwrap_or(0);
    let mut table = MADT::new(
        OEM,
        TABLE,
        REVISION,
        LocalInterruptController::Address(local),
    );
    for id in 0..vcpus {
        table.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(IOAPIC_ID, ioapic, 0));
    table.add_structure(LocalApicNmi {
        kind: 4,
        length: 6,
        processor: 0xff,
        flags: [0; 2],
        lint: 1,
    });
    table
}

fn mcfg() -> MCFG {
    let mut table = MCFG::new(OEM, TABLE, REVISION);
    table.add_ecam(layout::ECAM.start, 0, 0, 0xff);
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    fn read(ram: &GuestRam, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        ram.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }

    fn long(data: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(*data[at..].first_chunk().unwrap())
    }

    fn table(ram: &GuestRam, at: u64) -> Vec<u8> {
        let header = read(ram, at, 36);
        let len = u32::from_le_bytes(*header[4..].first_chunk().unwrap());
        read(ram, at, len as usize)
    }

    #[test]
    fn all_tables_are_found_and_sum_to_zero() {
        let ram = memory::allocate(64 << 20).unwrap();
        let config = AcpiConfig {
            vcpus: 32,
            pci_window_64: layout::pci_window_64(46),
            iommu: Some(DmarConfig {
                host_address_width: 46,
                interrupt_remapping: true,
            }),
        };
        let root = write(&ram, &config).unwrap();
        let rsdp = read(&ram, root, 36);
        assert!(rsdp.starts_with(b"RSD PTR "));
        let sum = |data: &[u8]| data.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
        let xsdt = table(&ram, long(&rsdp, 24));
        assert_eq!(sum(&xsdt), 0);
        let mut seen = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let table = table(&ram, long(entry, 0));
            assert_eq!(sum(&table), 0);
            seen.push(String::from_utf8_lossy(&table[..4]).into_owned());
            match &table[..4] {
                b"FACP" => {
                    let dsdt = super::tests::table(&ram, long(&table, 140));
                    assert!(dsdt.starts_with(b"DSDT"));
                    assert_eq!(sum(&dsdt), 0);
                    assert_eq!(long(&table, 244 + 4), u64::from(layout::SLEEP_CONTROL));
                }
                b"APIC" => assert_eq!(table.len(), 44 + 32 * 8 + 12 + 6),
                b"DMAR" => assert_eq!(table.len(), 72),
                b"MCFG" => assert_eq!(long(&table, 44), layout::ECAM.start),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(seen, ["FACP", "APIC", "MCFG", "DMAR"]);
    }
}
