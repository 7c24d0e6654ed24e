/*
 * A client of vmd in C: sends one request, prints what is answered. See docs/protocol.md.
 *
 *     cc -o client client.c
 *     ./client /run/vmd.sock '{"type": "status"}'
 *     ./client /run/vmd.sock '{"type": "start", "name": "web"}'
 */
#include <err.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

int main(int argc, char **argv)
{
	static char answer[256 * 1024 + 1];
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
	ssize_t size;

	if (argc != 3 || strlen(argv[1]) >= sizeof(address.sun_path))
		errx(2, "usage: client socket request");
	strcpy(address.sun_path, argv[1]);
	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
		err(1, "%s", argv[1]);
	if (send(fd, argv[2], strlen(argv[2]), MSG_NOSIGNAL) < 0)
		err(1, "send");
	do {
		if ((size = recv(fd, answer, sizeof(answer) - 1, 0)) <= 0)
			err(1, "no answer");
		answer[size] = '\0';
		puts(answer);
	} while (strstr(answer, "\"has_more\":true"));
	return strstr(answer, "\"type\":\"failed\"") != NULL;
}
