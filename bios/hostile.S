# The hostile guest: a flat firmware image that does to the machine what no driver would. It draws
# accesses from a generator with a known seed, so that a run can be repeated; README.md has the
# rules. A machine that is sound survives, and so does the guest: what would reset, stop or break
# it by design is left out or tamed by the tables below.

        .include "machine.inc"
        .include "boot.inc"

        .set    TAMED_MAP, 0x14000      # a bit for each 8 ports: some of them are tamed
        .set    TAMED_MAP_SIZE, 0x400
        .set    STRING_BUFFER, 0x18000  # random bytes, source of string output
        .set    STRING_BUFFER_SIZE, 0x100
        .set    STRING_INPUT, 0x19000
        .set    DESCRIPTOR, 0x1f000     # fw_cfg DMA descriptor, at any of 256 offsets
        .set    SANDBOX, 0x20000        # to 0x7ffff: where DMA may land
        .set    FAR, 0x100000000        # 1 GiB of virtual addresses over far physical ones
        .set    DEFAULT_COUNT, 10000000
        .set    DEFAULT_SEED, 0x9e3779b97f4a7c15
        .set    DOT_MASK, 0xffff        # a dot after as many accesses
        .set    LINE_MASK, 0x3fffff     # a new line after 64 dots

# Draw 64 random bits to rax: the high and the low half of a product, added by exclusive or, of a
# counter with large steps. Changes rdx.
.macro  draw
        add     %r12, %r15
        mov     %r15, %rax
        xor     %r11, %rax
        mul     %r15
        xor     %rdx, %rax
.endm

# Where every instruction costs most of a microsecond, this loop is what a run takes: few
# instructions for each access.
#
# rbp: when something is to be done, in accesses; r13: accesses done; r14: accesses to do;
# r15: state of the generator; r11, r12: its constants.
main:
        call    console_init
        lidt    idt_pointer(%rip)       # interrupts stay off; exceptions are reported
        lea     seed_name(%rip), %rsi
        mov     $seed_name_end - seed_name, %ecx
        call    fw_cfg_number
        mov     $DEFAULT_SEED, %r15
        cmovnc  %rax, %r15
        lea     count_name(%rip), %rsi
        mov     $count_name_end - count_name, %ecx
        call    fw_cfg_number
        mov     $DEFAULT_COUNT, %r14
        cmovnc  %rax, %r14
        say     "hostile: "
        mov     %r14, %rax
        call    print_decimal64
        say     " accesses, seed 0x"
        mov     %r15, %rax
        mov     $16, %ecx
        call    print_hex
        say     "\n"
        movabs  $0x9e3779b97f4a7c15, %r12
        movabs  $0xd1b54a32d192ed03, %r11
        call    map_everything
        call    map_tamed
        mov     $STRING_BUFFER, %ebx
1:      draw
        mov     %rax, (%rbx)
        add     $8, %ebx
        cmp     $STRING_BUFFER + STRING_BUFFER_SIZE, %ebx
        jb      1b
        xor     %r13d, %r13d
        xor     %ebp, %ebp
        jmp     3f

# An operation adds to r13 the accesses that it made beyond the first.
#
# Bits of rax and ebx: 0 write; 1 to 4 the operation; 5 and up are its decisions; from 16 on
# addresses and values.
next:
        draw
        mov     %eax, %ebx
        mov     %eax, %ecx
        and     $0x1e, %ecx
        movzwl  operations(%rcx), %ecx
        lea     text_start(%rcx), %rcx
        call    *%rcx
        inc     %r13
        cmp     %rbp, %r13
        jb      next
        test    $DOT_MASK, %ebp
        jnz     3f
        call    console_registers
        mov     $'.', %al
        call    print_character
        call    flush
        test    $LINE_MASK, %ebp
        jnz     3f
        say     "\n"
3:      cmp     %r14, %r13
        jae     done
        add     $DOT_MASK + 1, %rbp     # the next dot, or the end
        cmp     %r14, %rbp
        cmova   %r14, %rbp
        jmp     next

done:
        call    console_registers
        say     "\nhostile: done\n"
        call    sleep_s5
1:      cli
        hlt
        jmp     1b

.macro  operation name, times
        .rept   \times
        .word   \name - text_start
        .endr
.endm
operations:                             # sixteen, equally likely
        operation port, 5
        operation port_string, 2
        operation mmio, 4
        operation mmio_string, 1
        operation mmio_modify, 1
        operation pci, 1
        operation fw_cfg, 1
        operation fw_cfg_dma, 1

# Return the little-endian number in the fw_cfg file named by rsi and ecx in rax; CF set: no such
# file, or not 8 bytes.
fw_cfg_number:
        call    fw_cfg_find
        jne     1f
        cmp     $8, %edx
        jne     1f
        call    fw_cfg_select
        mov     $8, %ecx
        call    fw_cfg_read
        mov     SCRATCH, %rax
        clc
        ret
1:      stc
        ret

        .section .rodata
seed_name:
        .asciz  "opt/hostile/seed"
seed_name_end:
count_name:
        .asciz  "opt/hostile/count"
count_name_end:
        .text

        .include "hostile_ports.inc"
        .include "hostile_memory.inc"
        .include "hostile_fwcfg.inc"
        .include "power.inc"
        .include "interrupts.inc"
        .include "console.inc"
        .include "fwcfg.inc"
