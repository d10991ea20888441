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
#include "tap.h"
#include "relay.h"

char _license[] SEC("license") = "Dual MIT/GPL";
