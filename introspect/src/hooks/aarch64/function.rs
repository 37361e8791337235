//! Finding the instructions of a function that a trap may replace.
//!
//! ```text
//! nop, nop            ftrace's, rewritten: never a trap
//! paciasp             signs the return address: cannot be carried out
//! stp x29, x30, ...   entry trap: arguments, stack pointer and x30 are the caller's
//! ...
//! ldp x29, x30, ...
//! autiasp
//! ret                 return trap: the result is final, the stack pointer is the caller's
//! ```
//!
//! Everything the kernel rewrites itself (arch/arm64/kernel: ftrace.c, jump_label.c, alternative.c, patch-scs.c,
//! probes) is one of a `nop`, `b`, `bl`, `paciasp`, `autiasp`, a constant or system instruction of hand-written assembly, none
//! of which takes a trap.

use super::{Displaced, Jump};
use crate::arch::instruction::{BYTES, Indirect, Instruction};
use crate::hooks::site::{Site, SiteError, cold_parts, main_part};
use crate::kernel::Kernel;
use crate::memory::Va;
use guest_profiles::hooks::Role;
use rustc_hash::FxHashSet;

/// A decoded function.
pub(in crate::hooks) struct Function {
    /// Its main part, then what the compiler put elsewhere because it is unlikely.
    parts: Vec<Part>,
    /// Addresses some branch inside the function goes to.
    targets: FxHashSet<u64>,
    /// Where it returns.
    returns: Vec<Va>,
    /// First jump that leaves for other code than a cold part.
    leaves: Option<Va>,
}

/// Code without a gap.
struct Part {
    start: Va,
    words: Vec<u32>,
}

impl Function {
    pub(in crate::hooks) fn decode(kernel: &Kernel, name: &str, start: Va) -> Result<Self, SiteError> {
        let main = main_part(kernel, name, start)?;
        let cold = |va: Va| {
            let target = kernel.symbols.resolve(va);
            target.is_none_or(|t| t.name.starts_with(name) || t.name.contains(".cold"))
        };
        Self::build(start, main, &cold_parts(kernel, name), cold)
    }

    /// `elsewhere` are parts that are the function's if it jumps there.
    fn build(
        start: Va,
        main: &[u8],
        elsewhere: &[(Va, &[u8])],
        cold: impl Fn(Va) -> bool,
    ) -> Result<Self, SiteError> {
        let main = Part::new(start, main);
        if main.words.is_empty() {
            return Err(SiteError::NoCode);
        }
        let there = elsewhere.iter().map(|(start, bytes)| Part::new(*start, bytes));
        let there: Vec<Part> =
            there.filter(|part| main.branches().any(|(_, to)| part.contains(to))).collect();
        let mut function = Self {
            parts: std::iter::once(main).chain(there).collect(),
            targets: FxHashSet::default(),
            returns: Vec::new(),
            leaves: None,
        };
        function.follow(cold);
        Ok(function)
    }

    /// Finds where it goes.
    fn follow(&mut self, cold: impl Fn(Va) -> bool) {
        let inside = |target: Va| self.parts.iter().any(|part| part.contains(target));
        for part in &self.parts {
            for (at, instruction) in part.instructions() {
                match instruction {
                    Instruction::Register { kind: Indirect::Return, .. } => self.returns.push(at),
                    Instruction::Register { kind: Indirect::Jump, .. } => {
                        self.leaves.get_or_insert(at);
                    }
                    _ => {}
                }
            }
            for (at, target) in part.branches() {
                if inside(target) {
                    self.targets.insert(target.0);
                } else if !cold(target) {
                    self.leaves.get_or_insert(at);
                }
            }
        }
    }

    /// The first place behind landing pad, ftrace's slots and signing that takes a trap; all arguments are still in their
    /// registers there, and x30 is the return address, perhaps signed.
    pub(in crate::hooks) fn entry(&self, trap_len: usize) -> Result<Site, SiteError> {
        let prefix = |(_, instruction): &(Va, Instruction)| {
            matches!(instruction, Instruction::LandingPad | Instruction::Nop | Instruction::Sign)
        };
        let main = &self.parts[0];
        let first = main.instructions().take_while(prefix).count();
        for (at, _) in main.instructions().take(first + 1) {
            if self.targets.contains(&at.0) {
                let why = "a branch goes back to the beginning".to_owned();
                return Err(SiteError::Unsuitable(at, why));
            }
        }
        self.site(main.start + first as u64 * BYTES, trap_len)
    }

    /// The returns: the result register is final there.
    pub(in crate::hooks) fn returns(&self, trap_len: usize) -> Result<Vec<Site>, SiteError> {
        if let Some(va) = self.leaves {
            return Err(SiteError::TailCall(va));
        }
        if self.returns.is_empty() {
            return Err(SiteError::NoReturn);
        }
        self.returns.iter().map(|&at| self.site(at, trap_len)).collect()
    }

    /// Where a jump can take over from the trap at `site`.
    pub(in crate::hooks) fn jump(
        &self,
        _role: Role,
        _argument: u8,
        _entry: bool,
        site: &Site,
    ) -> Result<Jump, SiteError> {
        Err(SiteError::NoJump(site.va, "arm64 has no stubs".to_owned()))
    }

    fn site(&self, va: Va, trap_len: usize) -> Result<Site, SiteError> {
        let word = self.parts.iter().find_map(|part| part.word(va)).ok_or(SiteError::NoCode)?;
        let instruction = Instruction::decode(word);
        let displaced = Displaced::from_instruction(instruction)
            .filter(|_| trap_len as u64 <= BYTES)
            .ok_or_else(|| SiteError::Unsuitable(va, format!("{instruction:?}, {word:#010x}")))?;
        Ok(Site { va, original: word.to_le_bytes().to_vec(), displaced: vec![displaced] })
    }
}

impl Part {
    fn new(start: Va, bytes: &[u8]) -> Self {
        Self { start, words: bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect() }
    }

    fn contains(&self, va: Va) -> bool {
        self.word(va).is_some()
    }

    fn word(&self, va: Va) -> Option<u32> {
        self.words.get(usize::try_from(va.0.checked_sub(self.start.0)? / BYTES).ok()?).copied()
    }

    fn instructions(&self) -> impl Iterator<Item = (Va, Instruction)> {
        let address = |index: usize| self.start + index as u64 * BYTES;
        self.words.iter().enumerate().map(move |(index, word)| (address(index), Instruction::decode(*word)))
    }

    /// Its jumps, and where they go.
    fn branches(&self) -> impl Iterator<Item = (Va, Va)> {
        let jump = |(at, instruction): (Va, Instruction)| match instruction {
            Instruction::Branch { call: true, .. } => None,
            _ => Some((at, instruction.target(at)?)),
        };
        self.instructions().filter_map(jump)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Va = Va(0xffff_8000_0800_0000);
    const NOP: u32 = 0xd503_201f;
    const PACIASP: u32 = 0xd503_233f;
    /// `stp x29, x30, [sp, #-0x30]!`
    const PUSH: u32 = 0xa9bd_7bfd;
    /// `ldp x29, x30, [sp], #0x30`
    const POP: u32 = 0xa8c3_7bfd;
    const AUTIASP: u32 = 0xd503_23bf;
    const RET: u32 = 0xd65f_03c0;
    /// `cbz x0, .+12`
    const CBZ: u32 = 0xb400_0060;

    fn function(words: &[u32]) -> Function {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Function::build(START, &bytes, &[], |_| false).unwrap()
    }

    #[test]
    fn entry_is_behind_what_is_rewritten_and_what_signs() {
        let site = function(&[NOP, NOP, PACIASP, PUSH, POP, AUTIASP, RET]).entry(4).unwrap();
        assert_eq!((site.va, site.resume()), (START + 12, START + 16));
        assert_eq!(site.original, PUSH.to_le_bytes());
        let site = function(&[0xd503_245f, NOP, NOP, PACIASP, PUSH, POP, AUTIASP, RET]).entry(4).unwrap();
        assert_eq!(site.va, START + 16);
    }

    #[test]
    fn an_early_branch_is_an_entry() {
        let f = function(&[NOP, NOP, CBZ, PUSH, POP, RET]);
        assert_eq!(f.entry(4).unwrap().va, START + 8);
    }

    #[test]
    fn every_return_is_a_site() {
        let f = function(&[CBZ, PUSH, RET, POP, AUTIASP, RET]);
        let places: Vec<u64> = f.returns(4).unwrap().iter().map(|site| site.va - START).collect();
        assert_eq!(places, [8, 20]);
    }

    #[test]
    fn what_a_function_has_elsewhere_is_its_own_if_it_jumps_there() {
        let bytes = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        let places = |at: Va| {
            // CBZ goes to START + 12, behind the main part.
            let (main, cold) = (bytes(&[CBZ, PUSH, RET]), bytes(&[POP, RET]));
            let f = Function::build(START, &main, &[(at, &cold)], |_| true).unwrap();
            f.returns(4).unwrap().iter().map(|site| site.va - START).collect::<Vec<_>>()
        };
        assert_eq!(places(START + 12), [8, 16]);
        assert_eq!(places(START + 16), [8], "of another function of that name");
    }

    #[test]
    fn tail_calls_are_no_returns() {
        // b out of the function; br x16
        assert_eq!(function(&[PUSH, 0x1400_0100, RET]).returns(4), Err(SiteError::TailCall(START + 4)));
        assert_eq!(function(&[PUSH, 0xd61f_0200, RET]).returns(4), Err(SiteError::TailCall(START + 4)));
        assert_eq!(function(&[PUSH, POP]).returns(4), Err(SiteError::NoReturn));
    }

    #[test]
    fn what_the_kernel_may_rewrite_is_no_entry() {
        // b .+4: a jump label that is on; mrs: an alternative may be there; bl
        for word in [0x1400_0001, 0xd53b_e040, 0x9400_0001] {
            assert!(function(&[NOP, NOP, word, RET]).entry(4).is_err(), "{word:#x}");
        }
    }

    #[test]
    fn a_loop_to_the_beginning_is_no_entry() {
        // nop; stp; cbz x0, .-4
        let f = function(&[NOP, PUSH, 0xb4ff_ffe0, RET]);
        assert!(matches!(f.entry(4), Err(SiteError::Unsuitable(va, _)) if va == START + 4));
    }
}
