// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Fills the agent's real ring buffer with realistic exchange records at whatever rate user space runs it.
 *
 * One run writes up to `budget` traces of three exchanges each, as a two-service application makes them: a server
 * exchange with a traceparent of its own, the client exchange in which its thread calls the second service with the
 * same header, and the second service's server exchange, whose peer that client exchange is. Children come first, as
 * they finish first.
 */
#include "compat.bpf.h"
#include "events.h"

char _license[] SEC("license") = "Dual BSD/GPL";

#define REQUEST_BYTES 448
#define RESPONSE_BYTES 200
#define TRACEPARENT_AT 87 /* of the 32 + 1 + 16 hexadecimal digits behind "traceparent: 00-" */
#define PATH_DIGITS_AT 14 /* two digits of the path */

struct exchange {
	struct record_exchange record;
	__u8 data[REQUEST_BYTES + RESPONSE_BYTES];
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096); /* replaced by the agent's own map */
} records SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct exchange);
} scratch SEC(".maps");

/* Set by user space. */
const volatile __u32 tgids[2] = {};
const volatile __u64 starts[2] = {};
__u8 request[REQUEST_BYTES];
__u8 response[RESPONSE_BYTES];
__u64 budget;   /* traces to write in one run */
__u64 written;  /* exchanges */
__u64 refused;  /* traces not written, or not whole, because the ring buffer was full */

static __always_inline __u64 random_word(void)
{
	return (__u64)bpf_get_prandom_u32() << 32 | bpf_get_prandom_u32() | 1;
}

static __always_inline void put_hex(__u8 *text, __u64 value)
{
	for (int i = 0; i < 16; i++) {
		__u8 digit = value >> 60;

		text[i] = digit < 10 ? '0' + digit : 'a' + digit - 10;
		value <<= 4;
	}
}

static __always_inline bool send(struct exchange *exchange)
{
	__u64 waiting = bpf_ringbuf_query(&records, BPF_RB_AVAIL_DATA);

	/* As in exchange.bpf.h. */
	if (bpf_ringbuf_output(&records, exchange, sizeof(*exchange),
			       waiting >= 2 << 20 && waiting < (2 << 20) + 16384 ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP))
		return false;
	written++;
	return true;
}

SEC("raw_tp")
int generate(void *context)
{
	__u32 zero = 0;
	struct exchange *exchange = bpf_map_lookup_elem(&scratch, &zero);

	if (!exchange)
		return 0;
	for (int i = 0; i < 64; i++) {
		struct record_exchange *record = &exchange->record;
		__u64 now = bpf_ktime_get_ns(), outer = random_word(), client = random_word();
		__u32 number = bpf_get_prandom_u32() % 50;

		if (i >= budget)
			break;
		__builtin_memcpy(exchange->data, request, REQUEST_BYTES);
		__builtin_memcpy(exchange->data + REQUEST_BYTES, response, RESPONSE_BYTES);
		exchange->data[PATH_DIGITS_AT] = '0' + number / 10;
		exchange->data[PATH_DIGITS_AT + 1] = '0' + number % 10;
		put_hex(exchange->data + TRACEPARENT_AT, random_word());
		put_hex(exchange->data + TRACEPARENT_AT + 16, random_word());
		put_hex(exchange->data + TRACEPARENT_AT + 33, random_word());
		record->kind = RECORD_EXCHANGE;
		record->end = END_NEXT;
		record->request_end_ns = record->request_start_ns = now - 2000000;
		record->response_start_ns = now - 1000000;
		record->response_end_ns = record->end_ns = now - 900000;
		record->request_bytes = record->request_captured = REQUEST_BYTES;
		record->response_bytes = record->response_captured = RESPONSE_BYTES;
		record->netns = 1;
		record->local_address[15] = record->remote_address[15] = 1;
		/* the second service */
		record->role = ROLE_SERVER;
		record->flags = FLAG_FIRST;
		record->exchange_id = random_word();
		record->parent_id = 0;
		record->peer_id = client;
		record->connection_id = 3;
		record->tgid = record->request_tid = record->response_tid = tgids[1];
		record->process_start_ns = starts[1];
		record->local_port = 8080;
		record->remote_port = 40000 + number;
		if (!send(exchange)) {
			refused++;
			break;
		}
		/* the call to it */
		record->role = ROLE_CLIENT;
		record->exchange_id = client;
		record->parent_id = outer;
		record->peer_id = 0;
		record->connection_id = 2;
		record->tgid = record->request_tid = record->response_tid = tgids[0];
		record->process_start_ns = starts[0];
		record->request_start_ns -= 100000;
		record->local_port = 40000 + number;
		record->remote_port = 8080;
		if (!send(exchange)) {
			refused++;
			break;
		}
		/* the request that caused it */
		record->role = ROLE_SERVER;
		record->exchange_id = outer;
		record->parent_id = 0;
		record->connection_id = 1;
		record->request_start_ns -= 100000;
		record->local_port = 8000;
		record->remote_port = 50000 + number;
		if (!send(exchange)) {
			refused++;
			break;
		}
	}
	return 0;
}
