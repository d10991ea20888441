//! Every operation of classic BPF: what the translated C answers in the kernel against an interpreter written apart.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use super::*;
use crate::tools::bpftool;

/// Classic BPF as its paper and libpcap's interpreter have it.
fn interpret(program: &[Instruction], packet: &[u8], length: u32) -> u32 {
    let fetch = |at: u64, size: u64| -> Option<u32> {
        let bytes = packet.get(usize::try_from(at).ok()?..usize::try_from(at + size).ok()?)?;
        Some(bytes.iter().fold(0, |value, byte| value << 8 | u32::from(*byte)))
    };
    let (mut a, mut x, mut memory, mut at) = (0u32, 0u32, [0u32; 16], 0usize);
    loop {
        let Instruction { code, jt, jf, k } = program[at];
        at += 1;
        let size = [4, 2, 1][usize::from(code >> 3 & 3) % 3];
        let source = if code & 8 != 0 { x } else { k };
        match code {
            0x00 => a = k,
            0x20 | 0x28 | 0x30 => match fetch(k.into(), size) {
                Some(value) => a = value,
                None => return 0,
            },
            0x40 | 0x48 | 0x50 => match fetch(u64::from(x) + u64::from(k), size) {
                Some(value) => a = value,
                None => return 0,
            },
            0x60 => a = memory[k as usize],
            0x80 => a = length,
            0x01 => x = k,
            0x61 => x = memory[k as usize],
            0x81 => x = length,
            0xb1 => match fetch(k.into(), 1) {
                Some(value) => x = (value & 15) << 2,
                None => return 0,
            },
            0x02 => memory[k as usize] = a,
            0x03 => memory[k as usize] = x,
            0x04 | 0x0c => a = a.wrapping_add(source),
            0x14 | 0x1c => a = a.wrapping_sub(source),
            0x24 | 0x2c => a = a.wrapping_mul(source),
            0x34 | 0x3c => match a.checked_div(source) {
                Some(value) => a = value,
                None => return 0,
            },
            0x94 | 0x9c => match a.checked_rem(source) {
                Some(value) => a = value,
                None => return 0,
            },
            0x44 | 0x4c => a |= source,
            0x54 | 0x5c => a &= source,
            0xa4 | 0xac => a ^= source,
            0x64 | 0x6c => a = a.checked_shl(source).unwrap_or(0),
            0x74 | 0x7c => a = a.checked_shr(source).unwrap_or(0),
            0x84 => a = 0u32.wrapping_sub(a),
            0x05 => at += k as usize,
            0x15 | 0x1d => at += usize::from(if a == source { jt } else { jf }),
            0x25 | 0x2d => at += usize::from(if a > source { jt } else { jf }),
            0x35 | 0x3d => at += usize::from(if a >= source { jt } else { jf }),
            0x45 | 0x4d => at += usize::from(if a & source != 0 { jt } else { jf }),
            0x06 => return k,
            0x16 => return a,
            0x07 => x = a,
            0x87 => a = x,
            other => panic!("no such instruction: {other:#x}"),
        }
    }
}

fn i(code: u16, k: u32) -> Instruction {
    Instruction { code, jt: 0, jf: 0, k }
}

const RETURN_A: Instruction = Instruction { code: 0x16, jt: 0, jf: 0, k: 0 };

/// Bytes that do not repeat.
fn packet(len: usize) -> Vec<u8> {
    (0..len as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// Programs for each operation, with operands at its edges.
fn programs() -> Vec<Vec<Instruction>> {
    let mut programs = vec![vec![i(0x06, 0)], vec![i(0x06, 262_144)], vec![RETURN_A]];
    // Loads: inside, across and beyond the end of packets of 14, 60 and 600 bytes.
    for code in [0x20, 0x28, 0x30] {
        for k in [0, 1, 10, 11, 12, 13, 14, 16, 56, 57, 58, 59, 60, 596, 599, 0x7ffe, 0x8000, 0x7fff_ffff, 0xffff_efff]
        {
            programs.push(vec![i(code, k), RETURN_A]);
            programs.push(vec![i(0x01, k), i(code + 0x20, 0), RETURN_A]);
        }
        programs.push(vec![i(0x01, 7), i(code + 0x20, 5), RETURN_A]);
        programs.push(vec![i(0x01, u32::MAX), i(code + 0x20, 2), RETURN_A]);
        programs.push(vec![i(0x01, 2), i(code + 0x20, u32::MAX), RETURN_A]);
    }
    for k in [0, 13, 14, 59, 60, 0x8000, u32::MAX] {
        programs.push(vec![i(0xb1, k), i(0x87, 0), RETURN_A]);
    }
    programs.push(vec![i(0x80, 0), RETURN_A]);
    programs.push(vec![i(0x81, 0), i(0x87, 0), RETURN_A]);
    programs.push(vec![i(0x00, 77), i(0x07, 0), i(0x00, 1), i(0x87, 0), RETURN_A]);
    for cell in [0, 1, 15] {
        programs.push(vec![i(0x00, 5), i(0x02, cell), i(0x00, 6), i(0x60, cell), RETURN_A]);
        programs.push(vec![i(0x01, 8), i(0x03, cell), i(0x01, 9), i(0x61, cell), i(0x87, 0), RETURN_A]);
        programs.push(vec![i(0x60, cell), RETURN_A]);
    }
    let edges = [0, 1, 2, 3, 31, 32, 33, 255, 0x8000_0000, u32::MAX];
    for operation in [0x00, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x90, 0xa0] {
        for (a, b) in edges.iter().flat_map(|a| edges.iter().map(move |b| (*a, *b))).step_by(3) {
            // From the packet where it holds the operand, so that clang cannot work it out.
            programs.push(vec![i(0x00, a), i(0x04 | operation, b), RETURN_A]);
            programs.push(vec![i(0x01, b), i(0x00, a), i(0x0c | operation, 0), RETURN_A]);
            programs.push(vec![i(0x20, 20), i(0x07, 0), i(0x20, 24), i(0x54, a), i(0x0c | operation, 0), RETURN_A]);
        }
        programs.push(vec![i(0x20, 20), i(0x54, 31), i(0x07, 0), i(0x20, 24), i(0x0c | operation, 0), RETURN_A]);
    }
    programs.push(vec![i(0x20, 20), i(0x84, 0), RETURN_A]);
    for compare in [0x10, 0x20, 0x30, 0x40] {
        for (k, b) in edges.iter().flat_map(|a| edges.iter().map(move |b| (*a, *b))).step_by(4) {
            let branch = |code| Instruction { code, jt: 1, jf: 0, k };
            let ends = [i(0x06, 1), i(0x06, 2)];
            programs.push([&[i(0x00, b), branch(0x05 | compare)], &ends[..]].concat());
            programs.push([&[i(0x01, k), i(0x00, b), branch(0x0d | compare)], &ends[..]].concat());
            programs.push([&[i(0x30, 20), branch(0x05 | compare)], &ends[..]].concat());
        }
    }
    programs.push(vec![i(0x05, 1), i(0x06, 1), i(0x06, 2)]);
    programs.extend((1..=60).map(random_program));
    programs
}

/// Numbers below a bound, always the same for a seed (xorshift).
fn random(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    move |below| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) % below
    }
}

/// Every instruction that there is.
const CODES: [u16; 49] = [
    0x00, 0x20, 0x28, 0x30, 0x40, 0x48, 0x50, 0x60, 0x80, 0x01, 0x61, 0x81, 0xb1, 0x02, 0x03, 0x04, 0x0c, 0x14, 0x1c,
    0x24, 0x2c, 0x34, 0x3c, 0x44, 0x4c, 0x54, 0x5c, 0x64, 0x6c, 0x74, 0x7c, 0x84, 0x94, 0x9c, 0xa4, 0xac, 0x05, 0x15,
    0x1d, 0x25, 0x2d, 0x35, 0x3d, 0x45, 0x4d, 0x06, 0x16, 0x07, 0x87,
];

/// A forward-only program of any operations. It seldom returns before its end.
fn random_program(seed: u64) -> Vec<Instruction> {
    let mut random = random(seed);
    let len = 24;
    let mut program: Vec<Instruction> = (0..len)
        .map(|at| {
            let mut draw = || CODES[random(CODES.len() as u64) as usize];
            let code = [draw(), draw()].into_iter().find(|code| code & 7 != 6).unwrap_or(0x16);
            let reach = (len - at).min(4) as u64;
            let k = match code & 7 {
                2 | 3 => random(16),
                _ if code == 0x60 || code == 0x61 => random(16),
                0 | 1 if code != 0x00 && code != 0x01 => random(40),
                5 if code == 0x05 => random(reach),
                4 if matches!(code & 0xf0, 0x60 | 0x70) => random(34),
                4 if matches!(code & 0xf0, 0x30 | 0x90) => 1 + random(1000),
                _ => random(1 << 32) >> random(32),
            };
            Instruction { code, jt: random(reach) as u8, jf: random(reach) as u8, k: k as u32 }
        })
        .collect();
    program.push(RETURN_A);
    program
}

/// A pinned directory of loaded programs, gone with this value.
struct Loaded(String);

impl Drop for Loaded {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// One object with a TC program for each function: it returns what the function returns.
fn load_all(programs: &[Vec<Instruction>]) -> Loaded {
    let dir = tempfile::tempdir().unwrap();
    crate::datapath::source::Source::datapath(None, &[]).write(dir.path()).unwrap();
    let mut text = "#define FRAME_AT 14\n#include \"classic.h\"\n".to_string();
    for (n, program) in programs.iter().enumerate() {
        text += &translate(program, &format!("f{n}")).unwrap();
        let _ = writeln!(text, "SEC(\"tc\") int p{n}(struct __sk_buff *skb) {{ return f{n}(skb, skb->cb[0]); }}");
    }
    text += "char _license[] SEC(\"license\") = \"Dual MIT/GPL\";\n";
    std::fs::write(dir.path().join("all.c"), text).unwrap();
    // What a filter stands on is there where a filter is.
    std::fs::write(dir.path().join("expression.h"), "").unwrap();
    let include = format!("-I/usr/include/{}-linux-gnu", std::env::consts::ARCH);
    let words = ["-O2", "-g", "-Wall", "-Werror", "-target", "bpf", "-mcpu=v3", &include, "-c", "all.c", "-o", "all.o"];
    let clang = Command::new("clang").args(words).current_dir(dir.path()).output().unwrap();
    assert!(clang.status.success(), "{}", String::from_utf8_lossy(&clang.stderr));
    crate::session::home::ensure_bpffs(&Runner::default()).unwrap();
    let pins = Loaded(format!("/sys/fs/bpf/snif_unit_{}", std::process::id()));
    std::fs::create_dir(&pins.0).unwrap();
    let object = dir.path().join("all.o");
    let load = ["prog", "loadall", &object.to_string_lossy(), &pins.0, "type", "classifier"];
    let bpftool = Command::new(crate::tools::exec::find("bpftool").unwrap()).args(load).output().unwrap();
    assert!(bpftool.status.success(), "{}", String::from_utf8_lossy(&bpftool.stderr));
    pins
}

/// What each program answers for one packet.
fn answers(pins: &Loaded, count: usize, dir: &Path, packet: &[u8], length: u32) -> Vec<u32> {
    let (data, context) = (dir.join("data"), dir.join("context"));
    std::fs::write(&data, [&[0; 14], packet].concat()).unwrap();
    std::fs::write(&context, [&[0; 48][..], &length.to_ne_bytes()].concat()).unwrap();
    let line = |n| format!("prog run pinned {}/p{n} data_in {} ctx_in {}", pins.0, data.display(), context.display());
    let lines: Vec<String> = (0..count).map(line).collect();
    let answers = bpftool::ask(&Runner::default(), &lines).unwrap();
    answers.iter().map(|answer| answer["retval"].as_i64().unwrap() as u32).collect()
}

#[test]
fn the_kernel_answers_as_the_interpreter_for_every_operation() {
    let programs = programs();
    let codes: BTreeSet<u16> = programs.iter().flatten().map(|instruction| instruction.code).collect();
    assert_eq!(codes, BTreeSet::from(CODES), "an operation has no program");
    let dir = tempfile::tempdir().unwrap();
    let mut matches = 0;
    // In several objects: one program may not hold them all.
    for programs in programs.chunks(400) {
        let pins = load_all(programs);
        for len in [14, 60, 600] {
            let packet = packet(len);
            let got = answers(&pins, programs.len(), dir.path(), &packet, 1514);
            for (program, got) in programs.iter().zip(got) {
                assert_eq!(got, interpret(program, &packet, 1514), "a packet of {len} bytes, {program:x?}");
                matches += usize::from(got != 0);
            }
        }
    }
    assert!(matches > 1000, "only {matches} answers were not 0");
}

/// Of instructions with any operands: what is translated runs to an end in the interpreter, and the rest is refused.
#[test]
fn whatever_is_translated_is_a_program_that_ends() {
    let packet = packet(60);
    let mut accepted = 0;
    for seed in 1..=20_000 {
        let mut random = random(seed);
        let len = 1 + random(8);
        let operand = |random: &mut dyn FnMut(u64) -> u64| match random(4) {
            0 => random(1 << 32),
            _ => random(18),
        };
        let mut program: Vec<Instruction> = (0..len)
            .map(|_| Instruction {
                code: CODES[random(CODES.len() as u64) as usize],
                jt: random(6) as u8,
                jf: random(6) as u8,
                k: operand(&mut random) as u32,
            })
            .collect();
        program.extend((random(4) > 0).then_some(RETURN_A));
        if translate(&program, "f").is_ok() {
            interpret(&program, &packet, 60);
            accepted += 1;
        }
    }
    assert!((2_000..18_000).contains(&accepted), "{accepted} were translated");
}

#[test]
fn what_is_not_classic_bpf_is_refused() {
    let said = |program: &[Instruction]| translate(program, "f").unwrap_err().to_string();
    assert!(said(&[i(0x06, 0), i(0x05, u32::MAX)]).contains("jumps backwards"));
    assert!(said(&[i(0x05, 1), i(0x06, 0)]).contains("beyond the end"));
    assert!(said(&[i(0x00, 1)]).contains("does not return") && said(&[]).contains("does not return"));
    assert!(said(&[i(0x60, 16)]).contains("scratch memory"));
    assert!(said(&[i(0x38, 0)]).contains("size"));
    assert!(said(&[i(0x28, 0xffff_f004)]).contains("--direction"));
    assert!(said(&[i(0xb4, 0)]).contains("unknown"));
    assert!(said(&[i(0x55, 0)]).contains("unknown"));
}

#[test]
fn only_whole_programs_are_read() {
    let program = parse("2\n40 0 0 12\n6 0 0 4294967295\n").unwrap();
    assert_eq!(program, [i(0x28, 12), i(0x06, u32::MAX)]);
    assert_eq!(parse("1\n5 0 0 -3\n").unwrap(), [i(0x05, -3i32 as u32)]);
    for bad in ["", "0\n", "2\n6 0 0 0\n", "1\n6 0 0\n", "1\n6 0 256 x\n"] {
        assert!(parse(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn a_long_expression_is_shown_short_and_in_one_line() {
    assert_eq!(shown("tcp\nport 80"), r#""tcp\nport 80""#);
    let long = shown(&"host 10.0.0.1 or ".repeat(1000));
    assert!(long.len() < 100 && long.contains(" ... "), "{long}");
}
