# A guest without an operating system, for tests of the VMM on a real KVM.
#
# One image, linked at 16 MiB, with two entries: PVH (32-bit, ELF note) and the 64-bit Linux boot
# protocol (offset 0x200). The first letter of the command line selects a program. It keeps to
# instructions that a KVM which emulates ring 0 knows: no SSE, no int, no waiting in a busy loop
# where an interrupt will do.

        .intel_syntax noprefix

        .set    COM1, 0x3f8
        .set    SLEEP_CONTROL, 0x600
        .set    POWER_OFF, 0x34
        .set    RESET_CONTROL, 0xcf9
        .set    PVPANIC, 0x505
        .set    REPORT, 0xf4            # Reports go here; the test listens.
        .set    DOORBELL, 0xc0000000
        .set    ECAM, 0xe0000000
        .set    IOAPIC, 0xfec00000
        .set    LAPIC, 0xfee00000
        .set    VTD, 0xfed90000
        .set    VTD_RTADDR, 0x20
        .set    PIN4, 0x18              # Index of pin 4's redirection entry.
        .set    PIN17, 0x32             # Index of pin 17's: INTA of device 1.
        .set    DEVICE1, ECAM + 0x8000
        .set    EDU, 0xc0000000         # Where its BAR 0 goes.
        .set    HIGH_MEMORY, 0x100000000
        .set    AP_CODE, 0x8000
        .set    AP_FLAG, 0x8800
        .set    DMA_PAGE, 0x60000
        .set    STACK, 0x80000
        .set    TABLES, 0x70000         # PML4, PDPT, 8 directories.

        .section .note.pvh, "a", @note
        .long   4, 4, 18
        .asciz  "Xen"
        .long   pvh_entry

        .section .text
        .globl  image_start
image_start:
        .code32
pvh_entry:
        cld
        mov     esp, STACK
        mov     esi, [ebx + 24]         # hvm_start_info.cmdline_paddr
        # Map 8 GiB one to one.
        mov     edi, TABLES
        xor     eax, eax
        mov     ecx, 10 * 1024
        rep stosd
        mov     dword ptr [TABLES], TABLES + 0x1003
        mov     edi, TABLES + 0x1000
        mov     eax, TABLES + 0x2003
        mov     ecx, 8
1:      mov     [edi], eax
        add     edi, 8
        add     eax, 0x1000
        dec     ecx
        jnz     1b
        mov     edi, TABLES + 0x2000
        mov     eax, 0x83
        xor     edx, edx
        mov     ecx, 8 * 512
2:      mov     [edi], eax
        mov     [edi + 4], edx
        add     edi, 8
        add     eax, 0x200000
        adc     edx, 0
        dec     ecx
        jnz     2b
        mov     eax, cr4
        or      eax, 0x20               # PAE
        mov     cr4, eax
        mov     eax, TABLES
        mov     cr3, eax
        mov     ecx, 0xc0000080         # EFER.LME
        rdmsr
        or      eax, 0x100
        wrmsr
        mov     eax, cr0
        or      eax, 0x80000000         # PG
        mov     cr0, eax
        lgdt    [gdt_pointer]
        .byte   0xea                    # ljmp 0x10:pvh_64
        .long   pvh_64
        .word   0x10

        .code64
pvh_64:
        mov     eax, esi                # Zero-extends.
        mov     rsi, rax
        jmp     main

        .org    0x200
linux_entry:
        mov     eax, dword ptr [rsi + 0x228]    # boot_params.hdr.cmd_line_ptr
        mov     rsi, rax
        lgdt    [gdt_pointer]
main:
        mov     rsp, STACK
        mov     eax, 0x18
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        movzx   eax, byte ptr [rsi]
        lea     rbx, [programs]
3:      mov     cl, [rbx]
        test    cl, cl
        jz      unknown
        cmp     cl, al
        je      4f
        add     rbx, 16
        jmp     3b
4:      call    [rbx + 8]
        jmp     power_off

unknown:
        lea     rsi, [text_unknown]
        call    print
power_off:
        mov     dx, SLEEP_CONTROL
        mov     al, POWER_OFF
        out     dx, al
5:      hlt
        jmp     5b

# --- Programs -------------------------------------------------------------------------------------

ok:     lea     rsi, [text_ok]
        jmp     print

# Prints the command line with one string instruction.
line:   mov     rdi, rsi
        xor     ecx, ecx
1:      cmp     byte ptr [rdi + rcx], 0
        je      2f
        inc     ecx
        jmp     1b
2:      mov     dx, COM1
        rep outsb
        ret

reset:  mov     dx, RESET_CONTROL
        mov     al, 6
        out     dx, al
        hlt

# As Linux restarts through the BIOS: back to real mode, then to its entry point. Leaves long mode by
# way of 16-bit compatibility mode.
bios:   lidt    [no_idt]
        mov     edi, AP_CODE
        lea     rsi, [to_bios]
        mov     ecx, offset to_bios_end - to_bios
        rep movsb
        push    0x20                    # 16-bit code.
        push    AP_CODE
        retfq

        .code16
to_bios:
        mov     ax, 0x28                # 64 KiB data.
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     eax, 0x10
        mov     cr0, eax                # No paging, no protection.
        .byte   0xea                    # ljmp 0xf000:0xfff0
        .word   0xfff0, 0xf000
to_bios_end:
        .code64

pvpanic:
        mov     dx, PVPANIC
        in      al, dx
        mov     al, 1
        out     dx, al
        hlt

kernel_panic:
        lea     rsi, [text_panic]
        call    print
        jmp     reset

triple_fault:
        lidt    [no_idt]
        ud2

spin:   cli
1:      hlt
        jmp     1b

busy:   jmp     busy

# The host bridge's identity through ECAM and through mechanism 1, and a function that is not there.
config: mov     ebx, ECAM
        mov     edi, [rbx]
        call    hex
        mov     dx, 0xcf8
        mov     eax, 0x80000000
        out     dx, eax
        mov     dx, 0xcfc
        in      eax, dx
        mov     edi, eax
        call    hex
        mov     ebx, ECAM + 31 * 0x8000
        mov     edi, [rbx]
        jmp     hex

# Memory that nobody has reads as ones and swallows stores.
nowhere:
        mov     ebx, 0xfed00000
        mov     dword ptr [rbx], 1
        mov     edi, [rbx]
        jmp     hex

# The remapping unit's root table address, before and after it is set; then a restart.
vtd:    mov     ebx, VTD + VTD_RTADDR
        mov     edi, [rbx]
        call    hex
        mov     dword ptr [rbx], 0x5000
        mov     dword ptr [rbx + 4], 0
        mov     edi, [rbx]
        call    hex
        jmp     reset

# The second part of RAM.
high:   mov     rbx, HIGH_MEMORY
        mov     eax, 0x600df00d
        mov     [rbx + 0x1000], eax
        mov     edi, [rbx + 0x1000]
        jmp     hex

# APIC id and processor count as CPUID has them.
cpuid_: mov     eax, 1
        cpuid
        mov     edi, ebx
        shr     edi, 24
        call    hex
        mov     eax, 0xb
        mov     ecx, 1
        cpuid
        mov     edi, ebx
        jmp     hex

# Three stores to the doorbell: two that an ioeventfd takes and one of another length.
doorbell:
        mov     ebx, DOORBELL
        mov     dword ptr [rbx], 7
        mov     dword ptr [rbx], 8
        mov     word ptr [rbx], 9
        ret

# COM1's transmitter interrupt through the IOAPIC, edge-triggered, then masked and unmasked.
pin:    call    interrupts_on
        mov     eax, 0x31
        call    redirect
        call    thr_interrupt
        call    wait_interrupt          # The first.
        mov     eax, 0x10031            # Masked.
        call    redirect
        call    thr_interrupt
        mov     edi, [interrupts]
        call    hex                     # Still one.
        mov     eax, 0x31
        call    redirect                # Unmasked: the edge was kept.
        call    wait_interrupt
        mov     edi, [interrupts]
        jmp     hex

# The same, level-triggered: the second interrupt comes only if the end of the first was reported.
level:  call    interrupts_on
        mov     eax, 0x8031
        call    redirect
        call    thr_interrupt
        call    wait_interrupt
        call    thr_interrupt
        call    wait_interrupt
        mov     ebx, IOAPIC
        mov     dword ptr [rbx], PIN4
        mov     edi, [rbx + 0x10]       # Remote IRR is clear again.
        call    hex
        mov     edi, [interrupts]
        jmp     hex

# INTx of the edu function at 00:01.0. The first interrupt's cause is acknowledged only in the third
# call of the handler: a level comes again after each end of interrupt. The second at once.
intx:   call    interrupts_on
        call    edu_on
        mov     ebx, IOAPIC
        mov     dword ptr [rbx], PIN17 + 1
        mov     dword ptr [rbx + 0x10], 0
        mov     dword ptr [rbx], PIN17
        mov     dword ptr [rbx + 0x10], 0xa041  # Level, active low.
        mov     dword ptr [acknowledge_at], 3
        mov     ebx, EDU
        mov     dword ptr [rbx + 0x60], 1
        call    wait_interrupt
        call    wait_interrupt
        call    wait_interrupt
        mov     dword ptr [acknowledge_at], 4
        mov     ebx, EDU
        mov     dword ptr [rbx + 0x60], 0x10
        call    wait_interrupt
        mov     ebx, EDU
        mov     edi, [rbx + 0x24]       # No cause is left.
        call    hex
        mov     ebx, IOAPIC
        mov     dword ptr [rbx], PIN17
        mov     edi, [rbx + 0x10]       # Remote IRR is clear.
        call    hex
        mov     edi, [interrupts]
        jmp     hex

# MSI of the same function: a factorial, then four bytes through its DMA buffer and back.
msi:    call    interrupts_on
        call    edu_on
        mov     ebx, DEVICE1
        movzx   eax, byte ptr [rbx + 0x34]
1:      cmp     byte ptr [rbx + rax], 5
        je      2f
        movzx   eax, byte ptr [rbx + rax + 1]
        jmp     1b
2:      mov     dword ptr [rbx + rax + 4], LAPIC
        mov     dword ptr [rbx + rax + 8], 0
        mov     word ptr [rbx + rax + 12], 0x42
        mov     word ptr [rbx + rax + 2], 1
        mov     ebx, EDU
        mov     dword ptr [rbx + 0x20], 0x80
        mov     dword ptr [rbx + 8], 5
        call    wait_interrupt
        mov     ebx, EDU
        mov     edi, [rbx + 8]
        call    hex
        mov     ebx, EDU
        mov     edi, [rbx + 0x24]
        call    hex
        mov     ebx, EDU
        mov     dword ptr [rbx + 0x64], 1
        mov     dword ptr [DMA_PAGE], 0xfeedface
        mov     dword ptr [rbx + 0x80], DMA_PAGE
        mov     dword ptr [rbx + 0x88], 0x40000
        mov     dword ptr [rbx + 0x90], 4
        mov     dword ptr [rbx + 0x98], 5
        call    wait_interrupt
        mov     ebx, EDU
        mov     dword ptr [rbx + 0x64], 0x100
        mov     dword ptr [rbx + 0x80], 0x40000
        mov     dword ptr [rbx + 0x88], DMA_PAGE + 8
        mov     dword ptr [rbx + 0x98], 7
        call    wait_interrupt
        mov     edi, [DMA_PAGE + 8]
        call    hex
        mov     edi, [interrupts]
        jmp     hex

# Reports every interrupt's vector until vector 0xff comes.
report: call    interrupts_on
        mov     dx, REPORT
        mov     al, 0                   # Ready.
        out     dx, al
1:      sti
        hlt
        cli
        mov     ecx, [done]
        test    ecx, ecx
        jz      1b
        ret

# Starts APIC 1 with INIT and SIPI and waits for its sign of life.
second: mov     edi, AP_CODE
        lea     rsi, [ap_code]
        mov     ecx, offset ap_code_end - ap_code
        rep movsb
        mov     ebx, LAPIC
        mov     dword ptr [rbx + 0xf0], 0x1ff
        mov     dword ptr [rbx + 0x310], 0x1000000
        mov     dword ptr [rbx + 0x300], 0x4500
        mov     dword ptr [rbx + 0x310], 0x1000000
        mov     dword ptr [rbx + 0x300], 0x4600 + (AP_CODE >> 12)
1:      mov     dx, 0x80                # An exit, so that emulation does not run on and on.
        in      al, dx
        movzx   edi, byte ptr [AP_FLAG]
        test    edi, edi
        jz      1b
        jmp     hex

        .code16
ap_code:
        xor     ax, ax
        mov     ds, ax
        mov     byte ptr [AP_FLAG], 0x5a
1:      hlt
        jmp     1b
ap_code_end:
        .code64

# --- Helpers --------------------------------------------------------------------------------------

# Prints the string at rsi.
print:  mov     dx, COM1
1:      lodsb
        test    al, al
        jz      2f
        out     dx, al
        jmp     1b
2:      ret

# Prints edi as eight digits and a newline.
hex:    mov     dx, COM1
        mov     ecx, 8
1:      rol     edi, 4
        mov     eax, edi
        and     eax, 15
        cmp     al, 10
        jb      2f
        add     al, 'a' - '0' - 10
2:      add     al, '0'
        out     dx, al
        dec     ecx
        jnz     1b
        mov     al, 10
        out     dx, al
        ret

# Sets redirection entry 4 to eax, for APIC 0.
redirect:
        mov     ebx, IOAPIC
        mov     dword ptr [rbx], PIN4 + 1
        mov     dword ptr [rbx + 0x10], 0
        mov     dword ptr [rbx], PIN4
        mov     [rbx + 0x10], eax
        ret

# Makes COM1 raise a transmitter interrupt: acknowledges an old one, then enables afresh.
thr_interrupt:
        mov     dx, COM1 + 1
        mov     al, 0
        out     dx, al
        mov     dx, COM1 + 2
        in      al, dx
        mov     dx, COM1 + 1
        mov     al, 2
        out     dx, al
        ret

# Places the edu function's BAR 0 and switches memory decoding and bus mastering on.
edu_on: mov     ebx, DEVICE1
        mov     eax, EDU
        mov     [rbx + 0x10], eax
        mov     word ptr [rbx + 4], 6
        ret

# Halts until there is one more interrupt than there were at the last call.
wait_interrupt:
        inc     dword ptr [waited]
1:      cli
        mov     eax, [interrupts]
        cmp     eax, [waited]
        jae     2f
        sti
        hlt
        jmp     1b
2:      ret

# Fills the IDT with gates for vectors 0x20 to 0xff and switches the local APIC on.
interrupts_on:
        lea     rbx, [stubs]
        lea     rdi, [idt + 0x20 * 16]
        mov     ecx, 0xe0
1:      mov     rax, rbx
        mov     [rdi], ax
        mov     word ptr [rdi + 2], 0x10
        mov     word ptr [rdi + 4], 0x8e00
        shr     rax, 16
        mov     [rdi + 6], ax
        shr     rax, 16
        mov     [rdi + 8], eax
        mov     dword ptr [rdi + 12], 0
        add     rdi, 16
        add     rbx, 16
        dec     ecx
        jnz     1b
        lidt    [idt_pointer]
        mov     ebx, LAPIC
        mov     dword ptr [rbx + 0xf0], 0x1ff
        ret

        .balign 16
stubs:
        .set    vector, 0x20
        .rept   0xe0
        .balign 16
        push    rax
        mov     al, vector
        jmp     interrupt
        .set    vector, vector + 1
        .endr

interrupt:
        push    rdx
        push    rbx
        push    rcx
        inc     dword ptr [interrupts]
        mov     ecx, [interrupts]
        cmp     ecx, [acknowledge_at]
        jne     2f
        mov     ebx, EDU
        mov     dword ptr [rbx + 0x64], -1
2:      pop     rcx
        cmp     al, 0xff
        jne     1f
        mov     dword ptr [done], 1
1:      mov     dx, REPORT
        out     dx, al
        mov     ebx, LAPIC
        mov     dword ptr [rbx + 0xb0], 0
        pop     rbx
        pop     rdx
        pop     rax
        iretq

# --- Data -----------------------------------------------------------------------------------------

        .balign 16
programs:
        .macro  program letter, address
        .byte   \letter, 0, 0, 0, 0, 0, 0, 0
        .quad   \address
        .endm
        program 'o', ok
        program '-', line
        program 'r', reset
        program 'b', bios
        program 'p', pvpanic
        program 'k', kernel_panic
        program 't', triple_fault
        program 'z', spin
        program 'y', busy
        program 'e', config
        program 'n', nowhere
        program 'h', high
        program 'c', cpuid_
        program 'd', doorbell
        program 'i', pin
        program 'l', level
        program 'x', intx
        program 'm', msi
        program 'w', report
        program 's', second
        program 'v', vtd
        .byte   0

text_unknown:
        .asciz  "no such program\n"
text_ok:
        .asciz  "ok\n"
text_panic:
        .asciz  "[    0.1] Kernel panic - not syncing: test\n"

        .balign 8
gdt:    .quad   0, 0
        .quad   0x00af9b000000ffff      # 0x10: 64-bit code
        .quad   0x00cf93000000ffff      # 0x18: data
        .quad   0x00009b000000ffff      # 0x20: 16-bit code
        .quad   0x000093000000ffff      # 0x28: 16-bit data
gdt_pointer:
        .word   6 * 8 - 1
        .quad   gdt
no_idt: .word   0
        .quad   0
idt_pointer:
        .word   256 * 16 - 1
        .quad   idt

        .balign 8
interrupts:
        .long   0
waited: .long   0
done:   .long   0
acknowledge_at:
        .long   0

        .balign 16
idt:    .fill   256 * 16, 1, 0
        .globl  image_end
image_end:
