//! The counters of the memory management, with the names that /proc/vmstat gives them (mm/vmstat.c).
//!
//! One array of names stands for five arrays of counters, one behind the other: of zones, of the placement on NUMA
//! nodes, of nodes, some single variables, and events. Zones and nodes are counted in global sums and in small
//! differences, which each CPU adds to them when they pass a threshold or every second; events each CPU counts alone.

use super::Linux;
use super::lookup::Lookup;
use super::read::le64;
use crate::memory::{MemoryError, PhysicalMemory, Va};
use crate::types::Field;
use anyhow::ensure;

/// Bounds against damaged names and types: counters, and bytes of a name. Real kernels have about 200 counters.
const MAX_COUNTERS: u64 = 1024;
const MAX_NAME: usize = 64;
/// Most variables between the counters of nodes and the events; 6.12 has four.
const MAX_VARIABLES: usize = 32;
/// Names of the first counter of nodes and of the first event, which show where these begin.
const FIRST_OF_NODES: &str = "nr_inactive_anon";
const FIRST_EVENT: &str = "pgpgin";
/// Bytes of a counter that is no difference.
const WORD: u64 = 8;

/// A counter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counter {
    /// Name, as in /proc/vmstat.
    pub name: String,
    /// Value in the kernel's own unit: mostly pages or events; `pgpgin` and `pgpgout` are sectors, and the huge pages
    /// are pages of the base size.
    pub value: i64,
}

/// Counters of one kind.
struct Group {
    count: usize,
    /// The global sums.
    sums: Va,
    /// Where each CPU's parts are; None on kernels for one CPU, which need none.
    parts: Option<Parts>,
}

/// A CPU's parts of the counters.
struct Parts {
    /// Offset in their owner (a zone or a node) of the pointer to the per-CPU structure.
    pointer: u64,
    /// Offset in that structure, and bytes of all.
    offset: u64,
    bytes: usize,
}

/// Offsets and addresses.
struct Layout {
    names: Va,
    zones: Group,
    /// None on kernels without NUMA.
    numa: Option<Group>,
    nodes: Group,
    /// Offset of the events in each CPU's area, and how many there are; None without CONFIG_VM_EVENT_COUNTERS.
    events: Option<(u64, usize)>,
}

impl Layout {
    fn new(lookup: &Lookup<'_>) -> anyhow::Result<Self> {
        let in_zone = lookup.offset("zone", "per_cpu_zonestats").ok();
        let in_node = lookup.offset("pglist_data", "per_cpu_nodestats").ok();
        let numa = lookup.field("zone", "vm_numa_event").ok();
        let events = match (lookup.percpu_if_any("vm_event_states"), lookup.field("vm_event_state", "event"))
        {
            (Some(offset), Ok(field)) => Some((offset + field.offset, count(field)?)),
            _ => None,
        };
        let group = |counters, sums, parts, pointer| Group::new(lookup, counters, sums, parts, pointer);
        Ok(Self {
            names: lookup.symbol("vmstat_text")?,
            zones: group(
                lookup.field("zone", "vm_stat")?,
                "vm_zone_stat",
                ("per_cpu_zonestat", "vm_stat_diff"),
                in_zone,
            )?,
            numa: numa
                .map(|f| group(f, "vm_numa_event", ("per_cpu_zonestat", "vm_numa_event"), in_zone))
                .transpose()?,
            nodes: group(
                lookup.field("pglist_data", "vm_stat")?,
                "vm_node_stat",
                ("per_cpu_nodestat", "vm_node_stat_diff"),
                in_node,
            )?,
            events,
        })
    }
}

impl Group {
    /// Counters as many as in `counters`; the CPUs' parts are the named member of what `pointer` leads to.
    fn new(
        lookup: &Lookup<'_>,
        counters: Field,
        sums: &str,
        (structure, member): (&str, &str),
        pointer: Option<u64>,
    ) -> anyhow::Result<Self> {
        let count = count(counters)?;
        let parts = match (pointer, lookup.field(structure, member)) {
            (Some(pointer), Ok(field)) => {
                let bytes = count as u64 * WORD;
                ensure!(
                    field.size == count as u64 || field.size == bytes,
                    "The kernel's BTF has {} bytes of {member} for {count} counters",
                    field.size
                );
                Some(Parts { pointer, offset: field.offset, bytes: field.size as usize })
            }
            _ => None,
        };
        Ok(Self { count, sums: lookup.symbol(sums)?, parts })
    }
}

/// Elements of an array of counters.
fn count(array: Field) -> anyhow::Result<usize> {
    let count = array.size / WORD;
    ensure!(count <= MAX_COUNTERS, "The kernel's BTF has an array of {count} counters");
    Ok(count as usize)
}

/// The array of names, by what they name.
struct Names {
    levels: Vec<String>,
    variables: Vec<String>,
    events: Vec<String>,
}

impl Linux {
    /// Every counter of /proc/vmstat, in its order. What CPUs have not added to the sums yet is added here, as the file's
    /// own reader does for events only. The two limits of dirty pages, which the kernel works out when asked, are left
    /// out.
    ///
    /// # Errors
    /// A kernel without the names or types it needs, or memory that cannot be read, with its address.
    pub fn counters(&self, memory: &impl PhysicalMemory) -> anyhow::Result<Vec<Counter>> {
        let lookup = self.lookup()?;
        let layout = Layout::new(&lookup)?;
        let zones = self.populated_zones(memory, &lookup)?;
        let zones: Vec<Va> = zones.into_iter().map(|(_, zone)| zone).collect();
        let mut values = levels(self.sums(memory, &layout.zones, &zones)?);
        if let Some(numa) = &layout.numa {
            values.extend(self.sums(memory, numa, &zones)?);
        }
        let first_of_nodes = values.len();
        values.extend(levels(self.sums(memory, &layout.nodes, &self.nodes(memory)?)?));
        let events = self.events(memory, &layout)?;
        let names = self.counter_names(memory, layout.names, values.len(), events.len())?;
        ensure!(
            names.levels.get(first_of_nodes).is_some_and(|name| name == FIRST_OF_NODES),
            "The kernel's names of counters at {} do not fit its counters",
            layout.names
        );
        let mut shown = names.levels;
        for name in names.variables {
            if let Some(variable) = self.symbol(&name) {
                values.push(self.read_u64(memory, variable)?.cast_signed());
                shown.push(name);
            }
        }
        let all = shown.into_iter().chain(names.events).zip(values.into_iter().chain(events));
        // A counter without a name is one that this configuration does not have.
        Ok(all.filter(|(name, _)| !name.is_empty()).map(|(name, value)| Counter { name, value }).collect())
    }

    /// The global sums with every CPU's part added.
    fn sums(
        &self,
        memory: &impl PhysicalMemory,
        group: &Group,
        owners: &[Va],
    ) -> Result<Vec<i64>, MemoryError> {
        let mut sums = vec![0; group.count];
        self.add_counters(memory, group.sums, group.count * WORD as usize, &mut sums)?;
        let Some(parts) = &group.parts else { return Ok(sums) };
        let pointers = owners.iter().map(|&owner| self.read_u64(memory, owner + parts.pointer));
        let mut pointers = pointers.collect::<Result<Vec<_>, _>>()?;
        // Early in boot all zones and nodes share one structure.
        pointers.sort_unstable();
        pointers.dedup();
        for pointer in pointers.into_iter().filter(|&pointer| pointer != 0) {
            for cpu in 0..self.cpu_count(memory)? {
                let at = self.percpu_base(memory, cpu)? + pointer + parts.offset;
                self.add_counters(memory, at, parts.bytes, &mut sums)?;
            }
        }
        Ok(sums)
    }

    fn events(&self, memory: &impl PhysicalMemory, layout: &Layout) -> Result<Vec<i64>, MemoryError> {
        let Some((offset, count)) = layout.events else { return Ok(Vec::new()) };
        let mut sums = vec![0; count];
        for cpu in 0..self.cpu_count(memory)? {
            let at = self.percpu_base(memory, cpu)? + offset;
            self.add_counters(memory, at, count * WORD as usize, &mut sums)?;
        }
        Ok(sums)
    }

    /// Adds an array of signed bytes or words.
    fn add_counters(
        &self,
        memory: &impl PhysicalMemory,
        at: Va,
        bytes: usize,
        sums: &mut [i64],
    ) -> Result<(), MemoryError> {
        let mut raw = vec![0; bytes];
        self.read(memory, at, &mut raw)?;
        let width = (bytes / sums.len().max(1)).max(1);
        for (sum, part) in sums.iter_mut().zip(raw.chunks_exact(width)) {
            *sum = sum.wrapping_add(match part {
                [byte] => i64::from(byte.cast_signed()),
                word => le64(word, 0).cast_signed(),
            });
        }
        Ok(())
    }

    /// Names of `levels` counters, of the variables behind them, and of `events` events.
    fn counter_names(
        &self,
        memory: &impl PhysicalMemory,
        array: Va,
        levels: usize,
        events: usize,
    ) -> Result<Names, MemoryError> {
        let name = |at: usize| {
            let text = self.read_va(memory, array + WORD * at as u64)?;
            if text == Va(0) { Ok(String::new()) } else { self.read_string(memory, text, MAX_NAME) }
        };
        let mut variables = Vec::new();
        let tried = if events > 0 { MAX_VARIABLES } else { 0 };
        for at in levels..levels + tried {
            let next = name(at)?;
            if next == FIRST_EVENT {
                break;
            }
            variables.push(next);
        }
        if events > 0 && variables.len() == tried {
            return Err(MemoryError::Corrupt {
                va: array,
                what: "no name of a counter is the first event's",
            });
        }
        let first = levels + variables.len();
        Ok(Names {
            levels: (0..levels).map(name).collect::<Result<_, _>>()?,
            variables,
            events: (first..first + events).map(name).collect::<Result<_, _>>()?,
        })
    }
}

/// As the kernel shows amounts, which can be below zero for a moment while CPUs hold parts of them.
fn levels(sums: Vec<i64>) -> Vec<i64> {
    sums.into_iter().map(|sum| sum.max(0)).collect()
}
