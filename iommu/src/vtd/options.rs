//! What the unit offers.

use crate::IotlbGeometry;

use super::spec::capability::{
    FAULT_RECORDING_REGISTERS, IOTLB_REGISTERS, MAX_FAULT_RECORDS, cap, ecap,
};

/// Address widths of second-stage tables (CAP.SAGAW; VT-d rev 4.1, 11.4.2). At least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressWidths {
    /// 39 bits, 3 levels.
    pub bits_39: bool,
    /// 48 bits, 4 levels.
    pub bits_48: bool,
    /// 57 bits, 5 levels.
    pub bits_57: bool,
}

impl AddressWidths {
    /// The width in bits that the AW field of a context or PASID entry asks for, if it is offered.
    pub const fn width(self, aw: u64) -> Option<u8> {
        match aw {
            1 if self.bits_39 => Some(39),
            2 if self.bits_48 => Some(48),
            3 if self.bits_57 => Some(57),
            _ => None,
        }
    }

    /// The largest width in bits; 0 when there is none.
    pub const fn largest(self) -> u8 {
        match (self.bits_57, self.bits_48, self.bits_39) {
            (true, _, _) => 57,
            (_, true, _) => 48,
            (_, _, true) => 39,
            _ => 0,
        }
    }
}

/// Sizes of second-stage pages besides 4 KiB (CAP.SSLPS).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LargePages {
    /// 2 MiB.
    pub mib_2: bool,
    /// 1 GiB.
    pub gib_1: bool,
}

/// What the unit offers and how large its caches are. [`Options::default`] is what a machine gets that
/// says nothing more than `on`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Host address width in bits, 32 to 52: the width of guest-physical addresses. It is also the
    /// DMAR table's (8.1).
    pub host_address_width: u8,
    /// Widths of second-stage tables. The largest is also the maximum guest address width (CAP.MGAW).
    pub address_widths: AddressWidths,
    /// Sizes of second-stage pages.
    pub large_pages: LargePages,
    /// Scalable mode, and with it abort-DMA mode (ECAP.SMTS, ECAP.ADMS).
    pub scalable: bool,
    /// First-stage translation in scalable mode (ECAP.FSTS).
    pub first_stage: bool,
    /// Second-stage translation in scalable mode (ECAP.SSTS); legacy mode always has it.
    pub second_stage: bool,
    /// Pages of 1 GiB in the first stage (CAP.FS1GP).
    pub first_stage_1g: bool,
    /// 5-level tables in the first stage (CAP.FS5LP).
    pub first_stage_5_level: bool,
    /// Accessed and dirty bits in the second stage in scalable mode (ECAP.SSADS).
    pub accessed_dirty: bool,
    /// Supervisor privilege for requests in scalable mode (ECAP.SRS, ECAP.RPRIVS).
    pub supervisor: bool,
    /// Caching mode (CAP.CM): the guest must invalidate also when it maps.
    pub caching_mode: bool,
    /// Walks of legacy tables snoop (ECAP.C); without it a guest flushes what it writes.
    pub coherent: bool,
    /// Walks of PASID and page tables snoop in scalable mode (ECAP.SMPWCS). Without it the unit may
    /// not set accessed and dirty bits: the guest must have set them.
    pub scalable_coherent: bool,
    /// Snoop control (ECAP.SC).
    pub snoop_control: bool,
    /// Pass-through (ECAP.PT).
    pub pass_through: bool,
    /// Device-TLBs (ECAP.DT). No function of a machine has one, so all that this changes is that
    /// their invalidations are taken instead of being unknown.
    pub device_tlb: bool,
    /// Interrupt remapping (ECAP.IR).
    pub interrupt_remapping: bool,
    /// Extended interrupt mode, x2APIC ids (ECAP.EIM).
    pub extended_interrupt_mode: bool,
    /// Geometry of each worker's IOTLB.
    pub iotlb: IotlbGeometry,
    /// Fault Recording Registers (CAP.NFR), 1 to [`MAX_FAULT_RECORDS`]; a value outside is brought
    /// into the range.
    pub fault_records: u16,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            host_address_width: 46,
            address_widths: AddressWidths {
                bits_39: true,
                bits_48: true,
                bits_57: false,
            },
            large_pages: LargePages {
                mib_2: true,
                gib_1: true,
            },
            scalable: true,
            first_stage: true,
            second_stage: true,
            first_stage_1g: true,
            first_stage_5_level: false,
            accessed_dirty: true,
            supervisor: true,
            caching_mode: false,
            coherent: true,
            scalable_coherent: true,
            snoop_control: true,
            pass_through: true,
            device_tlb: false,
            interrupt_remapping: true,
            extended_interrupt_mode: true,
            iotlb: IotlbGeometry::default(),
            fault_records: 8,
        }
    }
}

impl Options {
    /// Largest address mask of a page-selective invalidation (CAP.MAMV): 1 GiB.
    pub const MAX_ADDRESS_MASK: u8 = 18;
    /// Largest handle mask of an interrupt-entry-cache invalidation (ECAP.MHMV): all handles.
    pub const MAX_HANDLE_MASK: u8 = 15;

    /// Maximum guest address width in bits.
    pub const fn guest_address_width(&self) -> u8 {
        self.address_widths.largest()
    }

    /// Number of Fault Recording Registers, 1 to [`MAX_FAULT_RECORDS`].
    pub fn fault_records(&self) -> u16 {
        self.fault_records.clamp(1, MAX_FAULT_RECORDS)
    }

    /// The Capability Register (11.4.2). Not offered: advanced fault logging, write-buffer flushing,
    /// protected memory regions, zero-length reads, posted interrupts, enhanced root-pointer commands.
    pub fn capability(&self) -> u64 {
        let widths = self.address_widths;
        let mgaw = u64::from(widths.largest().saturating_sub(1));
        let first_stage = self.scalable && self.first_stage;
        cap::ND_64K
            | cap::PSI
            | cap::DWD
            | cap::DRD
            | bit(self.caching_mode, cap::CM)
            | bit(widths.bits_39, cap::SAGAW_39)
            | bit(widths.bits_48, cap::SAGAW_48)
            | bit(widths.bits_57, cap::SAGAW_57)
            | mgaw << cap::MGAW_SHIFT
            | (FAULT_RECORDING_REGISTERS / 16) << cap::FRO_SHIFT
            | bit(self.large_pages.mib_2, cap::SSLPS_2M)
            | bit(self.large_pages.gib_1, cap::SSLPS_1G)
            | u64::from(self.fault_records() - 1) << cap::NFR_SHIFT
            | u64::from(Self::MAX_ADDRESS_MASK) << cap::MAMV_SHIFT
            | bit(first_stage && self.first_stage_1g, cap::FS1GP)
            | bit(first_stage && self.first_stage_5_level, cap::FS5LP)
    }

    /// The Extended Capability Register (11.4.3). Not offered: memory types, nesting, page
    /// requests, execute requests, requests with PASID, virtual commands, performance monitoring.
    pub fn extended_capability(&self) -> u64 {
        let scalable = self.scalable;
        ecap::QI
            | bit(self.coherent, ecap::C)
            | bit(self.device_tlb, ecap::DT)
            | bit(self.interrupt_remapping, ecap::IR)
            | bit(
                self.interrupt_remapping && self.extended_interrupt_mode,
                ecap::EIM,
            )
            | bit(self.pass_through, ecap::PT)
            | bit(self.snoop_control, ecap::SC)
            | (IOTLB_REGISTERS / 16) << ecap::IRO_SHIFT
            | bit(
                self.interrupt_remapping,
                u64::from(Self::MAX_HANDLE_MASK) << ecap::MHMV_SHIFT,
            )
            | bit(scalable, ecap::SMTS | ecap::ADMS | ecap::RPS)
            | bit(scalable && self.supervisor, ecap::SRS | ecap::RPRIVS)
            | bit(
                scalable && self.second_stage && self.accessed_dirty,
                ecap::SSADS,
            )
            | bit(scalable && self.second_stage, ecap::SSTS)
            | bit(scalable && self.first_stage, ecap::FSTS)
            | bit(scalable && self.scalable_coherent, ecap::SMPWCS)
    }
}

const fn bit(on: bool, mask: u64) -> u64 {
    if on { mask } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_of_a_legacy_unit() {
        let options = Options {
            scalable: false,
            interrupt_remapping: false,
            coherent: false,
            fault_records: 1,
            ..Options::default()
        };
        // Literals of the specification's layout, not of our constants.
        assert_eq!(options.capability(), 0x00d2_008c_602f_0606);
        assert_eq!(options.extended_capability(), 0x50c2);
    }

    #[test]
    fn registers_of_a_full_unit() {
        let mut options = Options {
            fault_records: 16,
            first_stage_5_level: true,
            caching_mode: true,
            ..Options::default()
        };
        options.address_widths.bits_57 = true;
        assert_eq!(options.capability(), 0x11d2_0f8c_6038_0e86);
        assert_eq!(options.extended_capability(), 0x0033_e800_80f0_50db);
    }

    #[test]
    fn what_needs_scalable_mode_goes_with_it() {
        let options = Options {
            scalable: false,
            ..Options::default()
        };
        assert_eq!(options.capability() >> 56, 0);
        assert_eq!(options.extended_capability() >> 31, 0);
    }

    #[test]
    fn the_fault_records_fit() {
        for (asked, given) in [(0, 1), (1, 1), (128, 128), (129, 128), (u16::MAX, 128)] {
            let options = Options {
                fault_records: asked,
                ..Options::default()
            };
            assert_eq!(options.fault_records(), given);
            assert_eq!(options.capability() >> 40 & 0xff, u64::from(given - 1));
        }
    }
}
