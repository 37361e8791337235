//! The scan: which objects of a frozen guest can no longer be reached.
//!
//! Data flow: registry and guest -> [`roots`] and [`index`] -> [`edges`] -> [`mark`] -> [`graph`] -> [`ScanResult`]. What was not written
//! since the scan before comes from a [`Memo`] instead of from the guest.
//!
//! What kmemleak calls white and gray (mm/kmemleak.c) is reachability here: the machine stands still, so no object
//! is lost between two reads, and neither its checksum heuristic nor its second scan is needed. Its rules otherwise:
//!
//! - An aligned word refers to the object it points into, at any offset below the object's size.
//! - A vmalloc block's own `vm_struct.addr` and `vmap_area.va_start` do not count (kmemleak: a minimum of two
//!   references). A reference to the `vm_struct` from elsewhere than its `vmap_area` counts for the block, too
//!   (kmemleak: the excess reference).
//! - Gray objects are roots. Black ones are neither reported nor read. Objects that wait for `kfree_rcu` are black:
//!   their contents are dead, so what only they refer to was lost before them, or waits for its own free. Objects on
//!   `call_rcu` need no rule: their `rcu_head`s are chained from a per-CPU list, which is a root, and are read.
//! - Objects younger than the minimum age are not reported, and are read: what is reached from them only, like a
//!   structure still being built, is not reported before they are old enough themselves. (kmemleak does not
//!   read them, and reports such older objects.)
//! - Kernel stacks are read from the stack pointer up, as roots; the vmalloc blocks they lie in are black. The memory of a
//!   loaded module is black, too, and its writable data are roots. What it has while it comes or goes, and for its
//!   initialisation, are objects like others.
//! - A per-CPU allocation is one object whose address is the cookie that `alloc_percpu` returned. A word refers to it
//!   when it lies in the cookie's bytes, flags in the cookie's low bits included; the copies of all CPUs are its
//!   contents. (So does kmemleak from 6.12 on; before, it reads them and never reports them.) Cookies of the first
//!   chunk are small numbers, so that an equal number anywhere may hide a lost one; numbers that are more than
//!   the cookie and its flags do not ([`index::Block`]).
//! - A block of pages that the kernel's own code asked for and has to itself is an object ([`pages`]). A word refers to
//!   it when it points into its memory or into its `struct page`s; both are its contents. So it is with a large kmalloc.
//! - Of an object whose C type is known only the words that can hold a pointer count ([`typed`]).
//! - Device memory is an object without contents. Memblock objects are never reported: their memory is among the roots.

mod coverage;
pub mod dead_words;
mod edges;
mod exception_stacks;
mod graph;
pub mod guest;
pub mod index;
mod layout;
pub mod mark;
mod memo;
mod pages;
mod path;
mod path_text;
mod places;
pub mod possible;
mod reader;
mod referrers;
pub mod refs;
mod refs_text;
mod region;
mod result;
mod retained;
pub mod roots;
mod structures;
#[cfg(test)]
mod tests;
mod trail;
mod treatment;
mod typed;
pub mod words;

pub use coverage::{Coverage, NotRead, RootShare, coverage};
pub use memo::{Memo, Written};
pub use path::{Hop, Path, Start, path};
pub use places::{Owner, Place};
pub use referrers::{Reference, Referrer, referrers};
pub use result::{Leak, RootStatistics, ScanResult};
pub use retained::{Retained, retained};
pub use treatment::{Function, Treatments, has_function};
pub use typed::{CacheTypes, Shape, TypedStatistics};

use crate::arch::CpuState;
use crate::linux::{Linux, ModuleMap};
use crate::memory::{FrozenMemory, PhysicalMemory, Va};
use crate::registry::{Kind, Object, Paint, Registry};
use anyhow::Context;
use guest::{Extent, GuestMemory};
use guest_profiles::annotations::Action;
use index::{Block, Index};
use mark::{Contents, Marker, Origin, Special, Witness};
use pages::Pages;
use roots::{RootInput, Roots};
use rustc_hash::FxHashMap;
use std::ops::Range;
use std::time::Instant;
use typed::Shapes;

/// Bytes of an object kept for the report (kmemleak's HEX_MAX_LINES of HEX_ROW_SIZE).
pub const HEAD_BYTES: usize = 32;

/// Objects, or KiB of roots, that are worth a second thread: beginning with one takes some 20 microseconds.
const SHARED_FROM: usize = 2048;

/// Everything a scan looks at; the borrow of `memory` is the proof that the machine stands still.
pub struct ScanInput<'a, M> {
    /// The guest.
    pub linux: &'a Linux,
    /// Its memory.
    pub memory: &'a M,
    /// Its live objects.
    pub registry: &'a Registry,
    /// All its vCPUs.
    pub cpus: &'a [CpuState],
    /// Its modules.
    pub modules: &'a ModuleMap,
    /// Annotations, refreshed for the registry's backtraces.
    pub treatments: &'a Treatments,
    /// `jiffies` now.
    pub now_jiffies: u64,
    /// Objects younger than this are not reported.
    pub min_age_ms: u64,
    /// False: stacks are no roots.
    pub stack: bool,
    /// False: slab objects are not tracked, and slab pages are roots.
    pub slab: bool,
    /// What the objects of slab caches are.
    pub types: &'a CacheTypes,
    /// False: all words of objects count, whatever they are.
    pub typed: bool,
    /// Threads that mark, 1 at least.
    pub threads: usize,
}

impl<'a, M: FrozenMemory> ScanInput<'a, M> {
    fn guest(&self) -> anyhow::Result<GuestMemory<'a, M>> {
        GuestMemory::new(self.linux, self.memory)
            .context("Cannot find the guest's direct map and per-CPU memory")
    }

    fn object_at(&self, address: Va) -> anyhow::Result<Object> {
        let at = |va| self.registry.containing(va);
        object_at(self.linux, self.memory, address, at).map(|(_, object)| object)
    }
}

/// The tracked object at or around an address as `containing` knows it, and the address as the registry has it: of a
/// per-CPU object the address of any CPU's copy will do.
///
/// # Errors
/// No such object.
pub fn object_at(
    linux: &Linux,
    memory: &impl PhysicalMemory,
    address: Va,
    containing: impl Fn(Va) -> Option<Object>,
) -> anyhow::Result<(Va, Object)> {
    let at = |va| Some((va, containing(va)?));
    at(address).or_else(|| at(linux.percpu_cookie(memory, address)?)).with_context(|| {
        format!("No tracked object at {address}: it is free, or of a kind that is not tracked")
    })
}

/// Finds the unreachable objects of a frozen guest.
///
/// # Errors
/// A structure of the guest that is damaged, or a kernel without the types that scans need.
pub fn scan<M: FrozenMemory>(input: &ScanInput<'_, M>) -> anyhow::Result<ScanResult> {
    scan_with(input, None)
}

/// The same, of a machine in which no page was written since the scan that left `memo` but those of `written`; None: nobody
/// knows, so that everything is read. Leaves `memo` for the next one.
///
/// # Errors
/// As [`scan`]; `memo` knows nothing any more then.
pub fn scan_again<M: FrozenMemory>(
    input: &ScanInput<'_, M>,
    memo: &mut Memo,
    written: Option<&Written>,
) -> anyhow::Result<ScanResult> {
    let result = scan_with(input, Some((&mut *memo, written)));
    if result.is_err() {
        *memo = Memo::default();
    }
    result
}

fn scan_with<M: FrozenMemory>(
    input: &ScanInput<'_, M>,
    mut kept: Option<(&mut Memo, Option<&Written>)>,
) -> anyhow::Result<ScanResult> {
    let start = Instant::now();
    let (frozen, slots) = Frozen::collect(input)?;
    let windows = frozen.index.windows();
    let again = kept.as_mut().is_some_and(|(memo, written)| memo.prepare(windows, *written));
    let (mut marker, treated) = frozen.marker(input, &slots, ())?;
    if let Some((memo, _)) = &kept {
        marker.remember(memo, frozen.guest.direct().start);
    }
    marker.share(input.threads, SHARED_FROM);
    drop(slots);
    let mut result = ScanResult {
        jiffies: input.now_jiffies,
        objects: frozen.objects,
        object_bytes: frozen.object_bytes,
        again,
        prepare: start.elapsed(),
        ..ScanResult::default()
    };

    let start = Instant::now();
    result.roots = read_roots(input, &frozen, &mut marker);
    treated.gray.iter().for_each(|&va| marker.set_gray(va));
    marker.run();
    for &va in &treated.young {
        result.young += u64::from(!marker.is_reached(va));
        marker.set_gray(va);
    }
    marker.run();
    result.bytes_scanned = marker.bytes;
    result.candidates = marker.candidates;
    result.no_object = marker.candidates - marker.references;
    let caches = frozen.shapes.all.len() as u64;
    result.typed = TypedStatistics { caches, objects: treated.typed, dropped: marker.dropped };
    result.mark = start.elapsed();

    let start = Instant::now();
    let leak = |(object, standing)| leak(&frozen, object, standing);
    result.leaks = unreached(input.registry, &frozen, &marker).into_iter().map(leak).collect();
    result.graph = start.elapsed();
    let fresh = marker.fresh();
    if let Some((memo, _)) = kept {
        memo.keep(fresh);
    }
    Ok(result)
}

/// A frozen heap, ready to be marked.
struct Frozen<'a, M> {
    guest: GuestMemory<'a, M>,
    pages: Pages,
    roots: Roots,
    index: Index,
    /// Names of slab caches.
    caches: FxHashMap<Va, String>,
    shapes: Shapes,
    objects: u64,
    object_bytes: u64,
}

/// What marking begins with, beside the roots.
#[derive(Default)]
struct Treated {
    /// Starts of gray objects.
    gray: Vec<u64>,
    /// Starts of objects that are too young to be reported.
    young: Vec<u64>,
    /// Objects of known type.
    typed: u64,
}

impl<'a, M: FrozenMemory> Frozen<'a, M> {
    /// Finds roots and objects; also returns the slots that are taken.
    fn collect(input: &ScanInput<'a, M>) -> anyhow::Result<(Self, Vec<u32>)> {
        let ScanInput { linux, memory, registry, .. } = *input;
        let guest = input.guest()?;
        let (pages, roots) = collect_roots(input, &guest)?;
        let objects = heap(registry).chain(pages.objects()).map(|object| block(&object));
        let mut blocks: Vec<Block> = objects.collect();
        let (objects, object_bytes) =
            (blocks.len() as u64, blocks.iter().fold(0_u64, |bytes, block| bytes.saturating_add(block.size)));
        blocks.extend(pages.structs());
        // These are a few ascending runs, which this sort knows to join.
        blocks.sort();
        // Only where a free was missed, or the guest claims what cannot be.
        blocks.dedup_by_key(|block| block.start);
        let (index, slots) = Index::new(&blocks, guest.direct());
        let caches = linux.caches(memory).context("Cannot read the guest's list of slab caches")?;
        let frozen = Self {
            guest,
            pages,
            roots,
            index,
            shapes: Shapes::of(input, &caches),
            caches: caches.into_iter().map(|c| (c.va, c.name)).collect(),
            objects,
            object_bytes,
        };
        Ok((frozen, slots))
    }

    /// A marker that knows how every object is to be treated, with nothing reached yet.
    fn marker<'s, W: Witness>(
        &'s self,
        input: &ScanInput<'_, M>,
        slots: &[u32],
        witness: W,
    ) -> anyhow::Result<(Marker<'s, GuestMemory<'a, M>, W>, Treated)> {
        let mut marker = Marker::new(&self.index, &self.guest, slots, witness);
        marker.set_shapes(&self.shapes.all);
        set_vmalloc_specials(input, &mut marker)?;
        self.pages.join(&mut marker);
        let treated = self.set_treatments(input, &mut marker);
        // In use, although only their own lists, which are not read, may lead to the latter.
        self.roots.stacks.iter().chain(&self.roots.dead).for_each(|block| marker.set_black(block.0));
        Ok((marker, treated))
    }

    /// Tells the marker how every object is to be treated, but for those that marking begins with.
    fn set_treatments<W: Witness>(
        &self,
        input: &ScanInput<'_, M>,
        marker: &mut Marker<'_, GuestMemory<'a, M>, W>,
    ) -> Treated {
        // As msecs_to_jiffies, which rounds up.
        let min_age = input.min_age_ms.saturating_mul(input.linux.hz()).div_ceil(1000);
        let areas = input.registry.scan_areas();
        let mut treated = Treated::default();
        for object in self.objects(input.registry) {
            let va = object.address.0;
            let blocks = || self.pages.blocks_of(&object);
            if let Some(shape) = self.shapes.of_cache(object.cache).filter(|_| object.kind == Kind::Slab) {
                marker.set_shape(va, shape);
                treated.typed += 1;
            }
            // Mapped pages are read where they are, too.
            if object.no_scan || matches!(object.kind, Kind::Ioremap | Kind::Vmap) {
                blocks().for_each(|va| marker.set_no_scan(va));
            }
            let rule = input.treatments.of(&object, self.cache_of(&object));
            match (object.paint, rule.map(|r| r.action)) {
                (Paint::Black, _) | (Paint::Normal, Some(Action::Black)) => {
                    blocks().for_each(|va| marker.set_black(va));
                }
                (Paint::Gray, _) | (_, Some(Action::Gray)) => treated.gray.extend(blocks()),
                (_, Some(Action::NoScan)) => blocks().for_each(|va| marker.set_no_scan(va)),
                // Of pages kmemleak has no areas.
                (_, Some(Action::Area)) if object.kind == Kind::Page => {}
                (_, Some(Action::Area)) => {
                    let area = rule.and_then(|r| r.start).unwrap_or(0)
                        ..rule.and_then(|r| r.end).unwrap_or(object.size);
                    marker.set_areas(va, vec![area]);
                }
                (Paint::Normal, None) => {}
            }
            if let Some(areas) = areas.of(object.address).filter(|_| object.kind != Kind::Page) {
                marker.set_areas(va, areas.to_vec());
            }
            if input.now_jiffies.saturating_sub(object.jiffies) < min_age {
                treated.young.extend(blocks());
            }
        }
        input.modules.blocks().for_each(|start| marker.set_black(start));
        treated
    }

    /// Every object.
    fn objects<'s>(&'s self, registry: &'s Registry) -> impl Iterator<Item = Object> + 's {
        heap(registry).chain(self.pages.objects())
    }

    /// Name of an object's slab cache; empty when it has none.
    fn cache_of(&self, object: &Object) -> &str {
        self.caches.get(&object.cache).map_or("", String::as_str)
    }
}

fn collect_roots<M: FrozenMemory>(
    input: &ScanInput<'_, M>,
    guest: &GuestMemory<'_, M>,
) -> anyhow::Result<(Pages, Roots)> {
    let uses = input.linux.page_map(input.memory).context("Cannot read the guest's page frames")?;
    let mut objects = page_objects(input.registry, guest);
    let pages = Pages::collect(input, guest, &uses, &objects).context("Cannot tell whose pages are whose")?;
    objects.extend(pages.extents(guest));
    let root_input = RootInput {
        linux: input.linux,
        cpus: input.cpus,
        modules: input.modules,
        stack: input.stack,
        slab: input.slab,
        uses: &uses,
        objects: &objects,
        pages: &pages.frames(),
        percpu: &percpu_objects(input.registry),
    };
    let roots = Roots::collect(&root_input, guest, input.memory);
    Ok((pages, roots.context("Cannot collect the roots of the scan")?))
}

/// Objects that scans know how to treat, but blocks of pages.
fn heap(registry: &Registry) -> impl Iterator<Item = Object> + '_ {
    let known = |o: &Object| {
        let mapped = matches!(o.kind, Kind::Vmalloc | Kind::Ioremap | Kind::Vmap);
        mapped || matches!(o.kind, Kind::Slab | Kind::Large | Kind::Percpu)
    };
    registry.objects().filter(known)
}

fn block(object: &Object) -> Block {
    Block { start: object.address.0, size: object.size }
}

/// Pages that belong to tracked objects as a whole.
fn page_objects<M: FrozenMemory>(registry: &Registry, guest: &GuestMemory<'_, M>) -> Vec<Extent> {
    let whole = registry.others().filter(|o| matches!(o.kind, Kind::Large | Kind::Vmalloc));
    whole.flat_map(|object| guest.extents(pages::memory_of(&object))).collect()
}

/// Cookies of per-CPU objects, ascending and disjoint.
fn percpu_objects(registry: &Registry) -> Vec<Range<Va>> {
    let percpu = registry.others().filter(|o| o.kind == Kind::Percpu);
    let mut cookies: Vec<Range<Va>> =
        percpu.map(|o| o.address..Va(o.address.0.saturating_add(o.size))).collect();
    cookies.sort_unstable_by_key(|range| range.start);
    // They overlap only when a free was missed.
    cookies.dedup_by(|next, last| {
        let meet = next.start <= last.end;
        last.end = if meet { last.end.max(next.end) } else { last.end };
        meet
    });
    cookies
}

/// Tells the marker of every `vm_struct` and `vmap_area` (mm/vmalloc.c): see the module description.
fn set_vmalloc_specials<M: FrozenMemory, C: Contents, W: Witness>(
    input: &ScanInput<'_, M>,
    marker: &mut Marker<'_, C, W>,
) -> anyhow::Result<()> {
    let types = input.linux.kernel.types.as_ref().context("The kernel has no BTF")?;
    let offset = |structure, member| {
        types.offset(structure, member).with_context(|| format!("The kernel has no {structure}.{member}"))
    };
    let size = |structure| types.size_of(structure).with_context(|| format!("The kernel has no {structure}"));
    let address = offset("vm_struct", "addr")?;
    let (node, vm) = (offset("vmap_area", "rb_node")?, offset("vmap_area", "vm")?);
    let (vm_size, area_size) = (size("vm_struct")?, size("vmap_area")?);
    let areas = input.linux.vmalloc_areas(input.memory).context("Cannot read the guest's vmalloc areas")?;
    // Neither the addresses in a vmap_area nor, in an idle one, what shares its place with the pointer to a vm_struct.
    let parts = || {
        let parts = [node..vm, vm + 8..area_size].into_iter().filter(|r| r.start < r.end);
        Some(parts.collect())
    };
    for idle in
        input.linux.idle_vmap_areas(input.memory).context("Cannot read the guest's free vmalloc areas")?
    {
        marker.set_special(idle.0, Special { areas: parts(), ..Special::default() });
    }
    for area in areas {
        marker.set_special(area.vmap_area.0, Special { areas: parts(), weak: Some(vm), stands_for: None });
        if let Some(vm) = area.vm {
            let parts = vec![0..address, address + 8..vm_size];
            marker.set_special(
                vm.0,
                Special { areas: Some(parts), weak: None, stands_for: Some(area.start.0) },
            );
        }
    }
    Ok(())
}

/// Marks all that is in use; what is too young to be reported is.
fn mark_all<M: FrozenMemory, C: Contents, W: Witness>(
    input: &ScanInput<'_, M>,
    frozen: &Frozen<'_, M>,
    marker: &mut Marker<'_, C, W>,
    treated: &Treated,
) {
    read_roots(input, frozen, marker);
    treated.gray.iter().chain(&treated.young).for_each(|&va| marker.set_gray(va));
    marker.run();
}

/// Calls `found` with every reference from what is in use, and the start of the object that it is in; None: of the roots.
fn each_reference<'a, M: FrozenMemory>(
    input: &ScanInput<'_, M>,
    frozen: &Frozen<'a, M>,
    marker: &Marker<'_, GuestMemory<'a, M>>,
    mut found: impl FnMut(Option<u64>, mark::Reference),
) {
    for region in &frozen.roots.regions {
        for bytes in region.extents.iter().filter_map(|&extent| frozen.guest.bytes(extent)) {
            marker.root_references(bytes, |r| found(None, r));
        }
    }
    for word in input.cpus.iter().filter(|cpu| cpu.online).flat_map(|cpu| cpu.registers.words()) {
        marker.root_references(&word.to_le_bytes(), |r| found(None, r));
    }
    for object in frozen.objects(input.registry) {
        for start in frozen.pages.blocks_of(&object).filter(|&start| marker.is_reached(start)) {
            marker.references(start, |r| found(Some(start), r));
        }
    }
}

/// Reads all roots.
fn read_roots<M: FrozenMemory, C: Contents, W: Witness>(
    input: &ScanInput<'_, M>,
    frozen: &Frozen<'_, M>,
    marker: &mut Marker<'_, C, W>,
) -> Vec<RootStatistics> {
    let mut statistics = Vec::new();
    for (number, region) in frozen.roots.regions.iter().enumerate() {
        marker.witness.enter(Origin::Region(number));
        let parts: Vec<&[u8]> =
            region.extents.iter().filter_map(|&extent| frozen.guest.bytes(extent)).collect();
        let bytes = parts.iter().map(|part| part.len() as u64).sum();
        let references = marker.roots(&parts);
        statistics.push(RootStatistics { name: region.name.clone(), bytes, references });
    }
    let (mut bytes, mut references) = (0, 0);
    for cpu in input.cpus.iter().filter(|c| c.online) {
        marker.witness.enter(Origin::Register(cpu.index));
        let words = cpu.registers.words();
        bytes += words.len() as u64 * 8;
        references += words.iter().filter(|&&word| marker.root_word(word)).count() as u64;
    }
    statistics.push(RootStatistics { name: "registers".into(), bytes, references });
    statistics
}

/// What was not reached, in allocation order, sorted out.
fn unreached<M: FrozenMemory, C: Contents, W: Witness>(
    registry: &Registry,
    frozen: &Frozen<'_, M>,
    marker: &Marker<'_, C, W>,
) -> Vec<(Object, graph::Standing)> {
    let mut white: Vec<Object> =
        frozen.objects(registry).filter(|o| !marker.is_reached(o.address.0)).collect();
    white.sort_unstable_by_key(|o| o.sequence);
    let numbered = (0..).zip(&white);
    let places: Vec<(u64, u32)> =
        numbered.flat_map(|(n, o)| frozen.pages.blocks_of(o).map(move |start| (start, n))).collect();
    let numbers: FxHashMap<u64, u32> = places.iter().copied().collect();
    let mut edges = Vec::new();
    for (start, from) in places {
        marker.references(start, |reference| {
            if let Some(&to) = numbers.get(&reference.target.start)
                && to != from
            {
                edges.push((from, to));
            }
        });
    }
    let memory = |o: &Object| o.size.saturating_mul(frozen.guest.copies(o.address).len() as u64);
    let sizes: Vec<u64> = white.iter().map(memory).collect();
    let standings = graph::classify(&sizes, &edges);
    white.into_iter().zip(standings).collect()
}

fn leak<M: FrozenMemory>(frozen: &Frozen<'_, M>, object: Object, standing: graph::Standing) -> Leak {
    let (head, checksum) = fingerprints(&frozen.guest, &object);
    let graph::Standing { direct, component, retained } = standing;
    let cache = frozen.caches.get(&object.cache).cloned();
    Leak { object, cache, direct, component, retained, head, checksum }
}

/// First bytes of an object's first copy, and the checksums of all, as kmemleak joins them (6.12 and newer).
fn fingerprints<M: FrozenMemory>(guest: &GuestMemory<'_, M>, object: &Object) -> (Vec<u8>, u32) {
    let copies = guest.copies(object.address).into_iter();
    let all = copies.map(|copy| fingerprint(guest, Block { start: copy.0, size: object.size }));
    all.reduce(|(head, sum), (_, next)| (head, sum ^ next)).unwrap_or_default()
}

/// First bytes and checksum of an object's contents, as far as they can be read.
fn fingerprint(contents: &impl Contents, block: Block) -> (Vec<u8>, u32) {
    let start = block.start / 8 * 8;
    let mut skip = (block.start - start) as usize;
    let mut head = Vec::new();
    // crc32fast inverts before and after; the kernel's crc32(0, ...) does neither.
    let mut checksum = crc32fast::Hasher::new_with_initial(!0);
    contents.pieces(start, block.size + skip as u64, &mut |_, bytes| {
        let bytes = &bytes[skip.min(bytes.len())..];
        skip = 0;
        head.extend(&bytes[..bytes.len().min(HEAD_BYTES - head.len())]);
        checksum.update(bytes);
    });
    (head, !checksum.finalize())
}
