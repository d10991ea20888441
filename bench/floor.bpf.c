// SPDX-License-Identifier: (GPL-2.0-only OR MIT)
/* What snifctl's programs are compared with, and the collector's end. -DOUT=IFINDEX says where the copies go. */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>

/* The least that a program can do. */
SEC("classifier/empty")
int empty(struct __sk_buff *skb)
{
	return TC_ACT_UNSPEC;
}

/* The least that a copy made by a program costs: no header, no counter. */
SEC("classifier/mirror")
int mirror(struct __sk_buff *skb)
{
	bpf_clone_redirect(skb, OUT, 0);
	return TC_ACT_UNSPEC;
}

/* Ends every frame as early and as cheaply as can be, the same in all modes. */
SEC("classifier/drop")
int drop(struct __sk_buff *skb)
{
	return TC_ACT_SHOT;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
