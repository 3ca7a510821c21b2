//! Model-specific registers at start. KVM's defaults are mostly right; a host that refuses one of the
//! rest is tolerated with one warning, because no guest needs them.

use std::sync::Once;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

/// `IA32_MISC_ENABLE` (Intel SDM volume 4): fast string operations.
const MISC_ENABLE: (u32, u64) = (0x1a0, 1);
/// `IA32_MTRR_DEF_TYPE` (Intel SDM volume 3, 12.11.2.1): MTRRs on, everything write-back. Device
/// memory is made uncacheable by the guest's page tables.
const MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 1 << 11 | 6);

static WARNED: Once = Once::new();

/// Sets the registers one by one, so that one refusal does not take the others along.
pub fn set(vcpu: &VcpuFd) {
    let mut refused = Vec::new();
    for (index, data) in [MISC_ENABLE, MTRR_DEF_TYPE] {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let done = Msrs::from_entries(&[entry])
            .ok()
            .and_then(|msrs| vcpu.set_msrs(&msrs).ok());
        if done != Some(1) {
            refused.push(format!("{index:#x}"));
        }
    }
    if !refused.is_empty() {
        WARNED.call_once(|| {
            tracing::warn!(
                "this host's KVM refuses the MSRs {}; the guest starts without them",
                refused.join(", ")
            );
        });
    }
}
