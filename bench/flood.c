/*
 * Sends frames out of an interface as fast as one CPU can, through its qdisc and TC hook.
 *
 *	flood DEV CPU SIZE COUNT BURSTS
 *
 * prints, of each burst of COUNT frames, the nanoseconds a frame.
 */
#include "frame.h"

#include <linux/if_packet.h>
#include <net/if.h>
#include <stdio.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BATCH 64

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static void send_all(int fd, struct mmsghdr *messages, unsigned int count)
{
	while (count) {
		int sent = sendmmsg(fd, messages, count < BATCH ? count : BATCH, 0);

		if (sent < 0)
			err(1, "sendmmsg");
		count -= (unsigned int)sent;
	}
}

static int packet_socket(const char *dev)
{
	/* Protocol 0: it receives nothing. */
	struct sockaddr_ll address = { .sll_family = AF_PACKET, .sll_ifindex = (int)if_nametoindex(dev) };
	int fd = socket(AF_PACKET, SOCK_RAW, 0);

	if (!address.sll_ifindex)
		err(1, "%s", dev);
	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)))
		err(1, "packet socket");
	return fd;
}

int main(int argc, char **argv)
{
	unsigned char frame[MAX_FRAME];
	struct mmsghdr messages[BATCH] = {};
	struct iovec data = { .iov_base = frame };
	unsigned int count, bursts;
	int fd;

	if (argc != 6)
		errx(2, "usage: flood DEV CPU SIZE COUNT BURSTS");
	fd = packet_socket(argv[1]);
	pin((int)number(argv[2]));
	data.iov_len = number(argv[3]);
	count = number(argv[4]);
	bursts = number(argv[5]);
	make_frame(frame, data.iov_len, "192.0.2.1", "192.0.2.2");
	for (int i = 0; i < BATCH; i++)
		messages[i].msg_hdr = (struct msghdr){ .msg_iov = &data, .msg_iovlen = 1 };
	send_all(fd, messages, BATCH);
	while (bursts--) {
		uint64_t begin = now();

		send_all(fd, messages, count);
		printf("%llu\n", (unsigned long long)((now() - begin) / count));
	}
	return 0;
}
