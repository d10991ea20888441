//! The filter of a running session: setting, clearing and showing it loses, doubles and breaks nothing.

use std::process::{Child, Command};
use std::time::Instant;

use crate::lab;
use crate::lab::capture::{Capture, Direction};
use crate::lab::check::assert_same_frames;
use crate::lab::decode::{decap_gre, inner_frames};
use crate::lab::faults::{hide, in_mounts, real};
use crate::lab::filters::{
    FLOWS, HELP, Snapshot, assert_counted, filter_of, numbered, own_cache, said, snapshot, to_ports, up_filtering,
    whole_corpus,
};
use crate::lab::frames::Ends;
use crate::lab::judge::{Said, UP};
use crate::lab::status::TapCounts;
use crate::lab::traffic::Stream;
use crate::lab::{Lab, Ns};
use serde_json::{Value, json};

// ---- setting and clearing ----

/// Panics unless only the taps' programs and the filter differ.
#[track_caller]
fn assert_swapped(before: &Snapshot, after: &Snapshot, filter: &Value) {
    assert!(after.taps.len() == 2 && before.taps.iter().all(|id| !after.taps.contains(id)), "{before:?}\n{after:?}");
    assert_eq!((&after.others, &after.maps), (&before.others, &before.maps));
    let mut expected = before.status.clone();
    let session = &mut expected["sessions"][0];
    session["filter"] = filter.clone();
    let request = session["request"].as_object_mut().expect("a request");
    request.remove("filter");
    let mut command = UP.join(" ");
    if let Some(text) = filter.as_str() {
        request.insert("filter".into(), filter.clone());
        command += &format!(" --filter '{text}'");
    }
    session["command"] = format!("snifctl {command}").into();
    assert_eq!(after.status, expected);
}

#[test]
fn setting_and_clearing_replace_the_taps_and_keep_maps_and_counters() {
    let lab = Lab::roomy();
    let before = lab.machine();
    said(&lab, &UP).quietly_ok();
    lab.assert_copied(1);
    let plain = snapshot(&lab);
    assert_eq!(plain.status["sessions"][0]["taps"][0]["stat"]["pcnt"], 7);
    said(&lab, &["filter", "set", "--", "udp port 4001"]).quietly_ok();
    let set = snapshot(&lab);
    assert_swapped(&plain, &set, &json!("udp port 4001"));
    lab.assert_copied(1);
    said(&lab, &["filter", "set", "--", "tcp"]).quietly_ok();
    lab.assert_copied(0);
    assert_counted(&lab, 21, 14);
    let filtering = snapshot(&lab);
    said(&lab, &["filter", "clear"]).quietly_ok();
    assert_swapped(&filtering, &snapshot(&lab), &Value::Null);
    lab.assert_copied(1);
    lab.assert_unloaded(&[plain.taps, set.taps, filtering.taps].concat());
    said(&lab, &["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn the_same_filter_again_and_no_filter_cleared_are_nothing_to_do() {
    let lab = Lab::roomy();
    up_filtering(&lab, "udp port 4001");
    let up = snapshot(&lab);
    said(&lab, &["filter", "set", "--", "udp port 4001"]).ok_noting("already has this filter; nothing to do");
    assert_eq!(snapshot(&lab), up);
    said(&lab, &["filter", "clear"]).quietly_ok();
    let cleared = snapshot(&lab);
    said(&lab, &["filter", "clear"]).ok_noting("has no filter; nothing to do");
    assert_eq!(snapshot(&lab), cleared);
}

#[test]
fn a_filter_can_be_set_in_several_words() {
    let lab = Lab::roomy();
    said(&lab, &UP).quietly_ok();
    said(&lab, &["filter", "set", "udp", "port", "4001", "and", "not", "tcp"]).quietly_ok();
    assert_eq!(filter_of(&lab), "udp port 4001 and not tcp");
    lab.assert_copied(1);
}

#[test]
fn filters_of_two_sessions_are_their_own() {
    let lab = Lab::roomy();
    up_filtering(&lab, "udp");
    said(&lab, &[&UP[..], &["--name", "other", "--filter", "tcp"]].concat()).quietly_ok();
    lab.assert_copied(1);
    said(&lab, &["filter", "set", "--name", "other", "--", "udp port 4001"]).quietly_ok();
    lab.assert_copied(2);
    said(&lab, &["filter", "set", "--name", "default", "--", "icmp"]).quietly_ok();
    lab.assert_copied(1);
    let filters: Vec<_> = lab.status().sessions.into_iter().map(|session| session.filter).collect();
    assert_eq!(filters, [Some("icmp".into()), Some("udp port 4001".into())]);
    lab.assert_up(&["default", "other"]);
}

#[test]
fn several_filters_set_at_once_leave_one_of_them_in_force() {
    let lab = Lab::roomy();
    said(&lab, &UP).quietly_ok();
    let filters = ["tcp", "udp port 4001", "icmp"];
    let setting = filters.map(|filter| start(&lab, &["filter", "set", "--", filter]));
    for child in setting {
        let said = Said::of(child).ok();
        assert!(said.stderr.lines().all(|line| line.contains("waiting for another snifctl")), "{said:#?}");
    }
    lab.assert_up(&["default"]);
    let filter = filter_of(&lab);
    assert!(filters.iter().any(|known| filter == *known), "{filter}");
    lab.assert_copied(usize::from(filter == "udp port 4001"));
}

fn start(lab: &Lab, args: &[&str]) -> Child {
    lab.start_by(&own_cache(lab), args)
}

#[test]
fn up_with_the_filter_in_force_is_idempotent_and_with_another_refused() {
    let lab = Lab::roomy();
    let up = |filter: &[&str]| said(&lab, &[&UP[..], filter].concat());
    up(&["--filter", "udp"]).quietly_ok();
    let before = snapshot(&lab);
    up(&["--filter", "udp"]).ok_noting("already up with this request");
    for (other, names) in [
        (&["--filter", "tcp"][..], "(--filter udp → tcp)"),
        (&["--filter", "udp "], "(--filter udp → 'udp ')"),
        (&[], "(--filter udp → none)"),
    ] {
        up(other).refused(1, names, "snifctl down --name default");
    }
    assert_eq!(snapshot(&lab), before);
    said(&lab, &["filter", "set", "--", "tcp"]).quietly_ok();
    up(&["--filter", "tcp"]).ok_noting("already up with this request");
    up(&["--filter", "udp"]).refused(1, "(--filter tcp → udp)", "snifctl down --name default");
    said(&lab, &["filter", "clear"]).quietly_ok();
    up(&[]).ok_noting("already up with this request");
}

#[test]
fn an_empty_filter_is_refused_with_the_command_that_clears_one() {
    let lab = Lab::roomy();
    let before = lab.machine();
    for empty in ["", " ", "\t\n"] {
        said(&lab, &[&UP[..], &["--filter", empty]].concat()).refused(2, "--filter", "");
    }
    lab.assert_as_before(&before);
    up_filtering(&lab, "udp");
    let before = snapshot(&lab);
    for empty in ["", " ", "\t\n"] {
        said(&lab, &["filter", "set", empty]).refused(2, "EXPR", "snifctl filter clear");
    }
    assert_eq!(snapshot(&lab), before);
}

// ---- a swap under load ----

fn number(frame: &[u8]) -> u32 {
    assert_eq!(&frame[42..46], b"snif");
    u32::from_be_bytes(frame[46..50].try_into().expect("four bytes"))
}

/// What is copied of the packets up to `last` when the filter goes from A to B to none: all of A up to a packet, all of B
/// from there up to another, and everything from there.
#[track_caller]
fn assert_two_swaps(copied: &[u32], last: u32) {
    let first_even = *copied.iter().find(|n| *n % 2 == 0).expect("a copy of B");
    // The swap was before this copy, or before the packet of A ahead of it, if that one has no copy.
    let to_b = if copied.contains(&(first_even - 1)) { first_even } else { first_even - 1 };
    let to_all = *copied.iter().find(|n| *n % 2 == 1 && **n > to_b).expect("a copy of A after the filter was cleared");
    let copies = |n: &u32| *n >= to_all || (n % 2 == 1) == (*n < to_b);
    let expected: Vec<u32> = (1..=last).filter(copies).collect();
    assert!(1 < to_b && to_b < to_all && to_all < last, "swapped before {to_b} and {to_all} of {last}");
    assert!(copied == expected, "swapped before {to_b} and {to_all}: {} copies, not {}", copied.len(), expected.len());
}

/// Seen, filtered, skipped and copied by each tap, all of them at their hooks.
fn counters(lab: &Lab) -> Vec<[u64; 4]> {
    let session = lab.session();
    assert!(session.taps.iter().all(|tap| tap.attached), "{session:#}");
    let of = |TapCounts { stat, seen, filtered, skipped, .. }: TapCounts| [seen, filtered, skipped, stat.pcnt];
    session.taps.iter().map(|tap| of(tap.counts)).collect()
}

#[track_caller]
fn assert_not_back(before: &[[u64; 4]], after: &[[u64; 4]]) {
    let back = |(before, after): (&[u64; 4], &[u64; 4])| before.iter().zip(after).any(|(before, after)| after < before);
    assert!(!before.iter().zip(after).any(back), "{before:?} became {after:?}");
}

/// Changes the filter while others look at the counters again and again; then there is some traffic more.
fn swap_watched(lab: &Lab, capture: &mut Capture, args: &[&str], last: &mut Vec<[u64; 4]>) {
    let mut swap = start(lab, args);
    while swap.try_wait().expect("wait for snifctl").is_none() {
        let now = counters(lab);
        assert_not_back(last, &now);
        *last = now;
    }
    Said::of(swap).quietly_ok();
    let so_far = capture.count();
    capture.wait_for(so_far + 100);
}

#[test]
fn a_swap_under_load_loses_and_doubles_nothing_of_either_side() {
    let lab = Lab::roomy();
    // Compiled now, so that the swaps come while packets flow.
    said(&lab, &UP).quietly_ok();
    FLOWS.iter().rev().for_each(|flow| drop(said(&lab, &["filter", "set", "--", flow]).quietly_ok()));
    let mut capture = lab.capture_wire(Ns::Collector, "col0", Direction::In);
    let before = [lab.packets(Ns::Peer, "peer0").1, lab.packets(Ns::Host, "eth0").1];
    let flows =
        [("peer0", Ns::Peer, Ends::PEER_TO_HOST), ("eth0", Ns::Host, Ends::HOST_TO_PEER)].map(|(dev, ns, ends)| {
            Stream::in_order(&lab, (ns, dev), &(1..=20_000).map(|n| numbered(&ends, n)).collect::<Vec<_>>())
        });
    capture.wait_for(100);
    let mut last = counters(&lab);
    swap_watched(&lab, &mut capture, &["filter", "set", "--", FLOWS[1]], &mut last);
    swap_watched(&lab, &mut capture, &["filter", "clear"], &mut last);
    drop(flows);
    capture.settle();
    let copies = inner_frames(&decap_gre(&capture.stop()));
    let after = counters(&lab);
    assert_not_back(&last, &after);
    assert!(after.iter().all(|[seen, filtered, skipped, pcnt]| *seen == filtered + skipped + pcnt), "{after:?}");
    let sent = [lab.packets(Ns::Peer, "peer0").1 - before[0], lab.packets(Ns::Host, "eth0").1 - before[1]];
    assert_eq!([after[0][0], after[1][0]], sent, "seen and sent");
    for (mac, sent) in [lab::PEER_MAC, lab::HOST_MAC].into_iter().zip(sent) {
        let of_one: Vec<u32> = copies.iter().filter(|frame| frame[6..12] == mac).map(|frame| number(frame)).collect();
        assert_two_swaps(&of_one, sent as u32);
    }
}

// ---- long filters ----

/// How many instructions tcpdump makes of an expression.
fn instructions(expression: &str) -> usize {
    let tcpdump = Command::new("tcpdump").args(["-y", "EN10MB", "-ddd", "--", expression]).output();
    let text = String::from_utf8(tcpdump.expect("run tcpdump").stdout).expect("text");
    text.lines().next().and_then(|count| count.parse().ok()).expect("a count")
}

#[test]
fn a_filter_of_300_instructions_verifies_and_works() {
    let terms: Vec<String> = (0..100).map(|n| format!("udp port {}", 2000 + 2 * n)).collect();
    let expression = terms.join(" or ");
    assert!(instructions(&expression) >= 300, "{} instructions", instructions(&expression));
    let lab = Lab::roomy();
    up_filtering(&lab, &expression);
    let mut capture = lab.capture(Ns::Collector, "col0", Direction::In);
    let sent = to_ports(210);
    lab.send(Ns::Peer, "peer0", &sent);
    let expected: Vec<Vec<u8>> = sent.iter().take(200).step_by(2).cloned().collect();
    assert_same_frames(&expected, &inner_frames(&decap_gre(&capture.take(100))));
}

/// As many terms of this form as make at least 300 instructions, each with its number for N.
fn three_hundred(term: &str) -> String {
    let terms = |count: usize| (0..count).map(|n| term.replace('N', &n.to_string())).collect::<Vec<_>>().join(" or ");
    let long = (1..).map(|n| terms(10 * n)).find(|expression| instructions(expression) >= 300);
    long.expect("an expression is long enough")
}

#[test]
fn filters_of_300_instructions_of_any_kind_verify() {
    let lab = Lab::roomy();
    said(&lab, &UP).quietly_ok();
    for term in ["host 10.0.0.N", "tcp[N:4] = N", "ip[ip[N]:4] = N", "tcp[((tcp[12] & 0xf0) >> 2) + N:4] = N"] {
        said(&lab, &["filter", "set", "--", &three_hundred(term)]).quietly_ok();
    }
}

/// Hosts that take tcpdump half an hour: its time grows with more than the square of the terms.
fn hundred_kilobytes() -> String {
    let mut expression = String::from("host 10.0.0.1");
    for n in 0u32.. {
        let term = format!(" or host {}", std::net::Ipv4Addr::from_bits(0x0a00_0100 + 7 * n));
        if expression.len() + term.len() > 100_000 {
            break;
        }
        expression += &term;
    }
    expression
}

#[test]
fn a_filter_that_takes_tcpdump_too_long_is_refused_and_disturbs_nobody() {
    let lab = Lab::roomy();
    up_filtering(&lab, "udp");
    let (slow, started) = (hundred_kilobytes(), Instant::now());
    assert!(slow.len() > 99_000, "{} bytes", slow.len());
    let patient = [&["nice".to_string()], &own_cache(&lab)[..]].concat();
    let setting = lab.start_by(&patient, &["filter", "set", "--", &slow]);
    // Meanwhile the session can be used, and changed.
    lab.assert_copied(1);
    said(&lab, &["filter", "set", "--", "udp port 4001"]).quietly_ok();
    let before = snapshot(&lab);
    let refused = Said::of(setting);
    let took = started.elapsed();
    assert!((20..=25).contains(&took.as_secs()), "it took {took:?}");
    assert!(refused.stderr.len() < 250, "shown short: {refused:#?}");
    refused.refused(1, "EXPR \"host 10.0.0.1 or ", "tcpdump took longer than 20 s");
    assert_eq!(snapshot(&lab), before);
    let left = lab.shown(&["ps", "-eo", "args"]);
    assert!(!left.contains("-ddd -- host 10.0.0.1 or"), "tcpdump still runs");
}

#[test]
fn a_long_filter_that_is_cheap_works() {
    let lab = Lab::roomy();
    let spacious = format!("udp{}and port 4001", " ".repeat(100_000));
    up_filtering(&lab, &spacious);
    lab.assert_copied(1);
    assert_eq!(said(&lab, &["filter", "show"]).quietly_ok().stdout, format!("{spacious}\n"));
    said(&lab, &[&UP[..], &["--filter", &spacious]].concat()).ok_noting("already up with this request");
    let nested = format!("{}tcp{}", "(".repeat(500), ")".repeat(500));
    said(&lab, &["filter", "set", "--", &nested]).quietly_ok();
    lab.assert_copied(0);
}

#[test]
fn a_filter_that_is_longer_than_a_session_can_remember_is_refused() {
    let lab = Lab::roomy();
    said(&lab, &UP).quietly_ok();
    let before = snapshot(&lab);
    let long = format!("udp{}", " ".repeat(125_000));
    for (args, what) in
        [(&["filter", "set", "--", &long][..], "EXPR"), (&[&UP[..], &["--filter", &long]].concat(), "--filter")]
    {
        said(&lab, args).refused(2, &format!("{what} takes 125003 bytes"), "'net 10.0.0.0/8'");
    }
    assert_eq!(snapshot(&lab), before);
}

// ---- what goes wrong changes nothing ----

/// Panics unless the session can be given another filter no more than this refusal allows: everything stays as it was.
#[track_caller]
fn assert_refused(lab: &Lab, by: &[String], expression: &str, code: i32, names: &str, ends: &str) {
    let before = snapshot(lab);
    lab.said_by(by, &["filter", "set", "--", expression]).refused(code, names, ends);
    assert_eq!(snapshot(lab), before);
    assert!(!lab.pins().join("_new_default").exists(), "half a session is left");
}

#[test]
fn a_filter_that_does_not_compile_changes_nothing() {
    let lab = Lab::roomy();
    up_filtering(&lab, "udp port 4001");
    let by = own_cache(&lab);
    for (expression, reason) in [
        ("tcp prot 80", "syntax error"),
        ("ip[0:3] = 1", "data size must be 1, 2, or 4"),
        ("0 = 1", "expression rejects all packets"),
        ("ip[0] / 0 = 1", "division by zero"),
        ("type mgt", "802.11"),
        ("host nosuch.invalid", "unknown host 'nosuch.invalid'"),
    ] {
        assert_refused(&lab, &by, expression, 2, reason, HELP);
    }
    for expression in ["ip6 protochain 6", "udp or ip protochain 17"] {
        let names = format!("EXPR {expression:?} cannot run in the kernel: it jumps backwards");
        assert_refused(&lab, &by, expression, 2, &names, "as in: ip6 proto 6");
    }
    lab.assert_copied(1);
}

#[test]
fn a_filter_on_what_only_a_socket_knows_is_refused() {
    let lab = Lab::roomy();
    up_filtering(&lab, "udp port 4001");
    let by = own_cache(&lab);
    for expression in ["inbound", "outbound", "not inbound", "ifindex 1", "udp and inbound"] {
        assert_refused(&lab, &by, expression, 2, &format!("EXPR {expression:?}"), "");
    }
}

/// A fake tool that fails with these words when `case` matches its arguments, and is the real one else.
fn failing(tool: &str, case: &str) -> String {
    let real = real(tool);
    format!("#!/bin/sh\ncase \"$*\" in {case}) echo 'said {tool}' >&2; exit 1;; esac\nexec {} \"$@\"\n", real.display())
}

#[test]
fn a_filter_that_clang_or_the_kernel_refuses_changes_nothing() {
    let lab = Lab::roomy();
    up_filtering(&lab, "udp port 4001");
    for (tool, case) in [("clang", "*-target*"), ("bpftool", "'prog loadall'*"), ("tcpdump", "*"), ("tc", "'-batch -'")]
    {
        let fakes = lab.fakes();
        fakes.add(tool, &failing(tool, case));
        let by = [&own_cache(&lab)[..], &fakes.first_in_path()].concat();
        // What tcpdump says is about the expression.
        let code = if tool == "tcpdump" { 2 } else { 1 };
        assert_refused(&lab, &by, "tcp port 1", code, &format!("said {tool}"), "");
    }
    lab.assert_copied(1);
}

#[test]
fn without_tcpdump_only_filters_are_refused() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let ends = "try: apt-get install tcpdump";
    let without = [&own_cache(&lab)[..], &in_mounts(&hide(&["tcpdump"]))].concat();
    lab.said_by(&without, &[&UP[..], &["--filter", "udp"]].concat()).refused(1, "--filter needs it", ends);
    lab.assert_as_before(&before);
    lab.said_by(&without, &UP).quietly_ok();
    lab.assert_copied(1);
    assert_refused(&lab, &without, "udp", 1, "EXPR needs it", ends);
    let file = whole_corpus(&lab).file;
    let test = ["filter", "test", "-r", &file.to_string_lossy(), "--", "udp"];
    lab.said_by(&without, &test).refused(1, "EXPR needs it", ends);
    let fails = lab.said_by(&without, &["doctor"]);
    assert!(fails.stdout.contains("tcpdump"), "{fails:#?}");
    lab.said_by(&without, &["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn a_filter_for_no_session_is_refused() {
    let lab = Lab::roomy();
    let (start_one, choose) = ("snifctl up IFACE --tunnel gre --remote ADDR", "--name default, --name other");
    for args in
        [&["filter", "set", "udp"][..], &["filter", "clear"], &["filter", "show"], &["filter", "show", "--code"]]
    {
        said(&lab, args).refused(1, "no session is up", start_one);
    }
    lab.assert_no_pins();
    said(&lab, &UP).quietly_ok();
    said(&lab, &[&UP[..], &["--name", "other"]].concat()).quietly_ok();
    for args in [&["filter", "set", "--name", "third", "udp"][..], &["filter", "clear", "--name", "third"]] {
        said(&lab, args).refused(1, "no session third is up", choose);
    }
}

// ---- filter show ----

#[test]
fn the_filter_is_shown_as_it_was_given() {
    let lab = Lab::roomy();
    let given = "udp\n\tor (ether proto \\ip6 and  not tcp port 80)  ";
    up_filtering(&lab, given);
    assert_eq!(said(&lab, &["filter", "show"]).quietly_ok().stdout, format!("{given}\n"));
    assert_eq!(filter_of(&lab), given);
    let status = said(&lab, &["status"]).quietly_ok();
    assert!(status.stdout.contains("filter"), "{status:#?}");
    let code = said(&lab, &["filter", "show", "--code"]).quietly_ok().stdout;
    assert!(code.contains("filter(struct __sk_buff *skb") && code.contains("load(skb, tagged, 12u, 2, &a)"), "{code}");
    said(&lab, &["filter", "clear"]).quietly_ok();
    for args in [&["filter", "show"][..], &["filter", "show", "--code"]] {
        assert_eq!(said(&lab, args).ok_noting("has no filter: every packet is copied").stdout, "");
    }
}
