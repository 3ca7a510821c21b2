/* A test kernel that is started by multiboot. The second word of its command line, after its own
 * name, says what it does. Its result goes to the debug-exit port: 0 if all went well. */

#include "kernel.h"

#define COM1 0x3f8
#define DEBUG_EXIT 0xf4
#define FW_CFG 0x510
#define LAPIC 0xfee00000u

struct info {
    u32 flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, syms[4];
    u32 mmap_length, mmap_addr, drives[2], config_table, boot_loader_name;
};

struct map_entry {
    u32 size;
    u64 base, length;
    u32 kind;
} __attribute__((packed));

struct gate {
    u16 low, selector, attributes, high;
};

extern struct gate idt[256];
extern const u8 stubs[];

volatile u32 interrupts[256];
static int failed;

void print(const char *text)
{
    while (*text)
        out8(COM1, *text++);
}

void print_hex(u32 value)
{
    for (int shift = 28; shift >= 0; shift -= 4)
        out8(COM1, "0123456789abcdef"[value >> shift & 15]);
}

static void line(const char *name, u32 value)
{
    print(name);
    print_hex(value);
    print("\n");
}

void report(int passed, const char *name)
{
    print(passed ? "PASS: " : "FAIL: ");
    print(name);
    print("\n");
    failed |= !passed;
}

void interrupt(u32 vector)
{
    interrupts[vector & 255]++;
    store(LAPIC + 0xb0, 0);
}

void wait_interrupt(u8 vector)
{
    while (!interrupts[vector])
        __asm__ volatile("sti; hlt; cli" : : : "memory");
}

u32 config_read(u32 bdf, u32 offset)
{
    out32(0xcf8, 1u << 31 | bdf << 8 | offset);
    return in32(0xcfc);
}

void config_write(u32 bdf, u32 offset, u32 value)
{
    out32(0xcf8, 1u << 31 | bdf << 8 | offset);
    out32(0xcfc, value);
}

static void interrupts_on(void)
{
    for (u32 vector = 0; vector < 256; vector++) {
        u32 address = (u32)stubs + 16 * vector;
        idt[vector] = (struct gate){ (u16)address, 8, 0x8e00, (u16)(address >> 16) };
    }
    store(LAPIC + 0xf0, 0x1ff);
}

static void show(u32 magic, const struct info *info, u32 eflags)
{
    u32 cr0;
    __asm__("mov %%cr0, %0" : "=r"(cr0));
    line("magic ", magic);
    line("paging and protection ", cr0 & 0x80000001);
    line("interrupts and virtual-8086 ", eflags & 0x20200);
    line("flags ", info->flags);
    line("lower KiB ", info->mem_lower);
    line("upper KiB ", info->mem_upper);
    u32 at = info->mmap_addr;
    while (at < info->mmap_addr + info->mmap_length) {
        const struct map_entry *entry = (const struct map_entry *)at;
        print("map ");
        print_hex(entry->base >> 32);
        print_hex(entry->base);
        print("+");
        print_hex(entry->length >> 32);
        print_hex(entry->length);
        line(" ", entry->kind);
        at += entry->size + 4;
    }
    print("line ");
    print((const char *)info->cmdline);
    print("\nloader ");
    print((const char *)info->boot_loader_name);
    print("\n");
    const u32 *module = (const u32 *)info->mods_addr;
    for (u32 i = 0; i < info->mods_count; i++, module += 4) {
        print("module ");
        print((const char *)module[2]);
        print(": ");
        for (u32 byte = module[0]; byte < module[1]; byte++)
            out8(COM1, *(const u8 *)byte);
        print("\n");
    }
}

static u32 fw_cfg(u16 item, int bytes)
{
    u32 value = 0;
    out16(FW_CFG, item);
    for (int i = 0; i < bytes; i++)
        value |= (u32)in8(FW_CFG + 1) << 8 * i;
    return value;
}

/* Every function's address, command register and first BAR, as a firmware leaves them. */
static void pci(void)
{
    for (u32 device = 0; device < 32; device++) {
        u32 id = config_read(BDF(device), 0);
        if (id == 0xffffffff)
            continue;
        print("device ");
        print_hex(device);
        print(" command ");
        print_hex(config_read(BDF(device), 4) & 0xffff);
        print(" bar ");
        print_hex(config_read(BDF(device), 0x14));
        line(" ", config_read(BDF(device), 0x10));
    }
}

static const char *second_word(const char *text)
{
    while (*text && *text != ' ')
        text++;
    return *text ? text + 1 : text;
}

void main(u32 magic, const struct info *info, u32 eflags)
{
    const char *program = second_word((const char *)info->cmdline);
    interrupts_on();
    switch (*program) {
    case 'i':
        show(magic, info, eflags);
        break;
    case 'f':
        line("signature ", fw_cfg(0, 4));
        line("processors ", fw_cfg(5, 2));
        line("memory ", fw_cfg(3, 4));
        break;
    case 'p':
        pci();
        break;
    case 'v':
        vtd();
        break;
    case 'x':
        out32(DEBUG_EXIT, program[1] - '0');
        break;
    default:
        report(0, "a program that there is");
    }
    out32(DEBUG_EXIT, failed);
}
