// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Captures HTTP/1 exchanges at the socket system calls, by sys_enter/sys_exit, and follows sockets and tasks. */
#include "exchange.bpf.h"

char _license[] SEC("license") = "Dual BSD/GPL";

/* Whether the current process is captured. *process is its entry, or 0 when nothing is known of it yet. */
static __always_inline bool is_captured(__u64 pid_tgid, struct process **process)
{
	__u32 tgid = pid_tgid >> 32;

	*process = bpf_map_lookup_elem(&processes, &tgid);
	return !*process || (*process)->state != PROCESS_IGNORED;
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

/* Why sys_enter: outgoing bytes are complete in user memory here, and nothing of them has been sent. The raw
 * tracepoint's arguments are stable since 2.6; pt_regs through BTF needs 5.5. Cost: see docs/adr/0002.
 */
SEC("tp_btf/sys_enter")
int BPF_PROG(on_sys_enter, struct pt_regs *raw_regs, long number)
{
	syscall_regs *regs = (void *)raw_regs;
	struct transfer transfer = {};
	struct process *process;
	__u64 pid_tgid;

	switch (number) {
	case NR_write:
	case NR_sendto:
	case NR_writev:
	case NR_sendmsg:
	case NR_sendmmsg:
		break;
	default:
		return 0;
	}
	if (SYSCALL_IS_COMPAT(regs))
		return 0;
	pid_tgid = bpf_get_current_pid_tgid();
	if (!is_captured(pid_tgid, &process))
		return 0;
	transfer.length = LENGTH_UNKNOWN;
	switch (number) {
	case NR_write:
	case NR_sendto:
		transfer.buffer = SYSCALL_ARG2(regs);
		transfer.length = SYSCALL_ARG3(regs);
		if (!transfer.length)
			return 0;
		break;
	case NR_writev:
		from_iov(&transfer, SYSCALL_ARG2(regs), SYSCALL_ARG3(regs));
		break;
	default: /* of sendmmsg, the first message: more than one is not for stream sockets */
		if (!from_msghdr(&transfer, SYSCALL_ARG2(regs)))
			return 0;
	}
	simplify(&transfer);
	on_transfer(process, SYSCALL_ARG1(regs), &transfer, true, true, pid_tgid);
	return 0;
}

/* Bytes that a write of several buffers offers, as far as it is cheap to tell; 0 when it is not. */
static __always_inline __u64 offered_bytes(__u64 iov, __u64 iov_count)
{
	struct user_iovec iovecs[4];
	__u64 total = 0;

	if (iov_count > 4)
		return 0;
	if (bpf_probe_read_user(iovecs, iov_count * sizeof(iovecs[0]), (void *)iov))
		return 0;
	for (int i = 0; i < 4; i++) {
		if (i < iov_count)
			total += iovecs[i].length;
	}
	return total;
}

/* Longer writes may block half-way, and then their end is the end of the exchange. */
#define MAY_BLOCK_BYTES 16384

/* A write returned. Nothing is to be done in the common case: all that was offered was taken. */
static __always_inline void on_write_exit(syscall_regs *regs, __u64 number, long moved, __u64 pid_tgid)
{
	struct transfer transfer = {};
	struct connection *connection;
	struct process *process;
	struct sock *sock;
	__u64 offered = 0, key;

	switch (number) {
	case NR_write:
	case NR_sendto:
		transfer.buffer = SYSCALL_ARG2(regs);
		offered = SYSCALL_ARG3(regs);
		if (!offered)
			return; /* moves nothing, and its entry was not handled */
		break;
	case NR_writev:
		from_iov(&transfer, SYSCALL_ARG2(regs), SYSCALL_ARG3(regs));
		offered = offered_bytes(transfer.iov, transfer.iov_count);
		break;
	default:
		if (!from_msghdr(&transfer, SYSCALL_ARG2(regs)))
			return;
		offered = offered_bytes(transfer.iov, transfer.iov_count);
		if (number == NR_sendmmsg && moved > 0) {
			__u32 length = 0;

			bpf_probe_read_user(&length, sizeof(length),
					    &((struct user_mmsghdr *)SYSCALL_ARG2(regs))->length);
			moved = length;
		}
	}
	if (!moved)
		return;
	if (moved == offered && offered <= MAY_BLOCK_BYTES && !stream_connections)
		return;
	if (!is_captured(pid_tgid, &process))
		return;
	if (!socket_of_fd(SYSCALL_ARG1(regs), &sock))
		return;
	key = (__u64)sock;
	connection = bpf_map_lookup_elem(&connections, &key);
	if (!connection || connection->mode == MODE_IGNORED)
		return;
	if (connection->mode == MODE_EXCHANGE) {
		settle_write(connection, moved, pid_tgid);
	} else if (moved > 0) {
		transfer.length = moved;
		stream_transfer(key, &transfer, connection->exchange.role == ROLE_SERVER);
	}
}

/* Bytes that never were in user memory: sendfile and splice. They belong to a body that has begun. */
static __always_inline bool on_bodiless_bytes(__u32 fd, __u64 moved, bool egress)
{
	struct connection *connection;
	struct record_exchange *exchange;
	struct sock *sock;
	__u64 key, now = bpf_ktime_get_ns();

	if (!socket_of_fd(fd, &sock))
		return false;
	key = (__u64)sock;
	connection = bpf_map_lookup_elem(&connections, &key);
	if (!connection || connection->mode == MODE_IGNORED)
		return true;
	exchange = &connection->exchange;
	if (connection->mode == MODE_STREAM) {
		stream_segment(key, 0, 0, moved, egress == (exchange->role == ROLE_SERVER));
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
	return true;
}

/* A thread that waits for events while an exchange it read is unanswered interleaves work: what it sends later cannot
 * be tied to what it read last. poll(2) on one or two descriptors is how clients wait for their own socket.
 */
static __always_inline void on_event_wait(__u64 pid_tgid)
{
	__u32 tid = pid_tgid;
	struct thread *thread = bpf_map_lookup_elem(&threads, &tid);

	if (thread && !thread->multiplexes && is_unanswered(thread))
		thread->multiplexes = 1;
}

/* Why sys_exit: incoming bytes are in user memory now, and the argument registers still hold what the call was given.
 * Cost: see docs/adr/0002.
 */
SEC("tp_btf/sys_exit")
int BPF_PROG(on_sys_exit, struct pt_regs *raw_regs, long moved)
{
	syscall_regs *regs = (void *)raw_regs;
	__u64 number = SYSCALL_NR(regs), pid_tgid;
	struct transfer transfer = {};
	struct process *process;
	__u32 flags = 0;

	switch (number) {
	case NR_write:
	case NR_sendto:
	case NR_writev:
	case NR_sendmsg:
	case NR_sendmmsg:
		if (!SYSCALL_IS_COMPAT(regs))
			on_write_exit(regs, number, moved, bpf_get_current_pid_tgid());
		return 0;
	case NR_poll:
	case NR_ppoll:
		if (SYSCALL_ARG2(regs) <= 2)
			return 0;
		/* fall through */
	case NR_epoll_wait:
	case NR_epoll_pwait:
	case NR_epoll_pwait2:
		on_event_wait(bpf_get_current_pid_tgid());
		return 0;
	case NR_read:
	case NR_readv:
	case NR_recvfrom:
	case NR_recvmsg:
	case NR_recvmmsg:
		break;
	/* These act on tracked connections only: the process need not be looked up. */
	case NR_sendfile:
		if (moved > 0 && !SYSCALL_IS_COMPAT(regs))
			on_bodiless_bytes(SYSCALL_ARG1(regs), moved, true);
		return 0;
	case NR_splice: /* into a socket, or out of one */
		if (moved > 0 && !SYSCALL_IS_COMPAT(regs) && !on_bodiless_bytes(SYSCALL_ARG3(regs), moved, true))
			on_bodiless_bytes(SYSCALL_ARG1(regs), moved, false);
		return 0;
	default:
		return 0;
	}
	if (moved <= 0 || SYSCALL_IS_COMPAT(regs))
		return 0;
	pid_tgid = bpf_get_current_pid_tgid();
	if (!is_captured(pid_tgid, &process))
		return 0;
	transfer.length = moved;
	switch (number) {
	case NR_read:
		transfer.buffer = SYSCALL_ARG2(regs);
		break;
	case NR_recvfrom:
		transfer.buffer = SYSCALL_ARG2(regs);
		flags = SYSCALL_ARG4(regs);
		break;
	case NR_readv:
		from_iov(&transfer, SYSCALL_ARG2(regs), SYSCALL_ARG3(regs));
		break;
	case NR_recvmsg:
		if (!from_msghdr(&transfer, SYSCALL_ARG2(regs)))
			return 0;
		flags = SYSCALL_ARG3(regs);
		break;
	case NR_recvmmsg: {
		/* moved counts messages; for a stream socket one is all there is to expect. */
		__u32 length = 0;

		if (!from_msghdr(&transfer, SYSCALL_ARG2(regs)))
			return 0;
		if (bpf_probe_read_user(&length, sizeof(length),
					&((struct user_mmsghdr *)SYSCALL_ARG2(regs))->length) ||
		    !length)
			return 0;
		transfer.length = length;
		flags = SYSCALL_ARG4(regs);
		break;
	}
	default:
		return 0;
	}
	if (flags & (MSG_PEEK | MSG_OOB | MSG_ERRQUEUE))
		return 0;
	simplify(&transfer);
	on_transfer(process, SYSCALL_ARG1(regs), &transfer, false, false, pid_tgid);
	return 0;
}

static __always_inline void forget_endpoint(const struct endpoint *endpoint, __u64 key)
{
	__u64 *found = bpf_map_lookup_elem(&endpoints, endpoint);

	if (found && *found == key) /* not overwritten by another connection from the same port */
		bpf_map_delete_elem(&endpoints, endpoint);
}

static __always_inline void forget(struct connection *connection, __u64 key)
{
	struct endpoint endpoint;

	if (connection->exchange.role == ROLE_CLIENT) {
		endpoint_of(&endpoint, connection->exchange.local_address, connection->exchange.local_port,
			    connection->exchange.netns, connection->exchange.remote_port);
		forget_endpoint(&endpoint, key);
		endpoint.server_port = 0;
		forget_endpoint(&endpoint, key);
	}
	bpf_map_delete_elem(&connections, &key);
}

/* Why this tracepoint: it is where every TCP socket's end is seen, whoever closes it and in whatever context. Its
 * arguments are stable since 4.16. It costs one look-up per change of state.
 */
SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(on_sock_state, struct sock *sock, int old_state, int new_state)
{
	struct connection *connection;
	__u64 key = (__u64)sock, now;
	__u8 end = END_CLOSED;
	bool closes;
	int error;

	/* A process that closes leaves the exchange now; TCP_CLOSE comes when the other end has answered to that. */
	closes = (new_state == TCP_FIN_WAIT1 || new_state == TCP_LAST_ACK) && sock->sk_shutdown == SHUTDOWN_MASK;
	if (new_state != TCP_CLOSE && new_state != TCP_CLOSE_WAIT && !closes)
		return 0;
	connection = bpf_map_lookup_elem(&connections, &key);
	if (!connection)
		return 0;
	if (new_state == TCP_CLOSE_WAIT || old_state == TCP_LAST_ACK || old_state == TCP_CLOSE_WAIT)
		connection->exchange.flags |= FLAG_PEER_CLOSED;
	if (new_state == TCP_CLOSE_WAIT)
		return 0;
	error = sock->sk_err;
	if (error == ECONNRESET || error == EPIPE)
		end = END_RESET;
	else if (error == ETIMEDOUT)
		end = END_TIMED_OUT;
	now = bpf_ktime_get_ns();
	/* Half-closed by us and now by the peer: the process may still have to read what came before. The sweep ends it. */
	if (new_state == TCP_CLOSE && end == END_CLOSED && connection->mode == MODE_EXCHANGE &&
	    connection->state != STATE_IDLE && sock->sk_socket &&
	    (old_state == TCP_FIN_WAIT1 || old_state == TCP_FIN_WAIT2 || old_state == TCP_CLOSING)) {
		connection->exchange.flags |= FLAG_PEER_CLOSED;
		connection->lingers = 1;
		return 0;
	}
	if (connection->mode == MODE_STREAM) {
		connection->reports = 1;
		connection->reported_bytes = connection->exchange.response_bytes;
		finish(connection, end, now);
	} else if (connection->mode == MODE_EXCHANGE && connection->state != STATE_IDLE) {
		finish(connection, end, now);
	}
	forget(connection, key);
	return 0;
}

/* Why: a tid or tgid that is used again must find nothing of its predecessor. */
SEC("tp_btf/sched_process_exit")
int BPF_PROG(on_process_exit, struct task_struct *task)
{
	__u32 tid = task->pid, tgid = task->tgid;

	bpf_map_delete_elem(&threads, &tid);
	if (tid == tgid)
		bpf_map_delete_elem(&processes, &tgid);
	return 0;
}

/* Why: another program runs under the same tgid from now on, which user space has to decide on again. */
SEC("tp_btf/sched_process_exec")
int BPF_PROG(on_process_exec, struct task_struct *task)
{
	__u32 tgid = task->tgid;
	struct process *process = bpf_map_lookup_elem(&processes, &tgid);

	if (process && process->start_ns) /* not the agent's own entry */
		bpf_map_delete_elem(&processes, &tgid);
	return 0;
}

/* How long a process is given to read the rest of a connection that both ends have closed. */
#define LINGER_NS 1000000000

/* Run by user space a few times a second over all connections. Reports what nothing else would report soon: responses
 * that went quiet, requests that wait for long, exchanges that outlived their limit. It runs on the agent's time, not
 * on the applications'. Needs 5.9 (commit a5cbe05a6673).
 */
SEC("iter/bpf_map_elem")
int sweep(struct bpf_iter__bpf_map_elem *context)
{
	struct connection *connection, *copy;
	__u64 key, now, begun_ns, active_ns, quiet;
	__u32 zero = 0, length;
	bool first;
	__u8 end;

	if (!context->key || !context->value)
		return 0;
	if (bpf_probe_read_kernel(&key, sizeof(key), context->key))
		return 0;
	connection = bpf_map_lookup_elem(&connections, &key);
	if (!connection || connection->mode != MODE_EXCHANGE || connection->state == STATE_IDLE)
		return 0;
	now = bpf_ktime_get_ns();
	begun_ns = connection->exchange.request_start_ns;
	active_ns = connection->exchange.response_end_ns;
	if (active_ns < connection->exchange.request_end_ns)
		active_ns = connection->exchange.request_end_ns;
	first = !connection->reports;
	if (now - active_ns > expire_ns && now > active_ns) {
		finish(connection, END_TIMED_OUT, now);
		return 0;
	}
	if (connection->lingers && now > active_ns + LINGER_NS) {
		finish(connection, END_CLOSED, now);
		forget(connection, key);
		return 0;
	}
	/* Each report of a stream doubles the silence that the next one needs; the last chunk ends the wait. */
	quiet = quiet_ns << (connection->reports < 10 ? connection->reports : 10);
	if (connection->tail_valid && connection->tail >> 24 == 0x0a0d0a0d30ULL)
		quiet = quiet_ns;
	if (connection->state == STATE_RESPONSE && (draining || now > active_ns + quiet) &&
	    (first || connection->reported_bytes != connection->exchange.response_bytes))
		end = END_QUIET;
	else if (first && now > begun_ns + open_ns)
		end = END_OPEN;
	else
		goto unreported;
	/* The connection may start its next exchange meanwhile: what is sent is a copy that was not torn. */
	copy = bpf_map_lookup_elem(&sweep_scratch, &zero);
	if (!copy)
		goto unreported;
	length = sizeof(*connection) - sizeof(connection->data) + request_cap + response_cap;
	if (bpf_probe_read_kernel(copy, length, connection))
		goto unreported;
	if (connection->exchange.exchange_id != copy->exchange.exchange_id || connection->state != copy->state ||
	    connection->exchange.response_bytes != copy->exchange.response_bytes || connection->reports != copy->reports)
		goto unreported;
	if (!emit(copy, end, now, first))
		goto unreported; /* the ring buffer is full: the next sweep tries again */
	if (connection->exchange.exchange_id == copy->exchange.exchange_id) {
		if (connection->reports < 255)
			connection->reports++;
		connection->reported_bytes = copy->exchange.response_bytes;
	}
	count(first ? COUNTER_EMITTED : COUNTER_REEMITTED);
	return 0;
unreported:
	if (first && begun_ns < oldest_unreported_ns)
		oldest_unreported_ns = begun_ns;
	return 0;
}
