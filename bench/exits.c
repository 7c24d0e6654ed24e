/*
 * The smallest loop that handles a guest's exits, for comparison with the Python one.
 *
 * exits <code in hex>: loads the code at 0x1000 of a VM with 64 KiB of RAM, runs it in real mode
 * until HLT, and prints "<exits> <nanoseconds of processor time>". It decodes each access as a bus does:
 * direction, address, size and value; reads get zero.
 */
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

#define CODE 0x1000
#define RAM_SIZE 0x10000

static volatile uint64_t sink;

static void
check(int result, const char *what)
{
	if (result < 0)
		err(1, "%s", what);
}

static uint64_t
now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
	return (uint64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static int
serve(struct kvm_run *run)
{
	switch (run->exit_reason) {
	case KVM_EXIT_IO: {
		uint8_t *data = (uint8_t *)run + run->io.data_offset;
		if (run->io.direction == KVM_EXIT_IO_OUT)
			sink += run->io.port + run->io.size + *data;
		else
			*data = 0;
		return 1;
	}
	case KVM_EXIT_MMIO:
		if (run->mmio.is_write)
			sink += run->mmio.phys_addr + run->mmio.len + run->mmio.data[0];
		else
			memset(run->mmio.data, 0, sizeof(run->mmio.data));
		return 1;
	case KVM_EXIT_HLT:
		return 0;
	default:
		errx(1, "exit reason %u", run->exit_reason);
	}
}

int
main(int argc, char **argv)
{
	struct kvm_userspace_memory_region region = { .memory_size = RAM_SIZE };
	struct kvm_sregs sregs;
	struct kvm_regs regs = { .rip = CODE, .rflags = 2 };
	struct kvm_run *run;
	uint64_t exits = 0, start;
	uint8_t *ram;
	int kvm, vm, vcpu, size;

	if (argc != 2)
		errx(2, "usage: exits code");
	check(kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	check(vm = ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (ram == MAP_FAILED)
		err(1, "mmap");
	for (size_t i = 0; argv[1][2 * i]; i++)
		if (sscanf(argv[1] + 2 * i, "%2hhx", ram + CODE + i) != 1)
			errx(2, "not hexadecimal");
	region.userspace_addr = (uintptr_t)ram;
	check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
	check(vcpu = ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	check(size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
	run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		err(1, "mmap");
	check(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs.base = sregs.cs.selector = 0;
	check(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	check(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
	start = now();
	do {
		check(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
		exits++;
	} while (serve(run));
	printf("%llu %llu\n", (unsigned long long)exits, (unsigned long long)(now() - start));
	return 0;
}
