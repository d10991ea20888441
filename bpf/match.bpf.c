/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * The filter alone, for `snifctl filter test`: run by BPF_PROG_TEST_RUN on the packets of a capture. Each has an empty
 * Ethernet header before it, as the kernel's test takes no frame that is shorter than its ethertype asks for.
 */
#define FRAME_AT 14
#include "classic.h"

/* cb[0] is the length that the packet had on the wire, which the capture, or the kernel's test, may have cut. */
SEC("tc")
int snif_match(struct __sk_buff *skb)
{
	return !!filter(skb, skb->cb[0]);
}

char _license[] SEC("license") = "Dual MIT/GPL";
