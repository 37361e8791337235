//! The detector: tracer -> registry -> scan -> report, behind the console's commands.

mod accounting;
mod again;
mod canary;
mod commands;
mod doing;
mod explain;
mod guard;
mod handover;
mod quiet;
mod readings;
mod reporting;
mod saving;

pub use canary::CANARY;

use crate::machine::{FrozenRam, Guest, Outcome, Paused};
use crate::run::RuleFiles;
use crate::tracer::{Recorder, breakpoint::Breakpoints};
use again::{Again, written};
use anyhow::{Context, Result, bail, ensure};
use guest_profiles::annotations::Rules;
use guest_profiles::hooks::Tracked;
use introspect::accounting::growth::History;
use introspect::hooks::Plan;
use introspect::linux::Linux;
use introspect::linux::pages::{PageMap, Use};
use introspect::linux::percpu::PercpuChunk;
use introspect::linux::slab::SlabMap;
use introspect::linux::vmalloc::{Area, Made};
use introspect::memory::{PAGE_SHIFT, PAGE_SIZE, Va};
use introspect::registry::{AllocEvent, Audit, Backtrace, Gap, Kind, Object, Paint, Truth, is_vmap};
use introspect::report::Order;
use introspect::scan::{CacheTypes, ScanInput, ScanResult, Treatments, scan};
use quiet::Allocator;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How often a quiet moment of the allocator is looked for, and how long the guest runs in between.
const QUIET_TRIES: u32 = 400;
const QUIET_STEP: Duration = Duration::from_millis(3);
/// Of moments that are not quiet, audits try every so many.
const BUSY_STEP: u32 = 8;

/// What the report says of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// "kvm-intel", "kvm-amd" or what /dev/kvm says.
    pub kvm: String,
    /// "breakpoint", "ring" or "off".
    pub tracer: String,
    /// "int3", "pio" or "brk".
    pub trap: String,
    /// Name of the lab this runs in, if any.
    pub lab: Option<String>,
}

/// What scans are told.
#[derive(Debug, Clone, Copy)]
pub struct ScanOptions {
    /// Objects younger than this are not reported.
    pub min_age_ms: u64,
    /// Task stacks are roots.
    pub stack: bool,
    /// Types of objects count.
    pub typed: bool,
    /// Of groups in reports.
    pub order: Order,
}

/// Everything the detector is made of.
pub struct Parts {
    /// The guest.
    pub guest: Arc<Guest>,
    /// The guest's kernel.
    pub linux: Arc<Linux>,
    /// Keeper of the registry.
    pub recorder: Arc<Recorder>,
    /// The traps.
    pub traps: Arc<Breakpoints>,
    /// What was planned, and what could not be.
    pub plan: Plan,
    /// What is tracked.
    pub tracked: Vec<Tracked>,
    /// Annotations and suppressions.
    pub rules: Rules,
    /// The files that they are from, but the built-in ones.
    pub rule_files: RuleFiles,
    /// For the report.
    pub host: HostFacts,
}

/// What the guest's own metadata say; nothing of what is not tracked.
struct Metadata {
    slabs: Option<SlabMap>,
    percpu: Vec<PercpuChunk>,
    areas: Option<Vec<Area>>,
    pages: Option<PageMap>,
}

/// The last scan and what it cost.
struct Scanned {
    result: ScanResult,
    pause: Duration,
    took: Duration,
}

/// What commands change; its lock serialises them.
struct Work {
    options: ScanOptions,
    /// Tracking was switched off at the console.
    off: bool,
    /// Seconds between automatic scans that `scan=on` goes back to.
    last_period: u64,
    treatments: Treatments,
    /// Modules seen when `treatments` was resolved.
    treatments_modules: usize,
    scans: u64,
    scanned: Option<Scanned>,
    /// None before the first periodic scan.
    again: Option<Again>,
    audit: Option<Audit>,
    /// Words of what is not read that point into objects, as `roots` last counted them.
    dropped: Option<Vec<(&'static str, u64)>>,
    mark: Option<accounting::Mark>,
    history: History,
    /// Where the machine is to be saved when a scan finds leaks.
    save_leak: Option<PathBuf>,
}

/// See the module.
pub struct Detector {
    parts: Parts,
    allocator: Allocator,
    types: CacheTypes,
    /// Seconds between automatic scans, 0 for none; apart, since who watches the time must not wait for a command.
    period: AtomicU64,
    work: Mutex<Work>,
    started: Instant,
}

impl Detector {
    /// A detector for a machine whose traps are planted.
    pub fn new(parts: Parts, options: ScanOptions, period: u64) -> Self {
        let allocator = Allocator::new(&parts.linux, &parts.plan);
        let types = CacheTypes::new(&parts.rules);
        let work = Work {
            options,
            off: false,
            last_period: if period == 0 { 600 } else { period },
            treatments: Treatments::default(),
            treatments_modules: usize::MAX,
            scans: 0,
            scanned: None,
            again: None,
            audit: None,
            dropped: None,
            mark: None,
            history: History::default(),
            save_leak: None,
        };
        let period = AtomicU64::new(period);
        Self { parts, allocator, types, period, work: Mutex::new(work), started: Instant::now() }
    }

    /// Has the machine saved to `path` as it stands at the first scan that finds leaks.
    pub fn save_at_first_leak(&self, path: PathBuf) {
        self.work().save_leak = Some(path);
    }

    /// Goes on where another one, whose machine was saved, stopped.
    pub fn carry_on(&self, scans: u64, history: History) {
        let mut work = self.work();
        work.scans = scans;
        work.history = history;
    }

    fn work(&self) -> MutexGuard<'_, Work> {
        // A panic while it was held ends the process.
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Seconds between automatic scans, 0 for none.
    pub fn period(&self) -> u64 {
        self.period.load(Relaxed)
    }

    /// Whether tracking was switched off at the console.
    pub fn is_off(&self) -> bool {
        self.work().off
    }

    /// Number of scans so far.
    pub fn scans(&self) -> u64 {
        self.work().scans
    }

    /// Unreferenced objects that would be reported now.
    pub fn unreferenced(&self) -> usize {
        self.current_leaks(&self.work())
    }

    /// Pauses the machine (or takes it as it stands when it has ended) and scans.
    /// Returns the number of objects that are reported for the first time.
    fn scan_now(&self) -> Result<usize> {
        self.scan_as(&mut self.work())
    }

    /// The same, and scans from then on read only what was written since the one before.
    pub fn scan_periodically(&self) -> Result<usize> {
        let mut work = self.work();
        work.again.get_or_insert_default();
        self.scan_as(&mut work)
    }

    fn scan_as(&self, work: &mut Work) -> Result<usize> {
        ensure!(!work.off, "Tracking is off, so a scan would find nothing: on starts it again");
        let begin = Instant::now();
        let mut paused = self.pause_with_traps()?;
        let new = self.scan_paused(work, &mut paused, begin);
        let pause = begin.elapsed();
        if matches!(new, Ok(1..)) {
            self.save_leak(work, &paused);
        }
        drop(paused);
        if let (Ok(_), Some(scanned)) = (&new, &mut work.scanned) {
            scanned.pause = pause;
        }
        new
    }

    fn scan_paused(&self, work: &mut Work, paused: &mut Paused<'_>, begin: Instant) -> Result<usize> {
        self.refresh_treatments(work);
        let mut again = work.again.take();
        let written = again.as_ref().and_then(|_| written(paused));
        let found = self.frozen(work, paused, |input| {
            let result = match &mut again {
                Some(again) => again.scan(input, written.as_ref())?,
                None => scan(input).context("The scan failed")?,
            };
            let scanned = Scanned { result, pause: Duration::ZERO, took: begin.elapsed() };
            let new = self.report_of(work, &scanned, input.registry, input.modules).new_leaks();
            Ok((scanned, new))
        });
        work.again = again;
        let (scanned, new) = found?;
        let unused = self.parts.linux.idle_vmap_areas(&paused.memory());
        let unused = unused.context("Cannot read the guest's free vmalloc areas")?.into_iter().collect();
        let mut state = self.parts.recorder.state();
        for leak in &scanned.result.leaks {
            state.registry.set_reported(leak.object.address);
        }
        // Nothing has happened since a machine was saved.
        if self.parts.guest.outcome() != Some(Outcome::Saved) {
            work.history.note(&state.registry, &unused, scanned.result.jiffies);
        }
        work.scans += 1;
        work.scanned = Some(scanned);
        Ok(new)
    }

    /// Compares the annotations with what was loaded and recorded since the last scan.
    fn refresh_treatments(&self, work: &mut Work) {
        let Parts { linux, recorder, .. } = &self.parts;
        let modules = recorder.modules.read().unwrap_or_else(PoisonError::into_inner);
        if work.treatments_modules != modules.seen() {
            work.treatments = Treatments::of_guest(&self.parts.rules.annotations, linux, &modules);
            work.treatments_modules = modules.seen();
        }
        work.treatments.refresh(&recorder.state().registry.stacks);
    }

    /// Calls `look` with all that a pass over the paused machine's heap looks at.
    fn frozen<T>(
        &self,
        work: &Work,
        paused: &Paused<'_>,
        look: impl FnOnce(&ScanInput<'_, FrozenRam<'_>>) -> Result<T>,
    ) -> Result<T> {
        let Parts { linux, recorder, .. } = &self.parts;
        let memory = &paused.memory();
        let modules = recorder.modules.read().unwrap_or_else(PoisonError::into_inner);
        let state = recorder.state();
        look(&ScanInput {
            linux,
            memory,
            registry: &state.registry,
            cpus: paused.cpus(),
            modules: &modules,
            treatments: &work.treatments,
            now_jiffies: linux.jiffies(memory).context("Cannot read the guest's clock")?,
            min_age_ms: work.options.min_age_ms,
            stack: work.options.stack,
            slab: self.tracks(Tracked::Slab),
            types: &self.types,
            typed: work.options.typed,
            threads: thread::available_parallelism().map_or(1, usize::from),
        })
    }

    /// What it works with.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// Pauses the machine for a scan. Traps that were lost are planted again, and what was missed meanwhile is made good as
    /// far as the guest's metadata tell, which is said.
    fn pause_with_traps(&self) -> Result<Paused<'_>> {
        let Parts { guest, traps, linux, recorder, .. } = &self.parts;
        let mut paused = guest.pause()?;
        let lost = traps.lost()?;
        if !lost.is_empty() {
            let standing = self.allocator.standing(linux, &paused.memory(), paused.cpus())?;
            traps.plant_again(&mut paused, &lost, |bytes| standing.is_inside(bytes))?;
        }
        // What happens while nothing is recorded is no gap.
        if lost.is_empty() || !recorder.enabled() {
            return Ok(paused);
        }
        drop(paused);
        let places: Vec<String> = lost.iter().map(Va::to_string).collect();
        let overwrote = format!("The guest overwrote the traps at {}", places.join(", "));
        match self.close_gap() {
            Ok((paused, Gap { added, removed })) => {
                eprintln!(
                    "kleak-vmm: warning: {overwrote}; {added} allocations and {removed} frees or more were missed and are \
                     made good from the guest's metadata: these objects are not reported"
                );
                Ok(paused)
            }
            Err(error) => {
                eprintln!("kleak-vmm: warning: {overwrote}; allocations may be missing: {error:#}");
                guest.pause()
            }
        }
    }

    /// Compares registry and guest when nobody is inside the allocator. Where somebody always is, such as a task that sleeps
    /// there for want of memory, a moment at which both agree all the same proves as much.
    fn audit_now(&self) -> Result<Audit> {
        let audit = self.at_a_moment(|paused, quiet, number| {
            if quiet {
                return self.audit_paused(&paused).map(Some);
            }
            // Structures may be half changed at such a moment: an error, too, is no agreement.
            let audit = (number % BUSY_STEP == 0).then(|| self.audit_paused(&paused).ok()).flatten();
            Ok(audit.filter(|audit| audit.missing == 0 && audit.stale == 0))
        })?;
        // Others need not wait for the quiet moment.
        self.work().audit = Some(audit.clone());
        Ok(audit)
    }

    fn audit_paused(&self, paused: &Paused<'_>) -> Result<Audit> {
        let Parts { linux, recorder, .. } = &self.parts;
        let memory = &paused.memory();
        let found = self.metadata(memory)?;
        let boot = linux.boot_objects(memory)?;
        let direct = linux.direct_map_base(memory)?;
        Ok(recorder.state().registry.audit(&Truth {
            slabs: found.slabs.as_ref(),
            boot_objects: &boot,
            percpu: &found.percpu,
            areas: found.areas.as_deref(),
            pages: found.pages.as_ref().map(|pages| (pages, direct)),
        }))
    }

    /// Pauses the machine at a moment when nobody is inside the allocator: at any other, registry and guest rightly
    /// disagree on the object that is just being allocated or freed.
    ///
    /// Fails when there is no such moment.
    fn pause_when_quiet(&self) -> Result<Paused<'_>> {
        self.at_a_moment(|paused, quiet, _| Ok(quiet.then_some(paused)))
    }

    /// Pauses the machine at one moment after another until `take`, which is told whether the allocator is quiet and the
    /// moment's number, makes something of one.
    ///
    /// Fails with `take`, and when it takes none.
    fn at_a_moment<'a, T>(
        &'a self,
        mut take: impl FnMut(Paused<'a>, bool, u32) -> Result<Option<T>>,
    ) -> Result<T> {
        let Parts { guest, linux, recorder, .. } = &self.parts;
        for number in 0..QUIET_TRIES {
            let paused = guest.pause()?;
            let quiet = self.allocator.is_quiet(linux, &paused.memory(), recorder, paused.cpus())?;
            if let Some(taken) = take(paused, quiet, number)? {
                return Ok(taken);
            }
            if guest.outcome().is_some() {
                bail!(
                    "The machine stands where the allocator is at work: on what it is doing there, registry and guest differ"
                );
            }
            if guest.held() {
                bail!("The machine is held while the allocator is at work; resume it, and pause it again");
            }
            std::thread::sleep(QUIET_STEP);
        }
        bail!(
            "The allocator was at work at each of {QUIET_TRIES} moments; try again when the guest has less to do"
        )
    }

    /// True when this is among what `--track` names.
    fn tracks(&self, what: Tracked) -> bool {
        self.parts.tracked.contains(&what)
    }

    /// Reads what the guest's metadata say of what is tracked.
    fn metadata(&self, memory: &FrozenRam<'_>) -> Result<Metadata> {
        let linux = &self.parts.linux;
        let slabs = self.tracks(Tracked::Slab).then(|| linux.slab_map(memory)).transpose();
        let percpu = self.tracks(Tracked::Percpu).then(|| linux.percpu_chunks(memory)).transpose();
        let areas = self.tracks(Tracked::Vmalloc).then(|| linux.vmalloc_areas(memory)).transpose();
        let pages = self.tracks(Tracked::Pages).then(|| linux.page_map(memory)).transpose();
        Ok(Metadata {
            slabs: slabs.context("Cannot read the guest's slab metadata")?,
            percpu: percpu.context("Cannot read the guest's per-CPU chunks")?.unwrap_or_default(),
            areas: areas.context("Cannot read the guest's vmalloc areas")?,
            pages: pages.context("Cannot read the guest's page frames")?,
        })
    }

    /// Forgets everything, takes what the guest's metadata lists as allocated, and tracks from there. Such objects
    /// have no backtrace, so no annotation could spare them: they are scanned and never reported. Half a free or half
    /// an allocation would be taken for none: hence the quiet moment.
    fn reseed(&self) -> Result<usize> {
        let paused = self.pause_when_quiet()?;
        let seeded = self.seed(&paused.memory(), Paint::Gray)?;
        self.parts.recorder.enable(true);
        Ok(seeded)
    }

    /// Takes what the metadata of a machine that was not tracked list as allocated, to be reported where it is unreferenced:
    /// there is nothing better. It stands where it stands, quiet or not.
    pub fn seed_reportable(&self) -> Result<usize> {
        self.seed(&self.parts.guest.pause()?.memory(), Paint::Normal)
    }

    fn seed(&self, memory: &FrozenRam<'_>, paint: Paint) -> Result<usize> {
        let mut state = self.parts.recorder.state();
        let found = self.found(memory, &self.metadata(memory)?)?;
        state.reset();
        // What is found is no event.
        let allocs = state.registry.counters.allocs;
        for event in found {
            state.registry.alloc(&event);
            state.registry.paint(event.address, paint);
        }
        state.registry.counters.allocs = allocs;
        Ok(state.registry.len())
    }

    /// All that the guest's metadata list as allocated. A block of pages comes before what lies in it: where both have one
    /// address, the latter is what is found there.
    fn found(&self, memory: &FrozenRam<'_>, found: &Metadata) -> Result<Vec<AllocEvent<'static>>> {
        let linux = &self.parts.linux;
        // Their areas look like vmalloc's.
        let chunks = linux.percpu_chunks(memory).context("Cannot read the guest's per-CPU chunks")?;
        let copies: Vec<Va> = chunks.iter().flat_map(|chunk| &chunk.copies).copied().collect();
        let is_chunk =
            |area: &Area| copies.iter().any(|copy| (area.start..area.start + area.size).contains(copy));
        let direct = linux.direct_map_base(memory)?;
        // When they were allocated nobody knows: their age counts from here.
        let jiffies = linux.jiffies(memory).context("Cannot read the guest's clock")?;
        let mut events = Vec::new();
        let mut add = |address, size, kind, cache| {
            events.push(AllocEvent {
                address,
                size,
                kind,
                cache,
                comm: [0; 16],
                pid: 0,
                jiffies,
                stack: Backtrace::Frames(&[]),
            });
        };
        let used = |usage: Use| matches!(usage, Use::Slab | Use::User | Use::PageTable | Use::Kernel);
        for (frame, _) in
            found.pages.iter().flat_map(|p| (0..).zip(&p.uses)).filter(|(_, usage)| used(**usage))
        {
            add(direct + frame * PAGE_SIZE, PAGE_SIZE, Kind::Page, Va(0));
        }
        for (page, cache) in found.slabs.iter().flat_map(SlabMap::pages_with_caches) {
            for slot in page.allocated() {
                add(page.start + u64::from(slot) * cache.size, cache.object_size, Kind::Slab, cache.va);
            }
        }
        for area in found.areas.iter().flatten() {
            match area.made {
                Made::Alloc if !is_chunk(area) => add(area.start, area.size, Kind::Vmalloc, Va(0)),
                made if made.is_vmap() => add(area.start, area.size, Kind::Vmap, Va(0)),
                _ => {}
            }
        }
        for (cookie, size) in found.percpu.iter().flat_map(PercpuChunk::objects) {
            add(cookie, size, Kind::Percpu, Va(0));
        }
        Ok(events)
    }

    /// Brings the registry up to date after a trap was lost, as far as the metadata tell: no list has large kmallocs, but
    /// where there is one, the kernel has a compound page.
    fn close_gap(&self) -> Result<(Paused<'_>, Gap)> {
        const KINDS: [(Tracked, Kind); 3] =
            [(Tracked::Slab, Kind::Slab), (Tracked::Vmalloc, Kind::Vmalloc), (Tracked::Percpu, Kind::Percpu)];
        let paused = self.pause_when_quiet()?;
        let memory = &paused.memory();
        let linux = &self.parts.linux;
        let boot = linux.boot_objects(memory)?;
        let kinds: Vec<Kind> =
            KINDS.iter().filter(|(what, _)| self.tracks(*what)).map(|(_, kind)| *kind).collect();
        let metadata = self.metadata(memory)?;
        let areas = metadata.areas.as_deref().unwrap_or_default();
        let found = self.found(memory, &metadata)?.into_iter();
        let found = found.filter(|event| event.kind != Kind::Page && !boot.contains(&event.address));
        let (pages, structs) = (linux.page_map(memory)?, linux.page_structs(memory)?);
        let direct = linux.direct_map_base(memory)?;
        let may_be = |object: &Object| match object.kind {
            Kind::Large => {
                let frame = (object.address - direct) >> PAGE_SHIFT;
                pages.get(frame) == Use::Kernel && linux.is_compound(&structs, frame)
            }
            Kind::Vmap => is_vmap(areas, object),
            _ => true,
        };
        let gap = self.parts.recorder.state().registry.reconcile(&kinds, found, may_be);
        Ok((paused, gap))
    }
}
