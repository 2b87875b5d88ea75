/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Every difference between kernels, architectures or loaders, each with where it comes from. */
#ifndef SPANLOOM_COMPAT_BPF_H
#define SPANLOOM_COMPAT_BPF_H

#include "kernel_types.h"

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

/* Syscall numbers: arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h. They are ABI. */
#if defined(__TARGET_ARCH_x86)
#define NR_read 0
#define NR_write 1
#define NR_poll 7
#define NR_readv 19
#define NR_writev 20
#define NR_sendfile 40
#define NR_sendto 44
#define NR_recvfrom 45
#define NR_sendmsg 46
#define NR_recvmsg 47
#define NR_epoll_wait 232
#define NR_ppoll 271
#define NR_splice 275
#define NR_epoll_pwait 281
#define NR_recvmmsg 299
#define NR_sendmmsg 307
#define NR_epoll_pwait2 441

#define syscall_regs struct pt_regs___x86
#define SYSCALL_NR(regs) ((regs)->orig_ax)
#define SYSCALL_ARG1(regs) ((regs)->di)
#define SYSCALL_ARG2(regs) ((regs)->si)
#define SYSCALL_ARG3(regs) ((regs)->dx)
#define SYSCALL_ARG4(regs) ((regs)->r10)
/* 0x23 is __USER32_CS: a 32-bit task, whose numbers and iovecs are others (arch/x86/include/asm/segment.h). */
#define SYSCALL_IS_COMPAT(regs) ((regs)->cs == 0x23)
/* The arguments of a function of user space, and what it returned: System V ABI, "Function Calling Sequence". */
#define CALL_ARG1(regs) ((regs)->di)
#define CALL_ARG2(regs) ((regs)->si)
#define CALL_ARG3(regs) ((regs)->dx)
#define CALL_ARG4(regs) ((regs)->cx)
#define CALL_STACK(regs) ((regs)->sp)
#define CALL_RESULT(regs) ((regs)->ax)
/* The same of a Go function, and the goroutine: src/cmd/compile/abi-internal.md in Go's source, "amd64 architecture". */
#define GO_ARG1(regs) ((regs)->ax)
#define GO_ARG2(regs) ((regs)->bx)
#define GO_ARG3(regs) ((regs)->cx)
#define GO_RESULT(regs) ((regs)->ax)
#define GO_GOROUTINE(regs) ((regs)->r14)

#elif defined(__TARGET_ARCH_arm64)
#define NR_epoll_pwait 22
#define NR_read 63
#define NR_write 64
#define NR_readv 65
#define NR_writev 66
#define NR_sendfile 71
#define NR_ppoll 73
#define NR_splice 76
#define NR_sendto 206
#define NR_recvfrom 207
#define NR_sendmsg 211
#define NR_recvmsg 212
#define NR_recvmmsg 243
#define NR_sendmmsg 269
#define NR_epoll_pwait2 441
#define NR_epoll_wait (-1)
#define NR_poll (-2)

#define syscall_regs struct pt_regs___arm64_frame
#define SYSCALL_NR(regs) ((__u32)(regs)->syscallno)
/* x0 is overwritten by the return value; the first argument survives in orig_x0. */
#define SYSCALL_ARG1(regs) ((regs)->orig_x0)
#define SYSCALL_ARG2(regs) ((regs)->regs[1])
#define SYSCALL_ARG3(regs) ((regs)->regs[2])
#define SYSCALL_ARG4(regs) ((regs)->regs[3])
/* PSR_MODE32_BIT (arch/arm64/include/uapi/asm/ptrace.h): an AArch32 task. */
#define SYSCALL_IS_COMPAT(regs) ((regs)->pstate & 0x10)
/* The arguments of a function of user space, and what it returned: Procedure Call Standard for the Arm 64-bit
 * Architecture, "Parameter passing".
 */
#define CALL_ARG1(regs) ((regs)->regs[0])
#define CALL_ARG2(regs) ((regs)->regs[1])
#define CALL_ARG3(regs) ((regs)->regs[2])
#define CALL_ARG4(regs) ((regs)->regs[3])
#define CALL_STACK(regs) ((regs)->sp)
#define CALL_RESULT(regs) ((regs)->regs[0])
/* The same of a Go function, and the goroutine: src/cmd/compile/abi-internal.md in Go's source, "arm64 architecture". */
#define GO_ARG1(regs) ((regs)->regs[0])
#define GO_ARG2(regs) ((regs)->regs[1])
#define GO_ARG3(regs) ((regs)->regs[2])
#define GO_RESULT(regs) ((regs)->regs[0])
#define GO_GOROUTINE(regs) ((regs)->regs[28])

#else
#error "define __TARGET_ARCH_x86 or __TARGET_ARCH_arm64"
#endif

/* Direct loads through a trusted task pointer cost a nanosecond each, a probe read fifteen. bpf_get_current_task_btf is
 * there since 5.11 (commit 3ca1032ab7ab); the branch that is not taken is removed before it is verified.
 */
#define HAS_TASK_BTF bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_get_current_task_btf)

static __always_inline struct fdtable *current_fdtable(void)
{
	if (HAS_TASK_BTF)
		return ((struct task_struct *)bpf_get_current_task_btf())->files->fdt;
	return BPF_CORE_READ((struct task_struct *)bpf_get_current_task(), files, fdt);
}

/* A cast that the verifier believes for reading, so that the fields of what embeds a sock are plain loads. Since 6.2
 * (commit a35b9af4ec2c): only for programs that need a later kernel anyway.
 */
extern void *bpf_rdonly_cast(const void *object, __u32 btf_id) __ksym __weak;

static __always_inline struct tcp_sock *as_tcp(struct sock *sock)
{
	return bpf_rdonly_cast(sock, bpf_core_type_id_kernel(struct tcp_sock));
}

/* The user's stack pointer in the system call that the current thread is in; 0 before 5.15 (commit dd6e10fbd9fb). */
static __always_inline __u64 user_stack(void)
{
	if (!bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_task_pt_regs))
		return 0;
	return CALL_STACK((syscall_regs *)bpf_task_pt_regs((struct task_struct *)bpf_get_current_task_btf()));
}

#define FDTABLE_FIELD(table, field) (HAS_TASK_BTF ? (table)->field : BPF_CORE_READ(table, field))

/* Keeps the compiler from merging or reordering what the verifier must see as one bounded register. */
#define opaque(variable) asm volatile("" : "+r"(variable))

#endif
