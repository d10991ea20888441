/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* The taps: which packets are copied, and to which remotes. The filter is compiled in (classic.h). */
#ifndef TAP_H
#define TAP_H

#include "common.h"

/* RFC 792; <linux/icmp.h> pulls in the C library. */
enum icmp_error {
	ICMP_DEST_UNREACH = 3,
	ICMP_SOURCE_QUENCH = 4,
	ICMP_REDIRECT = 5,
	ICMP_TIME_EXCEEDED = 11,
	ICMP_PARAMETERPROB = 12,
	ICMPV6_LAST_ERROR = 127, /* RFC 4443 */
};

/*
 * Is this a tunnel packet of ours? Copies carry the mark; this knows them where a device in between has cleared it, and
 * where an ICMP error quotes them. Of a fragmented one only the first fragment has a port, so the port is not asked.
 */
static __always_inline bool is_our_tunnel(struct __sk_buff *skb, struct config *cfg, struct ip_facts *facts)
{
	__be16 port;

	if (facts->protocol != cfg->protocol)
		return false;
	if (cfg->port && !facts->fragment &&
	    (bpf_skb_load_bytes(skb, facts->transport + 2, &port, 2) || port != bpf_htons(cfg->port)))
		return false;
	return bpf_map_lookup_elem(&tunnels, &facts->key);
}

static __always_inline bool is_icmp_error(__u8 type)
{
	return type == ICMP_DEST_UNREACH || type == ICMP_SOURCE_QUENCH || type == ICMP_REDIRECT ||
	       type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETERPROB;
}

/* An ICMP error has the type in its first byte and quotes the packet from its ninth on, in both versions. */
static __noinline bool quotes_our_tunnel(struct __sk_buff *skb, struct config *cfg, __u32 offset, __u32 ipv6)
{
	struct ip_facts facts;
	__u8 type;

	if (bpf_skb_load_bytes(skb, offset, &type, 1))
		return false;
	if (ipv6 ? type == 0 || type > ICMPV6_LAST_ERROR : !is_icmp_error(type))
		return false;
	if (read_ip(skb, offset + 8, ipv6, &facts))
		return false;
	return is_our_tunnel(skb, cfg, &facts);
}

/*
 * Does this packet belong to the tunnel that the out interface is? Outgoing it carries our copies, incoming what answers
 * them. Of a fragmented one only the first fragment has a port, so the address has to do.
 */
static __noinline bool is_carrier(struct __sk_buff *skb, struct ip_facts *facts, __u32 egress)
{
	struct carrier_key key = {};
	__u32 *match;
	__be16 port;

	__builtin_memcpy(key.address, egress ? facts->key.remote : facts->key.source, 16);
	match = bpf_map_lookup_elem(&carriers, &key);
	if (match && (*match == CARRIER_ANY || facts->fragment))
		return true;
	if (facts->protocol != IPPROTO_UDP || facts->fragment ||
	    bpf_skb_load_bytes(skb, facts->transport + (egress ? 2 : 0), &port, 2))
		return false;
	key.port = bpf_ntohs(port);
	return bpf_map_lookup_elem(&carriers, &key);
}

/* The protocols whose packets may be ours; all others pass without a closer look. */
static __always_inline bool may_be_ours(struct config *cfg, __u8 protocol)
{
	return protocol == cfg->protocol || protocol == IPPROTO_ICMP || protocol == IPPROTO_ICMPV6 ||
	       protocol == IPPROTO_FRAGMENT || cfg->carriers;
}

/* Of a packet whose protocol may be ours. */
__noinline int is_own_ip(struct __sk_buff *skb, __u32 ipv6, __u32 egress)
{
	struct config *cfg = session();
	struct ip_facts facts;

	if (!cfg || read_ip(skb, ETH_HLEN, ipv6, &facts))
		return false;
	if (facts.protocol == (ipv6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP))
		return quotes_our_tunnel(skb, cfg, facts.transport, ipv6);
	if (cfg->carriers && is_carrier(skb, &facts, egress))
		return true;
	return is_our_tunnel(skb, cfg, &facts);
}

/* Direct access to the few bytes that decide for nearly every packet. */
static __always_inline bool is_own_traffic(struct __sk_buff *skb, struct config *cfg, enum direction direction)
{
	__u8 *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u8 short_head[24], *head = data;
	__be16 ethertype;

	if (data + sizeof(short_head) > end) {
		if (bpf_skb_load_bytes(skb, 0, short_head, sizeof(short_head)))
			return false;
		head = short_head;
	}
	__builtin_memcpy(&ethertype, head + 2 * ETH_ALEN, 2);
	if (ethertype == bpf_htons(ETH_P_IP))
		return may_be_ours(cfg, head[ETH_HLEN + offsetof(struct iphdr, protocol)]) &&
		       is_own_ip(skb, 0, direction);
	if (ethertype == bpf_htons(ETH_P_IPV6))
		return may_be_ours(cfg, head[ETH_HLEN + offsetof(struct ipv6hdr, nexthdr)]) &&
		       is_own_ip(skb, 1, direction);
	return false;
}

/* Bytes of headers that each segment of this super-packet will carry, where it is plain TCP or UDP over IP; else 0. */
static __always_inline __u32 segment_headers(struct __sk_buff *skb)
{
	__u32 offset = ETH_HLEN;
	__u8 protocol, doff;
	__be16 ethertype;
	union {
		struct iphdr v4;
		struct ipv6hdr v6;
	} ip;

	if (bpf_skb_load_bytes(skb, offsetof(struct ethhdr, h_proto), &ethertype, 2))
		return 0;
	if (ethertype == bpf_htons(ETH_P_IP)) {
		if (bpf_skb_load_bytes(skb, offset, &ip.v4, sizeof(ip.v4)))
			return 0;
		offset += ip.v4.ihl * 4;
		protocol = ip.v4.protocol;
	} else if (ethertype == bpf_htons(ETH_P_IPV6)) {
		if (bpf_skb_load_bytes(skb, offset, &ip.v6, sizeof(ip.v6)))
			return 0;
		offset += sizeof(ip.v6);
		protocol = ip.v6.nexthdr;
	} else {
		return 0;
	}
	if (protocol == IPPROTO_UDP)
		return offset + sizeof(struct udphdr);
	if (protocol != IPPROTO_TCP || bpf_skb_load_bytes(skb, offset + 12, &doff, 1))
		return 0;
	return offset + (doff >> 4) * 4;
}

/* How many wire frames the packet stands for: the kernel's own figure, worked out where the kernel left it open. */
static __always_inline __u32 wire_frames(struct __sk_buff *skb, __u32 headers)
{
	__u32 size = skb->gso_size, frames = skb->gso_segs;

	if (!size)
		return 1;
	if (!frames && headers && skb->len > headers)
		frames = (skb->len - headers + size - 1) / size;
	return frames ? frames : 1;
}

/*
 * Clone the packet to the relay, once for each remote of the set. Its mark and cb carry the copy's description there,
 * and are put back. A global function, so that verifiers look at it once and not for each way that a tap gets here.
 */
__noinline int send_copies(struct __sk_buff *skb, __u64 remotes, __u32 tap_mark, __u32 frames, __u32 headers)
{
	__u32 mark = skb->mark, cb_segs = skb->cb[CB_SEGS], cb_headers = skb->cb[CB_HEADERS];
	struct config *cfg = session();
	long err;

	if (!cfg)
		return 0;
	skb->cb[CB_SEGS] = frames;
	skb->cb[CB_HEADERS] = headers;
	for (__u32 remote = 0; remote < MAX_REMOTES && remotes; remote++, remotes >>= 1) {
		if (!(remotes & 1))
			continue;
		skb->mark = tap_mark | remote;
		err = bpf_clone_redirect(skb, cfg->relay, 0);
		/*
		 * Above zero, one of our programs has dropped and counted the copy; ENETDOWN is counted by the device
		 * that lost it. What is left never reached a device: no memory, or no relay.
		 */
		if (err < 0 && err != -100 /* ENETDOWN */)
			count_drop(tap_mark | remote, frames, REASON(clone));
	}
	skb->mark = mark;
	skb->cb[CB_SEGS] = cb_segs;
	skb->cb[CB_HEADERS] = cb_headers;
	return 0;
}

/* How many bits are set (Warren, Hacker's Delight): what counts in a loop makes each of its rounds another to verifiers. */
static __always_inline __u32 count_bits(__u64 set)
{
	set -= set >> 1 & 0x5555555555555555;
	set = (set & 0x3333333333333333) + (set >> 2 & 0x3333333333333333);
	set = (set + (set >> 4)) & 0x0f0f0f0f0f0f0f0f;
	return set * 0x0101010101010101 >> 56;
}

/* The remotes of this packet as a set of slots: all, or the one of its flow. */
static __always_inline __u64 choose_remotes(struct __sk_buff *skb, struct config *cfg)
{
	__u32 bucket, chunk;
	struct spread_chunk *slots;

	if (!HAS_SPREAD || cfg->spread != FLOW)
		return cfg->remotes;
	bucket = flow_hash(skb) % (SPREAD_BYTES * SPREAD_CHUNKS);
	chunk = bucket / SPREAD_BYTES;
	slots = bpf_map_lookup_elem(&spread, &chunk);
	return slots ? 1ULL << (slots->slot[bucket % SPREAD_BYTES] & (MAX_REMOTES - 1)) : 0;
}

/* One in `n`, by 32 random bits. */
static __always_inline bool is_one_in(__u32 n, __u32 random)
{
	return (__u64)random * n >> 32 == 0;
}

/* Sampling by packet and by flow. The flow's hash is mixed once more: its low bits choose the remote. */
static __always_inline bool is_sampled(struct __sk_buff *skb, struct config *cfg)
{
	if (cfg->sample > 1 && !is_one_in(cfg->sample, bpf_get_prandom_u32()))
		return false;
	return cfg->sample_flows <= 1 || is_one_in(cfg->sample_flows, finish(flow_hash(skb) + 1));
}

/* Always TC_ACT_UNSPEC: whatever becomes of the copy, the next filter and the stack see the packet as it came. */
static __always_inline int tap(struct __sk_buff *skb, enum direction direction)
{
	struct tap_key key = { .ifindex = skb->ifindex, .direction = direction };
	struct config *cfg = session();
	struct copy copy;
	struct tap *watched;
	__u32 headers, copies;
	__u64 chosen;

	if (is_copy(skb->mark))
		return TC_ACT_UNSPEC;
	watched = bpf_map_lookup_elem(&taps, &key);
	if (!cfg || !watched || is_own_traffic(skb, cfg, direction))
		return TC_ACT_UNSPEC;
	headers = skb->gso_size ? segment_headers(skb) : 0;
	copy = describe(skb, cfg, wire_frames(skb, headers), headers);
	copy.tap = watched->slot;
	watched->choice.seen += copy.frames;
	if (!filter(skb, wire_bytes(skb, headers))) {
		watched->choice.filtered += copy.frames;
		return TC_ACT_UNSPEC;
	}
	if (HAS_SAMPLE && !is_sampled(skb, cfg)) {
		watched->choice.skipped += copy.frames;
		return TC_ACT_UNSPEC;
	}
	chosen = choose_remotes(skb, cfg);
	copies = count_bits(chosen);
	watched->stat.pcnt += (__u64)copies * copy.frames;
	watched->stat.bcnt += copies * copy.bytes;
	send_copies(skb, chosen, (__u32)MARK_MAGIC << MARK_MAGIC_SHIFT | copy.tap << MARK_TAP_SHIFT, copy.frames, copy.headers);
	return TC_ACT_UNSPEC;
}

SEC("tc")
int snif_tap_in(struct __sk_buff *skb)
{
	return tap(skb, INGRESS);
}

SEC("tc")
int snif_tap_out(struct __sk_buff *skb)
{
	return tap(skb, EGRESS);
}

#endif
