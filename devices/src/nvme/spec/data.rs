//! Data structures that the controller returns. Fields without a doc of their own are reserved or
//! always zero here.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of every Identify data structure.
pub const IDENTIFY_BYTES: usize = 4096;

/// Identify Controller (section 5.15.2.1, figure 247).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IdentifyController {
    /// PCI Vendor ID.
    pub vid: U16,
    /// PCI Subsystem Vendor ID.
    pub ssvid: U16,
    /// Serial Number, ASCII, padded with spaces.
    pub sn: [u8; 20],
    /// Model Number, likewise.
    pub mn: [u8; 40],
    /// Firmware Revision, likewise.
    pub fr: [u8; 8],
    /// Recommended Arbitration Burst, log2.
    pub rab: u8,
    /// IEEE OUI.
    pub ieee: [u8; 3],
    /// Multi-path and namespace sharing.
    pub cmic: u8,
    /// Maximum Data Transfer Size, log2 of minimum pages.
    pub mdts: u8,
    /// Controller ID.
    pub cntlid: U16,
    /// Version, as in VS.
    pub ver: U32,
    /// RTD3 resume and entry latency.
    pub rtd3: [U32; 2],
    /// Optional asynchronous events.
    pub oaes: U32,
    /// Controller attributes.
    pub ctratt: U32,
    /// Read recovery levels.
    pub rrls: U16,
    pub(crate) reserved_102: [u8; 9],
    /// Controller type: 1 is an I/O controller.
    pub cntrltype: u8,
    /// FRU globally unique id.
    pub fguid: [u8; 16],
    pub(crate) reserved_128: [u8; 128],
    /// Optional admin commands.
    pub oacs: U16,
    /// Abort Command Limit, 0's based.
    pub acl: u8,
    /// Asynchronous Event Request Limit, 0's based.
    pub aerl: u8,
    /// Firmware updates: bit 0 slot 1 is read-only, bits 3:1 number of slots.
    pub frmw: u8,
    /// Log page attributes: bit 1 commands supported and effects, bit 2 extended offsets.
    pub lpa: u8,
    /// Error Log Page Entries, 0's based.
    pub elpe: u8,
    /// Number of Power States, 0's based.
    pub npss: u8,
    /// Admin vendor commands.
    pub avscc: u8,
    /// Autonomous power state transitions.
    pub apsta: u8,
    /// Warning Composite Temperature Threshold, Kelvin.
    pub wctemp: U16,
    /// Critical Composite Temperature Threshold, Kelvin.
    pub cctemp: U16,
    pub(crate) reserved_270: [u8; 242],
    /// Submission entry size: required in 3:0, maximum in 7:4, log2.
    pub sqes: u8,
    /// Completion entry size, likewise.
    pub cqes: u8,
    /// Maximum outstanding commands; 0 is not reported.
    pub maxcmd: U16,
    /// Number of Namespaces: the highest valid namespace id.
    pub nn: U32,
    /// Optional NVM commands: bit 2 Dataset Management, bit 3 Write Zeroes, bit 4 Select in Get
    /// Features.
    pub oncs: U16,
    /// Fused operations.
    pub fuses: U16,
    /// Format NVM attributes.
    pub fna: u8,
    /// Volatile write cache: bit 0 present, bits 2:1 Flush of all namespaces.
    pub vwc: u8,
    /// Atomic Write Unit Normal, 0's based blocks.
    pub awun: U16,
    /// Atomic Write Unit Power Fail, 0's based blocks.
    pub awupf: U16,
    pub(crate) reserved_530: [u8; 238],
    /// NVM Subsystem NVMe Qualified Name, UTF-8, zero-terminated.
    pub subnqn: [u8; 256],
    pub(crate) reserved_1024: [u8; 1024],
    /// Power state 0 (figure 249): maximum power in its first word, in 10 mW.
    pub psd0: [u8; 32],
    pub(crate) reserved_2080: [u8; 2016],
}

/// Identify Namespace (section 5.15.2.2, figure 245).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IdentifyNamespace {
    /// Namespace Size, blocks.
    pub nsze: U64,
    /// Namespace Capacity, blocks.
    pub ncap: U64,
    /// Namespace Utilization, blocks.
    pub nuse: U64,
    /// Namespace features.
    pub nsfeat: u8,
    /// Number of LBA Formats, 0's based.
    pub nlbaf: u8,
    /// Formatted LBA Size: index of the format in use.
    pub flbas: u8,
    pub(crate) reserved_27: [u8; 6],
    /// Deallocate features: bit 3 Deallocate in Write Zeroes; bits 2:0 what deallocated blocks
    /// read as, 0 not reported.
    pub dlfeat: u8,
    pub(crate) reserved_34: [u8; 65],
    /// Namespace attributes: bit 0 write protected.
    pub nsattr: u8,
    pub(crate) reserved_100: [u8; 4],
    /// Namespace globally unique id.
    pub nguid: [u8; 16],
    /// IEEE extended unique id.
    pub eui64: [u8; 8],
    /// LBA format 0 (figure 246): data size, log2, in bits 23:16.
    pub lbaf0: U32,
    pub(crate) reserved_132: [u8; 3964],
}

/// Namespace identification descriptor type (figure 251): UUID.
pub const NIDT_UUID: u8 = 3;

/// One entry of the Error Information log (section 5.14.1.1, figure 194).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy, Debug)]
#[repr(C)]
pub struct ErrorEntry {
    /// Error Count: 1 for the first error; 0 is an empty entry.
    pub count: U64,
    /// Submission queue.
    pub sqid: U16,
    /// Command Identifier.
    pub cid: U16,
    /// Status Field shifted left by one; bit 0 is the phase tag.
    pub status: U16,
    /// Parameter Error Location: byte in 7:0, bit in 10:8; FFFFh unknown.
    pub location: U16,
    /// First LBA that failed.
    pub lba: U64,
    /// Namespace.
    pub nsid: U32,
    pub(crate) reserved_28: [u8; 36],
}

/// SMART / Health Information log (section 5.14.1.2, figure 196).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SmartLog {
    /// Critical Warning bits: bit 1 temperature, bit 3 read only.
    pub critical_warning: u8,
    /// Composite Temperature, Kelvin.
    pub temperature: [u8; 2],
    /// Available Spare, percent.
    pub spare: u8,
    /// Available Spare Threshold, percent.
    pub spare_threshold: u8,
    /// Percentage Used.
    pub used: u8,
    pub(crate) reserved_6: [u8; 26],
    /// Data Units Read, thousands of 512 bytes, rounded up.
    pub units_read: Counter,
    /// Data Units Written, likewise.
    pub units_written: Counter,
    /// Host Read Commands.
    pub reads: Counter,
    /// Host Write Commands.
    pub writes: Counter,
    /// Controller Busy Time, minutes.
    pub busy: Counter,
    /// Power Cycles.
    pub power_cycles: Counter,
    /// Power On Hours.
    pub hours: Counter,
    /// Unsafe Shutdowns.
    pub unsafe_shutdowns: Counter,
    /// Media and Data Integrity Errors.
    pub media_errors: Counter,
    /// Number of Error Information Log Entries over the controller's life.
    pub error_entries: Counter,
    pub(crate) reserved_192: [u8; 320],
}

/// A 128-bit counter of the SMART log.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy, Debug)]
#[repr(C)]
pub struct Counter {
    /// Bits 63:0.
    pub low: U64,
    /// Bits 127:64.
    pub high: U64,
}

impl From<u64> for Counter {
    fn from(value: u64) -> Counter {
        Counter {
            low: U64::new(value),
            high: U64::new(0),
        }
    }
}

/// SMART critical warning: temperature over or under a threshold.
pub const WARNING_TEMPERATURE: u8 = 1 << 1;
/// SMART critical warning: media is read-only.
pub const WARNING_READ_ONLY: u8 = 1 << 3;

/// Bytes of the Firmware Slot Information log (figure 199).
pub const FIRMWARE_LOG_BYTES: usize = 512;
/// Bytes of the Commands Supported and Effects log (figure 201).
pub const EFFECTS_LOG_BYTES: usize = 4096;
/// Effects log entry: command supported (figure 202).
pub const EFFECT_SUPPORTED: u32 = 1;
/// Effects log entry: logical block content may change.
pub const EFFECT_CONTENT: u32 = 1 << 1;

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn layouts_are_the_specification_s() {
        assert_eq!(size_of::<IdentifyController>(), IDENTIFY_BYTES);
        assert_eq!(size_of::<IdentifyNamespace>(), IDENTIFY_BYTES);
        assert_eq!(size_of::<ErrorEntry>(), 64);
        assert_eq!(size_of::<SmartLog>(), 512);
        assert_eq!(offset_of!(IdentifyController, mdts), 77);
        assert_eq!(offset_of!(IdentifyController, cntrltype), 111);
        assert_eq!(offset_of!(IdentifyController, oacs), 256);
        assert_eq!(offset_of!(IdentifyController, wctemp), 266);
        assert_eq!(offset_of!(IdentifyController, sqes), 512);
        assert_eq!(offset_of!(IdentifyController, vwc), 525);
        assert_eq!(offset_of!(IdentifyController, subnqn), 768);
        assert_eq!(offset_of!(IdentifyController, psd0), 2048);
        assert_eq!(offset_of!(IdentifyNamespace, dlfeat), 33);
        assert_eq!(offset_of!(IdentifyNamespace, nsattr), 99);
        assert_eq!(offset_of!(IdentifyNamespace, nguid), 104);
        assert_eq!(offset_of!(IdentifyNamespace, lbaf0), 128);
        assert_eq!(offset_of!(SmartLog, units_read), 32);
        assert_eq!(offset_of!(SmartLog, error_entries), 176);
    }
}
