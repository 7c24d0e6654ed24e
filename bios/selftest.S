# The self-test guest: a flat firmware image that looks at the machine, checks its interrupts, says
# what it found on COM1 and then obeys single keys. README.md has the keys and the lines.
#
# selftest.S      start-up, the keys
# report.inc      what is printed: processors, memory, PCI functions
# rtc.inc         the time of day
# checks.inc      interrupts of PIT, RTC and UART
#
# Shared with the hostile guest: machine.inc boot.inc console.inc fwcfg.inc interrupts.inc power.inc

        .include "machine.inc"
        .include "boot.inc"

# ---- Start --------------------------------------------------------------------------------------
main:
        call    console_init
        call    interrupts_init
        mov     $PM1_ENABLE, %edx
        mov     $PM1_POWER_BUTTON, %eax
        out     %ax, %dx
        call    report

# ---- Wait for a key, a second or the power button -----------------------------------------------
wait:
        cmpl    $0, power_button
        jne     on_power_button
        call    second_is_over
        jne     on_second
        mov     early_taken, %ecx
        cmp     early_length, %ecx
        jb      on_early_key
        port_in UART_LSR
        test    $LSR_DATA_READY, %al
        jnz     on_received
        # Nothing to do: sleep. Interrupts stay off from the last look until the hlt.
        cli
        port_out UART_IER, IER_RECEIVED
        cmpl    $0, power_button
        jne     1f
        call    second_is_over
        jne     1f
        sti
        hlt
        jmp     wait
1:      sti
        jmp     wait

# Clears ZF if key n counts and a second has passed.
second_is_over:
        mov     timer_fired, %eax
        and     counting, %eax          # counting is 0 or all ones
        ret

on_power_button:
        movl    $0, power_button
        say     "power button\n"
        mov     $'p', %al
        jmp     on_key

on_second:
        lock decl timer_fired
        incl    seconds
        mov     seconds, %eax
        call    print_decimal
        say     "\n"
        jmp     wait

on_early_key:
        incl    early_taken
        mov     early(%rcx), %al
        jmp     on_key

on_received:
        port_in COM1

# A key in al.
on_key:
        movzbl  %al, %ebx
        cmpl    $0, counting            # any key ends the count, and is obeyed
        je      1f
        movl    $0, counting
        call    timer_stop
1:      cmpl    $0, exit_value_follows
        jne     debug_exit
        lea     keys(%rip), %rsi
2:      lodsb
        movzwl  (%rsi), %ecx
        add     $2, %rsi
        cmp     %al, %bl
        je      3f
        test    %al, %al
        jnz     2b
        # No key of ours: an echo.
        mov     %bl, %al
        call    print_character
        call    flush
        jmp     wait
3:      test    %al, %al
        jz      4f
        lea     text_start(%rcx), %rcx
        jmp     *%rcx
4:      xor     %eax, %eax              # a NUL byte, which also ends the table
        call    print_character
        call    flush
        jmp     wait

.macro  key     character, handler
        .byte   \character
        .word   \handler - text_start
.endm
keys:
        key     'p', power_off
        key     'r', reset_register
        key     'k', i8042
        key     't', triple_fault
        key     's', spin
        key     'h', halt
        key     'n', count
        key     'i', again
        key     'x', exit_prefix
        key     'c', panic
        key     0, wait

# ---- Keys ---------------------------------------------------------------------------------------
power_off:
        say     "p: power off by ACPI S5\n"
        call    sleep_s5
        jmp     no_effect

reset_register:
        say     "r: reboot by the reset register\n"
        port_out RESET_CONTROL, 0x02
        port_out RESET_CONTROL, 0x06
        jmp     no_effect

i8042:
        say     "k: reboot by the i8042\n"
        port_out I8042_COMMAND, 0xfe
        jmp     no_effect

triple_fault:
        say     "t: triple fault\n"
        cli
        lidt    no_idt(%rip)
        ud2                             # int3 is not for every KVM that emulates its guests

spin:
        say     "s: spin with interrupts off\n"
        cli
1:      jmp     1b

halt:
        say     "h: halt with interrupts off\n"
        cli
1:      hlt
        jmp     1b

count:
        say     "n: count seconds\n"
        movl    $0, seconds
        mov     $1000, %ecx
        call    timer_periodic
        movl    $-1, counting
        jmp     wait

again:
        call    report
        jmp     wait

exit_prefix:
        movl    $1, exit_value_follows
        jmp     wait

debug_exit:
        movl    $0, exit_value_follows
        say     "x: debug exit with 0x"
        mov     %ebx, %eax
        mov     $2, %ecx
        call    print_hex
        say     "\n"
        mov     %bl, %al
        mov     $DEBUG_EXIT, %edx
        out     %al, %dx
        mov     $'x', %bl
        jmp     no_effect

panic:
        say     "c: panic by pvpanic\n"
        port_out PVPANIC, 1
        jmp     no_effect

# The host may take a moment to act; say so if nothing came of the key in bl.
no_effect:
        mov     $1000, %ecx
        call    timer_once
        mov     $timer_fired, %edi
        mov     $1, %ecx
        call    wait_counter
        mov     %bl, %al
        call    print_character
        say     ": no effect\n"
        jmp     wait

        .balign 4, 0xcc
no_idt: .word   0
        .quad   0

        .set    exit_value_follows, VARIABLES + 0xa0

        .include "power.inc"
        .include "report.inc"
        .include "rtc.inc"
        .include "checks.inc"
        .include "interrupts.inc"
        .include "console.inc"
        .include "fwcfg.inc"
