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

/* A field of the current task, or of what its fields lead to. */
#define TASK_FIELD(object, field) (HAS_TASK_BTF ? (object)->field : BPF_CORE_READ(object, field))

static __always_inline struct task_struct *current_task(void)
{
	return HAS_TASK_BTF ? (struct task_struct *)bpf_get_current_task_btf() :
			      (struct task_struct *)bpf_get_current_task();
}

/* The registers of the system call that a thread is in. bpf_task_pt_regs is there since 5.15 (commit dd6e10fbd9fb); before
 * that they are found at the end of the stack and read as plain memory. This is needed on x86-64 only: on arm64 functions
 * cannot be followed before 6.4 (commit 2aa6ac03516d). A stack of another size, as KASAN makes them, does not end in the
 * code segment of user space: no call is seen then.
 */
#define HAS_TASK_REGS bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_task_pt_regs)

#if defined(__TARGET_ARCH_x86)
#define STACK_BYTES 16384 /* THREAD_SIZE, arch/x86/include/asm/page_64_types.h */
#define USER_CODE_SEGMENT 0x33 /* __USER_CS, arch/x86/include/asm/segment.h */
#define CALL_REGISTER(regs, which)                                                                                     \
	({                                                                                                             \
		__u64 _value = 0;                                                                                      \
		if (HAS_TASK_REGS)                                                                                     \
			_value = which(regs);                                                                          \
		else                                                                                                   \
			bpf_probe_read_kernel(&_value, sizeof(_value), &which(regs));                                  \
		_value;                                                                                                \
	})

static __always_inline syscall_regs *registers_of(struct task_struct *task)
{
	if (HAS_TASK_REGS)
		return (void *)bpf_task_pt_regs(task);
	return TASK_FIELD(task, stack) + STACK_BYTES - bpf_core_type_size(syscall_regs);
}

static __always_inline bool is_native_call(syscall_regs *regs)
{
	return HAS_TASK_REGS ? !SYSCALL_IS_COMPAT(regs) : BPF_CORE_READ(regs, cs) == USER_CODE_SEGMENT;
}
#else
#define CALL_REGISTER(regs, which) which(regs)

static __always_inline syscall_regs *registers_of(struct task_struct *task)
{
	return (void *)bpf_task_pt_regs(task);
}

static __always_inline bool is_native_call(syscall_regs *regs)
{
	return !SYSCALL_IS_COMPAT(regs);
}
#endif

/* What an iterator leads to. Its kind is a number since 5.14 (commit 8cd54c1c8480), and was one bit of several in `type`
 * before; ITER_UBUF came with 6.0 (commit fcb14cb1bdac), and moved to the front later.
 */
#define HAS_ITER_TYPE bpf_core_field_exists(struct iov_iter, iter_type)
#define IS_ITER(iter, kind)                                                                                            \
	(bpf_core_enum_value_exists(enum iter_type, kind) &&                                                           \
	 (HAS_ITER_TYPE ? (iter)->iter_type == bpf_core_enum_value(enum iter_type, kind) :                             \
			  (((struct iov_iter___before *)(iter))->type & bpf_core_enum_value(enum iter_type, kind)) != 0))

/* The address of the one buffer or of the iovecs: they share their place, which has the name `ubuf` since 6.0 (commit
 * fcb14cb1bdac).
 */
static __always_inline __u64 iterated(const struct iov_iter *iter)
{
	if (bpf_core_field_exists(iter->ubuf))
		return (__u64)BPF_CORE_READ(iter, ubuf);
	return (__u64)BPF_CORE_READ((const struct iov_iter___before *)iter, iov);
}

/* What tcp_recvmsg returns, and its flags. It lost the argument before them in 5.19 (commit ec095263a965); a program is
 * told how many there are since 5.17 (commit f92c1e183604).
 */
static __always_inline int received(unsigned long long *context, int *flags)
{
	__u64 result = 0, argument = 0;

	if (!bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_get_func_arg_cnt)) {
		/* Volatile, or one load does for both branches, at an address that the verifier cannot know. */
		*flags = *(volatile unsigned long long *)&context[4];
		return *(volatile unsigned long long *)&context[6];
	}
	bpf_get_func_arg(context, bpf_get_func_arg_cnt(context) - 2, &argument);
	bpf_get_func_ret(context, &result);
	*flags = argument;
	return result;
}

/* Keeps the compiler from merging or reordering what the verifier must see as one bounded register. */
#define opaque(variable) asm volatile("" : "+r"(variable))

#endif
