//! The bare guest (`tests/bare/guest.S`) and machines to run it in.

#![allow(
    dead_code,
    clippy::cast_possible_truncation,
    reason = "shared by several test programs"
)]

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vmm::kvm::Host;
use vmm::machine::{
    ExitReason, IommuSpec, LargestPage, Machine, MachineSpec, OnReboot, SerialMode,
};

/// The guest as an ELF file with a PVH note.
pub fn elf() -> PathBuf {
    PathBuf::from(env!("BARE_GUEST"))
}

/// The test kernel (`tests/bare/multiboot`), a 32-bit ELF file with a multiboot header.
pub fn multiboot_elf() -> PathBuf {
    PathBuf::from(env!("MULTIBOOT_GUEST"))
}

/// The guest's only segment: (load address, bytes).
fn segment() -> (u64, Vec<u8>) {
    let file = fs::read(elf()).unwrap();
    let long = |at: usize| u64::from_le_bytes(*file[at..].first_chunk().unwrap());
    let header = long(32) as usize;
    let (offset, address, size) = (long(header + 8), long(header + 24), long(header + 32));
    (
        address,
        file[offset as usize..(offset + size) as usize].to_vec(),
    )
}

/// The same guest as a bzImage, written into `folder`.
pub fn bzimage(folder: &Path) -> PathBuf {
    let (address, code) = segment();
    let mut image = vec![0; 1024];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup_sects
    put(0x1fe, &[0x55, 0xaa]);
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes());
    put(0x211, &[1]); // LOADED_HIGH
    put(0x214, &0x10_0000u32.to_le_bytes());
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1]); // relocatable
    put(0x236, &1u16.to_le_bytes()); // XLF_KERNEL_64
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &address.to_le_bytes());
    put(0x260, &(code.len() as u32).to_le_bytes());
    image.extend(code);
    let path = folder.join("bare-guest.bzImage");
    fs::write(&path, image).unwrap();
    path
}

/// This host's KVM; `None`, with a word to the reader, where there is none to test with.
pub fn host() -> Option<Host> {
    match Host::open() {
        Ok(host) => Some(host),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// A remapping unit as `--iommu` makes it.
pub fn iommu() -> IommuSpec {
    IommuSpec {
        scalable: false,
        address_width: 48,
        caching_mode: false,
        coherent: true,
        interrupt_remapping: true,
        x2apic: None,
        pass_through: true,
        first_stage: false,
        second_stage: true,
        largest_page: LargestPage::Gib1,
        iotlb_sets: 64,
        iotlb_ways: 4,
        fault_registers: 8,
        trace: None,
    }
}

/// A machine for the bare guest, with its serial line in a file.
pub struct Bare {
    pub spec: MachineSpec,
    pub folder: TempDir,
}

impl Bare {
    /// Runs `program` on one vCPU with 64 MiB. `None` where there is no KVM.
    pub fn new(program: &str) -> Option<Bare> {
        host()?;
        let folder = tempfile::tempdir().unwrap();
        let spec = MachineSpec {
            name: "bare".into(),
            kernel: elf(),
            initrd: None,
            cmdline: program.into(),
            vcpus: 1,
            memory: 64 << 20,
            nvme: Vec::new(),
            net: Vec::new(),
            edu: Vec::new(),
            dma_probe: Vec::new(),
            iommu: None,
            vsock: None,
            serial: SerialMode::File(folder.path().join("serial")),
            on_reboot: OnReboot::Exit,
            test_ports: false,
            trace_boot: false,
        };
        Some(Bare { spec, folder })
    }

    /// The machine.
    pub fn machine(&self) -> Machine {
        Machine::new(&self.spec).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Runs it to its end: why it ended and what it printed.
    pub fn run(&self) -> (ExitReason, String) {
        let reason = self.machine().run().unwrap();
        (reason, self.printed())
    }

    /// What it printed so far.
    pub fn printed(&self) -> String {
        fs::read_to_string(self.folder.path().join("serial")).unwrap()
    }
}

/// Runs `program`, which must switch the machine off, and gives what it printed.
pub fn print(program: &str) -> Option<String> {
    let (reason, text) = Bare::new(program)?.run();
    assert_eq!(reason, ExitReason::PowerOff, "{text}");
    Some(text)
}
