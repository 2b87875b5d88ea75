// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Captures HTTP exchanges and follows sockets and tasks. User space loads the programs of one of the first three files,
 * and attaches those of tls.bpf.h, gotls.bpf.h and rustls.bpf.h to the TLS libraries and programs that it finds.
 */
#include "sockets.bpf.h"
#include "functions.bpf.h"
#include "syscalls.bpf.h"
#include "tls.bpf.h"
#include "gotls.bpf.h"
#include "rustls.bpf.h"

char _license[] SEC("license") = "Dual BSD/GPL";

/* Whether the process may still come with bytes of a connection that TCP has just closed: a thread is on its way back from
 * having written, or what was received before is not read yet. The sweep ends such a connection.
 */
static __always_inline bool may_linger(const struct connection *connection, struct sock *sock, bool closes, bool waited)
{
	if (connection->mode == MODE_STREAM && connection->writing)
		return true;
	if (closes || !sock->sk_socket)
		return false; /* by the process itself */
	if (connection->mode == MODE_IGNORED || (connection->mode == MODE_EXCHANGE && connection->state == STATE_IDLE))
		return false;
	return waited || sock->sk_err;
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
	bool closes, waited;
	int error;

	/* A process that closes leaves the exchange now; TCP_CLOSE comes when the other end has answered to that. One that
	 * only shuts down may still read what is there; closing empties the queue first.
	 */
	closes = (new_state == TCP_FIN_WAIT1 || new_state == TCP_LAST_ACK) && sock->sk_shutdown == SHUTDOWN_MASK &&
		 !sock->sk_receive_queue.qlen;
	if (new_state != TCP_CLOSE && new_state != TCP_CLOSE_WAIT && !closes)
		return 0;
	connection = bpf_map_lookup_elem(&connections, &key);
	if (!connection || connection->lingers)
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
	/* Closed in both directions, by a shutdown in ours. */
	waited = new_state == TCP_CLOSE && end == END_CLOSED &&
		 (old_state == TCP_FIN_WAIT1 || old_state == TCP_FIN_WAIT2 || old_state == TCP_CLOSING ||
		  old_state == TCP_LAST_ACK);
	if (may_linger(connection, sock, closes, waited)) {
		if (waited)
			connection->exchange.flags |= FLAG_PEER_CLOSED;
		connection->closed_ns = now;
		connection->closed_end = end;
		connection->lingers = 1;
		return 0;
	}
	finish_connection(connection, end, now);
	forget(key);
	return 0;
}

/* Why: a tid or tgid that is used again must find nothing of its predecessor. */
SEC("tp_btf/sched_process_exit")
int BPF_PROG(on_process_exit, struct task_struct *task)
{
	__u32 tid = task->pid, tgid = task->tgid;

	bpf_map_delete_elem(&threads, &tid);
	if (tls_enabled)
		bpf_map_delete_elem(&tls_threads, &tid);
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

/* How long a process is given to come with the rest of a connection that was closed. */
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
	bool first, open;
	__u8 end;

	if (!context->key || !context->value)
		return 0;
	if (bpf_probe_read_kernel(&key, sizeof(key), context->key))
		return 0;
	connection = bpf_map_lookup_elem(&connections, &key);
	if (!connection)
		return 0;
	now = bpf_ktime_get_ns();
	open = connection->mode == MODE_EXCHANGE && connection->state != STATE_IDLE;
	active_ns = connection->closed_ns; /* 0 unless it lingers */
	if (open && active_ns < connection->exchange.response_end_ns)
		active_ns = connection->exchange.response_end_ns;
	if (open && active_ns < connection->exchange.request_end_ns)
		active_ns = connection->exchange.request_end_ns;
	if (connection->lingers && (draining || now > active_ns + LINGER_NS)) {
		finish_connection(connection, connection->closed_end, connection->closed_ns);
		forget(key);
		return 0;
	}
	if (!open)
		return 0;
	begun_ns = connection->exchange.request_start_ns;
	first = !connection->reports;
	if (now - active_ns > expire_ns && now > active_ns) {
		finish(connection, END_TIMED_OUT, now);
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
