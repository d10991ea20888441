/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * What a translated classic BPF program (src/datapath/filter.rs) stands on: loads from the frame as it is on the wire, so with
 * the VLAN tag that the kernel has moved into metadata put back at its place.
 */
#ifndef CLASSIC_H
#define CLASSIC_H

#include <stdbool.h>
#include <stddef.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

/* Keeps clang from leaving out, or folding, a bounds check that the verifier needs to see. */
#define OPAQUE(value) asm volatile("" : "+r"(value))

/*
 * Reads a pointer of the packet. In C, clang may keep the field's address for many of them, and the verifier takes no
 * address inside the context.
 */
#define FIELD(skb, name)                                                         \
	({                                                                       \
		__u64 field;                                                     \
		asm volatile("%0 = *(u32 *)(%1 + %2)"                            \
			     : "=r"(field)                                       \
			     : "r"(skb), "i"(offsetof(struct __sk_buff, name))); \
		(void *)field;                                                   \
	})

#define TAG_AT (2 * ETH_ALEN) /* where the outermost tag stands on the wire */
#define TAG_END (TAG_AT + 4)
#define NOT_THERE (1ULL << 32) /* beyond the frame's end */
#ifndef FRAME_AT
#define FRAME_AT 0 /* where the frame starts in the packet */
#endif
#define DIRECT_BYTES 0x7fff /* the verifier follows offsets into a packet up to 65,535 */

/* Bytes of a VLAN tag that the kernel keeps in metadata instead of in the frame. */
static __always_inline __u32 tag_bytes(struct __sk_buff *skb)
{
	return (skb->vlan_present & 1) * 4;
}

#if __has_include("expression.h")

/* 1, 2 or 4 bytes of the frame in network order, or NOT_THERE, wherever they are: in the tag, or in paged data. */
__noinline __u64 load_slowly(struct __sk_buff *skb, __u32 offset, __u32 size)
{
	__u32 tag = (__u32)bpf_ntohs(skb->vlan_proto) << 16 | (skb->vlan_tci & 0xffff), value = 0,
	      tagged = tag_bytes(skb);
	__u32 at;

	for (__u32 i = 0; i < 4 && i < size; i++) {
		__u8 byte;

		at = offset + i;
		if (at < offset)
			return NOT_THERE;
		if (tagged && at >= TAG_AT && at < TAG_END)
			byte = tag >> 8 * (TAG_END - 1 - at);
		else if (bpf_skb_load_bytes(skb, FRAME_AT + (at < TAG_END ? at : at - tagged), &byte, 1))
			return NOT_THERE;
		value = value << 8 | byte;
	}
	return value;
}

/* The same, by direct access where that will do. `tagged` is tag_bytes(). */
static __always_inline bool load(struct __sk_buff *skb, __u32 tagged, __u64 offset, const __u32 size, __u32 *value)
{
	__u8 *data = FIELD(skb, data), *end = FIELD(skb, data_end);
	__u64 at = offset >= TAG_END ? offset - tagged : offset;

	if (at <= DIRECT_BYTES && (offset >= TAG_END || offset + size <= TAG_AT || !tagged)) {
		OPAQUE(at);
		data += at + FRAME_AT;
		if (data + size <= end) {
			*value = size == 1 ? *data :
				 size == 2 ? bpf_ntohs(*(__be16 *)data) :
					     bpf_ntohl(*(__be32 *)data);
			return true;
		}
	}
	if (offset > 0x7fffffff)
		return false;
	offset = load_slowly(skb, offset, size);
	*value = offset;
	return offset != NOT_THERE;
}

/* Does the filter take this frame of `length` bytes? Not 0 for yes. */
#include "expression.h"
#else
static __always_inline __u32 filter(struct __sk_buff *skb, __u32 length)
{
	(void)skb;
	(void)length;
	return 1;
}
#endif

#endif
