//! Full matrices and long runs: `make soak`. `cargo test` runs a part of each.

mod lab;

use std::panic::{AssertUnwindSafe, catch_unwind};

use lab::collect_case;
use lab::kills::{self, kill_at};
use lab::order_case::{Case, Out, PLAIN, Rate, TUNNELS};
use lab::pairs::all_pairs;

// ---- order ----

const MTUS: [usize; 3] = [1500, 1600, 9000];
const OVERSIZE: [&str; 4] = ["segment", "fragment", "truncate", "drop"];
const RATES: [Rate; 3] = [Rate::None, Rate::Loose, Rate::Tight];

/// Values of: tunnel, out interface, oversize mode, rate, MTUs of the watched and the out interface, snaplen, remotes,
/// super-packets of host, peer and out interface, filter swaps.
const FACTORS: [usize; 12] = [6, 5, 4, 3, 3, 3, 2, 2, 2, 2, 2, 2];

fn case(row: [usize; 12]) -> Case {
    let [tunnel, out, oversize, rate, watched, beyond, snaplen, remotes, host, peer, far, swaps] = row;
    Case {
        tunnel: TUNNELS[tunnel],
        out: Out::ALL[out],
        oversize: OVERSIZE[oversize],
        rate: RATES[rate],
        watched_mtu: MTUS[watched],
        out_mtu: MTUS[beyond],
        snaplen: [None, Some(100)][snaplen],
        remotes: [1, 3][remotes],
        host_gso: host == 1,
        peer_gso: peer == 1,
        out_gso: far == 1,
        swaps: swaps == 1,
        elsewhere: false,
    }
}

/// Where copies leave through the watched interface, its MTU and offloads are the out interface's.
fn effective(row: &mut [usize; 12]) {
    if Out::ALL[row[1]] == Out::Watched {
        row[5] = row[4];
        row[10] = row[8];
    }
}

/// Each pair of values of any two factors, with one tunnel; all failures are told.
fn copies_leave_in_order(tunnel: usize) {
    let rows = all_pairs(FACTORS, effective).into_iter().filter(|row| row[0] == tunnel);
    let cases: Vec<Case> = rows.map(case).collect();
    assert!(cases.len() >= 5, "each out interface at least: {cases:?}");
    let failed: Vec<&Case> =
        cases.iter().filter(|case| catch_unwind(AssertUnwindSafe(|| case.run())).is_err()).collect();
    assert!(failed.is_empty(), "{} of {} failed: {failed:#?}", failed.len(), cases.len());
}

macro_rules! for_each_tunnel {
    ($name:ident: $($test:ident $at:literal),*) => {
        mod $name {
            $(#[test] fn $test() { super::$name($at); })*
        }
    };
}

for_each_tunnel!(copies_leave_in_order: gre 0, vxlan 1, geneve 2, erspan1 3, erspan2 4, erspan3 5);

/// By every out interface, again and again, as two CPUs fall another way each time.
#[test]
fn downloads_read_as_on_the_wire_every_time() {
    for out in Out::ALL {
        for oversize in ["segment", "fragment"] {
            let case = Case { out, oversize, out_mtu: if out == Out::Vxlan { 1600 } else { 1500 }, ..PLAIN };
            let lab = case.lab();
            case.up(&lab);
            for _ in 0..5 {
                case.download(&lab, &(0..40).map(|n| 4096 + n * 420).collect::<Vec<_>>());
            }
        }
    }
}

// ---- collect ----

/// Each tunnel, of 64 sources at once, half of them of each family.
fn collect_writes_what_64_sources_send_in(oversize: &'static str, time: &str) {
    let tunnels = collect_case::TUNNELS.iter().cycle();
    let cases = (0..32).zip(tunnels).map(|(n, tunnel)| collect_case::Case { tunnel, oversize, n });
    collect_case::run(&cases.collect::<Vec<_>>(), time);
}

/// In the modes by which a stream of super-packets stays whole.
fn collect_writes_each_byte_of_a_stream(tunnel: usize) {
    for oversize in ["segment", "fragment"] {
        collect_case::stream(&collect_case::TUNNELS[tunnel], oversize);
    }
}

mod collect {
    macro_rules! in_mode {
        ($($mode:ident $time:literal),*) => {
            $(#[test] fn $mode() { super::collect_writes_what_64_sources_send_in(stringify!($mode), $time); })*
        };
    }

    in_mode!(segment "capture", fragment "arrival", truncate "capture", drop "arrival");
}

for_each_tunnel!(collect_writes_each_byte_of_a_stream: gre 0, erspan1 1, erspan2 2, erspan3 3, vxlan 4, geneve 5,
    geneve_that_tells 6);

// ---- kills ----

macro_rules! killed {
    ($($test:ident $verb:ident),*) => {
        mod killed_before_and_after_each_act {
            $(#[test] fn $test() { super::kill_at(super::kills::$verb, 1.., |_| vec!["before", "after"]); })*
        }
    };
}

killed!(
    up UP, up_filtered UP_FILTERED, replace REPLACE, tap_add TAP_ADD, tap_remove TAP_REMOVE, remote_add REMOTE_ADD,
    remote_remove REMOTE_REMOVE, filter_set FILTER_SET, filter_clear FILTER_CLEAR, sync_relay SYNC_RELAY, sync_tap SYNC_TAP,
    down DOWN
);

// ---- chaos ----

/// More with SNIFCTL_CHAOS_SEEDS=11,12,13.
#[test]
fn ten_minutes_of_chaos_leave_mirrors_in_order() {
    for seed in lab::chaos::seeds(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) {
        lab::chaos::run(seed, std::time::Duration::from_secs(60));
    }
}
