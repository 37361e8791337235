//! Where a function keeps its caller's registers.

use super::Register;
use super::code::{Source, is_cold};
use super::operands::operands;
use crate::arch::instruction::{Index, Indirect, Instruction, Place, Register as Operand};
use crate::callee_saved::Registers;
use crate::memory::Va;
use rustc_hash::FxHashMap;

/// Instructions looked at; the largest functions have some thousands.
const MAX_STEPS: usize = 50_000;
/// Bytes of a word.
const WORD: i64 = 8;
/// x29 and x30, in the order of a frame record.
const RECORD: [Operand; 2] = [Operand::FRAME, Operand::LINK];

/// What a function's frame looks like at one of its instructions, told from its frame record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Saves {
    /// Bytes from the stack pointer up to the record.
    pub below: i64,
    /// Bytes from the record to the end of the frame, which is the caller's stack pointer.
    pub above: i64,
    /// For each of [`Register::ALL`]: bytes from the record up to the word with the caller's value; 0 when it is not on the stack.
    offsets: [i64; Register::ALL.len()],
}

impl Saves {
    /// The saved registers, and the bytes from the record to each.
    pub fn iter(&self) -> impl Iterator<Item = (Register, i64)> {
        Register::ALL.into_iter().zip(self.offsets).filter(|(_, offset)| *offset != 0)
    }
}

/// The frame at `ip`: what all ways from the function's start to there agree on. None where the frame pointer does not point to
/// the function's own record.
pub(in crate::callee_saved) fn saves(code: &impl Source, ip: Va, exact: bool) -> Option<Saves> {
    let inside = if exact { ip } else { ip - 1 };
    let (start, name) = code.function(inside)?;
    // A cold part is entered with a frame that its function made.
    if is_cold(name) {
        return None;
    }
    let mut reached: FxHashMap<Va, State> = FxHashMap::default();
    let mut work = vec![(start, State::ENTRY)];
    let mut steps = 0;
    while let Some((at, state)) = work.pop() {
        let merged = reached.get(&at).map_or(Some(state), |known| known.meet(&state))?;
        if reached.insert(at, merged) == Some(merged) {
            continue;
        }
        steps += 1;
        if steps > MAX_STEPS {
            return None;
        }
        // A way that cannot be followed is of no use; another may be.
        let Some(word) = code.word(at) else { continue };
        let instruction = Instruction::decode(word);
        let Some(after) = merged.after(instruction, word) else { continue };
        let inner = |target: &Va| !code.is_function(*target);
        work.extend(
            instruction
                .target(at)
                .filter(inner)
                .map(|target| (target, after))
                .filter(|_| !matches!(instruction, Instruction::Branch { call: true, .. })),
        );
        let ends = matches!(
            instruction,
            Instruction::Branch { call: false, .. }
                | Instruction::Break(_)
                | Instruction::Register { kind: Indirect::Return | Indirect::Jump, .. }
        );
        let next = Some(code.next(at)).filter(|next| !ends && inner(next));
        work.extend(next.map(|next| (next, after)));
    }
    let state = reached.get(&ip)?;
    let record = state.record.filter(|_| state.record == state.frame)?;
    let offsets = state.offsets.map(|offset| if offset == 0 { 0 } else { record - offset });
    Some(Saves { below: state.depth - record, above: record, offsets })
}

/// All offsets count down from the caller's stack pointer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct State {
    /// The stack pointer.
    depth: i64,
    /// The frame pointer, where it is the function's.
    frame: Option<i64>,
    /// Where the caller's x29 and x30 are.
    record: Option<i64>,
    /// Registers that still have the caller's values.
    kept: Registers,
    /// Where the caller's values are; 0 when they are not on the stack.
    offsets: [i64; Register::ALL.len()],
}

impl State {
    const ENTRY: Self =
        Self { depth: 0, frame: None, record: None, kept: Registers::ALL, offsets: [0; Register::ALL.len()] };

    /// What holds in both; None where the stack pointer does not.
    fn meet(&self, other: &Self) -> Option<Self> {
        let both = |a: Option<i64>, b: Option<i64>| a.filter(|_| a == b);
        let mut offsets = self.offsets;
        offsets.iter_mut().zip(other.offsets).filter(|(a, b)| **a != *b).for_each(|(a, _)| *a = 0);
        (self.depth == other.depth).then_some(Self {
            depth: self.depth,
            frame: both(self.frame, other.frame),
            record: both(self.record, other.record),
            kept: self.kept.intersection(other.kept),
            offsets,
        })
    }

    /// Behind one instruction; None when the stack pointer is lost.
    fn after(mut self, instruction: Instruction, word: u32) -> Option<Self> {
        match instruction {
            Instruction::AddConstant { wide: true, to: Operand::Sp, from, value } => {
                let base = self.base(from)?;
                self.set_depth(base - value)?;
            }
            Instruction::AddConstant { wide: true, to: Operand::FRAME, from: Operand::Sp, value } => {
                self.frame = Some(self.depth - value);
            }
            Instruction::StorePair { from, place } => {
                let at = self.access(place)?;
                if let Some(at) = at {
                    self.store(from[0], at);
                    self.store(from[1], at - WORD);
                    if from == RECORD && self.frame.is_none() {
                        self.record = Some(at);
                    }
                }
            }
            Instruction::Store { bytes: 8, from, place } => {
                if let Some(at) = self.access(place)? {
                    self.store(from, at);
                }
            }
            Instruction::LoadPair { to, place } => {
                let at = self.access(place)?;
                self.load(to[0], at);
                self.load(to[1], at.map(|at| at - WORD));
            }
            Instruction::Load { bytes: 8, to, place } => {
                let at = self.access(place)?;
                self.load(to, at);
            }
            _ => {
                if writes_stack_pointer(instruction, word) {
                    return None;
                }
                self.kept = self.kept.without(operands(word).written);
                if writes_frame_pointer(instruction, word) {
                    self.frame = None;
                }
            }
        }
        Some(self)
    }

    fn base(&self, register: Operand) -> Option<i64> {
        match register {
            Operand::Sp => Some(self.depth),
            Operand::FRAME => self.frame,
            _ => None,
        }
    }

    /// Where an access to the stack is, and what it makes of the stack pointer; the inner None: it is elsewhere.
    fn access(&mut self, place: Place) -> Option<Option<i64>> {
        let Some(base) = self.base(place.base) else { return Some(None) };
        let moved = base - place.offset;
        if place.index != Index::Offset {
            if place.base == Operand::Sp {
                self.set_depth(moved)?;
            } else {
                self.frame = Some(moved);
            }
        }
        Some(Some(if place.index == Index::Post { base } else { moved }))
    }

    fn store(&mut self, register: Operand, at: i64) {
        // A saved register that is overwritten is none any more.
        self.offsets.iter_mut().filter(|offset| **offset == at).for_each(|offset| *offset = 0);
        if let Some(register) = Register::of(register).filter(|&r| self.kept.contains(r)) {
            self.offsets[register as usize] = at;
        }
    }

    fn load(&mut self, to: Operand, at: Option<i64>) {
        if to == Operand::FRAME {
            self.frame = None;
        }
        if let Some(register) = Register::of(to) {
            let one = Registers::NONE.with(register);
            let restored = at.is_some_and(|at| self.offsets[register as usize] == at);
            self.kept = if restored { self.kept.union(one) } else { self.kept.without(one) };
        }
    }

    /// Moves the stack pointer; what lies below it is gone.
    fn set_depth(&mut self, depth: i64) -> Option<()> {
        self.depth = depth;
        self.offsets.iter_mut().filter(|offset| **offset > depth).for_each(|offset| *offset = 0);
        self.record = self.record.filter(|record| *record <= depth);
        (depth >= 0).then_some(())
    }
}

/// Additions with an extended register and logic with a constant are the others that can write it (Arm ARM, C4.1.86, C4.1.95).
fn writes_stack_pointer(instruction: Instruction, word: u32) -> bool {
    let extended = word & 0x3fe0_0000 == 0x0b20_0000;
    let logic = word & 0x1f80_0000 == 0x1200_0000 && word >> 29 & 3 != 3;
    instruction == Instruction::Other && word & 0x1f == 31 && (extended || logic)
}

/// In doubt it does.
fn writes_frame_pointer(instruction: Instruction, word: u32) -> bool {
    match instruction {
        Instruction::Store { .. } | Instruction::Branch { .. } | Instruction::Register { .. } => false,
        _ => word & 0x1f == 29,
    }
}
