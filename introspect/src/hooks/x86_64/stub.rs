//! The code a jump leads to: writes one event into the ring and goes on as the kernel would have.
//!
//! It runs with interrupts off from the first to the last word it writes, so that nothing but an NMI comes in between and
//! the task stays on its CPU. It calls nothing and leaves registers, flags and stack as they were.

use super::record as slot;
use crate::memory::{PAGE_SIZE, Va};
use anyhow::{Context, ensure};
use iced_x86::code_asm::{
    AsmMemoryOperand, CodeAssembler, dword_ptr, eax, edx, esi, ptr, qword_ptr, r8, rax, rbp, rcx, rdi, rdx,
    rsi, rsp,
};
use iced_x86::{BlockEncoderOptions, IcedError, Instruction};

/// What stubs read of where an event happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Surroundings {
    /// Per-CPU offset of the pointer to the running task.
    pub current: u64,
    /// Per-CPU offset of `preempt_count`.
    pub preempt_count: u64,
    /// Offsets in `struct task_struct`.
    pub softirq_disable_cnt: Option<u64>,
    /// See there.
    pub comm: u64,
    /// See there.
    pub pid: u64,
    /// See there.
    pub stack: u64,
    /// Bytes of a task's stack.
    pub stack_size: u64,
    /// Address of `jiffies_64`.
    pub jiffies: Va,
}

/// Makes the stubs of one guest.
#[derive(Debug, Clone)]
pub struct Writer {
    /// Address of the ring's shared words.
    pub ring: Va,
    /// Number of slots, a power of two.
    pub slots: u64,
    /// The instruction by which the guest asks for free slots.
    pub trap: Vec<u8>,
    /// See there.
    pub surroundings: Surroundings,
}

/// Where a stub belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// At a function's entry: two arguments and the caller; the function goes on at this address.
    Entry(Va),
    /// At its return: the result, the context and the stack.
    Return,
}

/// A stub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stub {
    /// Address of its first byte.
    pub start: Va,
    /// Its code.
    pub code: Vec<u8>,
    /// Address of the trap in it. A trap there leaves the position that has no free slot in `rax`.
    pub trap: Va,
}

impl Writer {
    /// The stub of `hook`, at `start`, in the place of `displaced`.
    ///
    /// # Errors
    /// Something is out of an instruction's reach.
    pub fn stub(
        &self,
        hook: u32,
        point: Point,
        displaced: &[Instruction],
        start: Va,
    ) -> anyhow::Result<Stub> {
        ensure!(self.slots.is_power_of_two() && self.slots < 1 << 21, "A ring of {} slots", self.slots);
        let (code, trap) = self.assemble(hook, point, displaced, start).context("Cannot assemble a stub")?;
        Ok(Stub { start, code, trap: Va(trap) })
    }

    fn assemble(
        &self,
        hook: u32,
        point: Point,
        displaced: &[Instruction],
        start: Va,
    ) -> Result<(Vec<u8>, u64), IcedError> {
        let mut a = CodeAssembler::new(64)?;
        let is_return = point == Point::Return;
        let (mut again, mut full) = (a.create_label(), a.create_label());
        a.pushfq()?;
        a.cli()?;
        let mut saved = vec![rax, rcx, rdx];
        if is_return {
            saved.extend([rdi, rsi, r8]);
        }
        for &register in &saved {
            a.push(register)?;
        }
        // Flags and registers lie above the stack pointer now.
        let pushed = 8 * (saved.len() as i32 + 1);

        a.mov(rcx, self.ring.0)?;
        a.mov(eax, 1)?;
        a.lock().xadd(at(rcx, slot::HEAD as usize), rax)?;
        a.set_label(&mut again)?;
        a.cmp(rax, at(rcx, slot::LIMIT as usize))?;
        a.jae(full)?;
        // rdx: the slot; rax: its sequence; rcx: where the return address is.
        a.mov(edx, eax)?;
        a.and(edx, (self.slots - 1) as i32)?;
        a.shl(edx, slot::SLOT_LEN.trailing_zeros())?;
        a.lea(rdx, ptr(rcx + rdx + slot::SLOTS as i32))?;
        a.inc(rax)?;
        a.mov(dword_ptr(rdx + slot::HOOK as i32), hook.cast_signed())?;
        a.lea(rcx, ptr(rsp + pushed))?;
        a.mov(at(rdx, slot::RSP), rcx)?;
        if is_return {
            a.mov(r8, rax)?;
            a.mov(rax, qword_ptr(rsp + (pushed - 16)))?;
            a.mov(at(rdx, slot::RAX), rax)?;
            a.mov(at(rdx, slot::RBP), rbp)?;
            self.context(&mut a)?;
            self.stack(&mut a)?;
            a.mov(at(rdx, slot::SEQUENCE), r8)?;
        } else {
            a.mov(at(rdx, slot::RDI), rdi)?;
            a.mov(at(rdx, slot::RSI), rsi)?;
            a.mov(rcx, qword_ptr(rcx))?;
            a.mov(at(rdx, slot::STACK), rcx)?;
            a.mov(at(rdx, slot::SEQUENCE), rax)?;
        }
        for &register in saved.iter().rev() {
            a.pop(register)?;
        }
        a.popfq()?;
        for &instruction in displaced {
            a.add_instruction(instruction)?;
        }
        if let Point::Entry(resume) = point {
            a.jmp(resume.0)?;
        }
        a.set_label(&mut full)?;
        a.db(&self.trap)?;
        a.jmp(again)?;

        let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
        let result = a.assemble_options(start.0, options)?;
        let trap = result.label_ip(&full)?;
        Ok((result.inner.code_buffer, trap))
    }

    /// Time, and who runs. Leaves the task in rsi.
    fn context(&self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        let around = &self.surroundings;
        a.mov(rax, qword_ptr(around.jiffies.0))?;
        a.mov(at(rdx, slot::JIFFIES), rax)?;
        a.mov(eax, dword_ptr(around.preempt_count).gs())?;
        a.mov(dword_ptr(rdx + slot::PREEMPT_COUNT as i32), eax)?;
        a.mov(rsi, qword_ptr(around.current).gs())?;
        for half in [0, 8] {
            a.mov(rax, qword_ptr(rsi + (around.comm as i32 + half)))?;
            a.mov(qword_ptr(rdx + (slot::COMM as i32 + half)), rax)?;
        }
        a.mov(eax, dword_ptr(rsi + around.pid as i32))?;
        a.mov(dword_ptr(rdx + slot::PID as i32), eax)?;
        if let Some(offset) = around.softirq_disable_cnt {
            a.mov(eax, dword_ptr(rsi + offset as i32))?;
            a.mov(dword_ptr(rdx + slot::SOFTIRQS as i32), eax)?;
        }
        Ok(())
    }

    /// Copies the stack from rcx on, of the task in rsi: to its top, or, on a stack of the CPU's, to the end of the page,
    /// behind which there may be nothing.
    fn stack(&self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        let around = &self.surroundings;
        let (mut own, mut fits) = (a.create_label(), a.create_label());
        a.mov(rax, rcx)?;
        a.sub(rax, qword_ptr(rsi + around.stack as i32))?;
        a.mov(esi, around.stack_size as i32)?;
        a.cmp(rax, rsi)?;
        a.jb(own)?;
        a.mov(esi, PAGE_SIZE as i32)?;
        a.and(eax, PAGE_SIZE as i32 - 1)?;
        a.set_label(&mut own)?;
        // esi: bytes from there to the end.
        a.sub(esi, eax)?;
        a.shr(esi, 3)?;
        a.cmp(esi, slot::MAX_WORDS as i32)?;
        a.jbe(fits)?;
        a.mov(esi, slot::MAX_WORDS as i32)?;
        a.set_label(&mut fits)?;
        a.mov(dword_ptr(rdx + slot::WORDS as i32), esi)?;
        a.xchg(rcx, rsi)?;
        a.lea(rdi, ptr(rdx + slot::STACK as i32))?;
        a.rep().movsq()
    }
}

fn at(base: iced_x86::code_asm::AsmRegister64, offset: usize) -> AsmMemoryOperand {
    qword_ptr(base + offset as i32)
}
