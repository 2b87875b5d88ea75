/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Records of connections in stream mode, as they are filled and sent. */
#ifndef SPANLOOM_SEGMENT_BPF_H
#define SPANLOOM_SEGMENT_BPF_H

#include "maps.bpf.h"

/* The one helper that reads user and kernel memory alike, on x86-64 and arm64: the two do not overlap there. */
static __always_inline bool read_iovec(struct user_iovec *iovec, __u64 iov, __u32 index)
{
	return !bpf_probe_read(iovec, sizeof(*iovec), (void *)(iov + index * sizeof(*iovec)));
}

/* Values that the verifier shall not follow: it would walk every combination of loop counters. What is read back from
 * a map is an unknown number to it, and the loops below converge after one round.
 */
#define unfollowed(variable) (*(volatile typeof(variable) *)&(variable))

/* User space looks into the ring buffer by itself every now and then; it is woken when much waits. The band keeps a
 * slow reader from being woken for every record.
 */
#define WAKEUP_BAND 16384

static __always_inline __u64 wakeup_flags_at(__u64 waiting)
{
	return waiting >= wakeup_bytes && waiting < wakeup_bytes + WAKEUP_BAND ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP;
}

static __always_inline __u64 wakeup_flags(void)
{
	return wakeup_flags_at(bpf_ringbuf_query(&records, BPF_RB_AVAIL_DATA));
}

/* The space that belongs to `owner`, or 0. */
static __always_inline struct segment_scratch *find_scratch(__u32 owner)
{
	static const __u32 keys[SCRATCHES] = { 0, 1, 2 }; /* not on the stack, of which callers have none to spare */
	struct segment_scratch *scratch;

#pragma unroll
	for (int i = 0; i < SCRATCHES; i++) {
		scratch = bpf_map_lookup_elem(&segment_scratch, &keys[i]);
		if (scratch && scratch->owner == owner)
			return scratch;
	}
	return 0;
}

/* The space that the current thread has claimed. */
static __always_inline struct segment_scratch *scratch_space(void)
{
	return find_scratch(bpf_get_current_pid_tgid());
}

/* Claims a space for the current thread until release_scratch(). Two threads get the same one only if each is preempted
 * by the other, the first time between the two lines that matter here.
 */
static __always_inline struct segment_scratch *claim_scratch(void)
{
	struct segment_scratch *scratch = find_scratch(0);

	if (scratch)
		scratch->owner = bpf_get_current_pid_tgid();
	else
		count(COUNTER_SEGMENTS_LOST);
	return scratch;
}

static __always_inline void release_scratch(struct segment_scratch *scratch)
{
	scratch->owner = 0;
}

/* Fills in what segments of the connection have in common. */
static __always_inline void fill_segment(struct segment_scratch *scratch, struct connection *connection, __u8 direction,
					 __u64 now)
{
	struct record_exchange *exchange = &connection->exchange;

	scratch->record.kind = RECORD_SEGMENT;
	scratch->record.role = exchange->role;
	scratch->record.direction = direction;
	scratch->record.captured = 0;
	scratch->record.flags = connection->http2 ? SEGMENT_HTTP2 : connection->tls ? SEGMENT_TLS : 0;
	if (direction == DIRECTION_RESPONSE && exchange->role == ROLE_CLIENT && connection->walks[0].entered_ns)
		scratch->record.flags |= SEGMENT_OVERTAKES;
	scratch->record.tls = exchange->tls;
	scratch->record.connection_id = exchange->connection_id;
	scratch->record.process_start_ns = exchange->process_start_ns;
	scratch->record.time_ns = now;
	scratch->record.tgid = exchange->tgid;
	scratch->record.tid = (__u32)bpf_get_current_pid_tgid();
	scratch->record.netns = exchange->netns;
	scratch->record.local_port = exchange->local_port;
	scratch->record.remote_port = exchange->remote_port;
	__builtin_memcpy(scratch->record.local_address, exchange->local_address, 16);
	__builtin_memcpy(scratch->record.remote_address, exchange->remote_address, 16);
}

static __always_inline void send_segment(struct connection *connection, struct segment_scratch *scratch, __u64 *offset,
					 __u64 length)
{
	__u64 captured = scratch->record.captured, waiting = bpf_ringbuf_query(&records, BPF_RB_AVAIL_DATA);
	__u64 size = bpf_ringbuf_query(&records, BPF_RB_RING_SIZE);

	scratch->record.offset = *offset;
	scratch->record.length = length;
	*offset += length;
	opaque(captured);
	if (captured > SEGMENT_CAP)
		captured = SEGMENT_CAP;
	/* An eighth is left to what is no segment: the close that ends a connection's requests, above all. */
	if (waiting + size / 8 > size ||
	    bpf_ringbuf_output(&records, &scratch->record, sizeof(scratch->record) + captured, wakeup_flags_at(waiting))) {
		count(COUNTER_SEGMENTS_LOST);
		return;
	}
	count(COUNTER_SEGMENTS);
	connection->told = 1;
}

#endif
