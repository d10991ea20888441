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

/* GRE, RFC 2890. */
enum gre_flag {
	GRE_CHECKSUM = 0x8000,
	GRE_KEY = 0x2000,
	GRE_SEQUENCE = 0x1000,
};

#define ETH_P_TRANSPARENT 0x6558 /* an Ethernet frame inside GRE or Geneve */
#define ETH_P_ERSPAN_II 0x88be /* type I without a sequence number */
#define ETH_P_ERSPAN_III 0x22eb
#define PORT_VXLAN 4789
#define PORT_GENEVE 6081

/* What is known of a tunnel header that has a frame behind it: its bytes, and */
enum tunnel_fact {
	TUNNEL_BYTES_MASK = 0x3ff,
	TUNNEL_OF_KIND = 0x400, /* of this session's kind of tunnel */
	TUNNEL_KEYED = 0x800, /* and with its key, if it has one */
};

static __always_inline __u32 read_gre(struct __sk_buff *skb, struct config *cfg, __u32 offset)
{
	__u32 bytes = 4, facts = 0;
	__be16 head[2];
	__be32 key = 0;
	__u8 last;

	if (bpf_skb_load_bytes(skb, offset, head, sizeof(head)))
		return 0;
	bytes += head[0] & bpf_htons(GRE_CHECKSUM) ? 4 : 0;
	if (head[0] & bpf_htons(GRE_KEY)) {
		if (bpf_skb_load_bytes(skb, offset + bytes, &key, sizeof(key)))
			return 0;
		bytes += 4;
	}
	bytes += head[0] & bpf_htons(GRE_SEQUENCE) ? 4 : 0;
	if (cfg->gre && head[1] == bpf_htons(cfg->gre)) {
		facts = TUNNEL_OF_KIND;
		if (!cfg->keyed == !(head[0] & bpf_htons(GRE_KEY)) &&
		    (!cfg->keyed || bpf_ntohl(key) == cfg->key[INGRESS] || bpf_ntohl(key) == cfg->key[EGRESS]))
			facts |= TUNNEL_KEYED;
	}
	if (head[1] == bpf_htons(ETH_P_ERSPAN_II))
		bytes += head[0] & bpf_htons(GRE_SEQUENCE) ? 8 : 0;
	else if (head[1] == bpf_htons(ETH_P_ERSPAN_III) && !bpf_skb_load_bytes(skb, offset + bytes + 11, &last, 1))
		bytes += last & 1 ? 20 : 12;
	else if (head[1] != bpf_htons(ETH_P_TRANSPARENT))
		return facts;
	return bytes | facts;
}

static __always_inline __u32 read_udp_tunnel(struct __sk_buff *skb, struct config *cfg, __u32 offset)
{
	__u32 bytes = sizeof(struct udphdr) + 8, facts = 0;
	__u8 options;
	__be16 port;

	if (bpf_skb_load_bytes(skb, offset + 2, &port, 2))
		return 0;
	if (cfg->udp_port && port == bpf_htons(cfg->udp_port))
		facts = TUNNEL_OF_KIND | TUNNEL_KEYED;
	else if (port != bpf_htons(PORT_VXLAN) && port != bpf_htons(PORT_GENEVE))
		return 0;
	/* Of Geneve the first byte counts the words of options. VXLAN has its flags there, 8. */
	if (port != bpf_htons(PORT_VXLAN) && !bpf_skb_load_bytes(skb, offset + sizeof(struct udphdr), &options, 1) &&
	    options != 8)
		bytes += (options & 0x3f) * 4;
	return bytes | facts;
}

/* The tunnel header at `offset`, behind an IP header with this protocol: enum tunnel_fact, 0 for none that we know. */
__noinline int read_tunnel(struct __sk_buff *skb, __u32 protocol, __u32 offset)
{
	struct config *cfg = session();

	if (!cfg)
		return 0;
	if (protocol == IPPROTO_GRE)
		return read_gre(skb, cfg, offset);
	return protocol == IPPROTO_UDP ? read_udp_tunnel(skb, cfg, offset) : 0;
}

/* Between us and one of the remotes, whoever sends. */
static __always_inline bool is_our_pair(struct tunnel_key *key)
{
	struct tunnel_key back;

	if (bpf_map_lookup_elem(&tunnels, key))
		return true;
	__builtin_memcpy(back.source, key->remote, sizeof(back.source));
	__builtin_memcpy(back.remote, key->source, sizeof(back.remote));
	return bpf_map_lookup_elem(&tunnels, &back);
}

/*
 * Is this a packet of our tunnel: a copy of ours, or of the remote's own to us? Copies of ours carry the mark; this knows
 * them where a device in between has cleared it, and where an ICMP error quotes them. Of a fragmented packet only the
 * first fragment has a tunnel header, so that is not asked.
 */
static __always_inline bool is_our_tunnel(struct __sk_buff *skb, struct config *cfg, struct ip_facts *facts)
{
	if (facts->protocol != cfg->protocol)
		return false;
	if (!facts->fragment && !(read_tunnel(skb, facts->protocol, facts->transport) & TUNNEL_KEYED))
		return false;
	return is_our_pair(&facts->key);
}

static __always_inline bool is_icmp_error(__u8 type)
{
	return type == ICMP_DEST_UNREACH || type == ICMP_SOURCE_QUENCH || type == ICMP_REDIRECT ||
	       type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETERPROB;
}

/*
 * Does this packet belong to the tunnel that the out interface is? Outgoing it carries our copies, incoming what answers
 * them. Of a fragmented one only the first fragment has a port, so the address has to do.
 */
static __noinline bool is_underlay(struct __sk_buff *skb, struct ip_facts *facts, __u32 egress)
{
	struct underlay_key key = {};
	__u32 *match;
	__be16 port;

	__builtin_memcpy(key.address, egress ? facts->key.remote : facts->key.source, 16);
	match = bpf_map_lookup_elem(&underlay, &key);
	if (match && (*match == UNDERLAY_ANY || facts->fragment))
		return true;
	if (facts->protocol != IPPROTO_UDP || facts->fragment ||
	    bpf_skb_load_bytes(skb, facts->transport + (egress ? 2 : 0), &port, 2))
		return false;
	key.port = bpf_ntohs(port);
	return bpf_map_lookup_elem(&underlay, &key);
}

/*
 * An ICMP error has the type in its first byte and quotes the packet from its ninth on, in both versions. What it quotes
 * went the other way.
 */
static __noinline bool quotes_our_tunnel(struct __sk_buff *skb, struct config *cfg, __u32 offset, __u32 ipv6,
					 __u32 egress)
{
	struct ip_facts facts;
	__u8 type;

	if (bpf_skb_load_bytes(skb, offset, &type, 1))
		return false;
	if (ipv6 ? type == 0 || type > ICMPV6_LAST_ERROR : !is_icmp_error(type))
		return false;
	if (read_ip(skb, offset + 8, ipv6, &facts))
		return false;
	if (is_our_tunnel(skb, cfg, &facts) || (cfg->underlay && is_underlay(skb, &facts, !egress)))
		return true;
	/* About a copy that a remote has sent in another tunnel than ours. */
	return is_our_pair(&facts.key) && read_tunnel(skb, facts.protocol, facts.transport);
}

/* Whose a packet is. */
enum owner {
	OTHERS = 0, /* traffic */
	OURS = 1, /* the session's own */
	DEEP = 2, /* traffic that is already inside two tunnel headers of ours */
};

#define INNER_IPV6 0x80000000U

/* The offset of the IP header in the frame at `offset`, behind two VLAN tags at most, and INNER_IPV6; 0 for none. */
__noinline int inner_ip(struct __sk_buff *skb, __u32 offset)
{
	__be16 ethertype;

	offset += 2 * ETH_ALEN;
	for (int i = 0; i < 3; i++) {
		if (bpf_skb_load_bytes(skb, offset, &ethertype, 2))
			return 0;
		offset += 2;
		if (ethertype != bpf_htons(ETH_P_8021Q) && ethertype != bpf_htons(ETH_P_8021AD))
			break;
		offset += 2;
	}
	if (ethertype == bpf_htons(ETH_P_IPV6))
		return offset | INNER_IPV6;
	return ethertype == bpf_htons(ETH_P_IP) ? offset : 0;
}

/*
 * Does a tunnel packet of ours begin with the IP header at `offset`? Of our kind with whatever key and addresses, as both
 * may have been translated, or of any kind between us and a remote. Answers where the frame in it begins, or 0.
 */
__noinline int tunnelled(struct __sk_buff *skb, __u32 offset, __u32 ipv6)
{
	struct ip_facts facts;
	__u32 header;

	if (read_ip(skb, offset, !!ipv6, &facts) || facts.fragment)
		return 0;
	header = read_tunnel(skb, facts.protocol, facts.transport);
	if (!(header & TUNNEL_BYTES_MASK) || !(header & TUNNEL_OF_KIND || is_our_pair(&facts.key)))
		return 0;
	return facts.transport + (header & TUNNEL_BYTES_MASK);
}

/* Is the packet a copy of a copy, seen where its addresses are no longer known? */
static __always_inline bool is_deep(struct __sk_buff *skb, __u32 ipv6)
{
	__u32 frame = tunnelled(skb, ETH_HLEN, ipv6), ip;

	if (!frame)
		return false;
	ip = inner_ip(skb, frame);
	return ip && tunnelled(skb, ip & ~INNER_IPV6, ip & INNER_IPV6);
}

/* Of a packet whose protocol may be ours. */
__noinline int owner_of_ip(struct __sk_buff *skb, __u32 ipv6, __u32 egress)
{
	struct config *cfg = session();
	struct ip_facts facts;

	if (!cfg || read_ip(skb, ETH_HLEN, ipv6, &facts))
		return OTHERS;
	if (facts.protocol == (ipv6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP))
		return quotes_our_tunnel(skb, cfg, facts.transport, ipv6, egress) ? OURS : OTHERS;
	if (cfg->underlay && is_underlay(skb, &facts, egress))
		return OURS;
	if (is_our_tunnel(skb, cfg, &facts))
		return OURS;
	return is_deep(skb, ipv6) ? DEEP : OTHERS;
}

/* May a UDP datagram to this port be ours, or a tunnel's? */
static __always_inline bool is_tunnel_port(struct config *cfg, __be16 port)
{
	return port == bpf_htons(PORT_VXLAN) || port == bpf_htons(PORT_GENEVE) ||
	       (cfg->udp_port && port == bpf_htons(cfg->udp_port));
}

/*
 * The protocols whose packets may be ours; all others pass without a closer look. `udp` is where the port stands if the
 * IP header has no options, or null where that is not known.
 */
static __always_inline bool may_be_ours(struct config *cfg, __u8 protocol, __u8 *udp)
{
	__be16 port;

	if (cfg->underlay)
		return true;
	if (protocol == IPPROTO_UDP && udp) {
		__builtin_memcpy(&port, udp, 2);
		return is_tunnel_port(cfg, port);
	}
	return protocol == IPPROTO_GRE || protocol == IPPROTO_UDP || protocol == IPPROTO_ICMP ||
	       protocol == IPPROTO_ICMPV6 || protocol == IPPROTO_FRAGMENT;
}

#define HEAD_BYTES (ETH_HLEN + sizeof(struct ipv6hdr) + 4) /* up to a UDP destination port */
#define IPV4_PLAIN 0x45 /* version and length of a header without options */

/* Direct access to the few bytes that decide for nearly every packet. */
static __always_inline enum owner owner_of(struct __sk_buff *skb, struct config *cfg, enum direction direction)
{
	__u8 *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u8 short_head[24], *head = data, *udp4 = NULL, *udp6 = NULL;
	__be16 ethertype;

	if (data + HEAD_BYTES <= end) {
		udp6 = data + HEAD_BYTES - 2;
		if (data[ETH_HLEN] == IPV4_PLAIN && !(data[ETH_HLEN + 6] & 0x3f) && !data[ETH_HLEN + 7])
			udp4 = data + ETH_HLEN + sizeof(struct iphdr) + 2;
	} else {
		if (bpf_skb_load_bytes(skb, 0, short_head, sizeof(short_head)))
			return OTHERS;
		head = short_head;
	}
	__builtin_memcpy(&ethertype, head + 2 * ETH_ALEN, 2);
	if (ethertype == bpf_htons(ETH_P_IP))
		return may_be_ours(cfg, head[ETH_HLEN + offsetof(struct iphdr, protocol)], udp4) ?
			       owner_of_ip(skb, 0, direction) :
			       OTHERS;
	if (ethertype == bpf_htons(ETH_P_IPV6))
		return may_be_ours(cfg, head[ETH_HLEN + offsetof(struct ipv6hdr, nexthdr)], udp6) ?
			       owner_of_ip(skb, 1, direction) :
			       OTHERS;
	return OTHERS;
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
 * Clone the packet to the relay, with the copy's mark. The clone has left when the helper returns, and what became of it
 * on the way stands in the scratch memory. (The helper's own answer is no witness: it says success whatever happens behind
 * the bridge.) Global functions, here and below, so that verifiers look at them once and not for each way to them.
 */
__noinline int send_copy(struct __sk_buff *skb, __u32 relay, __u32 mark, __u32 frames)
{
	struct scratch *room = workspace();
	struct crossing *crossing;

	if (!room)
		return 0;
	crossing = &room->crossing;
	crossing->entered = crossing->asked = crossing->met = crossing->again = crossing->headed = 0;
	skb->mark = mark;
	if (relay)
		bpf_clone_redirect(skb, relay, 0);
	if (!crossing->entered)
		count_drop(mark, frames, REASON(clone));
	else if (crossing->asked > crossing->met)
		count_drop(mark, crossing->headed ? frames : crossing->asked - crossing->met, REASON(relay));
	return 0;
}

/*
 * Once for each remote of the set. The packet's mark and cb carry the copy's description to the relay, and are put back.
 * `segments`: wire frames in it, and above them the bytes of headers that each repeats. `relay`: 0 for the session's own.
 */
__noinline int send_copies(struct __sk_buff *skb, __u64 remotes, __u32 tap_mark, __u64 segments, __u32 relay)
{
	__u32 mark = skb->mark, cb_segs = skb->cb[CB_SEGS], cb_headers = skb->cb[CB_HEADERS], frames = segments,
	      headers = segments >> 32;

	if (!relay)
		relay = device(DEVICE_RELAY);

	skb->cb[CB_SEGS] = frames;
	skb->cb[CB_HEADERS] = headers;
	for (__u32 remote = 0; remote < MAX_REMOTES && remotes; remote++, remotes >>= 1)
		if (remotes & 1)
			send_copy(skb, relay, tap_mark | remote, frames);
	skb->mark = mark;
	skb->cb[CB_SEGS] = cb_segs;
	skb->cb[CB_HEADERS] = cb_headers;
	return 0;
}

/* A copy that is counted and not made. Of those that are not asked for, some cannot be reached at all. */
__noinline int refuse_copy(__u32 mark, __u32 frames, __u32 reason)
{
	__u32 slot = mark & MARK_REMOTE_MASK;
	struct remote *remote = bpf_map_lookup_elem(&remotes, &slot);

	if (reason == REASON(down) && remote && remote->flags & REMOTE_UNRESOLVED)
		reason = REASON(unresolved);
	return count_drop(mark, frames, reason);
}

/* The same as send_copies for copies that are not made. */
__noinline int refuse_copies(__u64 remotes, __u32 tap_mark, __u32 frames, __u32 reason)
{
	for (__u32 remote = 0; remote < MAX_REMOTES && remotes; remote++, remotes >>= 1)
		if (remotes & 1)
			refuse_copy(tap_mark | remote, frames, reason);
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

/* The power of two that holds a number. */
static __always_inline __u32 power_for(__u32 number)
{
	__u32 rest = number - (number > 0), power, shift;

	power = (rest > 0xffff) << 4;
	rest >>= power;
	shift = (rest > 0xff) << 3;
	rest >>= shift;
	power |= shift;
	shift = (rest > 0xf) << 2;
	rest >>= shift;
	power |= shift;
	shift = (rest > 0x3) << 1;
	rest >>= shift;
	power |= shift;
	return power + (rest > 0) + (rest > 1);
}

/* Counts copies by the power of two that holds them. Segments of a super-packet are taken for equal. */
__noinline int count_sizes(__u32 frames, __u32 bytes)
{
	__u32 power = power_for(frames ? bytes / frames : 0);
	struct size *size = bpf_map_lookup_elem(&sizes, &power);

	if (!size || !frames)
		return 0;
	size->frames += frames;
	size->bytes += bytes;
	return 0;
}

#if HAS_PROFILE
/* Counts one call of a tap by the power of two that holds its time. */
__noinline int count_time(__u64 ns)
{
	__u32 power = power_for(MIN(ns, 0x7fffffff));
	struct time *time = bpf_map_lookup_elem(&times, &power);

	if (!time)
		return 0;
	time->calls++;
	time->ns += ns;
	return 0;
}
#endif

/* Has the frame a VLAN tag, in metadata or in itself? */
static __always_inline bool is_tagged(struct __sk_buff *skb)
{
	__u8 *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__be16 ethertype;

	if (skb->vlan_present)
		return true;
	if (data + ETH_HLEN > end)
		return false;
	__builtin_memcpy(&ethertype, data + 2 * ETH_ALEN, 2);
	return ethertype == bpf_htons(ETH_P_8021Q) || ethertype == bpf_htons(ETH_P_8021AD);
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

static __always_inline void watch(struct __sk_buff *skb, struct config *cfg, enum direction direction)
{
	struct tap_key key = { .ifindex = skb->tc_classid ? TAP_ELSEWHERE | skb->tc_classid : skb->ifindex,
			       .direction = direction };
	struct copy copy;
	struct tap *watched = bpf_map_lookup_elem(&taps, &key);
	enum owner owner;
	__u32 headers, copies, mark;
	__u64 chosen;

	if (!watched)
		return;
	owner = is_copy(skb->mark) ? OURS : owner_of(skb, cfg, direction);
	headers = skb->gso_size ? segment_headers(skb) : 0;
	copy = describe(skb, cfg, wire_frames(skb, headers), headers);
	if (owner == OURS) {
		watched->choice.own += copy.frames;
		return;
	}
	watched->choice.seen += copy.frames;
	if (!filter(skb, wire_bytes(skb, headers))) {
		watched->choice.filtered += copy.frames;
		return;
	}
	if (HAS_SAMPLE && !is_sampled(skb, cfg)) {
		watched->choice.skipped += copy.frames;
		return;
	}
	chosen = choose_remotes(skb, cfg);
	copies = count_bits(chosen);
	watched->stat.pcnt += (__u64)copies * copy.frames;
	watched->stat.bcnt += copies * copy.bytes;
	count_sizes(copies * copy.frames, copies * copy.bytes);
	if (is_tagged(skb))
		count_form(FORM(vlan), (__u64)copies * copy.frames);
	if (skb->gso_size) {
		count_form(FORM(supers), copies);
		count_form(FORM(segments), (__u64)copies * copy.frames);
	}
	mark = (__u32)MARK_MAGIC << MARK_MAGIC_SHIFT | watched->slot << MARK_TAP_SHIFT;
	if (owner == DEEP) {
		refuse_copies(chosen, mark, copy.frames, REASON(depth));
		return;
	}
	if (chosen & cfg->down)
		refuse_copies(chosen & cfg->down, mark, copy.frames, REASON(down));
	send_copies(skb, chosen & ~cfg->down, mark, (__u64)copy.headers << 32 | copy.frames, watched->relay);
}

/* Always TC_ACT_UNSPEC: whatever becomes of the copy, the next filter and the stack see the packet as it came. */
static __always_inline int tap(struct __sk_buff *skb, enum direction direction)
{
	struct config *cfg = session();
#if HAS_PROFILE
	__u64 began = cfg && cfg->profile ? bpf_ktime_get_ns() : 0;
#endif

	if (cfg)
		watch(skb, cfg, direction);
#if HAS_PROFILE
	if (began)
		count_time(bpf_ktime_get_ns() - began);
#endif
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
