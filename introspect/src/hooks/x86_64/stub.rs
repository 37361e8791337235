//! The code a jump leads to: writes one event into the ring and goes on as the kernel would have.
//!
//! It runs with interrupts off from the first to the last word it writes, so that nothing but an NMI comes in between and
//! the task stays on its CPU. It calls nothing and leaves registers, flags and stack as they were.

mod bulk;
mod path;

use super::jump::Jump;
use super::record as slot;
use crate::memory::{PAGE_SHIFT, PAGE_SIZE, Va};
use crate::unwind::{Detour, paths};
use anyhow::{Context, ensure};
use guest_profiles::hooks::Role;
use iced_x86::code_asm::{
    AsmMemoryOperand, AsmRegister64, CodeAssembler, CodeLabel, byte_ptr, dword_ptr, eax, ecx, edi, edx, ptr,
    qword_ptr, r8, r8d, r9, r10, r11, rax, rbp, rbx, rcx, rdi, rdx, rsi, rsp,
};
use iced_x86::{BlockEncoderOptions, IcedError, Instruction};

/// Words of the stack that are copied without a look at how many are left.
const BLOCK: i32 = 8;

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
    /// How the cache of an object is found.
    pub slabs: Slabs,
    /// How pages are passed.
    pub pages: Pages,
}

/// From an object to its slab cache, by the `struct page` of its page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slabs {
    /// Where the direct map of RAM begins.
    pub direct_map: Base,
    /// Its length, bytes.
    pub direct_map_len: u64,
    /// Where the array of `struct page`s begins.
    pub page_structs: Base,
    /// Size of one, a power of two.
    pub page_struct: u64,
    /// Offset in it.
    pub compound_head: u64,
    /// How it says that the page is a slab's.
    pub is_slab: IsSlab,
    /// Offset in it, or in what a slab has in its place.
    pub slab_cache: u64,
    /// Offset in `struct kmem_cache`.
    pub object_size: u64,
}

/// An address that is a constant, or in a variable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "what the names say")]
pub enum Base {
    Constant(Va),
    Variable(Va),
}

/// How a `struct page` says that the page is a slab's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IsSlab {
    /// One of these bits in the word at an offset.
    Flag(u64, u64),
    /// This byte at an offset.
    Byte(u64, u8),
}

/// Makes the stubs of one guest.
#[derive(Debug, Clone)]
pub struct Writer {
    /// Address of the ring's shared words.
    pub ring: Va,
    /// Number of slots, a power of two.
    pub slots: u64,
    /// Backtraces that stubs know.
    pub paths: paths::Place,
    /// The instruction by which the guest asks for free slots.
    pub trap: Vec<u8>,
    /// See there.
    pub surroundings: Surroundings,
}

/// Pages that are passed together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages {
    /// Offset in `struct page` of the list it is on.
    pub list: u64,
    /// Offset of its flags.
    pub flags: u64,
    /// The flag of the first page of a block of several.
    pub head: u64,
    /// From the first page to the byte that has such a block's order, where a kernel has that.
    pub order: Option<u64>,
    /// Offsets in `struct folio_batch`, where a kernel has that: of the number, a byte, and of the array of `struct folio *`.
    pub batch: Option<(u64, u64)>,
    /// True when `alloc_pages_bulk` has a list, or NULL, as its fifth argument, before the array.
    pub bulk_has_list: bool,
}

/// Where a stub belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// At a function's entry: three arguments and the caller; the function goes on at this address.
    Entry(Va),
    /// At the entry of one that gives many back: what these are.
    Free(Source, Va),
    /// At the entry of one that gets many: where it will put them, kept for the return.
    Fill(Filled, Va),
    /// At its return: the result, the context and the stack.
    Return,
    /// At the return of one that got many: these, and the context and the stack.
    Filled(Filled),
}

/// Where a call finds what it gives back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// In an array, its third argument; how many is the second.
    Array,
    /// In the `struct folio_batch` that is its argument.
    Batch,
    /// On the list of pages that is its argument.
    List,
}

/// What a call gets: as many as it returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// Objects of one cache, in an array, its fourth argument.
    Objects,
    /// Pages, in an array or on a list, its last arguments.
    Pages,
}

impl Point {
    /// Where the stub of a hook of that role belongs; `slide` is run-time minus link address.
    pub fn new(role: Role, jump: Jump, slide: u64) -> Self {
        let filled = match role {
            Role::BulkAlloc => Some(Filled::Objects),
            Role::PageBulkAlloc => Some(Filled::Pages),
            _ => None,
        };
        let source = match role {
            Role::BulkFree => Some(Source::Array),
            Role::PageBatchFree => Some(Source::Batch),
            Role::PageListFree => Some(Source::List),
            _ => None,
        };
        match jump {
            Jump::Return { .. } => filled.map_or(Self::Return, Self::Filled),
            Jump::Entry { va, len } => {
                let resume = va + slide + len as u64;
                match (filled, source) {
                    (Some(filled), _) => Self::Fill(filled, resume),
                    (_, Some(source)) => Self::Free(source, resume),
                    _ => Self::Entry(resume),
                }
            }
        }
    }

    /// Where the function goes on, if not where it returns to.
    fn resume(self) -> Option<Va> {
        match self {
            Self::Entry(resume) | Self::Free(_, resume) | Self::Fill(_, resume) => Some(resume),
            Self::Return | Self::Filled(_) => None,
        }
    }

    /// True when the stub writes a record.
    fn has_record(self) -> bool {
        !matches!(self, Self::Fill(..))
    }

    fn is_bulk(self) -> bool {
        !matches!(self, Self::Entry(_) | Self::Return)
    }

    /// The registers that its stub needs: rax and rcx first, as `Frame` has it.
    fn saved(self) -> Vec<AsmRegister64> {
        let more: &[AsmRegister64] = match self {
            Self::Entry(_) | Self::Fill(..) => &[],
            Self::Free(..) => &[rdi, rsi, r8, r10, r11],
            Self::Return => &[rdi, rsi, r8, r9, r10, r11],
            Self::Filled(_) => &[rdi, rsi, r8, r9, r10, r11, rbx],
        };
        [rax, rcx, rdx].iter().chain(more).copied().collect()
    }
}

/// A stub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stub {
    /// Address of its first byte.
    pub start: Va,
    /// Its code.
    pub code: Vec<u8>,
    /// Address of the trap in it by which it asks for a free slot, if it needs one: for the position in `rax`.
    pub request: Option<Va>,
    /// Address of another trap, where there is one: an event that the stub cannot write down. All registers are there what they
    /// are at the event but the instruction pointer.
    pub fallback: Option<Va>,
    /// What each of its instructions stands for.
    pub detours: Vec<Detour>,
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
        ensure!(!displaced.is_empty(), "A stub in the place of nothing");
        self.assemble(hook, point, displaced, start).context("Cannot assemble a stub")
    }

    fn assemble(
        &self,
        hook: u32,
        point: Point,
        displaced: &[Instruction],
        start: Va,
    ) -> anyhow::Result<Stub> {
        let mut a = CodeAssembler::new(64)?;
        let [mut again, mut full, mut missed, mut moved] = std::array::from_fn(|_| a.create_label());
        a.pushfq()?;
        a.cli()?;
        let saved = point.saved();
        for &register in &saved {
            a.push(register)?;
        }
        // Flags and registers lie above the stack pointer now.
        let first = displaced.first().map_or(0, Instruction::ip);
        let frame =
            Frame { hook: hook.cast_signed(), pushed: 8 * (saved.len() as i32 + 1), at: first as u32 };
        let mut room = Room { again: &mut again, full };
        match point {
            Point::Entry(_) => self.entry(&mut a, frame, &mut room)?,
            Point::Return => self.result(&mut a, frame, &mut room)?,
            Point::Free(source, _) => self.free(&mut a, frame, &mut room, source, missed)?,
            Point::Fill(filled, _) => self.fill(&mut a, frame, filled, missed)?,
            Point::Filled(filled) => self.filled(&mut a, frame, &mut room, filled, missed)?,
        }
        restore(&mut a, &saved)?;
        let first = Va(first);
        let mut stands: Vec<_> = depths(a.instructions(), 0).map(|pushed| (first, pushed)).collect();
        a.set_label(&mut moved)?;
        for &instruction in displaced {
            a.add_instruction(instruction)?;
            stands.push((Va(instruction.ip()), 0));
        }
        if let Some(resume) = point.resume() {
            a.jmp(resume.0)?;
            stands.push((resume, 0));
        }
        let elsewhere = a.instructions().len();
        if point.has_record() {
            a.set_label(&mut full)?;
            a.db(&self.trap)?;
            a.jmp(again)?;
        }
        let waits = a.instructions().len();
        if point.is_bulk() {
            a.set_label(&mut missed)?;
            restore(&mut a, &saved)?;
            a.db(&self.trap)?;
            a.jmp(moved)?;
        }
        let pushed = frame.pushed as u64;
        stands.extend((elsewhere..waits).map(|_| (first, pushed)));
        stands.extend(depths(&a.instructions()[waits..], pushed).map(|pushed| (first, pushed)));

        let result = a.assemble_options(start.0, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
        let offsets = &result.inner.new_instruction_offsets;
        ensure!(!offsets.contains(&u32::MAX), "Something is out of reach");
        let address = |index: usize| offsets.get(index).map(|&offset| start + u64::from(offset));
        let request = if point.has_record() { address(elsewhere) } else { None };
        let fallback = if point.is_bulk() { address(waits + saved.len() + 1) } else { None };
        let addresses = (0..offsets.len()).filter_map(address);
        let mut detours: Vec<Detour> =
            addresses.zip(stands).map(|(from, (to, pushed))| Detour { from, to, pushed }).collect();
        detours.dedup_by_key(|detour| (detour.to, detour.pushed));
        Ok(Stub { start, code: result.inner.code_buffer, request, fallback, detours })
    }

    /// Takes a position and waits for its slot: rdx: the slot; rax: its sequence; rcx: where the return address is, which is in
    /// the record then, as the hook is, with those `flags`.
    fn reserve(
        &self,
        a: &mut CodeAssembler,
        frame: Frame,
        room: &mut Room<'_>,
        flags: u32,
    ) -> Result<(), IcedError> {
        a.mov(rcx, self.ring.0)?;
        a.mov(eax, 1)?;
        a.lock().xadd(at(rcx, slot::HEAD as usize), rax)?;
        a.set_label(room.again)?;
        a.cmp(rax, at(rcx, slot::LIMIT as usize))?;
        a.jae(room.full)?;
        a.mov(edx, eax)?;
        a.and(edx, (self.slots - 1) as i32)?;
        a.shl(edx, slot::SLOT_LEN.trailing_zeros())?;
        a.lea(rdx, ptr(rcx + rdx + slot::SLOTS as i32))?;
        a.inc(rax)?;
        a.mov(dword_ptr(rdx + slot::HOOK as i32), frame.hook | flags.cast_signed())?;
        a.lea(rcx, ptr(rsp + frame.pushed))?;
        a.mov(at(rdx, slot::RSP), rcx)
    }

    /// The record of an entry.
    fn entry(&self, a: &mut CodeAssembler, frame: Frame, room: &mut Room<'_>) -> Result<(), IcedError> {
        self.reserve(a, frame, room, 0)?;
        a.mov(at(rdx, slot::RDI), rdi)?;
        a.mov(at(rdx, slot::RSI), rsi)?;
        a.mov(rcx, qword_ptr(rcx))?;
        a.mov(at(rdx, slot::STACK), rcx)?;
        a.mov(rcx, qword_ptr(rsp))?;
        a.mov(at(rdx, slot::RDX), rcx)?;
        a.mov(at(rdx, slot::SEQUENCE), rax)
    }

    /// The record of a return, whose result is the object.
    fn result(&self, a: &mut CodeAssembler, frame: Frame, room: &mut Room<'_>) -> Result<(), IcedError> {
        self.reserve(a, frame, room, 0)?;
        a.mov(r9, rax)?;
        a.mov(rax, frame.result())?;
        self.rest_of_result(a, frame)
    }

    /// That, with its result in rax and its sequence in r9.
    fn rest_of_result(&self, a: &mut CodeAssembler, frame: Frame) -> Result<(), IcedError> {
        let mut done = a.create_label();
        a.mov(at(rdx, slot::RAX), rax)?;
        a.mov(at(rdx, slot::RBP), rbp)?;
        // Of pages it is none.
        self.cache(a)?;
        self.context(a)?;
        self.path(a, frame, done)?;
        self.stack(a, &mut done)?;
        a.mov(at(rdx, slot::SEQUENCE), r9)
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

    /// The cache of the object in rax, as it is now: by the time the record is read, its page may be another cache's.
    fn cache(&self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        let slabs = &self.surroundings.slabs;
        let (mut head, mut none) = (a.create_label(), a.create_label());
        a.mov(qword_ptr(rdx + slot::CACHE as i32), 0)?;
        load(a, slabs.direct_map)?;
        a.sub(rax, rdi)?;
        a.mov(rdi, slabs.direct_map_len)?;
        a.cmp(rax, rdi)?;
        a.jae(none)?;
        a.shr(rax, PAGE_SHIFT)?;
        a.shl(rax, slabs.page_struct.trailing_zeros())?;
        load(a, slabs.page_structs)?;
        a.add(rax, rdi)?;
        a.mov(rdi, at(rax, slabs.compound_head as usize))?;
        a.test(edi, 1)?;
        a.je(head)?;
        a.lea(rax, ptr(rdi - 1))?;
        a.set_label(&mut head)?;
        match slabs.is_slab {
            IsSlab::Flag(offset, bits) => {
                a.mov(rdi, bits)?;
                a.test(at(rax, offset as usize), rdi)?;
                a.je(none)?;
            }
            IsSlab::Byte(offset, value) => {
                a.cmp(byte_ptr(rax + offset as i32), u32::from(value))?;
                a.jne(none)?;
            }
        }
        a.mov(rax, at(rax, slabs.slab_cache as usize))?;
        a.test(rax, rax)?;
        a.je(none)?;
        a.mov(at(rdx, slot::CACHE), rax)?;
        a.mov(eax, dword_ptr(rax + slabs.object_size as i32))?;
        a.mov(dword_ptr(rdx + slot::OBJECT_SIZE as i32), eax)?;
        a.set_label(&mut none)
    }

    /// Copies the stack from rcx on, of the task in rsi: to its top, or, on a stack of the CPU's, to the end of the page,
    /// behind which there may be nothing. The last word of that is the stack pointer of whom an interrupt came upon
    /// (arch/x86/include/asm/irq_stack.h), and of that stack, too, what there is room for is copied. Where the task's own has
    /// no room, its outermost words are copied like those. Goes on at `done`, which is behind it.
    fn stack(&self, a: &mut CodeAssembler, done: &mut CodeLabel) -> Result<(), IcedError> {
        let around = &self.surroundings;
        let [mut own, mut fits, mut all] = std::array::from_fn(|_| a.create_label());
        let size = i32::try_from(around.stack_size).unwrap_or(0);
        a.xor(r8d, r8d)?;
        a.mov(dword_ptr(rdx + slot::INTERRUPTED_WORDS as i32), r8d)?;
        a.mov(rax, rcx)?;
        a.sub(rax, qword_ptr(rsi + around.stack as i32))?;
        a.mov(edi, size)?;
        a.cmp(rax, rdi)?;
        a.jb(own)?;
        a.mov(rax, rcx)?;
        a.or(rax, PAGE_SIZE as i32 - 8)?;
        a.mov(r8, qword_ptr(rax))?;
        a.mov(edi, PAGE_SIZE as i32)?;
        a.mov(eax, ecx)?;
        a.and(eax, PAGE_SIZE as i32 - 1)?;
        a.set_label(&mut own)?;
        // edi: bytes from there to the end.
        a.sub(edi, eax)?;
        a.shr(edi, 3)?;
        a.cmp(edi, slot::MAX_WORDS as i32)?;
        a.jbe(fits)?;
        a.mov(edi, slot::MAX_WORDS as i32)?;
        a.test(r8, r8)?;
        a.jne(fits)?;
        a.mov(edi, (slot::MAX_WORDS - slot::OUTERMOST_WORDS) as i32)?;
        a.mov(r8, qword_ptr(rsi + around.stack as i32))?;
        a.add(r8, size - slot::OUTERMOST as i32)?;
        a.set_label(&mut fits)?;
        a.mov(at(rdx, slot::INTERRUPTED), r8)?;
        a.mov(dword_ptr(rdx + slot::WORDS as i32), edi)?;
        // rax: the task's stack.
        a.mov(rax, qword_ptr(rsi + around.stack as i32))?;
        a.mov(rsi, rcx)?;
        a.mov(ecx, edi)?;
        a.lea(rdi, ptr(rdx + slot::STACK as i32))?;
        copy(a)?;

        a.mov(rsi, r8)?;
        a.sub(r8, rax)?;
        a.cmp(r8, size)?;
        a.jae(*done)?;
        a.mov(eax, size)?;
        a.sub(eax, r8d)?;
        a.shr(eax, 3)?;
        a.mov(ecx, slot::MAX_WORDS as i32)?;
        a.sub(ecx, dword_ptr(rdx + slot::WORDS as i32))?;
        a.cmp(ecx, eax)?;
        a.jbe(all)?;
        a.mov(ecx, eax)?;
        a.set_label(&mut all)?;
        a.mov(dword_ptr(rdx + slot::INTERRUPTED_WORDS as i32), ecx)?;
        a.rep().movsq()?;
        a.set_label(done)
    }
}

/// What a stub's code has to know of it.
#[derive(Clone, Copy)]
struct Frame {
    hook: i32,
    /// Bytes that it has pushed.
    pushed: i32,
    /// Low half of the address of the code that the stub stands for.
    at: u32,
}

impl Frame {
    /// Where the function's result is, the first register pushed.
    fn result(self) -> AsmMemoryOperand {
        qword_ptr(rsp + (self.pushed - 16))
    }

    /// Where its fourth argument is, the second register pushed.
    fn fourth(self) -> AsmMemoryOperand {
        qword_ptr(rsp + (self.pushed - 24))
    }
}

/// Where a stub waits for a free slot.
struct Room<'a> {
    /// And looks again.
    again: &'a mut CodeLabel,
    /// And asks for one.
    full: CodeLabel,
}

/// Gives the guest its registers and flags back.
fn restore(a: &mut CodeAssembler, saved: &[AsmRegister64]) -> Result<(), IcedError> {
    for &register in saved.iter().rev() {
        a.pop(register)?;
    }
    a.popfq()
}

/// Copies ecx words from rsi to rdi and leaves both behind them: by blocks, for an emulated processor is at work on each word
/// of a string instruction for longer than on two moves.
fn copy(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut block, mut rest) = (a.create_label(), a.create_label());
    a.sub(ecx, BLOCK)?;
    a.jb(rest)?;
    a.set_label(&mut block)?;
    for offset in (0..8 * BLOCK).step_by(8) {
        a.mov(r10, qword_ptr(rsi + offset))?;
        a.mov(qword_ptr(rdi + offset), r10)?;
    }
    a.add(rsi, 8 * BLOCK)?;
    a.add(rdi, 8 * BLOCK)?;
    a.sub(ecx, BLOCK)?;
    a.jae(block)?;
    a.set_label(&mut rest)?;
    a.add(ecx, BLOCK)?;
    a.rep().movsq()
}

/// Bytes that are on the stack before each of these instructions, which run one after the other, `before` them at first.
fn depths(instructions: &[Instruction], before: u64) -> impl Iterator<Item = u64> {
    let pushes = instructions.iter().map(|instruction| -i64::from(instruction.stack_pointer_increment()));
    pushes.scan(before, |depth, push| Some(std::mem::replace(depth, depth.wrapping_add_signed(push))))
}

/// An address into rdi.
fn load(a: &mut CodeAssembler, base: Base) -> Result<(), IcedError> {
    match base {
        Base::Constant(va) => a.mov(rdi, va.0),
        Base::Variable(va) => a.mov(rdi, qword_ptr(va.0)),
    }
}

fn at(base: iced_x86::code_asm::AsmRegister64, offset: usize) -> AsmMemoryOperand {
    qword_ptr(base + offset as i32)
}
