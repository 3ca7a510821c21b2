/* What kvm-unit-tests' intel-iommu test does, written afresh from the VT-d specification (revision
 * 4.1) and QEMU's description of its edu device. */

#include "kernel.h"

/* Where QEMU's q35 has its remapping unit; such tests know it by heart. */
#define UNIT 0xfed90000u
#define IOAPIC 0xfec00000u

/* Registers (11.4). */
#define VER 0x00
#define CAP 0x08
#define ECAP 0x10
#define GCMD 0x18
#define GSTS 0x1c
#define RTADDR 0x20
#define FSTS 0x34
#define IRTA 0xb8

/* Bits of GCMD and GSTS (11.4.4). */
#define TE (1u << 31)
#define SRTP (1u << 30)
#define QIE (1u << 26)
#define IRE (1u << 25)
#define SIRTP (1u << 24)

/* QEMU docs/specs/edu.rst. */
#define EDU_ID 0x11e81234u
#define EDU_LIVENESS 0x04
#define EDU_INTERRUPT_STATUS 0x24
#define EDU_RAISE 0x60
#define EDU_ACKNOWLEDGE 0x64
#define EDU_SOURCE 0x80
#define EDU_DESTINATION 0x88
#define EDU_COUNT 0x90
#define EDU_COMMAND 0x98
#define EDU_BUFFER 0x40000

#define VECTOR_IOAPIC 0xed
#define VECTOR_MSI 0xee

struct entry128 {
    u64 low, high;
};

static struct entry128 root[256] __attribute__((aligned(4096)));
static struct entry128 context[256] __attribute__((aligned(4096)));
static u64 tables[3][512] __attribute__((aligned(4096)));
/* 2^16 entries are announced; these are used. */
static struct entry128 remapping[256] __attribute__((aligned(4096)));
static u32 page[1024] __attribute__((aligned(4096)));

static u32 edu;
static u32 bar;

static void store64(u32 address, u64 value)
{
    store(address, value);
    store(address + 4, value >> 32);
}

/* Sets one more bit beside all that the status shows. Those that take effect on being written are thus
 * written again each time; careful software would leave them out, that test does not. */
static void command(u32 bit)
{
    store(UNIT + GCMD, load(UNIT + GSTS) | bit);
    while (!(load(UNIT + GSTS) & bit))
        in8(0x80);
}

static void enable(void)
{
    command(QIE);
    store64(UNIT + RTADDR, (u32)root);
    command(SRTP);
    store64(UNIT + IRTA, (u32)remapping | 0xf);
    command(SIRTP);
    command(TE);
    command(IRE);

    u32 status = load(UNIT + GSTS);
    report(load(UNIT + FSTS) == 0, "no fault");
    report(!!(status & QIE), "queued invalidation enabled");
    report(!!(status & SRTP), "root table set");
    report(!!(status & SIRTP), "interrupt remapping table set");
    report(!!(status & TE), "DMA remapping enabled");
    report(!!(status & IRE), "interrupt remapping enabled");
    report(!!(load(UNIT + CAP) & 1u << 9), "39-bit second stage");
    report(!!(load(UNIT + CAP + 4) & 1u << (34 - 32)), "2 MiB pages");
}

/* Maps I/O virtual page 0 of the function to a page, in 39 bits of address and 4 KiB pages. */
static void map(u32 to)
{
    tables[2][0] = to | 3;
    tables[1][0] = (u32)tables[2] | 3;
    tables[0][0] = (u32)tables[1] | 3;
    context[edu].high = (u64)edu << 8 | 1;
    /* Fault processing is disabled, as that test has it. */
    context[edu].low = (u32)tables[0] | 3;
    root[0].low = (u32)context | 1;
}

static void dma(u32 from, u32 to, u32 count, u32 flags)
{
    store64(bar + EDU_SOURCE, from);
    store64(bar + EDU_DESTINATION, to);
    store64(bar + EDU_COUNT, count);
    store(bar + EDU_COMMAND, 1 | flags);
    while (load(bar + EDU_COMMAND) & 1)
        in8(0x80);
}

static void dma_case(void)
{
    page[0] = 0x12345678;
    map((u32)page);
    dma(0, EDU_BUFFER, 4, 0);
    dma(EDU_BUFFER, 4, 4, 2);
    report(((volatile u32 *)page)[1] == 0x12345678, "DMA of 4 bytes through a mapping");
}

/* An entry that sends `vector` to APIC 0 for this function's requests alone. That test has such an entry
 * for the IOAPIC's pin too, which only passes where the IOAPIC's requests are not verified. */
static void remap(u32 index, u32 vector)
{
    remapping[index].high = 1u << 18 | edu;
    remapping[index].low = vector << 16 | 3;
}

static void raise(u8 vector, const char *name)
{
    store(bar + EDU_RAISE, 1);
    wait_interrupt(vector);
    report(interrupts[vector] == 1, name);
    store(bar + EDU_ACKNOWLEDGE, load(bar + EDU_INTERRUPT_STATUS));
}

static u32 msi_capability(void)
{
    u32 at = config_read(edu, 0x34) & 0xfc;
    while (at && (config_read(edu, at) & 0xff) != 5)
        at = config_read(edu, at) >> 8 & 0xfc;
    return at;
}

static void interrupt_cases(void)
{
    u32 msi = msi_capability();
    if (!msi) {
        report(0, "the function has MSI");
        return;
    }
    config_write(edu, msi, config_read(edu, msi) & ~(1u << 16));
    u32 pin = config_read(edu, 0x3c) & 0xff;
    remap(1, VECTOR_IOAPIC);
    store(IOAPIC, 0x10 + 2 * pin + 1);
    store(IOAPIC + 0x10, 1u << 17 | 1u << 16);
    store(IOAPIC, 0x10 + 2 * pin);
    store(IOAPIC + 0x10, VECTOR_IOAPIC);
    raise(VECTOR_IOAPIC, "interrupt pin through the IOAPIC, remapped");

    remap(2, VECTOR_MSI);
    config_write(edu, msi + 4, 0xfee00000 | 2 << 5 | 1 << 4);
    config_write(edu, msi + 8, 0);
    config_write(edu, msi + 12, 0);
    config_write(edu, msi, config_read(edu, msi) | 1u << 16);
    raise(VECTOR_MSI, "MSI, remapped");
}

void vtd(void)
{
    report(load(UNIT + VER) != 0xffffffff, "there is a remapping unit");
    enable();
    for (u32 device = 0; device < 32; device++)
        if (config_read(BDF(device), 0) == EDU_ID)
            edu = BDF(device);
    report(edu != 0, "there is an edu function");
    if (!edu)
        return;
    bar = config_read(edu, 0x10) & ~15u;
    config_write(edu, 4, config_read(edu, 4) | 4);
    store(bar + EDU_LIVENESS, 1);
    report(load(bar + EDU_LIVENESS) == ~1u, "it is alive");
    dma_case();
    interrupt_cases();
}
