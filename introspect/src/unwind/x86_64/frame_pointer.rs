//! Along frame pointers, for a kernel built without ORC (arch/x86/kernel/unwind_frame.c).
//!
//! Each function keeps `[saved rbp][return address]` where rbp points. Entry code marks where it saved
//! registers by an odd rbp (ENCODE_FRAME_POINTER): `struct pt_regs` one byte below.

use super::walk::{end_at_user_code, pt_regs};
use super::{Start, in_kernel};
use crate::memory::Va;
use crate::unwind::{End, MAX_STACKS, ModuleTables, StackFrame, Unwinder, word};

impl Unwinder<'_> {
    pub(super) fn walk_frame_pointers(
        &self,
        modules: &impl ModuleTables,
        start: &Start,
        mut read: impl FnMut(Va) -> Option<u64>,
        mut visit: impl FnMut(StackFrame) -> bool,
    ) -> End {
        match self.follow(modules, start, &mut read, &mut visit) {
            Ok(()) => End::Full,
            Err(end) => end,
        }
    }

    /// Ok when the output is full.
    fn follow(
        &self,
        modules: &impl ModuleTables,
        start: &Start,
        read: &mut impl FnMut(Va) -> Option<u64>,
        visit: &mut impl FnMut(StackFrame) -> bool,
    ) -> Result<(), End> {
        let &Start { ip, sp, mut bp, exact, .. } = start;
        let (ip, sp) = in_kernel(modules, ip, sp);
        let mut frame = StackFrame { ip, sp, exact };
        let mut descents = 0;
        loop {
            if !visit(frame) {
                return Ok(());
            }
            if frame.exact && self.is_frameless(frame.sp, bp, read) {
                let ip = Va(word(read, frame.sp)?);
                if !visit(StackFrame { ip, sp: frame.sp + 8, exact: false }) {
                    return Ok(());
                }
            }
            if bp.0 == 0 {
                return Err(End::Complete);
            }
            let next;
            (frame, next) = if bp.0 & 1 != 0 {
                let regs = bp - 1;
                end_at_user_code(word(read, regs + pt_regs::CS)?)?;
                let (ip, sp) = (Va(word(read, regs + pt_regs::IP)?), Va(word(read, regs + pt_regs::SP)?));
                let (ip, sp) = in_kernel(modules, ip, sp);
                (StackFrame { ip, sp, exact: true }, Va(word(read, regs + pt_regs::BP)?))
            } else {
                let ip = Va(word(read, bp + 8)?);
                (StackFrame { ip, sp: bp + 16, exact: false }, Va(word(read, bp)?))
            };
            if !self.is_code(frame.ip, false) {
                return Err(End::NotCode(frame.ip));
            }
            if next <= bp && next.0 != 0 {
                descents += 1;
                if descents > MAX_STACKS {
                    return Err(End::Backwards(frame.ip));
                }
            }
            bp = next;
        }
    }

    /// At a function's first or last instruction its return address is on top of the stack and rbp is still its
    /// caller's. The word there is taken for one when code is at it and the chain does not yield it as well.
    fn is_frameless(&self, sp: Va, bp: Va, read: &mut impl FnMut(Va) -> Option<u64>) -> bool {
        let top = read(sp).filter(|&ip| self.is_code(Va(ip), false));
        top.is_some() && (bp.0 & 1 != 0 || top != read(bp + 8))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{KERNEL_CS, LEAF, SLIDE, STACK, USER_CS, code, saved, start, text};
    use super::super::{End, Start, Unwinder};
    use crate::memory::Va;
    use std::collections::HashMap;

    fn along_frame_pointers(start: &Start, stack: &[(u64, u64)]) -> (Vec<u64>, End) {
        let memory: HashMap<u64, u64> = stack.iter().map(|&(at, word)| (STACK + at, word)).collect();
        let mut out = [Va(0); 8];
        let unwinder = Unwinder::new(None, text(), SLIDE);
        let trace = unwinder.unwind(&(), start, |va| memory.get(&va.0).copied(), &mut out);
        (out[..trace.len].iter().map(|ip| ip.0.wrapping_sub(code(0))).collect(), trace.end)
    }

    #[test]
    fn frame_pointers_lead_through_saved_registers() {
        let mut stack = vec![(0, 1), (0x80, STACK + 0xa1), (0x88, code(0x20))];
        stack.extend(saved(0xa0, code(0x30), 0x200, STACK + 0x300, KERNEL_CS));
        stack.extend([(0x300, 0), (0x308, code(0x40))]);
        assert_eq!(along_frame_pointers(&start(LEAF), &stack), (vec![LEAF, 0x20, 0x30, 0x40], End::Complete));
        let mut stack = vec![(0, 1), (0x80, STACK + 0xa1), (0x88, code(0x20))];
        stack.extend(saved(0xa0, 0x40_1000, 0, 0, USER_CS));
        assert_eq!(along_frame_pointers(&start(LEAF), &stack), (vec![LEAF, 0x20], End::User));
    }

    #[test]
    fn a_function_that_has_no_frame_yet_keeps_its_caller() {
        let stack = [(0, code(0x20)), (0x80, 0), (0x88, code(0x30))];
        assert_eq!(along_frame_pointers(&start(LEAF), &stack), (vec![LEAF, 0x20, 0x30], End::Complete));
        let asleep = Start { exact: false, ..start(LEAF) };
        assert_eq!(along_frame_pointers(&asleep, &stack), (vec![LEAF, 0x30], End::Complete));
        // Interrupted there.
        let mut stack = vec![(0x80, STACK + 0xa1), (0x88, code(0x20)), (0x200, code(0x50))];
        stack.extend(saved(0xa0, code(0x30), 0x200, STACK + 0x300, KERNEL_CS));
        stack.extend([(0x300, 0), (0x308, code(0x40))]);
        let frames = vec![LEAF, 0x20, 0x30, 0x50, 0x40];
        assert_eq!(along_frame_pointers(&start(LEAF), &stack), (frames, End::Complete));
    }
}
