/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* The relay's programs: what a copy gets, and by which way it goes on. */
#ifndef RELAY_H
#define RELAY_H

#include "common.h"

#define IP_MF 0x2000

/* RFC 8200, section 4.5 */
struct ipv6_fragment {
	__u8 next;
	__u8 reserved;
	__be16 offset; /* in units of 8 bytes in the upper 13 bits; bit 0: more follow */
	__be32 id;
};

/* Bytes that bpf_csum_diff takes at once. */
#define SUM_BYTES 512

#define ENOTSUPP 524 /* the kernel's own; no header for programs has it */

/*
 * Where copies to this remote go from here: 0 where the device is gone. One without Ethernet takes only packets that say
 * they are IP, which snif_deliver sees to, at the peer's egress hook.
 */
static __always_inline __u32 way_out(struct remote *remote)
{
	__u32 out = device(remote->device);

	return out && remote->flags & REMOTE_L3 ? device(DEVICE_PEER) : out;
}

static __always_inline void count_sent(struct copy *copy)
{
	struct stat *stat = bpf_map_lookup_elem(&remote_stats, &copy->remote);

	if (stat) {
		stat->pcnt += copy->frames;
		stat->bcnt += copy->bytes;
	}
	if (copy->whole)
		count_form(FORM(truncated), copy->frames);
	if (copy->fragments) {
		count_form(FORM(fragmented), copy->frames);
		count_form(FORM(fragments), copy->fragments);
	}
}

static __always_inline int sent(struct copy *copy)
{
	count_sent(copy);
	return bpf_redirect(copy->out, 0);
}

#if HAS_RATE
/* What the bucket holds when it is full, in time: 2 % of a second, so that no second passes much more than its rate. */
#define BUCKET_NS 20000000

/* May copies of this cost, in bytes or packets, leave now? */
__noinline int take_tokens(__u64 rate, __u64 cost)
{
	__u32 zero = 0;
	struct bucket *state = bpf_map_lookup_elem(&bucket, &zero);
	__u64 now = bpf_ktime_get_boot_ns(), passed;
	__s64 full = rate * BUCKET_NS, tokens;
	int enough;

	if (!state)
		return 0;
	bpf_spin_lock(&state->lock);
	passed = now > state->time ? now - state->time : 0;
	/* After a longer time a division tells whether the bucket is full, as the product could be too large. */
	if (passed > BUCKET_NS && (__u64)(full - state->tokens) / rate <= passed)
		tokens = full;
	else
		tokens = state->tokens + (__s64)(rate * passed);
	tokens = MIN(tokens, full);
	enough = tokens > 0;
	state->tokens = enough ? tokens - (__s64)(cost * 1000000000) : tokens;
	state->time = now > state->time ? now : state->time;
	bpf_spin_unlock(&state->lock);
	return enough;
}
#endif

/* `bytes` are those of the outer packets with their Ethernet headers. */
static __always_inline bool within_rate(struct config *cfg, __u64 bytes, __u32 packets)
{
#if HAS_RATE
	return !cfg->rate || take_tokens(cfg->rate, cfg->rate_packets ? packets : bytes);
#else
	(void)cfg, (void)bytes, (void)packets;
	return true;
#endif
}

/* What `counter`, one of those of the remote in this slot, was before `count` was added. */
static __always_inline __u32 fetch_add(__u32 slot, __u32 *counter, __u32 count)
{
#ifdef NO_ATOMIC_FETCH
	struct remote_state *state = bpf_map_lookup_elem(&remote_state, &slot);
	__u32 before;

	if (!state)
		return 0;
	bpf_spin_lock(&state->lock);
	before = *counter;
	*counter = before + count;
	bpf_spin_unlock(&state->lock);
	return before;
#else
	(void)slot;
	return __sync_fetch_and_add(counter, count);
#endif
}

/* First of `count` outer IP ids that no other packet to this remote has; 0 where DF makes ids meaningless. */
static __always_inline __u32 take_ids(struct remote *remote, __u32 slot, __u32 count)
{
	struct remote_state *state;

	if (remote->flags & REMOTE_DF)
		return 0;
	state = bpf_map_lookup_elem(&remote_state, &slot);
	return state ? fetch_add(slot, &state->ip_id, count) : 0;
}

/* ---- the outer header ---- */

/*
 * Move the VLAN tags that the kernel holds in metadata into the scratch memory, outermost first, with the MAC addresses before and
 * the ethertype behind them. Each pop lifts the next tag of the frame into metadata, hence the loop.
 */
__noinline int take_tags(struct __sk_buff *skb)
{
	struct scratch *room = workspace();
	struct tags *tags = room ? &room->tags : NULL;
	__u32 count = 0;

	if (!tags)
		return -1;
	if (bpf_skb_load_bytes(skb, 0, tags->head, 2 * ETH_ALEN))
		return -1;
#pragma clang loop unroll(disable)
	for (int i = 0; i < MAX_TAGS; i++) {
		__be16 proto, tci;

		if (!skb->vlan_present)
			break;
		proto = skb->vlan_proto;
		tci = bpf_htons(skb->vlan_tci);
		__builtin_memcpy(tags->head + 2 * ETH_ALEN + 4 * i, &proto, 2);
		__builtin_memcpy(tags->head + 2 * ETH_ALEN + 4 * i + 2, &tci, 2);
		count = i + 1;
		bpf_skb_vlan_pop(skb);
	}
	tags->count = count;
	return skb->vlan_present ? -1 : 0;
}

static __always_inline __u32 fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* Patches at a position that user space has chosen; byte by byte, as the position may be odd. */
static __always_inline void put16(struct outer *outer, __u32 at, __u32 value)
{
	if (at == 0)
		return;
	at = BOUNDED(at, 128);
	outer->bytes[at] = value >> 8;
	outer->bytes[at + 1] = value;
}

static __always_inline void put32(struct outer *outer, __u32 at, __u32 value)
{
	if (at == 0)
		return;
	at = BOUNDED(at, 128);
	outer->bytes[at] = value >> 24;
	outer->bytes[at + 1] = value >> 16;
	outer->bytes[at + 2] = value >> 8;
	outer->bytes[at + 3] = value;
}

/* Bytes that the outer IP header and what stands between it and the tunnel header take in this packet. */
static __always_inline __u32 ip_bytes(struct remote *remote, struct copy *copy)
{
	return remote->ip_len + (copy->fragment && remote->flags & REMOTE_IPV6 ? sizeof(struct ipv6_fragment) : 0);
}

/* Copy the template and write length, id, offset and checksum of the IP header. `ip_len` is this packet's. */
static __always_inline void fill_ip(struct outer *outer, struct remote *remote, struct copy *copy, __u32 ip_len)
{
	struct iphdr *ip = (void *)outer->bytes + HEADER_L3;
	struct ipv6hdr *ipv6 = (void *)ip;
	__u32 sum = remote->sum;

	__builtin_memcpy(outer->bytes, remote->header[copy->tap & 1], HEADER_BYTES);
	if (remote->flags & REMOTE_IPV6) {
		ipv6->payload_len = bpf_htons(ip_len - sizeof(*ipv6));
		*(__be32 *)ipv6 |= bpf_htonl(copy->hash & 0xfffff);
		if (copy->fragment)
			ipv6->nexthdr = IPPROTO_FRAGMENT;
		return;
	}
	ip->tot_len = bpf_htons(ip_len);
	ip->id = bpf_htons(copy->id);
	ip->frag_off |= bpf_htons(copy->fragment);
	ip->check = ~fold((__u64)sum + ip->tot_len + ip->id + ip->frag_off);
}

static __always_inline struct sequences *far_numbers(__u32 tap)
{
	struct sequences *numbers = bpf_map_lookup_elem(&sequences_far, &tap);
	struct chunk *zeros = chunk(CHUNKS);

	if (numbers || !zeros)
		return numbers;
	__builtin_memset(zeros->bytes, 0, sizeof(*numbers));
	bpf_map_update_elem(&sequences_far, &tap, zeros->bytes, BPF_NOEXIST); /* fails where another CPU was faster */
	return bpf_map_lookup_elem(&sequences_far, &tap);
}

/* The number of this copy among those of its tap to its remote. */
static __always_inline __u32 take_number(struct copy *copy)
{
	__u32 tap = copy->tap, slot = copy->remote & (MAX_REMOTES - 1);
	struct sequences *numbers = bpf_map_lookup_elem(&sequences, &tap);

	if (!numbers)
		numbers = far_numbers(tap);
	OPAQUE(slot);
	return numbers ? fetch_add(slot, &numbers->next[slot & (MAX_REMOTES - 1)], 1) : 0;
}

_Static_assert(sizeof(struct tell) == 20, "as the option's header says");

/* Geneve's option. Answers its sum, where the UDP checksum needs it. */
static __always_inline __u32 fill_tell(struct outer *outer, struct remote *remote, struct copy *copy)
{
	__u64 now = bpf_ktime_get_boot_ns() + copy->cfg->clock;
	__u32 at = remote->udp_at + TELL_AT;
	struct tell *tell;

	OPAQUE(at);
	tell = (void *)outer->bytes + (at & 124);
	tell->tap = bpf_htons(copy->tap);
	tell->flags = bpf_htons(copy->whole ? TELL_CUT : 0);
	tell->time[0] = bpf_htonl(now >> 32);
	tell->time[1] = bpf_htonl(now);
	tell->sequence = bpf_htonl(take_number(copy));
	tell->length = bpf_htonl(copy->whole ? copy->whole : copy->bytes);
	return remote->flags & REMOTE_UDP_CHECKSUM ? bpf_csum_diff(NULL, 0, (void *)tell, sizeof(*tell), 0) : 0;
}

/* `told` is the sum of what the programs have written behind the UDP header. */
static __always_inline void fill_udp(struct outer *outer, struct remote *remote, struct copy *copy, __u32 told)
{
	__u32 port = 49152 + (copy->hash & 0x3fff), check = 0; /* RFC 7348: the dynamic ports */

	if (remote->flags & REMOTE_UDP_CHECKSUM) {
		check = bpf_ntohs(fold((__u64)remote->udp_sum[copy->tap & 1] + copy->inner_sum + told +
				       2 * bpf_htons(copy->payload) + bpf_htons(port)));
		check = check == 0xffff ? 0xffff : ~check & 0xffff; /* zero would say that there is none */
	}
	put16(outer, remote->udp_at, port);
	put16(outer, remote->udp_at + 4, copy->payload);
	put16(outer, remote->udp_at + 6, check);
}

/* The first word of an ERSPAN header: version and session id are the template's. */
static __always_inline void fill_vlan(struct __sk_buff *skb, struct scratch *room, struct remote *remote,
				      struct copy *copy)
{
	struct outer *outer = &room->outer;
	struct tags *tags = &room->tags;
	__u32 at = remote->vlan_at, tci = 0, tagged = 0;
	__be16 tag[2];

	if (tags->count) {
		tci = tags->head[2 * ETH_ALEN + 2] << 8 | tags->head[2 * ETH_ALEN + 3];
		tagged = 1;
	} else if (!bpf_skb_load_bytes(skb, 2 * ETH_ALEN, tag, sizeof(tag)) &&
		   (tag[0] == bpf_htons(ETH_P_8021Q) || tag[0] == bpf_htons(ETH_P_8021AD))) {
		tci = bpf_ntohs(tag[1]);
		tagged = 1;
	}
	at = BOUNDED(at, 128);
	outer->bytes[at] |= tci >> 8 & 0xf;
	outer->bytes[at + 1] = tci;
	outer->bytes[at + 2] |= tci >> 13 << 5 | (tagged ? remote->tagged << 3 : 0) | !!copy->whole << 2;
}

/* What the tunnel header says of this copy. The packet is still the bare frame. */
static __always_inline void fill_tunnel(struct __sk_buff *skb, struct scratch *room, struct remote *remote,
					struct copy *copy)
{
	struct outer *outer = &room->outer;
	struct remote_state *state;
	__u32 told = 0;
	__u64 now;

	if (HAS_TELL && remote->flags & REMOTE_TELL)
		told = fill_tell(outer, remote, copy);
	if (HAS_UDP && remote->udp_at)
		fill_udp(outer, remote, copy, told);
	if (HAS_SEQUENCE && remote->sequence_at) {
		state = bpf_map_lookup_elem(&remote_state, &copy->remote);
		put32(outer, remote->sequence_at, state ? fetch_add(copy->remote, &state->sequence, 1) : 0);
	}
	if (HAS_ERSPAN && remote->vlan_at)
		fill_vlan(skb, room, remote, copy);
	if (HAS_ERSPAN)
		put16(outer, remote->port_at, copy->tap);
	if (HAS_ERSPAN && remote->time_at) {
		now = bpf_ktime_get_boot_ns() + copy->cfg->clock;
		put32(outer, remote->time_at, now % 1000000000);
		put32(outer, remote->seconds_at, now / 1000000000);
	}
}

/* Write `len` bytes of the outer headers, from the Ethernet header on, to the front of the packet. */
static __always_inline int store_outer(struct __sk_buff *skb, struct outer *outer, __u32 len)
{
	return bpf_skb_store_bytes(skb, 0, outer->bytes + HEADER_L3 - ETH_HLEN, BOUNDED(len, 128), 0);
}

/* The header of an IPv6 fragment, which goes between the IP header and what follows it. */
static __always_inline int store_fragment_header(struct __sk_buff *skb, struct remote *remote, struct copy *copy)
{
	struct ipv6_fragment header = {
		.next = *(__u8 *)(remote->header[0] + HEADER_L3 + offsetof(struct ipv6hdr, nexthdr)),
		.offset = bpf_htons((copy->fragment & 0x1fff) << 3 | !!(copy->fragment & IP_MF)),
		.id = bpf_htonl(copy->id),
	};

	return bpf_skb_store_bytes(skb, ETH_HLEN + sizeof(struct ipv6hdr), &header, sizeof(header), 0);
}

/* The outer headers of the first of several IPv6 fragments. */
static __noinline int store_first_ipv6(struct __sk_buff *skb, struct remote *remote, struct outer *outer,
				       struct copy *copy)
{
	__u32 at = ETH_HLEN + sizeof(struct ipv6hdr), tunnel = remote->outer_len - at;

	if (store_outer(skb, outer, at) || store_fragment_header(skb, remote, copy) || tunnel == 0 || tunnel > 64)
		return -1;
	return bpf_skb_store_bytes(skb, at + sizeof(struct ipv6_fragment),
				   outer->bytes + HEADER_L3 + sizeof(struct ipv6hdr), BOUNDED(tunnel, 64), 0);
}

/* Put the outer headers, and the tags that were taken out, before the inner frame. */
static __noinline int push_outer(struct __sk_buff *skb, struct remote *remote, struct copy *copy)
{
	__u32 outer_len = remote->outer_len - remote->ip_len + ip_bytes(remote, copy), tag_len;
	struct scratch *room = workspace();
	struct outer *outer = room ? &room->outer : NULL;

	if (!outer)
		return -1;
	tag_len = 4 * (room->tags.count & (2 * MAX_TAGS - 1));
	fill_ip(outer, remote, copy, outer_len - ETH_HLEN + tag_len + skb->len);
	fill_tunnel(skb, room, remote, copy);
	if (bpf_skb_change_head(skb, outer_len + tag_len, 0))
		return -1;
	if (outer_len == remote->outer_len ? store_outer(skb, outer, outer_len) :
					     store_first_ipv6(skb, remote, outer, copy))
		return -1;
	if (!tag_len)
		return 0;
	return bpf_skb_store_bytes(skb, outer_len, room->tags.head,
				   2 * ETH_ALEN + 4 * BOUNDED(room->tags.count, MAX_TAGS), 0);
}

static __always_inline int untag(struct __sk_buff *skb, struct scratch *room)
{
	if (!room)
		return -1;
	room->tags.count = 0;
	return skb->vlan_present ? take_tags(skb) : 0;
}

/* Bytes of outer IP packet that this frame needs. */
static __always_inline __u32 need(struct __sk_buff *skb, struct remote *remote)
{
	return remote->outer_len - ETH_HLEN + skb->len + tag_bytes(skb);
}

/* Is more than --snaplen in it, or in the longest of its segments? */
static __always_inline bool exceeds_snaplen(struct __sk_buff *skb, struct config *cfg, __u32 headers)
{
	return HAS_CUT && cfg->snaplen && wire_bytes(skb, headers) > cfg->snaplen;
}

static __always_inline bool fits(struct __sk_buff *skb, struct remote *remote)
{
	return need(skb, remote) <= remote->mtu && skb->len + HEADER_BYTES + 4 * MAX_TAGS <= SKB_BYTES;
}

#if HAS_UDP
/* The inner frame's checksum, its tag included: 65,536 bytes at most, by parts that bpf_csum_diff takes. */
__noinline __u32 sum_frame(struct __sk_buff *skb)
{
	__u32 offset = 0, length, sum = 0;
	struct chunk *buffer = chunk(0);
	__be16 tag[2] = { skb->vlan_proto, bpf_htons(skb->vlan_tci) };

	if (!buffer)
		return 0;
	if (skb->vlan_present)
		sum = bpf_csum_diff(NULL, 0, (void *)tag, sizeof(tag), sum);
	for (int i = 0; i < 65536 / SUM_BYTES && offset + SUM_BYTES <= skb->len; i++) {
		if (bpf_skb_load_bytes(skb, offset, buffer->bytes, SUM_BYTES))
			return 0;
		sum = bpf_csum_diff(NULL, 0, (void *)buffer->bytes, SUM_BYTES, sum);
		offset += SUM_BYTES;
	}
	length = skb->len - offset;
	if (length == 0 || length >= SUM_BYTES)
		return fold(sum);
	__builtin_memset(buffer->bytes, 0, SUM_BYTES);
	if (bpf_skb_load_bytes(skb, offset, buffer->bytes, BOUNDED(length, SUM_BYTES)))
		return 0;
	sum = bpf_csum_diff(NULL, 0, (void *)buffer->bytes, SUM_BYTES, sum);
	return fold(sum);
}
#endif

/* What the outer header needs to know of the frame, while it is still whole. */
static __always_inline void study(struct __sk_buff *skb, struct remote *remote, struct copy *copy)
{
	copy->payload = need(skb, remote) - remote->ip_len;
	if (remote->flags & REMOTE_FLOW)
		copy->hash = flow_hash(skb);
#if HAS_UDP
	if (remote->flags & REMOTE_UDP_CHECKSUM)
		copy->inner_sum = sum_frame(skb);
#endif
}

static __always_inline int send_frame(struct __sk_buff *skb, struct remote *remote, struct copy *copy)
{
	if (!within_rate(copy->cfg, ETH_HLEN + need(skb, remote), 1))
		return drop(skb, copy, REASON(rate));
	study(skb, remote, copy);
	copy->id = take_ids(remote, copy->remote, 1);
	if (untag(skb, workspace()) || push_outer(skb, remote, copy))
		return drop(skb, copy, REASON(resize));
	return sent(copy);
}

/*
 * Send a copy that has its outer header on into the bridge: on its way there the kernel cuts it and finishes the parts.
 * It counts as one: sent when the last of its `packets` has come to snif_wire.
 */
static __always_inline int cross_headed(struct crossing *crossing, struct copy *copy, __u32 packets)
{
	crossing->asked = packets;
	crossing->headed = copy->frames;
	crossing->bytes = copy->bytes;
	return TC_ACT_OK;
}

/* Bytes that bpf_skb_adjust_room puts in or takes out at once. */
#define ROOM_BYTES 0xfff

/*
 * Makes the segments of a super-packet shorter by so many bytes. What is put in behind the Ethernet header is taken from
 * each segment, and need not be given back when it is taken out again.
 */
static __always_inline int shorten_segments(struct __sk_buff *skb, __u32 bytes)
{
	if (bpf_skb_adjust_room(skb, bytes, BPF_ADJ_ROOM_MAC, 0))
		return -1;
	return bpf_skb_adjust_room(skb, -(__s32)bytes, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO);
}

/*
 * A super-packet that the stack or the NIC cuts behind us, or the relay's bridge where nothing behind us would. With
 * FIXED_GSO the segments are those of the wire. Without, each gives up as many bytes as the headers add, so that it fits.
 * Answers -1, with the packet as it was, where that cannot be done: then the relay makes wire frames of it.
 */
static __noinline int send_super(struct __sk_buff *skb, struct remote *remote, struct copy *copy)
{
	__u32 size = skb->gso_size, tag = tag_bytes(skb), room = remote->outer_len + tag;
	__u64 flags = remote->room_flags | BPF_F_ADJ_ROOM_ENCAP_L2((__u64)ETH_HLEN + tag);
	__u32 packets = copy->frames;
	__u32 over = copy->headers + size > remote->mtu + ETH_HLEN ? copy->headers + size - remote->mtu - ETH_HLEN : 0;
	__u64 cost;
	struct scratch *parts = workspace();
	__be16 ethertype;

	if (!parts || remote->flags & REMOTE_PER_FRAME || !copy->headers || copy->headers + ETH_HLEN >= skb->len ||
	    exceeds_snaplen(skb, copy->cfg, copy->headers) || bpf_skb_load_bytes(skb, 2 * ETH_ALEN, &ethertype, 2))
		return -1;
	if (room - ETH_HLEN + copy->headers + size <= remote->mtu) {
		flags |= BPF_F_ADJ_ROOM_FIXED_GSO;
	} else if (copy->cfg->oversize == SEGMENT && size > room + over && over <= ROOM_BYTES) {
		size -= room + over;
		packets = (skb->len - copy->headers + size - 1) / size;
	} else {
		return -1;
	}
	cost = (__u64)packets * (room + copy->headers) + skb->len - copy->headers;
	study(skb, remote, copy);
	copy->id = take_ids(remote, copy->remote, packets);
	parts->tags.count = 0;
	fill_ip(&parts->outer, remote, copy, room - ETH_HLEN + skb->len);
	fill_tunnel(skb, parts, remote, copy);
	if (bpf_skb_load_bytes(skb, 0, parts->tags.head, 2 * ETH_ALEN) ||
	    bpf_skb_adjust_room(skb, room, BPF_ADJ_ROOM_MAC, flags))
		return -1;
	/* Not before: what the kernel refuses above leaves by another way. */
	if (!within_rate(copy->cfg, cost, packets))
		return drop(skb, copy, REASON(rate));
	if ((over && shorten_segments(skb, over)) || (tag && (take_tags(skb) || parts->tags.count != 1)))
		return drop(skb, copy, REASON(resize));
	if (store_outer(skb, &parts->outer, remote->outer_len) ||
	    bpf_skb_store_bytes(skb, remote->outer_len, parts->tags.head, 2 * ETH_ALEN + tag, 0) ||
	    bpf_skb_store_bytes(skb, remote->outer_len + 2 * ETH_ALEN + tag, &ethertype, 2, 0))
		return drop(skb, copy, REASON(resize));
	return remote->flags & REMOTE_FINISH ? cross_headed(&parts->crossing, copy, packets) : sent(copy);
}

/* ---- frames that do not fit ---- */

/*
 * Make the packet `length` bytes long, whatever is in it then. The kernel does not cut the tail of a packet that has
 * been encapsulated (skb->encapsulation; measured on 6.18), nor below its transport header, but it takes bytes out behind
 * the Ethernet header.
 */
__noinline int resize(struct __sk_buff *skb, __u32 length)
{
	if (skb->len == length || !bpf_skb_change_tail(skb, length, 0))
		return 0;
	for (int i = 0; i < 65536 / ROOM_BYTES + 1 && skb->len > length; i++)
		if (bpf_skb_adjust_room(skb, -(__s32)MIN(skb->len - length, ROOM_BYTES), BPF_ADJ_ROOM_MAC, 0))
			return -1;
	return skb->len == length ? 0 : -1;
}

/* Keep the first `length` bytes. */
__noinline int cut(struct __sk_buff *skb, __u32 length)
{
	struct chunk *buffer = chunk(CHUNKS);

	if (!bpf_skb_change_tail(skb, length, 0))
		return 0;
	if (!buffer || length == 0 || length > SKB_BYTES)
		return -1;
	if (bpf_skb_load_bytes(skb, 0, buffer->bytes, BOUNDED(length, CHUNK_BYTES)) || resize(skb, length))
		return -1;
	return bpf_skb_store_bytes(skb, 0, buffer->bytes, BOUNDED(length, CHUNK_BYTES), 0);
}

/* Keep what the frame has from its byte `from` on in the rest map. A part also holds the beginning of the next one. */
__noinline int save_rest(struct __sk_buff *skb, __u32 from)
{
	__u32 length = skb->len;

	for (__u32 number = 0; number < CHUNKS && from < length; number++) {
		__u32 bytes = MIN(length - from, CHUNK_BYTES);
		struct chunk *part = chunk(number);

		if (!part || bpf_skb_load_bytes(skb, from, part->bytes, BOUNDED(bytes, CHUNK_BYTES)))
			return -1;
		from += CHUNK_BYTES;
		if (from >= length)
			break;
		bytes = MIN(length - from, PIECE_BYTES);
		if (bpf_skb_load_bytes(skb, from, part->bytes + CHUNK_BYTES, BOUNDED(bytes, PIECE_BYTES)))
			return -1;
	}
	return 0;
}

/* Store `length` bytes of the rest, from its byte `offset` on, at byte `at` of the packet. */
__noinline int store_rest(struct __sk_buff *skb, __u32 at, __u32 offset, __u32 length)
{
	for (int i = 0; i < SKB_BYTES / PIECE_BYTES + 1 && length; i++) {
		__u32 bytes = MIN(length, PIECE_BYTES), from = offset & (CHUNK_BYTES - 1);
		struct chunk *part = chunk(offset / CHUNK_BYTES);

		OPAQUE(from);
		from &= CHUNK_BYTES - 1;
		if (!part || bpf_skb_store_bytes(skb, at, part->bytes + from, BOUNDED(bytes, PIECE_BYTES), 0))
			return -1;
		at += bytes;
		offset += bytes;
		length -= bytes;
	}
	return 0;
}

/* Make a later fragment of the packet: the one that begins with this byte of the payload. */
static __noinline int make_fragment(struct __sk_buff *skb, struct remote *remote, __u32 offset)
{
	struct copy copy = { .tap = skb->mark >> MARK_TAP_SHIFT & MARK_TAP_MASK };
	struct scratch *room = workspace();
	__u32 head, length;
	bool more;

	if (!room)
		return -1;
	more = room->train.payload - offset > room->train.size;
	length = more ? room->train.size : room->train.payload - offset;
	copy.hash = room->train.hash;
	copy.id = room->train.id;
	copy.fragment = offset / 8 | (more ? IP_MF : 0);
	head = ETH_HLEN + ip_bytes(remote, &copy);
	if (resize(skb, head + length))
		return -1;
	fill_ip(&room->outer, remote, &copy, head - ETH_HLEN + length);
	if (store_outer(skb, &room->outer, ETH_HLEN + remote->ip_len))
		return -1;
	if (remote->flags & REMOTE_IPV6 && store_fragment_header(skb, remote, &copy))
		return -1;
	return store_rest(skb, head, offset - room->train.size, length);
}

/* Send a clone of the fragment that begins here, unless it is the last. Answers where the next one begins. */
__noinline int send_next(struct __sk_buff *skb, __u32 offset)
{
	__u32 slot = skb->mark & MARK_REMOTE_MASK;
	struct remote *remote = bpf_map_lookup_elem(&remotes, &slot);
	struct scratch *room = workspace();
	int err;

	if (!remote || !room || room->train.payload - offset <= room->train.size)
		return offset;
	err = make_fragment(skb, remote, offset);
	if (!err)
		err = bpf_clone_redirect(skb, room->train.out, 0);
	if (!room->train.failed)
		room->train.failed = err;
	return offset + room->train.size;
}

/* Send all from here but the last. */
__noinline int send_train(struct __sk_buff *skb, __u32 offset)
{
	for (int i = 0; i < MAX_FRAGMENTS; i++) {
		__u32 next = send_next(skb, offset);

		if (next == offset)
			break;
		offset = next;
	}
	return 0;
}

#define LAST_BYTES 256

/*
 * Bytes of payload in each fragment but the last, a multiple of 8: `most`, or less, so that the last is not so short that
 * the kernel cannot cut a packet to it (below its transport header). Answers 0 where there cannot be so many fragments.
 */
static __always_inline __u32 fragment_size(__u32 payload, __u32 most, __u32 count)
{
	__u32 size = most, equal = (payload + count - 1) / count;

	if (payload <= most || most < LAST_BYTES + 8)
		size = (equal + 7) & ~7U;
	else if (payload - (count - 1) * most < LAST_BYTES)
		size = ((payload - LAST_BYTES) / (count - 1) + 7) & ~7U;
	size = MIN(size, most);
	return size < payload && count <= MAX_FRAGMENTS ? size : 0;
}

/* The first fragment is the frame's head behind the whole outer header. The rest is saved. */
static __always_inline int first_fragment(struct __sk_buff *skb, struct remote *remote, struct copy *copy, __u32 size)
{
	struct scratch *room = workspace();
	__u32 kept;

	if (!room || untag(skb, room))
		return -1;
	kept = size - (remote->outer_len - ETH_HLEN - remote->ip_len) - 4 * room->tags.count;
	if (save_rest(skb, kept) || cut(skb, kept))
		return -1;
	return push_outer(skb, remote, copy);
}

/* A fragment of the copy was refused, by the out interface if `failed` is above zero: the copy counts once. */
static __always_inline int drop_refused(struct __sk_buff *skb, struct copy *copy, int failed)
{
	return drop(skb, copy, failed > 0 ? REASON(out) : REASON(fragment));
}

/*
 * Cut the outer IP packet of this frame into fragments. Clones tell what becomes of them, the packet itself does not, but
 * costs less: so the last one is the packet itself, unless the out interface has a queue that may refuse it.
 */
static __always_inline int fragment(struct __sk_buff *skb, struct remote *remote, struct copy *copy)
{
	__u32 mtu = MIN(remote->mtu, SKB_BYTES - HEADER_BYTES), size, most, count;
	struct scratch *room = workspace();
	int err;

	study(skb, remote, copy);
	copy->id = take_ids(remote, copy->remote, 1);
	copy->fragment = IP_MF;
	most = (mtu - ip_bytes(remote, copy)) & ~7U;
	if (copy->payload > (remote->flags & REMOTE_IPV6 ? 0xffff : 0xffff - sizeof(struct iphdr)))
		return drop(skb, copy, REASON(too_long));
	if (most < 8 || most > SKB_BYTES)
		return drop(skb, copy, REASON(oversize));
	count = (copy->payload + most - 1) / most; /* two at least, as a frame too long to resize may fit one */
	count = count < 2 ? 2 : count;
	if (!within_rate(copy->cfg, copy->payload + count * (__u64)(ETH_HLEN + ip_bytes(remote, copy)), count))
		return drop(skb, copy, REASON(rate));
	size = fragment_size(copy->payload, most, count);
	if (!room || !size || first_fragment(skb, remote, copy, size))
		return drop(skb, copy, REASON(fragment));
	copy->fragments = (copy->payload + size - 1) / size;
	room->train = (struct train){ copy->payload, size, copy->id, copy->hash, copy->out, 0 };
	room->train.failed = bpf_clone_redirect(skb, copy->out, 0);
	if (count > 2)
		send_train(skb, size);
	if (room->train.failed)
		return drop_refused(skb, copy, room->train.failed);
	if (make_fragment(skb, remote, (copy->payload - 1) / size * size))
		return drop(skb, copy, REASON(fragment));
	if (!(remote->flags & REMOTE_QUEUED))
		return sent(copy);
	err = bpf_clone_redirect(skb, copy->out, 0);
	if (err)
		return drop_refused(skb, copy, err);
	count_sent(copy);
	return TC_ACT_SHOT; /* what has been sent were clones */
}

/* Bytes of the frame that the copy is to have: all, or as many as --snaplen or the MTU of a truncating session allow. */
static __always_inline __u32 wanted(struct __sk_buff *skb, struct remote *remote, struct config *cfg)
{
	__u32 length = wire_bytes(skb, 0);

	if (cfg->snaplen)
		length = MIN(length, cfg->snaplen);
	if (cfg->oversize == TRUNCATE)
		length = MIN(length, remote->mtu - (remote->outer_len - ETH_HLEN));
	return length;
}

/* A whole frame of the wire, finished: what is wanted of it, in one packet or in fragments. */
static __noinline int send_wire(struct __sk_buff *skb, struct remote *remote, struct copy *copy)
{
	struct config *cfg = copy->cfg;
	__u32 length = wanted(skb, remote, cfg);

	if (HAS_CUT && length < wire_bytes(skb, 0)) {
		length = MIN(length, SKB_BYTES - HEADER_BYTES - 4 * MAX_TAGS);
		if (cut(skb, length - tag_bytes(skb)))
			return drop(skb, copy, REASON(resize));
		copy->whole = copy->bytes;
		copy->bytes = length;
	}
	if (fits(skb, remote))
		return send_frame(skb, remote, copy);
	if (remote->flags & REMOTE_DF || (cfg->oversize == DROP && need(skb, remote) > remote->mtu))
		return drop(skb, copy, REASON(oversize));
	return fragment(skb, remote, copy);
}

/* ---- the programs ---- */

/*
 * Is a checksum still to be finished? No field tells, but the helpers do: such a frame cannot be said to be verified, and
 * its device has not summed it all up either.
 */
static __always_inline bool is_unfinished(struct __sk_buff *skb)
{
	bool unfinished;

	bpf_csum_level(skb, BPF_CSUM_LEVEL_INC);
	unfinished = bpf_csum_level(skb, BPF_CSUM_LEVEL_QUERY) < 0;
	bpf_csum_level(skb, BPF_CSUM_LEVEL_RESET);
	return unfinished && bpf_csum_update(skb, 0) == -ENOTSUPP;
}

/* Send a copy on into the bridge: on its way there the kernel cuts it into wire frames and finishes them. */
static __always_inline int cross(struct crossing *crossing, struct copy *copy)
{
	crossing->asked = copy->frames;
	return TC_ACT_OK;
}

SEC("tc")
int snif_encap(struct __sk_buff *skb)
{
	struct config *cfg = session();
	struct scratch *room = workspace();
	struct remote *remote;
	struct copy copy;
	int verdict;

	if (!cfg || !room || !is_copy(skb->mark))
		return TC_ACT_SHOT; /* the relay carries copies only */
	if (room->crossing.again)
		return TC_ACT_OK;
	room->crossing.entered = 1;
	copy = describe(skb, cfg, skb->cb[CB_SEGS], skb->cb[CB_HEADERS]);
	remote = bpf_map_lookup_elem(&remotes, &copy.remote);
	if (!remote)
		return drop(skb, &copy, REASON(remote));
	if (remote->flags & REMOTE_UNRESOLVED)
		return drop(skb, &copy, REASON(unresolved));
	copy.out = way_out(remote);
	if (!copy.out)
		return drop(skb, &copy, REASON(gone));
	if (skb->gso_size) {
		verdict = send_super(skb, remote, &copy);
		return verdict < 0 ? cross(&room->crossing, &copy) : verdict;
	}
	if (!(remote->flags & REMOTE_FINISH) && fits(skb, remote) && !exceeds_snaplen(skb, cfg, 0))
		return send_frame(skb, remote, &copy);
	if (is_unfinished(skb))
		return cross(&room->crossing, &copy);
	return send_wire(skb, remote, &copy);
}

/* A part of a copy that snif_encap has given its outer header. */
static __always_inline int pass_on(struct crossing *crossing, struct remote *remote, struct copy *copy)
{
	copy->out = remote ? way_out(remote) : 0;
	if (!copy->out)
		return TC_ACT_SHOT; /* the tap counts it: not all of its parts have come */
	if (++crossing->met < crossing->asked)
		return bpf_redirect(copy->out, 0);
	copy->frames = crossing->headed;
	copy->bytes = crossing->bytes;
	return sent(copy);
}

SEC("tc")
int snif_wire(struct __sk_buff *skb)
{
	struct config *cfg = session();
	struct copy copy = describe(skb, cfg, 1, 0);
	struct remote *remote = bpf_map_lookup_elem(&remotes, &copy.remote);
	struct scratch *room = workspace();

	/* What was not sent on into the bridge is not counted there: where snif_encap is gone it is lost, as `clone`. */
	if (!cfg || !room || !is_copy(skb->mark) || !room->crossing.asked)
		return TC_ACT_SHOT;
	/* Frames that were cut out of a super-packet of the frag-list kind, which only forwarding makes, are left unfinished. */
	if (!room->crossing.again && skb->ingress_ifindex && is_unfinished(skb)) {
		room->crossing.again = 1;
		bpf_clone_redirect(skb, device(DEVICE_RELAY), 0);
		room->crossing.again = 0;
		return TC_ACT_SHOT;
	}
	if (room->crossing.headed)
		return pass_on(&room->crossing, remote, &copy);
	room->crossing.met++;
	if (!remote)
		return drop(skb, &copy, REASON(remote));
	copy.out = way_out(remote);
	if (!copy.out)
		return drop(skb, &copy, REASON(gone));
	return send_wire(skb, remote, &copy);
}

/* ---- out interfaces without Ethernet ---- */

/*
 * Makes skb->protocol say what the outer IP header is, as WireGuard and others compare the two. There is no helper for it,
 * but a tag that is pushed into the frame and taken out again makes the kernel read the ethertype anew. Two, as the first
 * one would only go into metadata.
 */
static __always_inline int renew_protocol(struct __sk_buff *skb)
{
	__be16 tag = bpf_htons(ETH_P_8021Q);

	if (bpf_skb_vlan_push(skb, tag, 1) || bpf_skb_vlan_push(skb, tag, 1))
		return -1;
	return bpf_skb_vlan_pop(skb) || bpf_skb_vlan_pop(skb) ? -1 : 0;
}

/* The whole outer packet with an Ethernet header, which goes: bpf_redirect_neigh finds the IP header behind it. */
SEC("tc")
int snif_deliver(struct __sk_buff *skb)
{
	__u32 slot = skb->mark & MARK_REMOTE_MASK, out;
	struct remote *remote = bpf_map_lookup_elem(&remotes, &slot);
	__be16 protocol;

	HOLD(request);
	HOLD(outs);
	HOLD(bucket);
	HOLD(spread);
	HOLD(sequences);
	HOLD(sequences_far);
	HOLD(times);
	if (!is_copy(skb->mark) || !remote)
		return TC_ACT_SHOT;
	out = device(remote->device);
	protocol = remote->flags & REMOTE_IPV6 ? bpf_htons(ETH_P_IPV6) : bpf_htons(ETH_P_IP);
	if (!out || (skb->protocol != protocol && renew_protocol(skb)))
		return TC_ACT_SHOT;
	return bpf_redirect_neigh(out, NULL, 0, 0);
}

#endif
