/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The cheap backend: the socket layer's own tracepoints. It costs nothing on calls that are not TCP's, needs no look-up
 * from descriptor to socket, and keeps all system calls on the kernel's fast path. Needs tcp_sendmsg_locked (6.16, commit
 * 0f08335ade71), sock_recv_length and sock_send_length (6.3, commit 6e6eda44b939) and bpf_task_pt_regs (5.15, commit
 * dd6e10fbd9fb).
 */
#ifndef SPANLOOM_SOCKETS_BPF_H
#define SPANLOOM_SOCKETS_BPF_H

#include "calls.bpf.h"

/* Bytes that are read into several messages at once are found in the first message only, and nothing tells which one
 * has just been read. Where something may begin it is the first one: had it been read before, by this call, the
 * connection would not be waiting any more. Everything else is counted, and is a gap. A request that begins in a later
 * message is not seen.
 */
static __always_inline bool may_begin(const struct connection *connection)
{
	if (!connection)
		return true;
	if (connection->mode != MODE_EXCHANGE)
		return false;
	return connection->state == STATE_IDLE ||
	       connection->state == (connection->exchange.role == ROLE_SERVER ? STATE_RESPONSE : STATE_REQUEST);
}

/* The bytes that a call moves lie in user memory: where. */
static __always_inline bool bytes_of_call(syscall_regs *regs, struct transfer *transfer,
					  const struct connection *connection)
{
	switch (SYSCALL_NR(regs)) {
	case NR_write:
	case NR_sendto:
	case NR_read:
	case NR_recvfrom:
		transfer->buffer = SYSCALL_ARG2(regs);
		return true;
	case NR_writev:
	case NR_readv:
		from_iov(transfer, SYSCALL_ARG2(regs), SYSCALL_ARG3(regs));
		return true;
	case NR_recvmmsg:
		if (SYSCALL_ARG3(regs) != 1 && !may_begin(connection))
			return false;
		/* fall through */
	case NR_sendmsg:
	case NR_recvmsg:
		return from_msghdr(transfer, SYSCALL_ARG2(regs));
	}
	return false;
}

static __always_inline bool is_internet_tcp(struct sock *sock)
{
	return sock->sk_protocol == IPPROTO_TCP &&
	       (sock->__sk_common.skc_family == AF_INET || sock->__sk_common.skc_family == AF_INET6);
}

#define NOT_OFFERED (~0ULL)

/* Why tcp_sendmsg_locked: outgoing bytes are complete in user memory here, and nothing of them has been sent. It is hit
 * again for every packet that a long write fills: continues().
 */
SEC("tp_btf/tcp_sendmsg_locked")
int BPF_PROG(on_send, struct sock *sock, struct msghdr *message)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid();
	struct connection *connection;
	struct transfer transfer = {};
	struct process *process;
	bool is_hello = false;
	struct send *send;
	__u64 streams;
	__u32 zero = 0;
	__u8 kind;

	send = bpf_map_lookup_elem(&sends, &zero);
	if (!send || !capturing)
		return 0;
	send->sock = (__u64)sock;
	send->tid = pid_tgid;
	send->offered = NOT_OFFERED;
	send->may_stream = 0;
	kind = message->msg_iter.iter_type;
	if (kind != bpf_core_enum_value(enum iter_type, ITER_UBUF) &&
	    kind != bpf_core_enum_value(enum iter_type, ITER_IOVEC))
		return 0; /* what sendfile, splice and kTLS pass on */
	transfer.length = message->msg_iter.count;
	connection = connection_of(sock);
	if (connection && connection->tls) {
		send->offered = transfer.length;
		if (on_tls_bytes(connection, true, pid_tgid))
			connection = 0;
		else if (awaits_hello(connection))
			is_hello = true; /* perhaps */
		else
			return 0; /* what they are need not be looked at */
	}
	if (!connection) {
		if (!is_captured(pid_tgid, &process)) {
			send->offered = transfer.length;
			return 0;
		}
		if (!is_write_call())
			return 0; /* the reads of io_uring are not seen: half an exchange would be a lie */
	}
	send->offered = transfer.length;
	if (connection && connection->mode == MODE_IGNORED && !connection->passed_over)
		return 0;
	if (kind == bpf_core_enum_value(enum iter_type, ITER_UBUF)) {
		transfer.buffer = (__u64)BPF_CORE_READ(message, msg_iter.ubuf) + message->msg_iter.iov_offset;
	} else {
		transfer.iov = (__u64)BPF_CORE_READ(message, msg_iter.ubuf);
		transfer.iov_count = message->msg_iter.nr_segs;
	}
	simplify(&transfer);
	if (is_hello) {
		look_for_hello(connection, &transfer);
		return 0;
	}
	transfer.sequence = as_tcp(sock)->write_seq;
	streams = streams_entered;
	send->may_stream = connection && connection->mode == MODE_STREAM;
	on_transfer(connection, 0, 0, sock, &transfer, true, true, pid_tgid);
	if (streams_entered != streams || (connection && unfollowed(connection->mode) == MODE_STREAM))
		send->may_stream = 1; /* perhaps this one: the other direction's thread may have changed it meanwhile */
	return 0;
}

/* Why sock_send_length: whether all that was offered was taken, and the bytes that were not offered in on_send(). */
SEC("tp_btf/sock_send_length")
int BPF_PROG(on_sent, struct sock *sock, int moved)
{
	__u64 key = (__u64)sock, pid_tgid = bpf_get_current_pid_tgid();
	struct connection *connection;
	struct transfer transfer = {};
	bool offered = false;
	syscall_regs *regs;
	struct send *send;
	__u32 zero = 0;

	send = bpf_map_lookup_elem(&sends, &zero);
	if (!send)
		return 0;
	if (send->sock == key && send->tid == (__u32)pid_tgid) {
		offered = send->offered != NOT_OFFERED;
		send->sock = 0;
		if (moved == send->offered && moved <= MAY_BLOCK_BYTES && !send->may_stream)
			return 0;
	}
	if (!moved || !capturing || !is_internet_tcp(sock))
		return 0;
	connection = bpf_map_lookup_elem(&connections, &key);
	if (connection && connection->tls)
		return 0;
	if (connection && connection->mode == MODE_EXCHANGE) {
		if (connection->write_tid == (__u32)pid_tgid &&
		    as_tcp(sock)->write_seq == connection->write_seq + (moved > 0 ? moved : 0))
			settle_write(connection, moved, pid_tgid);
		else if (!offered && moved > 0)
			on_bodiless_bytes(connection, moved, true);
		return 0;
	}
	if (moved < 0) {
		if (connection && connection->mode == MODE_STREAM)
			connection->walks[0].entered_ns = 0;
		return 0;
	}
	regs = call_of(bpf_get_current_task_btf());
	if (!regs)
		return 0;
	if (!connection) {
		/* TCP fast open: the first bytes left with the connection's first packet. */
		if (!offered && SYSCALL_NR(regs) != NR_sendfile && SYSCALL_NR(regs) != NR_splice)
			count(COUNTER_IGNORED_OTHER);
	} else if (connection->mode == MODE_STREAM) {
		transfer.length = moved;
		if (bytes_of_call(regs, &transfer, connection)) {
			simplify(&transfer);
			stream_write(connection, &transfer, moved, pid_tgid);
		} else {
			on_bodiless_bytes(connection, moved, true);
		}
	}
	return 0;
}

/* Why sock_recv_length: incoming bytes are in user memory now, and the thread's registers hold what the call was given. */
SEC("tp_btf/sock_recv_length")
int BPF_PROG(on_received, struct sock *sock, int moved, int flags)
{
	struct connection *connection;
	struct transfer transfer = {};
	struct process *process;
	bool is_hello = false;
	syscall_regs *regs;
	__u64 pid_tgid;

	if (moved <= 0 || !capturing || (flags & (MSG_PEEK | MSG_OOB | MSG_ERRQUEUE)) || !is_internet_tcp(sock))
		return 0;
	pid_tgid = bpf_get_current_pid_tgid();
	connection = connection_of(sock);
	if (connection && connection->tls) {
		if (on_tls_bytes(connection, false, pid_tgid))
			connection = 0;
		else if (awaits_hello(connection))
			is_hello = true; /* perhaps */
		else
			return 0;
	}
	if (!connection && !is_captured(pid_tgid, &process))
		return 0;
	regs = call_of(bpf_get_current_task_btf());
	if (!regs)
		return 0;
	transfer.length = moved;
	if (!(flags & MSG_TRUNC) && bytes_of_call(regs, &transfer, connection)) {
		simplify(&transfer);
		if (is_hello)
			look_for_hello(connection, &transfer);
		else
			on_transfer(connection, 0, 0, sock, &transfer, false, false, pid_tgid);
	} else if (connection && !is_hello) {
		connection->received_seq += moved;
		on_bodiless_bytes(connection, moved, false);
	}
	return 0;
}

/* Why tcp_rcv_space_adjust: splice(2) reads from a socket without any other sign. It comes with every read. */
SEC("tp_btf/tcp_rcv_space_adjust")
int BPF_PROG(on_read, struct sock *sock)
{
	struct connection *connection;
	syscall_regs *regs;
	__u64 key = (__u64)sock;
	__u32 moved;

	regs = call_of(bpf_get_current_task_btf());
	if (!regs || SYSCALL_NR(regs) != NR_splice)
		return 0;
	connection = bpf_map_lookup_elem(&connections, &key);
	if (!connection)
		return 0;
	moved = as_tcp(sock)->copied_seq - connection->received_seq;
	if (moved && moved < 1U << 31) {
		connection->received_seq += moved;
		on_bodiless_bytes(connection, moved, false);
	}
	return 0;
}

#endif
