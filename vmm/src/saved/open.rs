//! From a file to a detector.

use super::{Facts, Read5, format};
use crate::cli::Failure;
use crate::detector::{Detector, HostFacts, Parts, ScanOptions};
use crate::machine::{Guest, GuestRam, TrapInstruction};
use crate::run::RuleFiles;
use crate::tracer::{Recorder, State, breakpoint::Breakpoints};
use anyhow::{Context, Result, bail, ensure};
use guest_profiles::hooks::Tracked;
use introspect::arch::CpuState;
use introspect::hooks::{Plan, plan};
use introspect::image::{KernelImage, MAX_IMAGE_BYTES};
use introspect::kernel::Kernel;
use introspect::linux::{Linux, Placement};
use introspect::memory::{PAGE_SIZE, PhysicalMemory, RamRange};
use introspect::report::Order;
use introspect::vmcore::{ANOTHER_VERSION, Attached, Vmcore};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

/// Bytes that are copied at once.
const CHUNK: u64 = 1 << 20;
/// Largest state of the tracker, bytes: tens of millions of objects.
const MAX_STATE: u64 = 2 << 30;
/// Longest VMCOREINFO.
const MAX_VMCOREINFO: usize = PAGE_SIZE as usize;

/// What a file is to be looked at with; what is None is as it was when it was saved.
#[derive(Debug, Clone, Default)]
pub struct Opening {
    /// The kernel image; a snapshot has its own.
    pub kernel: Option<PathBuf>,
    /// A file of structure layouts; a snapshot has its own.
    pub types: Option<Vec<u8>>,
    /// Guest profile and suppressions; what is not given of them is as it was.
    pub rule_files: RuleFiles,
    /// What is looked for in a core without a tracker's state.
    pub track: Vec<Tracked>,
    /// `--min-age`.
    pub min_age_ms: Option<u64>,
    /// `--stack`.
    pub stack: Option<bool>,
    /// `--typed`.
    pub typed: Option<bool>,
    /// `--sort`.
    pub order: Order,
}

/// A saved machine.
pub struct Opened {
    /// Looks at it.
    pub detector: Arc<Detector>,
    /// It was tracked: objects have backtraces, and what was freed is known.
    pub tracked: bool,
}

/// Opens a snapshot or a vmcore.
///
/// # Errors
/// One sentence on what is wrong with the file, or with the kernel for it.
pub fn open(path: &Path, opening: &Opening) -> Result<Opened> {
    let mut file = File::open(path)?;
    let metadata = file.metadata()?;
    ensure!(metadata.is_file(), "It is no regular file");
    let core = Vmcore::read(&mut file, metadata.len())?;
    match core.attached {
        Some(attached) => snapshot(file, &core, &attached, metadata.len(), opening),
        None => foreign(file, &core, opening),
    }
}

/// A file of our own.
fn snapshot(
    mut file: File,
    core: &Vmcore,
    attached: &Attached,
    file_len: u64,
    opening: &Opening,
) -> Result<Opened> {
    ensure!(attached.format == format(), ANOTHER_VERSION);
    let end = attached.offset.checked_add(attached.len).and_then(|end| end.checked_add(attached.kernel_len));
    ensure!(end.is_some_and(|end| end <= file_len), "It is cut off: the tracker's state is not in it");
    let sizes = attached.len <= MAX_STATE && attached.kernel_len <= MAX_IMAGE_BYTES;
    ensure!(sizes, "It is damaged: the tracker's state or the kernel image is too large");
    let mut state = vec![0; attached.len as usize];
    file.seek(SeekFrom::Start(attached.offset))?;
    file.read_exact(&mut state)?;
    ensure!(
        crc32fast::hash(&state) == attached.crc,
        "It is damaged: the tracker's state is not what was saved"
    );
    let (facts, registry, modules, freed_by, mut history): Read5 =
        postcard::from_bytes(&state).context("The tracker's state cannot be read")?;
    ensure!(facts.placement.is_valid(), "It is damaged: no kernel can be placed like that");
    let image = match &opening.kernel {
        Some(path) => KernelImage::open(path)?,
        None => {
            let mut image = vec![0; attached.kernel_len as usize];
            file.read_exact(&mut image)?;
            KernelImage::parse(&image).context("The kernel image in it is damaged")?
        }
    };
    let facts = Facts {
        types: opening.types.clone().or(facts.types),
        rule_files: RuleFiles {
            profile: opening.rule_files.profile.clone().or(facts.rule_files.profile),
            suppressions: match opening.rule_files.suppressions.is_empty() {
                true => facts.rule_files.suppressions,
                false => opening.rule_files.suppressions.clone(),
            },
        },
        min_age_ms: opening.min_age_ms.unwrap_or(facts.min_age_ms),
        stack: opening.stack.unwrap_or(facts.stack),
        typed: opening.typed.unwrap_or(facts.typed),
        ..facts
    };
    let scans = facts.scans;
    let memory = memory(&file, core)?;
    let parts = parts(memory.clone(), image, &facts)?;
    let largest = memory.ranges().iter().map(|range| range.len).sum();
    let registry = introspect::registry::Registry::restore(&registry, largest);
    {
        let mut own = parts.recorder.modules.write().unwrap_or_else(PoisonError::into_inner);
        *own = modules;
        own.restore(&parts.linux, &memory);
    }
    *parts.recorder.state() = State::restored(registry, freed_by);
    history.bound();
    let detector = detector(parts, &facts, opening.order);
    detector.carry_on(scans, history);
    Ok(Opened { detector, tracked: true })
}

/// A core that somebody else wrote, or that has the machine only.
fn foreign(file: File, core: &Vmcore, opening: &Opening) -> Result<Opened> {
    let kernel = opening.kernel.as_ref().with_context(|| {
        Failure::usage("It is a core without the kernel's image")
            .hint("name the bzImage or vmlinux with --kernel")
    })?;
    let image = KernelImage::open(kernel)?;
    let ram = memory(&file, core)?;
    let vmcoreinfo = core.vmcoreinfo.clone().or_else(|| find_vmcoreinfo(&ram));
    let vmcoreinfo =
        vmcoreinfo.context("It says nowhere where the kernel is: there is no VMCOREINFO in it")?;
    let placement =
        Placement::from_vmcoreinfo(&vmcoreinfo).context("Its VMCOREINFO does not say where the kernel is")?;
    let host = HostFacts { kvm: "none".into(), tracer: "off".into(), trap: "none".into(), lab: None };
    let facts = Facts {
        placement,
        cpus: core.cpus.clone(),
        tracked: opening.track.clone(),
        host,
        types: opening.types.clone(),
        rule_files: opening.rule_files.clone(),
        scans: 0,
        // Nobody knows when anything was allocated.
        min_age_ms: 0,
        stack: opening.stack.unwrap_or(true),
        typed: opening.typed.unwrap_or(true),
    };
    let parts = parts(ram.clone(), image, &facts)?;
    let memory = &ram;
    {
        let mut modules = parts.recorder.modules.write().unwrap_or_else(PoisonError::into_inner);
        for va in parts.linux.modules(memory).context("Cannot read the list of modules")? {
            modules.load(parts.linux.module(memory, va)?, 0);
        }
    }
    let detector = detector(parts, &facts, opening.order);
    detector.seed_reportable().context("Cannot read what is allocated")?;
    Ok(Opened { detector, tracked: false })
}

/// Everything but what was tracked.
fn parts(ram: GuestRam, image: KernelImage, facts: &Facts) -> Result<Parts> {
    let kernel = Arc::new(Kernel::recover_with(image, facts.types.clone())?);
    let linux =
        Arc::new(Linux::new(kernel, facts.placement).context("Cannot find the kernel's data structures")?);
    check_kernel(&linux, &ram)?;
    let root = linux.space.root;
    let own_tables = |cpu: &CpuState| if cpu.root.0 == 0 { CpuState { root, ..*cpu } } else { *cpu };
    let cpus: Vec<CpuState> = facts.cpus.iter().map(own_tables).collect();
    let cpus =
        if facts.scans == 0 && facts.host.tracer == "off" { numbered(&linux, &ram, cpus) } else { cpus };
    let guest = Arc::new(Guest::saved(ram.clone(), cpus, facts.placement));
    let recorder = Arc::new(Recorder::new(Arc::clone(&linux), ram.clone())?);
    // Nothing will be trapped; the plan tells which functions are the allocator's.
    let instruction = TrapInstruction::ALL[0];
    let plan = plan(&linux.kernel, &guest_profiles::hooks::builtin(), &facts.tracked, instruction.len());
    let traps =
        Breakpoints::plant(Arc::clone(&recorder), Arc::clone(&linux), ram, &Plan::default(), instruction)?;
    Ok(Parts {
        guest,
        linux,
        recorder,
        traps: Arc::new(traps),
        plan,
        tracked: facts.tracked.clone(),
        rules: facts.rule_files.rules()?,
        rule_files: facts.rule_files.clone(),
        host: facts.host.clone(),
    })
}

fn detector(parts: Parts, facts: &Facts, order: Order) -> Arc<Detector> {
    let options = ScanOptions { min_age_ms: facts.min_age_ms, stack: facts.stack, typed: facts.typed, order };
    Arc::new(Detector::new(parts, options, 0))
}

/// CPUs by the numbers that the kernel gives them: notes are of those that were online, in order. One that stands on the
/// stack of a CPU's task is that CPU.
fn numbered(linux: &Linux, memory: &GuestRam, mut cpus: Vec<CpuState>) -> Vec<CpuState> {
    let tasks = linux.tasks(memory).unwrap_or_default();
    let count = linux.cpu_count(memory).unwrap_or(0);
    let stacks: Vec<_> = (0..count)
        .filter_map(|cpu| {
            let current = linux.current(memory, cpu).ok()?;
            let task = tasks.iter().find(|task| task.va == current)?;
            Some((cpu, task.stack_range()))
        })
        .collect();
    for cpu in cpus.iter_mut().filter(|cpu| !cpu.user_mode) {
        if let Some((index, _)) = stacks.iter().find(|(_, stack)| stack.contains(&cpu.registers.sp())) {
            cpu.index = *index;
        }
    }
    cpus
}

/// Whether it is this kernel that the memory holds.
fn check_kernel(linux: &Linux, memory: &GuestRam) -> Result<()> {
    let Some(va) = linux.symbol("linux_banner") else { return Ok(()) };
    let expected = &linux.kernel.image.banner;
    let mut there = vec![0; expected.len()];
    let read = linux.read(memory, va, &mut there);
    if read.is_err() || there != expected.as_bytes() {
        let hint = "it must be the very build; the core's release is behind OSRELEASE in its VMCOREINFO note";
        bail!(
            Failure::usage(format!("The memory in it is not that of this kernel, which is {expected:?}"))
                .hint(hint)
        );
    }
    Ok(())
}

/// The RAM: mapped where the file has it page by page, else copied.
fn memory(file: &File, core: &Vmcore) -> Result<GuestRam> {
    let plain = core.pieces.iter().all(|p| p.offset.is_multiple_of(PAGE_SIZE) && p.file_len == p.range.len);
    if plain {
        let ranges: Vec<(RamRange, u64)> = core.pieces.iter().map(|p| (p.range, p.offset)).collect();
        return GuestRam::of_file(&Arc::new(file.try_clone()?), &ranges);
    }
    let ram = GuestRam::new(core.pieces.iter().map(|piece| piece.range).collect())?;
    let mut input = file;
    let mut buffer = vec![0; CHUNK as usize];
    for piece in &core.pieces {
        input.seek(SeekFrom::Start(piece.offset))?;
        for start in (0..piece.file_len).step_by(CHUNK as usize) {
            let chunk = &mut buffer[..CHUNK.min(piece.file_len - start) as usize];
            input.read_exact(chunk)?;
            ram.write(piece.range.start + start, chunk)?;
        }
    }
    Ok(ram)
}

/// VMCOREINFO where the kernel keeps it, at the beginning of a page: for cores whose writer had no note of it.
fn find_vmcoreinfo(ram: &GuestRam) -> Option<String> {
    const BEGINNING: &[u8] = b"OSRELEASE=";
    let pages =
        ram.ranges().iter().flat_map(|r| (0..r.len / PAGE_SIZE).map(|page| r.start + page * PAGE_SIZE));
    let mut text = vec![0; MAX_VMCOREINFO];
    for page in pages {
        let mut beginning = [0; BEGINNING.len()];
        ram.read(page, &mut beginning).ok()?;
        if beginning == BEGINNING && ram.read(page, &mut text).is_ok() {
            let end = text.iter().position(|&b| b == 0).unwrap_or(text.len());
            let text = String::from_utf8_lossy(&text[..end]);
            if Placement::from_vmcoreinfo(&text).is_ok() {
                return Some(text.into_owned());
            }
        }
    }
    None
}
