/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * The datapath. A frame's journey, all of it inside the tap's own call:
 *
 *   snif_tap_in / snif_tap_out   on a watched interface: clone the untouched packet to the relay
 *   snif_encap                   on the relay's egress: put the outer header on, redirect to the out interface;
 *                                what does not fit, or must become real wire frames first, goes on into the bridge
 *   snif_wire                    on the egress of the bridge's port: whole wire frames, checksums finished: encapsulate,
 *                                cut, fragment
 *   snif_deliver                 on the egress of the port's peer: on to an out interface without Ethernet
 */
#include "tap.h"
#include "relay.h"

char _license[] SEC("license") = "Dual MIT/GPL";
