//! One instruction in ring 0 of a guest of its own.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, Msrs, kvm_dtable, kvm_msr_entry, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use serde::Serialize;
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// How a trial ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "outcome")]
pub enum Outcome {
    /// The right result came out.
    Works,
    /// This KVM's CPUID does not announce the instruction, so a kernel does not use it.
    NotAnnounced,
    /// A kernel would have crashed or hung.
    Fails {
        /// What happened.
        how: String,
    },
}

impl Outcome {
    /// It would have broken a kernel.
    pub fn failed(&self) -> bool {
        matches!(self, Outcome::Fails { .. })
    }
}

/// What was tried, and how it ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Trial {
    /// The instruction.
    pub name: &'static str,
    /// What Linux needs it for.
    pub needed_for: &'static str,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// A CPUID bit: leaf, register (0 to 3: EAX to EDX), bit. Intel SDM volume 2, CPUID.
type CpuidBit = (u32, usize, u32);

/// An instruction to try. Its code leaves `expected` in AL; RDI points to zeroed, aligned memory and
/// RBX to an address that is not mapped.
pub(super) struct Instruction {
    name: &'static str,
    needed_for: &'static str,
    announced: Option<CpuidBit>,
    code: &'static [u8],
    expected: u8,
}

/// The first is the baseline: if it fails, all do.
pub(super) const TRIALS: [Instruction; 11] = [
    Instruction {
        name: "integer code",
        needed_for: "everything",
        announced: None,
        code: &[0xb0, 42], // mov al, 42
        expected: 42,
    },
    Instruction {
        name: "page faults",
        needed_for: "user memory access",
        announced: None,
        code: &[0x8a, 0x03], // mov al, [rbx]; the handler skips it
        expected: 42,
    },
    Instruction {
        name: "int3",
        needed_for: "patching of kernel code at boot",
        announced: None,
        code: &[0xcc],
        expected: 42,
    },
    Instruction {
        name: "fninit/fld1/fistp",
        needed_for: "the check of the floating-point unit at boot",
        announced: Some((1, 3, 0)),
        code: &[0xdb, 0xe3, 0xd9, 0xe8, 0xdb, 0x1f, 0x8a, 0x07],
        expected: 1,
    },
    Instruction {
        name: "movq to XMM",
        needed_for: "checksums and cryptography",
        announced: Some((1, 3, 26)),
        // mov eax, 42; movq xmm0, rax; xor eax, eax; movq rax, xmm0
        code: &[
            0xb8, 42, 0, 0, 0, 0x66, 0x48, 0x0f, 0x6e, 0xc0, 0x31, 0xc0, 0x66, 0x48, 0x0f, 0x7e,
            0xc0,
        ],
        expected: 42,
    },
    Instruction {
        name: "SSE2 arithmetic",
        needed_for: "RAID, checksums and cryptography",
        announced: Some((1, 3, 26)),
        // mov dword [rdi], 21; movdqu xmm0, [rdi]; paddd xmm0, xmm0; movdqu [rdi], xmm0;
        // mov al, [rdi]
        code: &[
            0xc7, 0x07, 21, 0, 0, 0, 0xf3, 0x0f, 0x6f, 0x07, 0x66, 0x0f, 0xfe, 0xc0, 0xf3, 0x0f,
            0x7f, 0x07, 0x8a, 0x07,
        ],
        expected: 42,
    },
    Instruction {
        name: "xgetbv",
        needed_for: "the switch between tasks",
        announced: Some((1, 2, 26)),
        // xor ecx, ecx; xgetbv; and al, 1
        code: &[0x31, 0xc9, 0x0f, 0x01, 0xd0, 0x24, 0x01],
        expected: 1,
    },
    Instruction {
        name: "xsave/xrstor",
        needed_for: "the switch between tasks",
        announced: Some((1, 2, 26)),
        // mov eax, 3; xor edx, edx; xsave [rdi]; xrstor [rdi]; mov al, 42
        code: &[
            0xb8, 3, 0, 0, 0, 0x31, 0xd2, 0x0f, 0xae, 0x27, 0x0f, 0xae, 0x2f, 0xb0, 42,
        ],
        expected: 42,
    },
    Instruction {
        name: "popcnt",
        needed_for: "bit masks of CPUs and memory nodes",
        announced: Some((1, 2, 23)),
        // mov eax, 255; popcnt eax, eax
        code: &[0xb8, 255, 0, 0, 0, 0xf3, 0x0f, 0xb8, 0xc0],
        expected: 8,
    },
    Instruction {
        name: "cmpxchg16b",
        needed_for: "the memory allocator",
        announced: Some((1, 2, 13)),
        // xor eax, eax; xor edx, edx; xor ecx, ecx; mov ebx, 42; cmpxchg16b [rdi]; mov al, [rdi]
        code: &[
            0x31, 0xc0, 0x31, 0xd2, 0x31, 0xc9, 0xbb, 42, 0, 0, 0, 0x48, 0x0f, 0xc7, 0x0f, 0x8a,
            0x07,
        ],
        expected: 42,
    },
    Instruction {
        name: "rdtscp",
        needed_for: "the per-CPU clock",
        announced: Some((0x8000_0001, 3, 27)),
        // rdtscp; mov al, 42
        code: &[0x0f, 0x01, 0xf9, 0xb0, 42],
        expected: 42,
    },
];

const MEMORY: usize = 0x10000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const HANDLER_BREAKPOINT: u64 = 0x6000;
const HANDLER_PAGE_FAULT: u64 = 0x6100;
const CODE: u64 = 0x7000;
const STACK_TOP: u64 = 0xa000;
const DATA: u64 = 0xb000;
/// Beyond the one 2 MiB page that is mapped.
const UNMAPPED: u64 = 0x4000_0000;
/// Where the result goes. No host device has to exist: KVM hands the write to us.
const RESULT_PORT: u16 = 0x10;
/// A trial takes microseconds; one that takes this long has hung.
const PATIENCE: Duration = Duration::from_secs(1);

impl Instruction {
    pub(super) fn run(&self, kvm: &Kvm) -> Trial {
        let outcome = match self.announced(kvm) {
            Ok(true) => self.execute(kvm).unwrap_or_else(|error| Outcome::Fails {
                how: format!("KVM refuses to set it up: {error}"),
            }),
            Ok(false) => Outcome::NotAnnounced,
            Err(error) => Outcome::Fails {
                how: format!("KVM does not say which CPUID it supports: {error}"),
            },
        };
        Trial {
            name: self.name,
            needed_for: self.needed_for,
            outcome,
        }
    }

    fn announced(&self, kvm: &Kvm) -> Result<bool, kvm_ioctls::Error> {
        let Some((leaf, register, bit)) = self.announced else {
            return Ok(true);
        };
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        let entry = cpuid.as_slice().iter().find(|entry| entry.function == leaf);
        Ok(entry.is_some_and(|entry| {
            let value = [entry.eax, entry.ebx, entry.ecx, entry.edx][register];
            value & (1 << bit) != 0
        }))
    }

    fn execute(&self, kvm: &Kvm) -> Result<Outcome, kvm_ioctls::Error> {
        let invalid = |_| kvm_ioctls::Error::new(libc::ENOMEM);
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)])
            .map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
        self.fill(&memory).map_err(invalid)?;
        let vm = kvm.create_vm()?;
        map(&vm, &memory)?;
        let vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
        self.set_registers(&vcpu)?;
        Ok(judge(run(vcpu), self.expected))
    }

    /// Page tables, descriptor tables, handlers and the code.
    fn fill(&self, memory: &GuestMemoryMmap<()>) -> Result<(), vm_memory::GuestMemoryError> {
        const PRESENT_WRITABLE: u64 = 3;
        const LARGE: u64 = 1 << 7;
        let write = |bytes: &[u8], at: u64| memory.write_slice(bytes, GuestAddress(at));
        // Intel SDM volume 3, 4.5.4: one 2 MiB page at 0.
        write(&(PDPT | PRESENT_WRITABLE).to_le_bytes(), PML4)?;
        write(&(PD | PRESENT_WRITABLE).to_le_bytes(), PDPT)?;
        write(&(LARGE | PRESENT_WRITABLE).to_le_bytes(), PD)?;
        // Intel SDM volume 3, 3.4.5: a 64-bit code segment and a data segment.
        write(&0x00af_9b00_0000_ffff_u64.to_le_bytes(), GDT + 8)?;
        write(&0x00cf_9300_0000_ffff_u64.to_le_bytes(), GDT + 16)?;
        // Intel SDM volume 3, 6.14.1: interrupt gates through the code segment.
        for (vector, handler) in [(3_u64, HANDLER_BREAKPOINT), (14, HANDLER_PAGE_FAULT)] {
            let gate = handler | (8 << 16) | (0x8e00 << 32);
            write(&gate.to_le_bytes(), IDT + vector * 16)?;
        }
        // mov al, 42; iretq
        write(&[0xb0, 42, 0x48, 0xcf], HANDLER_BREAKPOINT)?;
        // pop rax; add qword [rsp], 2; mov al, 42; iretq
        let skip = [0x58, 0x48, 0x83, 0x04, 0x24, 0x02, 0xb0, 42, 0x48, 0xcf];
        write(&skip, HANDLER_PAGE_FAULT)?;
        write(self.code, CODE)?;
        // out 0x10, al; hlt; jmp to the hlt
        write(
            &[0xe6, 0x10, 0xf4, 0xeb, 0xfd],
            CODE.saturating_add(self.code.len() as u64),
        )
    }

    fn set_registers(&self, vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        let mut sregs = vcpu.get_sregs()?;
        let code = kvm_segment {
            limit: u32::MAX,
            selector: 8,
            type_: 11,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..kvm_segment::default()
        };
        let data = kvm_segment {
            selector: 16,
            type_: 3,
            db: 1,
            l: 0,
            ..code
        };
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
        sregs.gdt = kvm_dtable {
            base: GDT,
            limit: 23,
            ..kvm_dtable::default()
        };
        sregs.idt = kvm_dtable {
            base: IDT,
            limit: 0xfff,
            ..kvm_dtable::default()
        };
        // Intel SDM volume 3, 2.5: PE, MP, ET, NE, WP, PG; PAE, OSFXSR, OSXMMEXCPT.
        sregs.cr0 = 0x8001_0033;
        sregs.cr3 = PML4;
        sregs.cr4 = 0x620;
        if matches!(self.announced, Some((1, 2, 26))) {
            sregs.cr4 |= 1 << 18; // OSXSAVE
        }
        sregs.efer = 0x500; // LME, LMA
        vcpu.set_sregs(&sregs)?;
        let mut regs = vcpu.get_regs()?;
        regs.rip = CODE;
        regs.rsp = STACK_TOP;
        regs.rdi = DATA;
        regs.rbx = UNMAPPED;
        regs.rax = 0;
        regs.rflags = 2;
        vcpu.set_regs(&regs)
    }
}

#[expect(
    unsafe_code,
    reason = "KVM_SET_USER_MEMORY_REGION hands host memory to the guest"
)]
fn map(vm: &VmFd, memory: &GuestMemoryMmap<()>) -> Result<(), kvm_ioctls::Error> {
    for region in memory.iter() {
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr().expose_provenance() as u64,
        };
        // SAFETY: the range is a mapping that `memory` owns, and the caller drops the VM (declared
        // after the memory) first. Nothing else uses the memory while the guest runs.
        unsafe { vm.set_user_memory_region(region)? };
    }
    Ok(())
}

/// What came out of the guest.
enum Ended {
    Result(u8),
    Exit(&'static str),
    Hung,
    Refused(kvm_ioctls::Error),
}

fn judge(ended: Ended, expected: u8) -> Outcome {
    let how = match ended {
        Ended::Result(result) if result == expected => return Outcome::Works,
        Ended::Result(result) => format!("gave {result} instead of {expected}"),
        Ended::Exit(what) => what.to_owned(),
        Ended::Hung => "the guest hung".to_owned(),
        Ended::Refused(error) => format!("KVM_RUN failed: {error}"),
    };
    Outcome::Fails { how }
}

extern "C" fn wake(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Runs until the guest says something. A signal ends a guest that does not.
fn run(vcpu: VcpuFd) -> Ended {
    // A real-time signal that nobody else in the process uses. Its handler need do nothing: a
    // signal ends KVM_RUN with EINTR.
    let signal = SIGRTMIN() + 5;
    if let Err(error) = register_signal_handler(signal, wake) {
        return Ended::Refused(kvm_ioctls::Error::new(error.errno()));
    }
    let give_up = Arc::new(AtomicBool::new(false));
    let (sender, ended) = mpsc::channel();
    let runner = thread::spawn({
        let give_up = Arc::clone(&give_up);
        move || {
            // The receiver waits for this thread's end, so it is there.
            let _ = sender.send(run_until(vcpu, &give_up));
        }
    });
    let mut patience = PATIENCE;
    let result = loop {
        match ended.recv_timeout(patience) {
            Ok(result) => break result,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                give_up.store(true, Ordering::Release);
                // Again and again: a signal that comes just before KVM_RUN is lost.
                let _ = runner.kill(signal);
                patience = Duration::from_millis(20);
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break Ended::Exit("the probe failed"),
        }
    };
    // The vCPU is gone when its thread is, and the caller may free the guest's memory.
    let _ = runner.join();
    result
}

fn run_until(mut vcpu: VcpuFd, give_up: &AtomicBool) -> Ended {
    loop {
        if give_up.load(Ordering::Acquire) {
            return Ended::Hung;
        }
        match vcpu.run() {
            Ok(VcpuExit::IoOut(RESULT_PORT, [result, ..])) => return Ended::Result(*result),
            Ok(VcpuExit::Intr) => {}
            Ok(VcpuExit::InternalError) => return Ended::Exit("KVM cannot emulate it"),
            Ok(VcpuExit::Shutdown) => return Ended::Exit("raised an exception"),
            Ok(VcpuExit::FailEntry(..)) => {
                return Ended::Exit("the CPU refused to enter the guest");
            }
            Ok(_) => return Ended::Exit("ended in an unexpected exit"),
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {}
            Err(error) => return Ended::Refused(error),
        }
    }
}

/// The listed MSRs that KVM does not read.
pub(super) fn unreadable_msrs(kvm: &Kvm) -> Result<Vec<u32>, kvm_ioctls::Error> {
    let list = kvm.get_msr_index_list()?;
    let vm = kvm.create_vm()?;
    let vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let readable = |index: u32| {
        let entry = kvm_msr_entry {
            index,
            ..kvm_msr_entry::default()
        };
        Msrs::from_entries(&[entry]).is_ok_and(|mut msrs| vcpu.get_msrs(&mut msrs) == Ok(1))
    };
    let listed = list.as_slice().iter().copied();
    Ok(listed.filter(|index| !readable(*index)).collect())
}
