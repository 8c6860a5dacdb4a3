/*
 * Rewrites a UDP/IPv4 packet with libnetfilter_queue's packet buffers, as their manual has it
 *
 * It reads lines of three numbers: the length of the packet, the length of the bytes that replace
 * 8 bytes of its payload, and a number of rewrites. It answers with the nanoseconds of all
 * rewrites, and with the last result in hexadecimal. src/rewrite.rs has the same packet.
 */
#include <arpa/inet.h>
#include <netinet/ip.h>
#include <netinet/udp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* These headers need those above. */
#include <libnetfilter_queue/libnetfilter_queue.h>
#include <libnetfilter_queue/libnetfilter_queue_ipv4.h>
#include <libnetfilter_queue/libnetfilter_queue_udp.h>
#include <libnetfilter_queue/pktbuff.h>

#define HEADERS (sizeof(struct iphdr) + sizeof(struct udphdr))
#define OFFSET 8
#define OLD_LEN 8
#define MAX_LEN 1500

static const char replacement[] = "ABCDEFGHIJKL";
static unsigned char packet[MAX_LEN], result[MAX_LEN + sizeof replacement];
static unsigned int result_len;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static long long nanoseconds(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void build(unsigned int len)
{
	struct iphdr *ip = (struct iphdr *)packet;
	struct udphdr *udp = (struct udphdr *)(ip + 1);

	*ip = (struct iphdr){
		.version = 4, .ihl = 5, .tot_len = htons(len), .frag_off = htons(IP_DF), .ttl = 64, .protocol = IPPROTO_UDP,
		.saddr = htonl(INADDR_LOOPBACK), .daddr = htonl(INADDR_LOOPBACK),
	};
	*udp = (struct udphdr){.source = htons(7), .dest = htons(7), .len = htons(len - sizeof *ip)};
	for (unsigned int i = HEADERS; i < len; i++)
		packet[i] = i - HEADERS;
	nfq_ip_set_checksum(ip);
	nfq_udp_compute_checksum_ipv4(udp, ip);
}

static void rewrite(unsigned int len, unsigned int new_len, bool is_last)
{
	struct pkt_buff *buffer = pktb_alloc(AF_INET, packet, len, new_len);
	struct iphdr *ip = buffer ? nfq_ip_get_hdr(buffer) : NULL;

	if (!ip || nfq_ip_set_transport_header(buffer, ip) < 0)
		fail("pktb_alloc or the headers");
	if (!nfq_udp_mangle_ipv4(buffer, OFFSET, OLD_LEN, replacement, new_len))
		fail("nfq_udp_mangle_ipv4");
	if (is_last) {
		result_len = pktb_len(buffer);
		memcpy(result, pktb_data(buffer), result_len);
	}
	pktb_free(buffer);
}

int main(void)
{
	unsigned int len, new_len;
	unsigned long count;

	while (scanf("%u %u %lu", &len, &new_len, &count) == 3) {
		long long begin;

		if (len < HEADERS + OFFSET + OLD_LEN || len > MAX_LEN || new_len >= sizeof replacement)
			return 2;
		build(len);
		begin = nanoseconds();
		for (unsigned long i = 1; i <= count; i++)
			rewrite(len, new_len, i == count);
		printf("%lld ", nanoseconds() - begin);
		for (unsigned int i = 0; i < result_len; i++)
			printf("%02x", result[i]);
		putchar('\n');
		fflush(stdout);
	}
	return 0;
}
