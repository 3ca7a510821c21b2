//! A plugin for QEMU's TCG that counts the instructions which the emulated machine executes, in the
//! kernel's half of the addresses and in the other. `main.rs` compiles it and loads it into the QEMU
//! that runs the nested host.
//!
//! Whoever connects to the Unix socket that the argument `socket=PATH` names gets both counts as two
//! 64-bit numbers. Interface: QEMU's "TCG Plugins" documentation, plugin API version 4 (QEMU 10).

use std::ffi::{CStr, c_char, c_int, c_void};
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::sync::OnceLock;
use std::thread;

/// QEMU's handle of a plugin.
type Id = u64;

/// A 64-bit number that each virtual processor has its own of.
#[repr(C)]
#[derive(Clone, Copy)]
struct PerCpu {
    scoreboard: *mut c_void,
    offset: usize,
}

// SAFETY: QEMU's functions on a scoreboard may be called from any thread.
unsafe impl Send for PerCpu {}
// SAFETY: as above.
unsafe impl Sync for PerCpu {}

unsafe extern "C" {
    fn qemu_plugin_register_vcpu_tb_trans_cb(id: Id, callback: extern "C" fn(Id, *mut c_void));
    fn qemu_plugin_tb_n_insns(block: *const c_void) -> usize;
    fn qemu_plugin_tb_vaddr(block: *const c_void) -> u64;
    fn qemu_plugin_scoreboard_new(element_size: usize) -> *mut c_void;
    fn qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(
        block: *mut c_void,
        operation: c_int,
        entry: PerCpu,
        number: u64,
    );
    fn qemu_plugin_u64_sum(entry: PerCpu) -> u64;
}

/// QEMU_PLUGIN_INLINE_ADD_U64
const ADD: c_int = 0;

/// The version of the interface that this is written for.
#[allow(non_upper_case_globals, reason = "QEMU's name")]
#[unsafe(no_mangle)]
pub static qemu_plugin_version: c_int = 4;

/// Instructions below and in the kernel's half.
static COUNTS: OnceLock<[PerCpu; 2]> = OnceLock::new();

/// QEMU calls this once, before the machine runs.
///
/// # Safety
/// `arguments` are `count` terminated strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemu_plugin_install(
    id: Id,
    _info: *const c_void,
    count: c_int,
    arguments: *const *const c_char,
) -> c_int {
    let mut path = None;
    for index in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: QEMU passes `count` terminated strings.
        let argument = unsafe { CStr::from_ptr(*arguments.add(index)) };
        path = argument
            .to_str()
            .ok()
            .and_then(|text| text.strip_prefix("socket="));
    }
    let listener = path.map(UnixListener::bind);
    let Some(Ok(listener)) = listener else {
        eprintln!("instruction counter: no socket: {listener:?}");
        return 1;
    };
    // SAFETY: a scoreboard may be made at any time; its elements begin as zeroes.
    let new = || PerCpu {
        scoreboard: unsafe { qemu_plugin_scoreboard_new(8) },
        offset: 0,
    };
    let counts = *COUNTS.get_or_init(|| [new(), new()]);
    // SAFETY: the callback has the right type and lives as long as the program.
    unsafe { qemu_plugin_register_vcpu_tb_trans_cb(id, translated) };
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            for count in counts {
                // SAFETY: the scoreboard is never freed.
                let sum = unsafe { qemu_plugin_u64_sum(count) };
                // Who went away needs no answer.
                let _ = stream.write_all(&sum.to_ne_bytes());
            }
        }
    });
    0
}

/// Each execution of a block adds the number of its instructions.
extern "C" fn translated(_: Id, block: *mut c_void) {
    let Some(counts) = COUNTS.get() else { return };
    // SAFETY: QEMU passes a block that lives until this returns.
    unsafe {
        let half = usize::from(qemu_plugin_tb_vaddr(block) >> 63 == 1);
        let length = qemu_plugin_tb_n_insns(block) as u64;
        qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(block, ADD, counts[half], length);
    }
}
