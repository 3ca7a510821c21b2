# Entry of the multiboot test kernel: header, descriptor tables, interrupt stubs. 32 bits, no paging.

        .intel_syntax noprefix
        .code32

        .set    MAGIC, 0x1badb002
        .set    FLAGS, 3                # Page-aligned modules, memory information.

        .section .text.start, "ax"
        .balign 4
        .long   MAGIC, FLAGS, -(MAGIC + FLAGS)

        .globl  start
start:  mov     esp, offset stack_top
        pushfd                          # As the loader left them, for main.
        push    ebx
        push    eax
        lgdt    [gdt_pointer]
        .byte   0xea                    # ljmp 8:1f
        .long   1f
        .word   8
1:      mov     eax, 0x10
        mov     ds, eax
        mov     es, eax
        mov     fs, eax
        mov     gs, eax
        mov     ss, eax
        lidt    [idt_pointer]
        call    main
2:      cli
        hlt
        jmp     2b

        # An interrupt: counts its vector. It goes back without iretd, which a KVM that emulates ring 0
        # may not know in 32 bits; interrupts stay off, as main waits for the next by itself.
        .globl  stubs
        .balign 16
stubs:  .set    vector, 0
        .rept   256
        .balign 16
        push    eax
        mov     eax, vector
        jmp     common
        .set    vector, vector + 1
        .endr

common: push    ecx
        push    edx
        push    eax
        call    interrupt
        add     esp, 4
        pop     edx
        pop     ecx
        pop     eax
        ret     8                       # To EIP, over CS and EFLAGS.

        .section .data
        .balign 8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff
        .quad   0x00cf93000000ffff
gdt_pointer:
        .word   3 * 8 - 1
        .long   gdt
idt_pointer:
        .word   256 * 8 - 1
        .long   idt

        .section .bss
        .balign 16
        .globl  idt
idt:    .skip   256 * 8
        .skip   16384
stack_top:

        .section .note.GNU-stack, "", @progbits
