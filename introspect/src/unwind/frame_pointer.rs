//! Along frame pointers, for a kernel built without ORC (arch/x86/kernel/unwind_frame.c).
//!
//! Each function keeps `[saved rbp][return address]` where rbp points. Entry code marks where it saved
//! registers by an odd rbp (ENCODE_FRAME_POINTER): `struct pt_regs` one byte below.

use super::walk::{end_at_user_code, pt_regs, word};
use super::{End, Frames, MAX_STACKS, Start, Unwinder};
use crate::memory::Va;

impl Unwinder<'_> {
    pub(super) fn walk_frame_pointers(
        &self,
        start: &Start,
        mut read: impl FnMut(Va) -> Option<u64>,
        frames: &mut Frames<'_>,
    ) -> End {
        if !frames.push(start.ip) {
            return End::Full;
        }
        match self.follow(start, &mut read, frames) {
            Ok(()) => End::Full,
            Err(end) => end,
        }
    }

    /// Ok when the output is full.
    fn follow(
        &self,
        start: &Start,
        read: &mut impl FnMut(Va) -> Option<u64>,
        frames: &mut Frames<'_>,
    ) -> Result<(), End> {
        let mut bp = start.bp;
        if start.exact && self.is_frameless(start, read) && !frames.push(Va(word(read, start.sp)?)) {
            return Ok(());
        }
        let mut descents = 0;
        loop {
            if bp.0 == 0 {
                return Err(End::Complete);
            }
            let (ip, next) = if bp.0 & 1 != 0 {
                let regs = bp - 1;
                end_at_user_code(word(read, regs + pt_regs::CS)?)?;
                (Va(word(read, regs + pt_regs::IP)?), Va(word(read, regs + pt_regs::BP)?))
            } else {
                (Va(word(read, bp + 8)?), Va(word(read, bp)?))
            };
            if !self.is_code(ip, false) {
                return Err(End::NotCode(ip));
            }
            if !frames.push(ip) {
                return Ok(());
            }
            if next <= bp && next.0 != 0 {
                descents += 1;
                if descents > MAX_STACKS {
                    return Err(End::Backwards(ip));
                }
            }
            bp = next;
        }
    }

    /// At a function's first or last instruction its return address is on top of the stack and rbp is still its
    /// caller's. The word there is taken for one when code is at it and the chain does not yield it as well.
    fn is_frameless(&self, start: &Start, read: &mut impl FnMut(Va) -> Option<u64>) -> bool {
        let top = read(start.sp).filter(|&ip| self.is_code(Va(ip), false));
        top.is_some() && (start.bp.0 & 1 != 0 || top != read(start.bp + 8))
    }
}
