# The hostile guest: a flat firmware image that does to the machine what no driver would. It draws
# accesses from a generator with a known seed, so that a run can be repeated; README.md has the
# rules. A machine that is sound survives, and so does the guest: what would reset, stop or break
# it by design is left out or tamed by the tables below.

        .include "machine.inc"
        .include "boot.inc"

        .set    STRING_BUFFER, 0x18000  # random bytes, source of string output
        .set    STRING_INPUT, 0x19000
        .set    DESCRIPTOR, 0x1f000     # fw_cfg DMA descriptor, at any of 256 offsets
        .set    SANDBOX, 0x20000        # to 0x7ffff: where DMA may land
        .set    FAR, 0x100000000        # 1 GiB of virtual addresses over far physical ones
        .set    DEFAULT_COUNT, 10000000
        .set    DEFAULT_SEED, 0x9e3779b97f4a7c15
        .set    DOT_MASK, 0xffff        # a dot after as many accesses
        .set    LINE_MASK, 0x3fffff     # a new line after 64 dots

# r13: accesses done; r14: accesses to do; r15: state of the generator.
main:
        call    console_init
        lidt    idt_pointer(%rip)       # interrupts stay off; exceptions are reported
        lea     seed_name(%rip), %rsi
        mov     $seed_name_end - seed_name, %ecx
        call    fw_cfg_number
        mov     $DEFAULT_SEED, %r15
        cmovc   %r15, %rax
        mov     %rax, %r15
        test    %rax, %rax
        jnz     1f
        inc     %r15                    # the generator stands still at 0
1:      lea     count_name(%rip), %rsi
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
        call    map_everything
        mov     $STRING_BUFFER, %ebx
2:      call    random
        mov     %rax, (%rbx)
        add     $8, %ebx
        cmp     $STRING_BUFFER + 0x100, %ebx
        jb      2b
        xor     %r13d, %r13d

next:
        cmp     %r14, %r13
        jae     done
        call    random
        mov     %eax, %ebx              # decisions
        and     $0x1e, %eax             # a twin of entries: bit 0 is read or write
        movzwl  operations(%rax), %eax
        lea     text_start(%rax), %rax
        call    *%rax
        inc     %r13
        test    $DOT_MASK, %r13d
        jnz     next
        call    console_registers
        mov     $'.', %al
        call    print_character
        call    flush
        test    $LINE_MASK, %r13d
        jnz     next
        say     "\n"
        jmp     next

done:
        call    console_registers
        say     "\nhostile: done\n"
        call    sleep_s5
1:      cli
        hlt
        jmp     1b

operations:
.irp    operation, port, port, port, port, port, port_string, port_string, mmio, mmio, mmio, mmio, mmio_string, mmio_modify, pci, fw_cfg, fw_cfg_dma
        .word   \operation - text_start
.endr

# Return 64 random bits in rax (xorshift64*). Keeps all other registers.
random:
        mov     %r15, %rax
        shr     $12, %rax
        xor     %rax, %r15
        mov     %r15, %rax
        shl     $25, %rax
        xor     %rax, %r15
        mov     %r15, %rax
        shr     $27, %rax
        xor     %rax, %r15
        mov     $0x2545f4914f6cdd1d, %rax
        imul    %r15, %rax
        bswap   %rax                    # the high bits are the better ones
        ret

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
