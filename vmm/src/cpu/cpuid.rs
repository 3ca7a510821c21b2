//! CPUID as the guest sees it: what the host's KVM supports, with this machine's topology: one
//! package of as many cores as there are vCPUs, one thread each, one shared last-level cache.
//!
//! Leaves: Intel SDM volume 2A, CPUID; AMD APM volume 3 (24594), appendix E.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};

use crate::kvm::{Host, KvmError};

const BASIC: u32 = 0x0;
const FEATURES: u32 = 0x1;
const CACHES: u32 = 0x4;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const EXTENDED_FEATURES: u32 = 0x8000_0001;
const ADDRESS_SIZES: u32 = 0x8000_0008;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;
const AMD_TOPOLOGY_V2: u32 = 0x8000_0026;

const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
const AMD_CMP_LEGACY: u32 = 1 << 1;

const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;
/// In a topology leaf's EBX for a level that has one processor.
const ONE: u32 = 1;

/// The host's part of CPUID, before it is made one vCPU's.
#[derive(Clone)]
pub struct CpuidTemplate {
    entries: Vec<kvm_cpuid_entry2>,
    tsc_deadline: bool,
}

impl CpuidTemplate {
    /// Asks KVM.
    ///
    /// # Errors
    ///
    /// KVM does not say.
    pub fn new(host: &Host) -> Result<CpuidTemplate, KvmError> {
        let supported = host
            .kvm()
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| KvmError::Call("reading the supported CPUID", e))?;
        Ok(CpuidTemplate {
            entries: supported.as_slice().to_vec(),
            tsc_deadline: host
                .kvm()
                .check_extension(kvm_ioctls::Cap::TscDeadlineTimer),
        })
    }

    /// Physical address bits.
    pub fn physical_bits(&self) -> u8 {
        let entry = self.entries.iter().find(|e| e.function == ADDRESS_SIZES);
        entry.map_or(36, |e| e.eax.to_le_bytes()[0])
    }

    /// CPUID of the vCPU with APIC id `id`, one of `count`.
    pub fn vcpu(&self, id: u8, count: u8) -> Vec<kvm_cpuid_entry2> {
        let mut entries = self.entries.clone();
        let made_here = [TOPOLOGY, TOPOLOGY_V2, AMD_TOPOLOGY_V2];
        entries.retain(|e| !made_here.contains(&e.function));
        let topology = Topology::new(id, count);
        for entry in &mut entries {
            self.adapt(entry, &topology);
        }
        let max = entries
            .iter()
            .find(|e| e.function == BASIC)
            .map_or(0, |e| e.eax);
        for leaf in [TOPOLOGY, TOPOLOGY_V2] {
            if leaf <= max {
                entries.extend(topology.leaf(leaf));
            }
        }
        entries
    }

    fn adapt(&self, entry: &mut kvm_cpuid_entry2, topology: &Topology) {
        let Topology { id, count, shift } = *topology;
        match entry.function {
            FEATURES => {
                let slots = if count > 1 { 1 << shift } else { 1 };
                entry.ebx = (entry.ebx & 0x0000_ffff) | slots << 16 | id << 24;
                entry.ecx |= ECX_X2APIC | ECX_HYPERVISOR;
                set(&mut entry.ecx, ECX_TSC_DEADLINE, self.tsc_deadline);
                set(&mut entry.edx, EDX_HTT, count > 1);
            }
            CACHES => share_cache(entry, topology, (1 << shift) - 1),
            AMD_CACHES => share_cache(entry, topology, 0),
            EXTENDED_FEATURES => set(
                &mut entry.ecx,
                AMD_CMP_LEGACY,
                count > 1 && self.extended_topology(),
            ),
            ADDRESS_SIZES if self.extended_topology() => {
                entry.ecx = (entry.ecx & !0xf0ff) | shift << 12 | (count - 1);
            }
            AMD_TOPOLOGY => {
                // One thread a core, one node.
                (entry.eax, entry.ebx, entry.ecx) = (id, id, 0);
            }
            _ => {}
        }
    }

    /// Whether the host has AMD's topology leaves.
    fn extended_topology(&self) -> bool {
        self.entries.iter().any(|e| e.function == AMD_TOPOLOGY)
    }
}

/// KVM's form of the entries.
///
/// # Errors
///
/// There are more than KVM takes.
pub fn to_kvm(entries: &[kvm_cpuid_entry2]) -> Result<CpuId, KvmError> {
    CpuId::from_entries(entries)
        .map_err(|_| KvmError::Call("building CPUID", kvm_ioctls::Error::new(libc::E2BIG)))
}

fn set(word: &mut u32, bit: u32, on: bool) {
    *word = if on { *word | bit } else { *word & !bit };
}

/// Cache sharing in leaves 4 and 0x8000001d, which have the same layout: the last level is shared by
/// all, the others belong to one core. `cores` is for leaf 4's core count field.
fn share_cache(entry: &mut kvm_cpuid_entry2, topology: &Topology, cores: u32) {
    let (kind, level) = (entry.eax & 0x1f, entry.eax >> 5 & 7);
    if kind == 0 {
        return;
    }
    let sharing = match level {
        3.. => (1 << topology.shift) - 1,
        _ => 0,
    };
    entry.eax = (entry.eax & 0x3fff) | sharing << 14 | cores << 26;
}

/// Where one vCPU is.
#[derive(Clone, Copy)]
struct Topology {
    id: u32,
    count: u32,
    /// Bits of the APIC id that number the cores.
    shift: u32,
}

impl Topology {
    fn new(id: u8, count: u8) -> Topology {
        let count = u32::from(count.max(1));
        Topology {
            id: id.into(),
            count,
            shift: count.next_power_of_two().trailing_zeros(),
        }
    }

    /// A V1 or V2 extended topology leaf.
    fn leaf(&self, function: u32) -> [kvm_cpuid_entry2; 3] {
        let level = |index: u32, shift: u32, processors: u32, kind: u32| kvm_cpuid_entry2 {
            function,
            index,
            flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: processors,
            ecx: kind << 8 | index,
            edx: self.id,
            ..Default::default()
        };
        [
            level(0, 0, ONE, LEVEL_SMT),
            level(1, self.shift, self.count, LEVEL_CORE),
            level(2, 0, 0, 0),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: regs[0],
            ebx: regs[1],
            ecx: regs[2],
            edx: regs[3],
            ..Default::default()
        }
    }

    fn template(max: u32) -> CpuidTemplate {
        CpuidTemplate {
            entries: vec![
                entry(0, 0, [max, 0, 0, 0]),
                entry(1, 0, [0, 0x0900_0800, ECX_TSC_DEADLINE, 0]),
                entry(4, 0, [0xfc00_0121, 0, 0, 0]),
                entry(4, 3, [0xfc01_c163, 0, 0, 0]),
                entry(4, 4, [0; 4]),
                entry(0xb, 0, [7, 7, 7, 7]),
                entry(EXTENDED_FEATURES, 0, [0; 4]),
                entry(ADDRESS_SIZES, 0, [0x3028, 0, 0x7010, 0]),
                entry(AMD_CACHES, 3, [0x0001_c163, 0, 0, 0]),
                entry(AMD_TOPOLOGY, 0, [9, 0x0109, 0x0300, 0]),
            ],
            tsc_deadline: false,
        }
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries
            .iter()
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    #[test]
    fn every_leaf_tells_the_same_topology() {
        for count in [1u8, 2, 3, 4, 6, 31, 32] {
            for id in 0..count {
                let entries = template(0x1f).vcpu(id, count);
                let slots = u32::from(count).next_power_of_two();
                let one = find(&entries, 1, 0);
                assert_eq!(one.ebx >> 24, u32::from(id));
                assert_eq!(one.ebx & 0xffff, 0x0800);
                assert_eq!(one.ebx >> 16 & 0xff, slots);
                assert_eq!(one.edx & EDX_HTT != 0, count > 1);
                assert_eq!(one.ecx, ECX_X2APIC | ECX_HYPERVISOR);
                for leaf in [0xb, 0x1f] {
                    let (smt, core, end) = (
                        find(&entries, leaf, 0),
                        find(&entries, leaf, 1),
                        find(&entries, leaf, 2),
                    );
                    assert_eq!((smt.eax, smt.ebx, smt.ecx), (0, 1, 0x100));
                    assert_eq!((1 << core.eax, core.ecx), (slots, 0x201));
                    assert_eq!(core.ebx, u32::from(count));
                    assert_eq!((end.ebx, end.ecx >> 8), (0, 0));
                    assert_eq!((smt.edx, core.edx), (id.into(), id.into()));
                }
                assert_eq!(find(&entries, 4, 0).eax >> 14, (slots - 1) << 12);
                assert_eq!(find(&entries, 4, 3).eax >> 14 & 0xfff, slots - 1);
                assert_eq!(find(&entries, 4, 4).eax, 0);
                let sizes = find(&entries, ADDRESS_SIZES, 0).ecx;
                assert_eq!(sizes & 0xff, u32::from(count) - 1);
                assert_eq!(1 << (sizes >> 12 & 0xf), slots);
                assert_eq!(find(&entries, AMD_TOPOLOGY, 0).eax, u32::from(id));
                assert_eq!(find(&entries, AMD_CACHES, 3).eax >> 14 & 0xfff, slots - 1);
            }
        }
    }

    #[test]
    fn leaves_past_the_maximum_are_not_made() {
        let entries = template(0xd).vcpu(0, 2);
        assert!(entries.iter().any(|e| e.function == TOPOLOGY));
        assert!(!entries.iter().any(|e| e.function == TOPOLOGY_V2));
        assert_eq!(template(0xd).physical_bits(), 0x28);
    }
}
