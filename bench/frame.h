/* The frame that both generators send, and what they share. */
#ifndef FRAME_H
#define FRAME_H

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define HEADERS 42 /* Ethernet, IPv4, UDP */
#define SOURCE_PORT 34
#define MAX_FRAME 2048
/* No listener, and no answer: nobody has the frame's destination MAC. */
#define DISCARD 9

static inline uint16_t ip_checksum(const unsigned char *header)
{
	uint32_t sum = 0;

	for (int i = 0; i < 20; i += 2)
		sum += (uint32_t)header[i] << 8 | header[i + 1];
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return htons((uint16_t)~sum);
}

static inline void put16(unsigned char *at, unsigned int value)
{
	at[0] = (unsigned char)(value >> 8);
	at[1] = (unsigned char)value;
}

/* A valid IPv4/UDP frame without UDP checksum. The receiving stack drops it right behind the TC hook, as it is for
 * another host's MAC. */
static inline void make_frame(unsigned char *frame, size_t size, const char *from, const char *to)
{
	static const unsigned char macs[12] = { 0x02, 0, 0, 0, 0xff, 0x01, 0x02, 0, 0, 0, 0xff, 0x02 };
	uint16_t sum;

	if (size < HEADERS || size > MAX_FRAME)
		errx(2, "a frame has %d to %d bytes", HEADERS, MAX_FRAME);
	memset(frame, 0, size);
	memcpy(frame, macs, sizeof(macs));
	put16(frame + 12, 0x0800);
	frame[14] = 0x45;
	put16(frame + 16, (unsigned int)size - 14);
	frame[22] = 64;
	frame[23] = IPPROTO_UDP;
	inet_pton(AF_INET, from, frame + 26);
	inet_pton(AF_INET, to, frame + 30);
	sum = ip_checksum(frame + 14);
	memcpy(frame + 24, &sum, sizeof(sum));
	put16(frame + SOURCE_PORT, 20000);
	put16(frame + SOURCE_PORT + 2, DISCARD);
	put16(frame + SOURCE_PORT + 4, (unsigned int)size - 34);
}

/* One CPU sends, and does all that the kernel does with the frames. */
static inline void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		err(1, "sched_setaffinity");
}

/* A positive number, or the end. */
static inline unsigned int number(const char *text)
{
	char *end;
	unsigned long value = strtoul(text, &end, 10);

	if (end == text || *end || value > 1u << 30)
		errx(2, "not a number: %s", text);
	return (unsigned int)value;
}

#endif
