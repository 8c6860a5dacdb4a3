/*
 * The floor: system calls with as little as possible between them
 *
 *	floor QUEUE … BATCH single|runs
 *
 * One recvmmsg receives at most BATCH packets, and one send answers them. `single` sends a VERDICT
 * message for each packet, `runs` a VERDICT_BATCH message for each run of equal verdicts. The
 * program relies on the kernel's order: the packet header comes first, the payload last.
 */
#define _GNU_SOURCE
#include "peer.h"

#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_queue.h>
#include <linux/netlink.h>

#define MAX_BATCH 64
/* Enough for the bench's packets, and small, so that 64 of them are on few pages */
#define SLOT_LEN (2 * 1024 + 64)

struct attr_u32 {
	struct nlattr head;
	uint32_t value;
};

struct verdict {
	struct nlmsghdr head;
	struct nfgenmsg family;
	struct nlattr verdict_head;
	struct nfqnl_msg_verdict_hdr verdict;
	struct attr_u32 mark;
};

struct packet {
	struct nlmsghdr head;
	struct nfgenmsg family;
	struct nlattr packet_head;
	struct nfqnl_msg_packet_hdr packet;
};

static int fd, batch, is_in_runs;
static struct mmsghdr slots[MAX_BATCH];
static struct iovec slot_memory[MAX_BATCH];
static char memory[MAX_BATCH * SLOT_LEN] __attribute__((aligned(4096)));
static char out[MAX_BATCH * sizeof(struct verdict)];
static size_t out_len;

static void put_verdict(uint16_t type, uint32_t id, uint32_t verdict, uint32_t mark)
{
	struct verdict *message = (struct verdict *)(out + out_len);
	uint32_t len = mark ? sizeof *message : sizeof *message - sizeof message->mark;

	*message = (struct verdict){
		.head = {.nlmsg_len = len, .nlmsg_type = NFNL_SUBSYS_QUEUE << 8 | type, .nlmsg_flags = NLM_F_REQUEST},
		.family = {.version = NFNETLINK_V0, .res_id = htons(queue_num)},
		.verdict_head = {.nla_len = 12, .nla_type = NFQA_VERDICT_HDR},
		.verdict = {.verdict = htonl(verdict), .id = htonl(id)},
		.mark = {{.nla_len = 8, .nla_type = NFQA_MARK}, htonl(mark)},
	};
	out_len += len;
}

/* Skips the attributes in front of the payload, which is the last one */
static void add_payload(const struct packet *packet)
{
	const char *at = (const char *)&packet->packet_head, *end = (const char *)packet + packet->head.nlmsg_len;

	while (at < end) {
		const struct nlattr *attr = (const struct nlattr *)at;

		if (attr->nla_type == NFQA_PAYLOAD)
			bytes += attr->nla_len - sizeof *attr;
		at += NLA_ALIGN(attr->nla_len);
	}
}

static void handle_batch(void)
{
	int count = recvmmsg(fd, slots, batch, MSG_WAITFORONE, NULL);
	uint32_t run_id = 0, run_verdict = 0, run_mark = 0;

	if (count < 0 && errno == ENOBUFS)
		return;
	if (count < 0)
		fail("recvmmsg");
	out_len = 0;
	for (int i = 0; i < count; i++) {
		const struct packet *packet = slot_memory[i].iov_base;
		uint32_t id, mark, verdict;

		if (packet->head.nlmsg_type != (NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_PACKET))
			fail("something else than a packet");
		id = ntohl(packet->packet.packet_id);
		add_payload(packet);
		verdict = decide(id, &mark);
		if (!is_in_runs) {
			put_verdict(NFQNL_MSG_VERDICT, id, verdict, mark);
			continue;
		}
		if (run_id && (verdict != run_verdict || mark != run_mark))
			put_verdict(NFQNL_MSG_VERDICT_BATCH, run_id, run_verdict, run_mark);
		run_id = id;
		run_verdict = verdict;
		run_mark = mark;
	}
	if (run_id)
		put_verdict(NFQNL_MSG_VERDICT_BATCH, run_id, run_verdict, run_mark);
	handled += count;
	if (send(fd, out, out_len, 0) < 0)
		fail("send");
}

static void bind_queue(void)
{
	struct {
		struct nlmsghdr head;
		struct nfgenmsg family;
		struct nlattr command_head;
		struct nfqnl_msg_config_cmd command;
		struct nlattr params_head;
		struct nfqnl_msg_config_params params;
		char padding[3];
		struct attr_u32 flags[2];
	} __attribute__((packed)) message = {
		.head = {.nlmsg_len = sizeof message, .nlmsg_type = NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_CONFIG,
			 .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK},
		.family = {.version = NFNETLINK_V0, .res_id = htons(queue_num)},
		.command_head = {.nla_len = 8, .nla_type = NFQA_CFG_CMD},
		.command = {.command = NFQNL_CFG_CMD_BIND},
		.params_head = {.nla_len = 9, .nla_type = NFQA_CFG_PARAMS},
		.params = {.copy_range = htonl(0xffff), .copy_mode = NFQNL_COPY_PACKET},
		.flags = {{{.nla_len = 8, .nla_type = NFQA_CFG_FLAGS}, htonl(wants_gso ? NFQA_CFG_F_GSO : 0)},
			  {{.nla_len = 8, .nla_type = NFQA_CFG_MASK}, htonl(NFQA_CFG_F_GSO)}},
	};
	struct {
		struct nlmsghdr head;
		struct nlmsgerr error;
		char rest[256];
	} answer;

	if (send(fd, &message, sizeof message, 0) < 0 || recv(fd, &answer, sizeof answer, 0) < 0)
		fail("configuration");
	errno = -answer.error.error;
	if (answer.head.nlmsg_type != NLMSG_ERROR || errno)
		fail("configuration");
}

int main(int argc, char **argv)
{
	struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};

	arguments(argc, argv);
	if (argc != 7)
		return 2;
	batch = atoi(argv[5]);
	is_in_runs = !strcmp(argv[6], "runs");
	if (batch < 1 || batch > MAX_BATCH)
		return 2;
	fd = socket(AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER);
	if (fd < 0 || bind(fd, (void *)&kernel, sizeof kernel) < 0 || connect(fd, (void *)&kernel, sizeof kernel) < 0)
		fail("netlink socket");
	for (int i = 0; i < batch; i++) {
		slot_memory[i] = (struct iovec){memory + i * SLOT_LEN, SLOT_LEN};
		slots[i].msg_hdr = (struct msghdr){.msg_iov = &slot_memory[i], .msg_iovlen = 1};
	}
	set_recv_buffer(fd);
	bind_queue();
	serve(handle_batch);
	return 0;
}
