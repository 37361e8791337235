//! Stubs of calls that pass many objects by an array. The array is memory of the caller's, which may be anything by the time
//! a record is read, so its words are written down, in as many records as they need.

use super::super::record as slot;
use super::{Frame, Room, Writer, at, copy};
use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, CodeLabel, dword_ptr, eax, ecx, edi, edx, ptr, qword_ptr, r9, r11, r11d, rax, rbx, rcx,
    rdi, rdx, rsi, rsp,
};

/// Words of an array that one record has, behind the return address.
const PIECE: i32 = slot::MAX_WORDS as i32 - 1;
/// More words are for the host to look at while the guest stands still. The kernel's own users pass up to 512.
const MAX_ARRAY: i32 = 4096;
/// Where the registers that every stub needs are, rdx last.
const SAVED_RCX: i32 = 8;

impl Writer {
    /// The records of what is freed.
    pub(super) fn bulk_free(
        &self,
        a: &mut CodeAssembler,
        frame: Frame,
        room: &mut Room<'_>,
        missed: CodeLabel,
    ) -> Result<(), IcedError> {
        let (mut next, mut done) = (a.create_label(), a.create_label());
        a.cmp(rsi, MAX_ARRAY)?;
        a.ja(missed)?;
        a.mov(r11, rsi)?;
        a.mov(rsi, rdx)?;
        a.test(r11, r11)?;
        a.je(done)?;
        a.set_label(&mut next)?;
        self.reserve(a, frame, room, slot::IS_ARRAY)?;
        piece(a)?;
        a.test(r11, r11)?;
        a.jne(next)?;
        a.set_label(&mut done)
    }

    /// Keeps where the array is that will be filled.
    pub(super) fn bulk_alloc(
        &self,
        a: &mut CodeAssembler,
        frame: Frame,
        missed: CodeLabel,
    ) -> Result<(), IcedError> {
        let mut own = a.create_label();
        self.kept(a, frame)?;
        a.xor(eax, eax)?;
        a.lock().cmpxchg(qword_ptr(rcx), rdx)?;
        a.je(own)?;
        // One that did not come back, as after an oops, left its pair to the next at the same place.
        a.cmp(rax, rdx)?;
        a.jne(missed)?;
        a.set_label(&mut own)?;
        a.mov(rax, qword_ptr(rsp + SAVED_RCX))?;
        a.mov(qword_ptr(rcx + 8), rax)
    }

    /// The records of what the array was filled with, and last the one of the return.
    pub(super) fn bulk_return(
        &self,
        a: &mut CodeAssembler,
        frame: Frame,
        room: &mut Room<'_>,
        missed: CodeLabel,
    ) -> Result<(), IcedError> {
        let [mut next, mut last, mut done] = std::array::from_fn(|_| a.create_label());
        self.kept(a, frame)?;
        a.cmp(qword_ptr(rcx), rdx)?;
        a.jne(missed)?;
        // An int.
        a.mov(rax, frame.result())?;
        a.mov(r11d, eax)?;
        a.cmp(r11d, MAX_ARRAY)?;
        a.ja(missed)?;
        a.mov(rbx, qword_ptr(rcx + 8))?;
        a.mov(qword_ptr(rcx), 0)?;
        a.test(r11d, r11d)?;
        a.je(done)?;
        a.mov(rsi, rbx)?;
        a.set_label(&mut next)?;
        self.reserve(a, frame, room, slot::IS_ARRAY)?;
        a.test(r11d, r11d)?;
        a.je(last)?;
        a.mov(rdi, rsi)?;
        a.sub(rdi, rbx)?;
        a.mov(at(rdx, slot::BEFORE), rdi)?;
        piece(a)?;
        a.jmp(next)?;
        a.set_label(&mut last)?;
        a.mov(dword_ptr(rdx + slot::HOOK as i32), frame.hook)?;
        a.mov(r9, rax)?;
        // The cache is that of any of them.
        a.mov(rax, qword_ptr(rbx))?;
        self.rest_of_result(a)?;
        a.set_label(&mut done)
    }

    /// rdx: where the return address is; rcx: the pair of words that is for the call with that.
    fn kept(&self, a: &mut CodeAssembler, frame: Frame) -> Result<(), IcedError> {
        a.lea(rdx, ptr(rsp + frame.pushed))?;
        a.mov(rax, rdx)?;
        a.shr(rax, slot::STACKS_APART)?;
        a.xor(eax, edx)?;
        a.and(eax, slot::ARRAYS_MASK as i32)?;
        a.mov(rcx, self.ring.0)?;
        a.lea(rcx, ptr(rcx + rax + slot::ARRAYS as i32))
    }
}

/// The record in rdx, at whose place the return address is where rcx says, of up to [`PIECE`] words from rsi on; r11 is how many
/// there are. Both are behind them then.
fn piece(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut fits = a.create_label();
    a.mov(rcx, qword_ptr(rcx))?;
    a.mov(at(rdx, slot::STACK), rcx)?;
    a.mov(ecx, PIECE)?;
    a.cmp(r11, rcx)?;
    a.jae(fits)?;
    a.mov(ecx, r11d)?;
    a.set_label(&mut fits)?;
    a.sub(r11, rcx)?;
    // With no words of another stack.
    a.lea(edi, ptr(rcx + 1))?;
    a.mov(at(rdx, slot::WORDS), rdi)?;
    a.lea(rdi, ptr(rdx + (slot::STACK as i32 + 8)))?;
    copy(a)?;
    a.mov(at(rdx, slot::SEQUENCE), rax)
}
