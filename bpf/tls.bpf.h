/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* TLS libraries: what a process gives them and gets from them joins the exchange of the socket that carries it.
 *
 * The library's object of a connection is tied to the socket in one of two ways. Most programs let the library read and
 * write the socket: TLS records that a thread moves while it is in a call for the object belong to it. Others move the
 * records themselves (Node.js, Python's asyncio): what a thread receives it passes on in its next call, and what a call
 * produced it sends next. Either may be by chance; when a socket and an object follow on each other both ways, with no
 * other socket, no other object and no wait for events in between, they belong together. Nothing else makes a tie, and
 * what contradicts one ends it: a wrong tie is worse than a missing one.
 *
 * User space attaches these programs to each library or executable that it finds, returns before entries.
 */
#ifndef SPANLOOM_TLS_BPF_H
#define SPANLOOM_TLS_BPF_H

#include "transfer.bpf.h"

enum tls_direction {
	TLS_EGRESS = 1 << 0,
	TLS_ENTERING = 1 << 1, /* a write that has not happened yet */
};

/* Tells user space how the current process uses TLS, once. A function of its own for the sake of the stack, which all
 * that call each other share.
 */
__noinline int announce_tls(__u64 notice)
{
	__u32 tgid = bpf_get_current_pid_tgid() >> 32;
	struct process *process = bpf_map_lookup_elem(&processes, &tgid);
	struct record_tls record = { .kind = RECORD_TLS, .notice = notice, .tgid = tgid };

	if (!process)
		process = announce_process(tgid);
	if (!process || (process->tls_told & notice))
		return 0;
	process->tls_told |= notice;
	record.start_ns = process->start_ns;
	/* Woken at once: the handshake that is under way is all the time there is to attach to the library. */
	if (bpf_ringbuf_output(&records, &record, sizeof(record), BPF_RB_FORCE_WAKEUP))
		count(COUNTER_PROCESSES_LOST);
	return 0;
}

/* Programs that switch stacks may do so within a call, and then the return probes of the kernel, which expect calls to end
 * in reverse order, crash them. The main thread's own stack is known, and nothing else is near it: mmap_base() in
 * arch/x86/mm/mmap.c and mm/util.c leaves at least 128 MB.
 */
#define OWN_STACK_BYTES (64 << 20)

static __always_inline bool is_other_stack(__u64 stack) /* of the main thread */
{
	__u64 start = BPF_CORE_READ((struct task_struct *)bpf_get_current_task(), mm, start_stack);

	return stack && start - stack > OWN_STACK_BYTES; /* above its start it would be a very great number */
}

/* All zero: the initial value of a thread's entry. */
static const struct tls_thread zero_tls_thread;

static __always_inline struct tls_thread *tls_thread_of(__u64 pid_tgid)
{
	struct tls_thread *thread;
	__u32 tid = pid_tgid, tgid = pid_tgid >> 32;

	thread = bpf_map_lookup_elem(&tls_threads, &tid);
	if (thread && thread->tgid == tgid)
		return thread;
	if (bpf_map_update_elem(&tls_threads, &tid, &zero_tls_thread, BPF_ANY)) {
		count(COUNTER_TLS_FULL);
		return 0;
	}
	thread = bpf_map_lookup_elem(&tls_threads, &tid);
	if (thread)
		thread->tgid = tgid;
	return thread;
}

/* The key of the connection that an object of the current process is tied to, or 0. A socket that was closed meanwhile,
 * and one that has its address now, are not it.
 */
static __always_inline __u64 tied_sock(__u64 object, __u32 tgid, bool *is_memory)
{
	struct tls_key key = { .object = object, .tgid = tgid };
	struct tls_object *tied = bpf_map_lookup_elem(&tls_objects, &key);
	struct connection *connection;
	__u64 sock;

	*is_memory = false;
	if (!tied)
		return 0;
	sock = tied->sock;
	*is_memory = tied->is_memory;
	connection = bpf_map_lookup_elem(&connections, &sock);
	if (connection && connection->tls_object == object && connection->tls_tgid == tgid &&
	    connection->exchange.connection_id == tied->connection_id)
		return sock;
	bpf_map_delete_elem(&tls_objects, &key);
	return 0;
}

/* Whether the connection under this key is the one that the object is tied to: what tied_sock() says, at half the cost. */
static __always_inline bool is_tied(const __u64 *sock, __u64 object, __u32 tgid)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, sock);

	return connection && connection->tls_object == object && connection->tls_tgid == tgid;
}

/* Ties an object of the current process to a socket. Global for the reason given at absorb_iovecs(). */
__noinline int tie(__u64 object, __u64 sock, __u64 is_memory)
{
	struct tls_key key = { .object = object, .tgid = bpf_get_current_pid_tgid() >> 32 };
	struct tls_object tied = { .sock = sock, .is_memory = is_memory };
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);
	struct tls_object *older;
	struct hello *hello;

	older = bpf_map_lookup_elem(&tls_objects, &key);
	if (older) {
		struct connection *other;
		__u64 other_sock = older->sock;

		other = bpf_map_lookup_elem(&connections, &other_sock);
		if (other && other->tls_object == object && other->tls_tgid == key.tgid)
			other->tls_object = 0;
	}
	if (connection && !connection->tls)
		return 0; /* it carried requests in the clear: not a connection that TLS is used on from its beginning */
	if (!connection) {
		if (bpf_map_update_elem(&connections, &sock, &zero_connection, BPF_NOEXIST)) {
			count(COUNTER_TLS_FULL);
			return 0;
		}
		connection = bpf_map_lookup_elem(&connections, &sock);
		if (!connection)
			return 0;
		__sync_fetch_and_add(&tracked_connections, 1);
		connection->sock = sock;
		connection->tls = 1;
		connection->exchange.kind = RECORD_EXCHANGE;
		connection->exchange.connection_id = random_id();
		read_identity((struct sock *)sock, &connection->exchange);
		hello = bpf_map_lookup_elem(&hellos, &sock);
		if (hello && hello->ports == ports_of(sock)) {
			connection->exchange.tls = hello->tls;
			connection->hello_looks = HELLO_LOOKS;
		}
		bpf_map_delete_elem(&hellos, &sock);
	}
	untie(connection);
	tied.connection_id = connection->exchange.connection_id;
	if (bpf_map_update_elem(&tls_objects, &key, &tied, BPF_ANY)) {
		count(COUNTER_TLS_FULL);
		return 0;
	}
	connection->tls_object = object;
	connection->tls_tgid = key.tgid;
	count(COUNTER_TLS_TIED);
	return 1;
}

/* The socket that was assumed for an object is not the one that its bytes were sent to: nothing was seen. Of its own like
 * announce_tls().
 */
__noinline int withdraw(__u64 sock)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);

	if (!connection)
		return 0;
	count(COUNTER_TLS_CONTRADICTED);
	untie(connection);
	if (connection->mode == MODE_EXCHANGE && connection->state != STATE_IDLE)
		abandon(connection, COUNTER_CANCELLED, bpf_ktime_get_ns());
	return 0;
}

static __always_inline void withdraw_assumed(struct tls_thread *thread)
{
	__u64 sock = thread->assumed_sock;

	thread->assumed_sock = 0;
	if (sock)
		withdraw(sock);
}

/* A recycled sock whose close was not seen: nothing of the connection that it was is left. Of its own like announce_tls(). */
__noinline int end_recycled(__u64 sock)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);

	if (connection)
		finish_connection(connection, END_CLOSED, bpf_ktime_get_ns());
	forget(sock);
	return 0;
}

/* What was received before has been passed to whom it is for. Global for the reason given at absorb_iovecs(). */
__noinline int on_tls_wait(__u64 tid)
{
	__u32 key = tid;
	struct tls_thread *thread = bpf_map_lookup_elem(&tls_threads, &key);

	if (!thread)
		return 0;
	withdraw_assumed(thread);
	thread->received_sock = 0;
	thread->called_object = 0;
	return 0;
}

/* Returns 1 when the connection that was known to carry TLS has ended, and the bytes are those of another one, else 0.
 * Global for the reason given at absorb_iovecs(): it is called wherever bytes are moved.
 */
__noinline int on_tls_records(__u64 sock, __u64 egress)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);
	__u64 pid_tgid = bpf_get_current_pid_tgid();
	struct tls_thread *thread;
	__u32 tid = pid_tgid;
	bool is_memory;

	if (connection && !same_ports((struct sock *)sock, &connection->exchange)) {
		end_recycled(sock);
		return 1;
	}
	if (!connection || !connection->tls_object) {
		/* Before its library is watched is the best time to learn that it must not be. */
		bool is_other = tid == pid_tgid >> 32 && is_other_stack(user_stack());

		announce_tls(is_other ? TLS_OTHER_STACK : TLS_UNWATCHED);
	}
	if (!tls_attached)
		return 0;
	thread = egress ? bpf_map_lookup_elem(&tls_threads, &tid) : tls_thread_of(pid_tgid);
	if (!thread || thread->tgid != pid_tgid >> 32)
		return 0;
	if (thread->object) {
		if (!thread->sock)
			thread->sock = sock;
		else if (thread->sock != sock)
			thread->conflict = 1;
		if (thread->assumed_sock == sock)
			thread->assumed_sock = 0; /* the library moves the records itself: that proves it */
		return 0;
	}
	if (thread->assumed_sock) {
		if (egress && thread->assumed_sock == sock)
			thread->assumed_sock = 0;
		else
			withdraw_assumed(thread);
	}
	if (egress && thread->called_object > TLS_SEVERAL) {
		struct tls_key key = { .object = thread->called_object, .tgid = thread->tgid };

		if (tied_sock(key.object, key.tgid, &is_memory))
			; /* it need not be asked */
		else if (thread->received_sock == sock)
			tie(key.object, sock, true);
		else if (!thread->received_sock)
			bpf_map_update_elem(&tls_candidates, &key, &sock, BPF_ANY);
	}
	thread->received_sock = egress ? 0 : sock;
	thread->called_object = 0;
	return 0;
}

/* The first plaintext of a connection: which end of it the process is. */
static __always_inline bool find_role(struct connection *connection, const struct transfer *transfer, bool egress)
{
	if (!(look(transfer) & LOOKS_REQUEST)) {
		count(COUNTER_IGNORED_OTHER);
		return false;
	}
	connection->exchange.role = egress ? ROLE_CLIENT : ROLE_SERVER;
	if (passes_over(connection))
		return false;
	if (egress)
		remember_endpoint(connection);
	return true;
}

/* Plaintext of a tied connection comes through here, as on_transfer() has what is sent in the clear. `direction` is of
 * enum tls_direction.
 */
static __always_inline int pass_plaintext(__u64 sock, struct transfer *transfer, __u64 direction)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);
	bool egress = direction & TLS_EGRESS, entering = direction & TLS_ENTERING, response;
	__u64 pid_tgid = bpf_get_current_pid_tgid(), now;

	if (!connection)
		return 0;
	if (connection->passed_over && connection->ports_generation != (__u32)ports_generation) {
		connection->mode = MODE_EXCHANGE;
		connection->passed_over = 0;
	}
	if (connection->mode == MODE_IGNORED)
		return 0;
	if (!connection->exchange.role && !find_role(connection, transfer, egress))
		return 0;
	now = bpf_ktime_get_ns();
	response = egress == (connection->exchange.role == ROLE_SERVER);
	if (entering)
		connection->writing = 1;
	if (connection->mode == MODE_STREAM) {
		if (!entering) {
			stream_transfer(connection, transfer, response);
			return 0;
		}
		enter_stream_write(connection, transfer->length, pid_tgid);
		if (!response)
			connection->walks[0].entered_ns = now;
		return 0;
	}
	if (response)
		on_response_bytes(connection, transfer, sock, now, pid_tgid, entering);
	else
		on_request_bytes(connection, 0, true, transfer, sock, now, pid_tgid, entering);
	return 0;
}

/* The same of one piece. Global for the reason given at absorb_iovecs(). */
__noinline int on_plaintext(__u64 sock, __u64 buffer, __u64 length, __u64 direction)
{
	struct transfer transfer = { .buffer = buffer, .length = length };

	return pass_plaintext(sock, &transfer, direction);
}

/* An object is called behind bytes that were received from a socket. */
static __always_inline void tie_candidate(__u64 object, __u64 sock)
{
	struct tls_key key = { .object = object, .tgid = bpf_get_current_pid_tgid() >> 32 };
	__u64 *candidate = bpf_map_lookup_elem(&tls_candidates, &key);
	bool is_memory;

	if (!candidate)
		return;
	if (*candidate == sock && !tied_sock(object, key.tgid, &is_memory))
		tie(object, sock, true);
	bpf_map_delete_elem(&tls_candidates, &key);
}

/* A call begins. Returns 0 when it is within another one, or not to be followed. `stack` is the stack pointer with the operation in the bits that its alignment leaves. Global for the
 * reason given at absorb_iovecs().
 */
__noinline int on_tls_enter(__u64 object, __u64 buffer, __u64 length, __u64 done, __u64 stack)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid();
	struct tls_thread *thread;
	struct process *process;

	if (!capturing || !object || !is_captured(pid_tgid, &process))
		return 0;
	thread = tls_thread_of(pid_tgid);
	if (!thread)
		return 0;
	if (thread->object && stack < thread->stack && thread->call.depth) {
		/* TLS is carried over TLS: the socket is neither's for sure. */
		if (thread->object != object)
			thread->conflict = 1;
		if (thread->conflict || (stack & 7) == TLS_HANDSHAKE || thread->call.operation == (stack & 7) ||
		    thread->outer.depth) {
			if (thread->call.depth < 255)
				thread->call.depth++;
			return 0;
		}
		/* Node.js writes when it is called back from within a read that ends the handshake. */
		thread->outer = thread->call;
	} else {
		if (((stack & 7) == TLS_HANDSHAKE || !thread->stack) && (__u32)pid_tgid == thread->tgid && is_other_stack(stack))
			announce_tls(TLS_OTHER_STACK);
		thread->object = object;
		thread->stack = stack;
		thread->sock = 0;
		thread->conflict = 0;
		thread->outer.depth = 0;
		thread->follows = thread->received_sock && !thread->called_object;
		if (thread->follows)
			tie_candidate(object, thread->received_sock);
		if (!thread->called_object)
			thread->called_object = object;
		else if (thread->called_object != object)
			thread->called_object = TLS_SEVERAL;
		if (thread->assumed_sock && thread->called_object != object)
			withdraw_assumed(thread);
	}
	thread->call.buffer = buffer;
	thread->call.length = length;
	thread->call.done = done;
	thread->call.entered_sock = 0;
	thread->call.operation = stack & 7;
	thread->call.depth = 1;
	return 1;
}

/* The call that was just entered writes: what it writes is known before the peer can have read it. Global, so that the
 * verifier walks it in the programs for writes only.
 */
__noinline int on_tls_write_enter(__u64 object, __u64 buffer, __u64 length)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid(), sock;
	struct tls_thread *thread;
	__u32 tid = pid_tgid;
	bool is_memory;

	thread = length ? bpf_map_lookup_elem(&tls_threads, &tid) : 0;
	if (!thread)
		return 0;
	sock = thread->last_sock;
	if (!sock || !is_tied(&thread->last_sock, object, pid_tgid >> 32))
		sock = tied_sock(object, pid_tgid >> 32, &is_memory);
	if (!sock) {
		/* Node.js writes its first request in the same breath in which it ends the handshake: half of the proof that
		 * they belong together is there, and the other half comes with what is sent next.
		 */
		sock = thread->received_sock;
		if (!sock || thread->called_object != object || thread->conflict || !tie(object, sock, true))
			return 0;
		thread->assumed_sock = sock;
	}
	thread->call.entered_sock = sock;
	on_plaintext(sock, buffer, length, TLS_EGRESS | TLS_ENTERING);
	return 0;
}

/* What sock_of_call() returns when the call does not just confirm what is known. Global, so that its stack is not that of
 * what follows as well.
 */
__noinline __u64 find_sock_of_call(__u64 tid, __u64 object, __u64 moved)
{
	__u32 key = tid;
	struct tls_thread *thread = bpf_map_lookup_elem(&tls_threads, &key);
	struct connection *connection;
	__u64 within, sock;
	bool is_memory;

	if (!thread)
		return 0;
	within = thread->sock;
	sock = tied_sock(object, thread->tgid, &is_memory);
	if (within && !thread->conflict) {
		if (sock)
			count(COUNTER_TLS_CONTRADICTED);
		return tie(object, within, false) ? within : 0;
	}
	/* What was read came out of what the thread had received just before. */
	if (!thread->conflict && (within || !moved || !is_memory || !sock || !thread->follows || sock == thread->received_sock))
		return sock;
	count(COUNTER_TLS_CONTRADICTED);
	connection = bpf_map_lookup_elem(&connections, &sock);
	if (connection)
		untie(connection);
	return 0;
}

/* The socket that the call that has just ended shows the object to be tied to, or 0. `moved`: plaintext was read. */
static __always_inline __u64 sock_of_call(struct tls_thread *thread, __u32 tid, __u64 object, bool moved)
{
	if (thread->sock) {
		thread->called_object = TLS_SEVERAL; /* what is sent outside of calls is not its */
		if (!thread->conflict && is_tied(&thread->sock, object, thread->tgid))
			return thread->sock;
	}
	return find_sock_of_call(tid, object, moved);
}

static __always_inline void leave_write(__u64 sock, struct transfer *transfer, long moved, __u64 pid_tgid)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);
	__u64 offered = transfer->length;

	if (!connection)
		return;
	connection->writing = 0;
	if (connection->mode == MODE_IGNORED)
		return;
	if (connection->mode == MODE_STREAM)
		stream_write(connection, transfer, moved, pid_tgid);
	else if (moved != offered || offered > MAY_BLOCK_BYTES)
		settle_write(connection, moved, pid_tgid);
}

/* A write that was handled at its entry, when the thread was `pid_tgid`, has ended. Of its own, so that its stack is not
 * its caller's as well.
 */
__noinline int on_write_left(__u64 sock, __u64 buffer, __u64 offered, __u64 result, __u64 pid_tgid)
{
	struct transfer transfer = { .buffer = buffer, .length = offered };

	leave_write(sock, &transfer, result, pid_tgid);
	return 0;
}

/* A call returns `result`. Global for the reason given at absorb_iovecs(). */
__noinline int on_tls_leave(__u64 result)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid(), object, sock, entered, done, buffer, length, bytes = 0;
	struct tls_thread *thread;
	__u32 tid = pid_tgid;
	__u8 operation;
	long moved;

	thread = bpf_map_lookup_elem(&tls_threads, &tid);
	if (!thread || thread->tgid != pid_tgid >> 32 || !thread->object)
		return 0;
	if (thread->call.depth > 1) {
		thread->call.depth--;
		return 0;
	}
	object = thread->object;
	moved = (int)result;
	buffer = thread->call.buffer;
	length = thread->call.length;
	done = thread->call.done;
	entered = thread->call.entered_sock;
	operation = thread->call.operation;
	if (thread->outer.depth) {
		thread->call = thread->outer;
		thread->outer.depth = 0;
	} else {
		thread->call.depth = 0;
		thread->object = 0;
	}
	if (!capturing)
		return 0;
	if (done) {
		if (moved > 0 && bpf_probe_read_user(&bytes, sizeof(bytes), (void *)done))
			count(COUNTER_READ_FAULT);
		moved = bytes;
	}
	if (moved <= 0)
		moved = -1;
	if (operation == TLS_READ && moved < 0 && !thread->sock && !thread->conflict)
		return 0; /* there was nothing to read, and nothing is shown */
	sock = sock_of_call(thread, tid, object, operation == TLS_READ && moved > 0);
	thread->last_sock = sock;
	if (operation == TLS_HANDSHAKE)
		return 0;
	if (entered)
		on_write_left(entered, buffer, length, sock == entered ? moved : -1, pid_tgid);
	if (moved <= 0 || (entered && sock == entered))
		return 0;
	if (!sock)
		count(COUNTER_TLS_UNTIED);
	else if (buffer)
		on_plaintext(sock, buffer, moved, operation == TLS_READ ? 0 : TLS_EGRESS);
	return 0;
}

/* Why these functions: they are the public interface of OpenSSL since 0.9.8, and LibreSSL's and BoringSSL's. A write's
 * bytes are complete at its entry; a read's are there at its return, when the arguments are gone.
 */
SEC("uprobe")
int on_tls_read(syscall_regs *regs)
{
	return on_tls_enter(CALL_ARG1(regs), CALL_ARG2(regs), CALL_ARG3(regs), 0, CALL_STACK(regs) | TLS_READ);
}

SEC("uprobe")
int on_tls_write(syscall_regs *regs)
{
	if (on_tls_enter(CALL_ARG1(regs), CALL_ARG2(regs), CALL_ARG3(regs), 0, CALL_STACK(regs) | TLS_WRITE))
		on_tls_write_enter(CALL_ARG1(regs), CALL_ARG2(regs), CALL_ARG3(regs));
	return 0;
}

/* Why: the forms of OpenSSL 1.1.1 and later that return the number of bytes by a pointer. */
SEC("uprobe")
int on_tls_read_ex(syscall_regs *regs)
{
	return on_tls_enter(CALL_ARG1(regs), CALL_ARG2(regs), CALL_ARG3(regs), CALL_ARG4(regs),
			    CALL_STACK(regs) | TLS_READ);
}

SEC("uprobe")
int on_tls_write_ex(syscall_regs *regs)
{
	if (on_tls_enter(CALL_ARG1(regs), CALL_ARG2(regs), CALL_ARG3(regs), CALL_ARG4(regs),
			 CALL_STACK(regs) | TLS_WRITE))
		on_tls_write_enter(CALL_ARG1(regs), CALL_ARG2(regs), CALL_ARG3(regs));
	return 0;
}

/* Why: it ties a connection before its first byte of plaintext, so that a client's request is known before its server
 * can have read it. Once or twice per connection.
 */
SEC("uprobe")
int on_tls_handshake(syscall_regs *regs)
{
	return on_tls_enter(CALL_ARG1(regs), 0, 0, 0, CALL_STACK(regs) | TLS_HANDSHAKE);
}

SEC("uretprobe")
int on_tls_return(syscall_regs *regs)
{
	return on_tls_leave(CALL_RESULT(regs));
}

/* Why: another object may get the address. Once per connection. */
SEC("uprobe")
int on_tls_free(syscall_regs *regs)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid(), sock;
	struct connection *connection;
	bool is_memory;

	struct tls_key key = { .object = CALL_ARG1(regs), .tgid = pid_tgid >> 32 };

	sock = tied_sock(key.object, key.tgid, &is_memory);
	connection = sock ? bpf_map_lookup_elem(&connections, &sock) : 0;
	if (connection)
		untie(connection);
	bpf_map_delete_elem(&tls_candidates, &key);
	return 0;
}

#endif
