/*
 * Preloaded into every program of the rig: guests are not offered paravirtual end-of-interrupt.
 *
 * QEMU's SVM (10.0, helper_vmrun) leaves the vector of an interrupt that KVM injects in
 * cs->exception_index. If QEMU's loop is left before anything resets it, as at each expiry of a
 * timer by the counted clock, the guest gets the interrupt a second time, although it has
 * interrupts disabled; and waits for ever if the handler holds a lock by then. An exit of the
 * guest resets it. Without this feature a handler's first step, to acknowledge the interrupt, is
 * one.
 *
 * Source: KVM API §4.59; Linux Documentation/virt/kvm/x86/cpuid.rst
 */
#define _GNU_SOURCE
#include <linux/kvm.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>

#define KVM_CPUID_FEATURES 0x40000001
#define KVM_FEATURE_PV_EOI 6

int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (request == KVM_SET_CPUID2) {
        struct kvm_cpuid2 *cpuid = argument;
        for (unsigned i = 0; i < cpuid->nent; i++)
            if (cpuid->entries[i].function == KVM_CPUID_FEATURES)
                cpuid->entries[i].eax &= ~(1u << KVM_FEATURE_PV_EOI);
    }
    return syscall(SYS_ioctl, fd, request, argument);
}
