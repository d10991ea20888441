/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * The layout that the kernel programs and user space share. src/datapath/abi.rs mirrors it; a test compares the two through
 * the BTF of the compiled object. Every field is in host byte order unless it is said to be network order.
 */
#ifndef SNIFCTL_H
#define SNIFCTL_H

/*
 * The mark of a copy: 15 bits of magic, 11 bits of tap slot, 6 bits of remote slot. It tells our copies from watched
 * traffic at every hook, and it survives the relay.
 */
enum mark_layout {
	MARK_MAGIC = 0x5e1f,
	MARK_MAGIC_SHIFT = 17,
	MARK_TAP_SHIFT = 6,
	MARK_TAP_MASK = 0x7ff,
	MARK_REMOTE_MASK = 0x3f,
};

enum limits {
	MAX_TAPS = 2048, /* tap slots: an interface watched both ways takes two */
	NEAR_TAPS = 64, /* tap slots whose numbers stand in an array */
	MAX_REMOTES = 64,
	MAX_FRAGMENTS = 128, /* outer IP fragments of one copy */
	MAX_TAGS = 8, /* VLAN tags that are moved from metadata into a copy */
	HEADER_BYTES = 96, /* room for a template */
	HEADER_L3 = 16, /* where the outer IP header starts in a template; the Ethernet header ends there */
	TELL_AT = 20, /* where struct tell is, from the UDP header on: behind Geneve's header and the option's */
	DEVICES = 256,
	CHUNK_BYTES = 16384, /* of a frame that are kept in one element of the rest map */
	CHUNKS = 4,
	PIECE_BYTES = 2048, /* of the next element that an element holds too: what is stored at once */
	SKB_BYTES = 16000, /* longest frame that the kernel's resize helpers take (SKB_MAX_ALLOC, rounded down) */
	SPREAD_BYTES = 64, /* buckets in one element of the spread map */
	SPREAD_CHUNKS = 64,
	REQUEST_BYTES = 256,
	SIZES = 32, /* powers of two by which copies, and the taps' own time, are counted */
	REQUEST_CHUNKS = 2048, /* two requests: the one in force, and one being written */
};

enum direction {
	INGRESS = 0,
	EGRESS = 1,
};

/* What becomes of a copy that with its tunnel header exceeds the out interface's MTU. */
enum oversize {
	SEGMENT = 0,
	FRAGMENT = 1,
	TRUNCATE = 2,
	DROP = 3,
};

/* Why copies were not sent: one counter a reason, in wire frames. */
struct drops {
	__u64 clone; /* the kernel could not clone the packet, or the relay is gone */
	__u64 remote; /* the copy names a remote that the session no longer has */
	__u64 unresolved; /* the remote has no route, or its next hop no known link-layer address */
	__u64 oversize; /* larger than the MTU, and --oversize drop or --df forbids the rest */
	__u64 too_long; /* no outer IP packet can hold it: more than 65,535 bytes with its header */
	__u64 resize; /* the kernel refused to grow, cut or untag the copy */
	__u64 fragment; /* a fragment of the copy could not be made */
	__u64 rate; /* more than --max-rate lets through */
	__u64 relay; /* lost between the relay's two programs: a rule of the bridge family, or a part that is down */
	__u64 depth; /* already inside two tunnel headers of this session's: a copy of a copy */
	__u64 gone; /* the out interface no longer exists */
	__u64 out; /* the out interface or its queue refused it; known of fragmented copies only */
	__u64 down; /* the remote does not answer: no clone was made */
};

/* The article's counters: packets, bytes, drops. Packets and bytes are those of wire frames. */
struct stat {
	__u64 pcnt;
	__u64 bcnt;
	__u64 dcnt;
};

/* Copies that were asked for, of one size: element n of the map has those of more than 2^(n-1) and up to 2^n bytes. */
struct size {
	__u64 frames;
	__u64 bytes;
};

/* What copies were like. */
struct forms {
	__u64 supers; /* super-packets that were to be copied, one for each remote */
	__u64 segments; /* wire frames in them */
	__u64 vlan; /* copies with a VLAN tag, in wire frames */
	__u64 truncated; /* copies that were cut, and sent */
	__u64 fragmented; /* copies that were sent in outer fragments */
	__u64 fragments; /* the outer packets that these took */
};

/* With --profile: calls of taps, element n of the map those of more than 2^(n-1) and up to 2^n nanoseconds. */
struct time {
	__u64 calls;
	__u64 ns;
};

/* What a tap has met, in wire frames: seen = filtered + skipped + those that are copied; seen + own = all. */
struct choice {
	__u64 seen; /* all but the session's own packets */
	__u64 filtered; /* the filter did not take them */
	__u64 skipped; /* sampling left them out */
	__u64 own; /* copies, and other packets of the session's tunnels */
};

/* Which remotes get a copy. */
enum spread {
	REPLICATE = 0, /* every one */
	FLOW = 1, /* the one that the flow's bucket names */
};

struct config {
	__u64 remotes; /* bit n: slot n is in use */
	__u64 clock; /* nanoseconds to add to the time since boot for the time since 1970 */
	__u64 rate; /* bytes, or packets, that may leave in a second; 0 for any */
	__u32 relay; /* ifindex of the bridge, whose egress hook encapsulates */
	__u32 port; /* ifindex of its port, whose egress hook sees real wire frames */
	__u32 peer; /* ifindex of the port's veth peer, whose egress hook leads to out interfaces without Ethernet */
	__u32 sample; /* one of so many packets is copied; 0 or 1: all */
	__u32 sample_flows; /* the same of flows */
	__u32 snaplen; /* bytes of a frame that are copied; 0: all */
	__u8 oversize; /* enum oversize */
	__u8 protocol; /* IP protocol of the tunnel */
	__u16 udp_port; /* UDP destination port of the tunnel, 0 for a tunnel without UDP */
	__u8 spread; /* enum spread */
	__u8 underlay; /* not 0: the underlay map has entries */
	__u16 request; /* key of the first chunk of the request in force */
	__u8 rate_packets; /* not 0: `rate` is of packets */
	__u8 keyed; /* not 0: GRE with a key */
	__u16 gre; /* GRE protocol type of the tunnel, 0 for a tunnel over UDP */
	__u32 key[2]; /* GRE keys, by direction */
	__u32 profile; /* not 0: taps count their own time */
	__u64 down; /* bit n: slot n is in use and gets no copies: it is down or unresolved */
};

/* A part of the flow table: the remote slot of each bucket. A flow's bucket is its hash modulo the table's size. */
struct spread_chunk {
	__u8 slot[SPREAD_BYTES];
};

/* What was asked for, as JSON in chunks: user space's own memory of the session. The last one is padded with zeros. */
struct request {
	char json[REQUEST_BYTES];
};

/*
 * Keys of the devices map, which names devices by a reference that dies with the device: an ifindex may be given to
 * another one. A remote has two keys, used in turn, so that one write of the remote moves it to another interface.
 */
enum device_key {
	DEVICE_RELAY = 0,
	DEVICE_PEER = 1,
	DEVICE_REMOTE = 2, /* of remote slot n: this plus 2n, or one more */
};

/* Taps of other network namespaces, where ifindexes are other ones, are told by the classid of their filters. */
#define TAP_ELSEWHERE 0x80000000U

struct tap_key {
	__u32 ifindex; /* or TAP_ELSEWHERE and a number */
	enum direction direction;
};

struct tap {
	__u32 slot; /* index of the tap in a copy's mark */
	__u32 relay; /* ifindex of what takes copies home from another network namespace, 0: in our own */
	struct stat stat;
	struct choice choice;
};

enum remote_flag {
	REMOTE_UNRESOLVED = 1, /* no route or no link-layer address: drop, do not send */
	REMOTE_FINISH = 2, /* checksums and segments must be finished before the header goes on: cross the relay */
	REMOTE_DF = 4, /* the outer header says don't fragment */
	REMOTE_PER_FRAME = 8, /* the header differs with every wire frame: super-packets cross the relay */
	REMOTE_IPV6 = 16,
	REMOTE_L3 = 32, /* the out interface takes IP packets without a link header */
	REMOTE_FLOW = 64, /* the header carries the flow hash: UDP source port, IPv6 flow label */
	REMOTE_UDP_CHECKSUM = 128,
	REMOTE_QUEUED = 256, /* the out interface has a queue, which may refuse packets */
	REMOTE_TELL = 512, /* the header has a Geneve option that tells of the copy: struct tell */
};

/*
 * A remote: the finished bytes of its outer headers and where they have to be patched. Positions are offsets in a
 * template, 0 for "not there".
 */
struct remote {
	__u64 room_flags; /* BPF_F_ADJ_ROOM_ENCAP_* of the tunnel */
	__u32 ifindex; /* out interface, for user space: programs go by `device` */
	__u32 mtu; /* bytes of the largest outer IP packet */
	__u32 sum; /* unfolded checksum of the outer IPv4 header, its length, id, offset and checksum zero */
	__u32 udp_sum[2]; /* the same of the UDP checksum's constant words, pseudo header included, by direction */
	__u16 flags; /* enum remote_flag */
	__u8 outer_len; /* bytes before the inner frame: Ethernet, IP and tunnel header */
	__u8 ip_len; /* bytes of the outer IP header */
	__u8 udp_at; /* UDP header */
	__u8 sequence_at; /* u32: rises with every copy */
	__u8 vlan_at; /* ERSPAN's first word: inner VLAN, class of service, encapsulation, truncation */
	__u8 port_at; /* u16: the tap's slot */
	__u8 time_at; /* u32: nanoseconds */
	__u8 seconds_at; /* u32 */
	__u8 tagged; /* ERSPAN's encapsulation field for a frame that has its tag inside */
	__u8 device; /* key of the out interface in the devices map */
	/* By direction, network order; the IP header at HEADER_L3, Ethernet right before. */
	__u8 header[2][HEADER_BYTES];
};

/* What changes with every copy to a remote. */
struct remote_state {
	__u32 ip_id; /* next outer IP id */
	__u32 sequence; /* next sequence number */
	struct bpf_spin_lock lock; /* of a kernel without atomic fetch (before 5.12) */
	__u32 unused;
};

/* Of one tap, by remote slot: what the next copy is numbered, where copies are numbered by taps. */
struct sequences {
	__u32 next[MAX_REMOTES];
};

enum tell_flag {
	TELL_CUT = 1, /* the copy has only the first bytes of the frame */
};

/* The data of the Geneve option that tells of a copy, all in network order. */
struct tell {
	__be16 tap; /* slot; odd for egress */
	__be16 flags; /* enum tell_flag */
	__be32 time[2]; /* nanoseconds since 1970, the upper half first */
	__be32 sequence; /* of the tap's copies to this remote */
	__be32 length; /* bytes of the frame on the wire */
};

/* Where the tunnel that an out interface itself is ends: packets to and from there are never copied. */
struct underlay_key {
	__u8 address[16]; /* IPv4 as ::ffff:a.b.c.d */
	__u16 port; /* UDP port, 0 for the address alone */
	__u16 unused;
};

enum underlay {
	UNDERLAY_ANY = 1, /* every packet of this key */
	UNDERLAY_FRAGMENTS = 2, /* fragments only: the port that tells is in another fragment */
};

/* What an out interface and its queue have dropped of all their traffic: user space's own memory. */
struct out {
	__u64 device; /* what the device said when it was last asked */
	__u64 queue; /* the same of its qdiscs */
	__u64 dropped; /* since the session uses it; never falls */
};

/* Outer addresses of a tunnel of ours, to know its packets when the mark is lost. IPv4 is ::ffff:a.b.c.d. */
struct tunnel_key {
	__u8 source[16];
	__u8 remote[16];
};

#endif
