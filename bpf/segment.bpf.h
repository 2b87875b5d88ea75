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

static __always_inline struct segment_scratch *fill_segment(struct connection *connection, __u8 direction, __u64 now)
{
	struct record_exchange *exchange = &connection->exchange;
	struct segment_scratch *scratch;
	__u32 zero = 0;

	scratch = bpf_map_lookup_elem(&segment_scratch, &zero);
	if (!scratch)
		return 0;
	scratch->record.kind = RECORD_SEGMENT;
	scratch->record.role = exchange->role;
	scratch->record.direction = direction;
	scratch->record.captured = 0;
	scratch->record.flags = 0;
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
	return scratch;
}

static __always_inline void send_segment(struct segment_scratch *scratch, __u64 *offset, __u64 length)
{
	__u64 captured = scratch->record.captured;

	scratch->record.offset = *offset;
	scratch->record.length = length;
	*offset += length;
	opaque(captured);
	if (captured > SEGMENT_CAP)
		captured = SEGMENT_CAP;
	if (bpf_ringbuf_output(&records, scratch, sizeof(scratch->record) + captured, BPF_RB_NO_WAKEUP))
		count(COUNTER_SEGMENTS_LOST);
	else
		count(COUNTER_SEGMENTS);
}

#endif
