/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* rustls: what a Rust program gives to a connection and gets from it joins the exchange of the socket that carries it.
 *
 * rustls moves no bytes itself: the program reads and writes the socket, and objects may move in memory. So nothing is
 * inferred from who is called when. What was decrypted lies where the thread has just received it, in the same memory:
 * that is which socket it came from. What is written on a connection that was proven in this way belongs to that socket.
 * A client's first write, and the first since an object was moved, is told of when it is sent, next and as a record of
 * just its length.
 */
#ifndef SPANLOOM_RUSTLS_BPF_H
#define SPANLOOM_RUSTLS_BPF_H

#include "calls.bpf.h"
#include "tls.bpf.h"

struct rust_thread {
	__u64 received_sock; /* socket of the TLS bytes that the thread received last */
	__u64 received_at;   /* where they begin in its memory, and where they end */
	__u64 received_end;
	/* What was decrypted of them last, and for which object: the next record is moved to the same place, the front. */
	__u64 decrypted_at;
	__u64 decrypted_for;
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

/* A write that no connection has taken, a client's first one or the first since the object was moved in memory, is about to
 * be sent on this one. Of its own, for the sake of the stack.
 */
__noinline int take_unsent(__u64 sock, __u64 unsent)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid();
	struct rust_thread *thread = bpf_map_lookup_elem(&rust_threads, &pid_tgid);
	struct connection *connection;
	__u64 first;

	if (!thread || !tie(thread->object, sock, true))
		return 0;
	first = thread->first_length < unsent ? thread->first_length : unsent;
	on_plaintext(sock, thread->first, first, TLS_EGRESS);
	connection = bpf_map_lookup_elem(&connections, &sock);
	if (connection && first < unsent) /* where these are need not be so any more */
		pass_by(connection, unsent - first, true);
	return 1;
}

/* Whether received bytes are TLS': of a connection that is known to carry it, the begin of a record, or the rest of one
 * whose begin the thread has received last.
 */
static __always_inline bool are_records(__u64 sock, __u64 address, __u64 length, const struct rust_thread *thread)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);
	struct first_bytes first = { .length = 3 };

	if (connection)
		return connection->tls;
	if (thread && thread->received_sock == sock)
		return true;
	return length >= 3 && !bpf_probe_read_user(&first.word, 3, (void *)address) && is_tls(&first);
}

/* Bytes were received, and lie there. Global for the reason given at absorb_iovecs(). */
__noinline int on_rust_input(__u64 sock, __u64 address, __u64 length)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid();
	struct rust_thread *thread = bpf_map_lookup_elem(&rust_threads, &pid_tgid);

	if (!are_records(sock, address, length, thread))
		return 0;
	if (!thread)
		thread = rust_thread_of(pid_tgid);
	if (!thread)
		return 0;
	thread->received_sock = sock;
	thread->received_at = address;
	thread->received_end = address + length;
	thread->decrypted_at = 0;
	return 0;
}

/* Whether the thread is about to send what no connection has taken. */
static __always_inline bool has_unsent(__u64 pid_tgid)
{
	struct rust_thread *thread = bpf_map_lookup_elem(&rust_threads, &pid_tgid);

	return thread && thread->unsent;
}

/* Bytes that begin there are about to be sent. Global for the reason given at absorb_iovecs(). */
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

	if (!thread || !thread->received_sock)
		goto unknown;
	if ((end >= thread->received_end || end + RECORD_TAIL_MAX <= thread->received_at) &&
	    (buffer != thread->decrypted_at || object != thread->decrypted_for))
		goto unknown;
	thread->decrypted_at = buffer;
	thread->decrypted_for = object;
	sock = thread->received_sock;
	tied = tied_sock(object, pid_tgid >> 32, &is_memory);
	if (tied != sock) {
		if (tied)
			disown(tied);
		if (!tie(object, sock, true))
			return 0;
	}
	on_plaintext(sock, buffer, length, 0);
	return 0;
unknown:
	count(COUNTER_TLS_UNTIED);
	return 0;
}

/* Whether the program has not closed the socket: an object of it may have ended, and another one be in its place. */
static __always_inline bool is_in_use(__u64 sock)
{
	__u8 state = BPF_CORE_READ((struct sock *)sock, __sk_common.skc_state);
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);

	return (state == TCP_ESTABLISHED || state == TCP_CLOSE_WAIT) && connection && !connection->lingers;
}

/* A write of one piece, or of iov_count, is entered on a connection. Global for the reason given at absorb_iovecs(). */
__noinline int on_pieces(__u64 sock, __u64 address, __u64 iov_count, __u64 length)
{
	struct transfer transfer = { .length = length };

	if (iov_count)
		from_iov(&transfer, address, iov_count);
	else
		transfer.buffer = address;
	return pass_plaintext(sock, &transfer, TLS_EGRESS | TLS_ENTERING);
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
		on_pieces(sock, address, iov_count, length);
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

/* What follows is attached only while a program with rustls is watched: with the backend for sockets the first two, else
 * the others.
 */

/* Why tcp_sendmsg_locked: see on_send(). */
SEC("tp_btf/tcp_sendmsg_locked")
int BPF_PROG(on_rust_send, struct sock *sock, struct msghdr *message)
{
	__u8 kind = message->msg_iter.iter_type;
	__u64 key = (__u64)sock, number = 0;
	struct user_iovec iovec = {};

	if (!capturing || !has_unsent(bpf_get_current_pid_tgid()))
		return 0;
	iovec.base = (__u64)BPF_CORE_READ(message, msg_iter.ubuf);
	if (kind == bpf_core_enum_value(enum iter_type, ITER_IOVEC)) {
		if (!read_iovec(&iovec, iovec.base, 0))
			return 0;
	} else if (kind != bpf_core_enum_value(enum iter_type, ITER_UBUF)) {
		return 0;
	}
	/* A global function takes numbers only: read back, the trusted pointer is one. */
	if (!bpf_probe_read_kernel(&number, sizeof(number), &key))
		on_rust_output(number, iovec.base + message->msg_iter.iov_offset);
	return 0;
}

/* Where the bytes are that a call of the thread has received, when they are in one piece. */
static __always_inline bool received_piece(syscall_regs *regs, struct transfer *transfer)
{
	__u32 flags = 0;

	switch (SYSCALL_NR(regs)) {
	case NR_recvfrom:
		flags = SYSCALL_ARG4(regs);
		/* fall through */
	case NR_read:
		transfer->buffer = SYSCALL_ARG2(regs);
		break;
	case NR_readv:
		from_iov(transfer, SYSCALL_ARG2(regs), SYSCALL_ARG3(regs));
		break;
	case NR_recvmsg:
		flags = SYSCALL_ARG3(regs);
		if (!from_msghdr(transfer, SYSCALL_ARG2(regs)))
			return false;
		break;
	default:
		return false;
	}
	simplify(transfer);
	return !transfer->iov && !(flags & (MSG_PEEK | MSG_OOB | MSG_ERRQUEUE));
}

/* Why sock_recv_length: see on_received(). */
SEC("tp_btf/sock_recv_length")
int BPF_PROG(on_rust_recv, struct sock *sock, int moved)
{
	__u64 key = (__u64)sock, number = 0;
	struct transfer transfer = {};
	struct process *process;
	syscall_regs *regs;

	if (moved <= 0 || !capturing || !is_internet_tcp(sock) || !is_captured(bpf_get_current_pid_tgid(), &process))
		return 0;
	regs = call_of(bpf_get_current_task_btf());
	if (!regs)
		return 0;
	transfer.length = moved;
	if (received_piece(regs, &transfer) && !bpf_probe_read_kernel(&number, sizeof(number), &key))
		on_rust_input(number, transfer.buffer, transfer.length);
	return 0;
}

/* Where the first piece lies of a message, or of what its iovecs point to; 0 when that cannot be read. Of its own, for the
 * sake of the stack.
 */
__noinline __u64 first_piece(__u64 address, __u64 is_message)
{
	struct transfer transfer = { .iov = address };
	struct user_iovec iovec;

	if (is_message && !from_msghdr(&transfer, address))
		return 0;
	return read_iovec(&iovec, transfer.iov, 0) ? iovec.base : 0;
}

/* Why sys_enter and sys_exit: see on_sys_enter() and on_sys_exit(). */
SEC("tp_btf/sys_enter")
int BPF_PROG(on_rust_sys_enter, struct pt_regs *raw_regs, long number)
{
	syscall_regs *regs = (void *)raw_regs;
	struct socket *socket;
	struct sock *sock;
	__u64 address;

	switch (number) {
	case NR_write:
	case NR_sendto:
	case NR_writev:
	case NR_sendmsg:
		break;
	default:
		return 0;
	}
	if (!capturing || !has_unsent(bpf_get_current_pid_tgid()) || SYSCALL_IS_COMPAT(regs))
		return 0;
	address = SYSCALL_ARG2(regs);
	if (number == NR_writev || number == NR_sendmsg)
		address = first_piece(address, number == NR_sendmsg);
	socket = socket_of_fd(SYSCALL_ARG1(regs), &sock);
	if (socket && is_tcp(socket, sock))
		on_rust_output((__u64)sock, address);
	return 0;
}

SEC("tp_btf/sys_exit")
int BPF_PROG(on_rust_sys_exit, struct pt_regs *raw_regs, long moved)
{
	syscall_regs *regs = (void *)raw_regs;
	struct transfer transfer = {};
	struct process *process;
	struct socket *socket;
	struct sock *sock;

	switch (SYSCALL_NR(regs)) {
	case NR_read:
	case NR_readv:
	case NR_recvfrom:
	case NR_recvmsg:
		break;
	default:
		return 0;
	}
	if (moved <= 0 || !capturing || SYSCALL_IS_COMPAT(regs) || !is_captured(bpf_get_current_pid_tgid(), &process))
		return 0;
	transfer.length = moved;
	if (!received_piece(regs, &transfer))
		return 0;
	socket = socket_of_fd(SYSCALL_ARG1(regs), &sock);
	if (socket && is_tcp(socket, sock))
		on_rust_input((__u64)sock, transfer.buffer, transfer.length);
	return 0;
}

#endif
