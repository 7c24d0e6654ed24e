/*
 * Put load on a disk for a time, and print the number of requests: bench/disk.py's program in the guest.
 *
 *     load DEVICE read|write BYTES DEPTH sequential|random MILLISECONDS
 *
 * DEPTH requests of BYTES bytes each are under way at any time, without the page cache. Prints
 * "load: begin", and at the end "load: REQUESTS NANOSECONDS".
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { DEPTH_MAX = 256, ALIGNMENT = 4096 };

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t now(void)
{
	struct timespec time;

	if (clock_gettime(CLOCK_MONOTONIC, &time))
		fail("clock_gettime");
	return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static uint64_t seed = 88172645463325252u;

static uint64_t chance(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed;
}

int main(int count, char **arguments)
{
	static struct iocb blocks[DEPTH_MAX], *list[DEPTH_MAX];
	static struct io_event events[DEPTH_MAX];
	aio_context_t context = 0;

	if (count != 7) {
		fprintf(stderr, "load: DEVICE read|write BYTES DEPTH sequential|random MILLISECONDS\n");
		return 2;
	}
	int writes = !strcmp(arguments[2], "write");
	size_t size = strtoul(arguments[3], NULL, 10);
	long depth = strtol(arguments[4], NULL, 10);
	int is_random = !strcmp(arguments[5], "random");
	uint64_t limit = strtoull(arguments[6], NULL, 10) * 1000000;
	if (depth < 1 || depth > DEPTH_MAX || size < 512)
		return 2;

	int disk = open(arguments[1], O_DIRECT | (writes ? O_RDWR : O_RDONLY));
	if (disk < 0)
		fail(arguments[1]);
	off_t end = lseek(disk, 0, SEEK_END);
	uint64_t places = (uint64_t)end / size, next = 0;
	if (end <= 0 || !places)
		fail("lseek");
	if (syscall(SYS_io_setup, depth, &context))
		fail("io_setup");
	for (long n = 0; n < depth; n++) {
		void *buffer;

		if (posix_memalign(&buffer, ALIGNMENT, size))
			fail("posix_memalign");
		memset(buffer, (int)n + 1, size);
		blocks[n].aio_fildes = (uint32_t)disk;
		blocks[n].aio_lio_opcode = writes ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
		blocks[n].aio_buf = (uintptr_t)buffer;
		blocks[n].aio_nbytes = size;
		list[n] = &blocks[n];
	}

	puts("load: begin");
	fflush(stdout);
	uint64_t begun = now(), done = 0, time = begun;
	long free_slots = depth, pending = 0;
	for (;;) {
		if (time - begun < limit) {
			for (long n = 0; n < free_slots; n++) {
				uint64_t place = is_random ? chance() : next++;

				list[n]->aio_offset = (int64_t)(place % places * size);
			}
			for (long sent = 0; sent < free_slots;) {
				long taken = syscall(SYS_io_submit, context, free_slots - sent, list + sent);

				if (taken <= 0)
					fail("io_submit");
				sent += taken;
			}
			pending += free_slots;
		}
		if (!pending)
			break;
		long got = syscall(SYS_io_getevents, context, 1, depth, events, NULL);
		if (got <= 0)
			fail("io_getevents");
		for (long n = 0; n < got; n++) {
			if (events[n].res != (int64_t)size) {
				fprintf(stderr, "load: result %lld\n", (long long)events[n].res);
				return 1;
			}
			list[n] = (struct iocb *)(uintptr_t)events[n].obj;
		}
		free_slots = got;
		pending -= got;
		done += (uint64_t)got;
		time = now();
	}
	printf("load: %llu %llu\n", (unsigned long long)done, (unsigned long long)(time - begun));
	return 0;
}
