/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What the probes of the socket layer have in common: which system call a thread is in. */
#ifndef SPANLOOM_CALLS_BPF_H
#define SPANLOOM_CALLS_BPF_H

#include "transfer.bpf.h"

/* What a thread asked of the kernel, or 0: kernel threads, and 32-bit tasks, whose calls are others. */
static __always_inline syscall_regs *call_of(struct task_struct *task)
{
	syscall_regs *regs;

	if (TASK_FIELD(task, flags) & PF_KTHREAD)
		return 0;
	regs = registers_of(task);
	return is_native_call(regs) ? regs : 0;
}

/* A send of the thread itself, in a system call that is not io_uring's. */
static __always_inline bool is_write_call(void)
{
	syscall_regs *regs = call_of(current_task());

	if (!regs)
		return false;
	switch (CALL_REGISTER(regs, SYSCALL_NR)) {
	case NR_write:
	case NR_sendto:
	case NR_writev:
	case NR_sendmsg:
	case NR_sendmmsg:
		return true;
	}
	return false;
}

/* The same of what is received. */
static __always_inline bool is_read_call(void)
{
	syscall_regs *regs = call_of(current_task());

	if (!regs)
		return false;
	switch (CALL_REGISTER(regs, SYSCALL_NR)) {
	case NR_read:
	case NR_recvfrom:
	case NR_readv:
	case NR_recvmsg:
	case NR_recvmmsg:
		return true;
	}
	return false;
}

/* Why sched_switch: without hooks on system calls this is where a thread is seen to wait for events. Its first arguments
 * are stable since 2.6 but for 5.18, which put another before the thread (commit fa2c3254d7cf, taken back in 5.19).
 */
SEC("tp_btf/sched_switch")
int BPF_PROG(on_switch, bool preempted, struct task_struct *previous)
{
	syscall_regs *regs;

	if (preempted)
		return 0;
	regs = call_of(previous);
	if (!regs)
		return 0;
	switch (CALL_REGISTER(regs, SYSCALL_NR)) {
	case NR_poll:
	case NR_ppoll:
		if (CALL_REGISTER(regs, SYSCALL_ARG2) <= 2)
			return 0;
		/* fall through */
	case NR_epoll_wait:
	case NR_epoll_pwait:
	case NR_epoll_pwait2:
		on_event_wait((__u64)previous->tgid << 32 | (__u32)previous->pid);
	}
	return 0;
}

#endif
