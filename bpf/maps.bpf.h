/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Every map and every value that lives in one, and the constants that user space sets before loading. */
#ifndef SPANLOOM_MAPS_BPF_H
#define SPANLOOM_MAPS_BPF_H

#include "compat.bpf.h"
#include "events.h"

/* Set by the loader. The verifier sees them as constants: .rodata is frozen before the programs are verified. */
const volatile __u32 request_cap = 1024; /* captured bytes of a request, at most REQUEST_CAP_MAX */
const volatile __u32 response_cap = 256; /* captured bytes of a response, at most RESPONSE_CAP_MAX */
const volatile __u64 quiet_ns = 50000000;
const volatile __u64 open_ns = 200000000;
const volatile __u64 expire_ns = 600000000000;
const volatile __u64 wakeup_bytes = 2 << 20; /* waiting bytes at which user space is woken before its time */

enum capture_limit {
	REQUEST_CAP_MAX = 8192,
	RESPONSE_CAP_MAX = 2048,
	/* Room behind the two captures, so that one copy of up to this many bytes may start anywhere inside them: the
	 * verifier bounds offset and length one by one and does not know that the code keeps their sum below the cap.
	 */
	COPY_SLACK = 256,
};
#define SEGMENT_CAP 4096
#define SEGMENT_SLACK 1024 /* like COPY_SLACK */
/* IOV_MAX of user space (UIO_MAXIOV, include/uapi/linux/uio.h) is 1024. A head in more pieces than this is cut. */
#define IOVECS_MAX 256

enum connection_mode {
	MODE_EXCHANGE = 0,
	MODE_STREAM = 1,  /* pipelined: segments are forwarded as they come */
	MODE_IGNORED = 2, /* not HTTP, or handed over to another protocol */
};

enum exchange_state {
	STATE_IDLE = 0,
	STATE_REQUEST = 1,  /* request bytes were seen, no final response byte yet */
	STATE_RESPONSE = 2, /* response bytes were seen */
};

/* Where one direction of an HTTP/2 connection stands among its frames. */
struct frame_walk {
	__u64 entered_ns; /* requests: when the call was entered that sends them and has not been told of, or 0; HTTP/1, too */
	__u32 left;      /* payload bytes of the frame at hand that are still to come */
	__u32 keep;      /* so many of these, the next ones, are forwarded */
	__u8 header[24]; /* the first `held` bytes of a frame header; there is room for one more behind any beginning */
	__u8 held;
	__u8 ends;   /* the frame at hand ends its stream */
	__u8 passed; /* the frame at hand is left out */
	__u8 lost;   /* where a frame begins is not known */
	__u8 _pad[4];
};

/* How a write was handled when it was entered. */
enum write_kind {
	WRITE_REQUEST = 0, /* as an exchange's request */
	WRITE_RESPONSE = 1,
	WRITE_STREAM = 2, /* in stream mode: it is told of when it returns */
};

struct connection {
	__u64 sock;               /* the entry's key */
	__u64 peer_sock;          /* key of the other end's connection on this node, or 0 */
	__u64 peer_connection_id; /* guards against a recycled peer_sock */
	__u64 claimed_id;         /* exchange that the other end took for its peer: one request has one receiver */
	__u64 reported_bytes;     /* response bytes when the exchange was reported last */
	__u64 tail;               /* last 8 response bytes in memory order */
	/* What a refused or short write has to take back; valid while write_tid is not 0. */
	__u64 write_offered;
	__u64 undo_end_ns;
	__u64 undo_tail;
	__u64 undo_exchange_id;
	/* Progress of a copy from several buffers; meaningful only while one is under way. */
	__u64 cursor_total;
	__u64 cursor_index;
	__u64 cursor_offset;
	__u64 cursor_limit;
	__u64 closed_ns;  /* of a connection that lingers: when TCP closed it */
	__u64 stream_offsets[2]; /* stream mode: bytes that went by, requests' and responses' */
	__u64 tls_object; /* key of the entry in tls_objects that leads here, with tls_tgid; 0 when none does */
	__u32 tls_tgid;
	__u32 undo_data_length;
	__u32 write_tid;
	__u32 ports_generation; /* of the selection of ports that the connection was judged by */
	__u32 write_seq;    /* socket backend: TCP's number of the first byte of the write handled last */
	__u32 received_seq; /* socket backend: TCP's number of the next byte to be read, as far as reads were seen */
	__u32 data_length; /* captured bytes in data: the request's, then the response's */
	__u32 hello_looks; /* transfers of the connection that were looked at for a ServerHello; HELLO_LOOKS: no more are */
	__u8 undo_state;
	__u8 write_kind;
	__u8 state;
	__u8 mode;
	__u8 reports;    /* records made of this exchange */
	__u8 peer_tries; /* look-ups of the peer that found none */
	__u8 tail_valid;
	__u8 undo_tail_valid;
	__u8 lingers; /* closed by TCP, but the process may still come with bytes of it */
	__u8 closed_end; /* with closed_ns: enum exchange_end */
	__u8 writing; /* a call of a TLS library was entered that writes, and has not returned */
	__u8 told; /* stream mode: a segment reached the ring buffer */
	__u8 passed_over; /* ignored because of its port: looked at again when the selection changes */
	__u8 follows; /* the exchange began behind another response, which may go on */
	__u8 http2; /* in stream mode: of HTTP/2 */
	__u8 tls; /* what the socket carries are TLS records; the exchange is made of what the TLS library is given */
	struct frame_walk walks[2]; /* of HTTP/2: the requests' direction, the responses' */
	struct record_exchange exchange; /* followed by data: together they are the record */
	__u8 data[REQUEST_CAP_MAX + RESPONSE_CAP_MAX + COPY_SLACK];
};

/* Key: address of the struct sock. Value: struct connection, its size set by the loader to what the caps need.
 * Inserted by the first request on a connection; deleted when the socket reaches TCP_CLOSE. Full: the exchange is
 * counted as dropped (state_full) and the connection is tried again at its next request.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 32768);
	__uint(key_size, sizeof(__u64));
	__uint(value_size, sizeof(struct connection));
} connections SEC(".maps");

struct endpoint {
	__u8 address[16];
	__u32 netns; /* 0 unless the address is loopback */
	__u16 port;
	__u16 server_port; /* where the client connected to; 0 in the entry for servers behind a translated address */
};

/* Key: a client's own address as its server sees it. Value: key of the client's connection. Two entries each: one with
 * the server's port, since connections to different servers may share the client's port, and one without, for servers
 * that are reached under another address than their own (ClusterIP).
 * Inserted with a client's connection, deleted with it. Full: exchanges of that connection have no peer.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 32768);
	__type(key, struct endpoint);
	__type(value, __u64);
} endpoints SEC(".maps");

enum process_state {
	PROCESS_UNKNOWN = 0, /* announced, captured until user space decides */
	PROCESS_TRACED = 1,
	PROCESS_IGNORED = 2,
};

struct process {
	__u64 start_ns; /* CLOCK_BOOTTIME; 0 in the agent's own entry */
	__u32 state;    /* enum process_state */
	__u32 served;   /* 1 once the process began to serve an exchange */
	__u32 tls_told; /* bits of enum tls_notice that user space was told of */
	__u32 _pad;
};

/* Key: tgid. Inserted by the process's first exchange (unknown), and changed by user space (traced, ignored), which
 * inserts only the agent's own; deleted at exit and exec. Full: the process stays unknown, which costs a record per
 * exchange, counted as process_full.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 8192);
	__type(key, __u32);
	__type(value, struct process);
} processes SEC(".maps");

struct thread {
	__u64 exchange_id; /* the server exchange that the thread read last, 0 when it cannot be told */
	__u64 sock;        /* the connection of that exchange */
	__u32 tgid;
	__u32 multiplexes; /* 1: seen to wait for events, or to take another request, with an exchange unanswered */
};

/* Key: tid. Inserted when a thread reads its first request; deleted at thread exit. Full: no parent by thread. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct thread);
} threads SEC(".maps");

struct tls_key {
	__u64 object; /* address of the library's object for one connection: SSL, gnutls_session_t */
	__u32 tgid;
	__u32 _pad;
};

struct tls_object {
	__u64 sock;          /* key of its connection */
	__u64 connection_id; /* guards against a recycled sock */
	__u64 is_memory;     /* 1: the socket's bytes are moved outside of the library's calls */
};

/* Key: a TLS library's object that was called before its thread sent TLS bytes outside of calls. Value: key of the
 * socket they went to. When it is the one whose bytes are received before the object's next call, the two are tied.
 * Full: the oldest one goes, and its object is tied later.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct tls_key);
	__type(value, __u64);
} tls_candidates SEC(".maps");

/* Key: a TLS library's object in a process. Inserted when its socket is found, together with the socket's connection;
 * at most one for each connection, deleted with it, when the library frees the object, and when it contradicts. Full:
 * the object's bytes are not seen, counted as tls_full.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 32768);
	__type(key, struct tls_key);
	__type(value, struct tls_object);
} tls_objects SEC(".maps");

enum tls_operation {
	TLS_READ = 1,
	TLS_WRITE = 2,
	TLS_HANDSHAKE = 3,
};

/* A call of a TLS library that a thread is in. */
struct tls_call {
	__u64 buffer;
	__u64 length;
	__u64 done; /* where the number of bytes goes that are moved, 0 when it is returned */
	__u64 entered_sock; /* connection that took the bytes of a write at its entry, 0 when none did */
	__u8 operation; /* enum tls_operation */
	__u8 depth;     /* calls of the same kind within the call, which are the library's own; 0: there is no call */
	__u8 _pad[6];
};

#define TLS_SEVERAL 1 /* in place of an object: more than one */

struct tls_thread {
	__u64 object; /* of the call under way, 0 outside of calls */
	__u64 stack;  /* stack pointer at its entry: a call that begins above it proves that this one was left */
	__u64 sock;   /* socket that moved TLS bytes within the call, 0 when none did yet */
	__u64 last_sock; /* connection that the last call moved plaintext of */
	/* For objects whose socket is read and written outside of calls. */
	__u64 received_sock; /* socket of the last TLS bytes moved outside of calls, when they were received; else 0 */
	__u64 called_object; /* the object that was called since then, 0 when none was, or TLS_SEVERAL */
	__u64 assumed_sock; /* called_object is assumed to be tied to it until what is sent next proves it, or not; or 0 */
	struct tls_call call;
	struct tls_call outer; /* the call in which `call` was made by the program, which the library had called back */
	__u32 tgid;
	__u8 conflict;  /* several sockets, or several objects, within one call */
	__u8 follows;   /* the call is the first one since bytes were received */
	__u8 _pad[2];
};

struct hello {
	__u32 tls;    /* see record_exchange */
	__u32 ports; /* of the socket: another connection may get its address */
};

/* Key: tid. Inserted by the thread's first call of a TLS library, or the first TLS bytes that it receives while one is
 * watched; deleted at thread exit. Full: the thread's TLS is not seen, counted as tls_full.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct tls_thread);
} tls_threads SEC(".maps");

/* Key: address of the struct sock. Inserted when a ServerHello goes through a socket that no TLS object is known to be tied
 * to; deleted when one is. What stays, of programs that are not watched, is pushed out by what is newer.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, struct hello);
} hellos SEC(".maps");

/* Key: server port, host byte order. Value: 1 selected, 0 not. Written by user space before attaching. Cannot fill. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u16);
	__type(value, __u8);
} ports SEC(".maps");

/* The records of events.h. Full: the record is counted as dropped (ring_full). */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 8 << 20);
} records SEC(".maps");

/* Key: enum counter. Per CPU; user space sums. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

/* Socket backend: the send that is under way on this CPU, so that its end need not look the connection up in the common
 * case. Another thread may have taken the place meanwhile; then the end looks it up.
 */
struct send {
	__u64 sock;
	__u64 offered; /* bytes */
	__u32 tid;
	__u32 may_stream; /* 0: the connection is not in stream mode */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct send);
} sends SEC(".maps");

/* Threads that may be at work on one CPU at a time: where the kernel can be preempted, so can these programs (uprobes since
 * 6.0, commit 8c7dcb84e3b7; tracepoints since 7.0), and another one runs meanwhile.
 */
#define SCRATCHES 3

struct segment_scratch {
	__u32 owner; /* tid of the thread that has it, 0 when none does */
	__u32 _pad;
	struct record_segment record;
	__u8 data[SEGMENT_CAP + SEGMENT_SLACK];
	/* A walk over the frames of a transfer: where its bytes are, and how far it is. */
	struct user_iovec iovec; /* the buffer at hand */
	__u64 iov;
	__u64 iov_count; /* 0: there is the one buffer only */
	__u64 length;
	__u64 done;   /* bytes of the transfer that were walked over */
	__u64 index;  /* the iovec at hand, and the offset in it */
	__u64 offset;
	__u64 gap;    /* bytes that are not captured behind those that are */
	__u64 ended;  /* 1: a stream ended in the gap, which user space has to be told of */
};

/* Names of cgroups up to this size in all are told, and levels up to this number of each: a node of kind in rootless
 * Podman has its containers at the twelfth. A name has 255 bytes at most.
 */
#define CGROUP_NAMES_CAP 2048
#define CGROUP_NAME_MAX 256
#define CGROUP_LEVELS 16

struct process_scratch {
	__u32 owner; /* tid of the thread that used it last */
	__u32 names_bytes;
	struct record_process record;
	char names[2 * CGROUP_NAMES_CAP]; /* a power of two */
};

/* Per-CPU space to build the record of a process. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct process_scratch);
} process_scratch SEC(".maps");

/* Per-CPU spaces to build records that do not live in a connection. All taken: what the thread moved is lost, and counted. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, SCRATCHES);
	__type(key, __u32);
	__type(value, struct segment_scratch);
} segment_scratch SEC(".maps");

/* Per-CPU copy of a connection while the sweep decides whether to report it. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct connection));
} sweep_scratch SEC(".maps");

/* Never touched: it makes the compiler describe in BTF every type that user space generates its layout from. */
union {
	struct record_exchange exchange;
	struct record_process process;
	struct record_segment segment;
	struct record_close close;
	struct record_peer peer;
	struct record_tls tls;
	enum tls_notice notice;
	enum record_kind kind;
	enum exchange_role role;
	enum exchange_end end;
	enum exchange_flag flag;
	enum segment_flag segment_flag;
	enum counter counter;
	enum capture_limit limit;
	enum process_state process_state;
} wire_types;

/* .bss, mapped by user space. */
__u64 oldest_unreported_ns; /* lowered by the sweep to the begin of the oldest exchange that no record told of yet */
__u64 capturing; /* set by user space once all programs are attached: half of them would misread what they see */
/* Settings that user space may change at any time. */
__u64 request_limit = REQUEST_CAP_MAX; /* bytes of a request that are captured, as far as request_cap allows */
__u64 response_limit = RESPONSE_CAP_MAX;
__u64 ports_filtered; /* 1: look ports up in the map of that name */
__u64 ports_generation; /* counts the changes of the selection of ports */
__u64 ports_default = 1; /* whether a port that is not in the map is selected */
__u64 http2_enabled = 1; /* 0: HTTP/2 is neither recognised nor followed */
__u64 tls_enabled; /* 1: user space wants to know of processes that use TLS */
__u64 tls_attached; /* libraries and executables whose calls are watched */
__u64 draining; /* set by user space before it ends: the sweep reports every exchange at once */
__u64 tracked_connections; /* entries of the connections map: 0 spares user space the sweep */
__u64 stream_connections; /* of them, those in stream mode: 0 lets exits of write calls return at once */
__u64 streams_entered; /* counts the connections that ever entered it */

static __always_inline void count_stream(void)
{
	__sync_fetch_and_add(&stream_connections, 1);
	__sync_fetch_and_add(&streams_entered, 1);
}

static __always_inline void count(__u32 counter)
{
	__u64 *value = bpf_map_lookup_elem(&counters, &counter);

	/* Atomic although per CPU: a program in softirq may interrupt one in process context. */
	if (value)
		__sync_fetch_and_add(value, 1);
}

#endif
