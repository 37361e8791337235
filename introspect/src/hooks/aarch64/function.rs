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
use crate::hooks::site::{MAX_FUNCTION, Site, SiteError};
use crate::kernel::Kernel;
use crate::memory::Va;
use guest_profiles::hooks::Role;
use rustc_hash::FxHashSet;

/// A decoded function.
pub(in crate::hooks) struct Function {
    start: Va,
    words: Vec<u32>,
    /// Addresses some branch inside the function goes to.
    targets: FxHashSet<u64>,
    /// Indexes of the instructions that return.
    returns: Vec<usize>,
    /// First jump that leaves for other code than a cold part.
    leaves: Option<Va>,
}

impl Function {
    pub(in crate::hooks) fn decode(kernel: &Kernel, name: &str, start: Va) -> Result<Self, SiteError> {
        let size = kernel.symbols.size(name).unwrap_or(0);
        if size > MAX_FUNCTION {
            // A part of it would hide returns.
            return Err(SiteError::Unsuitable(start, format!("{size:#x} bytes are no function")));
        }
        let bytes = kernel.image.bytes_at(start, size as usize).ok_or(SiteError::NoCode)?;
        let cold = |va: Va| {
            let target = kernel.symbols.resolve(va);
            target.is_none_or(|t| t.name.starts_with(name) || t.name.contains(".cold"))
        };
        Self::build(start, bytes, cold)
    }

    fn build(start: Va, bytes: &[u8], cold: impl Fn(Va) -> bool) -> Result<Self, SiteError> {
        let words: Vec<u32> = bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
        if words.is_empty() {
            return Err(SiteError::NoCode);
        }
        let end = start + words.len() as u64 * BYTES;
        let mut function =
            Self { start, words, targets: FxHashSet::default(), returns: Vec::new(), leaves: None };
        for index in 0..function.words.len() {
            let (at, instruction) = (function.address(index), function.instruction(index));
            match instruction {
                Instruction::Register { kind: Indirect::Return, .. } => function.returns.push(index),
                Instruction::Register { kind: Indirect::Jump, .. } => function.leave(at),
                Instruction::Branch { call: true, .. } => {}
                _ => match instruction.target(at) {
                    Some(target) if (start..end).contains(&target) => {
                        function.targets.insert(target.0);
                    }
                    Some(target) if !cold(target) => function.leave(at),
                    _ => {}
                },
            }
        }
        Ok(function)
    }

    fn leave(&mut self, at: Va) {
        self.leaves.get_or_insert(at);
    }

    fn address(&self, index: usize) -> Va {
        self.start + index as u64 * BYTES
    }

    fn instruction(&self, index: usize) -> Instruction {
        Instruction::decode(self.words[index])
    }

    /// The first place behind landing pad, ftrace's slots and signing that takes a trap; all arguments are still in their
    /// registers there, and x30 is the return address, perhaps signed.
    pub(in crate::hooks) fn entry(&self, trap_len: usize) -> Result<Site, SiteError> {
        let prefix = |&index: &usize| {
            matches!(self.instruction(index), Instruction::LandingPad | Instruction::Nop | Instruction::Sign)
        };
        let first = (0..self.words.len()).take_while(prefix).count();
        for index in 0..=first.min(self.words.len() - 1) {
            let at = self.address(index);
            if self.targets.contains(&at.0) {
                let why = "a branch goes back to the beginning".to_owned();
                return Err(SiteError::Unsuitable(at, why));
            }
        }
        self.site(first, trap_len)
    }

    /// The returns: the result register is final there.
    pub(in crate::hooks) fn returns(&self, trap_len: usize) -> Result<Vec<Site>, SiteError> {
        if let Some(va) = self.leaves {
            return Err(SiteError::TailCall(va));
        }
        if self.returns.is_empty() {
            return Err(SiteError::NoReturn);
        }
        self.returns.iter().map(|&index| self.site(index, trap_len)).collect()
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

    fn site(&self, index: usize, trap_len: usize) -> Result<Site, SiteError> {
        let word = self.words.get(index).ok_or(SiteError::NoCode)?;
        let (va, instruction) = (self.address(index), self.instruction(index));
        let displaced = Displaced::from_instruction(instruction)
            .filter(|_| trap_len as u64 <= BYTES)
            .ok_or_else(|| SiteError::Unsuitable(va, format!("{instruction:?}, {word:#010x}")))?;
        Ok(Site { va, original: word.to_le_bytes().to_vec(), displaced: vec![displaced] })
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
        Function::build(START, &bytes, |_| false).unwrap()
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
