/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* First bytes -> protocol. Eight bytes decide; user space parses what is let through, so a false positive here costs
 * a dropped record and a false negative a lost exchange.
 */
#ifndef SPANLOOM_SNIFF_BPF_H
#define SPANLOOM_SNIFF_BPF_H

#include "maps.bpf.h"

/* The first bytes of a segment, the first one lowest, zero-padded: length is how many are real (at most 8). */
struct first_bytes {
	__u64 word;
	__u64 length;
};

#define FIRST_BYTE(first, index) ((__u8)((first)->word >> (8 * (index))))
#define TEXT4(a, b, c, d) ((__u64)(a) | (__u64)(b) << 8 | (__u64)(c) << 16 | (__u64)(d) << 24)
#define TEXT8(a, b, c, d, e, f, g, h) (TEXT4(a, b, c, d) | TEXT4(e, f, g, h) << 32)
#define BYTES(count) (~0ULL >> (64 - 8 * (count)))

/* The request methods that nearly all traffic uses, at full strength: method, space, and what may begin a target. */
static __always_inline bool is_common_request(const struct first_bytes *first)
{
	__u64 word = first->word;

	if (first->length < 8)
		return false;
	switch (word & BYTES(4)) {
	case TEXT4('G', 'E', 'T', ' '):
	case TEXT4('P', 'U', 'T', ' '):
		return FIRST_BYTE(first, 4) == '/' || FIRST_BYTE(first, 4) == 'h';
	case TEXT4('P', 'O', 'S', 'T'):
	case TEXT4('H', 'E', 'A', 'D'):
		return FIRST_BYTE(first, 4) == ' ' && (FIRST_BYTE(first, 5) == '/' || FIRST_BYTE(first, 5) == 'h');
	}
	return (word & BYTES(6)) == TEXT8('P', 'A', 'T', 'C', 'H', ' ', 0, 0) ||
	       (word & BYTES(7)) == TEXT8('D', 'E', 'L', 'E', 'T', 'E', ' ', 0) ||
	       word == TEXT8('O', 'P', 'T', 'I', 'O', 'N', 'S', ' ') ||
	       word == TEXT8('C', 'O', 'N', 'N', 'E', 'C', 'T', ' ') ||
	       (word & BYTES(6)) == TEXT8('T', 'R', 'A', 'C', 'E', ' ', 0, 0);
}

/* Any method: upper-case letters or '-', then a space, then '/', '*' or 'h' as far as the bytes reach. Shorter
 * segments are judged by what they have: a head may arrive one byte at a time.
 */
static __always_inline bool is_request(const struct first_bytes *first)
{
	bool letter = false;

	if (is_common_request(first))
		return true;
#pragma unroll
	for (int i = 0; i < 8; i++) {
		__u8 byte = FIRST_BYTE(first, i);

		if (i >= first->length)
			break;
		if (byte == ' ') {
			if (!letter || i == 7 || i + 1 >= first->length)
				return letter;
			byte = FIRST_BYTE(first, (i + 1) & 7);
			return byte == '/' || byte == 'h' || byte == '*';
		}
		if ((byte < 'A' || byte > 'Z') && byte != '-')
			return false;
		letter = true;
	}
	return letter;
}

/* "HTTP/1." as far as the bytes reach. */
static __always_inline bool is_response(const struct first_bytes *first)
{
	const __u64 expected = TEXT8('H', 'T', 'T', 'P', '/', '1', '.', 0);

	if (first->length >= 7)
		return (first->word & BYTES(7)) == expected;
	/* Short: what is there is zero-padded, and must be all there is of the expected bytes up to its length. */
	return first->length && first->word == (expected & ((1ULL << (8 * (first->length & 7))) - 1));
}

/* A TLS record: handshake, alert, application data or change cipher spec, version 3.x (RFC 8446 section 5.1). */
static __always_inline bool is_tls(const struct first_bytes *first)
{
	return first->length >= 3 && FIRST_BYTE(first, 0) >= 20 && FIRST_BYTE(first, 0) <= 23 &&
	       FIRST_BYTE(first, 1) == 3 && FIRST_BYTE(first, 2) <= 4;
}

#define TLS_HANDSHAKE_RECORD 22
#define TLS_RECORD_HEAD_BYTES 5
#define TLS_SERVER_HELLO 2

/* A ServerHello (RFC 8446 section 4.1.3), behind the head of its record or, as OpenSSL's clients read it, without. */
static __always_inline bool is_server_hello(const struct first_bytes *first)
{
	if (first->length < 8)
		return false;
	if (FIRST_BYTE(first, 0) == TLS_HANDSHAKE_RECORD)
		return FIRST_BYTE(first, 1) == 3 && FIRST_BYTE(first, 5) == TLS_SERVER_HELLO;
	return FIRST_BYTE(first, 0) == TLS_SERVER_HELLO && !FIRST_BYTE(first, 1) && FIRST_BYTE(first, 4) == 3;
}

#endif
