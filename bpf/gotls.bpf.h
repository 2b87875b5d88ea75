/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Go's crypto/tls: what a goroutine gives to a tls.Conn and gets from it joins the exchange of the socket behind it.
 *
 * The socket is not inferred: the tls.Conn leads to it. A call may begin on one thread and end on another, so that it is
 * known by its goroutine, which is in a register at every instruction that user space attaches these programs to. It
 * moves the goroutines' stacks: nothing of a stack is remembered, and nothing there is changed.
 */
#ifndef SPANLOOM_GOTLS_BPF_H
#define SPANLOOM_GOTLS_BPF_H

#include "tls.bpf.h"

struct go_call {
	__u64 object; /* the tls.Conn */
	__u64 buffer;
	__u64 length;
	__u64 entered_sock; /* connection that took the bytes of a write at its entry, 0 when none did */
	__u64 pid_tgid; /* of the thread that entered */
	__u64 operation; /* enum tls_operation */
};

/* Key: a goroutine (address of its `g`) of a process. Value: the call that it is in, the innermost one. Inserted at the
 * entry, deleted at the return; what a process or a panic leaves behind is written over, or goes when the map is full.
 * Full: the oldest call goes, and what it reads is counted as tls_untied.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 32768);
	__type(key, struct tls_key);
	__type(value, struct go_call);
} go_calls SEC(".maps");

/* Runtime layouts that have not changed since Go 1.17: an interface value (runtime.iface), an interface table (abi.ITab),
 * and the begin of net.netFD, which is an internal/poll.FD.
 */
struct go_interface {
	__u64 table;
	__u64 data;
};

struct go_fd {
	__u64 state; /* fdMutex */
	__u32 read_semaphore;
	__u32 write_semaphore;
	__u64 descriptor;
};

#define GO_TABLE_HASH 16
#define GO_FD_CLOSED 1 /* mutexClosed */
#define GO_WRAPPERS 3
#define GO_SPILLED 8 /* behind the return address, or the word that a callee keeps it in */

/* The hash of a type is the compiler's, of the type's name and of nothing else (cmd/compile/internal/types.TypeHash): of
 * the MD5 of it up to Go 1.18, of SHA-256 with all bits inverted up to 1.23, with those of the first byte since.
 */
static __always_inline bool is_tcp_conn(__u32 hash)
{
	return hash == 0x43fdf3b9 || hash == 0xbc020cb9 || hash == 0xb954d952; /* *net.TCPConn */
}

static __always_inline bool is_tls_conn(__u32 hash)
{
	return hash == 0x395076f1 || hash == 0xc6af89f1 || hash == 0xa0724f49; /* *crypto/tls.Conn */
}

/* The socket of a tls.Conn, or 0. Its first field is the net.Conn that it was made from: a *net.TCPConn, or something
 * that begins with one in the same way, as what limits or measures connections does (golang.org/x/net/netutil). TLS over
 * TLS is the other tls.Conn's, and has none. Global for the reason given at absorb_iovecs().
 */
__noinline __u64 sock_of_go(__u64 object)
{
	struct go_interface conn = {};
	struct socket *socket;
	struct sock *sock = 0;
	struct go_fd fd = {};
	bool found = false;
	__u64 network_fd = 0;

#pragma unroll
	for (int i = 0; i < GO_WRAPPERS; i++) {
		__u32 hash = 0;

		if (found)
			break;
		if (bpf_probe_read_user(&conn, sizeof(conn), (void *)object) ||
		    bpf_probe_read_user(&hash, sizeof(hash), (void *)(conn.table + GO_TABLE_HASH)))
			return 0;
		if (is_tls_conn(hash))
			return 0;
		found = is_tcp_conn(hash);
		object = conn.data;
	}
	if (!found || bpf_probe_read_user(&network_fd, sizeof(network_fd), (void *)object) ||
	    bpf_probe_read_user(&fd, sizeof(fd), (void *)network_fd) || (fd.state & GO_FD_CLOSED))
		return 0;
	socket = socket_of_fd(fd.descriptor, &sock);
	if (!socket || !is_tcp(socket, sock))
		return 0;
	return (__u64)sock;
}

static __always_inline __u64 tie_go(__u64 object, __u32 tgid)
{
	__u64 sock = sock_of_go(object);
	bool is_memory;

	if (!sock || tied_sock(object, tgid, &is_memory) == sock)
		return sock;
	return tie(object, sock, false) ? sock : 0;
}

/* A call begins. One that is in the goroutine's place was left by a panic, or is the one that this is made in. `entered`
 * is the connection that took the bytes of a write, with the operation in the bits that its alignment leaves. Global for
 * the reason given at absorb_iovecs().
 */
__noinline int on_go_enter(__u64 goroutine, __u64 object, __u64 buffer, __u64 length, __u64 entered)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid();
	struct tls_key key = { .object = goroutine, .tgid = pid_tgid >> 32 };
	struct go_call call = {
		.object = object, .buffer = buffer, .length = length, .pid_tgid = pid_tgid,
		.entered_sock = entered & ~7ULL, .operation = entered & 7,
	};
	struct process *process;

	if (!capturing || !object || !is_captured(pid_tgid, &process))
		return 0;
	if (bpf_map_update_elem(&go_calls, &key, &call, BPF_ANY))
		count(COUNTER_TLS_FULL);
	return 0;
}

/* What is about to be written is known before the peer can have read it. Returns the connection that took it, or 0. Global,
 * so that the verifier walks it in the program for writes only.
 */
__noinline __u64 on_go_write_enter(__u64 object, __u64 buffer, __u64 length)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid(), sock;
	struct process *process;

	if (!capturing || !object || !length || !is_captured(pid_tgid, &process))
		return 0;
	sock = tie_go(object, pid_tgid >> 32);
	if (sock)
		on_plaintext(sock, buffer, length, TLS_EGRESS | TLS_ENTERING);
	return sock;
}

/* Where the caller leaves room for the arguments that came in registers (abi-internal.md, "Stack layout"). Conn.Read calls
 * others before it needs them, and so has put them there.
 */
struct go_arguments {
	__u64 object;
	__u64 buffer;
	__u64 length;
};

/* A read that began before the probes were there: that of every idle connection. */
static __always_inline bool find_go_call(struct go_call *call, __u64 arguments, long moved, __u64 pid_tgid)
{
	struct go_arguments found = {};
	struct process *process;

	if (moved <= 0 || !capturing || !is_captured(pid_tgid, &process))
		return false;
	if (arguments && !bpf_probe_read_user(&found, sizeof(found), (void *)arguments) && moved <= found.length &&
	    sock_of_go(found.object)) {
		call->object = found.object;
		call->buffer = found.buffer;
		call->operation = TLS_READ;
		return true;
	}
	count(COUNTER_TLS_UNTIED);
	return false;
}

/* A call returns `result`. `arguments` is where those of a read are, 0 for a write. Global for the reason given at
 * absorb_iovecs().
 */
__noinline int on_go_leave(__u64 goroutine, __u64 result, __u64 arguments)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid(), sock;
	struct tls_key key = { .object = goroutine, .tgid = pid_tgid >> 32 };
	struct go_call *entered, call = {};
	long moved = result;

	entered = bpf_map_lookup_elem(&go_calls, &key);
	if (entered) {
		call = *entered;
		bpf_map_delete_elem(&go_calls, &key);
	} else if (!find_go_call(&call, arguments, moved, pid_tgid)) {
		return 0;
	}
	if (!capturing)
		return 0;
	if (call.entered_sock)
		on_write_left(call.entered_sock, call.buffer, call.length, moved > 0 ? moved : -1, call.pid_tgid);
	if (moved <= 0 || call.entered_sock)
		return 0;
	sock = call.operation == TLS_READ ? tie_go(call.object, key.tgid) : 0;
	if (sock)
		on_plaintext(sock, call.buffer, moved, 0);
	else
		count(COUNTER_TLS_UNTIED);
	return 0;
}

/* Why these two functions: every use of a tls.Conn comes down to them, net/http's and HTTP/2's too, and they have kept
 * their form since Go 1.0. Receiver and arguments are in the registers of ABIInternal since Go 1.17.
 */
SEC("uprobe")
int on_go_read(syscall_regs *regs)
{
	return on_go_enter(GO_GOROUTINE(regs), GO_ARG1(regs), GO_ARG2(regs), GO_ARG3(regs), TLS_READ);
}

SEC("uprobe")
int on_go_write(syscall_regs *regs)
{
	__u64 sock = on_go_write_enter(GO_ARG1(regs), GO_ARG2(regs), GO_ARG3(regs));

	return on_go_enter(GO_GOROUTINE(regs), GO_ARG1(regs), GO_ARG2(regs), GO_ARG3(regs), sock | TLS_WRITE);
}

/* Why on each returning instruction: a uretprobe would write into a stack that moves. */
SEC("uprobe")
int on_go_read_return(syscall_regs *regs)
{
	return on_go_leave(GO_GOROUTINE(regs), GO_RESULT(regs), CALL_STACK(regs) + GO_SPILLED);
}

SEC("uprobe")
int on_go_write_return(syscall_regs *regs)
{
	return on_go_leave(GO_GOROUTINE(regs), GO_RESULT(regs), 0);
}

#endif
