/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What both backends share: from the arguments of a system call to a transfer of the state machine. */
#ifndef SPANLOOM_TRANSFER_BPF_H
#define SPANLOOM_TRANSFER_BPF_H

#include "exchange.bpf.h"

static __always_inline struct connection *connection_of(struct sock *sock)
{
	__u64 key = (__u64)sock;

	return bpf_map_lookup_elem(&connections, &key);
}

static __always_inline bool from_msghdr(struct transfer *transfer, __u64 message)
{
	struct user_msghdr header;

	if (bpf_probe_read_user(&header, sizeof(header), (void *)message)) {
		count(COUNTER_READ_FAULT);
		return false;
	}
	transfer->iov = header.iov;
	transfer->iov_count = header.iov_count;
	return true;
}

static __always_inline void from_iov(struct transfer *transfer, __u64 iov, __u64 iov_count)
{
	transfer->iov = iov;
	transfer->iov_count = iov_count;
}

/* A vector of one is a plain buffer, which is the shorter path. */
static __always_inline void simplify(struct transfer *transfer)
{
	struct user_iovec iovec;

	if (!transfer->iov || transfer->iov_count != 1)
		return;
	if (!read_iovec(&iovec, transfer->iov, 0))
		return;
	transfer->iov = 0;
	transfer->buffer = iovec.base;
	if (iovec.length < transfer->length)
		transfer->length = iovec.length;
}

/* Bytes that are not looked at, since they never were in user memory or are not to be found there. They belong to a body
 * that has begun.
 */
static __always_inline void pass_by(struct connection *connection, __u64 moved, bool egress)
{
	struct record_exchange *exchange = &connection->exchange;
	__u64 now = bpf_ktime_get_ns();

	if (connection->mode == MODE_IGNORED)
		return;
	if (connection->mode == MODE_STREAM) {
		bool response = egress == (exchange->role == ROLE_SERVER);

		if (connection->http2)
			walk_transfer(connection->sock, 0, 0, moved, response);
		else
			stream_segment(connection->sock, 0, 0, moved, response);
	} else if (egress == (exchange->role == ROLE_SERVER)) {
		if (connection->state == STATE_RESPONSE) {
			exchange->response_bytes += moved;
			exchange->response_end_ns = now;
			connection->tail_valid = 0;
		}
	} else if (connection->state != STATE_IDLE) {
		exchange->request_bytes += moved;
		exchange->request_end_ns = now;
	}
}

/* Those of sendfile and splice. */
static __always_inline void on_bodiless_bytes(struct connection *connection, __u64 moved, bool egress)
{
	if (!connection->tls)
		pass_by(connection, moved, egress);
}

/* Longer writes may block half-way, and then their end is the end of the exchange. */
#define MAY_BLOCK_BYTES 16384

/* A thread that waits for events while an exchange it read is unanswered interleaves work: what it sends later cannot
 * be tied to what it read last. poll(2) on one or two descriptors is how clients wait for their own socket.
 */
static __always_inline void on_event_wait(__u64 pid_tgid)
{
	__u32 tid = pid_tgid;
	struct thread *thread = bpf_map_lookup_elem(&threads, &tid);

	if (thread && !thread->multiplexes && is_unanswered(thread))
		thread->multiplexes = 1;
	if (tls_attached)
		on_tls_wait(tid);
}

#endif
