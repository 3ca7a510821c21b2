//! From a requester id to what applies to its requests (VT-d rev 4.1, 3.4).

use super::{Fault, Walk};
use crate::vtd::spec::tables::{
    POINTER, beyond, context, pasid, pasid_directory, root, scalable_context,
};
use crate::{Context, FaultReason, Gpa, SourceId, Stage};

impl Walk<'_> {
    /// Legacy mode: root entry, context entry (3.4.2).
    pub(super) fn legacy_context(
        &mut self,
        table: Gpa,
        source: SourceId,
    ) -> Result<Context, Fault> {
        let [bus, devfn] = source.0.to_be_bytes().map(u64::from);

        let [low, high] =
            self.entry(table.0 + bus * root::BYTES, FaultReason::ROOT_ENTRY_ACCESS)?;
        self.check(low & root::PRESENT == 0, FaultReason::ROOT_NOT_PRESENT)?;
        let reserved = low & root::RESERVED | self.beyond_host(low) | high;
        self.check(reserved != 0, FaultReason::ROOT_RESERVED)?;

        let [low, high] = self.entry(
            (low & POINTER) + devfn * context::BYTES,
            FaultReason::CONTEXT_ENTRY_ACCESS,
        )?;
        self.suppressed = low & context::FPD != 0;
        self.check(
            low & context::PRESENT == 0,
            FaultReason::CONTEXT_NOT_PRESENT,
        )?;
        let translation = low >> context::TT_SHIFT & context::TT_MASK;
        let mut reserved = low & context::RESERVED_0 | high & context::RESERVED_1;
        if translation != context::TT_PASS_THROUGH {
            reserved |= self.beyond_host(low);
        }
        self.check(reserved != 0, FaultReason::CONTEXT_RESERVED)?;
        // TT 01 asks for a device-TLB, which is not offered; 11 is reserved.
        let stage = match translation {
            context::TT_SECOND_STAGE => self.second_stage(
                low,
                high & context::AW_MASK,
                false,
                self.options.coherent,
                FaultReason::CONTEXT_INVALID,
            )?,
            context::TT_PASS_THROUGH if self.options.pass_through => {
                let width = self.options.address_widths.width(high & context::AW_MASK);
                self.check(width.is_none(), FaultReason::CONTEXT_INVALID)?;
                self.pass_through()
            }
            _ => return Err(self.fault(FaultReason::CONTEXT_INVALID)),
        };
        Ok(self.result(high >> context::DID_SHIFT, stage))
    }

    /// Scalable mode: root entry, context entry, PASID directory and table (3.4.3).
    pub(super) fn scalable_context(
        &mut self,
        table: Gpa,
        source: SourceId,
    ) -> Result<Context, Fault> {
        let [bus, devfn] = source.0.to_be_bytes().map(u64::from);

        // The halves of a root entry are two entries: each has its own present bit.
        let half = devfn >> 7;
        let entry = self.qword(
            table.0 + bus * root::BYTES + half * 8,
            FaultReason::SM_ROOT_ENTRY_ACCESS,
        )?;
        self.check(entry & root::PRESENT == 0, FaultReason::SM_ROOT_NOT_PRESENT)?;
        let reserved = entry & root::RESERVED | self.beyond_host(entry);
        self.check(reserved != 0, FaultReason::SM_ROOT_RESERVED)?;

        let context: [u64; scalable_context::QWORDS] = self.entry(
            (entry & POINTER) + (devfn & 0x7f) * scalable_context::BYTES,
            FaultReason::SM_CONTEXT_ENTRY_ACCESS,
        )?;
        self.suppressed = context[0] & scalable_context::FPD != 0;
        self.check(
            context[0] & scalable_context::PRESENT == 0,
            FaultReason::SM_CONTEXT_NOT_PRESENT,
        )?;
        self.check(
            self.scalable_context_reserved(&context) != 0,
            FaultReason::SM_CONTEXT_RESERVED,
        )?;
        let id = context[1] & scalable_context::RID_PASID_MASK;
        let supervisor = context[1] & scalable_context::RID_PRIV != 0;
        let index = id >> pasid_directory::INDEX_SHIFT;
        let size =
            1 << ((context[0] >> scalable_context::PDTS_SHIFT & scalable_context::PDTS_MASK) + 7);
        self.check(index >= size, FaultReason::SM_CONTEXT_INVALID)?;

        let directory = self.qword(
            (context[0] & POINTER) + index * pasid_directory::BYTES,
            FaultReason::PASID_DIRECTORY_ACCESS,
        )?;
        self.suppressed |= directory & pasid_directory::FPD != 0;
        self.check(
            directory & pasid_directory::PRESENT == 0,
            FaultReason::PASID_DIRECTORY_NOT_PRESENT,
        )?;
        let reserved = directory & pasid_directory::RESERVED | self.beyond_host(directory);
        self.check(reserved != 0, FaultReason::PASID_DIRECTORY_RESERVED)?;

        let entry: [u64; pasid::QWORDS] = self.entry(
            (directory & POINTER) + (id & pasid::INDEX_MASK) * pasid::BYTES,
            FaultReason::PASID_ENTRY_ACCESS,
        )?;
        self.suppressed |= entry[0] & pasid::FPD != 0;
        self.check(
            entry[0] & pasid::PRESENT == 0,
            FaultReason::PASID_NOT_PRESENT,
        )?;
        self.check(
            self.pasid_reserved(&entry) != 0,
            FaultReason::PASID_RESERVED,
        )?;
        let stage = self.pasid_stage(&entry, supervisor)?;
        self.check(
            supervisor && entry[2] & pasid::SRE == 0,
            FaultReason::PASID_SUPERVISOR_OFF,
        )?;
        Ok(self.result(entry[1], stage))
    }

    fn pasid_stage(&self, entry: &[u64; pasid::QWORDS], supervisor: bool) -> Result<Stage, Fault> {
        let walk_snoop = entry[1] & pasid::PWSNP != 0;
        match translation_type(entry) {
            pasid::PGTT_FIRST if self.options.first_stage => {
                let levels = match entry[2] >> pasid::FSPM_SHIFT & pasid::FSPM_MASK {
                    pasid::FSPM_4_LEVEL => 4,
                    pasid::FSPM_5_LEVEL if self.options.first_stage_5_level => 5,
                    _ => return Err(self.fault(FaultReason::PASID_INVALID)),
                };
                Ok(Stage::First {
                    table: Gpa(entry[2] & POINTER),
                    levels,
                    write_protect: entry[2] & pasid::WPE != 0,
                    supervisor,
                    walk_snoop,
                })
            }
            pasid::PGTT_SECOND if self.options.second_stage => self.second_stage(
                entry[0],
                entry[0] >> pasid::AW_SHIFT & pasid::AW_MASK,
                entry[0] & pasid::SSADE != 0,
                walk_snoop,
                FaultReason::PASID_INVALID,
            ),
            pasid::PGTT_PASS_THROUGH if self.options.pass_through => Ok(self.pass_through()),
            // Among them PGTT_NESTED: ECAP.NEST is clear.
            _ => Err(self.fault(FaultReason::PASID_INVALID)),
        }
    }

    fn second_stage(
        &self,
        pointer: u64,
        aw: u64,
        access_dirty: bool,
        walk_snoop: bool,
        invalid: FaultReason,
    ) -> Result<Stage, Fault> {
        let Some(width) = self.options.address_widths.width(aw) else {
            return Err(self.fault(invalid));
        };
        Ok(Stage::Second {
            table: Gpa(pointer & POINTER),
            levels: (width - 12) / 9,
            access_dirty,
            walk_snoop,
        })
    }

    fn pass_through(&self) -> Stage {
        Stage::PassThrough {
            width: self.options.host_address_width,
        }
    }

    fn result(&self, domain: u64, stage: Stage) -> Context {
        let [low, high, ..] = domain.to_le_bytes();
        Context {
            domain: u16::from_le_bytes([low, high]),
            stage,
            fault_processing_disable: self.suppressed,
        }
    }

    /// The bits of the pointer in `entry` that are reserved because host addresses are shorter.
    fn beyond_host(&self, entry: u64) -> u64 {
        entry & POINTER & beyond(self.options.host_address_width)
    }

    fn scalable_context_reserved(&self, entry: &[u64; scalable_context::QWORDS]) -> u64 {
        use scalable_context::{DTE, PASIDE, PRE, RESERVED_0, RESERVED_1, RID_PRIV};
        // Device-TLBs, requests with PASID and page requests are not offered.
        entry[0] & (RESERVED_0 | DTE | PASIDE | PRE)
            | self.beyond_host(entry[0])
            | entry[1] & RESERVED_1
            | unless(self.options.supervisor, entry[1] & RID_PRIV)
            | entry[2]
            | entry[3]
    }

    fn pasid_reserved(&self, entry: &[u64; pasid::QWORDS]) -> u64 {
        use pasid::{
            CD, EAFE, EMTE, ERE, PGSNP, PGTT_FIRST, PGTT_NESTED, PGTT_SECOND, PWSNP, RESERVED_0,
            RESERVED_1, RESERVED_2, SRE, SSADE, SSEE, WPE,
        };
        let options = self.options;
        let translation = translation_type(entry);
        let first = matches!(translation, PGTT_FIRST | PGTT_NESTED);
        let second = matches!(translation, PGTT_SECOND | PGTT_NESTED);
        // Execute requests, memory types and extended accessed flags are not offered. A pointer that
        // the translation type does not use is ignored.
        entry[0] & (RESERVED_0 | SSEE)
            | unless(
                options.second_stage && options.accessed_dirty,
                entry[0] & SSADE,
            )
            | unless(!second, self.beyond_host(entry[0]))
            | entry[1] & (RESERVED_1 | CD | EMTE)
            | unless(options.scalable_coherent, entry[1] & PWSNP)
            | unless(options.snoop_control, entry[1] & PGSNP)
            | entry[2] & (RESERVED_2 | ERE | EAFE)
            | unless(options.supervisor, entry[2] & (SRE | WPE))
            | unless(!first, self.beyond_host(entry[2]))
            | entry[3..].iter().fold(0, |all, qword| all | qword)
    }
}

fn translation_type(entry: &[u64; pasid::QWORDS]) -> u64 {
    entry[0] >> pasid::PGTT_SHIFT & pasid::PGTT_MASK
}

/// `bits`, which are reserved unless `offered`.
fn unless(offered: bool, bits: u64) -> u64 {
    if offered { 0 } else { bits }
}
