//! SLUB: caches, and the cache of one object (mm/slub.c). The whole heap is in `slab_map`.

use super::Linux;
use super::lookup::Lookup;
use super::read::{Walk, le64, physical_end};
use crate::memory::{MemoryError, PAGE_SHIFT, PhysicalMemory, Va};
use crate::types::Field;
use std::ops::Range;

pub use super::slab_map::{Damage, SlabMap, SlabPage};

/// More caches than any guest has; a list beyond it is damage.
const MAX_CACHES: usize = 1 << 16;
/// Longest cache name, bytes.
const MAX_NAME: usize = 256;
/// Most memory nodes of any configuration (`MAX_NUMNODES`).
const MAX_NODES: u64 = 1024;
/// Largest `struct page` of any configuration.
const MAX_PAGE_STRUCT: usize = 128;

/// A `struct kmem_cache`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cache {
    /// Address of the `kmem_cache`.
    pub va: Va,
    /// Name, as in /proc/slabinfo.
    pub name: String,
    /// What the user asked for, bytes: the size kmemleak reports.
    pub object_size: u64,
    /// Distance between objects, bytes.
    pub size: u64,
    /// `flags`.
    pub flags: u64,
    /// True for SLAB_TYPESAFE_BY_RCU caches.
    pub typesafe_by_rcu: bool,
    /// True for SLAB_NOLEAKTRACE caches: kmemleak does not track them.
    pub no_leak_trace: bool,
}

/// The cache of this name.
///
/// # Errors
/// As [`unknown`].
pub fn named<'c>(caches: &'c [Cache], name: &str) -> anyhow::Result<&'c Cache> {
    caches.iter().find(|cache| cache.name == name).ok_or_else(|| unknown(name))
}

/// There is no cache of this name.
pub fn unknown(name: &str) -> anyhow::Error {
    anyhow::anyhow!(
        "The guest has no slab cache {name:?}; slabinfo lists them (SLUB may have merged it into another)"
    )
}

/// Offsets and addresses of SLUB's structures.
pub(super) struct Layout {
    slab_caches: Va,
    kmem_cache_node: Option<Va>,
    nr_node_ids: Option<Va>,
    cache_list: u64,
    name: u64,
    flags: Field,
    pub object_size: u64,
    size: u64,
    node: u64,
    typesafe_by_rcu: u64,
    no_leak_trace: u64,
    /// Offset of the next pointer inside a free object.
    pub free_pointer: u64,
    /// Key of the next pointers (CONFIG_SLAB_FREELIST_HARDENED).
    pub random: Option<u64>,
    /// Bytes before each object (SLUB debugging).
    pub red_left_pad: Option<u64>,
    /// None on kernels without per-CPU slabs (SLUB_TINY).
    pub cpu: Option<CpuLayout>,
    pub slab_cache: u64,
    pub freelist: u64,
    pub inuse: u64,
    pub objects: u64,
    /// None on kernels without KFENCE.
    pub kfence: Option<KfenceLayout>,
    /// Of slabs that are given back after a grace period.
    pub late: LateLayout,
}

/// How a slab of a cache with `SLAB_TYPESAFE_BY_RCU` waits to be given back (`free_slab`, mm/slub.c).
pub(super) struct LateLayout {
    /// Offset of the `struct rcu_head` in `struct slab`; the rest of the time other members lie there.
    pub head: u64,
    /// Offset of `func` in `rcu_head`.
    pub func: u64,
    /// The kernel's code, in which that function is.
    pub text: Range<Va>,
}

/// `struct kmem_cache_cpu`.
pub(super) struct CpuLayout {
    pub cpu_slab: u64,
    pub freelist: u64,
    pub slab: u64,
}

/// The sampling allocator, whose objects have pages of their own (mm/kfence).
pub(super) struct KfenceLayout {
    pub pool: Va,
    /// The array of `kfence_metadata`, or where the pointer to it is (6.6).
    pub metadata: Va,
    pub metadata_is_pointer: bool,
    pub metadata_size: u64,
    pub state: u64,
    pub addr: u64,
    pub allocated: u32,
}

impl Layout {
    pub fn new(lookup: &Lookup<'_>) -> anyhow::Result<Self> {
        let cache = |member| lookup.offset("kmem_cache", member);
        let slab = |member| lookup.offset("slab", member);
        // Flag bits became an enum in 6.9; before, they are the constants of include/linux/slab.h.
        let flag = |name, before: u64| lookup.types.enumerator(name).map_or(before, |bit| 1 << (bit & 63));
        let cpu = match lookup.types.offset("kmem_cache", "cpu_slab") {
            Some(cpu_slab) => Some(CpuLayout {
                cpu_slab,
                freelist: lookup.offset("kmem_cache_cpu", "freelist")?,
                slab: lookup.offset("kmem_cache_cpu", "slab")?,
            }),
            None => None,
        };
        Ok(Self {
            slab_caches: lookup.symbol("slab_caches")?,
            kmem_cache_node: lookup.symbol_if_any("kmem_cache_node"),
            nr_node_ids: lookup.symbol_if_any("nr_node_ids"),
            cache_list: cache("list")?,
            name: cache("name")?,
            flags: lookup.field("kmem_cache", "flags")?,
            object_size: cache("object_size")?,
            size: cache("size")?,
            node: cache("node")?,
            typesafe_by_rcu: flag("_SLAB_TYPESAFE_BY_RCU", 0x8_0000),
            no_leak_trace: flag("_SLAB_NOLEAKTRACE", 0x80_0000),
            free_pointer: cache("offset")?,
            random: lookup.types.offset("kmem_cache", "random"),
            red_left_pad: lookup.types.offset("kmem_cache", "red_left_pad"),
            cpu,
            slab_cache: slab("slab_cache")?,
            freelist: slab("freelist")?,
            inuse: slab("inuse")?,
            objects: slab("objects")?,
            kfence: KfenceLayout::new(lookup)?,
            late: LateLayout::new(lookup)?,
        })
    }
}

impl LateLayout {
    /// `rcu_head` is a macro (include/linux/types.h), so that compilers call the member of that name `callback_head`, too.
    fn new(lookup: &Lookup<'_>) -> anyhow::Result<Self> {
        Ok(Self {
            head: lookup.offset("slab", "callback_head")?,
            func: lookup.offset("callback_head", "func")?,
            text: lookup.symbol("_stext")?..lookup.symbol("_etext")?,
        })
    }
}

impl KfenceLayout {
    fn new(lookup: &Lookup<'_>) -> anyhow::Result<Option<Self>> {
        let (Some(pool), Some((_, size))) =
            (lookup.symbol_if_any("__kfence_pool"), lookup.link("kfence_metadata"))
        else {
            return Ok(None);
        };
        let metadata_size = lookup.size_of("kfence_metadata")?;
        Ok(Some(Self {
            pool,
            metadata: lookup.symbol("kfence_metadata")?,
            metadata_is_pointer: size < metadata_size,
            metadata_size,
            state: lookup.offset("kfence_metadata", "state")?,
            addr: lookup.offset("kfence_metadata", "addr")?,
            allocated: lookup.enumerator("KFENCE_OBJECT_ALLOCATED")? as u32,
        }))
    }
}

impl Linux {
    /// All caches (`slab_caches`).
    ///
    /// # Errors
    /// A damaged list or cache, with its address.
    pub fn caches(&self, memory: &impl PhysicalMemory) -> Result<Vec<Cache>, MemoryError> {
        let nodes = self.list(memory, self.slab.slab_caches, MAX_CACHES)?;
        nodes.into_iter().map(|node| self.cache(memory, node - self.slab.cache_list)).collect()
    }

    /// The `kmem_cache` whose slab holds the object at `object`: one look at its struct page.
    /// None when the page is no slab (large kmalloc, not yet initialised).
    ///
    /// # Errors
    /// The frame has no `struct page`.
    pub fn cache_of(&self, memory: &impl PhysicalMemory, object: Va) -> Result<Option<Va>, MemoryError> {
        self.cache_of_with(memory, &mut Walk::default(), object)
    }

    /// [`Linux::cache_of`] with remembered translations.
    ///
    /// # Errors
    /// As [`Linux::cache_of`].
    pub fn cache_of_with(
        &self,
        memory: &impl PhysicalMemory,
        walk: &mut Walk,
        object: Va,
    ) -> Result<Option<Va>, MemoryError> {
        let offset = object - self.direct_map_base(memory)?;
        if offset >= physical_end(memory) {
            return Ok(None);
        }
        let mut buf = [0; MAX_PAGE_STRUCT];
        let page = &mut buf[..self.pages.size.min(MAX_PAGE_STRUCT as u64) as usize];
        let mut at = self.page_structs_base(memory)? + (offset >> PAGE_SHIFT) * self.pages.size;
        self.read_with(memory, walk, at, page)?;
        if let Some(head) = self.pages.tail_of(page) {
            at = head;
            self.read_with(memory, walk, at, page)?;
        }
        let cache = Va(le64(page, self.slab.slab_cache));
        Ok((self.pages.is(self.pages.slab, page) && cache != Va(0)).then_some(cache))
    }

    /// Reads one cache's description.
    ///
    /// # Errors
    /// Not mapped, or sizes that no cache has.
    pub fn cache(&self, memory: &impl PhysicalMemory, va: Va) -> Result<Cache, MemoryError> {
        let layout = &self.slab;
        let mut flags = [0; 8];
        let width = (layout.flags.size as usize).min(8);
        self.read(memory, va + layout.flags.offset, &mut flags[..width])?;
        let flags = u64::from_le_bytes(flags);
        let size = u64::from(self.read_u32(memory, va + layout.size)?);
        let object_size = self.cache_object_size(memory, va)?;
        if size == 0 || object_size > size {
            return Err(MemoryError::Corrupt { va, what: "a slab cache has impossible object sizes" });
        }
        let name = self.read_va(memory, va + layout.name)?;
        Ok(Cache {
            va,
            name: if name == Va(0) { String::new() } else { self.read_string(memory, name, MAX_NAME)? },
            object_size,
            size,
            flags,
            typesafe_by_rcu: flags & layout.typesafe_by_rcu != 0,
            no_leak_trace: flags & layout.no_leak_trace != 0,
        })
    }

    /// `object_size` of a cache, bytes: what a traced event wants. One read.
    ///
    /// # Errors
    /// Not mapped.
    pub fn cache_object_size(&self, memory: &impl PhysicalMemory, va: Va) -> Result<u64, MemoryError> {
        self.read_u32(memory, va + self.slab.object_size).map(u64::from)
    }

    /// Objects SLUB takes from a slab without any allocator call: the `kmem_cache_node`s of the
    /// cache `kmem_cache_node` itself (`early_kmem_cache_node_alloc`), one per node.
    ///
    /// # Errors
    /// Not mapped.
    pub fn boot_objects(&self, memory: &impl PhysicalMemory) -> Result<Vec<Va>, MemoryError> {
        let cache = match self.slab.kmem_cache_node {
            Some(variable) => self.read_va(memory, variable)?,
            // Without data symbols (arm64) it is known by its name.
            None => {
                let caches = self.caches(memory)?;
                let named = caches.iter().find(|cache| cache.name == "kmem_cache_node");
                named.map_or(Va(0), |cache| cache.va)
            }
        };
        if cache == Va(0) {
            return Ok(Vec::new());
        }
        let nodes = match self.slab.nr_node_ids {
            Some(va) => u64::from(self.read_u32(memory, va)?).min(MAX_NODES),
            None => 1,
        };
        let mut objects = Vec::new();
        for node in 0..nodes {
            let object = self.read_va(memory, cache + self.slab.node + 8 * node)?;
            if object != Va(0) {
                objects.push(object);
            }
        }
        Ok(objects)
    }
}
