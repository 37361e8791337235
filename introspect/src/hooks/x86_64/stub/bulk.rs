//! Stubs of calls that pass many objects or pages by an array or a list. Those are memory of the caller's, which may be anything by
//! the time a record is read, so what is in them is written down, in as many records as that needs.

use super::super::record as slot;
use super::{Filled, Frame, Room, Source, Writer, at, copy};
use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, CodeLabel, byte_ptr, dword_ptr, eax, ebx, ecx, edi, edx, ptr, qword_ptr, r8, r9, r10, r11,
    r11d, rax, rbx, rcx, rdi, rdx, rsi, rsp,
};

/// Words of an array that one record has, behind the return address.
const PIECE: i32 = slot::MAX_WORDS as i32 - 1;
/// More, of an array or on a list, are for the host to look at while the guest stands still: the list may be damaged. The
/// kernel's own users pass up to 512.
const MOST: i32 = 4096;
/// More folios are in no batch (`PAGEVEC_SIZE` was 14, 15 and is 31).
const MAX_BATCH: i32 = 64;
/// As 32-bit operands take it.
const KEPT_ARRAY: i32 = crate::hooks::KEPT_ARRAY as i32;
/// Addresses of `struct page`s are aligned to more than the largest order. (include/asm-generic/memory_model.h)
const ORDERS: i32 = slot::ORDERS as i32;

impl Writer {
    /// The records of what is given back.
    pub(super) fn free(
        &self,
        a: &mut CodeAssembler,
        frame: Frame,
        room: &mut Room<'_>,
        source: Source,
        missed: CodeLabel,
    ) -> Result<(), IcedError> {
        let (mut next, mut done) = (a.create_label(), a.create_label());
        let batch = self.surroundings.pages.batch;
        match (source, batch) {
            (Source::List, _) => {
                a.mov(r8, rdi)?;
                a.mov(rsi, qword_ptr(rdi))?;
                a.mov(r11d, MOST)?;
                a.cmp(rsi, r8)?;
            }
            (Source::Batch, Some((count, folios))) => {
                a.movzx(r11d, byte_ptr(rdi + count as i32))?;
                a.cmp(r11d, MAX_BATCH)?;
                a.ja(missed)?;
                a.lea(rsi, ptr(rdi + folios as i32))?;
                a.test(r11d, r11d)?;
            }
            (Source::Array, _) => {
                a.cmp(rsi, MOST)?;
                a.ja(missed)?;
                a.mov(r11, rsi)?;
                a.mov(rsi, rdx)?;
                a.test(r11, r11)?;
            }
            // Nothing is known of what it is: for the host, which cannot know it either.
            (Source::Batch, None) => a.jmp(missed)?,
        }
        a.je(done)?;
        a.set_label(&mut next)?;
        self.reserve(a, frame, room, slot::IS_ARRAY)?;
        a.mov(rcx, qword_ptr(rcx))?;
        a.mov(at(rdx, slot::STACK), rcx)?;
        match source {
            Source::Array => array(a)?,
            Source::Batch => self.batch(a)?,
            Source::List => self.list(a)?,
        }
        a.mov(at(rdx, slot::SEQUENCE), rax)?;
        a.test(r11, r11)?;
        a.jne(next)?;
        if source == Source::List {
            // It goes on: what is recorded twice is nobody's by then.
            a.cmp(rsi, r8)?;
            a.jne(missed)?;
        }
        a.set_label(&mut done)
    }

    /// Keeps where what the call gets will be.
    pub(super) fn fill(
        &self,
        a: &mut CodeAssembler,
        frame: Frame,
        filled: Filled,
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
        match filled {
            Filled::Objects => a.mov(rax, frame.fourth())?,
            Filled::Pages if !self.surroundings.pages.bulk_has_list => {
                a.mov(rax, r8)?;
                a.or(rax, KEPT_ARRAY)?;
            }
            Filled::Pages => {
                let mut is_list = a.create_label();
                a.mov(rax, r8)?;
                a.test(r9, r9)?;
                a.je(is_list)?;
                a.mov(rax, r9)?;
                a.or(rax, KEPT_ARRAY)?;
                a.set_label(&mut is_list)?;
            }
        }
        a.mov(qword_ptr(rcx + 8), rax)
    }

    /// The records of what the call got, and last the one of the return.
    pub(super) fn filled(
        &self,
        a: &mut CodeAssembler,
        frame: Frame,
        room: &mut Room<'_>,
        filled: Filled,
        missed: CodeLabel,
    ) -> Result<(), IcedError> {
        let [mut next, mut publish, mut last, mut done] = std::array::from_fn(|_| a.create_label());
        self.kept(a, frame)?;
        a.cmp(qword_ptr(rcx), rdx)?;
        a.jne(missed)?;
        a.mov(r11, frame.result())?;
        if filled == Filled::Objects {
            // An int.
            a.mov(r11d, r11d)?;
        }
        a.cmp(r11, MOST)?;
        a.ja(missed)?;
        a.mov(rbx, qword_ptr(rcx + 8))?;
        a.mov(qword_ptr(rcx), 0)?;
        a.test(r11, r11)?;
        a.je(done)?;
        a.mov(rsi, rbx)?;
        if filled == Filled::Pages {
            self.begin_pages(a, done)?;
        }
        a.set_label(&mut next)?;
        self.reserve(a, frame, room, slot::IS_ARRAY)?;
        a.test(r11, r11)?;
        a.je(last)?;
        a.mov(rcx, qword_ptr(rcx))?;
        a.mov(at(rdx, slot::STACK), rcx)?;
        a.mov(edi, dword_ptr(rsp + (frame.pushed - 16)))?;
        a.sub(edi, r11d)?;
        a.mov(at(rdx, slot::BEFORE), rdi)?;
        if filled == Filled::Pages {
            let mut is_array = a.create_label();
            a.test(ebx, KEPT_ARRAY)?;
            a.jne(is_array)?;
            self.list(a)?;
            a.jmp(publish)?;
            a.set_label(&mut is_array)?;
        }
        array(a)?;
        a.set_label(&mut publish)?;
        a.mov(at(rdx, slot::SEQUENCE), rax)?;
        a.jmp(next)?;
        a.set_label(&mut last)?;
        a.mov(dword_ptr(rdx + slot::HOOK as i32), frame.hook)?;
        a.mov(r9, rax)?;
        match filled {
            // The cache is that of any of them.
            Filled::Objects => a.mov(rax, qword_ptr(rbx))?,
            Filled::Pages => a.xor(eax, eax)?,
        }
        self.rest_of_result(a, frame)?;
        a.set_label(&mut done)
    }

    /// rsi: the first word of the array, or the first page's link, and r8 the list, of what rsi says; if there is any.
    fn begin_pages(&self, a: &mut CodeAssembler, none: CodeLabel) -> Result<(), IcedError> {
        let mut is_array = a.create_label();
        a.test(rsi, rsi)?;
        a.je(none)?;
        a.test(ebx, KEPT_ARRAY)?;
        a.jne(is_array)?;
        a.mov(r8, rsi)?;
        a.mov(rsi, qword_ptr(r8))?;
        a.cmp(rsi, r8)?;
        a.je(none)?;
        a.set_label(&mut is_array)?;
        // Links have no such bit.
        a.and(rsi, !KEPT_ARRAY)
    }

    /// rdx: where the return address is; rcx: the pair of words that is for the call with that.
    fn kept(&self, a: &mut CodeAssembler, frame: Frame) -> Result<(), IcedError> {
        a.lea(rdx, ptr(rsp + frame.pushed))?;
        a.mov(rax, rdx)?;
        a.shr(rax, slot::STACK_SHIFT)?;
        a.xor(eax, edx)?;
        a.and(eax, slot::ARRAYS_MASK as i32)?;
        a.mov(rcx, self.ring.0)?;
        a.lea(rcx, ptr(rcx + rax + slot::ARRAYS as i32))
    }

    /// The record in rdx has all of r11 folios from rsi on, each with its order.
    fn batch(&self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        let pages = &self.surroundings.pages;
        let [mut next, mut single] = std::array::from_fn(|_| a.create_label());
        a.lea(edi, ptr(r11 + 1))?;
        a.mov(at(rdx, slot::WORDS), rdi)?;
        a.lea(rdi, ptr(rdx + (slot::STACK as i32 + 8)))?;
        a.set_label(&mut next)?;
        a.mov(r10, qword_ptr(rsi))?;
        if let Some(order) = pages.order {
            a.mov(rcx, pages.head)?;
            a.test(at(r10, pages.flags as usize), rcx)?;
            a.je(single)?;
            a.movzx(ecx, byte_ptr(r10 + order as i32))?;
            a.and(ecx, ORDERS)?;
            a.or(r10, rcx)?;
            a.set_label(&mut single)?;
        }
        a.mov(qword_ptr(rdi), r10)?;
        a.add(rsi, 8)?;
        a.add(rdi, 8)?;
        a.sub(r11, 1)?;
        a.jne(next)
    }

    /// The record in rdx has up to [`PIECE`] pages from the link in rsi on, which is behind them then. Of r11 pages so many are left;
    /// none at the end of the list r8.
    fn list(&self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        let [mut next, mut over, mut full] = std::array::from_fn(|_| a.create_label());
        a.lea(rdi, ptr(rdx + (slot::STACK as i32 + 8)))?;
        a.mov(ecx, PIECE)?;
        a.set_label(&mut next)?;
        a.lea(r10, ptr(rsi - self.surroundings.pages.list as i32))?;
        a.mov(qword_ptr(rdi), r10)?;
        a.add(rdi, 8)?;
        a.mov(rsi, qword_ptr(rsi))?;
        a.sub(r11, 1)?;
        a.cmp(rsi, r8)?;
        a.je(over)?;
        a.test(r11, r11)?;
        a.je(full)?;
        a.sub(ecx, 1)?;
        a.jne(next)?;
        a.jmp(full)?;
        a.set_label(&mut over)?;
        a.xor(r11d, r11d)?;
        a.set_label(&mut full)?;
        a.sub(rdi, rdx)?;
        a.sub(edi, slot::STACK as i32)?;
        a.shr(edi, 3)?;
        a.mov(at(rdx, slot::WORDS), rdi)
    }
}

/// The record in rdx has up to [`PIECE`] words from rsi on, of r11; both are behind them then.
fn array(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut fits = a.create_label();
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
    copy(a)
}
