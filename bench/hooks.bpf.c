// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Empty programs on the two kinds of system-call hooks, to measure what the hooks themselves cost: docs/adr/0002. */
#include "compat.bpf.h"

char _license[] SEC("license") = "Dual BSD/GPL";

SEC("tp_btf/sys_enter")
int BPF_PROG(raw_enter, struct pt_regs *regs, long number)
{
	return 0;
}

SEC("tp_btf/sys_exit")
int BPF_PROG(raw_exit, struct pt_regs *regs, long result)
{
	return 0;
}

SEC("tracepoint/syscalls/sys_enter_write")
int classic_enter(void *context)
{
	return 0;
}

SEC("tracepoint/syscalls/sys_exit_write")
int classic_exit(void *context)
{
	return 0;
}
