/*
 * Arguments, protocol and clocks of the C programs
 *
 *	program QUEUE accept|drop|mixed RECEIVE_BUFFER|0 gso|- [ARGUMENT…]
 *
 * The program binds the queue and prints "ready". Then it reads a number from each line, and handles
 * this number of packets. For each line it prints the time in nanoseconds, the CPU time (user and
 * system) and the bytes of payload.
 */
#ifndef PEER_H
#define PEER_H

#include <arpa/inet.h>
#include <errno.h>
#include <linux/netfilter.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define MIXED_MARK 7
/* Room for any packet that the kernel sends */
#define PACKET_ROOM (68 * 1024)

static uint16_t queue_num;
static int is_mixed, wants_gso, recv_buffer;
static uint32_t only_verdict;
static unsigned long handled, bytes;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void arguments(int argc, char **argv)
{
	if (argc < 5) {
		fprintf(stderr, "%s: four arguments at least\n", argv[0]);
		exit(2);
	}
	queue_num = (uint16_t)atoi(argv[1]);
	is_mixed = !strcmp(argv[2], "mixed");
	only_verdict = strcmp(argv[2], "drop") ? NF_ACCEPT : NF_DROP;
	recv_buffer = atoi(argv[3]);
	wants_gso = !strcmp(argv[4], "gso");
}

/* The verdict of a packet: of 8 mixed ones, one is drop, and one has a mark; mark 0 means none */
static inline uint32_t decide(uint32_t id, uint32_t *mark)
{
	*mark = is_mixed && id % 8 == 4 ? MIXED_MARK : 0;
	if (!is_mixed)
		return only_verdict;
	return id % 8 ? NF_ACCEPT : NF_DROP;
}

static void set_recv_buffer(int fd)
{
	if (recv_buffer && setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &recv_buffer, sizeof recv_buffer) < 0)
		fail("SO_RCVBUF");
}

static long long nanoseconds(clockid_t clock)
{
	struct timespec time;

	clock_gettime(clock, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

/* `handle` receives once, answers the packets, and adds to `handled` and `bytes` */
static void serve(void (*handle)(void))
{
	unsigned long wanted;

	puts("ready");
	fflush(stdout);
	while (scanf("%lu", &wanted) == 1) {
		long long cpu = nanoseconds(CLOCK_PROCESS_CPUTIME_ID), begin = nanoseconds(CLOCK_MONOTONIC);

		handled = bytes = 0;
		while (handled < wanted)
			handle();
		printf("%lld ", nanoseconds(CLOCK_MONOTONIC) - begin);
		printf("%lld %lu\n", nanoseconds(CLOCK_PROCESS_CPUTIME_ID) - cpu, bytes);
		fflush(stdout);
	}
}

#endif
