/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * The datapath. A frame's journey:
 *
 *   snif_tap_in / snif_tap_out   on a watched interface: clone the untouched packet to the relay
 *   snif_encap                   on the relay's egress: put the outer header on, redirect to the out interface;
 *                                what does not fit, or must become real wire frames first, crosses the relay
 *   snif_wire                    on the peer's ingress: whole wire frames, checksums finished: encapsulate, cut, fragment
 *   snif_fragment                on the peer's egress: one outer IP fragment of a frame
 *   snif_deliver                 on the relay's ingress: on to an out interface without Ethernet
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
#include "classic.h"

#define IP_MF 0x2000
#define IP_DF 0x4000
/* RFC 792; <linux/icmp.h> pulls in the C library. */
enum icmp_error {
	ICMP_DEST_UNREACH = 3,
	ICMP_SOURCE_QUENCH = 4,
	ICMP_REDIRECT = 5,
	ICMP_TIME_EXCEEDED = 11,
	ICMP_PARAMETERPROB = 12,
	ICMPV6_LAST_ERROR = 127, /* RFC 4443 */
};

#define ETH_P_OLD_QINQ 0x9100

#define MIN(a, b) ((a) < (b) ? (a) : (b))
/*
 * A number from 1 to `limit`, a power of two, in a form that every verifier follows: comparisons are often made on a
 * copy of the register that is used later.
 */
#define BOUNDED(number, limit)          \
	({                              \
		__u32 below = (number) - 1; \
		OPAQUE(below);          \
		below &= (limit) - 1;   \
		OPAQUE(below);          \
		below + 1;              \
	})

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
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_REMOTES);
	__type(key, struct carrier_key);
	__type(value, __u32);
} carriers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SPREAD_CHUNKS);
	__type(key, __u32);
	__type(value, struct spread_chunk);
} spread SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct drops);
} drops SEC(".maps");

/* What may leave towards the remotes: a token bucket that all CPUs share. */
struct bucket {
	struct bpf_spin_lock lock;
	__u32 unused;
	__s64 tokens; /* in billionths of a byte or packet; a copy larger than what is there leaves a debt */
	__u64 time; /* since boot, of the last change */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct bucket);
} bucket SEC(".maps");

/* A template made ready for one packet, with room for any length that the verifier takes for possible. */
struct outer {
	__u8 bytes[HEADER_L3 + 128] __attribute__((aligned(8)));
};

#define SCRATCH_BYTES 16384 /* SKB_BYTES, as a power of two */

/* The VLAN tags of a copy, taken out of it. */
struct tags {
	__u32 count;
	__u8 head[2 * ETH_ALEN + 4 * MAX_TAGS + 2]; /* the inner MAC addresses, tags and ethertype */
};

/* Where headers and later fragments are put together: the stack has 512 bytes. */
struct scratch {
	__u8 bytes[SCRATCH_BYTES] __attribute__((aligned(8))); /* or clang clears it byte by byte */
	struct outer outer;
	struct tags tags;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratch SEC(".maps");

static __always_inline struct scratch *workspace(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratch, &zero);
}

/* What the tap tells the relay's egress hook through skb->cb, and snif_wire tells snif_fragment. */
enum cb_slot {
	CB_SEGS = 0, /* wire frames in this packet */
	CB_HEADERS = 1, /* bytes of headers that every segment of a super-packet repeats, 0: not known */
	CB_PAYLOAD = 0, /* fragment: bytes of payload of all fragments together */
	CB_SUM = 1, /* fragment: checksum of the inner frame */
	CB_OFFSET = 2, /* fragment: offset of its payload in the outer IP payload */
	CB_LENGTH = 3, /* fragment: bytes of its payload, 0: not a fragment to make; and CB_TRUNCATED */
	CB_ID = 4, /* fragment: outer IP id */
};

#define CB_TRUNCATED 0x80000000U /* the frame has been cut */

struct copy {
	struct config *cfg;
	__u64 bytes; /* of its frames, as on the wire */
	__u32 tap; /* slot; odd for egress */
	__u32 remote; /* slot */
	__u32 frames; /* wire frames in it */
	__u32 headers; /* see CB_HEADERS */
	__u32 hash; /* of its flow, where the outer header carries it */
	__u32 payload; /* bytes behind the outer IP header, of all fragments together */
	__u32 inner_sum; /* checksum of the inner frame, where the outer header needs it */
	__u32 id; /* outer IP id */
	__u32 fragment; /* offset / 8 and IP_MF of a fragment */
	__u32 truncated;
};

/* RFC 8200, section 4.5 */
struct ipv6_fragment {
	__u8 next;
	__u8 reserved;
	__be16 offset; /* in units of 8 bytes in the upper 13 bits; bit 0: more follow */
	__be32 id;
};

/* Bytes that bpf_csum_diff takes at once. */
#define SUM_BYTES 512

static __always_inline bool is_copy(__u32 mark)
{
	return mark >> MARK_MAGIC_SHIFT == MARK_MAGIC;
}

static __always_inline struct config *session(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&config, &zero);
}

static __always_inline struct copy describe(struct __sk_buff *skb, struct config *cfg, __u32 frames, __u32 headers)
{
	__u32 tag = tag_bytes(skb);

	return (struct copy){
		.cfg = cfg,
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
__noinline int count_drop(__u32 mark, __u32 frames, __u32 reason)
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

/*
 * On to the out interface. One without Ethernet takes only packets whose network header is the outer IP header, and
 * receiving is what sets that: such a copy goes through the relay's peer, back to the relay.
 */
static __always_inline int forward(struct __sk_buff *skb, struct config *cfg, struct remote *remote)
{
	if (!(remote->flags & REMOTE_L3))
		return bpf_redirect(remote->ifindex, 0);
	skb->cb[CB_LENGTH] = 0;
	return bpf_redirect(cfg->peer, 0);
}

static __always_inline int sent(struct __sk_buff *skb, struct remote *remote, struct copy *copy)
{
	struct stat *stat = bpf_map_lookup_elem(&remote_stats, &copy->remote);

	if (stat) {
		stat->pcnt += copy->frames;
		stat->bcnt += copy->bytes;
	}
	return forward(skb, copy->cfg, remote);
}

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

/* `bytes` are those of the outer packets with their Ethernet headers. */
static __always_inline bool within_rate(struct config *cfg, __u64 bytes, __u32 packets)
{
	return !cfg->rate || take_tokens(cfg->rate, cfg->rate_packets ? packets : bytes);
}

/* What `counter`, one of a remote's, was before `count` was added. */
static __always_inline __u32 fetch_add(struct remote_state *state, __u32 *counter, __u32 count)
{
#ifdef NO_ATOMIC_FETCH
	__u32 before;

	bpf_spin_lock(&state->lock);
	before = *counter;
	*counter = before + count;
	bpf_spin_unlock(&state->lock);
	return before;
#else
	(void)state;
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
	return state ? fetch_add(state, &state->ip_id, count) : 0;
}

/* ---- the tap ---- */

/* The addresses and the transport of an IP packet. IPv4 addresses are ::ffff:a.b.c.d. */
struct ip_facts {
	struct tunnel_key key; /* source and destination */
	__u32 transport; /* offset of what follows the IP header */
	__u16 port; /* destination port of UDP */
	__u8 protocol;
	__u8 fragment; /* part of a fragmented datagram */
	__u8 known;
};

static __always_inline void map_ipv4(__u8 *to, __be32 address)
{
	to[10] = to[11] = 0xff;
	__builtin_memcpy(to + 12, &address, 4);
}

/* Read the IP header at `offset`. */
static __noinline int read_ip(struct __sk_buff *skb, __u32 offset, __u32 ipv6, struct ip_facts *facts)
{
	union {
		struct iphdr v4;
		struct ipv6hdr v6;
	} ip;

	__builtin_memset(facts, 0, sizeof(*facts));
	if (ipv6) {
		if (bpf_skb_load_bytes(skb, offset, &ip.v6, sizeof(ip.v6)))
			return -1;
		__builtin_memcpy(facts->key.source, &ip.v6.saddr, 16);
		__builtin_memcpy(facts->key.remote, &ip.v6.daddr, 16);
		facts->protocol = ip.v6.nexthdr;
		facts->transport = offset + sizeof(ip.v6);
		if (facts->protocol == IPPROTO_FRAGMENT) {
			facts->fragment = 1;
			if (bpf_skb_load_bytes(skb, facts->transport, &facts->protocol, 1))
				return -1;
			facts->transport += 8;
		}
	} else {
		if (bpf_skb_load_bytes(skb, offset, &ip.v4, sizeof(ip.v4)))
			return -1;
		map_ipv4(facts->key.source, ip.v4.saddr);
		map_ipv4(facts->key.remote, ip.v4.daddr);
		facts->protocol = ip.v4.protocol;
		facts->fragment = !!(ip.v4.frag_off & bpf_htons(0x3fff));
		facts->transport = offset + ip.v4.ihl * 4;
	}
	facts->known = 1;
	return 0;
}

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

/* ---- the flow ---- */

static __always_inline __u32 mix(__u32 hash, __u32 word)
{
	hash ^= word;
	hash *= 0x9e3779b1; /* 2^32 divided by the golden ratio */
	return hash ^ hash >> 15;
}

/* The smaller first: the same for both directions of a flow. */
static __always_inline __u32 mix_pair(__u32 hash, __u32 a, __u32 b)
{
	return mix(mix(hash, MIN(a, b)), a < b ? b : a);
}

/* Addresses, protocol and, unless the datagram is fragmented, ports: fragments of one datagram stay together. */
static __always_inline __u32 hash_ip(struct __sk_buff *skb, __u32 offset, __u32 ipv6)
{
	struct ip_facts facts;
	__u32 hash, words[8];
	__u16 ports[2];

	if (read_ip(skb, offset, ipv6, &facts))
		return 0;
	__builtin_memcpy(words, &facts.key, sizeof(words));
	hash = mix(0, facts.protocol);
	for (int i = 0; i < 4; i++)
		hash = mix_pair(hash, words[i], words[4 + i]);
	if (facts.fragment)
		return hash;
	if (facts.protocol != IPPROTO_TCP && facts.protocol != IPPROTO_UDP && facts.protocol != IPPROTO_SCTP)
		return hash;
	if (bpf_skb_load_bytes(skb, facts.transport, ports, sizeof(ports)))
		return hash;
	return mix_pair(hash, ports[0], ports[1]);
}

/* Every bit of the hash from every bit of what went in (MurmurHash3, Appleby). */
static __always_inline __u32 finish(__u32 hash)
{
	hash ^= hash >> 16;
	hash *= 0x85ebca6b;
	hash ^= hash >> 13;
	hash *= 0xc2b2ae35;
	return hash ^ hash >> 16;
}

/* A hash of the frame's flow that both directions share; of what is not IP, of its pair of MAC addresses. */
__noinline __u32 flow_hash(struct __sk_buff *skb)
{
	struct {
		__u16 dst[3], src[3];
		__be16 ethertype;
	} head;
	__u32 offset = ETH_HLEN, hash = 0;

	if (bpf_skb_load_bytes(skb, 0, &head, sizeof(head)))
		return 0;
	for (int i = 0; i < 3; i++) {
		if (head.ethertype != bpf_htons(ETH_P_8021Q) && head.ethertype != bpf_htons(ETH_P_8021AD) &&
		    head.ethertype != bpf_htons(ETH_P_OLD_QINQ))
			break;
		if (bpf_skb_load_bytes(skb, offset + 2, &head.ethertype, 2))
			break;
		offset += 4;
	}
	if (head.ethertype == bpf_htons(ETH_P_IP) || head.ethertype == bpf_htons(ETH_P_IPV6))
		hash = hash_ip(skb, offset, head.ethertype == bpf_htons(ETH_P_IPV6));
	if (hash)
		return finish(hash);
	for (int i = 0; i < 3; i++)
		hash = mix_pair(hash, head.dst[i], head.src[i]);
	return finish(hash);
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

	if (cfg->spread != FLOW)
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

/* Bytes of the longest wire frame in this packet. */
static __always_inline __u32 wire_bytes(struct __sk_buff *skb, __u32 headers)
{
	return (headers ? headers + skb->gso_size : skb->len) + tag_bytes(skb);
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
	if (!is_sampled(skb, cfg)) {
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

static __always_inline void fill_udp(struct outer *outer, struct remote *remote, struct copy *copy)
{
	__u32 port = 49152 + (copy->hash & 0x3fff), check = 0; /* RFC 7348: the dynamic ports */

	if (remote->flags & REMOTE_UDP_CHECKSUM) {
		check = bpf_ntohs(fold((__u64)remote->udp_sum[copy->tap & 1] + copy->inner_sum + 2 * bpf_htons(copy->payload) + bpf_htons(port)));
		check = check == 0xffff ? 0xffff : ~check & 0xffff; /* zero would say that there is none */
	}
	put16(outer, remote->udp_at, port);
	put16(outer, remote->udp_at + 4, copy->payload);
	put16(outer, remote->udp_at + 6, check);
}

/* The first word of an ERSPAN header: version and session id are the template's. */
static __always_inline void fill_vlan(struct __sk_buff *skb, struct scratch *room, struct remote *remote, struct copy *copy)
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
	outer->bytes[at + 2] |= tci >> 13 << 5 | (tagged ? remote->tagged << 3 : 0) | copy->truncated << 2;
}

/* What the tunnel header says of this copy. The packet is still the bare frame. */
static __always_inline void fill_tunnel(struct __sk_buff *skb, struct scratch *room, struct remote *remote, struct copy *copy)
{
	struct outer *outer = &room->outer;
	struct remote_state *state;
	__u64 now;

	if (remote->udp_at)
		fill_udp(outer, remote, copy);
	if (remote->sequence_at) {
		state = bpf_map_lookup_elem(&remote_state, &copy->remote);
		put32(outer, remote->sequence_at, state ? fetch_add(state, &state->sequence, 1) : 0);
	}
	if (remote->vlan_at)
		fill_vlan(skb, room, remote, copy);
	put16(outer, remote->port_at, copy->tap);
	if (remote->time_at) {
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

/* The headers of an IPv6 fragment: the fragment header goes between the IP header and what follows it. */
static __always_inline int store_ipv6_fragment(struct __sk_buff *skb, struct remote *remote, struct outer *outer, struct copy *copy)
{
	__u32 at = ETH_HLEN + sizeof(struct ipv6hdr), tunnel = remote->outer_len - at;
	struct ipv6_fragment header = {
		.next = *(__u8 *)(remote->header[0] + HEADER_L3 + offsetof(struct ipv6hdr, nexthdr)),
		.offset = bpf_htons((copy->fragment & 0x1fff) << 3 | !!(copy->fragment & IP_MF)),
		.id = bpf_htonl(copy->id),
	};

	if (store_outer(skb, outer, at) || bpf_skb_store_bytes(skb, at, &header, sizeof(header), 0))
		return -1;
	if (copy->fragment & 0x1fff)
		return 0;
	if (tunnel == 0 || tunnel > 32)
		return -1;
	return bpf_skb_store_bytes(skb, at + sizeof(header), outer->bytes + HEADER_L3 + sizeof(struct ipv6hdr), BOUNDED(tunnel, 32), 0);
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
	if (outer_len == remote->outer_len ? store_outer(skb, outer, outer_len) : store_ipv6_fragment(skb, remote, outer, copy))
		return -1;
	if (!tag_len)
		return 0;
	return bpf_skb_store_bytes(skb, outer_len, room->tags.head, 2 * ETH_ALEN + 4 * BOUNDED(room->tags.count, MAX_TAGS), 0);
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

static __always_inline bool fits(struct __sk_buff *skb, struct remote *remote)
{
	return need(skb, remote) <= remote->mtu && skb->len + HEADER_BYTES + 4 * MAX_TAGS <= SKB_BYTES;
}

/* The inner frame's checksum, its tag included: 65,536 bytes at most, by parts that bpf_csum_diff takes. */
__noinline __u32 sum_frame(struct __sk_buff *skb)
{
	__u32 offset = 0, length, sum = 0;
	struct scratch *buffer = workspace();
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

/* What the outer header needs to know of the frame, while it is still whole. */
static __always_inline void study(struct __sk_buff *skb, struct remote *remote, struct copy *copy)
{
	copy->payload = need(skb, remote) - remote->ip_len;
	if (remote->flags & REMOTE_FLOW)
		copy->hash = flow_hash(skb);
	if (remote->flags & REMOTE_UDP_CHECKSUM)
		copy->inner_sum = sum_frame(skb);
}

static __always_inline int send_frame(struct __sk_buff *skb, struct remote *remote, struct copy *copy)
{
	if (!within_rate(copy->cfg, ETH_HLEN + need(skb, remote), 1))
		return drop(skb, copy, REASON(rate));
	study(skb, remote, copy);
	copy->id = take_ids(remote, copy->remote, 1);
	if (untag(skb, workspace()) || push_outer(skb, remote, copy))
		return drop(skb, copy, REASON(resize));
	return sent(skb, remote, copy);
}

/*
 * A super-packet that the stack or the NIC cuts behind us. With FIXED_GSO the segments are those of the wire. Without,
 * each gives up as many bytes as the headers add, so that it fits. Answers -1, with the packet as it was, where that
 * cannot be done: then the relay makes wire frames of it.
 */
static __noinline int send_super(struct __sk_buff *skb, struct remote *remote, struct copy *copy)
{
	__u32 size = skb->gso_size, tag = tag_bytes(skb), room = remote->outer_len + tag;
	__u64 flags = remote->room_flags | BPF_F_ADJ_ROOM_ENCAP_L2((__u64)ETH_HLEN + tag);
	__u32 packets = copy->frames, snaplen = copy->cfg->snaplen;
	__u64 cost;
	struct scratch *parts = workspace();
	__be16 ethertype;

	if (!parts || remote->flags & REMOTE_PER_FRAME || !copy->headers || copy->headers + ETH_HLEN >= skb->len ||
	    (snaplen && wire_bytes(skb, copy->headers) > snaplen) || bpf_skb_load_bytes(skb, 2 * ETH_ALEN, &ethertype, 2))
		return -1;
	if (room - ETH_HLEN + copy->headers + size <= remote->mtu) {
		flags |= BPF_F_ADJ_ROOM_FIXED_GSO;
	} else if (copy->cfg->oversize == SEGMENT && size > room && copy->headers + size - ETH_HLEN <= remote->mtu) {
		packets = (skb->len - copy->headers + size - room - 1) / (size - room);
	} else {
		return -1;
	}
	cost = (__u64)packets * (room + copy->headers) + skb->len - copy->headers;
	study(skb, remote, copy);
	copy->id = take_ids(remote, copy->remote, packets);
	parts->tags.count = 0;
	fill_ip(&parts->outer, remote, copy, room - ETH_HLEN + skb->len);
	fill_tunnel(skb, parts, remote, copy);
	if (bpf_skb_load_bytes(skb, 0, parts->tags.head, 2 * ETH_ALEN) || bpf_skb_adjust_room(skb, room, BPF_ADJ_ROOM_MAC, flags))
		return -1;
	if (!within_rate(copy->cfg, cost, packets))
		return drop(skb, copy, REASON(rate)); /* not before: what the kernel refuses above leaves by another way */
	if (tag && (take_tags(skb) || parts->tags.count != 1))
		return drop(skb, copy, REASON(resize));
	if (store_outer(skb, &parts->outer, remote->outer_len) ||
	    bpf_skb_store_bytes(skb, remote->outer_len, parts->tags.head, 2 * ETH_ALEN + tag, 0) ||
	    bpf_skb_store_bytes(skb, remote->outer_len + 2 * ETH_ALEN + tag, &ethertype, 2, 0))
		return drop(skb, copy, REASON(resize));
	return sent(skb, remote, copy);
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
	copy = describe(skb, cfg, skb->cb[CB_SEGS], skb->cb[CB_HEADERS]);
	remote = bpf_map_lookup_elem(&remotes, &copy.remote);
	if (!remote)
		return drop(skb, &copy, REASON(remote));
	if (remote->flags & REMOTE_UNRESOLVED)
		return drop(skb, &copy, REASON(unresolved));
	if (remote->flags & REMOTE_FINISH && skb->len >= SHORTEST_UNFINISHED)
		return TC_ACT_OK; /* cross the relay, which finishes checksums and segments */
	if (skb->gso_size) {
		verdict = send_super(skb, remote, &copy);
		return verdict < 0 ? TC_ACT_OK : verdict;
	}
	if (!fits(skb, remote) || (cfg->snaplen && wire_bytes(skb, 0) > cfg->snaplen))
		return TC_ACT_OK;
	return send_frame(skb, remote, &copy);
}

/* An out interface without Ethernet: the copy has its headers, and receiving it has found its outer IP header. */
SEC("tc")
int snif_deliver(struct __sk_buff *skb)
{
	__u32 slot = skb->mark & MARK_REMOTE_MASK;
	struct remote *remote = bpf_map_lookup_elem(&remotes, &slot);

	if (!is_copy(skb->mark))
		return TC_ACT_SHOT;
	return remote ? bpf_redirect(remote->ifindex, 0) : count_drop(skb->mark, 1, REASON(remote));
}

/* ---- frames that do not fit ---- */

/* Bytes that bpf_skb_adjust_room takes out at once. */
#define ROOM_BYTES 0xfff

/*
 * Make the packet `length` bytes long, whatever is in it then. The kernel does not cut the tail of a packet that has
 * been encapsulated (skb->encapsulation; measured on 6.18), but it takes bytes out behind the Ethernet header.
 */
__noinline int shorten(struct __sk_buff *skb, __u32 length)
{
	if (!bpf_skb_change_tail(skb, length, 0))
		return 0;
	for (int i = 0; i < 65536 / ROOM_BYTES + 1 && skb->len > length; i++)
		if (bpf_skb_adjust_room(skb, -(__s32)MIN(skb->len - length, ROOM_BYTES), BPF_ADJ_ROOM_MAC, 0))
			return -1;
	return skb->len == length ? 0 : -1;
}

/* Keep the first `length` bytes. */
__noinline int cut(struct __sk_buff *skb, __u32 length)
{
	struct scratch *buffer = workspace();

	if (!bpf_skb_change_tail(skb, length, 0))
		return 0;
	if (!buffer || length == 0 || length > SKB_BYTES)
		return -1;
	if (bpf_skb_load_bytes(skb, 0, buffer->bytes, BOUNDED(length, SCRATCH_BYTES)) || shorten(skb, length))
		return -1;
	return bpf_skb_store_bytes(skb, 0, buffer->bytes, BOUNDED(length, SCRATCH_BYTES), 0);
}

/* The first fragment is the frame's head behind the whole outer header. */
static __always_inline int first_fragment(struct __sk_buff *skb, struct remote *remote, struct copy *copy, __u32 length)
{
	__u32 tunnel = remote->outer_len - ETH_HLEN - remote->ip_len;
	struct scratch *room = workspace();

	if (untag(skb, room) || cut(skb, length - tunnel - 4 * room->tags.count))
		return -1;
	return push_outer(skb, remote, copy);
}

/*
 * Leave `length` bytes from `offset` on, and `head` bytes of anything before them, without a copy of what stays: the
 * kernel takes bytes out behind the Ethernet header, of IP packets only. If not, the bytes up to there are as they were.
 */
static __always_inline bool strip(struct __sk_buff *skb, __u32 head, __u32 offset, __u32 length)
{
	if (offset <= head || offset - head > ROOM_BYTES)
		return false;
	if (skb->len != offset + length && bpf_skb_change_tail(skb, offset + length, 0))
		return false;
	return !bpf_skb_adjust_room(skb, -(__s32)(offset - head), BPF_ADJ_ROOM_MAC, 0);
}

/* A later one is bytes from the middle of the frame behind an IP header only. */
static __noinline int later_fragment(struct __sk_buff *skb, struct remote *remote, struct copy *copy, __u32 length)
{
	__u32 tunnel = remote->outer_len - ETH_HLEN - remote->ip_len, offset = (copy->fragment & 0x1fff) * 8;
	__u32 head = ETH_HLEN + ip_bytes(remote, copy);
	struct scratch *buffer = workspace();
	bool moved;

	if (!buffer || length == 0 || length > SKB_BYTES || untag(skb, buffer))
		return -1;
	offset -= tunnel + 4 * buffer->tags.count;
	moved = strip(skb, head, offset, length);
	if (!moved && (bpf_skb_load_bytes(skb, offset, buffer->bytes, BOUNDED(length, SCRATCH_BYTES)) || shorten(skb, head + length)))
		return -1;
	fill_ip(&buffer->outer, remote, copy, head - ETH_HLEN + length);
	if (remote->flags & REMOTE_IPV6 ? store_ipv6_fragment(skb, remote, &buffer->outer, copy) : store_outer(skb, &buffer->outer, head))
		return -1;
	return moved ? 0 : bpf_skb_store_bytes(skb, head, buffer->bytes, BOUNDED(length, SCRATCH_BYTES), 0);
}

static __always_inline int make_fragment(struct __sk_buff *skb, struct remote *remote, struct copy *copy, __u32 length)
{
	if (copy->fragment & 0x1fff)
		return later_fragment(skb, remote, copy, length);
	return first_fragment(skb, remote, copy, length);
}

SEC("tc")
int snif_fragment(struct __sk_buff *skb)
{
	struct config *cfg = session();
	struct copy copy = describe(skb, cfg, 1, 0);
	struct remote *remote = bpf_map_lookup_elem(&remotes, &copy.remote);
	__u32 length = skb->cb[CB_LENGTH] & ~CB_TRUNCATED;

	if (!is_copy(skb->mark) || !cfg || !remote)
		return TC_ACT_SHOT;
	if (!length)
		return TC_ACT_OK; /* no fragment to make: on its way to snif_deliver */
	copy.fragment = skb->cb[CB_OFFSET] / 8 | IP_MF;
	copy.truncated = !!(skb->cb[CB_LENGTH] & CB_TRUNCATED);
	copy.id = skb->cb[CB_ID];
	copy.payload = skb->cb[CB_PAYLOAD];
	copy.inner_sum = skb->cb[CB_SUM];
	if (remote->flags & REMOTE_FLOW)
		copy.hash = flow_hash(skb);
	/* A drop here makes snif_wire's clone fail, which counts the whole copy once. */
	if (make_fragment(skb, remote, &copy, length))
		return TC_ACT_SHOT;
	return remote->flags & REMOTE_L3 ? TC_ACT_OK : bpf_redirect(remote->ifindex, 0);
}

/* All fragments of `size` bytes but the last, each a clone that snif_fragment cuts. */
__noinline int clone_fragments(struct __sk_buff *skb, __u32 size, __u32 payload)
{
	struct config *cfg = session();
	__u32 offset = 0;

	if (!cfg)
		return -1;
	for (int i = 0; i < MAX_FRAGMENTS && offset + size < payload; i++) {
		skb->cb[CB_OFFSET] = offset;
		if (bpf_clone_redirect(skb, cfg->peer, 0))
			return -1;
		offset += size;
	}
	return 0;
}

/*
 * Cut the outer IP packet of this frame into equal fragments, multiples of 8 bytes. Equal, because the kernel cannot cut
 * a packet below its transport header: a tiny last fragment would be lost. All but the last are clones.
 */
static __always_inline int send_fragments(struct __sk_buff *skb, struct remote *remote, struct copy *copy)
{
	__u32 mtu = MIN(remote->mtu, SKB_BYTES - HEADER_BYTES), size, offset, length, room;

	study(skb, remote, copy);
	copy->id = take_ids(remote, copy->remote, 1);
	copy->fragment = IP_MF;
	room = (mtu - ip_bytes(remote, copy)) & ~7U;
	if (copy->payload > (remote->flags & REMOTE_IPV6 ? 0xffff : 0xffff - sizeof(struct iphdr)))
		return drop(skb, copy, REASON(too_long));
	if (room < 8 || room > SKB_BYTES)
		return drop(skb, copy, REASON(oversize));
	size = (copy->payload + room - 1) / room; /* fragments: two at least, as a frame too long to resize may fit one */
	size = size < 2 ? 2 : size;
	if (!within_rate(copy->cfg, copy->payload + size * (__u64)(ETH_HLEN + ip_bytes(remote, copy)), size))
		return drop(skb, copy, REASON(rate));
	size = ((copy->payload + size - 1) / size + 7) & ~7U;
	if (size == 0 || size >= copy->payload || (copy->payload - 1) / size > MAX_FRAGMENTS)
		return drop(skb, copy, REASON(fragment));
	offset = (copy->payload - 1) / size * size;
	length = copy->payload - offset;
	skb->cb[CB_LENGTH] = size | (copy->truncated ? CB_TRUNCATED : 0);
	skb->cb[CB_ID] = copy->id;
	skb->cb[CB_PAYLOAD] = copy->payload;
	skb->cb[CB_SUM] = copy->inner_sum;
	copy->fragment = offset / 8;
	if (clone_fragments(skb, size, copy->payload) || make_fragment(skb, remote, copy, length))
		return drop(skb, copy, REASON(fragment));
	return sent(skb, remote, copy);
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

SEC("tc")
int snif_wire(struct __sk_buff *skb)
{
	struct config *cfg = session();
	struct copy copy = describe(skb, cfg, 1, 0);
	struct remote *remote = bpf_map_lookup_elem(&remotes, &copy.remote);
	__u32 length;

	if (!cfg || !is_copy(skb->mark))
		return TC_ACT_SHOT;
	if (!remote)
		return drop(skb, &copy, REASON(remote));
	length = wanted(skb, remote, cfg);
	if (length < wire_bytes(skb, 0)) {
		length = MIN(length, SKB_BYTES - HEADER_BYTES - 4 * MAX_TAGS);
		if (cut(skb, length - tag_bytes(skb)))
			return drop(skb, &copy, REASON(resize));
		copy.truncated = 1;
		copy.bytes = length;
	}
	if (fits(skb, remote))
		return send_frame(skb, remote, &copy);
	if (remote->flags & REMOTE_DF || (cfg->oversize == DROP && need(skb, remote) > remote->mtu))
		return drop(skb, &copy, REASON(oversize));
	return send_fragments(skb, remote, &copy);
}

char _license[] SEC("license") = "Dual MIT/GPL";
