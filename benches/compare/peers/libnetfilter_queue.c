/* The callback loop of libnetfilter_queue, as in the library's own example */
#include "peer.h"

#include <libnetfilter_queue/libnetfilter_queue.h>

static struct nfq_handle *handle;
static int fd;

static int callback(struct nfq_q_handle *queue, struct nfgenmsg *message, struct nfq_data *data, void *user)
{
	struct nfqnl_msg_packet_hdr *header = nfq_get_msg_packet_hdr(data);
	uint32_t id = ntohl(header->packet_id), mark, verdict = decide(id, &mark);
	unsigned char *payload;
	int len = nfq_get_payload(data, &payload);

	(void)message;
	(void)user;
	bytes += len;
	handled++;
	if (mark)
		return nfq_set_verdict2(queue, id, verdict, mark, 0, NULL);
	return nfq_set_verdict(queue, id, verdict, 0, NULL);
}

static void handle_one(void)
{
	static char buf[PACKET_ROOM];
	int len = recv(fd, buf, sizeof buf, 0);

	if (len < 0 && errno == ENOBUFS)
		return;
	if (len < 0 || nfq_handle_packet(handle, buf, len) < 0)
		fail("recv or nfq_handle_packet");
}

int main(int argc, char **argv)
{
	struct nfq_q_handle *queue;

	arguments(argc, argv);
	handle = nfq_open();
	if (!handle)
		fail("nfq_open");
	queue = nfq_create_queue(handle, queue_num, callback, NULL);
	if (!queue || nfq_set_mode(queue, NFQNL_COPY_PACKET, 0xffff) < 0)
		fail("queue");
	if (wants_gso && nfq_set_queue_flags(queue, NFQA_CFG_F_GSO, NFQA_CFG_F_GSO) < 0)
		fail("nfq_set_queue_flags");
	fd = nfq_fd(handle);
	set_recv_buffer(fd);
	serve(handle_one);
	nfq_destroy_queue(queue);
	nfq_close(handle);
	return 0;
}
