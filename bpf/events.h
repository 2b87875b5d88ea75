/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The wire contract with user space: enums and record structs, nothing else.
 *
 * agent/kernel/layout.py is generated from the BTF that the compiler makes of this file, and the loader refuses an
 * object whose layout differs. Include a file that defines __u8 .. __u64 first (linux/types.h or kernel_types.h).
 */
#ifndef SPANLOOM_EVENTS_H
#define SPANLOOM_EVENTS_H

enum record_kind {
	RECORD_EXCHANGE = 1, /* one request and what is known of its response */
	RECORD_PROCESS = 2,  /* a process that user space has not decided on made its first exchange */
	RECORD_SEGMENT = 3,  /* one direction's bytes of a connection in stream mode */
	RECORD_CLOSE = 4,    /* a connection ended whose last exchange had been reported before, or one in stream mode */
	RECORD_PEER = 5,     /* where the other end of an HTTP/2 connection is on this node */
	RECORD_TLS = 6,      /* how a process uses TLS is for user space to look at */
	RECORD_UPGRADE = 7,  /* a record_exchange whose response switched to HTTP/2, as whose stream 1 the exchange goes on */
};

enum exchange_role {
	ROLE_SERVER = 1, /* this process received the request */
	ROLE_CLIENT = 2, /* this process sent the request */
};

/* Why a record left the kernel. OPEN and QUIET are provisional: a later record of the same exchange supersedes it. */
enum exchange_end {
	END_OPEN = 1,       /* no response yet, but the request has waited long enough to be announced */
	END_QUIET = 2,      /* response bytes were seen, and then none for a while */
	END_NEXT = 3,       /* the next request began on the connection */
	END_CLOSED = 4,     /* the connection closed */
	END_RESET = 5,      /* the peer reset the connection */
	END_TIMED_OUT = 6,  /* the transport gave up (ETIMEDOUT), or the exchange outlived its limit */
	END_HANDED_OVER = 7, /* 101 or CONNECT: the connection is left alone from here on, unless it is HTTP/2 then */
};

enum exchange_flag {
	FLAG_FIRST = 1 << 0,              /* first record of this exchange id */
	FLAG_REQUEST_TRUNCATED = 1 << 1,  /* the request has more bytes than were captured */
	FLAG_RESPONSE_TRUNCATED = 1 << 2, /* the response has more bytes than were captured */
	FLAG_TAIL_VALID = 1 << 3,         /* tail holds the last min(8, response_bytes) bytes, right-aligned */
	FLAG_PEER_CLOSED = 1 << 4,        /* the peer's FIN arrived while the exchange was open */
	FLAG_CLIENT_ONLY = 1 << 5,        /* the process had served no exchange when this one began */
	FLAG_PROCESS_UNKNOWN = 1 << 6,    /* user space had not decided on the process when this one began */
	FLAG_INTERIM = 1 << 7,            /* 1xx responses were seen and left out of the response bytes */
	FLAG_REQUEST_GAP = 1 << 8,        /* request bytes are missing between the captured ones and what follows */
	FLAG_FOREIGN = 1 << 9,            /* bytes came that begin no response: the rest of the one before, or no HTTP */
	FLAG_STREAM = 1 << 10,            /* of a close: the connection was in stream mode */
	FLAG_TLS = 1 << 11,               /* the bytes are those that the process gave to its TLS library, or got from it */
};

enum segment_direction {
	DIRECTION_REQUEST = 1,
	DIRECTION_RESPONSE = 2,
};

enum segment_flag {
	SEGMENT_HTTP2 = 1 << 0,    /* of an HTTP/2 connection, whose frames the kernel follows */
	SEGMENT_AT_FRAME = 1 << 1, /* a frame begins where the segment begins */
	SEGMENT_TLS = 1 << 2,      /* pipelined requests of HTTP/1 that a TLS library was given, or gave */
	SEGMENT_OVERTAKES = 1 << 3, /* of a response, read while the client's write is under way: that is told of later */
};

/* Indices of the counters map. begun = emitted + dropped_* + cancelled + streamed + in flight. */
enum counter {
	COUNTER_BEGUN,              /* exchanges begun */
	COUNTER_EMITTED,            /* exchanges whose first record reached the ring buffer */
	COUNTER_DROPPED_RING_FULL,  /* exchanges lost because the ring buffer was full */
	COUNTER_DROPPED_STATE_FULL, /* exchanges lost because the connections map was full */
	COUNTER_DROPPED_NOT_HTTP,   /* what looked like a request was not answered in HTTP */
	COUNTER_CANCELLED,          /* the write that began the exchange was refused (EAGAIN and the like) */
	COUNTER_STREAMS_UNTOLD,     /* of those streamed: nothing of the connection reached the ring buffer, which was full */
	COUNTER_STREAMED,           /* exchanges handed to stream mode, which user space accounts for */
	COUNTER_REEMITTED,          /* later records of exchanges that were reported before */
	COUNTER_REEMIT_LOST,        /* the same, lost because the ring buffer was full */
	COUNTER_SEGMENTS,           /* stream-mode segments emitted */
	COUNTER_SEGMENTS_LOST,      /* stream-mode segments, and upgrades, lost because the ring buffer was full */
	COUNTER_CLOSES_LOST,        /* close records lost because the ring buffer was full */
	COUNTER_PROCESSES_LOST,     /* process records lost because the ring buffer was full */
	COUNTER_PROCESS_FULL,       /* a process could not be remembered */
	COUNTER_THREAD_FULL,        /* a thread could not be remembered: no parent by thread */
	COUNTER_ENDPOINT_FULL,      /* a client's address could not be remembered: no peer */
	COUNTER_IGNORED_TLS,        /* segments of untracked connections that look like TLS */
	COUNTER_IGNORED_OTHER,      /* segments of untracked connections that are not an HTTP request */
	COUNTER_IGNORED_PORT,       /* requests on ports that are not selected */
	COUNTER_RESPONSE_ALONE,     /* response bytes without a request: it was sent before the agent started */
	COUNTER_READ_FAULT,         /* user memory that could not be read */
	COUNTER_PEERS_LOST,         /* peer records lost because the ring buffer was full */
	COUNTER_FRAMES_LOST,        /* times that the place among the frames of an HTTP/2 connection was lost */
	COUNTER_TLS_TIED,           /* TLS objects whose socket was found */
	COUNTER_TLS_UNTIED,         /* calls that moved plaintext of a TLS object whose socket was not known */
	COUNTER_TLS_CONTRADICTED,   /* TLS objects whose socket turned out to be another one, or several */
	COUNTER_TLS_FULL,           /* TLS objects, or threads that call a TLS library, that could not be remembered */
	COUNTERS,
};

struct record_exchange {
	__u16 kind; /* enum record_kind */
	__u8 role;  /* enum exchange_role */
	__u8 end;   /* enum exchange_end */
	__u32 flags; /* enum exchange_flag */
	__u64 exchange_id;   /* random, never 0: becomes the span id */
	__u64 parent_id;     /* client: the server exchange that the thread is serving, or 0 */
	__u64 peer_id;       /* server: the client exchange at the other end of the connection, or 0 */
	__u64 connection_id; /* random, never 0 */
	__u64 process_start_ns; /* start time of the process, CLOCK_BOOTTIME */
	__u64 request_start_ns; /* all times of the exchange: CLOCK_MONOTONIC */
	__u64 request_end_ns;
	__u64 response_start_ns; /* 0 without a response */
	__u64 response_end_ns;
	__u64 end_ns;         /* when the record was made: the close, the next request, the look-up */
	__u64 request_bytes;  /* head and body */
	__u64 response_bytes; /* head and body, without interim responses */
	__u32 tgid;
	__u32 request_tid;
	__u32 response_tid;
	__u32 netns;
	__u16 local_port;  /* host byte order */
	__u16 remote_port; /* host byte order */
	__u16 request_captured;  /* bytes of data that belong to the request; the response's follow them */
	__u16 response_captured;
	__u8 local_address[16]; /* IPv6, or IPv4-mapped IPv6 */
	__u8 remote_address[16];
	__u8 tail[8];
	__u32 tls; /* version << 16 | cipher suite that the ends agreed on, as TLS has them; 0: no TLS, or not seen */
	__u8 _pad[4];
};

/* Followed by the names of the process's cgroup in v2 and of those above it, without the root, each with a 0 behind it,
 * and a 0 at the end; then by the same of the memory controller's cgroup where that has a v1 hierarchy of its own.
 */
struct record_process {
	__u16 kind;
	__u16 cgroup_bytes;        /* of the first names; 0: not known */
	__u16 memory_cgroup_bytes; /* of the second */
	__u8 _pad[6];
	__u32 tgid;
	__u64 start_ns; /* CLOCK_BOOTTIME */
	__u32 uid;
	__u32 ppid;
	char comm[16]; /* of the thread group leader */
	char executable[64]; /* last component of the executable's path */
};

struct record_segment {
	__u16 kind;
	__u8 role;
	__u8 direction; /* enum segment_direction */
	__u16 captured; /* bytes of data that follow */
	__u16 flags;    /* enum segment_flag */
	__u64 connection_id;
	__u64 process_start_ns;
	__u64 time_ns;
	/* Bytes of this direction before this segment, counted since the connection entered stream mode. Of HTTP/2 whole
	 * frames may be left out that say nothing of a request, and are not counted; the gap before a segment is what lies
	 * between its offset and the end of the one before.
	 */
	__u64 offset;
	__u64 length; /* bytes of the segment; more than captured means a gap */
	__u32 tgid;
	__u32 tid;
	__u32 netns;
	__u16 local_port;
	__u16 remote_port;
	__u8 local_address[16];
	__u8 remote_address[16];
	__u32 tls; /* as in record_exchange */
	__u8 _pad[4];
};

struct record_peer {
	__u16 kind;
	__u8 _pad[6];
	__u64 connection_id;      /* the server's */
	__u64 peer_connection_id; /* the client's */
};

enum tls_notice {
	TLS_UNWATCHED = 1,   /* it moves TLS bytes on a connection that no TLS library was seen to use */
	TLS_OTHER_STACK = 2, /* its main thread called a TLS library on another stack than its own: it switches stacks */
};

struct record_tls {
	__u16 kind;
	__u16 notice; /* enum tls_notice */
	__u32 tgid;
	__u64 start_ns; /* CLOCK_BOOTTIME */
};

struct record_close {
	__u16 kind;
	__u8 role;
	__u8 end; /* END_CLOSED, END_RESET or END_TIMED_OUT */
	__u32 flags; /* FLAG_PEER_CLOSED, FLAG_STREAM */
	__u64 connection_id;
	__u64 exchange_id; /* the exchange that was open or reported last, or 0 */
	__u64 time_ns;
};

#endif
