/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The socket layer where its tracepoints are missing: the functions of TCP themselves, by fentry and fexit. They exist
 * under these names since 4.14 at the latest, their arguments are stable but for tcp_recvmsg's (see received()), and they
 * are called from other files or, tcp_sendmsg_locked, too long to be inlined. Costs: see docs/adr/0017.
 *
 * The bytes are found by the iterator of the call and not by the thread's registers: what it has moved lies right behind
 * where it stands when the function returns. The copies of the iovecs are the kernel's own, and in place until then.
 *
 * No setting leads here: a kernel has hung with these programs. And unlike tracepoints before 7.0 they can be preempted,
 * where the kernel as a whole can. See docs/adr/0017.
 */
#ifndef SPANLOOM_FUNCTIONS_BPF_H
#define SPANLOOM_FUNCTIONS_BPF_H

#include "calls.bpf.h"

static __always_inline bool is_user_memory(const struct iov_iter *iter)
{
	return IS_ITER(iter, ITER_UBUF) || IS_ITER(iter, ITER_IOVEC);
}

/* Why tcp_sendmsg_locked: outgoing bytes are complete in user memory here, nothing of them has been sent, and the socket
 * is this thread's. Once per call.
 */
SEC("fentry/tcp_sendmsg_locked")
int BPF_PROG(on_send_enter, struct sock *sock, struct msghdr *message, __u64 size)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid();
	const struct iov_iter *iter = &message->msg_iter;
	struct connection *connection;
	struct transfer transfer = {};
	struct process *process;

	/* Closed: the call fails, or is TCP fast open's, which only now says where to: on_send_exit(). */
	if (!capturing || !size || sock->__sk_common.skc_state == TCP_CLOSE || !is_user_memory(iter))
		return 0;
	connection = connection_of(sock);
	if (!connection && (!is_captured(pid_tgid, &process) || !is_write_call()))
		return 0; /* the reads of io_uring are not seen: half an exchange would be a lie */
	if (connection && connection->mode == MODE_IGNORED && !connection->passed_over)
		return 0;
	transfer.length = size;
	if (IS_ITER(iter, ITER_IOVEC)) {
		transfer.iov = iterated(iter);
		transfer.iov_count = iter->nr_segs;
	} else {
		transfer.buffer = iterated(iter) + iter->iov_offset;
	}
	simplify(&transfer);
	transfer.sequence = BPF_CORE_READ((struct tcp_sock *)sock, write_seq);
	on_transfer(connection, 0, 0, sock, &transfer, true, true, pid_tgid);
	return 0;
}

/* How many iovecs lie between `end` and where the `moved` bytes before it begin, 0 when that is not the begin of an iovec.
 * Global for the reason given at absorb_iovecs().
 */
__noinline int count_back(__u64 end, __u64 moved)
{
	for (__u32 i = 1; i <= IOVECS_MAX; i++) {
		struct user_iovec iovec;

		end -= sizeof(iovec);
		if (!read_iovec(&iovec, end, 0)) {
			count(COUNTER_READ_FAULT);
			return 0;
		}
		if (iovec.length >= moved)
			return iovec.length == moved ? i : 0;
		moved -= iovec.length;
	}
	return 0;
}

/* Where the bytes lie that an iterator has moved last, if in user memory. */
static __always_inline bool bytes_moved(const struct iov_iter *iter, __u64 moved, struct transfer *transfer)
{
	__u64 offset = iter->iov_offset;
	struct user_iovec iovec;
	int before;

	transfer->length = moved;
	if (IS_ITER(iter, ITER_UBUF)) {
		transfer->buffer = iterated(iter) + offset - moved;
		return true;
	}
	if (!IS_ITER(iter, ITER_IOVEC))
		return false;
	transfer->iov = iterated(iter);
	if (offset < moved) {
		before = count_back(transfer->iov, moved - offset);
		if (before <= 0)
			return false;
		transfer->iov -= before * sizeof(iovec);
		transfer->iov_count = before + (offset ? 1 : 0);
		simplify(transfer);
		return true;
	}
	if (!read_iovec(&iovec, transfer->iov, 0)) {
		count(COUNTER_READ_FAULT);
		return false;
	}
	transfer->iov = 0;
	transfer->buffer = iovec.base + offset - moved;
	return true;
}

/* Why the end of tcp_sendmsg_locked: whether all that was offered was taken, and the pages that sendfile and splice pass
 * through here since 6.5 (commit c5c37af6ecad); on_page_sent() is for what was before. The socket is still this
 * thread's.
 */
SEC("fexit/tcp_sendmsg_locked")
int BPF_PROG(on_send_exit, struct sock *sock, struct msghdr *message, __u64 size, int moved)
{
	__u64 key = (__u64)sock, pid_tgid = bpf_get_current_pid_tgid();
	const struct iov_iter *iter = &message->msg_iter;
	bool offered = is_user_memory(iter);
	struct connection *connection;
	struct transfer transfer = {};

	if (!moved || !capturing || (!offered && !IS_ITER(iter, ITER_BVEC)))
		return 0;
	if (offered && moved == size && moved <= MAY_BLOCK_BYTES && !stream_connections &&
	    !(message->msg_flags & MSG_FASTOPEN))
		return 0;
	connection = bpf_map_lookup_elem(&connections, &key);
	if (!connection) {
		/* TCP fast open: the first bytes left with the connection's first packet. */
		if (moved > 0 && (message->msg_flags & MSG_FASTOPEN))
			count(COUNTER_IGNORED_OTHER);
		return 0;
	}
	if (connection->tls)
		return 0;
	if (offered && connection->mode == MODE_EXCHANGE) {
		if (connection->write_tid == (__u32)pid_tgid &&
		    BPF_CORE_READ((struct tcp_sock *)sock, write_seq) == connection->write_seq + (moved > 0 ? moved : 0))
			settle_write(connection, moved, pid_tgid);
	} else if (moved < 0) {
		if (connection->mode == MODE_STREAM)
			connection->walks[0].entered_ns = 0;
	} else {
		if (connection->mode == MODE_STREAM && bytes_moved(iter, moved, &transfer))
			stream_write(connection, &transfer, moved, pid_tgid);
		else
			on_bodiless_bytes(connection, moved, true);
	}
	return 0;
}

/* Why the end of tcp_sendpage: how sendfile and splice send a page before 6.5 (commit c5c37af6ecad); not loaded later. */
SEC("fexit/tcp_sendpage")
int BPF_PROG(on_page_sent, struct sock *sock, struct page *page, int offset, __u64 size, int flags, int moved)
{
	struct connection *connection;

	if (moved <= 0 || !capturing)
		return 0;
	connection = connection_of(sock);
	if (connection)
		on_bodiless_bytes(connection, moved, true);
	return 0;
}

/* Why the end of tcp_recvmsg: incoming bytes are in user memory now. */
SEC("fexit/tcp_recvmsg")
int on_receive_exit(unsigned long long *context)
{
	struct sock *sock = (struct sock *)context[0];
	struct msghdr *message = (struct msghdr *)context[1];
	struct connection *connection;
	struct transfer transfer = {};
	struct process *process;
	int flags, moved = received(context, &flags);
	__u64 pid_tgid;

	if (moved <= 0 || !capturing || (flags & (MSG_PEEK | MSG_OOB | MSG_ERRQUEUE)))
		return 0;
	pid_tgid = bpf_get_current_pid_tgid();
	connection = connection_of(sock);
	if (!connection && (!is_captured(pid_tgid, &process) || !is_read_call()))
		return 0; /* as above */
	if (!(flags & MSG_TRUNC) && bytes_moved(&message->msg_iter, moved, &transfer))
		on_transfer(connection, 0, 0, sock, &transfer, false, false, pid_tgid);
	else if (connection)
		on_bodiless_bytes(connection, moved, false);
	return 0;
}

/* Why the end of tcp_splice_read: splice(2) out of a socket leaves no other sign. */
SEC("fexit/tcp_splice_read")
int BPF_PROG(on_splice_exit, struct socket *socket, __s64 *position, struct pipe_inode_info *pipe, __u64 size,
	     __u32 flags, long moved)
{
	struct connection *connection;

	if (moved <= 0 || !capturing)
		return 0;
	connection = connection_of(socket->sk);
	if (connection)
		on_bodiless_bytes(connection, moved, false);
	return 0;
}

#endif
