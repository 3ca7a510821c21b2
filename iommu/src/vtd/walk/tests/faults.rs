//! Each fault reason, by what must be wrong for it.

use super::*;

#[test]
fn legacy_faults() {
    let ram = ram();
    run(
        || Bed::legacy(&ram),
        &[
            (0x30, "TTM 10", |bed| bed.root = Root::from_register(0x1800)),
            (0x30, "abort DMA, not offered", |bed| {
                bed.options.scalable = false;
                bed.root = Root::from_register(0xc00);
            }),
            (0x8, "no root table", |bed| bed.root.table = Gpa(NOWHERE)),
            (0x8, "root table at the end of the address space", |bed| {
                bed.root.table = Gpa(!0xfff);
            }),
            (0x1, "root not present", |bed| {
                bed.change(bed.root_entry(), 1, 0);
            }),
            (0xa, "root bit 1", |bed| bed.change(bed.root_entry(), 0, 2)),
            (0xa, "root bit 11", |bed| {
                bed.change(bed.root_entry(), 0, 1 << 11);
            }),
            (0xa, "root beyond host", |bed| {
                bed.change(bed.root_entry(), 0, BEYOND);
            }),
            (0xa, "root upper qword", |bed| {
                bed.change(Gpa(bed.root_entry().0 + 8), 0, 1);
            }),
            (0x9, "no context table", |bed| {
                bed.change(bed.root_entry(), !0xfff, NOWHERE);
            }),
            (0x2, "context not present", |bed| {
                let at = bed.context(0);
                bed.change(at, 1, 0);
            }),
            (0xb, "context bit 4", |bed| {
                let at = bed.context(0);
                bed.change(at, 0, 1 << 4);
            }),
            (0xb, "context bit 71", |bed| {
                let at = bed.context(1);
                bed.change(at, 0, 1 << 7);
            }),
            (0xb, "context bit 88", |bed| {
                let at = bed.context(1);
                bed.change(at, 0, 1 << 24);
            }),
            (0xb, "page table beyond host", |bed| {
                let at = bed.context(0);
                bed.change(at, 0, BEYOND);
            }),
            (0x3, "AW 0", |bed| {
                let at = bed.context(1);
                bed.change(at, 7, 0);
            }),
            (0x3, "AW of 57 bits, not offered", |bed| {
                let at = bed.context(1);
                bed.change(at, 7, 3);
            }),
            (0x3, "AW 7", |bed| {
                let at = bed.context(1);
                bed.change(at, 0, 7);
            }),
            (0x3, "TT of a device-TLB", |bed| {
                let at = bed.context(0);
                bed.change(at, 0xc, 0x4);
            }),
            (0x3, "TT reserved", |bed| {
                let at = bed.context(0);
                bed.change(at, 0xc, 0xc);
            }),
            (0x3, "pass-through, not offered", |bed| {
                bed.options.pass_through = false;
                let at = bed.context(0);
                bed.change(at, 0xc, 0x8);
            }),
            (0x3, "pass-through, AW not offered", |bed| {
                let at = bed.context(0);
                bed.change(at, 0xc, 0x8);
                let at = bed.context(1);
                bed.change(at, 7, 4);
            }),
            (0x3, "no page table", |bed| {
                let at = bed.context(0);
                bed.change(at, !0xfff, NOWHERE);
            }),
            (0x4, "address beyond 48 bits", |bed| {
                bed.iova = Iova(1 << 48)
            }),
            (0x4, "address with all bits", |bed| {
                bed.iova = Iova(u64::MAX);
            }),
            (0x4, "address beyond host, pass-through", |bed| {
                let at = bed.context(0);
                bed.change(at, 0xc, 0x8);
                bed.iova = Iova(BEYOND);
            }),
            (0x7, "no next table", |bed| {
                bed.change(bed.entry(21), !0xfff, NOWHERE);
            }),
            (0x6, "read, not mapped", |bed| bed.iova = UNMAPPED),
            (0x5, "write, not mapped", |bed| {
                bed.iova = UNMAPPED;
                bed.access = Access::Write;
            }),
            (0x6, "read, write-only", |bed| bed.iova = WRITE_ONLY),
            (0x5, "write, read-only", |bed| {
                bed.iova = READ_ONLY;
                bed.access = Access::Write;
            }),
            (0x5, "write, read-only above", |bed| {
                bed.change(bed.entry(39), 2, 0);
                bed.access = Access::Write;
            }),
            (0x6, "read, write-only above", |bed| {
                bed.change(bed.entry(30), 1, 0);
            }),
            (0x6, "nothing together", |bed| {
                bed.change(bed.entry(30), 1, 0);
                bed.change(bed.entry(12), 2, 0);
            }),
            (0xc, "page beyond host", |bed| {
                bed.change(bed.entry(12), 0, BEYOND);
            }),
            (0xc, "page bit 62", |bed| {
                bed.change(bed.entry(12), 0, 1 << 62);
            }),
            (0xc, "SNP, not offered", |bed| {
                bed.options.snoop_control = false;
                bed.change(bed.entry(12), 0, 1 << 11);
            }),
            (0xc, "SNP in a table's entry", |bed| {
                bed.change(bed.entry(21), 0, 1 << 11);
            }),
            (0xc, "table beyond host", |bed| {
                bed.change(bed.entry(30), 0, BEYOND);
            }),
            (0xc, "PS at level 4", |bed| {
                bed.change(bed.entry(39), 0, 1 << 7);
            }),
            (0xc, "2 MiB, not aligned", |bed| {
                bed.iova = LARGE;
                bed.change(bed.entry(21), 0, 1 << 12);
            }),
            (0xc, "2 MiB, not offered", |bed| {
                bed.options.large_pages.mib_2 = false;
                bed.iova = LARGE;
            }),
            (0xc, "1 GiB, not aligned", |bed| {
                bed.iova = HUGE;
                bed.change(bed.entry(30), 0, 1 << 29);
            }),
            (0xc, "1 GiB, not offered", |bed| {
                bed.options.large_pages.gib_1 = false;
                bed.iova = HUGE;
            }),
            (0xe, "first page of the interrupt range", |bed| {
                bed.change(bed.entry(12), !0xfff, 0xfee0_0000);
            }),
            (0xe, "last page of the interrupt range", |bed| {
                bed.change(bed.entry(12), !0xfff, 0xfeef_f000);
                bed.access = Access::Write;
            }),
            (0xe, "interrupt range in a large page", |bed| {
                bed.iova = LARGE;
                bed.change(bed.entry(21), !0xfff, 0xfee0_0000);
                bed.iova = Iova(LARGE.0 + 0xf_ffff);
            }),
        ],
    );
}

#[test]
fn scalable_faults_up_to_the_pasid_entry() {
    let ram = ram();
    run(
        || Bed::second(&ram),
        &[
            (0x30, "scalable mode, not offered", |bed| {
                bed.options.scalable = false;
            }),
            (0x30, "TTM 10", |bed| bed.root.mode = Mode::Reserved),
            (0x38, "no root table", |bed| bed.root.table = Gpa(NOWHERE)),
            (0x39, "root not present", |bed| {
                bed.change(bed.root_entry(), 1, 0);
            }),
            (0x3a, "root bit 11", |bed| {
                bed.change(bed.root_entry(), 0, 1 << 11);
            }),
            (0x3a, "root beyond host", |bed| {
                bed.change(bed.root_entry(), 0, BEYOND);
            }),
            (0x40, "no context table", |bed| {
                bed.change(bed.root_entry(), !0xfff, NOWHERE);
            }),
            (0x41, "context not present", |bed| {
                let at = bed.context(0);
                bed.change(at, 1, 0);
            }),
            (0x42, "context bit 5", |bed| {
                let at = bed.context(0);
                bed.change(at, 0, 1 << 5);
            }),
            (0x42, "DTE", |bed| {
                let at = bed.context(0);
                bed.change(at, 0, 1 << 2);
            }),
            (0x42, "PASIDE", |bed| {
                let at = bed.context(0);
                bed.change(at, 0, 1 << 3);
            }),
            (0x42, "PRE", |bed| {
                let at = bed.context(0);
                bed.change(at, 0, 1 << 4);
            }),
            (0x42, "context bit 85", |bed| {
                let at = bed.context(1);
                bed.change(at, 0, 1 << 21);
            }),
            (0x42, "RID_PRIV, not offered", |bed| {
                bed.options.supervisor = false;
                let at = bed.context(1);
                bed.change(at, 0, 1 << 20);
            }),
            (0x42, "context bit 128", |bed| {
                let at = bed.context(2);
                bed.change(at, 0, 1);
            }),
            (0x42, "context bit 255", |bed| {
                let at = bed.context(3);
                bed.change(at, 0, 1 << 63);
            }),
            (0x42, "directory beyond host", |bed| {
                let at = bed.context(0);
                bed.change(at, 0, BEYOND);
            }),
            (0x43, "RID_PASID beyond the directory", |bed| {
                let at = bed.context(1);
                bed.change(at, 0, 512 << 6);
            }),
            (0x50, "no directory", |bed| {
                let at = bed.context(0);
                bed.change(at, !0xfff, NOWHERE);
            }),
            (0x51, "directory entry not present", |bed| {
                let at = bed.directory();
                bed.change(at, 1, 0);
            }),
            (0x52, "directory entry bit 2", |bed| {
                let at = bed.directory();
                bed.change(at, 0, 1 << 2);
            }),
            (0x52, "directory entry beyond host", |bed| {
                let at = bed.directory();
                bed.change(at, 0, BEYOND);
            }),
            (0x58, "no PASID table", |bed| {
                let at = bed.directory();
                bed.change(at, !0xfff, NOWHERE);
            }),
            (0x59, "PASID entry not present", |bed| {
                let at = bed.pasid(0);
                bed.change(at, 1, 0);
            }),
            (0x5a, "PASID bit 10", |bed| {
                let at = bed.pasid(0);
                bed.change(at, 0, 1 << 10);
            }),
            (0x5a, "SSADE, not offered", |bed| {
                bed.options.accessed_dirty = false;
                let at = bed.pasid(0);
                bed.change(at, 0, 1 << 9);
            }),
            (0x5a, "page table beyond host", |bed| {
                let at = bed.pasid(0);
                bed.change(at, 0, BEYOND);
            }),
            (0x5a, "PASID bit 80", |bed| {
                let at = bed.pasid(1);
                bed.change(at, 0, 1 << 16);
            }),
            (0x5a, "PWSNP, not offered", |bed| {
                bed.options.scalable_coherent = false;
            }),
            (0x5a, "PGSNP, not offered", |bed| {
                bed.options.snoop_control = false;
                let at = bed.pasid(1);
                bed.change(at, 0, 1 << 24);
            }),
            (0x5a, "EMTE", |bed| {
                let at = bed.pasid(1);
                bed.change(at, 0, 1 << 26);
            }),
            (0x5a, "ERE", |bed| {
                let at = bed.pasid(2);
                bed.change(at, 0, 1 << 1);
            }),
            (0x5a, "SRE, not offered", |bed| {
                bed.options.supervisor = false;
                let at = bed.pasid(2);
                bed.change(at, 0, 1);
            }),
            (0x5a, "PASID bit 511", |bed| {
                let at = bed.pasid(7);
                bed.change(at, 0, 1 << 63);
            }),
            (0x5b, "PGTT 0", |bed| {
                let at = bed.pasid(0);
                bed.change(at, 0x1c0, 0);
            }),
            (0x5b, "nested", |bed| {
                let at = bed.pasid(0);
                bed.change(at, 0x1c0, 3 << 6);
            }),
            (0x5b, "PGTT 7", |bed| {
                let at = bed.pasid(0);
                bed.change(at, 0, 0x1c0);
            }),
            (0x5b, "pass-through, not offered", |bed| {
                bed.options.pass_through = false;
                let at = bed.pasid(0);
                bed.change(at, 0x1c0, 4 << 6);
            }),
            (0x5b, "second stage, not offered", |bed| {
                bed.options.second_stage = false;
            }),
            (0x5b, "AW of 57 bits, not offered", |bed| {
                let at = bed.pasid(0);
                bed.change(at, 7 << 2, 3 << 2);
            }),
            (0x5d, "supervisor, SRE clear", |bed| {
                let at = bed.context(1);
                bed.change(at, 0, 1 << 20);
            }),
            (0x83, "address beyond host, pass-through", |bed| {
                let at = bed.pasid(0);
                bed.change(at, 0x1c0, 4 << 6);
                bed.iova = Iova(BEYOND);
            }),
        ],
    );
}

#[test]
fn scalable_second_stage_faults() {
    let ram = ram();
    run(
        || Bed::second(&ram),
        &[
            (0x84, "address beyond 48 bits", |bed| {
                bed.iova = Iova(1 << 48);
            }),
            (0x7b, "no page table", |bed| {
                let at = bed.pasid(0);
                bed.change(at, !0xfff, NOWHERE);
            }),
            (0x78, "no next table", |bed| {
                bed.change(bed.entry(39), !0xfff, NOWHERE);
            }),
            (0x79, "not mapped", |bed| bed.iova = UNMAPPED),
            (0x79, "nothing together", |bed| {
                bed.change(bed.entry(30), 1, 0);
                bed.change(bed.entry(12), 2, 0);
            }),
            (0x7a, "page beyond host", |bed| {
                bed.change(bed.entry(12), 0, BEYOND);
            }),
            (0x7a, "PS at level 4", |bed| {
                bed.change(bed.entry(39), 0, 1 << 7);
            }),
            (0x85, "write, read-only", |bed| {
                bed.iova = READ_ONLY;
                bed.access = Access::Write;
            }),
            (0x86, "read, write-only", |bed| bed.iova = WRITE_ONLY),
            (0x87, "interrupt range", |bed| {
                bed.change(bed.entry(12), !0xfff, 0xfee0_0000);
            }),
            (0x7c, "accessed bit needed, PWSNP clear", |bed| {
                let at = bed.pasid(0);
                bed.change(at, 0, 1 << 9);
                let at = bed.pasid(1);
                bed.change(at, 1 << 23, 0);
            }),
        ],
    );
}

#[test]
fn first_stage_faults() {
    let ram = ram();
    run(
        || Bed::first(&ram),
        &[
            (0x5b, "first stage, not offered", |bed| {
                bed.options.first_stage = false;
            }),
            (0x5b, "5 levels, not offered", |bed| {
                let at = bed.pasid(2);
                bed.change(at, 0, 1 << 2);
            }),
            (0x5b, "FSPM 2", |bed| {
                let at = bed.pasid(2);
                bed.change(at, 0, 2 << 2);
            }),
            (0x5a, "page table beyond host", |bed| {
                let at = bed.pasid(2);
                bed.change(at, 0, BEYOND);
            }),
            (0x80, "not canonical, low", |bed| bed.iova = Iova(1 << 47)),
            (0x80, "not canonical, high", |bed| {
                bed.iova = Iova(0xffff_7fff_ffff_ffff);
            }),
            (0x73, "no page table", |bed| {
                let at = bed.pasid(2);
                bed.change(at, !0xfff, NOWHERE);
            }),
            (0x70, "no next table", |bed| {
                bed.change(bed.entry(21), !0xfff & !(1 << 63), NOWHERE);
            }),
            (0x71, "not mapped", |bed| bed.iova = UNMAPPED),
            (0x71, "table not present", |bed| {
                bed.change(bed.entry(39), 1, 0);
            }),
            (0x72, "page beyond host", |bed| {
                bed.change(bed.entry(12), 0, BEYOND);
            }),
            (0x72, "table beyond host", |bed| {
                bed.change(bed.entry(30), 0, 1 << 51);
            }),
            (0x72, "PS at level 4", |bed| {
                bed.change(bed.entry(39), 0, 1 << 7);
            }),
            (0x72, "1 GiB, not offered", |bed| {
                bed.options.first_stage_1g = false;
                bed.iova = HUGE;
            }),
            (0x72, "2 MiB, not aligned", |bed| {
                bed.iova = LARGE;
                bed.change(bed.entry(21), 0, 1 << 13);
            }),
            (0x81, "supervisor page", |bed| {
                bed.change(bed.entry(12), 4, 0);
            }),
            (0x81, "supervisor table, write to read-only", |bed| {
                bed.iova = READ_ONLY;
                bed.access = Access::Write;
                bed.change(bed.entry(30), 4, 0);
            }),
            (0x85, "write, read-only", |bed| {
                bed.iova = READ_ONLY;
                bed.access = Access::Write;
            }),
            (0x85, "supervisor write, read-only, WPE", |bed| {
                let at = bed.context(1);
                bed.change(at, 0, 1 << 20);
                let at = bed.pasid(2);
                bed.change(at, 0, 1 | 1 << 4);
                bed.iova = READ_ONLY;
                bed.access = Access::Write;
            }),
            (0x87, "interrupt range", |bed| {
                bed.change(bed.entry(12), 0x000f_ffff_ffff_f000, 0xfee1_2000);
            }),
            (0x90, "accessed bit needed, PWSNP clear", |bed| {
                let at = bed.pasid(1);
                bed.change(at, 1 << 23, 0);
            }),
            (0x90, "dirty bit needed, no snooping walks", |bed| {
                bed.options.scalable_coherent = false;
                let at = bed.pasid(1);
                bed.change(at, 1 << 23, 0);
                for shift in [12, 21, 30, 39] {
                    bed.change(bed.entry(shift), 0, 1 << 5);
                }
                bed.access = Access::Write;
            }),
        ],
    );
}
