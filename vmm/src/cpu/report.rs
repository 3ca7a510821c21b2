//! Failures of a vCPU in words, with its registers.

use std::fmt::Write;

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, kvm_run, kvm_segment,
};
use kvm_ioctls::VcpuFd;

/// What went wrong on vCPU `id`, followed by its registers.
pub fn failure(id: u8, vcpu: &VcpuFd, what: &str) -> String {
    let mut text = format!("vCPU {id}: {what}\n");
    text.push_str(&registers(vcpu));
    text
}

/// Registers, several to a line.
pub fn registers(vcpu: &VcpuFd) -> String {
    let mut text = String::new();
    match vcpu.get_regs() {
        Ok(r) => {
            let named = [
                ("rax", r.rax),
                ("rbx", r.rbx),
                ("rcx", r.rcx),
                ("rdx", r.rdx),
                ("rsi", r.rsi),
                ("rdi", r.rdi),
                ("rbp", r.rbp),
                ("rsp", r.rsp),
                ("r8", r.r8),
                ("r9", r.r9),
                ("r10", r.r10),
                ("r11", r.r11),
                ("r12", r.r12),
                ("r13", r.r13),
                ("r14", r.r14),
                ("r15", r.r15),
                ("rip", r.rip),
                ("rflags", r.rflags),
            ];
            columns(&mut text, &named);
        }
        Err(error) => {
            let _ = writeln!(text, "  (KVM does not give the registers: {error})");
        }
    }
    match vcpu.get_sregs() {
        Ok(s) => {
            let named = [
                ("cr0", s.cr0),
                ("cr2", s.cr2),
                ("cr3", s.cr3),
                ("cr4", s.cr4),
                ("cr8", s.cr8),
                ("efer", s.efer),
                ("apic", s.apic_base),
            ];
            columns(&mut text, &named);
            for (name, segment) in [("cs", s.cs), ("ds", s.ds), ("ss", s.ss), ("tr", s.tr)] {
                let kvm_segment {
                    selector,
                    base,
                    limit,
                    ..
                } = segment;
                let mode = match (segment.l, segment.db) {
                    (1, _) => "64-bit",
                    (0, 1) => "32-bit",
                    _ => "16-bit",
                };
                let _ = writeln!(
                    text,
                    "  {name:<6} {selector:04x} base {base:016x} limit {limit:08x} {mode}"
                );
            }
            for (name, table) in [("gdt", s.gdt), ("idt", s.idt)] {
                let _ = writeln!(
                    text,
                    "  {name:<6}      base {:016x} limit {:04x}",
                    table.base, table.limit
                );
            }
        }
        Err(error) => {
            let _ = writeln!(text, "  (KVM does not give the segments: {error})");
        }
    }
    text
}

fn columns(text: &mut String, named: &[(&str, u64)]) {
    for row in named.chunks(4) {
        for (name, value) in row {
            let _ = write!(text, "  {name:<6} {value:016x}");
        }
        text.push('\n');
    }
}

/// `KVM_EXIT_INTERNAL_ERROR` in words.
#[expect(unsafe_code, reason = "reads a union that the exit reason selects")]
pub fn internal_error(run: &kvm_run) -> String {
    // SAFETY: the caller has an internal-error exit, for which KVM fills this arm; it is plain data.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    match internal.suberror {
        KVM_INTERNAL_ERROR_EMULATION => {
            // SAFETY: as above; the emulation arm shares its head with the internal arm.
            let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
            let mut text = String::from("KVM cannot emulate the instruction at rip");
            let flag = u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
            if failure.ndata >= 1 && failure.flags & flag != 0 {
                // SAFETY: as above; the flag says that the bytes are there.
                let instruction = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
                let len = usize::from(instruction.insn_size);
                let bytes = instruction.insn_bytes.get(..len).unwrap_or_default();
                let bytes: Vec<_> = bytes.iter().map(|b| format!("{b:02x}")).collect();
                let _ = write!(text, "; its bytes are {}", bytes.join(" "));
            }
            text
        }
        KVM_INTERNAL_ERROR_SIMUL_EX => "KVM met an exception while it delivered another".to_owned(),
        KVM_INTERNAL_ERROR_DELIVERY_EV => format!(
            "an exit in the middle of event delivery, which KVM cannot handle (vectoring info {:#x})",
            internal.data[0]
        ),
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => format!(
            "the CPU left guest mode for a reason that KVM does not know ({:#x})",
            internal.data[0]
        ),
        other => format!("KVM internal error {other}"),
    }
}
