/*
 * Standard input to a vsock connection, and what comes from there to standard
 * output, until both have ended: `vsock-cat listen PORT`, `vsock-cat connect
 * PORT` (to the host).
 */

#include <errno.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static char buffer[1 << 16];

static void
fail(const char *what)
{
	fprintf(stderr, "vsock-cat: %s: %s\n", what, strerror(errno));
	exit(1);
}

/* Copy what there is; 0 at the end. */
static int
copy(int from, int to)
{
	ssize_t size, done, written;

	size = read(from, buffer, sizeof(buffer));
	if (size < 0)
		fail("read");
	for (done = 0; done < size; done += written) {
		written = write(to, buffer + done, (size_t)(size - done));
		if (written < 0)
			fail("write");
	}
	return size != 0;
}

int
main(int argc, char **argv)
{
	struct sockaddr_vm address = { .svm_family = AF_VSOCK };
	struct pollfd fds[2];
	int listener, fd, is_listening;

	if (argc != 3) {
		fprintf(stderr, "usage: vsock-cat listen|connect port\n");
		return 1;
	}
	is_listening = !strcmp(argv[1], "listen");
	address.svm_port = (unsigned int)strtoul(argv[2], NULL, 10);
	address.svm_cid = is_listening ? VMADDR_CID_ANY : VMADDR_CID_HOST;
	fd = socket(AF_VSOCK, SOCK_STREAM, 0);
	if (fd < 0)
		fail("socket");
	if (is_listening) {
		listener = fd;
		if (bind(listener, (struct sockaddr *)&address, sizeof(address)))
			fail("bind");
		if (listen(listener, 1))
			fail("listen");
		fprintf(stderr, "vsock-cat: listening\n");
		fd = accept(listener, NULL, NULL);
		if (fd < 0)
			fail("accept");
		close(listener);
	} else if (connect(fd, (struct sockaddr *)&address, sizeof(address)))
		fail("connect");
	fds[0].fd = STDIN_FILENO;
	fds[1].fd = fd;
	fds[0].events = fds[1].events = POLLIN;
	while (fds[0].fd >= 0 || fds[1].fd >= 0) {
		if (poll(fds, 2, -1) < 0)
			fail("poll");
		if (fds[0].revents && !copy(STDIN_FILENO, fd)) {
			fds[0].fd = -1;
			if (shutdown(fd, SHUT_WR))
				fail("shutdown");
		}
		if (fds[1].revents && !copy(fd, STDOUT_FILENO))
			fds[1].fd = -1;
	}
	close(fd);
	return 0;
}
