// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* One program per way into the kernel, each as small as the verifier accepts: `spanloom check` loads and attaches them
 * one at a time, for an instant. None of them observes or changes anything.
 */
#include "compat.bpf.h"

char _license[] SEC("license") = "Dual BSD/GPL";

/* What check_run returns, so that a test run that did not run is told from one that did. */
#define RUN_RESULT 42

/* Key, value: anything. Never filled: the iterator needs a map to be attached to. Two elements at most. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2);
	__type(key, __u64);
	__type(value, __u64);
} check_map SEC(".maps");

/* Why: the capture's own way in. sys_enter exists wherever system calls can be traced. */
SEC("tp_btf/sys_enter")
int BPF_PROG(check_tp_btf, struct pt_regs *regs, long number)
{
	return 0;
}

/* Why: the way in of the socket backend, which needs them all: sockets.bpf.h says what each is for, and since when it
 * exists. SOCKET_TRACEPOINTS of agent/kernel/backends.py has the same names.
 */
#define SOCKET_TRACEPOINT(name)                                                                                        \
	SEC("tp_btf/" #name)                                                                                           \
	int check_socket_##name(void *context)                                                                         \
	{                                                                                                              \
		return 0;                                                                                              \
	}

SOCKET_TRACEPOINT(tcp_sendmsg_locked)
SOCKET_TRACEPOINT(sock_send_length)
SOCKET_TRACEPOINT(sock_recv_length)
SOCKET_TRACEPOINT(tcp_rcv_space_adjust)
SOCKET_TRACEPOINT(sched_switch)

/* Why: how the capture finds the connections that have gone quiet. */
SEC("iter/bpf_map_elem")
int check_map_iter(struct bpf_iter__bpf_map_elem *context)
{
	return 0;
}

/* Why: the classic form goes through perf_event_open and needs tracefs. A tracepoint of sockets, stable since 4.16. */
SEC("tracepoint/sock/inet_sock_set_state")
int check_tracepoint(void *context)
{
	return 0;
}

/* Why: the form that needs no BTF to be attached. */
SEC("raw_tp/sys_enter")
int check_raw_tracepoint(void *context)
{
	return 0;
}

/* Why: run by hand only (BPF_PROG_TEST_RUN, for raw tracepoints since 5.10, commit 1b4d60ec162f). */
SEC("raw_tp")
int check_run(void *context)
{
	return RUN_RESULT;
}

/* Why: the cheapest place for a probe of the socket layer. The function exists since the beginning of the history. */
SEC("fentry/tcp_sendmsg")
int check_fentry(void *context)
{
	return 0;
}

/* Why: the same place where the trampolines of fentry are missing or refused. */
SEC("kprobe/tcp_sendmsg")
int check_kprobe(void *context)
{
	return 0;
}

/* Why: functions of libraries, such as TLS. User space chooses where it goes. */
SEC("uprobe")
int check_uprobe(void *context)
{
	return 0;
}

/* Why: header injection writes into the message. bpf_msg_push_data exists since 5.0. */
SEC("sk_msg")
int check_sk_msg(struct sk_msg_md *message)
{
	if (!message->size)
		bpf_msg_push_data(message, 0, 1, 0);
	return SK_PASS;
}

/* Why: what puts connections under sk_msg programs. */
SEC("sockops")
int check_sockops(struct bpf_sock_ops *context)
{
	return 1;
}
