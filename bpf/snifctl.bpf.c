/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * The datapath. A frame's journey:
 *
 *   snif_tap_in / snif_tap_out   on a watched interface: clone the untouched packet to the relay
 *   snif_encap                   on the relay's egress: put the outer header on, redirect to the out interface;
 *                                what does not fit, or must become real wire frames first, crosses the relay
 *   snif_wire                    on the peer's ingress: whole wire frames, checksums finished: encapsulate, cut, fragment
 *   snif_fragment                on the peer's egress: one outer IP fragment of a frame
 */
#include <stdbool.h>
#include <stddef.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
#include "snifctl.h"

#define IP_MF 0x2000
#define IP_DF 0x4000
/* RFC 792; <linux/icmp.h> pulls in the C library. */
enum icmp_error {
	ICMP_DEST_UNREACH = 3,
	ICMP_SOURCE_QUENCH = 4,
	ICMP_REDIRECT = 5,
	ICMP_TIME_EXCEEDED = 11,
	ICMP_PARAMETERPROB = 12,
};

/* Keeps clang from leaving out, or folding, a bounds check that the verifier needs to see. */
#define OPAQUE(value) asm volatile("" : "+r"(value))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct config);
} config SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, REQUEST_CHUNKS);
	__type(key, __u32);
	__type(value, struct request);
} request SEC(".maps");

/* Which interface and direction is watched, and its counters: the one lookup of a tap. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, MAX_TAPS);
	__type(key, struct tap_key);
	__type(value, struct tap);
} taps SEC(".maps");

/* From the slot in a copy's mark back to its tap: looked up only to count a drop. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_TAPS);
	__type(key, __u32);
	__type(value, struct tap_key);
} slots SEC(".maps");

/* A hash, not an array: replacing an element is atomic, so a copy sees the old template or the new one. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_REMOTES);
	__type(key, __u32);
	__type(value, struct remote);
} remotes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_REMOTES);
	__type(key, __u32);
	__type(value, struct stat);
} remote_stats SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_REMOTES);
	__type(key, __u32);
	__type(value, struct remote_state);
} remote_state SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_REMOTES);
	__type(key, struct tunnel_key);
	__type(value, __u32);
} tunnels SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct drops);
} drops SEC(".maps");

/* Where a later fragment is put together: the stack has 512 bytes. */
struct scratch {
	__u8 bytes[HEADER_BYTES + SKB_BYTES];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratch SEC(".maps");

/* What the tap tells the relay's egress hook through skb->cb, and snif_wire tells snif_fragment. */
enum cb_slot {
	CB_SEGS = 0, /* wire frames in this packet */
	CB_HEADERS = 1, /* bytes of headers that every segment of a super-packet repeats, 0: not known */
	CB_OFFSET = 2, /* fragment: offset of its payload in the outer IP payload */
	CB_LENGTH = 3, /* fragment: bytes of payload; bit 31: more fragments follow */
	CB_ID = 4, /* fragment: outer IP id */
};

struct copy {
	__u32 tap;
	__u32 remote;
	__u32 frames; /* wire frames in it */
	__u32 headers; /* see CB_HEADERS */
	__u64 bytes; /* of those frames, as on the wire */
};

struct tags {
	__u32 count;
	__u8 head[2 * ETH_ALEN + 4 * MAX_TAGS + 2]; /* the inner MAC addresses, tags and ethertype */
};

struct fragment {
	__u32 offset;
	__u32 length;
	__u32 more;
	__u32 id;
};

static __always_inline bool is_copy(__u32 mark)
{
	return mark >> MARK_MAGIC_SHIFT == MARK_MAGIC;
}

static __always_inline struct config *session(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&config, &zero);
}

/* Bytes of a VLAN tag that the kernel keeps in metadata instead of in the frame. */
static __always_inline __u32 tag_bytes(struct __sk_buff *skb)
{
	return skb->vlan_present ? 4 : 0;
}

static __always_inline struct copy describe(struct __sk_buff *skb, __u32 frames, __u32 headers)
{
	__u32 tag = tag_bytes(skb);

	return (struct copy){
		.tap = skb->mark >> MARK_TAP_SHIFT & MARK_TAP_MASK,
		.remote = skb->mark & MARK_REMOTE_MASK,
		.frames = frames,
		.headers = headers,
		.bytes = skb->len + tag + (headers ? (__u64)(frames - 1) * (headers + tag) : 0),
	};
}

/* A reason is the place of its counter in struct drops. */
#define REASON(name) (offsetof(struct drops, name) / sizeof(__u64))
#define REASONS (sizeof(struct drops) / sizeof(__u64))

/* The one place that counts a drop: by reason, by remote and by tap. */
static __noinline int count_drop(__u32 mark, __u32 frames, __u32 reason)
{
	__u32 zero = 0, tap = mark >> MARK_TAP_SHIFT & MARK_TAP_MASK, remote = mark & MARK_REMOTE_MASK;
	struct tap_key *key = bpf_map_lookup_elem(&slots, &tap);
	struct stat *stat = bpf_map_lookup_elem(&remote_stats, &remote);
	__u64 *count = bpf_map_lookup_elem(&drops, &zero);
	struct tap *watched = key ? bpf_map_lookup_elem(&taps, key) : NULL;

	OPAQUE(reason);
	if (count && reason < REASONS)
		count[reason] += frames;
	if (stat)
		stat->dcnt += frames;
	if (watched)
		watched->stat.dcnt += frames;
	return TC_ACT_SHOT;
}

static __always_inline int drop(struct __sk_buff *skb, struct copy *copy, __u32 reason)
{
	return count_drop(skb->mark, copy->frames, reason);
}

static __always_inline int sent(struct remote *remote, struct copy *copy)
{
	struct stat *stat = bpf_map_lookup_elem(&remote_stats, &copy->remote);

	if (stat) {
		stat->pcnt += copy->frames;
		stat->bcnt += copy->bytes;
	}
	return bpf_redirect(remote->ifindex, 0);
}

/* First of `count` outer IP ids that no other packet to this remote has; 0 where DF makes ids meaningless. */
static __always_inline __u32 take_ids(struct remote *remote, __u32 slot, __u32 count)
{
	struct remote_state *state;

	if (remote->flags & REMOTE_DF)
		return 0;
	state = bpf_map_lookup_elem(&remote_state, &slot);
	return state ? __sync_fetch_and_add(&state->ip_id, count) : 0;
}

/* ---- the tap ---- */

/*
 * Is this IPv4 header one of a tunnel packet of ours? Copies carry the mark; this knows them where a device in between
 * has cleared it, and where an ICMP error quotes them.
 */
static __always_inline bool is_our_tunnel(struct config *cfg, __u8 protocol, __be32 source, __be32 remote)
{
	struct tunnel_key key = {};

	if (protocol != cfg->protocol)
		return false;
	key.source[10] = key.source[11] = 0xff;
	key.remote[10] = key.remote[11] = 0xff;
	__builtin_memcpy(key.source + 12, &source, 4);
	__builtin_memcpy(key.remote + 12, &remote, 4);
	return bpf_map_lookup_elem(&tunnels, &key);
}

static __always_inline bool is_icmp_error(__u8 type)
{
	return type == ICMP_DEST_UNREACH || type == ICMP_SOURCE_QUENCH || type == ICMP_REDIRECT ||
	       type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETERPROB;
}

static __noinline bool quotes_our_tunnel(struct __sk_buff *skb, struct config *cfg, __u32 offset)
{
	struct iphdr quoted;
	__u8 type;

	if (bpf_skb_load_bytes(skb, offset, &type, 1) || !is_icmp_error(type))
		return false;
	if (bpf_skb_load_bytes(skb, offset + 8, &quoted, sizeof(quoted)))
		return false;
	return is_our_tunnel(cfg, quoted.protocol, quoted.saddr, quoted.daddr);
}

static __always_inline bool is_own_traffic(struct __sk_buff *skb, struct config *cfg)
{
	struct {
		struct ethhdr eth;
		struct iphdr ip;
	} __attribute__((packed)) loaded, *head = (void *)(long)skb->data;

	if ((void *)(head + 1) > (void *)(long)skb->data_end) {
		if (bpf_skb_load_bytes(skb, 0, &loaded, sizeof(loaded)))
			return false;
		head = &loaded;
	}
	if (head->eth.h_proto != bpf_htons(ETH_P_IP))
		return false;
	if (head->ip.protocol == IPPROTO_ICMP)
		return quotes_our_tunnel(skb, cfg, ETH_HLEN + head->ip.ihl * 4);
	return is_our_tunnel(cfg, head->ip.protocol, head->ip.saddr, head->ip.daddr);
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

/* Clone the packet to the relay. Its mark and cb carry the copy's description there, and are put back. */
static __always_inline void send_copy(struct __sk_buff *skb, struct config *cfg, struct copy *copy)
{
	__u32 mark = skb->mark, segs = skb->cb[CB_SEGS], headers = skb->cb[CB_HEADERS];
	__u32 copy_mark = (__u32)MARK_MAGIC << MARK_MAGIC_SHIFT | copy->tap << MARK_TAP_SHIFT | copy->remote;
	long err;

	skb->mark = copy_mark;
	skb->cb[CB_SEGS] = copy->frames;
	skb->cb[CB_HEADERS] = copy->headers;
	err = bpf_clone_redirect(skb, cfg->relay, 0);
	skb->mark = mark;
	skb->cb[CB_SEGS] = segs;
	skb->cb[CB_HEADERS] = headers;
	/*
	 * Above zero, one of our programs has dropped and counted the copy; ENETDOWN is counted by the device that
	 * lost it. What is left never reached a device: no memory, or no relay.
	 */
	if (err < 0 && err != -100 /* ENETDOWN */)
		count_drop(copy_mark, copy->frames, REASON(clone));
}

/* Always TC_ACT_UNSPEC: whatever becomes of the copy, the next filter and the stack see the packet as it came. */
static __always_inline int tap(struct __sk_buff *skb, enum direction direction)
{
	struct tap_key key = { .ifindex = skb->ifindex, .direction = direction };
	struct config *cfg = session();
	struct copy copy;
	struct tap *watched;
	__u32 headers;

	if (is_copy(skb->mark))
		return TC_ACT_UNSPEC;
	watched = bpf_map_lookup_elem(&taps, &key);
	if (!cfg || !watched || is_own_traffic(skb, cfg))
		return TC_ACT_UNSPEC;
	headers = skb->gso_size ? segment_headers(skb) : 0;
	copy = describe(skb, wire_frames(skb, headers), headers);
	copy.tap = watched->slot;
	copy.remote = 0;
	watched->stat.pcnt += copy.frames;
	watched->stat.bcnt += copy.bytes;
	send_copy(skb, cfg, &copy);
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

/* ---- the outer header ---- */

/*
 * Move the VLAN tags that the kernel holds in metadata into `tags`, outermost first, with the MAC addresses before and
 * the ethertype behind them. Each pop lifts the next tag of the frame into metadata, hence the loop.
 */
static __noinline int take_tags(struct __sk_buff *skb, struct tags *tags)
{
	__u32 count = 0;

	if (bpf_skb_load_bytes(skb, 0, tags->head, 2 * ETH_ALEN))
		return -1;
#pragma unroll
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

/* A template made ready for one packet: bytes, and the checksum over what was patched. */
struct outer {
	__u8 bytes[HEADER_BYTES] __attribute__((aligned(8)));
};

static __always_inline void fill_outer(struct outer *outer, struct remote *remote, __u32 ip_len, __u32 id, __u32 fragment)
{
	struct iphdr *ip = (void *)outer->bytes + HEADER_L3;
	__u32 sum = remote->sum;

	__builtin_memcpy(outer->bytes, remote->header, HEADER_BYTES);
	ip->tot_len = bpf_htons(ip_len);
	ip->id = bpf_htons(id);
	ip->frag_off |= bpf_htons(fragment);
	sum += ip->tot_len;
	sum += ip->id;
	sum += ip->frag_off;
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	ip->check = ~sum;
}

/* Write the first `len` bytes of the outer headers to the front of the packet. */
static __always_inline int store_outer(struct __sk_buff *skb, struct remote *remote, struct outer *outer, __u32 len)
{
	OPAQUE(len);
	if (len > HEADER_BYTES - HEADER_L3)
		return -1;
	OPAQUE(len);
	if (len == 0)
		return -1;
	if (remote->link_len)
		return bpf_skb_store_bytes(skb, 0, outer->bytes + HEADER_L3 - ETH_HLEN, len, 0);
	return bpf_skb_store_bytes(skb, 0, outer->bytes + HEADER_L3, len, 0);
}

/* Put the outer headers, and the tags that were taken out, before the inner frame. */
static __noinline int push_outer(struct __sk_buff *skb, struct remote *remote, struct tags *tags, __u32 id, __u32 fragment)
{
	__u32 outer_len = remote->outer_len, tag_len = 4 * (tags->count & (2 * MAX_TAGS - 1));
	__u32 ip_len = outer_len - remote->link_len + tag_len + skb->len;
	struct outer outer;

	fill_outer(&outer, remote, ip_len, id, fragment);
	if (bpf_skb_change_head(skb, outer_len + tag_len, 0))
		return -1;
	if (store_outer(skb, remote, &outer, outer_len))
		return -1;
	if (!tag_len)
		return 0;
	if (tag_len > 4 * MAX_TAGS)
		return -1;
	return bpf_skb_store_bytes(skb, outer_len, tags->head, 2 * ETH_ALEN + tag_len, 0);
}

static __always_inline int untag(struct __sk_buff *skb, struct tags *tags)
{
	tags->count = 0;
	return skb->vlan_present ? take_tags(skb, tags) : 0;
}

/* Bytes of outer IP packet that this frame needs. */
static __always_inline __u32 need(struct __sk_buff *skb, struct remote *remote)
{
	return remote->outer_len - remote->link_len + skb->len + tag_bytes(skb);
}

static __always_inline bool fits(struct __sk_buff *skb, struct remote *remote)
{
	return need(skb, remote) <= remote->mtu && skb->len + HEADER_BYTES + 4 * MAX_TAGS <= SKB_BYTES;
}

static __always_inline int send_frame(struct __sk_buff *skb, struct remote *remote, struct copy *copy)
{
	struct tags tags;

	if (untag(skb, &tags) || push_outer(skb, remote, &tags, take_ids(remote, copy->remote, 1), 0))
		return drop(skb, copy, REASON(resize));
	return sent(remote, copy);
}

/*
 * A super-packet that the stack or the NIC cuts behind us. With FIXED_GSO the segments are those of the wire. Without,
 * each gives up as many bytes as the headers add, so that it fits. Answers -1, with the packet as it was, where that
 * cannot be done: then the relay makes wire frames of it.
 */
static __noinline int send_super(struct __sk_buff *skb, struct remote *remote, struct copy *copy, struct config *cfg)
{
	__u32 size = skb->gso_size, tag = tag_bytes(skb), room = remote->outer_len + tag;
	__u64 flags = remote->room_flags | BPF_F_ADJ_ROOM_ENCAP_L2((__u64)ETH_HLEN + tag);
	__u32 packets = copy->frames;
	struct tags tags = {};
	struct outer outer;
	__be16 ethertype;

	if (!copy->headers || copy->headers + ETH_HLEN >= skb->len || bpf_skb_load_bytes(skb, 2 * ETH_ALEN, &ethertype, 2))
		return -1;
	if (room - remote->link_len + copy->headers + size <= remote->mtu) {
		flags |= BPF_F_ADJ_ROOM_FIXED_GSO;
	} else if (cfg->oversize == SEGMENT && size > room && copy->headers + size - ETH_HLEN <= remote->mtu) {
		packets = (skb->len - copy->headers + size - room - 1) / (size - room);
	} else {
		return -1;
	}
	fill_outer(&outer, remote, room - remote->link_len + skb->len, take_ids(remote, copy->remote, packets), 0);
	if (bpf_skb_load_bytes(skb, 0, tags.head, 2 * ETH_ALEN) || bpf_skb_adjust_room(skb, room, BPF_ADJ_ROOM_MAC, flags))
		return -1;
	if (tag && (take_tags(skb, &tags) || tags.count != 1))
		return drop(skb, copy, REASON(resize));
	if (store_outer(skb, remote, &outer, remote->outer_len) ||
	    bpf_skb_store_bytes(skb, remote->outer_len, tags.head, 2 * ETH_ALEN + tag, 0) ||
	    bpf_skb_store_bytes(skb, remote->outer_len + 2 * ETH_ALEN + tag, &ethertype, 2, 0))
		return drop(skb, copy, REASON(resize));
	return sent(remote, copy);
}

/* Shorter than any frame with a checksum left to finish: Ethernet, IPv4, UDP. */
#define SHORTEST_UNFINISHED (ETH_HLEN + sizeof(struct iphdr) + sizeof(struct udphdr))

SEC("tc")
int snif_encap(struct __sk_buff *skb)
{
	struct config *cfg = session();
	struct remote *remote;
	struct copy copy;
	int verdict;

	if (!cfg || !is_copy(skb->mark))
		return TC_ACT_SHOT; /* the relay carries copies only */
	copy = describe(skb, skb->cb[CB_SEGS], skb->cb[CB_HEADERS]);
	remote = bpf_map_lookup_elem(&remotes, &copy.remote);
	if (!remote)
		return drop(skb, &copy, REASON(remote));
	if (remote->flags & REMOTE_UNRESOLVED)
		return drop(skb, &copy, REASON(neighbour));
	if (remote->flags & REMOTE_FINISH && skb->len >= SHORTEST_UNFINISHED)
		return TC_ACT_OK; /* cross the relay, which finishes checksums and segments */
	if (skb->gso_size) {
		verdict = send_super(skb, remote, &copy, cfg);
		return verdict < 0 ? TC_ACT_OK : verdict;
	}
	return fits(skb, remote) ? send_frame(skb, remote, &copy) : TC_ACT_OK;
}

/* ---- frames that do not fit ---- */

/* The first fragment is the frame's head behind the whole outer header. */
static __always_inline int first_fragment(struct __sk_buff *skb, struct remote *remote, struct fragment *fragment)
{
	__u32 tunnel = remote->outer_len - remote->link_len - sizeof(struct iphdr);
	struct tags tags;

	if (untag(skb, &tags))
		return -1;
	if (bpf_skb_change_tail(skb, fragment->length - tunnel - 4 * tags.count, 0))
		return -1;
	return push_outer(skb, remote, &tags, fragment->id, IP_MF);
}

/* A later one is bytes from the middle of the frame behind an IP header only. */
static __noinline int later_fragment(struct __sk_buff *skb, struct remote *remote, struct fragment *fragment)
{
	__u32 tunnel = remote->outer_len - remote->link_len - sizeof(struct iphdr);
	__u32 head = remote->link_len + sizeof(struct iphdr), length = fragment->length, zero = 0;
	struct scratch *buffer = bpf_map_lookup_elem(&scratch, &zero);
	struct outer outer;
	struct tags tags;

	if (!buffer || length == 0 || length > SKB_BYTES || untag(skb, &tags))
		return -1;
	if (bpf_skb_load_bytes(skb, fragment->offset - tunnel - 4 * tags.count, buffer->bytes, length))
		return -1;
	if (bpf_skb_change_tail(skb, head + length, 0))
		return -1;
	fill_outer(&outer, remote, sizeof(struct iphdr) + length, fragment->id, fragment->offset / 8 | (fragment->more ? IP_MF : 0));
	if (store_outer(skb, remote, &outer, head))
		return -1;
	return bpf_skb_store_bytes(skb, head, buffer->bytes, length, 0);
}

static __always_inline int make_fragment(struct __sk_buff *skb, struct remote *remote, struct fragment *fragment)
{
	return fragment->offset ? later_fragment(skb, remote, fragment) : first_fragment(skb, remote, fragment);
}

SEC("tc")
int snif_fragment(struct __sk_buff *skb)
{
	__u32 slot = skb->mark & MARK_REMOTE_MASK;
	struct fragment fragment = {
		.offset = skb->cb[CB_OFFSET],
		.length = skb->cb[CB_LENGTH] & 0xffff,
		.more = 1,
		.id = skb->cb[CB_ID],
	};
	struct remote *remote = bpf_map_lookup_elem(&remotes, &slot);

	/* A drop here makes snif_wire's clone fail, which counts the whole copy once. */
	if (!is_copy(skb->mark) || !remote || make_fragment(skb, remote, &fragment))
		return TC_ACT_SHOT;
	return bpf_redirect(remote->ifindex, 0);
}

/*
 * Cut the outer IP packet of this frame into equal fragments, multiples of 8 bytes. Equal, because the kernel cannot cut
 * a packet below its transport header: a tiny last fragment would be lost. All but the last are clones.
 */
static __always_inline int send_fragments(struct __sk_buff *skb, struct config *cfg, struct remote *remote, struct copy *copy)
{
	__u32 total = need(skb, remote) - sizeof(struct iphdr);
	__u32 room = (MIN(remote->mtu, SKB_BYTES - HEADER_BYTES) - sizeof(struct iphdr)) & ~7U;
	struct fragment fragment = { .id = take_ids(remote, copy->remote, 1) };
	__u32 size;

	if (total > 0xffff - sizeof(struct iphdr))
		return drop(skb, copy, REASON(too_long));
	if (room < 8 || room > SKB_BYTES)
		return drop(skb, copy, REASON(oversize));
	size = (total + room - 1) / room; /* fragments: two at least, as a frame too long to resize may fit one */
	size = size < 2 ? 2 : size;
	size = ((total + size - 1) / size + 7) & ~7U;
	for (int i = 0; i < MAX_FRAGMENTS && fragment.offset + size < total; i++) {
		skb->cb[CB_OFFSET] = fragment.offset;
		skb->cb[CB_LENGTH] = size;
		skb->cb[CB_ID] = fragment.id;
		if (bpf_clone_redirect(skb, cfg->peer, 0))
			return drop(skb, copy, REASON(fragment));
		fragment.offset += size;
	}
	fragment.length = total - fragment.offset;
	if (fragment.length > size || make_fragment(skb, remote, &fragment))
		return drop(skb, copy, REASON(fragment));
	return sent(remote, copy);
}

static __always_inline int send_truncated(struct __sk_buff *skb, struct remote *remote, struct copy *copy)
{
	__u32 length = MIN(remote->mtu - (remote->outer_len - remote->link_len), SKB_BYTES - HEADER_BYTES - 4 * MAX_TAGS);
	struct tags tags;

	if (untag(skb, &tags) || bpf_skb_change_tail(skb, length - 4 * tags.count, 0) ||
	    push_outer(skb, remote, &tags, take_ids(remote, copy->remote, 1), 0))
		return drop(skb, copy, REASON(resize));
	copy->bytes = length;
	return sent(remote, copy);
}

SEC("tc")
int snif_wire(struct __sk_buff *skb)
{
	struct config *cfg = session();
	struct copy copy = describe(skb, 1, 0);
	struct remote *remote = bpf_map_lookup_elem(&remotes, &copy.remote);

	if (!cfg || !is_copy(skb->mark))
		return TC_ACT_SHOT;
	if (!remote)
		return drop(skb, &copy, REASON(remote));
	if (fits(skb, remote))
		return send_frame(skb, remote, &copy);
	if (need(skb, remote) > remote->mtu) {
		if (cfg->oversize == TRUNCATE)
			return send_truncated(skb, remote, &copy);
		if (cfg->oversize == DROP)
			return drop(skb, &copy, REASON(oversize));
	}
	if (remote->flags & REMOTE_DF)
		return drop(skb, &copy, REASON(oversize));
	return send_fragments(skb, cfg, remote, &copy);
}

char _license[] SEC("license") = "Dual MIT/GPL";
