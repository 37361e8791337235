//! Where a Linux guest can keep references to heap objects, outside the objects themselves.
//!
//! Roots are regions of RAM: static data, every page that the kernel has in use and that belongs to no tracked
//! object, `struct page`s in use, and the live part of each stack. Never: free pages, user pages, page cache, page
//! tables, text; slab pages, which are read object by object; the dead part of stacks, where yesterday's pointers
//! hide today's leaks.

use super::dead_words::DeadWords;
use super::exception_stacks::exception_stacks;
use super::guest::{Extent, GuestMemory};
pub use super::region::Region;
use crate::arch::CpuState;
use crate::linux::pages::{PageMap, USES, Use};
use crate::linux::tasks::Task;
use crate::linux::{Linux, ModuleMap, interrupt_stack};
use crate::memory::{FrozenMemory, MemoryError, PAGE_SHIFT, PAGE_SIZE, Pa, Va};
use std::ops::Range;

/// Stacks of dead tasks kept by each CPU for reuse (`NR_CACHED_STACKS`, kernel/fork.c).
const CACHED_STACKS: u64 = 2;

/// Uses of pages that hold no roots; slab pages are read object by object.
const UNREAD_USES: [Use; 6] = [Use::Free, Use::User, Use::PageTable, Use::Text, Use::Slab, Use::None];

/// Memory next to the roots that is no root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unread {
    /// What it is.
    pub name: &'static str,
    /// Kernel addresses.
    pub ranges: Vec<Range<Va>>,
}

/// All roots in memory, and the stacks found on the way.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roots {
    /// Regions in the order in which they are read.
    pub regions: Vec<Region>,
    /// Starts of kernel stacks, of live tasks, of interrupts and kept for reuse: objects that are read as stacks or not at all.
    pub stacks: Vec<Va>,
    /// Starts of pages whose contents are dead, where somebody tracks pages.
    pub dead: Vec<Va>,
    /// Parts of stacks and of tables that are left out.
    pub unread: Vec<Unread>,
    /// RAM of each use of pages that is left out, in bytes; pages that are read as something else do not count.
    pub unread_pages: Vec<(Use, u64)>,
}

/// What [`Roots::collect`] needs to know.
pub struct RootInput<'a> {
    /// The guest.
    pub linux: &'a Linux,
    /// Its CPUs.
    pub cpus: &'a [CpuState],
    /// Its modules.
    pub modules: &'a ModuleMap,
    /// False: no stack is a root.
    pub stack: bool,
    /// False: slab pages are roots.
    pub slab: bool,
    /// What every frame is used for.
    pub uses: &'a PageMap,
    /// Memory of tracked objects that have whole pages: they are read as objects.
    pub objects: &'a [Extent],
    /// Frames of tracked blocks of pages and of every large kmalloc, ascending and disjoint: their `struct page`s are read
    /// with them.
    pub pages: &'a [Range<u64>],
    /// Cookies of tracked per-CPU objects, ascending and disjoint: they, too, are read as objects.
    pub percpu: &'a [Range<Va>],
}

impl Roots {
    /// Collects the roots of a frozen guest.
    ///
    /// # Errors
    /// A structure of the guest that is damaged, with its address.
    pub fn collect<M: FrozenMemory>(
        input: &RootInput<'_>,
        guest: &GuestMemory<'_, M>,
        memory: &M,
    ) -> Result<Self, MemoryError> {
        let linux = input.linux;
        let uses = input.uses;
        let mut claims = Claims { taken: vec![false; uses.uses.len()] };
        let mut roots = Self::default();
        claims.take(input.objects);
        roots.add_page_structs(input, guest, memory, &mut claims)?;
        roots.add_stacks(input, guest, memory, &mut claims)?;
        roots.dead = linux.rcu_free_pages(memory)?;
        let dead: Vec<Range<Va>> = roots.dead.iter().map(|&page| page..page + PAGE_SIZE).collect();
        dead.iter().for_each(|page| claims.take(&guest.extents(page.clone())));
        roots.leave("pages of pointers that kfree_rcu uses", dead);
        let mut records = Vec::new();
        for root in linux.static_roots(memory)? {
            let parts = root.parts().into_iter().flat_map(|part| guest.extents(aligned(part)));
            let extents = claims.without(&parts.collect::<Vec<_>>());
            // With what is not read: it shall not come back as reserved pages.
            claims.take(&guest.extents(aligned(root.range)));
            roots.add(root.name, extents);
            records.extend(root.unread);
        }
        roots.leave("records of the in-kernel kmemleak, and of the last TLB flushes", records);
        roots.add_percpu(input, guest, &mut claims);
        for (name, range) in input.modules.data() {
            let range = Va(range.start)..Va(range.end);
            roots.add(format!("module {name}"), guest.extents(aligned(range)));
        }
        roots.add("reserved pages".into(), claims.pages(uses, Use::Reserved));
        roots.add("kernel pages".into(), claims.pages(uses, Use::Kernel));
        if !input.slab {
            roots.add("slab pages".into(), claims.pages(uses, Use::Slab));
        }
        let unread = UNREAD_USES.into_iter().filter(|&usage| input.slab || usage != Use::Slab);
        let ram = claims.ram(uses, memory);
        roots.unread_pages = unread.map(|usage| (usage, ram[usage as usize])).collect();
        Ok(roots)
    }

    fn leave(&mut self, name: &'static str, ranges: Vec<Range<Va>>) {
        self.unread.push(Unread { name, ranges });
    }

    fn add(&mut self, name: String, extents: Vec<Extent>) {
        self.regions.push(Region { name, extents });
    }

    /// `struct page`s of frames in use. Those of slab pages are left out: what they refer to (the free list, the
    /// cache) is no object or is found elsewhere, and their vectors of cgroups are annotated; but slabs that are given back
    /// after a grace period are links of the list of all that waits for one. Left out are also the free lists that former
    /// slabs left there: the memory on them is somebody else's by now.
    fn add_page_structs<M: FrozenMemory>(
        &mut self,
        input: &RootInput<'_>,
        guest: &GuestMemory<'_, M>,
        memory: &M,
        claims: &mut Claims,
    ) -> Result<(), MemoryError> {
        let structs = input.linux.page_structs(memory)?;
        let (mut used, mut left, mut unused, mut links) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let freelist = |frame| input.linux.left_freelist(&structs, Va(guest.direct().start), frame);
        let entries = |frames: Range<u64>| {
            structs.base + frames.start * structs.size..structs.base + frames.end * structs.size
        };
        for range in memory.ranges() {
            let first = range.start.0 >> PAGE_SHIFT;
            let frames = first..first + (range.len >> PAGE_SHIFT);
            claims.take(&guest.extents(entries(frames.clone())));
            let in_use = |frame: &u64| {
                matches!(
                    input.uses.get(*frame),
                    Use::User | Use::PageTable | Use::Reserved | Use::Text | Use::Kernel
                )
            };
            let tracked = |frame: &u64| {
                let next = input.pages.partition_point(|run| run.start <= *frame);
                next.checked_sub(1).is_some_and(|run| input.pages[run].contains(frame))
            };
            let roots = frames.clone().filter(|frame| in_use(frame) && !tracked(frame));
            for run in runs(roots) {
                let first = left.len();
                left.extend(run.clone().filter_map(freelist));
                let parts = without(entries(run), &left[first..]);
                used.extend(parts.into_iter().flat_map(|part| guest.extents(part)));
            }
            for run in runs(frames.filter(|frame| !in_use(frame))) {
                let slabs = run.clone().filter(|frame| input.uses.get(*frame) == Use::Slab);
                let first = links.len();
                links.extend(slabs.filter_map(|frame| input.linux.rcu_link(&structs, frame)));
                unused.extend(without(entries(run), &links[first..]));
            }
        }
        used.extend(links.into_iter().flat_map(|link| guest.extents(link)));
        used.sort_by_key(|extent| extent.start);
        self.add("page structs".into(), used);
        self.leave("page structs of pages that are free or slabs", unused);
        self.leave("free lists of former slabs in page structs", left);
        Ok(())
    }

    /// Per-CPU memory that is allocated and belongs to no tracked object; what was given back keeps stale references.
    fn add_percpu<M: FrozenMemory>(
        &mut self,
        input: &RootInput<'_>,
        guest: &GuestMemory<'_, M>,
        claims: &mut Claims,
    ) {
        let (mut untracked, mut free) = (Vec::new(), Vec::new());
        for chunk in guest.percpu() {
            let allocated: Vec<Range<Va>> =
                chunk.objects().map(|(cookie, size)| cookie..cookie + size).collect();
            let parts: Vec<Range<Va>> = chunk
                .objects()
                .flat_map(|(cookie, size)| without(cookie..cookie + size, near(input.percpu, cookie, size)))
                .collect();
            let unused = without(chunk.cookie..chunk.cookie + chunk.size, &allocated);
            for &copy in &chunk.copies {
                claims.take(&guest.extents(copy..copy + chunk.size));
                let place = |part: &Range<Va>| {
                    let at = |cookie: Va| copy + (cookie - chunk.cookie);
                    aligned(at(part.start)..at(part.end))
                };
                free.extend(unused.iter().map(place));
                untracked.extend(parts.iter().flat_map(|part| guest.extents(place(part))));
            }
        }
        self.add("percpu chunks".into(), untracked);
        self.leave("percpu chunks, not allocated", free);
    }

    fn add_stacks<M: FrozenMemory>(
        &mut self,
        input: &RootInput<'_>,
        guest: &GuestMemory<'_, M>,
        memory: &M,
        claims: &mut Claims,
    ) -> Result<(), MemoryError> {
        let tasks = input.linux.tasks(memory)?;
        let cpus: Vec<Cpu> = input.cpus.iter().map(|c| Cpu::new(input.linux, memory, c)).collect();
        let words = DeadWords::of(input.linux);
        let (mut live, mut idle, mut dead, mut registers) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for task in tasks.iter().filter(|t| t.stack != Va(0)) {
            claims.take(&guest.extents(task.stack_range()));
            self.stacks.push(task.stack);
            let stack = task.stack_range();
            let part = live_part(task, &cpus).unwrap_or(stack.end..stack.end);
            let sleeping = words.as_ref().filter(|_| !task.on_cpu);
            let holes = sleeping.map_or_else(Vec::new, |words| words.of_task(memory, task));
            registers.extend(sleeping.into_iter().flat_map(|words| words.registers(memory, task)));
            idle.extend(without(stack, std::slice::from_ref(&part)));
            dead.extend(within(&part, &holes));
            live.extend(without(part, &holes));
        }
        let (mut interrupt, mut idle_interrupt) = (Vec::new(), Vec::new());
        for cpu in &cpus {
            claims.take(&guest.extents(cpu.interrupt_stack.clone()));
            if !cpu.interrupt_stack.is_empty() {
                // On arm64 it is a block of vmalloc's (arch/arm64/kernel/irq.c `init_irq_stacks`), full of stale words.
                self.stacks.push(cpu.interrupt_stack.start);
            }
            let part = cpu.live_interrupt_stack(&tasks);
            idle_interrupt.extend(without(cpu.interrupt_stack.clone(), std::slice::from_ref(&part)));
            interrupt.push(part);
        }
        let (mut exception, mut idle_exception) = (Vec::new(), Vec::new());
        for cpu in &cpus {
            let Some(stacks) = exception_stacks(input.linux, memory, cpu.state.index) else { continue };
            claims.take(&guest.extents(stacks.clone()));
            if cpu.in_exception(&tasks) { &mut exception } else { &mut idle_exception }.push(stacks);
        }
        let (size, mut kept) = (tasks.first().map_or(0, |t| t.stack_size), Vec::new());
        for stack in cached_stacks(input.linux, memory)? {
            claims.take(&guest.extents(stack..stack + size));
            self.stacks.push(stack);
            kept.push(stack..stack + size);
        }
        if input.stack {
            let extents =
                |ranges: Vec<Range<Va>>| ranges.into_iter().flat_map(|r| guest.extents(r)).collect();
            self.add("task stacks".into(), extents(live));
            self.add("interrupt stacks".into(), extents(interrupt));
            self.add("exception stacks".into(), extents(exception));
            if !registers.is_empty() {
                self.add("registers of sleeping tasks".into(), extents(registers));
            }
        } else {
            let all = live.into_iter().chain(interrupt).chain(exception).chain(registers);
            self.leave("stacks in use: stack=off", all.collect());
        }
        self.leave("dead words of sleeping tasks' stacks", dead);
        self.leave("task stacks, not in use", idle);
        self.leave("interrupt stacks, not in use", idle_interrupt);
        self.leave("exception stacks, not in use", idle_exception);
        self.leave("stacks kept for new tasks", kept);
        Ok(())
    }
}

/// One CPU and its interrupt stack.
struct Cpu {
    state: CpuState,
    /// The task it runs; 0 when that cannot be read.
    current: Va,
    /// Empty when the kernel has none or it is not set up yet.
    interrupt_stack: Range<Va>,
    /// Stack pointer of whatever was interrupted: the topmost word of the interrupt stack.
    interrupted: Va,
}

impl Cpu {
    fn new(linux: &Linux, memory: &impl FrozenMemory, state: &CpuState) -> Self {
        let current = linux.current(memory, state.index).unwrap_or_default();
        let found = interrupt_stack(linux, memory, state);
        let (interrupt_stack, interrupted) = found.unwrap_or((Va(0)..Va(0), Va(0)));
        Self { state: *state, current, interrupt_stack, interrupted }
    }

    /// Runs kernel code, so that its stack pointer is a kernel stack's.
    fn in_kernel(&self) -> bool {
        self.state.online && !self.state.user_mode
    }

    /// Runs kernel code on a stack that is no task's and not that of interrupts.
    fn in_exception(&self, tasks: &[Task]) -> bool {
        let sp = self.state.registers.sp();
        self.in_kernel()
            && !self.interrupt_stack.contains(&sp)
            && !tasks.iter().any(|task| task.stack_range().contains(&sp))
    }

    /// From the stack pointer up when the CPU is on its interrupt stack; all of it when the CPU is on a stack that is
    /// not known (an exception's), which may have interrupted an interrupt; else nothing.
    fn live_interrupt_stack(&self, tasks: &[Task]) -> Range<Va> {
        let sp = self.state.registers.sp();
        let Range { start, end } = self.interrupt_stack.clone();
        if !self.in_kernel() || tasks.iter().any(|t| t.stack_range().contains(&sp)) {
            return end..end;
        }
        if (start..end).contains(&sp) { aligned(sp..end) } else { start..end }
    }
}

/// The part of a task's stack that is in use; None when there is none.
///
/// A sleeping task's starts at its saved stack pointer. A running one's starts at its CPU's stack pointer, or where
/// that CPU switched to its interrupt stack. A CPU in user mode has left its task's kernel stack empty. In doubt (an
/// exception's stack, half a context switch) it is the whole stack.
fn live_part(task: &Task, cpus: &[Cpu]) -> Option<Range<Va>> {
    let stack = task.stack_range();
    let from = |sp: Va| Some(aligned(sp..stack.end));
    if !task.on_cpu {
        return from(if stack.contains(&task.saved_sp) { task.saved_sp } else { stack.start });
    }
    for cpu in cpus.iter().filter(|c| c.in_kernel()) {
        let sp = cpu.state.registers.sp();
        if stack.contains(&sp) {
            return from(sp);
        }
        if cpu.interrupt_stack.contains(&sp) && stack.contains(&cpu.interrupted) {
            return from(cpu.interrupted);
        }
    }
    let in_user_mode = |c: &Cpu| c.state.online && c.state.user_mode && c.current == task.va;
    if cpus.iter().any(in_user_mode) { None } else { Some(stack) }
}

/// Those of `ranges`, which are ascending and disjoint, that meet the `size` bytes from `start` on.
pub(super) fn near(ranges: &[Range<Va>], start: Va, size: u64) -> &[Range<Va>] {
    let first = ranges.partition_point(|r| r.end <= start);
    let end = ranges.partition_point(|r| r.start < start + size);
    ranges.get(first..end).unwrap_or_default()
}

/// The parts of `range` outside `holes`, which ascend.
pub(super) fn without(range: Range<Va>, holes: &[Range<Va>]) -> Vec<Range<Va>> {
    let mut left = Vec::with_capacity(holes.len() + 1);
    let mut at = range.start;
    for hole in holes.iter().filter(|hole| hole.start < range.end) {
        if at < hole.start {
            left.push(at..hole.start);
        }
        at = at.max(hole.end);
    }
    if at < range.end {
        left.push(at..range.end);
    }
    left
}

/// The parts of `holes` inside `range`.
fn within(range: &Range<Va>, holes: &[Range<Va>]) -> impl Iterator<Item = Range<Va>> {
    let cut = |hole: &Range<Va>| hole.start.max(range.start)..hole.end.min(range.end);
    holes.iter().map(cut).filter(|part| part.start < part.end)
}

/// Stacks of dead tasks that CPUs keep for new ones: what is on them is stale.
fn cached_stacks(linux: &Linux, memory: &impl FrozenMemory) -> Result<Vec<Va>, MemoryError> {
    let types = linux.kernel.types.as_ref();
    let Some(address) = types.and_then(|t| t.offset("vm_struct", "addr")) else { return Ok(Vec::new()) };
    let Some(offset) = linux.percpu_offset("cached_stacks") else {
        return Ok(Vec::new());
    };
    let mut stacks = Vec::new();
    for cpu in 0..linux.cpu_count(memory)? {
        let slots = linux.percpu_base(memory, cpu)? + offset;
        for slot in 0..CACHED_STACKS {
            let area = linux.read_u64(memory, slots + slot * 8)?;
            if area != 0 {
                stacks.push(Va(linux.read_u64(memory, Va(area) + address)?));
            }
        }
    }
    Ok(stacks)
}

/// Frames whose contents are spoken for.
struct Claims {
    taken: Vec<bool>,
}

impl Claims {
    /// Takes the frames that lie in `extents` as a whole.
    fn take(&mut self, extents: &[Extent]) {
        for extent in extents {
            let first = extent.start.0.div_ceil(PAGE_SIZE) as usize;
            let end = ((extent.start.0 + extent.len) >> PAGE_SHIFT) as usize;
            let end = end.min(self.taken.len());
            if first < end {
                self.taken[first..end].fill(true);
            }
        }
    }

    /// The parts of `extents` in frames that are not taken.
    fn without(&self, extents: &[Extent]) -> Vec<Extent> {
        let mut left: Vec<Extent> = Vec::new();
        for extent in extents {
            let (mut at, end) = (extent.start.0, extent.start.0 + extent.len);
            while at < end {
                let next = ((at | (PAGE_SIZE - 1)) + 1).min(end);
                let frame = (at >> PAGE_SHIFT) as usize;
                if !self.taken.get(frame).copied().unwrap_or(false) {
                    match left.last_mut() {
                        Some(last) if last.start.0 + last.len == at => last.len += next - at,
                        _ => left.push(Extent { start: Pa(at), len: next - at }),
                    }
                }
                at = next;
            }
        }
        left
    }

    /// RAM in frames of each use that are not taken, bytes.
    fn ram(&self, uses: &PageMap, memory: &impl FrozenMemory) -> [u64; USES] {
        let mut ram = [0; USES];
        for range in memory.ranges() {
            let clamp = |frame: u64| (frame as usize).min(uses.uses.len());
            let first = range.start.0 >> PAGE_SHIFT;
            let frames = clamp(first)..clamp(first + (range.len >> PAGE_SHIFT));
            let free =
                uses.uses[frames.clone()].iter().zip(&self.taken[frames]).filter(|(_, taken)| !**taken);
            free.for_each(|(usage, _)| ram[*usage as usize] += PAGE_SIZE);
        }
        ram
    }

    /// Frames of one use that are not taken.
    fn pages(&self, uses: &PageMap, wanted: Use) -> Vec<Extent> {
        let frames = uses.uses.iter().zip(&self.taken).enumerate();
        let free = frames.filter(|(_, (u, taken))| **u == wanted && !**taken).map(|(frame, _)| frame as u64);
        runs(free)
            .map(|run| Extent {
                start: Pa(run.start << PAGE_SHIFT),
                len: (run.end - run.start) << PAGE_SHIFT,
            })
            .collect()
    }
}

/// Joins ascending numbers to ranges.
fn runs(numbers: impl Iterator<Item = u64>) -> impl Iterator<Item = Range<u64>> {
    let mut numbers = numbers.peekable();
    std::iter::from_fn(move || {
        let start = numbers.next()?;
        let mut end = start + 1;
        while numbers.next_if_eq(&end).is_some() {
            end += 1;
        }
        Some(start..end)
    })
}

/// Aligned words lie at multiples of 8.
fn aligned(range: Range<Va>) -> Range<Va> {
    Va(range.start.0.checked_next_multiple_of(8).unwrap_or(u64::MAX)).min(range.end)..range.end
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Registers;
    use crate::memory::FlatMemory;

    const STACK: Va = Va(0xffff_c900_0001_0000);

    fn task(on_cpu: bool, saved_sp: u64) -> Task {
        Task {
            va: Va(0x1000),
            comm: [0; 16],
            pid: 1,
            stack: STACK,
            stack_size: 0x4000,
            saved_sp: Va(saved_sp),
            on_cpu,
            state: 'S',
        }
    }

    fn cpu(sp: u64, user_mode: bool, interrupted: u64) -> Cpu {
        let registers = Registers::with_sp(sp);
        let state = CpuState { registers, user_mode, online: true, ..CpuState::default() };
        let interrupt_stack = Va(0x8000)..Va(0xc000);
        Cpu { state, current: Va(0x1000), interrupt_stack, interrupted: Va(interrupted) }
    }

    #[test]
    fn stacks_are_read_from_the_stack_pointer_up() {
        let (sp, top) = (STACK.0 + 0x3e04, STACK + 0x4000);
        let live = Some(Va(sp + 4)..top);
        assert_eq!(live_part(&task(false, sp), &[]), live);
        assert_eq!(live_part(&task(false, 0x77), &[]), Some(STACK..top));
        assert_eq!(live_part(&task(true, 0), &[cpu(0x20, false, 0), cpu(sp, false, 0)]), live);
        assert_eq!(live_part(&task(true, 0), &[cpu(0x9000, false, sp)]), live);
        assert_eq!(live_part(&task(true, 0), &[cpu(0x20, false, sp)]), Some(STACK..top));
        assert_eq!(live_part(&task(true, 0), &[cpu(0x20, true, sp)]), None);
    }

    #[test]
    fn what_is_read_and_what_is_not_make_up_the_stack() {
        let part = |from, to| STACK + from..STACK + to;
        let holes = [part(0x100, 0x200), part(0x300, 0x310), part(0x3f00, 0x4100)];
        let live = part(0x180, 0x4000);
        assert_eq!(without(live.clone(), &holes), [part(0x200, 0x300), part(0x310, 0x3f00)]);
        let dead: Vec<_> = within(&live, &holes).collect();
        assert_eq!(dead, [part(0x180, 0x200), part(0x300, 0x310), part(0x3f00, 0x4000)]);
        assert_eq!(without(part(0, 0x4000), std::slice::from_ref(&live)), [part(0, 0x180)]);
        let none = part(0x4000, 0x4000);
        assert_eq!(without(part(0, 0x4000), std::slice::from_ref(&none)), [part(0, 0x4000)]);
        assert_eq!(within(&none, &holes).count(), 0);
    }

    #[test]
    fn interrupt_stack_is_read_only_while_in_use() {
        let tasks = [task(true, 0)];
        assert!(cpu(STACK.0 + 8, false, 0).live_interrupt_stack(&tasks).is_empty());
        assert!(cpu(0x9000, true, 0).live_interrupt_stack(&tasks).is_empty());
        assert_eq!(cpu(0x9004, false, 0).live_interrupt_stack(&tasks), Va(0x9008)..Va(0xc000));
        assert_eq!(cpu(0x20, false, 0).live_interrupt_stack(&tasks), Va(0x8000)..Va(0xc000));
        let cases =
            [(STACK.0 + 8, false, false), (0x9000, true, false), (0x9004, false, false), (0x20, false, true)];
        for (sp, user_mode, expected) in cases {
            assert_eq!(cpu(sp, user_mode, 0).in_exception(&tasks), expected, "{sp:#x}");
        }
    }

    #[test]
    fn tracked_parts_are_cut_out_of_an_allocation() {
        let ranges: Vec<Range<Va>> =
            [(0x10, 0x18), (0x20, 0x30), (0x40, 0x44)].map(|(a, b)| Va(a)..Va(b)).into();
        for (start, size, left) in [
            (0x10, 8, vec![]),
            (0x18, 8, vec![Va(0x18)..Va(0x20)]),
            (0x14, 0x40, vec![Va(0x18)..Va(0x20), Va(0x30)..Va(0x40), Va(0x44)..Va(0x54)]),
            (0x50, 4, vec![Va(0x50)..Va(0x54)]),
        ] {
            let cut = without(Va(start)..Va(start + size), near(&ranges, Va(start), size));
            assert_eq!(cut, left, "{start:#x}");
        }
    }

    #[test]
    fn claims_take_whole_frames_and_leave_the_rest() {
        let mut claims = Claims { taken: vec![false; 6] };
        claims.take(&[Extent { start: Pa(0xff8), len: 0x2010 }, Extent { start: Pa(0x5000), len: 0x9000 }]);
        assert_eq!(claims.taken, [false, true, true, false, false, true]);
        let left = claims.without(&[Extent { start: Pa(0x800), len: 0x6000 }]);
        let expected = [(0x800, 0x800), (0x3000, 0x2000), (0x6000, 0x800)];
        assert_eq!(left, expected.map(|(start, len)| Extent { start: Pa(start), len }));
        let uses = PageMap {
            uses: vec![Use::Kernel, Use::Kernel, Use::Free, Use::Kernel, Use::Kernel, Use::Kernel],
        };
        let memory = FlatMemory::new(vec![0; 0x5000]);
        let all = claims.ram(&uses, &memory);
        let ram = [Use::Kernel, Use::Free, Use::User].map(|usage| all[usage as usize]);
        assert_eq!(ram, [0x3000, 0, 0], "frame 2 is taken, frame 5 no RAM");
        let pages = claims.pages(&uses, Use::Kernel);
        assert_eq!(pages, [(0, 0x1000), (0x3000, 0x2000)].map(|(s, len)| Extent { start: Pa(s), len }));
    }
}
