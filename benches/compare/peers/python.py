"""Python NetfilterQueue's callbacks; see peer.h for the protocol"""

import select
import sys
import time

from netfilterqueue import NetfilterQueue

# The kernel doubles it to 212992, the default of the other programs.
DEFAULT_RECV_BUFFER = 212992 // 2
MIXED_MARK = 7

queue_num, kind, recv_buffer = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
handled = seen = 0


def accept(packet):
    global handled, seen
    handled += 1
    seen += packet.get_payload_len()
    packet.accept()


def drop(packet):
    global handled, seen
    handled += 1
    seen += packet.get_payload_len()
    packet.drop()


def mixed(packet):
    global handled, seen
    handled += 1
    seen += packet.get_payload_len()
    turn = packet.id % 8
    if turn == 0:
        packet.drop()
        return
    if turn == 4:
        packet.set_mark(MIXED_MARK)
    packet.accept()


queue = NetfilterQueue()
queue.bind(
    queue_num,
    {"accept": accept, "drop": drop, "mixed": mixed}[kind],
    sock_len=recv_buffer or DEFAULT_RECV_BUFFER,
)
waiting = select.poll()
waiting.register(queue.get_fd(), select.POLLIN)
print("ready", flush=True)
for line in sys.stdin:
    wanted = int(line)
    cpu, begin = time.process_time_ns(), time.perf_counter_ns()
    handled = seen = 0
    # Handles all waiting packets
    queue.run(False)
    while handled < wanted:
        waiting.poll()
        queue.run(False)
    elapsed = time.perf_counter_ns() - begin
    print(elapsed, time.process_time_ns() - cpu, seen, flush=True)
queue.unbind()
