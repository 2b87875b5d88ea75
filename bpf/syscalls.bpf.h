/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The backend for every kernel: sys_enter and sys_exit of all system calls. */
#ifndef SPANLOOM_SYSCALLS_BPF_H
#define SPANLOOM_SYSCALLS_BPF_H

#include "transfer.bpf.h"

/* Why sys_enter: outgoing bytes are complete in user memory here, and nothing of them has been sent. The raw
 * tracepoint's arguments are stable since 2.6; pt_regs through BTF needs 5.5. Cost: see docs/adr/0002.
 */
SEC("tp_btf/sys_enter")
int BPF_PROG(on_sys_enter, struct pt_regs *raw_regs, long number)
{
	syscall_regs *regs = (void *)raw_regs;
	struct transfer transfer = {};
	struct process *process;
	struct socket *socket;
	struct sock *sock;
	__u64 pid_tgid;

	switch (number) {
	case NR_write:
	case NR_sendto:
	case NR_writev:
	case NR_sendmsg:
	case NR_sendmmsg:
		break;
	default:
		return 0;
	}
	if (SYSCALL_IS_COMPAT(regs) || !capturing)
		return 0;
	pid_tgid = bpf_get_current_pid_tgid();
	if (!is_captured(pid_tgid, &process))
		return 0;
	transfer.length = LENGTH_UNKNOWN;
	switch (number) {
	case NR_write:
	case NR_sendto:
		transfer.buffer = SYSCALL_ARG2(regs);
		transfer.length = SYSCALL_ARG3(regs);
		if (!transfer.length)
			return 0;
		break;
	case NR_writev:
		from_iov(&transfer, SYSCALL_ARG2(regs), SYSCALL_ARG3(regs));
		break;
	default: /* of sendmmsg, the first message */
		if (!from_msghdr(&transfer, SYSCALL_ARG2(regs)))
			return 0;
	}
	simplify(&transfer);
	socket = socket_of_fd(SYSCALL_ARG1(regs), &sock);
	if (socket)
		on_transfer(connection_of(sock), process, socket, sock, &transfer, true, true, pid_tgid);
	return 0;
}

/* Of sendmmsg and recvmmsg the first message is handled like that of sendmsg and recvmsg. The later ones are what is seldom
 * sent on a stream socket, and following each would multiply what the verifier has to walk: their bytes are counted,
 * and are a gap. A request that begins in one of them is not seen.
 */
#define MESSAGES_MAX 64 /* of up to 1024 (UIO_MAXIOV); the bytes of later ones are missed */

/* Bytes that the messages behind the first one moved. Global for the reason given at absorb_iovecs(). */
__noinline __u64 later_messages(__u64 messages, __u64 moved_messages)
{
	__u64 total = 0;

	for (__u32 i = 1; i < MESSAGES_MAX; i++) {
		__u32 length = 0;

		if (i >= moved_messages)
			break;
		if (bpf_probe_read_user(&length, sizeof(length), &((struct user_mmsghdr *)messages)[i].length)) {
			count(COUNTER_READ_FAULT);
			break;
		}
		total += length;
	}
	return total;
}

static __always_inline void on_later_messages(syscall_regs *regs, long moved_messages, bool egress)
{
	struct connection *connection;
	struct sock *sock;
	__u64 total;

	if (moved_messages < 2 || !socket_of_fd(SYSCALL_ARG1(regs), &sock))
		return;
	connection = connection_of(sock);
	if (!connection)
		return;
	total = later_messages(SYSCALL_ARG2(regs), moved_messages);
	if (total)
		on_bodiless_bytes(connection, total, egress);
}

/* Bytes that a write of several buffers offers, as far as it is cheap to tell; 0 when it is not. */
static __always_inline __u64 offered_bytes(__u64 iov, __u64 iov_count)
{
	struct user_iovec iovecs[4];
	__u64 total = 0;

	if (iov_count > 4)
		return 0;
	if (bpf_probe_read_user(iovecs, iov_count * sizeof(iovecs[0]), (void *)iov))
		return 0;
	for (int i = 0; i < 4; i++) {
		if (i < iov_count)
			total += iovecs[i].length;
	}
	return total;
}

/* A write returned. Nothing is to be done in the common case: all that was offered was taken. */
static __always_inline void on_write_exit(syscall_regs *regs, __u64 number, long moved, __u64 pid_tgid)
{
	struct transfer transfer = {};
	struct connection *connection;
	struct process *process;
	struct sock *sock;
	__u64 offered = 0, key;

	switch (number) {
	case NR_write:
	case NR_sendto:
		transfer.buffer = SYSCALL_ARG2(regs);
		offered = SYSCALL_ARG3(regs);
		if (!offered)
			return; /* moves nothing, and its entry was not handled */
		break;
	case NR_writev:
		from_iov(&transfer, SYSCALL_ARG2(regs), SYSCALL_ARG3(regs));
		offered = offered_bytes(transfer.iov, transfer.iov_count);
		break;
	default:
		if (!from_msghdr(&transfer, SYSCALL_ARG2(regs)))
			return;
		offered = offered_bytes(transfer.iov, transfer.iov_count);
		if (number == NR_sendmmsg && moved > 0) {
			__u32 length = 0;

			bpf_probe_read_user(&length, sizeof(length),
					    &((struct user_mmsghdr *)SYSCALL_ARG2(regs))->length);
			moved = length;
		}
	}
	if (!moved || !capturing)
		return;
	if (moved == offered && offered <= MAY_BLOCK_BYTES && !stream_connections)
		return;
	if (!is_captured(pid_tgid, &process))
		return;
	if (!socket_of_fd(SYSCALL_ARG1(regs), &sock))
		return;
	key = (__u64)sock;
	connection = bpf_map_lookup_elem(&connections, &key);
	if (!connection || connection->mode == MODE_IGNORED || connection->tls)
		return;
	if (connection->mode == MODE_EXCHANGE)
		settle_write(connection, moved, pid_tgid);
	else
		stream_write(connection, &transfer, moved, pid_tgid);
}

/* False when the descriptor is no socket's. */
static __always_inline bool on_spliced_bytes(__u32 fd, __u64 moved, bool egress)
{
	struct connection *connection;
	struct sock *sock;
	__u64 key;

	if (!socket_of_fd(fd, &sock))
		return false;
	key = (__u64)sock;
	connection = bpf_map_lookup_elem(&connections, &key);
	if (connection)
		on_bodiless_bytes(connection, moved, egress);
	return true;
}

/* Why sys_exit: incoming bytes are in user memory now, and the argument registers still hold what the call was given.
 * Cost: see docs/adr/0002.
 */
SEC("tp_btf/sys_exit")
int BPF_PROG(on_sys_exit, struct pt_regs *raw_regs, long moved)
{
	syscall_regs *regs = (void *)raw_regs;
	__u64 number = SYSCALL_NR(regs), pid_tgid;
	struct transfer transfer = {};
	struct process *process;
	struct socket *socket;
	struct sock *sock;
	__u32 flags = 0;

	switch (number) {
	case NR_write:
	case NR_sendto:
	case NR_writev:
	case NR_sendmsg:
	case NR_sendmmsg:
		if (SYSCALL_IS_COMPAT(regs))
			return 0;
		on_write_exit(regs, number, moved, bpf_get_current_pid_tgid());
		opaque(regs); /* the number is read again: keeping it would keep apart what the verifier may take as one */
		if (SYSCALL_NR(regs) == NR_sendmmsg)
			on_later_messages(regs, moved, true);
		return 0;
	case NR_poll:
	case NR_ppoll:
		if (SYSCALL_ARG2(regs) <= 2)
			return 0;
		/* fall through */
	case NR_epoll_wait:
	case NR_epoll_pwait:
	case NR_epoll_pwait2:
		on_event_wait(bpf_get_current_pid_tgid());
		return 0;
	case NR_read:
	case NR_readv:
	case NR_recvfrom:
	case NR_recvmsg:
	case NR_recvmmsg:
		break;
	/* These act on tracked connections only: the process need not be looked up. */
	case NR_sendfile:
		if (moved > 0 && !SYSCALL_IS_COMPAT(regs))
			on_spliced_bytes(SYSCALL_ARG1(regs), moved, true);
		return 0;
	case NR_splice: /* into a socket, or out of one */
		if (moved > 0 && !SYSCALL_IS_COMPAT(regs) && !on_spliced_bytes(SYSCALL_ARG3(regs), moved, true))
			on_spliced_bytes(SYSCALL_ARG1(regs), moved, false);
		return 0;
	default:
		return 0;
	}
	if (moved <= 0 || !capturing || SYSCALL_IS_COMPAT(regs))
		return 0;
	pid_tgid = bpf_get_current_pid_tgid();
	if (!is_captured(pid_tgid, &process))
		return 0;
	transfer.length = moved;
	switch (number) {
	case NR_read:
		transfer.buffer = SYSCALL_ARG2(regs);
		break;
	case NR_recvfrom:
		transfer.buffer = SYSCALL_ARG2(regs);
		flags = SYSCALL_ARG4(regs);
		break;
	case NR_readv:
		from_iov(&transfer, SYSCALL_ARG2(regs), SYSCALL_ARG3(regs));
		break;
	case NR_recvmsg:
		if (!from_msghdr(&transfer, SYSCALL_ARG2(regs)))
			return 0;
		flags = SYSCALL_ARG3(regs);
		break;
	case NR_recvmmsg: {
		__u32 length = 0; /* of the first message; moved counts them */

		if (!from_msghdr(&transfer, SYSCALL_ARG2(regs)))
			return 0;
		if (bpf_probe_read_user(&length, sizeof(length),
					&((struct user_mmsghdr *)SYSCALL_ARG2(regs))->length) ||
		    !length)
			return 0;
		transfer.length = length;
		flags = SYSCALL_ARG4(regs);
		break;
	}
	default:
		return 0;
	}
	if (flags & (MSG_PEEK | MSG_OOB | MSG_ERRQUEUE))
		return 0;
	simplify(&transfer);
	socket = socket_of_fd(SYSCALL_ARG1(regs), &sock);
	if (socket)
		on_transfer(connection_of(sock), process, socket, sock, &transfer, false, false, pid_tgid);
	opaque(regs); /* as above */
	if (SYSCALL_NR(regs) == NR_recvmmsg)
		on_later_messages(regs, moved, false);
	return 0;
}

#endif
