//! From the registers at a hook to the registry.
//!
//! Order on several vCPUs: a free is recorded before the guest gives the memory back, an allocation after it was
//! made, both under one lock while the vCPU waits. So when one vCPU frees an object and another gets the same memory,
//! the registry sees them in the guest's order without any lock in the guest.

use super::bulk::{Arrived, Destination};
use super::log::{EventLog, Writing};
use crate::machine::GuestRam;
use anyhow::Result;
use guest_profiles::hooks::Role;
use introspect::accounting::growth::FreedBy;
use introspect::arch::Registers;
use introspect::hooks::record::Record;
use introspect::linux::vmalloc::VM_MAP;
use introspect::linux::{Linux, ModuleMap, PagePlaces, pages, percpu};
use introspect::memory::{MemoryError, PAGE_SIZE, PhysicalMemory, Va};
use introspect::registry::{AllocEvent, Kind, MAX_DEVICE, MAX_FRAMES, Object, Paint, Registry, StackId};
use introspect::unwind::{Memo, Text, Unwinder};
use rustc_hash::FxHashMap;
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// Most allocator calls under way at once: one per task, and a few per vCPU in interrupts. A guest that enters them and
/// never returns ends there.
const MAX_PENDING: usize = 1 << 20;

/// ZERO_SIZE_PTR and NULL (include/linux/slab.h), and error pointers (include/linux/err.h).
fn is_object(address: u64) -> bool {
    address > 16 && address < (-4095_i64) as u64
}

/// Where an event is looked at: all but its registers.
#[derive(Clone, Copy)]
pub enum Moment<'a> {
    /// While the vCPU stands there.
    Now {
        /// It.
        cpu: usize,
    },
    /// Later, as a stub wrote it down; the guest has gone on.
    Past(&'a Record<'a>),
}

/// What changes with every event.
#[derive(Default)]
pub struct State {
    /// Live objects.
    pub registry: Registry,
    /// Who frees them.
    pub freed_by: FreedBy,
    /// Allocator calls between their entry and their return, by stack pointer at entry: the argument that the return needs.
    pub(super) pending: FxHashMap<u64, u64>,
    /// What stubs saw that such calls got.
    pub(super) arrived: Arrived,
}

impl State {
    /// One that was saved; no call is under way in it.
    pub fn restored(registry: Registry, freed_by: FreedBy) -> Self {
        Self { registry, freed_by, ..Self::default() }
    }

    /// Records a free, and by whom; returns what it was.
    fn free(&mut self, address: Va, caller: Va) -> Option<Object> {
        let object = self.registry.free(address)?;
        self.freed_by.note(object.stack, caller);
        Some(object)
    }

    /// Forgets all objects and all calls under way.
    pub fn reset(&mut self) {
        self.registry.clear();
        self.pending.clear();
        self.arrived.clear();
    }
}

/// Keeps the registry from the registers at hooks.
pub struct Recorder {
    pub(super) linux: Arc<Linux>,
    pub(super) ram: GuestRam,
    text: Text,
    /// Modules seen so far.
    pub modules: RwLock<ModuleMap>,
    state: Mutex<State>,
    /// Numbers of the backtraces seen, while the modules are the same.
    pub(super) memo: Mutex<Memo<StackId>>,
    enabled: AtomicBool,
    log: Option<EventLog>,
    /// The page allocator's bulk call takes a list, too, as before 6.14.
    bulk_list: bool,
}

impl Recorder {
    /// A recorder with an empty registry.
    ///
    /// # Errors
    /// The image does not say where its code is.
    pub fn new(linux: Arc<Linux>, ram: GuestRam) -> Result<Self> {
        let text = Text::recover(&linux.kernel.image, &linux.kernel.symbols)?;
        Ok(Self {
            bulk_list: linux.bulk_has_list(),
            linux,
            ram,
            text,
            modules: RwLock::default(),
            state: Mutex::default(),
            memo: Mutex::new(Memo::new(MAX_FRAMES)),
            enabled: AtomicBool::new(true),
            log: None,
        })
    }

    /// The same that writes its events down, too.
    pub fn with_log(self, log: Option<EventLog>) -> Self {
        Self { log, ..self }
    }

    /// The turn to write an event down, if that is wanted: taken before the registry changes, so that its order is the
    /// log's. Modules are locked before the state elsewhere: here, one after the other.
    fn turn(&self) -> Option<MutexGuard<'_, Writing<File>>> {
        self.log.as_ref().map(EventLog::turn)
    }

    /// Has everything in the log's file that was written so far.
    pub fn flush_log(&self) {
        if let Some(mut log) = self.turn() {
            log.flush();
        }
    }

    /// Unwinds stacks of this guest.
    pub fn unwinder(&self) -> Unwinder<'_> {
        Unwinder::new(self.linux.kernel.orc.as_ref(), self.text, self.linux.placement.slide)
    }

    /// The registry, locked: events wait.
    pub fn state(&self) -> MutexGuard<'_, State> {
        // A panic of another thread while it held the lock ends the process anyway.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops or resumes recording (`off`, `on`).
    pub fn enable(&self, on: bool) {
        self.enabled.store(on, Ordering::SeqCst);
    }

    /// True while events are recorded.
    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::SeqCst)
    }

    /// At a function's entry, arguments still in their registers, the stack pointer as the caller left it.
    pub fn entered(&self, role: Role, argument: u8, registers: &Registers, moment: Moment<'_>) {
        let value = registers.argument(argument);
        match role {
            Role::ModuleLoad => return self.module_loaded(Va(value)),
            Role::ModuleUnload => return self.module_unloaded(Va(value)),
            _ if !self.enabled() => return,
            _ => {}
        }
        match role {
            Role::Free | Role::Vfree => self.free(value, || self.caller(registers, moment)),
            Role::BulkFree => self.bulk_free(
                registers.argument(1),
                Va(registers.argument(2)),
                self.caller(registers, moment),
            ),
            Role::RcuFree => self.rcu_free(registers.argument(0), registers.argument(1)),
            Role::BulkAlloc => self.pend(registers, registers.argument(3)),
            Role::LargeAlloc | Role::Vmalloc | Role::PercpuAlloc => {
                self.pend(registers, registers.argument(0))
            }
            Role::Ioremap => self.pend(registers, registers.argument(1)),
            // Where the profile says which argument has flags.
            Role::Vmap if argument != 0 && value & VM_MAP == 0 => {}
            Role::Vmap => self.pend(registers, (registers.argument(1) & 0xffff_ffff) * PAGE_SIZE),
            Role::PageAlloc => self.pend(registers, registers.argument(1) & 0xffff_ffff),
            Role::PageBulkAlloc => self.pend(
                registers,
                Destination::at(registers.argument(4), registers.argument(5), self.bulk_list).0,
            ),
            Role::PageFree => {
                let order = registers.argument(argument + 1) & 0xffff_ffff;
                self.free_pages(|_| Ok(vec![(Va(value), order)]));
            }
            Role::PageListFree => self.free_pages(|recorder| {
                let pages = recorder.linux.pages_on_list(&recorder.ram, Va(value))?;
                Ok(pages.into_iter().map(|page| (page, 0)).collect())
            }),
            Role::PageBatchFree => {
                self.free_pages(|recorder| recorder.linux.pages_in_batch(&recorder.ram, Va(value)));
            }
            Role::NotLeak | Role::Ignore | Role::NoScan | Role::ScanArea => {
                self.annotated(role, Va(value), registers.argument(argument + 1));
            }
            Role::SlabAlloc
            | Role::Kmalloc
            | Role::Patching
            | Role::Patched
            | Role::ModuleLoad
            | Role::ModuleUnload => {}
        }
    }

    /// At a function's return: the stack pointer is that of the entry again, the result in its register.
    pub fn returned(&self, role: Role, registers: &Registers, moment: Moment<'_>) {
        if !self.enabled() {
            return;
        }
        let result = registers.result();
        match role {
            Role::SlabAlloc | Role::Kmalloc if is_object(result) => self.slab_alloc(role, registers, moment),
            Role::LargeAlloc | Role::Vmalloc | Role::Vmap | Role::PercpuAlloc | Role::Ioremap => {
                let size = self.state().pending.remove(&registers.sp().0);
                if let (true, Some(size)) = (is_object(result), size) {
                    self.block(role, size, registers, moment);
                }
            }
            Role::BulkAlloc => self.bulk_alloc(registers, moment),
            Role::PageAlloc => {
                let order = self.state().pending.remove(&registers.sp().0);
                if let (true, Some(order)) = (is_object(result), order) {
                    self.pages(&[Va(result)], order, false, registers, moment);
                }
            }
            Role::PageBulkAlloc => self.bulk_pages(registers, moment),
            _ => {}
        }
    }

    /// Keeps an argument, or what else the return of the call needs that begins with these registers.
    pub(super) fn pend(&self, registers: &Registers, value: u64) {
        let mut state = self.state();
        if state.pending.len() >= MAX_PENDING {
            state.registry.counters.dropped += 1;
            return;
        }
        state.pending.insert(registers.sp().0, value);
    }

    /// Records an allocation that is one, as the registry says.
    pub(super) fn alloc(&self, event: &AllocEvent<'_>, is_one: impl FnOnce(&Registry) -> bool) {
        let turn = self.turn();
        let frames = {
            let registry = &mut self.state().registry;
            if !is_one(registry) {
                return;
            }
            registry.alloc(event);
            turn.as_ref().map(|_| registry.frames(&event.stack).to_vec())
        };
        if let (Some(mut log), Some(frames)) = (turn, frames) {
            let cache = (event.kind == Kind::Slab).then(|| self.linux.cache(&self.ram, event.cache).ok());
            log.alloc(event, &frames, cache.flatten().map(|cache| cache.name), |ip| self.name(ip));
        }
    }

    /// `name+0xOFF/0xSIZE [module]` of a code address, as it is now.
    pub fn name(&self, va: Va) -> Option<String> {
        let modules = self.modules.read().unwrap_or_else(PoisonError::into_inner);
        self.linux.resolve(&modules, va, u64::MAX).map(|resolved| resolved.to_string())
    }

    fn slab_alloc(&self, role: Role, registers: &Registers, moment: Moment<'_>) {
        let address = Va(registers.result());
        match self.cache(address, moment) {
            Ok(Some((cache, size))) => {
                let origin = self.origin(registers, moment);
                self.alloc(&origin.event(address, size, Kind::Slab, cache), |_| true);
            }
            // Larger than the largest cache: the hook of large allocations has it already.
            Ok(None) if role == Role::Kmalloc => {}
            Ok(None) | Err(_) => self.lost(),
        }
    }

    /// The cache of an object and the size of its objects, as they are at that moment.
    pub(super) fn cache(&self, object: Va, moment: Moment<'_>) -> Result<Option<(Va, u64)>, MemoryError> {
        let cache = match moment {
            Moment::Now { .. } => self.linux.cache_of(&self.ram, object)?,
            Moment::Past(record) => return Ok(record.cache()),
        };
        let Some(cache) = cache else { return Ok(None) };
        Ok(Some((cache, self.linux.cache_object_size(&self.ram, cache)?)))
    }

    fn block(&self, role: Role, size: u64, registers: &Registers, moment: Moment<'_>) {
        let ram = self.ram.ranges().iter().map(|range| range.len).sum();
        // Device memory may begin anywhere in a page; what is unmapped is the page.
        let is_device = role == Role::Ioremap;
        let in_direct_map =
            |places: PagePlaces| registers.result().wrapping_sub(places.direct.0) < places.end.0;
        if is_device && self.linux.page_places(&self.ram).is_ok_and(in_direct_map) {
            return self.lost();
        }
        let inside = if is_device { registers.result() % PAGE_SIZE } else { 0 };
        let Some((kind, size)) = block_of(role, size.saturating_add(inside), ram) else { return self.lost() };
        let origin = self.origin(registers, moment);
        self.alloc(&origin.event(Va(registers.result() - inside), size, kind, Va(0)), |_| true);
    }

    /// Records blocks of pages by their `struct page`s. `only_new`: those that are live already stay as they are.
    pub(super) fn pages(
        &self,
        pages: &[Va],
        order: u64,
        only_new: bool,
        registers: &Registers,
        moment: Moment<'_>,
    ) {
        let places = self.linux.page_places(&self.ram);
        let (Ok(places), Some(size)) = (places, block_size(order)) else { return self.lost() };
        let origin = self.origin(registers, moment);
        for &page in pages {
            let Some(address) = places.block(page, size) else {
                self.lost();
                continue;
            };
            let is_new = |registry: &Registry| !only_new || registry.block_with(address).is_none();
            self.alloc(&origin.event(address, size, Kind::Page, Va(0)), is_new);
        }
    }

    /// Records that blocks, by their `struct page`s and orders, are given back.
    pub(super) fn free_pages(&self, blocks: impl FnOnce(&Self) -> Result<Vec<(Va, u64)>, MemoryError>) {
        let (Ok(places), Ok(blocks)) = (self.linux.page_places(&self.ram), blocks(self)) else {
            return self.lost();
        };
        for (page, order) in blocks {
            let block = block_size(order).and_then(|size| Some((places.block(page, size)?, size)));
            match block {
                Some((address, size)) => {
                    let turn = self.turn();
                    self.state().registry.free_pages(address, size);
                    if let Some(mut log) = turn {
                        log.free_pages(address, size);
                    }
                }
                None => self.lost(),
            }
        }
    }

    /// The return address of the function just entered; 0 when it cannot be read.
    fn caller(&self, registers: &Registers, moment: Moment<'_>) -> Va {
        match moment {
            Moment::Now { .. } => {
                registers.return_address(|va| self.linux.read_u64(&self.ram, va).ok()).unwrap_or_default()
            }
            Moment::Past(record) => record.caller(),
        }
    }

    /// `caller` is asked for real objects only: NULL is freed often.
    pub(super) fn free(&self, address: u64, caller: impl FnOnce() -> Va) {
        if is_object(address) {
            let (caller, turn) = (caller(), self.turn());
            let object = self.state().free(Va(address), caller);
            if let Some(mut log) = turn {
                log.free(Va(address), object.as_ref(), self.name(caller));
            }
        }
    }

    /// `kvfree_call_rcu(head, x)`: until 6.3 `x` is the offset of `head` in the object, or the object when `head` is
    /// NULL; later it is always the object. Offsets are below 4096 (include/linux/rcupdate.h), so the value tells.
    fn rcu_free(&self, head: u64, x: u64) {
        let object = if x < 4096 { head.wrapping_sub(x) } else { x };
        let turn = self.turn();
        self.state().registry.paint(Va(object), Paint::Black);
        if let Some(mut log) = turn {
            log.other("free_later", Va(object));
        }
    }

    /// What kernel and modules tell their own kmemleak of an object. Of what is not tracked it does not matter.
    fn annotated(&self, role: Role, object: Va, size: u64) {
        let turn = self.turn();
        let registry = &mut self.state().registry;
        let (event, _) = match role {
            Role::Ignore => ("ignore", registry.paint(object, Paint::Black)),
            Role::NoScan => ("no_scan", registry.set_no_scan(object)),
            Role::ScanArea => ("scan_area", registry.add_scan_area(object, size)),
            _ => ("not_leak", registry.paint(object, Paint::Gray)),
        };
        if let Some(mut log) = turn {
            log.other(event, object);
        }
    }

    fn module_loaded(&self, va: Va) {
        match self.linux.module(&self.ram, va) {
            Ok(module) => {
                let now = self.state().registry.sequence();
                self.change_modules(|modules| modules.load(module, now));
                if let Some(mut log) = self.turn() {
                    log.names_change();
                }
            }
            Err(_) => self.lost(),
        }
    }

    fn module_unloaded(&self, va: Va) {
        let now = self.state().registry.sequence();
        self.change_modules(|modules| modules.unload(va, now));
    }

    fn change_modules(&self, change: impl FnOnce(&mut ModuleMap)) {
        let mut modules = self.modules.write().unwrap_or_else(PoisonError::into_inner);
        change(&mut modules);
        self.memo().clear();
    }

    /// An event whose guest data makes no sense or cannot be read, and which is therefore not in the registry.
    pub(super) fn lost(&self) {
        self.state().registry.counters.dropped += 1;
    }
}

/// Large kmalloc with the size asked for, vmalloc rounded up to pages, per-CPU memory as its allocator rounds it up: as
/// kmemleak has them. None when it is more than the guest's allocators give (`totalram_pages` in mm/vmalloc.c).
fn block_of(role: Role, size: u64, ram: u64) -> Option<(Kind, u64)> {
    let (kind, size, most) = match role {
        Role::Vmalloc => (Kind::Vmalloc, size.checked_next_multiple_of(PAGE_SIZE)?, ram),
        Role::Vmap => (Kind::Vmap, size, ram),
        Role::Ioremap => (Kind::Ioremap, size, MAX_DEVICE),
        Role::PercpuAlloc => {
            (Kind::Percpu, size.checked_next_multiple_of(percpu::MIN_ALLOC)?, percpu::MAX_ALLOC)
        }
        _ => (Kind::Large, size, ram),
    };
    (size <= most).then_some((kind, size))
}

/// Bytes of a block of 2^`order` pages; None for an order that no kernel has, or one of 4 GiB.
fn block_size(order: u64) -> Option<u64> {
    (order < pages::MAX_ORDER).then(|| PAGE_SIZE << order)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_have_the_size_asked_for_or_what_it_is_rounded_up_to() {
        assert_eq!(block_of(Role::LargeAlloc, 9000, 1 << 20), Some((Kind::Large, 9000)));
        assert_eq!(block_of(Role::Vmalloc, 9000, 1 << 20), Some((Kind::Vmalloc, 3 * PAGE_SIZE)));
        assert_eq!(block_of(Role::PercpuAlloc, 9, 1 << 20), Some((Kind::Percpu, 12)));
        assert_eq!(block_of(Role::PercpuAlloc, percpu::MAX_ALLOC + 1, 1 << 20), None);
        let device = 16 << 20;
        assert_eq!(block_of(Role::Ioremap, device, 1 << 20), Some((Kind::Ioremap, device)), "no RAM");
        assert_eq!(block_of(Role::Ioremap, MAX_DEVICE + 1, 1 << 20), None);
    }

    #[test]
    fn blocks_of_pages_have_a_power_of_two_up_to_the_largest_order() {
        assert_eq!([0, 3].map(block_size), [Some(4096), Some(32768)]);
        assert_eq!([pages::MAX_ORDER, 64, u64::MAX].map(block_size), [None; 3]);
    }

    #[test]
    fn blocks_larger_than_the_guest_are_none() {
        for role in [Role::LargeAlloc, Role::Vmalloc, Role::Vmap, Role::PercpuAlloc] {
            for size in [(1 << 20) + 1, u64::MAX - 1, u64::MAX] {
                assert_eq!(block_of(role, size, 1 << 20), None, "{role:?} {size:#x}");
            }
        }
    }

    #[test]
    fn null_zero_size_and_error_pointers_are_no_objects() {
        for (value, object) in [
            (0, false),
            (16, false),
            (u64::MAX, false),
            ((-4095_i64) as u64, false),
            (0xffff_8880_0000_1000, true),
        ] {
            assert_eq!(is_object(value), object, "{value:#x}");
        }
    }
}
