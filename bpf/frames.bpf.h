/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The frames of HTTP/2 connections (RFC 9113 section 4): which of their bytes are forwarded.
 *
 * Each direction is walked over from frame to frame. Frame headers and header blocks are forwarded whole, of long DATA
 * only the beginning. A segment is a run of such bytes, and ends where bytes are left out: its length says how many. What
 * frames mean is for user space to say. Where the place among the frames is lost, nothing is forwarded until a transfer
 * begins like a frame.
 */
#ifndef SPANLOOM_FRAMES_BPF_H
#define SPANLOOM_FRAMES_BPF_H

#include "segment.bpf.h"

/* RFC 9113 section 6. */
#define FRAME_DATA 0
#define FRAME_HEADERS 1
#define FRAME_PRIORITY 2
#define FRAME_RST_STREAM 3
#define FRAME_SETTINGS 4
#define FRAME_PUSH_PROMISE 5
#define FRAME_PING 6
#define FRAME_GOAWAY 7
#define FRAME_WINDOW_UPDATE 8
#define FRAME_CONTINUATION 9

#define FRAME_END_STREAM 0x1
#define FRAME_END_HEADERS 0x4
#define FRAME_PADDED 0x8
#define FRAME_PRIORITIZED 0x20

#define FRAME_HEADER_BYTES 9
#define DEFAULT_FRAME_BYTES 16384

/* A record costs more than a few hundred bytes in one: shorter DATA is forwarded whole. Of longer ones the beginning,
 * which has the length of the padding and the prefix of a message of gRPC.
 */
#define WHOLE_DATA_BYTES 512
#define DATA_BYTES 16
/* What user space reads of a header block with padding and priority, and of other frames (agent/protocols/http2_frames.py).
 */
#define BLOCK_BYTES (65536 + 261)
#define CONTROL_BYTES 1024

#define WALK_STEPS 8 /* in one round, which ends at every frame header */
#define WALK_ROUNDS 80 /* of so many rounds each: a frame a round, 64 KiB of the shortest ones with anything in them */

#define PREFACE_BYTES 24 /* RFC 9113 section 3.4 */

/* Whether a frame with such a header may be: it only has to be found out soon that the place is wrong. */
static __always_inline bool may_be_frame(__u32 length, __u8 kind, __u32 stream)
{
	switch (kind) {
	case FRAME_DATA:
	case FRAME_HEADERS:
	case FRAME_PUSH_PROMISE:
	case FRAME_CONTINUATION:
		return stream != 0;
	case FRAME_PRIORITY:
		return stream && length == 5;
	case FRAME_RST_STREAM:
		return stream && length == 4;
	case FRAME_SETTINGS:
		return !stream && length % 6 == 0;
	case FRAME_PING:
		return !stream && length == 8;
	case FRAME_GOAWAY:
		return !stream && length >= 8;
	case FRAME_WINDOW_UPDATE:
		return length == 4;
	}
	return length <= DEFAULT_FRAME_BYTES; /* an extension's */
}

#define HEADER_LENGTH(header) ((__u32)(header)[0] << 16 | (__u32)(header)[1] << 8 | (header)[2])
#define HEADER_STREAM(header) \
	((__u32)((header)[5] & 0x7f) << 24 | (__u32)(header)[6] << 16 | (__u32)(header)[7] << 8 | (header)[8])

/* The same, for bytes that may be anything. Rare forms that are legal are not believed. */
static __always_inline bool is_likely_frame(const __u8 *header)
{
	static const __u8 known_flags[] = { 0x09, 0x2d, 0, 0, 0x01, 0x0c, 0x01, 0, 0 };
	__u8 kind = header[3];

	if (kind >= sizeof(known_flags) || (header[4] & ~known_flags[kind]) || header[5] || header[0])
		return false;
	return HEADER_LENGTH(header) <= DEFAULT_FRAME_BYTES &&
	       may_be_frame(HEADER_LENGTH(header), kind, HEADER_STREAM(header));
}

/* A cheap first look at the first 8 bytes, the first one lowest: HEADERS of less than 64 KiB with END_HEADERS and without
 * PADDED, on a stream below 2^24.
 */
static __always_inline bool looks_like_headers(__u64 word)
{
	return (word & 0xffdeff0000ffULL) == ((__u64)FRAME_END_HEADERS << 32 | (__u64)FRAME_HEADERS << 24);
}

/* Copies the first bytes of a transfer, 16 at most, to the scratch space. Returns how many there are. Global for the
 * reason given at absorb_iovecs().
 */
__noinline int gather_first(__u64 address, __u64 iov_count, __u64 length)
{
	struct segment_scratch *scratch = scratch_space();
	struct user_iovec iovec = { .base = address, .length = length };
	__u64 gathered = 0;

	if (!scratch)
		return 0;
	for (__u32 i = 0; i < 4; i++) {
		__u64 piece = 16 - (gathered & 31);

		if (gathered >= 16 || (i && i >= iov_count))
			break;
		if (iov_count && !read_iovec(&iovec, address, i))
			return 0;
		if (iovec.length < piece)
			piece = iovec.length;
		opaque(piece);
		if (piece > 16 || bpf_probe_read_user(scratch->data + (gathered & 15), piece, (void *)iovec.base))
			return 0;
		gathered += piece;
	}
	return gathered < length ? gathered : length;
}

/* Which direction a transfer of an unknown connection belongs to, when it begins with a whole header block of HTTP/2 that
 * shows it by its first field. Requests begin with :method, :scheme, :path or :authority, responses with :status (RFC 7541
 * appendix A); an entry of the dynamic table could be either. Returns enum segment_direction, or 0.
 */
static __always_inline int recognise(struct segment_scratch *scratch, __u64 address, __u64 iov_count, __u64 length)
{
	__u64 end;
	__u8 field;

	if (gather_first(address, iov_count, length) < 16 || !is_likely_frame(scratch->data))
		return 0;
	if (scratch->data[3] != FRAME_HEADERS || !(scratch->data[4] & FRAME_END_HEADERS) ||
	    (scratch->data[4] & FRAME_PADDED) || !(scratch->data[8] & 1))
		return 0;
	field = scratch->data[4] & FRAME_PRIORITIZED ? scratch->data[14] : scratch->data[9];
	end = FRAME_HEADER_BYTES + HEADER_LENGTH(scratch->data);
	if (!iov_count) {
		if (end > length)
			return 0;
		if (end + FRAME_HEADER_BYTES <= length &&
		    (bpf_probe_read_user(scratch->data, FRAME_HEADER_BYTES, (void *)(address + end)) ||
		     !is_likely_frame(scratch->data)))
			return 0;
	}
	/* RFC 7541 section 6: an index, or a literal with an indexed name in one of three forms. */
	if (field & 0x80)
		field &= 0x7f;
	else if (field & 0x40)
		field &= 0x3f;
	else if (!(field & 0x20))
		field &= 0x0f;
	if (field >= 1 && field <= 7)
		return DIRECTION_REQUEST;
	return field >= 8 && field <= 14 ? DIRECTION_RESPONSE : 0;
}

/* Global for the reason given at absorb_iovecs(). */
__noinline int recognise_frames(__u64 address, __u64 iov_count, __u64 length)
{
	struct segment_scratch *scratch = claim_scratch();
	int direction;

	if (!scratch)
		return 0;
	direction = recognise(scratch, address, iov_count, length);
	release_scratch(scratch);
	return direction;
}

/* The connection is one of HTTP/2, and its requests begin with the preface, of which so many bytes have been seen before.
 */
static __always_inline void begin_frames(struct connection *connection, __u32 seen)
{
	connection->http2 = 1;
	connection->peer_tries = 0;
	connection->walks[0].left = PREFACE_BYTES - seen;
	connection->walks[0].keep = PREFACE_BYTES - seen;
	connection->walks[0].entered_ns = connection->exchange.request_start_ns;
}

/* Sends what was gathered of a transfer so far, with the gap behind it. Global for the reason given at absorb_iovecs(). */
__noinline int flush_frames(__u64 sock, __u64 response)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);
	struct segment_scratch *scratch = scratch_space();
	__u64 *offset;

	if (!connection || !scratch)
		return 0;
	offset = &connection->stream_offsets[response ? 1 : 0];
	if (scratch->record.captured || (scratch->ended && scratch->done == scratch->length)) {
		send_segment(connection, scratch, offset, scratch->record.captured + scratch->gap);
		scratch->ended = 0;
	} else {
		*offset += scratch->gap; /* the next segment tells by its offset, behind the end of a stream this transfer's */
	}
	scratch->record.captured = 0;
	scratch->record.flags &= ~SEGMENT_AT_FRAME;
	scratch->gap = 0;
	return 0;
}

static __always_inline void lose_frames(struct frame_walk *walk)
{
	walk->lost = 1;
	walk->left = 0;
	walk->keep = 0;
	walk->held = 0;
	walk->passed = 0;
	count(COUNTER_FRAMES_LOST);
}

/* A whole frame header stands in the walk, and there is room for it. Global for the reason given at absorb_iovecs(). */
__noinline int begin_frame(__u64 sock, __u64 response)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);
	struct segment_scratch *scratch = scratch_space();
	struct frame_walk *walk;
	__u32 length, captured, keep = CONTROL_BYTES;
	__u8 kind;

	if (!connection || !scratch)
		return 0;
	walk = &connection->walks[response ? 1 : 0];
	length = HEADER_LENGTH(walk->header);
	kind = walk->header[3];
	walk->held = 0;
	if (!may_be_frame(length, kind, HEADER_STREAM(walk->header))) {
		lose_frames(walk);
		return 0;
	}
	captured = scratch->record.captured;
	opaque(captured);
	walk->left = length;
	walk->keep = 0;
	/* Nothing that user space reads: left out where a segment would begin. */
	walk->passed = !captured && (kind == FRAME_WINDOW_UPDATE || kind == FRAME_PING || kind == FRAME_PRIORITY);
	if (walk->passed || captured > SEGMENT_CAP)
		return 0;
	if (!captured)
		scratch->record.flags |= SEGMENT_AT_FRAME;
	if (bpf_probe_read_kernel(scratch->data + captured, FRAME_HEADER_BYTES, walk->header))
		return 0;
	scratch->record.captured = captured + FRAME_HEADER_BYTES;
	if (kind == FRAME_DATA)
		keep = length <= WHOLE_DATA_BYTES ? WHOLE_DATA_BYTES : DATA_BYTES;
	else if (kind == FRAME_HEADERS || kind == FRAME_PUSH_PROMISE || kind == FRAME_CONTINUATION)
		keep = BLOCK_BYTES;
	walk->keep = length < keep ? length : keep;
	walk->ends = kind == FRAME_DATA && (walk->header[4] & FRAME_END_STREAM);
	return 0;
}

/* Bytes of the frame at hand went by that are not forwarded. */
static __always_inline void pass_over(struct frame_walk *walk, struct segment_scratch *scratch, __u64 bytes)
{
	walk->left -= bytes;
	if (walk->passed)
		return;
	scratch->gap += bytes;
	if (!walk->left && walk->ends)
		scratch->ended = 1;
}

/* What walk_some() comes back with. */
enum walk_next {
	WALK_ENDS, /* the transfer is at its end, or cannot be read */
	WALK_ON,
	WALK_BEGINS, /* a frame header is whole */
	WALK_FLUSHES, /* what was gathered is to be sent first */
};

/* Some steps over the transfer that the scratch space describes; returns enum walk_next. A step is one piece of a frame
 * header or of a payload, as far as one buffer has it. All that a step changes stands in maps, so that the loop converges
 * for the verifier, and what is done between steps is done by the caller, since stack space of calls adds up. Global for
 * the reason given at absorb_iovecs().
 */
__noinline int walk_some(__u64 sock, __u64 response)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);
	struct segment_scratch *scratch = scratch_space();
	struct frame_walk *walk;

	if (!connection || !scratch)
		return WALK_ENDS;
	walk = &connection->walks[response ? 1 : 0];
	for (__u32 i = 0; i < WALK_STEPS; i++) {
		__u64 offset = unfollowed(scratch->offset), piece = unfollowed(scratch->length) - unfollowed(scratch->done);
		__u32 left = unfollowed(walk->left);

		if (unfollowed(walk->held) >= FRAME_HEADER_BYTES)
			return scratch->gap || scratch->record.captured > SEGMENT_CAP - FRAME_HEADER_BYTES ? WALK_FLUSHES :
													     WALK_BEGINS;
		if (!piece || unfollowed(walk->lost))
			return WALK_ENDS;
		if (scratch->iov_count) {
			__u64 index = unfollowed(scratch->index);

			if (index >= scratch->iov_count)
				return WALK_ENDS;
			if (!read_iovec(&scratch->iovec, scratch->iov, index))
				goto fault;
			if (offset >= unfollowed(scratch->iovec.length)) {
				scratch->index = index + 1;
				scratch->offset = 0;
				continue;
			}
		}
		if (unfollowed(scratch->iovec.length) - offset < piece)
			piece = unfollowed(scratch->iovec.length) - offset;
		if (!left) {
			__u64 held = unfollowed(walk->held);

			if (FRAME_HEADER_BYTES - held < piece)
				piece = FRAME_HEADER_BYTES - held;
			opaque(piece);
			opaque(held);
			if (piece > FRAME_HEADER_BYTES || held > FRAME_HEADER_BYTES ||
			    bpf_probe_read_user(walk->header + held, piece, (void *)(scratch->iovec.base + offset)))
				goto fault;
			walk->held = held + piece;
		} else if (walk->keep) {
			__u64 captured = unfollowed(scratch->record.captured);

			if (captured >= SEGMENT_CAP)
				return WALK_FLUSHES;
			if (unfollowed(walk->keep) < piece)
				piece = unfollowed(walk->keep);
			if (piece > SEGMENT_CAP - captured)
				piece = SEGMENT_CAP - captured;
			if (piece > SEGMENT_SLACK)
				piece = SEGMENT_SLACK;
			opaque(piece);
			opaque(captured);
			if (piece > SEGMENT_SLACK || captured > SEGMENT_CAP ||
			    bpf_probe_read_user(scratch->data + captured, piece, (void *)(scratch->iovec.base + offset)))
				goto fault;
			scratch->record.captured = captured + piece;
			walk->keep -= piece;
			walk->left = left - piece;
		} else {
			if (left < piece)
				piece = left;
			pass_over(walk, scratch, piece);
		}
		scratch->done += piece;
		scratch->offset = offset + piece;
	}
	return WALK_ON;
fault:
	count(COUNTER_READ_FAULT);
	return WALK_ENDS;
}

/* Begins the walk over a transfer, which end_walk() has to follow; returns whether the place among the frames is known.
 * Global, see above.
 */
__noinline int begin_walk(__u64 sock, __u64 address, __u64 iov_count, __u64 length, __u64 response)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);
	struct segment_scratch *scratch;
	struct frame_walk *walk;
	__u64 now;

	if (!connection)
		return 0;
	walk = &connection->walks[response ? 1 : 0];
	scratch = claim_scratch();
	if (!scratch) {
		if (!walk->lost)
			lose_frames(walk);
		connection->stream_offsets[response ? 1 : 0] += length;
		return 0;
	}
	now = walk->entered_ns ? walk->entered_ns : bpf_ktime_get_ns();
	if (walk->lost || !http2_enabled) {
		walk->lost = 1;
		if (http2_enabled && address && gather_first(address, iov_count, length) >= FRAME_HEADER_BYTES &&
		    is_likely_frame(scratch->data))
			walk->lost = 0;
	}
	fill_segment(scratch, connection, response ? DIRECTION_RESPONSE : DIRECTION_REQUEST, now);
	scratch->iov = address;
	scratch->iov_count = iov_count;
	scratch->iovec.base = address;
	scratch->iovec.length = length;
	scratch->length = length;
	scratch->done = 0;
	scratch->index = 0;
	scratch->offset = 0;
	scratch->gap = 0;
	scratch->ended = 0;
	if (!address && !walk->lost && length <= walk->left) {
		walk->keep = walk->keep > length ? walk->keep - length : 0;
		pass_over(walk, scratch, length);
		scratch->done = length;
	}
	return address && !walk->lost;
}

/* Ends it: sends what is left to be sent, tells of the rest when it was not walked over, and releases the scratch space.
 * Global, see above.
 */
__noinline int end_walk(__u64 sock, __u64 response, __u64 was_lost)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);
	struct segment_scratch *scratch = scratch_space();
	struct frame_walk *walk;

	if (!connection || !scratch)
		return 0;
	walk = &connection->walks[response ? 1 : 0];
	flush_frames(sock, response);
	if (scratch->done < scratch->length) {
		/* The place is lost, or the transfer is too long to be walked over to its end, or it cannot be read. */
		if (!walk->lost)
			lose_frames(walk);
		scratch->gap = scratch->length - scratch->done;
		scratch->done = scratch->length;
		scratch->ended = !was_lost; /* it is told at once, and only then */
		flush_frames(sock, response);
	}
	release_scratch(scratch);
	return 0;
}

/* Some of the steps and what is to be done between them; returns 0 when the walk is at its end. Global, see above. */
__noinline int walk_on(__u64 sock, __u64 response)
{
	for (__u32 i = 0; i < WALK_ROUNDS; i++) {
		switch (walk_some(sock, response)) {
		case WALK_ON:
			break;
		case WALK_BEGINS:
			begin_frame(sock, response);
			break;
		case WALK_FLUSHES:
			flush_frames(sock, response);
			break;
		default:
			return 0;
		}
	}
	return 1;
}

/* Finds the client's end of a server's connection: exchange.bpf.h. */
__noinline int tell_peer(__u64 sock);

/* Walks over a transfer of a direction of an HTTP/2 connection: `address` is that of the bytes, or of iov_count iovecs, or
 * 0 for bytes that never were in user memory.
 */
__noinline int walk_transfer(__u64 sock, __u64 address, __u64 iov_count, __u64 length, __u64 response)
{
	struct connection *connection = bpf_map_lookup_elem(&connections, &sock);
	__u64 was_lost;

	if (!connection)
		return 0;
	was_lost = connection->walks[response ? 1 : 0].lost || !http2_enabled;
	/* At requests only: the client has sent this, so what its end is has been seen. */
	if (!response && connection->exchange.role == ROLE_SERVER && !connection->peer_connection_id &&
	    connection->peer_tries < 3)
		tell_peer(sock);
	if (begin_walk(sock, address, iov_count, length, response)) {
		for (__u32 i = 0; i < WALK_ROUNDS; i++) {
			if (!walk_on(sock, response))
				break;
		}
	}
	return end_walk(sock, response, was_lost);
}

#endif
