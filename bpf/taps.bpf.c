/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* The taps alone, for another filter in a running session. */
#include "tap.h"

char _license[] SEC("license") = "Dual MIT/GPL";
