/* What the parts of the multiboot test kernel share. It runs in ring 0 with integer instructions
 * alone, so that a KVM which emulates ring 0 runs it too. */

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define BDF(device) ((u32)(device) << 3)

static inline void out8(u16 port, u8 value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline void out16(u16 port, u16 value)
{
    __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port));
}

static inline void out32(u16 port, u32 value)
{
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline u8 in8(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline u32 in32(u16 port)
{
    u32 value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline u32 load(u32 address)
{
    return *(volatile u32 *)address;
}

static inline void store(u32 address, u32 value)
{
    *(volatile u32 *)address = value;
}

void print(const char *text);
void print_hex(u32 value);
/* Prints a case's outcome and remembers a failure. */
void report(int passed, const char *name);

/* Interrupts with this vector so far. */
extern volatile u32 interrupts[256];
/* Lets interrupts in and halts until one with this vector has come, however long it takes. */
void wait_interrupt(u8 vector);

u32 config_read(u32 bdf, u32 offset);
void config_write(u32 bdf, u32 offset, u32 value);

/* The cases of kvm-unit-tests' intel-iommu test, on the edu function. */
void vtd(void);
