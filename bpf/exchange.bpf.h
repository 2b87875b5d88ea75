/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The request/response state machine of half-duplex protocols.
 *
 * Per connection: idle -> request -> response -> (next request, close, quiet). One record leaves per exchange, with the
 * heads, the byte counts and the four times. Whether the response is whole is decided by user space; a record that
 * turned out to be early is superseded by a later one of the same exchange id.
 *
 * Outgoing bytes are handled when the system call is entered, so that an exchange is registered before its peer can
 * react to it; a refused or short write is taken back when the call returns. Incoming bytes are handled at the return.
 */
#ifndef SPANLOOM_EXCHANGE_BPF_H
#define SPANLOOM_EXCHANGE_BPF_H

#include "frames.bpf.h"
#include "sniff.bpf.h"
#include "sock.bpf.h"

/* One data-carrying system call, whatever its form. */
struct transfer {
	__u64 buffer;    /* user address of the bytes; unused with iov */
	__u64 iov;       /* address of an array of iovecs, or 0: the kernel's own copy when it is a kernel address */
	__u64 length;    /* bytes moved, or offered at entry; with iov at entry: filled in by absorb() */
	__u64 iov_count;
	__u64 sequence; /* socket backend, at entry: TCP's number of the first byte offered */
};

#define LENGTH_UNKNOWN (~0ULL)

static __always_inline __u64 random_id(void)
{
	__u64 id = (__u64)bpf_get_prandom_u32() << 32 | bpf_get_prandom_u32();

	return id ? id : 1;
}

/* The client's preface of HTTP/2 (RFC 9113 section 3.4): a request that HTTP/1 has not, and behind its blank line what
 * is no request of HTTP/1. The shortest pipelined requests are longer.
 */
#define PREFACE_HEAD_BYTES 18
#define PREFACE_WORD TEXT8('P', 'R', 'I', ' ', '*', ' ', 'H', 'T')

/* What the first bytes of a transfer look like. */
enum look {
	LOOKS_REQUEST = 1 << 0,        /* is_request() */
	LOOKS_COMMON_REQUEST = 1 << 1, /* is_common_request() */
	LOOKS_RESPONSE = 1 << 2,
	LOOKS_TLS = 1 << 3,
	LOOK_FAILED = 1 << 4, /* no bytes, or memory that cannot be read */
	LOOKS_HEADERS = 1 << 5, /* perhaps a frame of HTTP/2 with a whole header block */
	LOOKS_HELLO = 1 << 6,   /* is_server_hello() */
};

/* A function of its own so that the verifier walks it once, not once per way in which the bytes were gathered. */
__noinline int judge(__u64 word, __u64 length)
{
	struct first_bytes first = { .word = word, .length = length };

	/* Empty lines in front of a request are no part of it (RFC 9112 section 2.2). */
	for (int i = 0; i < 2; i++) {
		if (first.length <= 2 || (first.word & BYTES(2)) != TEXT4('\r', '\n', 0, 0))
			break;
		first.word >>= 16;
		first.length -= 2;
	}
	if (first.word == PREFACE_WORD && !http2_enabled)
		return 0; /* the preface */
	if (looks_like_headers(word) && length >= 8 && http2_enabled)
		return LOOKS_HEADERS;
	return (is_request(&first) ? LOOKS_REQUEST : 0) | (is_common_request(&first) ? LOOKS_COMMON_REQUEST : 0) |
	       (is_response(&first) ? LOOKS_RESPONSE : 0) | (is_tls(&first) ? LOOKS_TLS : 0) |
	       (is_server_hello(&first) ? LOOKS_HELLO : 0);
}

/* `address` is that of the bytes, or of iov_count iovecs. Returns enum look. Global for the reason given at
 * absorb_iovecs().
 */
__noinline int look_at(__u64 address, __u64 iov_count, __u64 length)
{
	struct first_bytes first = {};

	if (!iov_count) {
		first.length = length < 8 ? length : 8;
		if (bpf_probe_read_user(&first.word, first.length, (void *)address))
			goto fault;
	}
	for (__u32 i = 0; i < 8; i++) {
		struct user_iovec iovec;
		__u64 word = 0, piece;

		if (i >= iov_count || first.length >= 8)
			break;
		if (!read_iovec(&iovec, address, i))
			goto fault;
		piece = 8 - first.length;
		if (iovec.length < piece)
			piece = iovec.length;
		if (!piece)
			continue;
		if (bpf_probe_read_user(&word, piece & 15, (void *)iovec.base))
			goto fault;
		first.word |= word << (8 * (first.length & 7));
		first.length += piece;
	}
	if (length < first.length) {
		/* More room in the iovecs than bytes moved: the rest is not data. */
		first.length = length;
		first.word &= (1ULL << (8 * (first.length & 7))) - 1;
	}
	if (!first.length)
		return LOOK_FAILED;
	return judge(first.word, first.length);
fault:
	count(COUNTER_READ_FAULT);
	return LOOK_FAILED;
}

static __always_inline int look(const struct transfer *transfer)
{
	return look_at(transfer->iov ? transfer->iov : transfer->buffer, transfer->iov ? transfer->iov_count : 0,
		       transfer->length);
}

static __always_inline void push_tail(struct connection *connection, __u64 buffer, __u64 length)
{
	__u64 word = 0;

	if (length >= 8) {
		connection->tail_valid = !bpf_probe_read_user(&connection->tail, 8, (void *)(buffer + length - 8));
	} else if (length) {
		__u32 few = length;

		/* Kernels before 6.8 do not see what the compiler knows of a value that it has put aside. */
		opaque(few);
		few &= 7;
		if (bpf_probe_read_user(&word, few, (void *)buffer)) {
			connection->tail_valid = 0;
			return;
		}
		connection->tail = connection->tail >> (8 * few) | word << (8 * (8 - few));
	}
}

/* Copies from user memory to the end of the data, at most up to `limit` bytes of data in all and COPY_SLACK in one
 * call. Returns the bytes copied.
 */
static __always_inline __u32 copy_piece(struct connection *connection, __u32 limit, __u64 buffer, __u64 length)
{
	__u64 offset = unfollowed(connection->data_length);
	__u64 piece, at;
	__u8 *to;

	if (offset >= limit)
		return 0;
	piece = limit - offset;
	if (length < piece)
		piece = length;
	if (piece > COPY_SLACK)
		piece = COPY_SLACK;
	/* Bounds next to their use, of values that live no longer: kernels before 6.8 forget those of what is put aside. */
	at = offset;
	opaque(at);
	if (at >= request_cap + response_cap)
		return 0;
	to = connection->data + at;
	opaque(piece);
	if (piece > COPY_SLACK || bpf_probe_read_user(to, piece, (void *)buffer))
		return 0;
	connection->data_length = offset + piece;
	return piece;
}

/* The two steps of absorb_iovecs(), functions of their own for the verifier's sake. */
__noinline int take_piece(__u64 sock, __u64 limit, __u64 buffer, __u64 length)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);

	return connection ? copy_piece(connection, limit, buffer, length) : 0;
}

__noinline int take_tail(__u64 sock, __u64 buffer, __u64 length)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);

	if (connection)
		push_tail(connection, buffer, length);
	return 0;
}

/* The many-buffers form of absorb(). One round copies one piece of one buffer, so that the loop stays flat. A global
 * function is verified once, not per call; before 5.12 (commit e5069b9c23b3) it may only take scalars.
 */
__noinline __u64 absorb_iovecs(__u64 sock, __u64 iov, __u64 iov_count, __u64 length, __u64 limit_and_tail)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);
	struct user_iovec iovec;

	if (!connection)
		return 0;
	connection->cursor_total = 0;
	connection->cursor_index = 0;
	connection->cursor_offset = 0;
	connection->cursor_limit = limit_and_tail >> 1;
	for (__u32 i = 0; i < IOVECS_MAX + 40; i++) {
		__u64 index = unfollowed(connection->cursor_index);
		__u64 offset = unfollowed(connection->cursor_offset);
		__u64 total = unfollowed(connection->cursor_total);
		__u64 available;

		if (index >= iov_count || total >= length)
			return total;
		if (!read_iovec(&iovec, iov, index)) {
			count(COUNTER_READ_FAULT);
			connection->tail_valid = 0;
			return total;
		}
		available = iovec.length;
		if (available > length - total)
			available = length - total;
		if ((limit_and_tail & 1) && !offset)
			take_tail(sock, iovec.base, available);
		if (offset < available) {
			__u32 piece = take_piece(sock, unfollowed(connection->cursor_limit), iovec.base + offset,
						 available - offset);

			if (piece && offset + piece < available) {
				connection->cursor_offset = offset + piece;
				continue;
			}
			if (!piece)
				connection->cursor_limit = 0; /* no room, or a fault: the rest is not contiguous */
		}
		connection->cursor_offset = 0;
		connection->cursor_index = index + 1;
		connection->cursor_total = total + available;
	}
	/* More buffers than the loop allows: what follows the last one seen is unknown. */
	connection->tail_valid = 0;
	return length == LENGTH_UNKNOWN ? connection->cursor_total : length;
}

/* The one-buffer form of absorb(), when the first copy was not enough or is not possible. Global, see above. */
__noinline int absorb_pieces(__u64 sock, __u64 buffer, __u64 length, __u64 limit)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);
	__u64 start;

	if (!connection)
		return 0;
	start = unfollowed(connection->data_length);
	for (__u32 i = 0; i < REQUEST_CAP_MAX / COPY_SLACK; i++) {
		__u64 done = unfollowed(connection->data_length) - start;

		if (done >= length || !copy_piece(connection, limit, buffer + done, length - done))
			break;
	}
	return 0;
}

/* Takes the bytes of a transfer: captures as many as there is room for below `limit` (0: none), follows the tail, and
 * returns the number of bytes of the transfer.
 */
static __always_inline __u64 absorb(struct connection *connection, struct transfer *transfer, __u64 sock, __u32 limit,
				     bool tail)
{
	if (transfer->iov)
		return absorb_iovecs(sock, transfer->iov, transfer->iov_count, transfer->length,
				     (__u64)limit << 1 | tail);
	if (limit && !connection->data_length) {
		__u64 length = limit;

		if (transfer->length < length)
			length = transfer->length;
		opaque(length);
		if (length <= request_cap && !bpf_probe_read_user(connection->data, length, (void *)transfer->buffer))
			connection->data_length = length;
		else
			count(COUNTER_READ_FAULT);
	} else if (limit) {
		__u32 piece = copy_piece(connection, limit, transfer->buffer, transfer->length);
		__u64 end = connection->data_length;

		opaque(end);
		if (piece == transfer->length && piece >= 8 && end >= 8 && end <= request_cap + response_cap) {
			/* All of it was captured: its end needs no reading of its own. */
			if (tail) {
				connection->tail = *(__u64 *)(connection->data + end - 8);
				connection->tail_valid = 1;
			}
			return transfer->length;
		}
		if (piece && piece < transfer->length)
			absorb_pieces(sock, transfer->buffer + piece, transfer->length - piece, limit);
	}
	if (tail)
		push_tail(connection, transfer->buffer, transfer->length);
	return transfer->length;
}

static __always_inline __u32 request_room(void)
{
	return request_limit < request_cap ? request_limit : request_cap;
}

static __always_inline __u32 response_room(void)
{
	return response_limit < response_cap ? response_limit : response_cap;
}

/* Sends the exchange to user space. `first` says that no record told of it before. */
static __always_inline bool emit(struct connection *connection, __u8 end, __u64 now, bool first)
{
	struct record_exchange *exchange = &connection->exchange;
	__u64 length = connection->data_length, flags = wakeup_flags();

	exchange->end = end;
	exchange->end_ns = now;
	exchange->flags &= ~(FLAG_FIRST | FLAG_REQUEST_TRUNCATED | FLAG_RESPONSE_TRUNCATED | FLAG_TAIL_VALID);
	if (first)
		exchange->flags |= FLAG_FIRST;
	if (connection->state == STATE_REQUEST)
		exchange->request_captured = length;
	exchange->response_captured = length - exchange->request_captured;
	if (exchange->request_bytes > exchange->request_captured)
		exchange->flags |= FLAG_REQUEST_TRUNCATED;
	if (exchange->response_bytes > exchange->response_captured)
		exchange->flags |= FLAG_RESPONSE_TRUNCATED;
	if (connection->tail_valid)
		exchange->flags |= FLAG_TAIL_VALID;
	__builtin_memcpy(exchange->tail, &connection->tail, 8);
	/* No call between the bound and its use: kernels before 5.13 forget the bounds of what is put aside for it. */
	opaque(length);
	if (length > request_cap + response_cap)
		length = request_cap + response_cap;
	if (bpf_ringbuf_output(&records, exchange, sizeof(*exchange) + length, flags))
		return false;
	return true;
}

/* Tells that a connection ended whose exchange was reported before, or that is in stream mode. */
static __always_inline bool send_close(const struct connection *connection, __u8 end, __u32 flags, __u64 now)
{
	struct record_close close = {
		.kind = RECORD_CLOSE,
		.role = connection->exchange.role,
		.end = end,
		.flags = flags,
		.connection_id = connection->exchange.connection_id,
		.exchange_id = connection->exchange.exchange_id,
		.time_ns = now,
	};

	return !bpf_ringbuf_output(&records, &close, sizeof(close), BPF_RB_NO_WAKEUP);
}

/* Closes the books of the current exchange: a last record unless the last one still tells everything. */
static __always_inline void finish(struct connection *connection, __u8 end, __u64 now)
{
	bool first = !connection->reports;

	if (first) {
		if (emit(connection, end, now, true))
			count(COUNTER_EMITTED);
		else
			count(COUNTER_DROPPED_RING_FULL);
	} else if (connection->reported_bytes != connection->exchange.response_bytes ||
		   connection->state == STATE_REQUEST) {
		count(emit(connection, end, now, false) ? COUNTER_REEMITTED : COUNTER_REEMIT_LOST);
	} else if (end != END_NEXT && !send_close(connection, end, connection->exchange.flags & ~FLAG_STREAM, now)) {
		count(COUNTER_CLOSES_LOST);
	}
	connection->state = STATE_IDLE;
}

/* Tells that a connection in stream mode ended. User space accounts for what it was told of. */
static __always_inline void finish_stream(struct connection *connection, __u8 end, __u64 now)
{
	if (send_close(connection, end, connection->exchange.flags | FLAG_STREAM, now))
		return;
	count(COUNTER_CLOSES_LOST);
	if (!connection->told && !connection->reports)
		count(COUNTER_STREAMS_UNTOLD);
}

/* The connection ended: closes the books of what is under way on it. */
static __always_inline void finish_connection(struct connection *connection, __u8 end, __u64 now)
{
	if (connection->lingers) {
		end = connection->closed_end;
		now = connection->closed_ns;
	}
	if (connection->mode == MODE_STREAM)
		finish_stream(connection, end, now);
	else if (connection->mode == MODE_EXCHANGE && connection->state != STATE_IDLE)
		finish(connection, end, now);
}

/* Gives up an exchange that was never reported as a span: counted, and nothing is sent, unless user space knows of it. */
static __always_inline void abandon(struct connection *connection, __u32 counter, __u64 now)
{
	if (connection->reports)
		finish(connection, END_TIMED_OUT, now);
	else
		count(counter);
	connection->state = STATE_IDLE;
}

/* A thread that serves a socket does not have an event loop watch it meanwhile. */
static __always_inline bool is_watched(__u64 sock)
{
	struct file *file = BPF_CORE_READ((struct sock *)sock, sk_socket, file);

	return bpf_core_field_exists(file->f_ep) && BPF_CORE_READ(file, f_ep);
}

/* The server exchange that the current thread is serving, when that is beyond doubt: the thread read its request
 * last, has not waited for events since, no event loop watches the connection, and no response byte was sent.
 */
static __always_inline __u64 serving_exchange(__u32 tgid, __u32 tid)
{
	struct thread *thread = bpf_map_lookup_elem(&threads, &tid);
	struct connection *served;
	__u64 exchange_id, sock;

	if (!thread || thread->multiplexes || thread->tgid != tgid || !thread->exchange_id)
		return 0;
	exchange_id = thread->exchange_id;
	sock = thread->sock;
	served = bpf_map_lookup_elem(&connections, &sock);
	if (!served || served->exchange.exchange_id != exchange_id || served->state != STATE_REQUEST || is_watched(sock))
		return 0;
	return exchange_id;
}

/* True while the exchange that the thread read last has no response. */
static __always_inline bool is_unanswered(const struct thread *thread)
{
	struct connection *served;
	__u64 sock = thread->sock;

	if (!thread->exchange_id)
		return false;
	served = bpf_map_lookup_elem(&connections, &sock);
	return served && served->exchange.exchange_id == thread->exchange_id && served->state == STATE_REQUEST;
}

static __always_inline void remember_serving(__u64 sock, __u64 exchange_id, __u32 tgid, __u32 tid)
{
	struct thread *thread = bpf_map_lookup_elem(&threads, &tid);

	if (thread && thread->tgid == tgid) {
		if (thread->multiplexes)
			return;
		if (is_unanswered(thread)) {
			thread->multiplexes = 1;
			return;
		}
		thread->exchange_id = exchange_id;
		thread->sock = sock;
	} else {
		struct thread fresh = { .exchange_id = exchange_id, .sock = sock, .tgid = tgid };

		if (bpf_map_update_elem(&threads, &tid, &fresh, BPF_ANY))
			count(COUNTER_THREAD_FULL);
	}
}

/* The server received what the client sent: its next expected byte lies between what the client has been acknowledged
 * and what it has written. Initial sequence numbers are random, so that equal addresses elsewhere do not pass. The
 * order of the reads matters: each number can only have grown past the one before.
 */
static __always_inline bool is_other_end(__u64 server, __u64 client)
{
	__u32 acknowledged = BPF_CORE_READ((struct tcp_sock *)client, snd_una);
	__u32 received = BPF_CORE_READ((struct tcp_sock *)server, rcv_nxt);
	__u32 written = BPF_CORE_READ((struct tcp_sock *)client, write_seq);

	return received - acknowledged <= written - acknowledged;
}

/* The client exchange at the other end of this server's connection, or 0. */
static __always_inline __u64 peer_exchange(struct connection *connection, __u64 server)
{
	struct record_exchange *exchange = &connection->exchange;
	struct connection *peer;
	__u64 sock = connection->peer_sock;

	if (!sock) {
		struct endpoint endpoint;
		__u64 *found;

		if (connection->peer_tries >= 3)
			return 0;
		endpoint_of(&endpoint, exchange->remote_address, exchange->remote_port, exchange->netns,
			    exchange->local_port);
		found = bpf_map_lookup_elem(&endpoints, &endpoint);
		if (!found) {
			endpoint.server_port = 0;
			found = bpf_map_lookup_elem(&endpoints, &endpoint);
		}
		if (!found) {
			connection->peer_tries++;
			return 0;
		}
		sock = *found;
	}
	peer = bpf_map_lookup_elem(&connections, &sock);
	if (!peer || peer->state != STATE_REQUEST || peer->mode != MODE_EXCHANGE || peer->exchange.role != ROLE_CLIENT)
		return 0;
	/* A recycled socket: the other end must have sent these bytes. */
	if (peer->data_length >= 16 && connection->data_length >= 16 &&
	    (((__u64 *)peer->data)[0] != ((__u64 *)connection->data)[0] ||
	     ((__u64 *)peer->data)[1] != ((__u64 *)connection->data)[1]))
		return 0;
	if (connection->peer_sock) {
		if (connection->peer_connection_id != peer->exchange.connection_id)
			return 0;
	} else {
		if (!is_other_end(server, sock)) {
			connection->peer_tries++;
			return 0;
		}
		connection->peer_sock = sock;
		connection->peer_connection_id = peer->exchange.connection_id;
	}
	if (peer->claimed_id == peer->exchange.exchange_id)
		return 0; /* pipelining that was not noticed: the client's exchange is several of ours */
	peer->claimed_id = peer->exchange.exchange_id;
	return peer->exchange.exchange_id;
}

/* Tells user space, once, that the client's end of a server's HTTP/2 connection is on this node: the streams of the two
 * have the same numbers. Global for the reason given at absorb_iovecs().
 */
__noinline int tell_peer(__u64 sock)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);
	struct record_peer record = { .kind = RECORD_PEER };
	struct endpoint endpoint;
	struct connection *peer;
	__u64 *found, peer_sock;

	if (!connection)
		return 0;
	connection->peer_tries++;
	endpoint_of(&endpoint, connection->exchange.remote_address, connection->exchange.remote_port,
		    connection->exchange.netns, connection->exchange.local_port);
	found = bpf_map_lookup_elem(&endpoints, &endpoint);
	if (!found) {
		endpoint.server_port = 0;
		found = bpf_map_lookup_elem(&endpoints, &endpoint);
		if (!found)
			return 0;
	}
	peer_sock = *found;
	peer = bpf_map_lookup_elem(&connections, &peer_sock);
	if (!peer || !peer->http2 || peer->exchange.role != ROLE_CLIENT || !is_other_end(sock, peer_sock))
		return 0;
	connection->peer_connection_id = peer->exchange.connection_id;
	record.connection_id = connection->exchange.connection_id;
	record.peer_connection_id = connection->peer_connection_id;
	if (bpf_ringbuf_output(&records, &record, sizeof(record), BPF_RB_NO_WAKEUP))
		count(COUNTER_PEERS_LOST);
	return 0;
}

/* Whether the current process is captured. *process is its entry, or 0 when nothing is known of it yet. */
static __always_inline bool is_captured(__u64 pid_tgid, struct process **process)
{
	__u32 tgid = pid_tgid >> 32;

	*process = bpf_map_lookup_elem(&processes, &tgid);
	return !*process || (*process)->state != PROCESS_IGNORED;
}

/* The memory controller's cgroup of a task where that controller has a hierarchy of its own (cgroup v1), else 0. There
 * runtimes may leave a container's processes in their own cgroup of v2.
 */
static __always_inline struct cgroup *memory_cgroup(struct css_set *set, struct cgroup *unified)
{
	struct cgroup_subsys_state *state = 0;
	struct cgroup *cgroup;
	const void *place;

	if (!bpf_core_enum_value_exists(enum cgroup_subsys_id, memory_cgrp_id))
		return 0;
	place = (const void *)set + bpf_core_field_offset(struct css_set, subsys) +
		sizeof(state) * bpf_core_enum_value(enum cgroup_subsys_id, memory_cgrp_id);
	if (bpf_probe_read_kernel(&state, sizeof(state), place))
		return 0;
	cgroup = BPF_CORE_READ(state, cgroup);
	return BPF_CORE_READ(cgroup, root) == BPF_CORE_READ(unified, root) ? 0 : cgroup;
}

/* Appends the names of a cgroup and of those above it. Returns their bytes, 0 when they are too many. */
static __always_inline __u16 tell_names(struct process_scratch *scratch, struct cgroup *cgroup)
{
	__u64 start = scratch->names_bytes;

	for (int i = 0; i <= CGROUP_LEVELS; i++) {
		const char *name = BPF_CORE_READ(cgroup, kn, name);
		bool is_root = !BPF_CORE_READ(cgroup, level);
		__u64 at = unfollowed(scratch->names_bytes);
		long length;

		opaque(at); /* no call between the bound and its use, see emit() */
		if (at > CGROUP_NAMES_CAP)
			break;
		if (is_root) {
			scratch->names[at] = 0;
			scratch->names_bytes = at + 1;
			return at + 1 - start;
		}
		length = bpf_probe_read_kernel_str(scratch->names + at, CGROUP_NAME_MAX, name);
		if (length <= 1)
			break;
		scratch->names_bytes = at + length;
		cgroup = BPF_CORE_READ(cgroup, self.parent, cgroup);
	}
	scratch->names_bytes = start;
	return 0;
}

/* Tells user space of a process that it has not decided on, once, with all that may be gone when user space looks.
 * Global for the reason given at absorb_iovecs().
 */
__noinline int tell_process(__u32 tgid)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct task_struct *leader = BPF_CORE_READ(task, group_leader);
	struct css_set *set = BPF_CORE_READ(task, cgroups);
	struct cgroup *cgroup = BPF_CORE_READ(set, dfl_cgrp), *other = memory_cgroup(set, cgroup);
	struct process process = { .start_ns = BPF_CORE_READ(leader, start_boottime) };
	const unsigned char *name = BPF_CORE_READ(leader, mm, exe_file, f_path.dentry, d_name.name);
	struct process_scratch *scratch;
	struct record_process *record;
	__u32 zero = 0;
	__u64 length;

	scratch = bpf_map_lookup_elem(&process_scratch, &zero);
	if (!scratch)
		return 0;
	scratch->owner = bpf_get_current_pid_tgid();
	record = &scratch->record;
	record->kind = RECORD_PROCESS;
	record->tgid = tgid;
	record->start_ns = process.start_ns;
	record->uid = bpf_get_current_uid_gid();
	record->ppid = BPF_CORE_READ(leader, real_parent, tgid);
	BPF_CORE_READ_STR_INTO(&record->comm, leader, comm);
	record->executable[0] = 0;
	if (bpf_probe_read_kernel_str(record->executable, sizeof(record->executable), name) < 0)
		count(COUNTER_READ_FAULT);
	scratch->names_bytes = 0;
	record->cgroup_bytes = tell_names(scratch, cgroup);
	record->memory_cgroup_bytes = other ? tell_names(scratch, other) : 0;
	length = unfollowed(scratch->names_bytes);
	opaque(length);
	length &= sizeof(scratch->names) - 1; /* for the verifier: it is less */
	if (scratch->owner != (__u32)bpf_get_current_pid_tgid())
		return 0; /* preempted by another one, see SCRATCHES: the next exchange tells of it */
	/* Woken at once: a short-lived process may be gone from /proc soon. */
	if (bpf_ringbuf_output(&records, record, sizeof(*record) + length, BPF_RB_FORCE_WAKEUP))
		count(COUNTER_PROCESSES_LOST);
	if (bpf_map_update_elem(&processes, &tgid, &process, BPF_ANY))
		count(COUNTER_PROCESS_FULL);
	return 0;
}

/* Tells of a process, and returns its entry. */
static __always_inline struct process *announce_process(__u32 tgid)
{
	tell_process(tgid);
	return bpf_map_lookup_elem(&processes, &tgid);
}

/* Starts an exchange; the captured bytes of its first segment are in place already. */
static __always_inline void begin(struct connection *connection, struct process *process, __u64 sock, __u64 now,
				  __u64 pid_tgid)
{
	struct record_exchange *exchange = &connection->exchange;
	__u32 tgid = pid_tgid >> 32, tid = pid_tgid;

	count(COUNTER_BEGUN);
	if (!process)
		process = announce_process(tgid);
	exchange->flags = connection->tls ? FLAG_TLS : 0;
	exchange->process_start_ns = 0;
	if (process) {
		exchange->process_start_ns = process->start_ns;
		if (process->state == PROCESS_UNKNOWN)
			exchange->flags |= FLAG_PROCESS_UNKNOWN;
	}
	exchange->exchange_id = random_id();
	exchange->parent_id = 0;
	exchange->peer_id = 0;
	exchange->request_start_ns = now;
	exchange->request_end_ns = now;
	exchange->response_start_ns = 0;
	exchange->response_end_ns = 0;
	exchange->response_bytes = 0;
	connection->stream_offsets[1] = 0;
	exchange->tgid = tgid;
	exchange->request_tid = tid;
	exchange->response_tid = 0;
	connection->state = STATE_REQUEST;
	connection->reports = 0;
	connection->reported_bytes = 0;
	connection->tail = 0;
	connection->tail_valid = 1;
	if (exchange->role == ROLE_SERVER) {
		if (process)
			process->served = 1;
		exchange->peer_id = peer_exchange(connection, sock);
		remember_serving(sock, exchange->exchange_id, tgid, tid);
	} else {
		exchange->parent_id = serving_exchange(tgid, tid);
		if (!process || !process->served)
			exchange->flags |= FLAG_CLIENT_ONLY;
	}
}

/* HEAD, GET, DELETE and OPTIONS requests normally have no body. */
static __always_inline bool is_bodyless(const struct connection *connection)
{
	__u8 byte = connection->data[0];

	return byte == 'G' || byte == 'H' || byte == 'D' || byte == 'O';
}

/* A request whose head is longer than this is not searched for a second one behind it. */
#define PIPELINE_SCAN 1024
#define CRLFCRLF TEXT4('\r', '\n', '\r', '\n')

/* A request line ends somewhere behind `from` in the captured bytes, or they are HTTP/2's. Of any four bytes in a row of
 * "P/1." every fourth byte of the data is one. Global for the reason given at absorb_iovecs().
 */
__noinline int holds_request_line(__u64 sock, __u64 from)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);
	__u64 length;

	if (!connection)
		return 0;
	length = connection->data_length;
	if (from == PREFACE_HEAD_BYTES && *(__u64 *)connection->data == PREFACE_WORD &&
	    *(__u64 *)(connection->data + 8) == TEXT8('T', 'P', '/', '2', '.', '0', '\r', '\n')) {
		begin_frames(connection, 0);
		return 1;
	}
	connection->cursor_index = from + 8;
	for (__u32 round = 0; round < PIPELINE_SCAN / 4; round++) {
		__u64 i = unfollowed(connection->cursor_index), word = 0, start;
		__u16 line_end = 0;

		if (i < 8 || i + 6 >= length || i >= request_cap)
			break;
		connection->cursor_index = i + 4;
		switch (connection->data[i]) {
		case 'P':
			start = i - 4;
			break;
		case '/':
			start = i - 5;
			break;
		case '1':
			start = i - 6;
			break;
		case '.':
			start = i - 7;
			break;
		default:
			continue;
		}
		if (bpf_probe_read_kernel(&word, 8, connection->data + start) ||
		    word != TEXT8(' ', 'H', 'T', 'T', 'P', '/', '1', '.'))
			continue;
		if (!bpf_probe_read_kernel(&line_end, 2, connection->data + start + 9) && line_end == 0x0a0d)
			return 1;
	}
	return 0;
}

/* The preface of HTTP/2 came in pieces (Go's server reads it so) and is whole now: what came `before` the transfer at hand
 * is forwarded first. Global for the reason given at absorb_iovecs().
 */
__noinline int ends_preface(__u64 sock, __u64 before)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);

	if (!connection || before >= PREFACE_BYTES || connection->data_length < PREFACE_BYTES ||
	    *(__u64 *)(connection->data + 8) != TEXT8('T', 'P', '/', '2', '.', '0', '\r', '\n') ||
	    *(__u64 *)(connection->data + 16) != TEXT8('\r', '\n', 'S', 'M', '\r', '\n', '\r', '\n'))
		return 0;
	begin_frames(connection, before);
	connection->exchange.request_bytes = before;
	connection->data_length = before;
	return 1;
}

/* Another request stands behind the first one in the captured bytes, or HTTP/2. Every fourth byte is looked at: the four
 * bytes of a blank line always include one of them.
 */
static __always_inline int holds_second_request(struct connection *connection, __u64 sock)
{
	struct first_bytes first = { .length = 8 };
	__u64 length, behind;

	length = connection->data_length;
	connection->cursor_offset = 0;
	for (__u64 i = 15; i < PIPELINE_SCAN; i += 4) { /* what comes before are empty lines in front of the first one */
		if (i + 9 > length || i >= request_cap)
			break;
		if (connection->data[i] != '\r' && connection->data[i] != '\n')
			continue;
		/* One of the four windows that hold byte i is the blank line. */
		if (*(__u32 *)(connection->data + i - 3) == CRLFCRLF)
			connection->cursor_offset = i + 1;
		else if (*(__u32 *)(connection->data + i - 2) == CRLFCRLF)
			connection->cursor_offset = i + 2;
		else if (*(__u32 *)(connection->data + i - 1) == CRLFCRLF)
			connection->cursor_offset = i + 3;
		else if (*(__u32 *)(connection->data + i) == CRLFCRLF)
			connection->cursor_offset = i + 4;
		else
			continue;
		break;
	}
	behind = unfollowed(connection->cursor_offset);
	if (!behind || behind >= request_cap)
		return 0;
	if (!is_bodyless(connection))
		return holds_request_line(sock, behind);
	if (behind + 8 > length || bpf_probe_read_kernel(&first.word, 8, connection->data + behind))
		return 0;
	return is_common_request(&first);
}

/* The captured request ends in a blank line: what comes next in its direction is a body or another request. Behind it may
 * stand what another CPU has just captured of the response.
 */
static __always_inline bool ends_in_blank_line(struct connection *connection)
{
	__u64 length = connection->exchange.request_bytes;
	__u8 *end;

	opaque(length);
	if (length < 4 || length > request_cap || length > request_limit || length > connection->data_length)
		return false;
	end = connection->data + length - 4;
	return end[0] == '\r' && end[1] == '\n' && end[2] == '\r' && end[3] == '\n';
}

/* Forwards bytes of a connection in stream mode: `address` is that of the bytes, or of iov_count iovecs, or 0 for bytes
 * that never were in user memory. Global for the reason given at absorb_iovecs().
 */
__noinline int stream_segment(__u64 sock, __u64 address, __u64 iov_count, __u64 length, __u64 response)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);
	struct segment_scratch *scratch;
	struct user_iovec iovec = { .base = address, .length = length };
	__u64 *sent, captured, now;

	if (!connection)
		return 0;
	sent = &connection->stream_offsets[response ? 1 : 0];
	scratch = claim_scratch();
	if (!scratch) {
		*sent += length;
		return 0;
	}
	now = response ? 0 : connection->walks[0].entered_ns; /* before the other end can have read it */
	fill_segment(scratch, connection, response ? DIRECTION_RESPONSE : DIRECTION_REQUEST, now ? now : bpf_ktime_get_ns());
	connection->cursor_index = 0;
	connection->cursor_offset = 0;
	for (__u32 i = 0; i < 64; i++) {
		__u64 index = unfollowed(connection->cursor_index);
		__u64 offset = unfollowed(connection->cursor_offset);
		__u64 piece = COPY_SLACK;

		captured = unfollowed(scratch->record.captured);
		if (!address || captured >= SEGMENT_CAP || captured >= length)
			break;
		if (iov_count) {
			if (index >= iov_count || !read_iovec(&iovec, address, index))
				break;
			if (offset >= iovec.length) {
				connection->cursor_index = index + 1;
				connection->cursor_offset = 0;
				continue;
			}
		}
		if (iovec.length - offset < piece)
			piece = iovec.length - offset;
		if (length - captured < piece)
			piece = length - captured;
		opaque(piece);
		if (piece > COPY_SLACK ||
		    bpf_probe_read_user(scratch->data + captured, piece, (void *)(iovec.base + offset))) {
			count(COUNTER_READ_FAULT);
			break;
		}
		scratch->record.captured = captured + piece;
		connection->cursor_offset = offset + piece;
	}
	if (scratch->record.captured > SEGMENT_CAP)
		scratch->record.captured = SEGMENT_CAP;
	send_segment(connection, scratch, sent, length);
	release_scratch(scratch);
	return 0;
}

/* Segments made of one plain buffer: many pipelined responses are read at once. What is longer is mostly a body. */
#define SEGMENTS_PER_TRANSFER 4

__noinline int stream_buffer(__u64 sock, __u64 buffer, __u64 length, __u64 response)
{
	for (int i = 1; i < SEGMENTS_PER_TRANSFER && length > SEGMENT_CAP; i++) {
		stream_segment(sock, buffer, 0, SEGMENT_CAP, response);
		buffer += SEGMENT_CAP;
		length -= SEGMENT_CAP;
	}
	return stream_segment(sock, buffer, 0, length, response);
}

static __always_inline void stream_transfer(struct connection *connection, const struct transfer *transfer, bool response)
{
	__u64 sock = connection->sock;

	if (connection->http2)
		walk_transfer(sock, transfer->iov ? transfer->iov : transfer->buffer, transfer->iov ? transfer->iov_count : 0,
			      transfer->length, response);
	else if (transfer->iov)
		stream_segment(sock, transfer->iov, transfer->iov_count, transfer->length, response);
	else
		stream_buffer(sock, transfer->buffer, transfer->length, response);
	if (!response)
		connection->walks[0].entered_ns = 0; /* last: SEGMENT_OVERTAKES */
}

/* A write is entered in stream mode: it is told of when it returns. */
static __always_inline void enter_stream_write(struct connection *connection, __u64 offered, __u64 pid_tgid)
{
	connection->write_tid = pid_tgid;
	connection->write_kind = WRITE_STREAM;
	connection->write_offered = offered;
}

/* A write returned in stream mode: what it moved is told of now, unless it was before the mode changed. */
static __always_inline void stream_write(struct connection *connection, struct transfer *transfer, long moved, __u64 pid_tgid)
{
	bool response = connection->exchange.role == ROLE_SERVER;

	if (connection->write_tid == (__u32)pid_tgid && connection->write_kind != WRITE_STREAM) {
		if (connection->write_kind == WRITE_REQUEST ||
		    connection->undo_exchange_id != connection->exchange.exchange_id)
			return;
		/* The response of the first request in this mode. stream_answer() may have told of it: at this place. */
		connection->stream_offsets[1] = 0;
	}
	connection->write_tid = 0;
	transfer->length = moved;
	if (moved > 0)
		stream_transfer(connection, transfer, response);
	else if (!response)
		connection->walks[0].entered_ns = 0;
}

/* Forwards a response that was handled as an exchange's while the connection was put into stream mode. Global for the
 * reason given at absorb_iovecs().
 */
__noinline int stream_answer(__u64 sock)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);
	struct segment_scratch *scratch;
	__u64 captured, start, offset = 0;

	if (!connection)
		return 0;
	scratch = claim_scratch();
	if (!scratch)
		return 0;
	fill_segment(scratch, connection, DIRECTION_RESPONSE, connection->exchange.response_start_ns);
	scratch->record.tid = connection->exchange.response_tid;
	start = unfollowed(connection->exchange.request_captured);
	captured = unfollowed(connection->data_length) - start;
	opaque(start);
	if (start > request_cap)
		start = request_cap;
	opaque(captured);
	if (captured > response_cap) /* nothing of the kind when it began before it was told of */
		captured = 0;
	if (captured > SEGMENT_CAP)
		captured = SEGMENT_CAP;
	if (bpf_probe_read_kernel(scratch->data, captured, connection->data + start))
		captured = 0;
	scratch->record.captured = captured;
	send_segment(connection, scratch, &offset, connection->exchange.response_bytes);
	release_scratch(scratch);
	return 0;
}

/* A full barrier on x86: what was stored before is seen by whoever stores behind a barrier of its own what is read next. */
static __always_inline void fence(void)
{
	volatile __u64 here = 0;

	__sync_fetch_and_add(&here, 1);
}

/* Puts a pipelined connection into stream mode. The bytes captured so far become its first request segment.
 *
 * Another CPU may be at the response meanwhile, in on_response_bytes(). Either it sees the new mode when it has stored
 * its state, and forwards the response (a write: when it returns), or its state is seen here, and the response is
 * forwarded here. Where both hold, both tell of the same bytes at the same place, and user space takes them once. The
 * request comes first: what answers it follows.
 */
static __always_inline void enter_stream_mode(struct connection *connection)
{
	struct record_exchange *exchange = &connection->exchange;
	struct segment_scratch *scratch;
	__u64 length = exchange->request_bytes;
	__u64 captured = connection->data_length;

	count_stream(); /* first: from now on writes do not return unseen */
	count(COUNTER_STREAMED);
	scratch = length ? claim_scratch() : 0;
	if (scratch) {
		__u64 offset = 0;

		fill_segment(scratch, connection, DIRECTION_REQUEST, exchange->request_start_ns);
		if (captured > length) /* a response that is being handled is captured behind the request */
			captured = length;
		opaque(captured);
		if (captured > request_cap)
			captured = request_cap;
		if (captured > SEGMENT_CAP)
			captured = SEGMENT_CAP;
		if (bpf_probe_read_kernel(scratch->data, captured, connection->data))
			captured = 0;
		scratch->record.captured = captured;
		send_segment(connection, scratch, &offset, length);
		release_scratch(scratch);
	}
	connection->stream_offsets[0] = length;
	connection->mode = MODE_STREAM;
	fence();
	if (unfollowed(connection->state) == STATE_RESPONSE && !connection->http2)
		stream_answer(connection->sock);
	connection->state = STATE_IDLE;
}

/* What a line of the head of a response, 101, says of HTTP/2. */
enum upgrade_line {
	LINE_OTHER,
	LINE_UPGRADES, /* Upgrade: h2c */
	LINE_ENDS,     /* the blank line */
};

/* Returns enum upgrade_line for the captured line that begins at `from`. A function of its own so that the verifier
 * walks it once, not once per line.
 */
__noinline int read_upgrade_line(__u64 sock, __u64 from)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);
	const __u64 spaces = TEXT8(' ', ' ', ' ', ' ', ' ', ' ', ' ', ' ');
	__u64 line[2] = {}, value;

	opaque(from); /* the room behind the two captures is enough for what is read */
	if (!connection || from > request_cap + response_cap ||
	    bpf_probe_read_kernel(line, sizeof(line), connection->data + from))
		return LINE_OTHER;
	if ((line[0] & BYTES(2)) == TEXT4('\r', '\n', 0, 0))
		return LINE_ENDS;
	if ((line[0] | spaces) != TEXT8('u', 'p', 'g', 'r', 'a', 'd', 'e', ':')) /* in any case */
		return LINE_OTHER;
	value = line[1];
	for (int i = 0; i < 4; i++) {
		if ((__u8)value == ' ' || (__u8)value == '\t')
			value >>= 8;
	}
	if (((value | spaces) & BYTES(3)) != TEXT4('h', '2', 'c', 0))
		return LINE_OTHER;
	value = value >> 24 & 0xff;
	return value <= ' ' || value == ',' ? LINE_UPGRADES : LINE_OTHER;
}

/* So much of the head of a response, 101, is searched for what it switches to. */
#define UPGRADE_LINES 16
#define UPGRADE_LINE_BYTES 128

/* Moves the cursor behind the end of a captured line. Returns 0 where none ends. A function of its own for the reason
 * given above.
 */
__noinline int pass_line(__u64 sock)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);

	if (!connection)
		return 0;
	for (__u32 i = 0; i < UPGRADE_LINE_BYTES; i++) {
		__u64 at = unfollowed(connection->cursor_index);

		if (at >= connection->data_length || at >= request_cap + response_cap)
			break;
		connection->cursor_index = at + 1;
		if (connection->data[at] == '\n')
			return 1;
	}
	return 0;
}

/* The bytes of the head of the captured response, 101, when that switches to HTTP/2 (RFC 7540 section 3.2), else 0.
 * Global for the reason given at absorb_iovecs().
 */
__noinline int upgrade_head(__u64 sock)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);

	if (!connection)
		return 0;
	connection->cursor_index = connection->exchange.request_captured;
	connection->cursor_total = 0; /* 1: the line was seen */
	for (__u32 i = 0; i < UPGRADE_LINES; i++) {
		if (!pass_line(sock))
			break;
		switch (read_upgrade_line(sock, connection->cursor_index)) {
		case LINE_UPGRADES:
			connection->cursor_total = 1;
			break;
		case LINE_ENDS:
			if (!connection->cursor_total || !pass_line(sock))
				return 0;
			return connection->cursor_index - connection->exchange.request_captured;
		}
	}
	return 0;
}

/* Follows the connection as one of HTTP/2 when the captured response, 101, switches to it: then the frames of the
 * responses begin behind its head, and those of the requests with the preface. Global for the reason given at
 * absorb_iovecs().
 */
__noinline int switch_to_frames(__u64 sock)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);
	struct record_exchange *exchange;
	__u32 head;

	if (!connection || !http2_enabled)
		return 0;
	head = upgrade_head(sock);
	if (!head)
		return 0;
	exchange = &connection->exchange;
	connection->mode = MODE_STREAM; /* first: the sweep may just be about to report the exchange */
	connection->state = STATE_IDLE;
	exchange->kind = RECORD_UPGRADE; /* it is the last one of an exchange */
	exchange->response_bytes = head;
	connection->data_length = exchange->request_captured + head;
	connection->tail_valid = 0;
	connection->stream_offsets[1] = 0;
	connection->told = emit(connection, END_HANDED_OVER, exchange->response_end_ns, !connection->reports);
	if (!connection->told)
		count(COUNTER_SEGMENTS_LOST);
	begin_frames(connection, 0);
	connection->walks[0].entered_ns = 0;
	connection->walks[1].left = head; /* like a frame that is left out */
	connection->walks[1].passed = 1;
	connection->peer_connection_id = 0; /* looked for again: the client's end may not have seen the response yet */
	exchange->request_bytes = 0;
	enter_stream_mode(connection);
	return 1;
}

static __always_inline void undo_point(struct connection *connection, bool response, __u32 tid)
{
	connection->write_tid = tid;
	connection->write_kind = response ? WRITE_RESPONSE : WRITE_REQUEST;
	connection->undo_state = connection->state;
	connection->undo_data_length = connection->data_length;
	connection->undo_tail = connection->tail;
	connection->undo_tail_valid = connection->tail_valid;
	connection->undo_end_ns = response ? connection->exchange.response_end_ns : connection->exchange.request_end_ns;
}

static __always_inline bool port_selected(const struct record_exchange *exchange)
{
	__u16 port = exchange->role == ROLE_SERVER ? exchange->local_port : exchange->remote_port;
	__u8 *selected = bpf_map_lookup_elem(&ports, &port);

	return selected ? *selected : ports_default;
}

/* Judges a connection by its port. A connection that is passed over is not tracked until the selection changes. */
static __always_inline bool passes_over(struct connection *connection)
{
	connection->ports_generation = ports_generation;
	connection->passed_over = ports_filtered && !port_selected(&connection->exchange);
	if (!connection->passed_over)
		return false;
	count(COUNTER_IGNORED_PORT);
	connection->mode = MODE_IGNORED;
	return true;
}

/* Request bytes went by, or are about to. `process` is looked up here when `lazy`. */
static __always_inline void on_request_bytes(struct connection *connection, struct process *process, bool lazy,
					     struct transfer *transfer, __u64 sock, __u64 now, __u64 pid_tgid, bool entering)
{
	struct record_exchange *exchange = &connection->exchange;
	__u64 length;
	__u8 state;
	bool starts;
	int looks;

	looks = look(transfer);
	if (looks & LOOK_FAILED)
		return;
	state = unfollowed(connection->state); /* once: the response may be under way on another CPU */
	starts = state == STATE_IDLE;
	if (state == STATE_RESPONSE && (looks & LOOKS_REQUEST)) {
		/* Request bytes after an interim response only are a body (RFC 9110 section 15.2.1). */
		finish(connection, END_NEXT, now);
		connection->follows = 1;
		starts = true;
	} else if (starts && !(looks & LOOKS_REQUEST)) {
		count(COUNTER_IGNORED_OTHER);
		return;
	}
	if (starts && connection->ports_generation != (__u32)ports_generation && passes_over(connection))
		return;
	if (starts && lazy && !is_captured(pid_tgid, &process))
		return;
	/* Behind a request that may have a body this may still be a part of it, which user space tells by its framing. */
	if (state == STATE_REQUEST && (looks & LOOKS_COMMON_REQUEST) &&
	    (!is_bodyless(connection) || ends_in_blank_line(connection))) {
		enter_stream_mode(connection);
		if (entering) {
			enter_stream_write(connection, transfer->length, pid_tgid);
			connection->walks[0].entered_ns = now;
		} else {
			stream_transfer(connection, transfer, false);
		}
		return;
	}
	if (entering)
		undo_point(connection, false, pid_tgid);
	if (starts) {
		connection->data_length = 0;
		exchange->request_bytes = 0;
		exchange->request_captured = 0;
		length = absorb(connection, transfer, sock, request_room(), false);
		begin(connection, process, sock, now, pid_tgid);
	} else if (state == STATE_REQUEST) {
		/* Capture only while nothing is missing in between. */
		length = absorb(connection, transfer, sock,
				connection->data_length == exchange->request_bytes ? request_room() : 0, false);
	} else {
		length = absorb(connection, transfer, sock, 0, false);
	}
	exchange->request_bytes += length;
	exchange->request_end_ns = now;
	if (entering) {
		connection->write_offered = length;
		connection->undo_exchange_id = exchange->exchange_id;
	}
	if (connection->data_length >= PREFACE_BYTES &&
	    (starts ? holds_second_request(connection, sock) :
		      *(__u64 *)connection->data == PREFACE_WORD && ends_preface(sock, exchange->request_bytes - length))) {
		/* Forwarded whole, below or, so that a short write is not counted twice, when the write returns. */
		if (starts) {
			exchange->request_bytes = 0;
			connection->data_length = 0;
		}
		enter_stream_mode(connection);
		if (entering) {
			enter_stream_write(connection, length, pid_tgid);
			connection->walks[0].entered_ns = now;
		} else {
			stream_transfer(connection, transfer, false);
		}
	}
}

/* The captured response begins with an interim one. */
static __always_inline bool holds_interim(struct connection *connection)
{
	__u64 offset = connection->exchange.request_captured;

	opaque(offset);
	return offset <= request_cap && connection->data_length >= offset + 13 && connection->data[offset + 9] == '1';
}

/* Waits for the final response as if no interim one had come. */
static __always_inline void forget_interim(struct connection *connection)
{
	struct record_exchange *exchange = &connection->exchange;

	connection->state = STATE_REQUEST;
	connection->data_length = exchange->request_captured;
	exchange->response_bytes = 0;
	connection->stream_offsets[1] = 0;
	exchange->response_start_ns = 0;
	exchange->response_end_ns = 0;
	exchange->flags |= FLAG_INTERIM;
}

/* What the transfer looks like with which a response begins. Its bytes were captured behind the request's; few of them,
 * and user memory tells.
 */
static __always_inline int look_behind(struct connection *connection, const struct transfer *transfer)
{
	__u64 offset = unfollowed(connection->exchange.request_captured);

	opaque(offset);
	if (offset > request_cap || offset + 8 > connection->data_length)
		return look(transfer);
	return judge(*(__u64 *)(connection->data + offset), 8);
}

/* What a response's beginning asks for. */
enum answer {
	ANSWER_ORDINARY,
	ANSWER_SWITCHES, /* status 101 */
	ANSWER_INTERIM,
	ANSWER_TUNNELS, /* status 2xx to CONNECT */
};

/* Reads enum answer from the captured bytes: "HTTP/1.1 101 ", the status is at offset 9. */
static __always_inline enum answer answer_of(const struct connection *connection)
{
	__u64 offset = connection->exchange.request_captured;

	opaque(offset);
	if (offset > request_cap)
		return ANSWER_ORDINARY;
	if (connection->data[offset + 9] == '1')
		return connection->data[offset + 10] == '0' && connection->data[offset + 11] == '1' ? ANSWER_SWITCHES :
												      ANSWER_INTERIM;
	if (connection->data[offset + 9] == '2' && connection->data[0] == 'C' && connection->data[1] == 'O' &&
	    connection->data[2] == 'N' && connection->data[3] == 'N')
		return ANSWER_TUNNELS;
	return ANSWER_ORDINARY;
}

/* Response bytes went by, or are about to. The other direction may be at work on another CPU: the state is stored last,
 * with all that it vouches for in place, see enter_stream_mode().
 */
static __always_inline void on_response_bytes(struct connection *connection, struct transfer *transfer, __u64 sock,
					      __u64 now, __u64 pid_tgid, bool entering)
{
	struct record_exchange *exchange = &connection->exchange;
	__u8 state = unfollowed(connection->state);
	bool starts = state == STATE_REQUEST, foreign = false;
	enum answer answer = ANSWER_ORDINARY;
	__u32 limit = 0, before, absorbed;
	__u64 length, exchange_id;

	if (state == STATE_IDLE) {
		count(COUNTER_RESPONSE_ALONE);
		return;
	}
	exchange_id = exchange->exchange_id;
	if (!starts && holds_interim(connection) && (look(transfer) & LOOKS_RESPONSE)) {
		forget_interim(connection);
		starts = true;
	}
	before = connection->data_length;
	if (entering)
		undo_point(connection, true, pid_tgid);
	if (starts) {
		exchange->request_captured = before;
		exchange->response_bytes = 0;
		connection->tail = 0;
		connection->tail_valid = 1;
	}
	if ((__u64)before == exchange->request_captured + exchange->response_bytes)
		limit = exchange->request_captured + response_room();
	length = absorb(connection, transfer, sock, limit, true);
	absorbed = connection->data_length - before;
	if (starts) {
		int looks = look_behind(connection, transfer);

		foreign = !(looks & LOOKS_RESPONSE);
		if ((looks & LOOK_FAILED) || (foreign && (connection->follows || !connection->reports))) {
			connection->data_length = before;
			if (entering)
				connection->undo_exchange_id = 0; /* nothing to take back, or to tell of, when it returns */
			if (looks & LOOK_FAILED)
				return;
			if (connection->follows) {
				/* A client that pipelines while a response is under way: this is more of that one. */
				exchange->flags |= FLAG_FOREIGN;
				count(COUNTER_RESPONSE_ALONE);
				return;
			}
			abandon(connection, COUNTER_DROPPED_NOT_HTTP, now);
			connection->mode = MODE_IGNORED;
			return;
		}
		if (!foreign && absorbed >= 13)
			answer = answer_of(connection);
		exchange->response_start_ns = now;
		exchange->response_tid = pid_tgid;
	}
	if (unfollowed(exchange->exchange_id) != exchange_id)
		return; /* another one began meanwhile: what was read with its request is not its response */
	exchange->response_bytes += length;
	exchange->response_end_ns = now;
	if (entering) {
		connection->write_offered = length;
		connection->undo_exchange_id = exchange_id;
	}
	if (!starts)
		return;
	connection->stream_offsets[1] = length; /* should the mode change: whoever tells of these bytes, the next are behind */
	barrier();
	connection->state = STATE_RESPONSE;
	fence();
	if (unfollowed(connection->mode) == MODE_STREAM) {
		connection->state = STATE_IDLE; /* as it always is in this mode */
		if (!entering && !connection->http2) { /* else when the write returns */
			connection->stream_offsets[1] = 0;
			stream_transfer(connection, transfer, true);
		}
		return;
	}
	if (foreign) {
		/* User space knows of the exchange: it gets to see that the answer is no HTTP, and drops it. */
		finish(connection, END_CLOSED, now);
		connection->mode = MODE_IGNORED;
		return;
	}
	switch (answer) {
	case ANSWER_SWITCHES:
		if (switch_to_frames(sock)) {
			if (entering)
				enter_stream_write(connection, length, pid_tgid);
			else
				stream_transfer(connection, transfer, true);
			return;
		}
		/* fall through */
	case ANSWER_TUNNELS:
		finish(connection, END_HANDED_OVER, now);
		connection->mode = MODE_IGNORED;
		return;
	case ANSWER_INTERIM:
		/* A lone interim response: forget it and go on waiting. Longer ones wait for what follows them. */
		if (length == absorbed && length < 64)
			forget_interim(connection);
		return;
	case ANSWER_ORDINARY:
		return;
	}
}

/* All zero: the initial value of a connection's entry. */
static const struct connection zero_connection;

static __always_inline void untrack(__u64 key, bool streams)
{
	if (bpf_map_delete_elem(&connections, &key))
		return;
	__sync_fetch_and_add(&tracked_connections, -1);
	if (streams)
		__sync_fetch_and_add(&stream_connections, -1);
}

static __always_inline void forget_endpoint(const struct endpoint *endpoint, __u64 key)
{
	__u64 *found = bpf_map_lookup_elem(&endpoints, endpoint);

	if (found && *found == key) /* not overwritten by another connection from the same port */
		bpf_map_delete_elem(&endpoints, endpoint);
}

/* The object's bytes are not the connection's any more. */
static __always_inline void untie(struct connection *connection)
{
	struct tls_key key = { .object = connection->tls_object, .tgid = connection->tls_tgid };

	if (!key.object)
		return;
	bpf_map_delete_elem(&tls_objects, &key);
	connection->tls_object = 0;
}

/* A client's connection: where its server will look for it. */
static __always_inline void remember_endpoint(struct connection *connection)
{
	struct endpoint endpoint;
	__u64 key = connection->sock;

	endpoint_of(&endpoint, connection->exchange.local_address, connection->exchange.local_port,
		    connection->exchange.netns, connection->exchange.remote_port);
	if (bpf_map_update_elem(&endpoints, &endpoint, &key, BPF_ANY))
		count(COUNTER_ENDPOINT_FULL);
	endpoint.server_port = 0;
	if (bpf_map_update_elem(&endpoints, &endpoint, &key, BPF_ANY))
		count(COUNTER_ENDPOINT_FULL);
}

/* The beginning of a ServerHello, up to the session id's bytes; the cipher suite is behind these. */
struct server_hello {
	__u8 type;
	__u8 length[3];
	__u8 version[2];
	__u8 random[32];
	__u8 session_id_length;
};

#define TLS_1_3 0x0304
#define SESSION_ID_MAX 32
#define HELLO_LOOKS 8 /* a client sees it first or second; who joins a connection later never does */

static __always_inline __u32 ports_of(__u64 sock)
{
	return BPF_CORE_READ((struct sock *)sock, __sk_common.skc_dport) << 16 |
	       BPF_CORE_READ((struct sock *)sock, __sk_common.skc_num);
}

/* Keeps what the ends of a TLS connection have agreed on, from a transfer that looks like a ServerHello: for its connection
 * or, before that is tied to an object, for the socket. `address` is that of the bytes, or of iovecs, of which the first
 * is read. Global for the reason given at absorb_iovecs().
 */
__noinline int read_hello(__u64 sock, __u64 address, __u64 iov_count, __u64 length)
{
	struct hello hello = {};
	struct server_hello message;
	struct connection *connection;
	__u8 record = 0, suite[2];

	if (iov_count) {
		struct user_iovec iovec;

		if (!read_iovec(&iovec, address, 0))
			goto fault;
		address = iovec.base;
		if (iovec.length < length)
			length = iovec.length;
	}
	if (length < TLS_RECORD_HEAD_BYTES + sizeof(message))
		return 0;
	if (bpf_probe_read_user(&record, sizeof(record), (void *)address))
		goto fault;
	if (record == TLS_HANDSHAKE_RECORD) {
		address += TLS_RECORD_HEAD_BYTES;
		length -= TLS_RECORD_HEAD_BYTES;
	}
	if (bpf_probe_read_user(&message, sizeof(message), (void *)address))
		goto fault;
	if (message.type != TLS_SERVER_HELLO || message.version[0] != 3 || message.session_id_length > SESSION_ID_MAX ||
	    length < sizeof(message) + message.session_id_length + sizeof(suite))
		return 0;
	if (bpf_probe_read_user(suite, sizeof(suite), (void *)(address + sizeof(message) + message.session_id_length)))
		goto fault;
	/* TLS 1.3 calls itself 1.2 here, but has cipher suites of its own (RFC 8446 appendix B.4). */
	hello.tls = (__u32)(suite[0] == 0x13 ? TLS_1_3 : 3 << 8 | message.version[1]) << 16 | suite[0] << 8 | suite[1];
	connection = bpf_map_lookup_elem(&connections, &sock);
	if (connection) {
		if (connection->tls) {
			connection->exchange.tls = hello.tls;
			connection->hello_looks = HELLO_LOOKS;
		}
		return 0;
	}
	hello.ports = ports_of(sock);
	bpf_map_update_elem(&hellos, &sock, &hello, BPF_ANY);
	return 0;
fault:
	count(COUNTER_READ_FAULT);
	return 0;
}

/* Of a connection that carries TLS: whether its ServerHello may be yet to come. */
static __always_inline bool awaits_hello(const struct connection *connection)
{
	return connection->hello_looks < HELLO_LOOKS && connection->mode != MODE_IGNORED;
}

static __always_inline void look_for_hello(struct connection *connection, const struct transfer *transfer)
{
	connection->hello_looks++;
	if (look(transfer) & LOOKS_HELLO)
		read_hello(connection->sock, transfer->iov ? transfer->iov : transfer->buffer,
			   transfer->iov ? transfer->iov_count : 0, transfer->length);
}

/* tls.bpf.h: TLS records went through a socket, or are about to. */
__noinline int on_tls_records(__u64 sock, __u64 egress);
/* The same for a connection that is known to carry TLS. Nearly always they are moved within a call for its own object.
 * Returns true when it has ended, and the bytes are those of another one.
 */
static __always_inline bool on_tls_bytes(const struct connection *connection, bool egress, __u64 pid_tgid)
{
	__u32 tid = pid_tgid, tgid = pid_tgid >> 32;
	struct tls_thread *thread = bpf_map_lookup_elem(&tls_threads, &tid);

	if (thread && thread->tgid == tgid && thread->object && thread->object == connection->tls_object &&
	    connection->tls_tgid == tgid && !thread->assumed_sock &&
	    (!thread->sock || thread->sock == connection->sock)) {
		thread->sock = connection->sock;
		return false;
	}
	return on_tls_records(connection->sock, egress);
}

/* tls.bpf.h: a thread waits for events. */
__noinline int on_tls_wait(__u64 tid);

/* Ends the tracking of a connection. */
static __always_inline void forget(__u64 key)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &key);
	struct endpoint endpoint;
	bool streams;

	if (!connection)
		return;
	streams = connection->mode == MODE_STREAM;
	if (connection->exchange.role == ROLE_CLIENT) {
		endpoint_of(&endpoint, connection->exchange.local_address, connection->exchange.local_port,
			    connection->exchange.netns, connection->exchange.remote_port);
		forget_endpoint(&endpoint, key);
		endpoint.server_port = 0;
		forget_endpoint(&endpoint, key);
	}
	untie(connection);
	untrack(key, streams);
}

/* A connection that is not tracked carried bytes: track it when they begin a request, or are HTTP/2's. `socket` is 0 when the sock is
 * known to be TCP's.
 */
/* The connection that is being tracked is one of HTTP/2 and older than its first transfer that was seen, which is one of
 * `direction` and begins with a frame. Global for the reason given at absorb_iovecs().
 */
__noinline int join_frames(__u64 sock, __u64 direction)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);
	__u32 tgid = bpf_get_current_pid_tgid() >> 32;
	struct process *process = bpf_map_lookup_elem(&processes, &tgid);

	if (!connection)
		return 0;
	if (!process)
		process = announce_process(tgid);
	if (process)
		connection->exchange.process_start_ns = process->start_ns;
	connection->exchange.tgid = tgid;
	connection->http2 = 1;
	connection->walks[direction == DIRECTION_RESPONSE ? 0 : 1].lost = 1;
	connection->mode = MODE_STREAM;
	count_stream();
	count(COUNTER_BEGUN); /* user space says how many requests it is that this stands for */
	count(COUNTER_STREAMED);
	return 0;
}

static __always_inline struct connection *track(struct socket *socket, struct sock *sock, struct transfer *transfer,
						bool egress)
{
	struct connection *connection;
	__u64 key = (__u64)sock;
	int looks, joined = 0;
	bool is_client;

	looks = look(transfer);
	if (looks & LOOKS_HEADERS)
		joined = recognise_frames(transfer->iov ? transfer->iov : transfer->buffer,
					  transfer->iov ? transfer->iov_count : 0, transfer->length);
	if (!(looks & LOOKS_REQUEST) && !joined) {
		count(looks & LOOKS_TLS ? COUNTER_IGNORED_TLS : COUNTER_IGNORED_OTHER);
		if ((looks & (LOOKS_TLS | LOOKS_HELLO)) && tls_enabled && (!socket || is_tcp(socket, sock))) {
			__u64 number = 0;

			/* A global function takes numbers only: read back, the trusted pointer is one. */
			if (bpf_probe_read_kernel(&number, sizeof(number), &key))
				return 0;
			if (looks & LOOKS_HELLO)
				read_hello(number, transfer->iov ? transfer->iov : transfer->buffer,
					   transfer->iov ? transfer->iov_count : 0, transfer->length);
			if (looks & LOOKS_TLS)
				on_tls_records(number, egress);
		}
		return 0;
	}
	is_client = egress == (joined != DIRECTION_RESPONSE);
	if (socket && !is_tcp(socket, sock))
		return 0;
	if (!socket && BPF_CORE_READ((struct inet_connection_sock *)sock, icsk_ulp_ops)) {
		/* kTLS: its sends are not seen in the clear, and half an exchange would be a lie. */
		count(COUNTER_IGNORED_TLS);
		return 0;
	}
	if (bpf_map_update_elem(&connections, &key, &zero_connection, BPF_NOEXIST)) {
		count(COUNTER_BEGUN);
		count(COUNTER_DROPPED_STATE_FULL);
		return 0;
	}
	connection = bpf_map_lookup_elem(&connections, &key);
	if (!connection)
		return 0;
	__sync_fetch_and_add(&tracked_connections, 1);
	connection->sock = key;
	connection->received_seq = BPF_CORE_READ((struct tcp_sock *)sock, copied_seq);
	if (!egress)
		connection->received_seq -= transfer->length; /* counted with the others, in on_transfer() */
	connection->exchange.kind = RECORD_EXCHANGE;
	connection->exchange.role = is_client ? ROLE_CLIENT : ROLE_SERVER;
	connection->exchange.connection_id = random_id();
	read_identity(sock, &connection->exchange);
	if (passes_over(connection))
		return 0;
	if (is_client)
		remember_endpoint(connection);
	if (joined)
		join_frames(connection->sock, joined); /* a scalar to the verifier */
	return connection;
}

/* The socket backend sees a long write once per packet that it fills. All but the first time, what is left to be
 * offered ends where the offer that was handled ends.
 */
static __always_inline bool continues(const struct connection *connection, const struct transfer *transfer, __u32 tid)
{
	return connection->write_tid == tid &&
	       (__u32)transfer->sequence - connection->write_seq + transfer->length == connection->write_offered;
}

/* Every transfer comes through here. `connection` is the sock's, or 0. `entering`: a write that has not happened yet.
 * `socket` is 0 in the socket backend: its sock is a trusted pointer and TCP's, and the process of a connection that is
 * tracked is looked up where it is needed.
 */
static __always_inline void on_transfer(struct connection *connection, struct process *process, struct socket *socket,
					struct sock *sock, struct transfer *transfer, bool egress, bool entering,
					__u64 pid_tgid)
{
	__u64 key = (__u64)sock, now;
	bool response;

	if (connection && connection->tls) {
		if (!on_tls_bytes(connection, egress, pid_tgid)) {
			if (awaits_hello(connection))
				look_for_hello(connection, transfer);
			return;
		}
		connection = 0;
	}
	if (connection && (connection->state == STATE_IDLE || connection->lingers) &&
	    !(socket ? same_ports(sock, &connection->exchange) : same_ports_trusted(sock, &connection->exchange))) {
		finish_connection(connection, END_CLOSED, bpf_ktime_get_ns());
		forget(key);
		connection = 0;
	}
	if (connection && connection->passed_over && connection->ports_generation != (__u32)ports_generation) {
		forget(key);
		connection = 0;
	}
	if (!connection) {
		connection = track(socket, sock, transfer, egress);
		if (!connection)
			return;
	} else if (!socket && entering && continues(connection, transfer, pid_tgid)) {
		return;
	}
	if (!egress)
		connection->received_seq += transfer->length;
	if (connection->mode == MODE_IGNORED)
		return;
	now = bpf_ktime_get_ns();
	response = egress == (connection->exchange.role == ROLE_SERVER);
	if (connection->mode == MODE_STREAM) {
		if (!entering) {
			stream_transfer(connection, transfer, response);
			return;
		}
		enter_stream_write(connection, transfer->length, pid_tgid);
		connection->write_seq = transfer->sequence;
		if (!response)
			connection->walks[0].entered_ns = now;
		return;
	}
	if (response)
		on_response_bytes(connection, transfer, connection->sock, now, pid_tgid, entering);
	else
		on_request_bytes(connection, process, !socket, transfer, connection->sock, now, pid_tgid, entering);
	if (entering)
		connection->write_seq = transfer->sequence;
}

/* Settles a write that was handled at its entry: it was refused, came short, or may have blocked. */
static __always_inline void settle_write(struct connection *connection, long moved, __u64 pid_tgid)
{
	struct record_exchange *exchange = &connection->exchange;
	bool response = connection->write_kind == WRITE_RESPONSE;
	__u64 missing, now;
	__u32 kept;

	if (connection->write_tid != (__u32)pid_tgid)
		return;
	connection->write_tid = 0;
	if (connection->undo_exchange_id != exchange->exchange_id || connection->state == STATE_IDLE)
		return;
	if (moved >= 0 && moved >= connection->write_offered) {
		/* More moved than was seen at the entry when there were more buffers than the loop allows. */
		missing = moved - connection->write_offered;
		if (response)
			exchange->response_bytes += missing;
		else
			exchange->request_bytes += missing;
		now = bpf_ktime_get_ns();
		if (response)
			exchange->response_end_ns = now;
		else if (connection->state == STATE_REQUEST)
			exchange->request_end_ns = now;
		return;
	}
	missing = connection->write_offered - (moved > 0 ? moved : 0);
	if (response) {
		exchange->response_bytes -= missing;
		connection->stream_offsets[1] = exchange->response_bytes;
	} else {
		exchange->request_bytes -= missing;
	}
	kept = connection->undo_data_length + (moved > 0 ? moved : 0);
	if (connection->undo_state == STATE_IDLE && !response)
		kept = moved > 0 ? moved : 0;
	if (connection->data_length > kept)
		connection->data_length = kept;
	if (moved > 0) {
		connection->tail_valid = 0;
		return;
	}
	connection->tail = connection->undo_tail;
	connection->tail_valid = connection->undo_tail_valid;
	if (response) {
		exchange->response_end_ns = connection->undo_end_ns;
		if (connection->undo_state == STATE_REQUEST) {
			exchange->response_start_ns = 0;
			connection->state = STATE_REQUEST;
		}
	} else {
		exchange->request_end_ns = connection->undo_end_ns;
		if (connection->undo_state == STATE_IDLE)
			abandon(connection, COUNTER_CANCELLED, exchange->request_start_ns);
	}
}

#endif
