//! From a pcap-filter(7) expression to C: tcpdump compiles it to classic BPF, which is translated one statement an
//! instruction. `bpf/classic.h` has the loads that the C stands on.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::tools::exec::{self, Cmd, Failed, Runner};
use crate::usage::{Usage, refuse};

/// How long tcpdump may take: libpcap's time grows with the square of an expression's terms and more.
const PATIENCE: Duration = Duration::from_secs(20);

/// Instruction classes and fields of classic BPF (McCanne and Jacobson 1993; <linux/bpf_common.h>).
pub(crate) mod op {
    pub(crate) const LD: u16 = 0x00;
    pub(crate) const LDX: u16 = 0x01;
    pub(crate) const ST: u16 = 0x02;
    pub(crate) const STX: u16 = 0x03;
    pub(crate) const ALU: u16 = 0x04;
    pub(crate) const JMP: u16 = 0x05;
    pub(crate) const RET: u16 = 0x06;
    pub(crate) const MISC: u16 = 0x07;
    /// Modes of a load.
    pub(crate) const IMM: u16 = 0x00;
    pub(crate) const ABS: u16 = 0x20;
    pub(crate) const IND: u16 = 0x40;
    pub(crate) const MEM: u16 = 0x60;
    pub(crate) const LEN: u16 = 0x80;
    pub(crate) const MSH: u16 = 0xa0;
    /// The second operand is X, not the constant.
    pub(crate) const X: u16 = 0x08;
    /// The returned value is A.
    pub(crate) const A: u16 = 0x10;
}

/// One instruction of classic BPF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Instruction {
    pub code: u16,
    /// Instructions to skip when a comparison holds, and when it does not.
    pub jt: u8,
    pub jf: u8,
    pub k: u32,
}

/// Offsets from here on stand for what the kernel knows of a packet (SKF_AD_OFF in <linux/filter.h>).
pub(crate) const OUTSIDE: u32 = 0xffff_f000;

/// Words of scratch memory.
pub(crate) const MEMORY: u32 = 16;

/// A filter: what the user said, and the C that it becomes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Filter {
    pub expression: String,
    pub code: String,
}

/// Compiles an expression. Errors name `what`, the argument that it came from.
pub(crate) fn compile(runner: &Runner, what: &str, expression: &str) -> Result<Filter> {
    let program = classic(runner, what, expression)?;
    let code = translate(&program, "filter")
        .map_err(|err| Usage(format!("{what} {} cannot run in the kernel: {err:#}", shown(expression))))?;
    Ok(Filter { expression: expression.into(), code })
}

/// The classic BPF of an expression on Ethernet frames. Needs no privileges and touches no interface.
pub(crate) fn classic(runner: &Runner, what: &str, expression: &str) -> Result<Vec<Instruction>> {
    ensure!(
        exec::find("tcpdump").is_some(),
        "tcpdump is not installed, and {what} needs it to read the expression; try: apt-get install tcpdump"
    );
    let cmd = Cmd::new("tcpdump", ["-y", "EN10MB", "-ddd", "--", expression]).patience(PATIENCE);
    match runner.read(&cmd) {
        Ok(text) => parse(&text).context("tcpdump gave an unexpected program; try: snifctl doctor"),
        Err(err) => match err.downcast::<Failed>() {
            Ok(failed) => refuse!(
                "{what} {} is not a filter: {}; see pcap-filter(7), as in: --filter 'tcp port 443 and not net 10.0.0.0/8'",
                shown(expression),
                reason(&failed.stderr)
            ),
            Err(err) => Err(err.context(format!("{what} {} was not compiled; try a shorter one", shown(expression)))),
        },
    }
}

/// The expression in one line, its middle left out where it is long.
fn shown(expression: &str) -> String {
    let all: Vec<char> = expression.chars().collect();
    match all.len() {
        0..=80 => format!("{expression:?}"),
        n => format!("{:?} ... {:?}", String::from_iter(&all[..40]), String::from_iter(&all[n - 30..])),
    }
}

/// The last thing that tcpdump said, without its name.
fn reason(stderr: &str) -> String {
    let last = stderr.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("it gave no reason");
    last.strip_prefix("tcpdump: ").unwrap_or(last).chars().take(200).collect()
}

/// `tcpdump -ddd`: how many instructions, then one a line.
fn parse(text: &str) -> Result<Vec<Instruction>> {
    let mut lines = text.lines();
    let count: usize = lines.next().context("it is empty")?.trim().parse()?;
    let program = lines.map(instruction).collect::<Result<Vec<_>>>()?;
    ensure!(program.len() == count && count > 0, "it announces {count} instructions and has {}", program.len());
    Ok(program)
}

fn instruction(line: &str) -> Result<Instruction> {
    let numbers = line.split_whitespace().map(str::parse).collect::<Result<Vec<i64>, _>>()?;
    let [code, jt, jf, k] = numbers[..] else { bail!("{line:?} is not four numbers") };
    Ok(Instruction { code: code.try_into()?, jt: jt.try_into()?, jf: jf.try_into()?, k: k as u32 })
}

/// The C function `name` that does what `program` does: it returns what the program returns, 0 where a load goes beyond
/// the packet's end.
///
/// # Errors
/// Backward jumps (`protochain`), and what is not classic BPF.
pub(crate) fn translate(program: &[Instruction], name: &str) -> Result<String> {
    let mut targets = BTreeSet::new();
    let mut body = Vec::new();
    for (at, instruction) in program.iter().enumerate() {
        body.push(statement(at, instruction, program.len(), &mut targets)?);
    }
    let ends = program.last().is_some_and(|last| last.code & 0x07 == op::RET);
    ensure!(ends, "its last instruction does not return");
    let mut text = format!(
        "__noinline __u32 {name}(struct __sk_buff *skb, __u32 length)\n{{\n\
         \t__u32 tagged = tag_bytes(skb), a = 0, x = 0, m[{MEMORY}] = {{}};\n\n\
         \tOPAQUE(skb);\n\tOPAQUE(length); /* or clang, where they are not used, does not pass them */\n\
         \t(void)tagged, (void)a, (void)x, (void)m;\n"
    );
    for (at, statement) in body.iter().enumerate() {
        if targets.contains(&at) {
            let _ = writeln!(text, "l{at}:");
        }
        let _ = writeln!(text, "\t{statement}");
    }
    Ok(text + "}\n")
}

fn statement(at: usize, i: &Instruction, len: usize, targets: &mut BTreeSet<usize>) -> Result<String> {
    let k = i.k;
    let mode = i.code & 0xe0;
    let operand = if i.code & op::X != 0 { "x".to_string() } else { format!("{k}u") };
    let mut jump = |skip: u32| -> Result<String> {
        ensure!(
            (skip as i32) >= 0,
            "it jumps backwards (protochain does); name the headers instead, as in: ip6 proto 6"
        );
        let target = at + 1 + skip as usize;
        ensure!(target < len, "instruction {at} jumps beyond the end");
        targets.insert(target);
        Ok(format!("goto l{target};"))
    };
    Ok(match i.code & 0x07 {
        op::LD => match mode {
            op::IMM => format!("a = {k}u;"),
            op::ABS if k >= OUTSIDE => {
                bail!(
                    "it asks for what is not in the frame (inbound, outbound, ifindex); choose with --direction instead"
                )
            }
            op::ABS => load(&format!("{k}u"), i.code)?,
            op::IND => load(&format!("(__u64)x + {k}u"), i.code)?,
            op::MEM => format!("a = m[{}];", cell(k)?),
            op::LEN => "a = length;".into(),
            _ => bail!("instruction {at} loads in an unknown way ({:#x})", i.code),
        },
        op::LDX => match mode {
            op::IMM => format!("x = {k}u;"),
            op::MEM => format!("x = m[{}];", cell(k)?),
            op::LEN => "x = length;".into(),
            op::MSH => format!("if (!load(skb, tagged, {k}u, 1, &x))\n\t\treturn 0;\n\tx = 4 * (x & 0xf);"),
            _ => bail!("instruction {at} loads in an unknown way ({:#x})", i.code),
        },
        op::ST => format!("m[{}] = a;", cell(k)?),
        op::STX => format!("m[{}] = x;", cell(k)?),
        op::ALU => arithmetic(i, &operand).with_context(|| format!("instruction {at} is unknown ({:#x})", i.code))?,
        op::JMP => {
            let compare = match i.code & 0xf0 {
                0x00 => return jump(k),
                0x10 => format!("a == {operand}"),
                0x20 => format!("a > {operand}"),
                0x30 => format!("a >= {operand}"),
                0x40 => format!("a & {operand}"),
                _ => bail!("instruction {at} compares in an unknown way ({:#x})", i.code),
            };
            format!("if ({compare})\n\t\t{}\n\t{}", jump(i.jt.into())?, jump(i.jf.into())?)
        }
        op::RET if i.code & 0x18 == op::A => "return a;".into(),
        op::RET => format!("return {k}u;"),
        op::MISC if i.code & 0x80 != 0 => "a = x;".into(),
        _ => "x = a;".into(),
    })
}

fn load(offset: &str, code: u16) -> Result<String> {
    let size = match code & 0x18 {
        0x00 => 4,
        0x08 => 2,
        0x10 => 1,
        _ => bail!("a load has no size ({code:#x})"),
    };
    Ok(format!("if (!load(skb, tagged, {offset}, {size}, &a))\n\t\treturn 0;"))
}

fn cell(k: u32) -> Result<u32> {
    ensure!(k < MEMORY, "it uses word {k} of scratch memory, which has {MEMORY}");
    Ok(k)
}

/// As libpcap's interpreter has it: a division by X = 0 ends the program with no match, a shift by 32 or more gives 0.
fn arithmetic(i: &Instruction, operand: &str) -> Option<String> {
    let by_x = i.code & op::X != 0;
    let simple = |sign: &str| Some(format!("a {sign}= {operand};"));
    let divide = |sign: &str| match by_x {
        true => Some(format!("if (x == 0)\n\t\treturn 0;\n\ta {sign}= x;")),
        false if i.k == 0 => Some("return 0;".into()),
        false => simple(sign),
    };
    let shift = |sign: &str| match by_x {
        true => Some(format!("a = x < 32 ? a {sign} x : 0;")),
        false if i.k > 31 => Some("a = 0;".into()),
        false => simple(sign),
    };
    match i.code & 0xf0 {
        0x00 => simple("+"),
        0x10 => simple("-"),
        0x20 => simple("*"),
        0x30 => divide("/"),
        0x40 => simple("|"),
        0x50 => simple("&"),
        0x60 => shift("<<"),
        0x70 => shift(">>"),
        0x80 => Some("a = -a;".into()),
        0x90 => divide("%"),
        0xa0 => simple("^"),
        _ => None,
    }
}

#[cfg(test)]
#[path = "filter_test.rs"]
mod tests;
