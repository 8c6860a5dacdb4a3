/* libmnl and nfq_nlmsg_*: one receive call and one send call per packet */
#include "peer.h"

#include <libmnl/libmnl.h>
#include <libnetfilter_queue/libnetfilter_queue.h>
#include <linux/netfilter/nfnetlink_queue.h>

static struct mnl_socket *netlink;
static unsigned int port;

static void send_message(struct nlmsghdr *message)
{
	if (mnl_socket_sendto(netlink, message, message->nlmsg_len) < 0)
		fail("mnl_socket_sendto");
}

static int callback(const struct nlmsghdr *message, void *user)
{
	struct nlattr *attrs[NFQA_MAX + 1] = {0};
	char buf[256];
	struct nlmsghdr *answer;
	struct nfqnl_msg_packet_hdr *header;
	uint32_t id, mark, verdict;

	(void)user;
	if (nfq_nlmsg_parse(message, attrs) < 0 || !attrs[NFQA_PACKET_HDR])
		return MNL_CB_ERROR;
	header = mnl_attr_get_payload(attrs[NFQA_PACKET_HDR]);
	id = ntohl(header->packet_id);
	if (attrs[NFQA_PAYLOAD])
		bytes += mnl_attr_get_payload_len(attrs[NFQA_PAYLOAD]);
	handled++;
	verdict = decide(id, &mark);
	answer = nfq_nlmsg_put(buf, NFQNL_MSG_VERDICT, queue_num);
	nfq_nlmsg_verdict_put(answer, (int)id, (int)verdict);
	if (mark)
		nfq_nlmsg_verdict_put_mark(answer, mark);
	send_message(answer);
	return MNL_CB_OK;
}

static void handle_one(void)
{
	static char buf[PACKET_ROOM];
	ssize_t len = mnl_socket_recvfrom(netlink, buf, sizeof buf);

	if (len < 0 && errno == ENOBUFS)
		return;
	if (len < 0 || mnl_cb_run(buf, len, 0, port, callback, NULL) < 0)
		fail("mnl_socket_recvfrom or mnl_cb_run");
}

int main(int argc, char **argv)
{
	char buf[256];
	struct nlmsghdr *message;

	arguments(argc, argv);
	netlink = mnl_socket_open(NETLINK_NETFILTER);
	if (!netlink || mnl_socket_bind(netlink, 0, MNL_SOCKET_AUTOPID) < 0)
		fail("netlink socket");
	port = mnl_socket_get_portid(netlink);
	set_recv_buffer(mnl_socket_get_fd(netlink));
	message = nfq_nlmsg_put(buf, NFQNL_MSG_CONFIG, queue_num);
	nfq_nlmsg_cfg_put_cmd(message, AF_UNSPEC, NFQNL_CFG_CMD_BIND);
	nfq_nlmsg_cfg_put_params(message, NFQNL_COPY_PACKET, 0xffff);
	if (wants_gso) {
		mnl_attr_put_u32(message, NFQA_CFG_FLAGS, htonl(NFQA_CFG_F_GSO));
		mnl_attr_put_u32(message, NFQA_CFG_MASK, htonl(NFQA_CFG_F_GSO));
	}
	send_message(message);
	serve(handle_one);
	mnl_socket_close(netlink);
	return 0;
}
