//! Classic BPF, run on a frame: `--filter`.

use anyhow::Result;

use crate::datapath::filter::{self, Instruction, MEMORY, OUTSIDE, op};
use crate::tools::exec::Runner;
use crate::usage::refuse;

/// A program whose jumps, loads and memory have been checked.
#[derive(Debug)]
pub(crate) struct Program(Vec<Instruction>);

impl Program {
    /// tcpdump compiles the expression.
    pub(crate) fn compile(runner: &Runner, expression: &str) -> Result<Program> {
        let program = filter::classic(runner, "--filter", expression)?;
        match fault(&program) {
            None => Ok(Program(program)),
            Some(fault) => refuse!(
                "--filter {expression:?} cannot run on copies: {fault}; name what is in the frame, as in: --filter 'tcp port 443'"
            ),
        }
    }

    /// Does it take this frame, which had so many bytes on the wire?
    pub(crate) fn takes(&self, frame: &[u8], wire: u32) -> bool {
        self.run(frame, wire).is_some_and(|value| value != 0)
    }

    /// What the program returns; none where a load goes beyond the frame, or it divides by 0.
    fn run(&self, frame: &[u8], wire: u32) -> Option<u32> {
        let (mut a, mut x, mut memory) = (0_u32, 0_u32, [0_u32; MEMORY as usize]);
        let mut at = 0;
        loop {
            let Instruction { code, jt, jf, k } = *self.0.get(at)?;
            at += 1;
            let operand = if code & op::X != 0 { x } else { k };
            match code & 0x07 {
                op::LD => {
                    a = match code & 0xe0 {
                        op::IMM => k,
                        op::ABS => load(frame, k.into(), code)?,
                        op::IND => load(frame, u64::from(x) + u64::from(k), code)?,
                        op::MEM => *memory.get(k as usize)?,
                        _ => wire,
                    }
                }
                op::LDX => {
                    x = match code & 0xe0 {
                        op::IMM => k,
                        op::MEM => *memory.get(k as usize)?,
                        op::MSH => 4 * u32::from(frame.get(k as usize)? & 0xf),
                        _ => wire,
                    }
                }
                op::ST => *memory.get_mut(k as usize)? = a,
                op::STX => *memory.get_mut(k as usize)? = x,
                op::ALU => a = arithmetic(code, a, operand)?,
                op::JMP => {
                    let holds = match code & 0xf0 {
                        0x00 => {
                            at = at.checked_add(k as usize)?;
                            continue;
                        }
                        0x10 => a == operand,
                        0x20 => a > operand,
                        0x30 => a >= operand,
                        _ => a & operand != 0,
                    };
                    at += usize::from(if holds { jt } else { jf });
                }
                op::RET => return Some(if code & 0x18 == op::A { a } else { k }),
                _ if code & 0x80 != 0 => a = x,
                _ => x = a,
            }
        }
    }
}

fn load(frame: &[u8], at: u64, code: u16) -> Option<u32> {
    let at = usize::try_from(at).ok()?;
    let rest = frame.get(at..)?;
    match code & 0x18 {
        0x00 => rest.first_chunk().map(|bytes| u32::from_be_bytes(*bytes)),
        0x08 => rest.first_chunk().map(|bytes| u16::from_be_bytes(*bytes).into()),
        _ => rest.first().map(|byte| u32::from(*byte)),
    }
}

fn arithmetic(code: u16, a: u32, operand: u32) -> Option<u32> {
    Some(match code & 0xf0 {
        0x00 => a.wrapping_add(operand),
        0x10 => a.wrapping_sub(operand),
        0x20 => a.wrapping_mul(operand),
        0x30 => a.checked_div(operand)?,
        0x40 => a | operand,
        0x50 => a & operand,
        0x60 => a.checked_shl(operand).unwrap_or(0),
        0x70 => a.checked_shr(operand).unwrap_or(0),
        0x80 => a.wrapping_neg(),
        0x90 => a.checked_rem(operand)?,
        _ => a ^ operand,
    })
}

/// Why a program cannot run here. Jumps go forward, so each program ends.
fn fault(program: &[Instruction]) -> Option<&'static str> {
    program.iter().find_map(|i| match i.code & 0x07 {
        op::LD if i.code & 0xe0 == op::ABS && i.k >= OUTSIDE => {
            Some("it asks for what is not in the frame (inbound, outbound, ifindex)")
        }
        op::JMP if i.code & 0xf0 == 0 && (i.k as i32) < 0 => Some("it jumps backwards (protochain does)"),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(expression: &str) -> Program {
        Program::compile(&Runner::default(), expression).unwrap()
    }

    #[test]
    fn a_filter_takes_the_frames_that_it_names() {
        let mut frame = vec![0_u8; 60];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14..24].copy_from_slice(&[0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17]);
        frame[36..38].copy_from_slice(&53_u16.to_be_bytes());
        let expected = [
            ("udp port 53", true),
            ("udp port 54", false),
            ("tcp", false),
            ("ip6", false),
            ("greater 60", true),
            ("greater 61", false),
            ("ip[8] = 64 and ip[2:2] / 2 = 23", true),
            ("udp[200] = 1", false),
            ("ether[0] << 3 = 1", false),
        ];
        for (expression, takes) in expected {
            assert_eq!(program(expression).takes(&frame, 60), takes, "{expression}");
        }
        let tagged = [&frame[..12], &[0x81, 0, 0, 10], &frame[12..]].concat();
        assert!(program("vlan 10 and udp port 53").takes(&tagged, 64) && !program("vlan 11").takes(&tagged, 64));
    }

    #[test]
    fn what_no_copy_tells_is_refused() {
        let refused = |expression| Program::compile(&Runner::default(), expression).unwrap_err().to_string();
        assert!(refused("ip protochain 6").contains("jumps backwards"));
        assert!(refused("tcp port").contains("is not a filter"));
    }
}
