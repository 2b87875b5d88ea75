/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* fd -> socket -> connection identity: family, ports, addresses, network namespace. */
#ifndef SPANLOOM_SOCK_BPF_H
#define SPANLOOM_SOCK_BPF_H

#include "maps.bpf.h"

/* The socket behind a file descriptor of the current task, or 0, and its sock. The table is read without its lock: the
 * worst that a concurrent close can do is a failed or stale read, and stale sockets have no connection entry.
 *
 * A file is a socket's when its private data, read as a socket, points back to it: one read less than by way of the
 * inode's mode. What passes by accident is not in the connections map, and is_tcp() looks closer before it gets there.
 */
static __always_inline struct socket *socket_of_fd(__u32 fd, struct sock **sock)
{
	struct fdtable *table = current_fdtable();
	struct file **files, *file = 0;
	struct socket *socket;

	if (!table || fd >= TASK_FIELD(table, max_fds))
		return 0;
	files = TASK_FIELD(table, fd);
	if (bpf_probe_read_kernel(&file, sizeof(file), files + fd) || !file)
		return 0;
	socket = BPF_CORE_READ(file, private_data);
	if (!socket || BPF_CORE_READ(socket, file) != file)
		return 0;
	*sock = BPF_CORE_READ(socket, sk);
	return *sock ? socket : 0;
}

static __always_inline bool is_tcp(struct socket *socket, struct sock *sock)
{
	unsigned short family = BPF_CORE_READ(sock, __sk_common.skc_family);
	unsigned short mode = BPF_CORE_READ(socket, file, f_inode, i_mode);

	return (mode & S_IFMT) == S_IFSOCK && BPF_CORE_READ(socket, type) == SOCK_STREAM && (family == AF_INET || family == AF_INET6) &&
	       BPF_CORE_READ(sock, sk_protocol) == IPPROTO_TCP;
}

static __always_inline void map_ipv4(__u8 *address, __u32 ipv4)
{
	*(__u64 *)address = 0;
	*(__u32 *)(address + 8) = bpf_htonl(0xffff);
	*(__u32 *)(address + 12) = ipv4;
}

static __always_inline bool is_loopback(const __u8 *address)
{
	__u64 high = *(__u64 *)address;
	__u32 third = *(__u32 *)(address + 8);

	if (high)
		return false;
	if (third == bpf_htonl(0xffff))
		return address[12] == 127;
	return !third && *(__u32 *)(address + 12) == bpf_htonl(1);
}

static __always_inline void read_identity(struct sock *sock, struct record_exchange *exchange)
{
	exchange->local_port = BPF_CORE_READ(sock, __sk_common.skc_num);
	exchange->remote_port = bpf_ntohs(BPF_CORE_READ(sock, __sk_common.skc_dport));
	exchange->netns = BPF_CORE_READ(sock, __sk_common.skc_net.net, ns.inum);
	if (BPF_CORE_READ(sock, __sk_common.skc_family) == AF_INET) {
		map_ipv4(exchange->local_address, BPF_CORE_READ(sock, __sk_common.skc_rcv_saddr));
		map_ipv4(exchange->remote_address, BPF_CORE_READ(sock, __sk_common.skc_daddr));
	} else {
		/* IPv4 peers of an IPv6 socket are IPv4-mapped here already. */
		BPF_CORE_READ_INTO(&exchange->local_address, sock, __sk_common.skc_v6_rcv_saddr);
		BPF_CORE_READ_INTO(&exchange->remote_address, sock, __sk_common.skc_v6_daddr);
	}
}

/* A recycled struct sock whose close was not seen would carry another connection's state. One that TCP has closed gives
 * its own port back (inet_put_port()), while its process may still read what came before: it is no other one.
 */
static __always_inline bool same_ports(struct sock *sock, const struct record_exchange *exchange)
{
	__u16 port = BPF_CORE_READ(sock, __sk_common.skc_num);

	return (!port || port == exchange->local_port) &&
	       bpf_ntohs(BPF_CORE_READ(sock, __sk_common.skc_dport)) == exchange->remote_port;
}

static __always_inline bool same_ports_trusted(struct sock *sock, const struct record_exchange *exchange)
{
	__u16 port = sock->__sk_common.skc_num;

	return (!port || port == exchange->local_port) &&
	       bpf_ntohs(sock->__sk_common.skc_dport) == exchange->remote_port;
}

static __always_inline void endpoint_of(struct endpoint *endpoint, const __u8 *address, __u16 port, __u32 netns,
					__u16 server_port)
{
	__builtin_memcpy(endpoint->address, address, sizeof(endpoint->address));
	endpoint->netns = is_loopback(address) ? netns : 0;
	endpoint->port = port;
	endpoint->server_port = server_port;
}

#endif
