//! Memory zones and their free blocks (`struct zone`, include/linux/mmzone.h).

use super::Linux;
use super::lookup::Lookup;
use super::page_structs::MAX_ORDER;
use super::read::physical_end;
use crate::memory::{MemoryError, PAGE_SHIFT, PhysicalMemory, Va};
use anyhow::ensure;

/// Longest name of a zone or migrate type; the kernel's are shorter than 16.
const MAX_NAME: usize = 64;
/// Most migrate types of any configuration (`MIGRATE_TYPES`, mmzone.h).
const MAX_TYPES: u64 = 16;
/// Bytes of a `list_head`.
const LIST_HEAD: u64 = 16;

/// A zone that has memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Zone {
    /// Number of its node.
    pub node: u32,
    /// Name, as in /proc/buddyinfo.
    pub name: String,
    /// Free blocks by order, as the page allocator counts them.
    pub free: Vec<u64>,
    /// Name of each migrate type with its free blocks by order, counted on the lists; none on kernels that do not name
    /// their types.
    pub free_by_type: Vec<(String, Vec<u64>)>,
}

/// Offsets and addresses.
struct Layout {
    node_id: u64,
    name: u64,
    free_area: u64,
    /// Bytes of a `free_area`, and how many a zone has: one for each order.
    stride: u64,
    orders: u64,
    free_list: u64,
    types: u64,
    nr_free: u64,
    /// Pointers to the names of the migrate types.
    type_names: Option<Va>,
}

impl Layout {
    fn new(lookup: &Lookup<'_>) -> anyhow::Result<Self> {
        let areas = lookup.field("zone", "free_area")?;
        let stride = lookup.size_of("free_area")?;
        let lists = lookup.field("free_area", "free_list")?;
        let (orders, types) = (areas.size / stride.max(1), lists.size / LIST_HEAD);
        ensure!(
            orders <= MAX_ORDER + 1 && types <= MAX_TYPES,
            "The kernel's BTF has {orders} orders of free blocks of {types} types"
        );
        Ok(Self {
            node_id: lookup.offset("pglist_data", "node_id")?,
            name: lookup.offset("zone", "name")?,
            free_area: areas.offset,
            stride,
            orders,
            free_list: lists.offset,
            types,
            nr_free: lookup.offset("free_area", "nr_free")?,
            type_names: lookup.symbol_if_any("migratetype_names"),
        })
    }

    /// The `free_area` of each order.
    fn areas(&self, zone: Va) -> impl Iterator<Item = Va> + use<> {
        let Self { free_area, stride, orders, .. } = *self;
        (0..orders).map(move |order| zone + free_area + order * stride)
    }
}

impl Linux {
    /// All zones that have memory, node by node from the lowest addresses.
    ///
    /// # Errors
    /// A kernel without the types it needs, or a damaged zone or list, with its address.
    pub fn memory_zones(&self, memory: &impl PhysicalMemory) -> anyhow::Result<Vec<Zone>> {
        let lookup = self.lookup()?;
        let layout = Layout::new(&lookup)?;
        let zones = self.populated_zones(memory, &lookup)?;
        let zone = |(node, zone)| self.memory_zone(memory, &layout, node, zone);
        Ok(zones.into_iter().map(zone).collect::<Result<_, _>>()?)
    }

    /// `pglist_data` and `zone` of every zone that has memory.
    pub(super) fn populated_zones(
        &self,
        memory: &impl PhysicalMemory,
        lookup: &Lookup<'_>,
    ) -> anyhow::Result<Vec<(Va, Va)>> {
        let present_pages = lookup.offset("zone", "present_pages")?;
        let mut zones = Vec::new();
        for node in self.nodes(memory)? {
            for zone in self.zones_of(node) {
                if self.read_u64(memory, zone + present_pages)? != 0 {
                    zones.push((node, zone));
                }
            }
        }
        Ok(zones)
    }

    fn memory_zone(
        &self,
        memory: &impl PhysicalMemory,
        layout: &Layout,
        node: Va,
        zone: Va,
    ) -> Result<Zone, MemoryError> {
        let name = self.read_va(memory, zone + layout.name)?;
        let free = layout.areas(zone).map(|area| self.read_u64(memory, area + layout.nr_free));
        Ok(Zone {
            node: self.read_u32(memory, node + layout.node_id)?,
            name: self.read_string(memory, name, MAX_NAME)?,
            free: free.collect::<Result<_, _>>()?,
            free_by_type: self.free_by_type(memory, layout, zone)?,
        })
    }

    fn free_by_type(
        &self,
        memory: &impl PhysicalMemory,
        layout: &Layout,
        zone: Va,
    ) -> Result<Vec<(String, Vec<u64>)>, MemoryError> {
        let Some(names) = layout.type_names else { return Ok(Vec::new()) };
        // No more blocks than pages, on all lists together.
        let mut left = usize::try_from(physical_end(memory) >> PAGE_SHIFT).unwrap_or(usize::MAX);
        let mut types = Vec::new();
        for ty in 0..layout.types {
            let name = self.read_va(memory, names + 8 * ty)?;
            let mut blocks = Vec::new();
            for area in layout.areas(zone) {
                let list = self.list(memory, area + layout.free_list + LIST_HEAD * ty, left)?;
                left -= list.len();
                blocks.push(list.len() as u64);
            }
            types.push((self.read_string(memory, name, MAX_NAME)?, blocks));
        }
        Ok(types)
    }
}
