//! What is known of a word among the roots: its address, and whose it is.

use super::ScanInput;
use super::guest::GuestMemory;
use crate::linux::Linux;
use crate::memory::{FrozenMemory, MemoryError, PAGE_SHIFT, Pa, Va};
use crate::symbols::Resolved;
use std::fmt;

/// A word among the roots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Region, as scans name it.
    pub region: String,
    /// Guest physical address.
    pub pa: Pa,
    /// Kernel address: that of its owner, else the direct map's.
    pub va: Va,
    /// Whose it is, where that is known.
    pub owner: Option<Owner>,
}

/// Whose word it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// A variable's.
    Variable {
        /// The symbol at or below it.
        name: String,
        /// Distance from that symbol, bytes.
        offset: u64,
        /// The symbol's size, bytes.
        size: u64,
        /// Its module, unless it is the kernel image's.
        module: Option<String>,
        /// The CPU whose copy it is, of a per-CPU variable.
        cpu: Option<usize>,
    },
    /// A task's: it is on its kernel stack.
    Task {
        /// Name.
        comm: String,
        /// Thread id in the initial namespace.
        pid: i32,
    },
    /// Some per-CPU allocation's.
    PerCpu {
        /// The CPU whose copy it is.
        cpu: usize,
    },
    /// The `struct page` of this frame.
    Page {
        /// Frame number.
        frame: u64,
    },
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Variable { name, offset, size, module, cpu } => {
                write!(f, "{name}+{offset:#x}/{size:#x}")?;
                if let Some(module) = module {
                    write!(f, " [{module}]")?;
                }
                cpu.map_or(Ok(()), |cpu| write!(f, " of CPU {cpu}"))
            }
            // Quoted and escaped: a task chooses its name.
            Self::Task { comm, pid } => write!(f, "stack of {comm:?}, pid {pid}"),
            Self::PerCpu { cpu } => write!(f, "copy of CPU {cpu}"),
            Self::Page { frame } => write!(f, "struct page of frame {frame:#x}"),
        }
    }
}

/// Finds out about the root word at `pa`.
///
/// # Errors
/// A structure of the guest that is damaged, with its address.
pub fn place<M: FrozenMemory>(
    input: &ScanInput<'_, M>,
    guest: &GuestMemory<'_, M>,
    region: &str,
    pa: Pa,
) -> Result<Place, MemoryError> {
    // Stacks first: that of the first task is a variable, too.
    let mut found = on_stack(input, guest, pa)?;
    for search in [in_image, in_module, in_per_cpu_memory, in_page_structs] {
        if found.is_none() {
            found = search(input, guest, pa)?;
        }
    }
    let (va, owner) = found.unwrap_or((Va(guest.direct().start) + pa.0, None));
    Ok(Place { region: region.to_owned(), pa, va, owner })
}

/// An address and its owner.
type Found = Option<(Va, Option<Owner>)>;

fn on_stack<M: FrozenMemory>(
    input: &ScanInput<'_, M>,
    guest: &GuestMemory<'_, M>,
    pa: Pa,
) -> Result<Found, MemoryError> {
    let tasks = input.linux.tasks(input.memory)?;
    Ok(tasks.iter().filter(|t| t.stack != Va(0)).find_map(|task| {
        let va = guest.address_in(task.stack_range(), pa)?;
        Some((va, Some(Owner::Task { comm: task.name(), pid: task.pid })))
    }))
}

fn in_image<M: FrozenMemory>(
    input: &ScanInput<'_, M>,
    guest: &GuestMemory<'_, M>,
    pa: Pa,
) -> Result<Found, MemoryError> {
    let linux = input.linux;
    for root in linux.static_roots(input.memory)? {
        let Some(va) = guest.address_in(root.range.clone(), pa) else { continue };
        let owner = match linux.kernel.symbols.resolve(va - linux.placement.slide) {
            Some(resolved) => Some(variable(&resolved)),
            None => per_cpu_variable(linux, input.memory, va)?,
        };
        return Ok(Some((va, owner)));
    }
    Ok(None)
}

/// The per-CPU variable of the image whose copy is at `va`.
fn per_cpu_variable(linux: &Linux, memory: &impl FrozenMemory, va: Va) -> Result<Option<Owner>, MemoryError> {
    let symbols = &linux.kernel.symbols;
    let (Some(start), Some(end)) = (symbols.lookup("__per_cpu_start"), symbols.lookup("__per_cpu_end"))
    else {
        return Ok(None);
    };
    for cpu in 0..linux.cpu_count(memory)? {
        let link = va - linux.percpu_base(memory, cpu)?.0 - linux.percpu_slide();
        if !(start..end).contains(&link) {
            continue;
        }
        let below = || symbols.iter().take_while(|s| s.va <= link).filter(|s| s.va >= start);
        // Of several at one address the first, as elsewhere.
        let nearest = below().last().and_then(|last| below().find(|s| s.va == last.va));
        return Ok(nearest.map(|symbol| Owner::Variable {
            name: symbol.name.to_owned(),
            offset: link - symbol.va,
            size: symbols.size_of(symbol),
            module: None,
            cpu: Some(cpu),
        }));
    }
    Ok(None)
}

fn in_module<M: FrozenMemory>(
    input: &ScanInput<'_, M>,
    guest: &GuestMemory<'_, M>,
    pa: Pa,
) -> Result<Found, MemoryError> {
    Ok(input.modules.data().find_map(|(_, range)| {
        let va = guest.address_in(Va(range.start)..Va(range.end), pa)?;
        Some((va, input.modules.resolve(va, u64::MAX).as_ref().map(variable)))
    }))
}

fn in_per_cpu_memory<M: FrozenMemory>(
    _: &ScanInput<'_, M>,
    guest: &GuestMemory<'_, M>,
    pa: Pa,
) -> Result<Found, MemoryError> {
    Ok(guest.percpu().iter().find_map(|chunk| {
        chunk.copies.iter().enumerate().find_map(|(cpu, &copy)| {
            let va = guest.address_in(copy..copy + chunk.size, pa)?;
            Some((va, Some(Owner::PerCpu { cpu })))
        })
    }))
}

fn in_page_structs<M: FrozenMemory>(
    input: &ScanInput<'_, M>,
    guest: &GuestMemory<'_, M>,
    pa: Pa,
) -> Result<Found, MemoryError> {
    let structs = input.linux.page_structs(input.memory)?;
    let frames = input.memory.ranges().last().map_or(0, |ram| (ram.start.0 + ram.len) >> PAGE_SHIFT);
    let va = guest.address_in(structs.base..structs.base + frames.saturating_mul(structs.size), pa);
    Ok(va.map(|va| (va, Some(Owner::Page { frame: (va - structs.base) / structs.size.max(1) }))))
}

fn variable(resolved: &Resolved<'_>) -> Owner {
    Owner::Variable {
        name: resolved.name.to_owned(),
        offset: resolved.offset,
        size: resolved.size,
        module: resolved.module.map(str::to_owned),
        cpu: None,
    }
}
