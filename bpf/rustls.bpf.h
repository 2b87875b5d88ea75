/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* rustls: what a Rust program gives to a connection and gets from it joins the exchange of the socket that carries it.
 *
 * rustls moves no bytes itself: the program reads and writes the socket, and objects may move in memory. So nothing is
 * inferred from who is called when. What was decrypted lies where the thread has just received it, in the same memory:
 * that is which socket it came from. What is written on a connection that was proven in this way belongs to that socket;
 * a client's first write is told of when it is sent, next and as a record of just its length.
 */
#ifndef SPANLOOM_RUSTLS_BPF_H
#define SPANLOOM_RUSTLS_BPF_H

#include "tls.bpf.h"

struct rust_thread {
	__u64 received_sock; /* socket of the TLS bytes that the thread received last */
	__u64 received_at;   /* where they begin in its memory, and where they end */
	__u64 received_end;
	/* The write that was entered last. */
	__u64 object;
	__u64 sock;    /* connection that took it at its entry, 0 when none did */
	__u64 address; /* of its bytes, or of iov_count pieces */
	__u64 iov_count;
	__u64 length;
	/* A write that no connection took, and that is to be sent next: how much of it rustls took, 0 when there is none, and
	 * the first piece of it.
	 */
	__u64 unsent;
	__u64 first;
	__u64 first_length;
};

/* Key: a thread, as tgid << 32 | tid. Inserted by its first TLS bytes or its first write while a program with rustls is
 * watched; the oldest go.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64);
	__type(value, struct rust_thread);
} rust_threads SEC(".maps");

static const struct rust_thread zero_rust_thread;

static __always_inline struct rust_thread *rust_thread_of(__u64 pid_tgid)
{
	struct rust_thread *thread = bpf_map_lookup_elem(&rust_threads, &pid_tgid);

	if (thread)
		return thread;
	if (bpf_map_update_elem(&rust_threads, &pid_tgid, &zero_rust_thread, BPF_ANY)) {
		count(COUNTER_TLS_FULL);
		return 0;
	}
	return bpf_map_lookup_elem(&rust_threads, &pid_tgid);
}

#define RECORD_CONTENT_MAX 16384
#define RECORD_TAIL_MAX 24 /* behind the content: its type and the tag (RFC 8446 section 5.2), or the tag */

/* Whether the bytes begin with a record of application data that carries `length` bytes, or the first of them. What else
 * is in it: the type of the content and a tag of 16 bytes in TLS 1.3 (RFC 8446 section 5.2), in TLS 1.2 8 bytes of a nonce
 * and the tag (RFC 5288 section 3) or the tag (RFC 7905 section 2).
 */
static __always_inline bool is_record_of(__u64 address, __u64 length)
{
	__u8 head[TLS_RECORD_HEAD_BYTES];
	__u64 more;

	if (bpf_probe_read_user(head, sizeof(head), (void *)address) || head[0] != 23 || head[1] != 3)
		return false;
	more = ((__u64)head[3] << 8 | head[4]) - (length < RECORD_CONTENT_MAX ? length : RECORD_CONTENT_MAX);
	return more == 17 || more == 24 || more == 16;
}

/* A client's write that no connection has taken, its first one or the first since it was moved in memory, is about to be
 * sent on this one. Of its own, for the sake of the stack, and without what other writes may be: the programs for sockets
 * walk it. Returns 0 when it cannot be told of.
 */
__noinline int take_unsent(__u64 sock, __u64 unsent)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid();
	struct rust_thread *thread = bpf_map_lookup_elem(&rust_threads, &pid_tgid);
	struct connection *connection;
	struct transfer transfer = {};

	if (!thread || !tie(thread->object, sock, true))
		return 0;
	connection = bpf_map_lookup_elem(&connections, &sock);
	if (!connection || connection->mode == MODE_STREAM || connection->exchange.role == ROLE_SERVER)
		return 0;
	transfer.buffer = thread->first;
	transfer.length = thread->first_length < unsent ? thread->first_length : unsent;
	if (connection->mode == MODE_IGNORED ||
	    (!connection->exchange.role && !find_role(connection, &transfer, true)))
		return 1;
	on_request_bytes(connection, 0, true, &transfer, sock, bpf_ktime_get_ns(), pid_tgid, false);
	connection->exchange.request_bytes += unsent - transfer.length; /* where these are need not be so any more */
	return 1;
}

/* exchange.bpf.h: TLS bytes were received, and lie there. */
__noinline int on_rust_input(__u64 sock, __u64 address, __u64 length)
{
	struct rust_thread *thread = rust_thread_of(bpf_get_current_pid_tgid());

	if (!thread)
		return 0;
	thread->received_sock = sock;
	thread->received_at = address;
	thread->received_end = address + length;
	return 0;
}

/* exchange.bpf.h: TLS bytes that begin there are about to be sent. */
__noinline int on_rust_output(__u64 sock, __u64 address)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid(), unsent;
	struct rust_thread *thread = bpf_map_lookup_elem(&rust_threads, &pid_tgid);

	if (!thread || !thread->unsent)
		return 0;
	unsent = thread->unsent;
	thread->unsent = 0;
	if (!is_record_of(address, unsent) || !take_unsent(sock, unsent))
		count(COUNTER_TLS_UNTIED);
	return 0;
}

/* The connection that the object was tied to is not the one that its bytes came from: its memory was another one's. Of its
 * own, for the sake of the stack.
 */
__noinline int disown(__u64 sock)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);

	if (!connection)
		return 0;
	if (connection->exchange.role == ROLE_CLIENT && !connection->lingers)
		return withdraw(sock); /* perhaps it was taken to have sent what the new one has */
	untie(connection);
	return 0;
}

/* Plaintext was decrypted: it lies in the memory that the thread received it in, for the last time before it is copied.
 * Global for the reason given at absorb_iovecs().
 */
__noinline int on_rust_plaintext(__u64 object, __u64 buffer, __u64 length)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid(), end = buffer + length, sock, tied;
	struct rust_thread *thread = bpf_map_lookup_elem(&rust_threads, &pid_tgid);
	bool is_memory;

	if (!thread || !thread->received_sock || end >= thread->received_end ||
	    end + RECORD_TAIL_MAX <= thread->received_at) {
		count(COUNTER_TLS_UNTIED);
		return 0;
	}
	sock = thread->received_sock;
	tied = tied_sock(object, pid_tgid >> 32, &is_memory);
	if (tied != sock) {
		if (tied)
			disown(tied);
		if (!tie(object, sock, true))
			return 0;
	}
	on_plaintext(sock, buffer, 0, length, 0);
	return 0;
}

/* Whether the program has not closed the socket: an object of it may have ended, and another one be in its place. */
static __always_inline bool is_in_use(__u64 sock)
{
	__u8 state = BPF_CORE_READ((struct sock *)sock, __sk_common.skc_state);
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);

	return (state == TCP_ESTABLISHED || state == TCP_CLOSE_WAIT) && connection && !connection->lingers;
}

/* A write is entered. Global for the reason given at absorb_iovecs(). */
__noinline int on_rust_enter(__u64 object, __u64 address, __u64 iov_count, __u64 length)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid(), sock;
	struct rust_thread *thread = rust_thread_of(pid_tgid);
	struct user_iovec iovec = { .base = address, .length = length };
	bool is_memory;

	if (!thread)
		return 0;
	if (thread->unsent)
		count(COUNTER_TLS_UNTIED);
	sock = tied_sock(object, pid_tgid >> 32, &is_memory);
	if (sock && !is_in_use(sock))
		sock = 0;
	if (!sock && iov_count && !read_iovec(&iovec, address, 0))
		iovec.length = 0;
	thread->object = object;
	thread->sock = sock;
	thread->address = address;
	thread->iov_count = iov_count;
	thread->length = length;
	thread->unsent = 0;
	thread->first = iovec.base;
	thread->first_length = iovec.length;
	if (sock)
		on_plaintext(sock, address, iov_count, length, TLS_EGRESS | TLS_ENTERING);
	return 0;
}

/* The write returns: so many bytes were taken. Global for the reason given at absorb_iovecs(). */
__noinline int on_rust_leave(__u64 moved)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid();
	struct rust_thread *thread = bpf_map_lookup_elem(&rust_threads, &pid_tgid);
	struct transfer transfer = {};

	if (!thread || !thread->object)
		return 0;
	if (moved > thread->length)
		moved = 0;
	if (!thread->sock) {
		thread->unsent = moved;
		return 0;
	}
	if (thread->iov_count)
		from_iov(&transfer, thread->address, thread->iov_count);
	else
		transfer.buffer = thread->address;
	transfer.length = thread->length;
	thread->object = 0;
	leave_write(thread->sock, &transfer, moved ? (long)moved : -1, pid_tgid);
	return 0;
}

/* Layouts that the compiler chose, and has kept for the versions that user space takes these functions from: a Payload,
 * which has its tag or its capacity in the first word, and an OutboundChunks: one piece behind a zero, or many, and from
 * which byte to which.
 */
struct rust_payload {
	__u64 tag;
	__u64 buffer;
	__u64 length;
};

struct rust_chunks {
	__u64 pieces;
	__u64 count;
	__u64 start;
	__u64 end;
};

/* Why CommonState::take_received_plaintext: all that is decrypted comes through here, once, before it is copied. */
SEC("uprobe")
int on_rust_received(syscall_regs *regs)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid();
	struct rust_payload payload;
	struct process *process;

	if (!capturing || !is_captured(pid_tgid, &process))
		return 0;
	if (bpf_probe_read_user(&payload, sizeof(payload), (void *)CALL_ARG2(regs)))
		count(COUNTER_READ_FAULT);
	else if (payload.length)
		on_rust_plaintext(CALL_ARG1(regs), payload.buffer, payload.length);
	return 0;
}

/* Why CommonState::buffer_plaintext: all that a Writer is given comes through here, before it is encrypted. */
SEC("uprobe")
int on_rust_write(syscall_regs *regs)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid();
	struct process *process;
	struct rust_chunks chunks;

	if (!capturing || !is_captured(pid_tgid, &process))
		return 0;
	if (bpf_probe_read_user(&chunks, sizeof(chunks), (void *)CALL_ARG2(regs))) {
		count(COUNTER_READ_FAULT);
		return 0;
	}
	if (!chunks.pieces)
		on_rust_enter(CALL_ARG1(regs), chunks.count, 0, chunks.start);
	else if (chunks.start)
		on_rust_enter(CALL_ARG1(regs), 0, 0, chunks.end - chunks.start); /* the rest of a write: where is not looked up */
	else
		on_rust_enter(CALL_ARG1(regs), chunks.pieces, chunks.count, chunks.end);
	return 0;
}

SEC("uretprobe")
int on_rust_return(syscall_regs *regs)
{
	return on_rust_leave(CALL_RESULT(regs));
}

#endif
