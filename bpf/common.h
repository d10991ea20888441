/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* What the programs share: the maps, the description of a copy, the count of drops, the flow. */
#ifndef COMMON_H
#define COMMON_H

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

/*
 * What a session's options need, known when it is compiled: what a session never does is left out. src/datapath/source.rs says 0.
 */
#ifndef HAS_UDP
#define HAS_UDP 1 /* a tunnel over UDP */
#endif
#ifndef HAS_SEQUENCE
#define HAS_SEQUENCE 1 /* numbered copies */
#endif
#ifndef HAS_ERSPAN
#define HAS_ERSPAN 1 /* a tunnel that tells of VLAN, port and time */
#endif
#ifndef HAS_TELL
#define HAS_TELL 1 /* Geneve with an option that tells of the copy */
#endif
#ifndef HAS_CUT
#define HAS_CUT 1 /* copies of a frame's first bytes only */
#endif
#ifndef HAS_RATE
#define HAS_RATE 1
#endif
#ifndef HAS_SAMPLE
#define HAS_SAMPLE 1
#endif
#ifndef HAS_SPREAD
#define HAS_SPREAD 1 /* each copy to one of the remotes */
#endif
#ifndef HAS_PROFILE
#define HAS_PROFILE 1
#endif

#define ETH_P_OLD_QINQ 0x9100

#define MIN(a, b) ((a) < (b) ? (a) : (b))
/*
 * A number from 1 to `limit`, a power of two, in a form that every verifier follows: comparisons are often made on a
 * copy of the register that is used later. (clang-format takes the parameters for casts.)
 */
/* clang-format off */
#define BOUNDED(number, limit)              \
	({                                  \
		__u32 below = (number) - 1; \
		OPAQUE(below);              \
		below &= (limit) - 1;       \
		OPAQUE(below);              \
		below + 1;                  \
	})
/* clang-format on */

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
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, SIZES);
	__type(key, __u32);
	__type(value, struct size);
} sizes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, SIZES);
	__type(key, __u32);
	__type(value, struct time);
} times SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct forms);
} forms SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_REMOTES);
	__type(key, __u32);
	__type(value, struct remote_state);
} remote_state SEC(".maps");

/* By tap slot, of the first ones: a copy's number is found here in less time than in a hash. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, NEAR_TAPS);
	__type(key, __u32);
	__type(value, struct sequences);
} sequences SEC(".maps");

/* The same of the other taps. An element comes with the tap's first copy that is numbered by its tap. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_TAPS);
	__type(key, __u32);
	__type(value, struct sequences);
} sequences_far SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_REMOTES);
	__type(key, struct tunnel_key);
	__type(value, __u32);
} tunnels SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_REMOTES);
	__type(key, struct underlay_key);
	__type(value, __u32);
} underlay SEC(".maps");

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

/* Kept by ifindex, and kept when the interface goes. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct out);
} outs SEC(".maps");

/* Devices that programs send to. The kernel takes a row out when its device goes, or leaves this namespace. */
struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP_HASH);
	__uint(max_entries, DEVICES);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} devices SEC(".maps");

/* The ifindex of a device, or 0 where it is gone. */
static __always_inline __u32 device(__u32 key)
{
	__u32 *ifindex = bpf_map_lookup_elem(&devices, &key);

	return ifindex ? *ifindex : 0;
}

/* A template made ready for one packet, with room for any length that the verifier takes for possible. */
struct outer {
	__u8 bytes[HEADER_L3 + 128] __attribute__((aligned(8))); /* or clang clears it byte by byte */
};

/* The VLAN tags of a copy, taken out of it. */
struct tags {
	__u32 count;
	__u8 head[2 * ETH_ALEN + 4 * MAX_TAGS + 2]; /* the inner MAC addresses, tags and ethertype */
};

/*
 * How one copy fares in the relay. All of it happens inside the tap's own call, on one CPU, so the tap sets this to zero,
 * clones, and reads what has become of the clone.
 */
struct crossing {
	__u32 entered; /* not 0: it has reached snif_encap */
	__u32 asked; /* wire frames that it stands for, if it was sent on into the bridge */
	__u32 met; /* of these, that have reached snif_wire */
	__u32 again; /* not 0: a frame goes through the bridge once more, to be finished */
	__u32 headed; /* not 0: these frames have their outer header already; wire frames that all of them stand for */
	__u64 bytes; /* of these, as on the wire */
};

/* A frame that leaves in outer fragments. */
struct train {
	__u32 payload; /* bytes behind the outer IP headers of all of them */
	__u32 size; /* of these, in each but the last */
	__u32 id; /* outer IP id */
	__u32 hash; /* of the flow */
	__u32 out; /* ifindex of the out interface */
	__s32 failed; /* what the first that failed was answered: above zero, by the out interface */
};

/* Where headers are put together: the stack has 512 bytes. */
struct scratch {
	struct crossing crossing;
	struct train train;
	struct outer outer;
	struct tags tags;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratch SEC(".maps");

/* Keeps a map that only user space uses, or only some sessions: a program holds it, also where its pin is gone. */
#define HOLD(map) asm volatile("" : : "r"(&(map)))

static __always_inline struct scratch *workspace(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratch, &zero);
}

/* What a frame's first fragment leaves for the others, in parts; a part's end is the beginning of the next. */
struct chunk {
	__u8 bytes[CHUNK_BYTES + PIECE_BYTES] __attribute__((aligned(8)));
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, CHUNKS + 1); /* and one for what has to be put aside for a moment */
	__type(key, __u32);
	__type(value, struct chunk);
} rest SEC(".maps");

static __always_inline struct chunk *chunk(__u32 number)
{
	return bpf_map_lookup_elem(&rest, &number);
}

/* What the tap tells the relay's egress hook through skb->cb, which does not survive the bridge. */
enum cb_slot {
	CB_SEGS = 0, /* wire frames in this packet */
	CB_HEADERS = 1, /* bytes of headers that every segment of a super-packet repeats, 0: not known */
};

struct copy {
	struct config *cfg;
	__u64 bytes; /* of its frames, as on the wire */
	__u32 tap; /* slot; odd for egress */
	__u32 remote; /* slot */
	__u32 out; /* ifindex of the out interface */
	__u32 frames; /* wire frames in it */
	__u32 headers; /* see CB_HEADERS */
	__u32 hash; /* of its flow, where the outer header carries it */
	__u32 payload; /* bytes behind the outer IP header, of all fragments together */
	__u32 inner_sum; /* checksum of the inner frame, where the outer header needs it */
	__u32 id; /* outer IP id */
	__u32 fragment; /* offset / 8 and IP_MF of a fragment */
	__u32 whole; /* bytes on the wire of a frame that was cut, 0: it was not */
	__u32 fragments; /* outer packets that it leaves in, 0 for one */
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

/* A form is the place of its counter in struct forms. */
#define FORM(name) (offsetof(struct forms, name) / sizeof(__u64))
#define FORMS (sizeof(struct forms) / sizeof(__u64))

__noinline int count_form(__u32 form, __u64 number)
{
	__u32 zero = 0;
	__u64 *count = bpf_map_lookup_elem(&forms, &zero);

	OPAQUE(form);
	if (count && form < FORMS)
		count[form] += number;
	return 0;
}

/* Bytes of the longest wire frame in this packet. */
static __always_inline __u32 wire_bytes(struct __sk_buff *skb, __u32 headers)
{
	return (headers ? headers + skb->gso_size : skb->len) + tag_bytes(skb);
}

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

#endif
