//! The DMAR table: what the machine tells of its remapping unit (Intel VT-d specification, rev 4.1,
//! chapter 8).

use acpi_tables::sdt::Sdt;
use iommu::Bdf;

use super::{IOAPIC_ID, OEM, REVISION, TABLE};
use crate::layout;

/// DMAR flag: the platform remaps interrupts (8.1). `X2APIC_OPT_OUT`, bit 1, stays clear: the guest
/// may use x2APIC mode.
const INTR_REMAP: u8 = 1 << 0;
/// Remapping structure type: DMA remapping hardware unit (8.3).
const DRHD: u16 = 0;
/// DRHD flag: all functions of the segment that no other unit has.
const INCLUDE_PCI_ALL: u8 = 1 << 0;
/// Device scope type: I/O APIC (8.3.1).
const SCOPE_IOAPIC: u8 = 3;
/// Offset of the first remapping structure.
const STRUCTURES: u32 = 48;

/// What the table depends on.
#[derive(Clone, Copy, Debug)]
pub struct DmarConfig {
    /// Bits of guest-physical addresses.
    pub host_address_width: u8,
    /// The unit remaps interrupts.
    pub interrupt_remapping: bool,
}

pub(super) fn table(config: &DmarConfig) -> Vec<u8> {
    let mut table = Sdt::new(*b"DMAR", STRUCTURES, 1, OEM, TABLE, REVISION);
    table.write_u8(36, config.host_address_width.saturating_sub(1));
    table.write_u8(
        37,
        if config.interrupt_remapping {
            INTR_REMAP
        } else {
            0
        },
    );

    let scope = ioapic_scope(layout::IOAPIC_SOURCE);
    let pages = (layout::VTD.end - layout::VTD.start) / 0x1000;
    let mut unit = Vec::new();
    unit.extend(DRHD.to_le_bytes());
    unit.extend(
        u16::try_from(16 + scope.len())
            .unwrap_or(u16::MAX)
            .to_le_bytes(),
    );
    unit.push(INCLUDE_PCI_ALL);
    // Size of the register set: 2 to this power pages of 4 KiB.
    unit.push(u8::try_from(pages.ilog2()).unwrap_or(0));
    // Segment 0.
    unit.extend(0u16.to_le_bytes());
    unit.extend(layout::VTD.start.to_le_bytes());
    unit.extend(scope);
    table.append_slice(&unit);
    table.as_slice().to_vec()
}

/// Tells under which requester id the IOAPIC's interrupts arrive at the unit.
fn ioapic_scope(source: Bdf) -> [u8; 8] {
    [
        SCOPE_IOAPIC,
        8,
        0,
        0,
        IOAPIC_ID,
        source.bus(),
        source.device(),
        source.function(),
    ]
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_table_reads_back() {
        for interrupt_remapping in [false, true] {
            let config = DmarConfig {
                host_address_width: 46,
                interrupt_remapping,
            };
            let data = table(&config);
            assert!(data.starts_with(b"DMAR"));
            assert_eq!(data.len(), 48 + 16 + 8);
            assert_eq!(data[4..8], 72u32.to_le_bytes());
            assert_eq!(data.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
            assert_eq!((data[36], data[37]), (45, u8::from(interrupt_remapping)));
            assert!(data[38..48].iter().all(|b| *b == 0), "reserved");
            let unit = &data[48..];
            assert_eq!(unit[..4], [0, 0, 24, 0], "a DRHD of 24 bytes");
            assert_eq!(unit[4..8], [1, 0, 0, 0], "all of segment 0, one page");
            assert_eq!(unit[8..16], 0xfed9_0000u64.to_le_bytes());
            let bdf = layout::IOAPIC_SOURCE;
            assert_eq!(
                unit[16..],
                [3, 8, 0, 0, 0, bdf.bus(), bdf.device(), bdf.function()]
            );
        }
    }

    /// Intel's disassembler agrees, where it is installed.
    #[test]
    fn iasl_reads_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("dmar.dat");
        let config = DmarConfig {
            host_address_width: 40,
            interrupt_remapping: true,
        };
        std::fs::write(&file, table(&config)).unwrap();
        let Ok(output) = Command::new("iasl").arg("-d").arg(&file).output() else {
            eprintln!("skipped: there is no iasl");
            return;
        };
        assert!(output.status.success(), "{output:?}");
        let text = std::fs::read_to_string(folder.path().join("dmar.dsl")).unwrap();
        for line in [
            "Host Address Width : 27",
            "Register Base Address : 00000000FED90000",
            "Device Scope Type : 03 [IOAPIC Device]",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
    }
}
