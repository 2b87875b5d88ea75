/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The kernel types and fields that the programs read, and no others. CO-RE relocates every access by name
 * (preserve_access_index), so neither order nor offsets here mean anything.
 */
#ifndef SPANLOOM_KERNEL_TYPES_H
#define SPANLOOM_KERNEL_TYPES_H

#include <linux/bpf.h>
#include <linux/types.h>
#include <stdbool.h>

#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wpadded" /* relocated by name: their padding here means nothing */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

/* The suffix after ___ is dropped when CO-RE looks the type up: one flavour per architecture. */
struct pt_regs___x86 {
	unsigned long di, si, dx, cx, bx, r10, r14, r8, r9, ax, orig_ax, cs, sp;
};

struct pt_regs___arm64_frame { /* libbpf 1.5 has a pt_regs___arm64 of its own */
	__u64 regs[31];
	__u64 sp;
	__u64 orig_x0;
	__s32 syscallno;
	__u64 pstate;
};

struct qstr {
	const unsigned char *name;
};

struct dentry {
	struct qstr d_name;
};

struct path {
	struct dentry *dentry;
};

struct inode {
	unsigned short i_mode;
};

struct hlist_node;

struct hlist_head {
	struct hlist_node *first;
};

struct file {
	struct path f_path;
	struct inode *f_inode;
	void *private_data;
	struct hlist_head *f_ep; /* who watches it by epoll; since 5.11, commit 319c15174757 */
};

struct fdtable {
	unsigned int max_fds;
	struct file **fd;
};

struct files_struct {
	struct fdtable *fdt;
};

struct mm_struct {
	unsigned long start_stack;
	struct file *exe_file;
};

struct kernfs_node {
	const char *name;
};

struct cgroup_root;
struct cgroup;

struct cgroup_subsys_state {
	struct cgroup *cgroup;
	struct cgroup_subsys_state *parent;
};

struct cgroup {
	struct cgroup_subsys_state self;
	int level;
	struct kernfs_node *kn;
	struct cgroup_root *root;
};

struct css_set {
	struct cgroup_subsys_state *subsys[1]; /* by enum cgroup_subsys_id */
	struct cgroup *dfl_cgrp;
};

enum cgroup_subsys_id {
	memory_cgrp_id,
};

struct task_struct {
	unsigned int flags;
	void *stack;
	struct css_set *cgroups;
	int pid;
	int tgid;
	struct mm_struct *mm;
	struct files_struct *files;
	struct task_struct *group_leader;
	struct task_struct *real_parent;
	__u64 start_boottime; /* 5.5, commit cf25e24db61c; before that real_start_time */
	char comm[16];
};

struct in6_addr {
	union {
		__u8 u6_addr8[16];
	} in6_u;
};

struct ns_common {
	unsigned int inum;
};

struct net {
	struct ns_common ns;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct sock_common {
	__u32 skc_daddr;
	__u32 skc_rcv_saddr;
	__u16 skc_dport; /* network byte order */
	__u16 skc_num;   /* host byte order */
	unsigned short skc_family;
	volatile unsigned char skc_state;
	possible_net_t skc_net;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
};

struct sk_buff_head {
	__u32 qlen;
};

struct sock {
	struct sock_common __sk_common;
	struct sk_buff_head sk_receive_queue;
	__u16 sk_protocol; /* a bit field before 5.6, commit bf9765145b85 */
	int sk_err;
	__u8 sk_shutdown;
	struct socket *sk_socket; /* 0 once the last descriptor was closed */
};

struct inet_connection_sock {
	const void *icsk_ulp_ops; /* another protocol on top of TCP, such as kTLS */
};

struct tcp_sock {
	__u32 copied_seq;
	__u32 rcv_nxt;
	__u32 write_seq;
	__u32 snd_una;
};

struct socket {
	short type;
	struct file *file;
	struct sock *sk;
};

/* Flat: CO-RE finds members of the anonymous unions by their names. */
struct iov_iter {
	__u8 iter_type;
	__u64 iov_offset;
	void *ubuf; /* in one union with the address of the iovecs */
	__u64 count;
	unsigned long nr_segs;
};

/* As it was: compat.bpf.h says until when. */
struct iov_iter___before {
	unsigned int type;
	const void *iov;
};

enum iter_type {
	ITER_UBUF, /* since 6.0, commit fcb14cb1bdac */
	ITER_IOVEC,
	ITER_BVEC,
};

struct msghdr {
	struct iov_iter msg_iter;
	unsigned int msg_flags;
};

struct page;
struct pipe_inode_info;

struct bpf_iter_meta {
	__u64 seq_num;
};

struct bpf_map {
	__u32 id;
};

struct bpf_iter__bpf_map_elem {
	struct bpf_iter_meta *meta;
	struct bpf_map *map;
	void *key;
	void *value;
};

#pragma clang attribute pop
#pragma clang diagnostic pop

/* User-space ABI structures, read from user memory: fixed, not relocated. */
struct user_iovec {
	__u64 base;
	__u64 length;
};

struct user_msghdr {
	__u64 name;
	__u32 name_length;
	__u32 _pad;
	__u64 iov;
	__u64 iov_count;
	__u64 control;
	__u64 control_length;
	__u32 flags;
	__u32 _pad2;
};

struct user_mmsghdr {
	struct user_msghdr header;
	__u32 length;
	__u32 _pad;
};

#define AF_INET 2
#define AF_INET6 10
#define SOCK_STREAM 1
#define IPPROTO_TCP 6
#define S_IFMT 0170000
#define S_IFSOCK 0140000
#define TCP_FIN_WAIT1 4
#define TCP_FIN_WAIT2 5
#define TCP_CLOSING 11
#define TCP_CLOSE 7
#define TCP_ESTABLISHED 1
#define TCP_CLOSE_WAIT 8
#define TCP_LAST_ACK 9
#define SHUTDOWN_MASK 3 /* include/net/sock.h: RCV_SHUTDOWN | SEND_SHUTDOWN */
#define EPIPE 32
#define ECONNRESET 104
#define ETIMEDOUT 110
#define PF_KTHREAD 0x00200000 /* include/linux/sched.h */
#define MSG_OOB 0x1
#define MSG_PEEK 0x2
#define MSG_TRUNC 0x20
#define MSG_ERRQUEUE 0x2000
#define MSG_FASTOPEN 0x20000000

#endif
