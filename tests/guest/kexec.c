/*
 * Boot the kernel in /kexec-kernel with /kexec-initrd and the command line in the arguments.
 *
 * A guest of the tests has no kexec(8). Source: kexec_load(2), reboot(2).
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/reboot.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    int kernel = open("/kexec-kernel", O_RDONLY);
    int initrd = open("/kexec-initrd", O_RDONLY);
    if (syscall(SYS_kexec_file_load, kernel, initrd, strlen(argv[1]) + 1, argv[1], 0UL)) {
        perror("kexec_file_load");
        return 1;
    }
    sync();
    syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_KEXEC, NULL);
    perror("reboot");
    return 1;
}
