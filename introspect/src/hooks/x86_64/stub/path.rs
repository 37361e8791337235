//! How a stub finds the backtrace of an event among those it knows ([`crate::unwind::paths`]).

use super::super::record as slot;
use super::{Frame, Writer, at};
use crate::unwind::paths::{
    BUCKET, CALL, END, ENTRY_LEN, FRAMED_CALL, KEY, KIND, MULTIPLIER, SAVED, SHIFT, UP, USER,
};
use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, CodeLabel, byte_ptr, dword_ptr, eax, edi, esi, ptr, qword_ptr, r8, r10, r11, rax, rbp,
    rcx, rdi, rdx, rsi, rsp, word_ptr,
};

/// Of the saved code segment: user code was interrupted.
const IS_USER: u32 = 3;

// The order that one comparison tells apart.
const _: () = assert!(CALL < FRAMED_CALL && FRAMED_CALL < END && END < USER);
// Numbers are addresses of entries.
const _: () = assert!((slot::PART as usize) < ENTRY_LEN);

impl Writer {
    /// Goes on at `known`, with the path in the record in rdx, if the backtrace from the return address at rcx on is one that is
    /// known; else with the task in rsi, and in rcx where the first return address is that is not: that of the known ones before
    /// it, if there are some, is in the record. Only on the stack of the task in rsi, which it does not leave whatever the table
    /// says: each step leads upwards. Where one would not, rcx is what it was.
    pub(super) fn path(
        &self,
        a: &mut CodeAssembler,
        frame: Frame,
        known: CodeLabel,
    ) -> Result<(), IcedError> {
        let around = &self.surroundings;
        let size = i32::try_from(around.stack_size).unwrap_or(0);
        let [mut next, mut found, mut moved, mut other, mut ends, mut is_known, mut unknown, mut is_set] =
            std::array::from_fn(|_| a.create_label());
        // r8: the last word of the stack; r10: the frame pointer; edi: the entry that rcx is to be found behind.
        a.mov(r8, qword_ptr(rsi + around.stack as i32))?;
        a.mov(rax, rcx)?;
        a.sub(rax, r8)?;
        a.cmp(rax, size)?;
        a.jae(unknown)?;
        a.add(r8, size - 8)?;
        a.mov(r10, rbp)?;
        a.mov(edi, frame.at)?;
        a.mov(r11, self.paths.start.0)?;

        a.set_label(&mut next)?;
        a.mov(esi, dword_ptr(rcx))?;
        a.lea(eax, ptr(rdi + rdi * 4))?;
        a.add(eax, esi)?;
        a.shl(rdi, 32)?;
        a.or(rdi, rsi)?;
        a.imul_3(eax, eax, MULTIPLIER)?;
        a.shr(eax, SHIFT)?;
        a.and(eax, self.paths.mask().cast_signed())?;
        a.add(rax, r11)?;
        for _ in 1..BUCKET {
            a.cmp(qword_ptr(rax + KEY as i32), rdi)?;
            a.je(found)?;
            a.add(rax, ENTRY_LEN as i32)?;
        }
        a.cmp(qword_ptr(rax + KEY as i32), rdi)?;
        a.je(found)?;

        a.shr(rdi, 32)?;
        a.cmp(edi, frame.at)?;
        a.je(unknown)?;
        a.or(edi, slot::PART.cast_signed())?;
        a.mov(dword_ptr(rdx + slot::PATH as i32), edi)?;
        a.mov(at(rdx, slot::FROM), rcx)?;
        a.mov(at(rdx, slot::FRAME), r10)?;
        a.jmp(is_set)?;

        a.set_label(&mut found)?;
        a.mov(edi, eax)?;
        a.movsx(rsi, word_ptr(rax + UP as i32))?;
        a.cmp(byte_ptr(rax + KIND as i32), u32::from(FRAMED_CALL))?;
        a.jae(other)?;
        a.add(rcx, rsi)?;
        a.set_label(&mut moved)?;
        a.cmp(rcx, r8)?;
        a.ja(unknown)?;
        a.movsx(rsi, word_ptr(rax + SAVED as i32))?;
        a.test(esi, esi)?;
        a.je(next)?;
        a.mov(r10, qword_ptr(rcx + rsi))?;
        a.jmp(next)?;

        a.set_label(&mut other)?;
        a.jne(ends)?;
        a.cmp(r10, r8)?;
        a.ja(unknown)?;
        a.cmp(r10, rcx)?;
        a.jb(unknown)?;
        a.lea(rcx, ptr(r10 + rsi))?;
        a.jmp(moved)?;

        a.set_label(&mut ends)?;
        a.cmp(byte_ptr(rax + KIND as i32), u32::from(END))?;
        a.je(is_known)?;
        a.add(rcx, rsi)?;
        a.cmp(rcx, r8)?;
        a.ja(unknown)?;
        a.mov(eax, dword_ptr(rcx))?;
        a.and(eax, IS_USER as i32)?;
        a.cmp(eax, IS_USER as i32)?;
        a.jne(unknown)?;
        a.set_label(&mut is_known)?;
        a.mov(dword_ptr(rdx + slot::PATH as i32), edi)?;
        a.mov(rcx, qword_ptr(rsp + frame.pushed))?;
        a.mov(at(rdx, slot::STACK), rcx)?;
        a.jmp(known)?;

        a.set_label(&mut unknown)?;
        a.mov(dword_ptr(rdx + slot::PATH as i32), 0)?;
        a.lea(rcx, ptr(rsp + frame.pushed))?;
        a.set_label(&mut is_set)?;
        a.mov(rsi, qword_ptr(around.current).gs())
    }
}
