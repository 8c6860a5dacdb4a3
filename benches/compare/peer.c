/*
 * The callback loop on libnetfilter_queue, as its own example has it: the other side of this benchmark.
 *
 * Reads numbers from standard input, a line each; handles and accepts that many packets; writes how many nanoseconds
 * that took.
 */
#include <arpa/inet.h>
#include <libnetfilter_queue/libnetfilter_queue.h>
#include <linux/netfilter.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>

static unsigned long handled, bytes;

static int callback(struct nfq_q_handle *queue, struct nfgenmsg *message, struct nfq_data *data, void *user)
{
	struct nfqnl_msg_packet_hdr *header = nfq_get_msg_packet_hdr(data);
	unsigned char *payload;
	int len = nfq_get_payload(data, &payload);

	(void)message;
	(void)user;
	bytes += len;
	handled++;
	return nfq_set_verdict(queue, ntohl(header->packet_id), NF_ACCEPT, 0, NULL);
}

static long long now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

int main(int argc, char **argv)
{
	static char buf[70000];
	struct nfq_handle *handle = nfq_open();
	struct nfq_q_handle *queue;
	unsigned long wanted;
	int fd;

	if (argc != 2 || !handle)
		return 2;
	queue = nfq_create_queue(handle, atoi(argv[1]), callback, NULL);
	if (!queue || nfq_set_mode(queue, NFQNL_COPY_PACKET, 0xffff) < 0)
		return 3;
	fd = nfq_fd(handle);
	puts("ready");
	fflush(stdout);
	while (scanf("%lu", &wanted) == 1) {
		long long begin = now();

		handled = bytes = 0;
		while (handled < wanted) {
			int len = recv(fd, buf, sizeof buf, 0);

			if (len < 0 || nfq_handle_packet(handle, buf, len) < 0)
				return 4;
		}
		printf("%lld %lu\n", now() - begin, bytes);
		fflush(stdout);
	}
	nfq_destroy_queue(queue);
	nfq_close(handle);
	return 0;
}
