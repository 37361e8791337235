//! The whole slab heap from the allocator's own metadata: every slab page, which of its objects are allocated.

use super::Linux;
use super::page_structs::Kind;
use super::read::{le16, le64};
use super::slab::{Cache, KfenceLayout};
use crate::memory::{FrozenMemory, MemoryError, PAGE_SHIFT, PAGE_SIZE, Pa, Va};
use rustc_hash::FxHashMap;

/// One slab page (compound) and which of its objects are allocated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlabPage {
    /// Index into [`SlabMap::caches`].
    pub cache: u32,
    /// Address of the first object.
    pub start: Va,
    /// Number of object slots.
    pub objects: u32,
    /// Bit i of word i/64: slot i is allocated.
    pub allocated: Vec<u64>,
    /// The one object is in the pool of the sampling allocator (KFENCE), on no slab of its cache.
    pub sampled: bool,
}

impl SlabPage {
    /// Indices of the allocated slots, ascending.
    pub fn allocated(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.objects).filter(|&i| self.allocated[i as usize / 64] >> (i % 64) & 1 != 0)
    }
}

/// The whole slab heap at one pause.
#[derive(Debug, Clone, Default)]
pub struct SlabMap {
    /// All caches.
    pub caches: Vec<Cache>,
    /// All slab pages, ascending by address.
    pub pages: Vec<SlabPage>,
    /// Slabs whose freelist leads nowhere sensible (a guest that wrote to freed memory); their objects count as
    /// allocated as far as the freelist could not be followed. And slabs of a cache that cannot be read, which are left
    /// out.
    pub damaged: Vec<Damage>,
}

impl SlabMap {
    /// All slab pages with their caches.
    pub fn pages_with_caches(&self) -> impl Iterator<Item = (&SlabPage, &Cache)> {
        self.pages.iter().filter_map(|page| Some((page, self.caches.get(page.cache as usize)?)))
    }
}

/// What is wrong with a slab.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Index into [`SlabMap::caches`]; None when the cache itself is damaged.
    pub cache: Option<u32>,
    /// Address of the slab's first object.
    pub slab: Va,
    /// What was found there.
    pub error: MemoryError,
}

/// A cache while its slabs are decoded.
struct Decoder {
    index: u32,
    size: u64,
    /// Offset of the next pointer in a free object.
    free_pointer: u64,
    random: u64,
    hardened: bool,
    red_left_pad: u64,
}

/// One slab.
struct Slab<'m> {
    /// Address of the first object.
    start: Va,
    objects: u32,
    /// From the first object to the end of the last.
    bytes: &'m [u8],
}

impl Linux {
    /// Every slab page of the guest with its freelists decoded: the page's own, each CPU's active
    /// freelist; per-CPU and node partial pages.
    ///
    /// # Errors
    /// Caches or page tables that are damaged, with the address. Damaged freelists are listed in
    /// [`SlabMap::damaged`].
    pub fn slab_map(&self, memory: &impl FrozenMemory) -> Result<SlabMap, MemoryError> {
        let structs = self.page_structs(memory)?;
        let mut map = SlabMap::default();
        let mut decoders = FxHashMap::default();
        for cache in self.caches(memory)? {
            self.add_cache(memory, &mut map, &mut decoders, cache)?;
        }
        let active = self.active_freelists(memory, &map.caches)?;
        for (frame, page) in structs.iter() {
            // A tail's flags and type are its own on some kernels: only heads are looked at.
            if self.pages.tail_of(page).is_some() || !self.pages.is(self.pages.slab, page) {
                continue;
            }
            let cache = Va(le64(page, self.slab.slab_cache));
            // A page that is only just becoming a slab, or a page of the KFENCE pool that was never used.
            if cache == Va(0) || self.slab_objects(page) == 0 {
                continue;
            }
            if !decoders.contains_key(&cache) {
                // Boot-time caches are not in the list yet, dying ones no more.
                let added = self.cache(memory, cache);
                if let Err(damage) = added.and_then(|c| self.add_cache(memory, &mut map, &mut decoders, c)) {
                    let slab = self.direct_map_base(memory)? + (frame << PAGE_SHIFT);
                    map.damaged.push(Damage { cache: None, slab, error: damage });
                    continue;
                }
            }
            let decoder = &decoders[&cache];
            if self.pages.is(Kind::Flag(self.pages.reserved), page) {
                // The page allocator never hands out reserved pages: a page of the KFENCE pool.
                map.pages.extend(self.kfence_page(memory, decoder.index, frame)?);
            } else {
                let lists = active.get(&(structs.base + frame * structs.size)).map_or(&[][..], Vec::as_slice);
                self.add_slab(memory, &mut map, decoder, frame, page, lists)?;
            }
        }
        map.pages.sort_by_key(|p| p.start);
        Ok(map)
    }

    fn add_cache(
        &self,
        memory: &impl FrozenMemory,
        map: &mut SlabMap,
        decoders: &mut FxHashMap<Va, Decoder>,
        cache: Cache,
    ) -> Result<(), MemoryError> {
        let layout = &self.slab;
        let word = |offset| self.read_u64(memory, cache.va + offset);
        let decoder = Decoder {
            index: map.caches.len() as u32,
            size: cache.size,
            free_pointer: u64::from(self.read_u32(memory, cache.va + layout.free_pointer)?),
            random: layout.random.map_or(Ok(0), word)?,
            hardened: layout.random.is_some(),
            red_left_pad: match layout.red_left_pad {
                Some(offset) => u64::from(self.read_u32(memory, cache.va + offset)?),
                None => 0,
            },
        };
        if decoder.free_pointer + 8 > cache.size || decoder.red_left_pad >= cache.size {
            return Err(MemoryError::Corrupt { va: cache.va, what: "a slab cache has impossible offsets" });
        }
        decoders.insert(cache.va, decoder);
        map.caches.push(cache);
        Ok(())
    }

    /// First free object of each CPU's active slabs, by the address of the slab's `struct page`.
    fn active_freelists(
        &self,
        memory: &impl FrozenMemory,
        caches: &[Cache],
    ) -> Result<FxHashMap<Va, Vec<Va>>, MemoryError> {
        let mut lists: FxHashMap<Va, Vec<Va>> = FxHashMap::default();
        let Some(layout) = &self.slab.cpu else { return Ok(lists) };
        for cpu in 0..self.cpu_count(memory)? {
            let base = self.percpu_base(memory, cpu)?;
            for cache in caches {
                let offset = self.read_u64(memory, cache.va + layout.cpu_slab)?;
                // A cache under construction.
                if offset == 0 {
                    continue;
                }
                let cpu_slab = base + offset;
                let slab = self.read_va(memory, cpu_slab + layout.slab)?;
                if slab != Va(0) {
                    lists.entry(slab).or_default().push(self.read_va(memory, cpu_slab + layout.freelist)?);
                }
            }
        }
        Ok(lists)
    }

    fn add_slab(
        &self,
        memory: &impl FrozenMemory,
        map: &mut SlabMap,
        decoder: &Decoder,
        frame: u64,
        page: &[u8],
        active: &[Va],
    ) -> Result<(), MemoryError> {
        let start = self.direct_map_base(memory)? + (frame << PAGE_SHIFT) + decoder.red_left_pad;
        let objects = self.slab_objects(page);
        let inuse = u32::from(le16(page, self.slab.inuse));
        let words = (objects as usize).div_ceil(64);
        let mut slab_page =
            SlabPage { cache: decoder.index, start, objects, allocated: vec![0; words], sampled: false };
        // An empty slab may be a new one whose freelist is still being written.
        if inuse != 0 {
            let len = u64::from(objects) * decoder.size - decoder.red_left_pad;
            let bytes = memory.slice(Pa(frame << PAGE_SHIFT) + decoder.red_left_pad, len as usize)?;
            let slab = Slab { start, objects, bytes };
            (0..objects).for_each(|i| slab_page.allocated[i as usize / 64] |= 1 << (i % 64));
            for &first in [Va(le64(page, self.slab.freelist))].iter().chain(active) {
                if let Err(error) = decoder.follow(&slab, first, &mut slab_page.allocated) {
                    map.damaged.push(Damage { cache: Some(decoder.index), slab: start, error });
                }
            }
        }
        map.pages.push(slab_page);
        Ok(())
    }

    /// Object slots of a slab: 15 bits below `frozen` (struct slab).
    fn slab_objects(&self, page: &[u8]) -> u32 {
        u32::from(le16(page, self.slab.objects) & 0x7fff)
    }

    /// The object of a page of the KFENCE pool, when it is allocated: the metadata of page pair n + 1 is entry n
    /// (`addr_to_metadata`, mm/kfence/core.c).
    fn kfence_page(
        &self,
        memory: &impl FrozenMemory,
        cache: u32,
        frame: u64,
    ) -> Result<Option<SlabPage>, MemoryError> {
        let Some(layout) = &self.slab.kfence else { return Ok(None) };
        let pool = self.read_va(memory, layout.pool)?;
        let page = self.direct_map_base(memory)? + (frame << PAGE_SHIFT);
        let pair = (page - pool) / (2 * PAGE_SIZE);
        if pool == Va(0) || page < pool || pair == 0 {
            return Ok(None);
        }
        let KfenceLayout { metadata, metadata_is_pointer, metadata_size, .. } = *layout;
        let table = if metadata_is_pointer { self.read_va(memory, metadata)? } else { metadata };
        let entry = table + (pair - 1) * metadata_size;
        let allocated = self.read_u32(memory, entry + layout.state)? == layout.allocated;
        let start = self.read_va(memory, entry + layout.addr)?;
        let in_page = start - page < PAGE_SIZE;
        Ok((allocated && in_page).then(|| SlabPage {
            cache,
            start,
            objects: 1,
            allocated: vec![1],
            sampled: true,
        }))
    }
}

impl Decoder {
    /// Clears the bit of every object on the freelist that starts at `first`. Ends on every input: an object can be
    /// free once only.
    fn follow(&self, slab: &Slab<'_>, first: Va, allocated: &mut [u64]) -> Result<(), MemoryError> {
        let mut object = first;
        while object != Va(0) {
            let offset = object - slab.start;
            let index = (offset / self.size) as usize;
            if !offset.is_multiple_of(self.size) || index >= slab.objects as usize {
                return Err(MemoryError::Corrupt { va: slab.start, what: "a freelist leaves its slab" });
            }
            let bit = 1 << (index % 64);
            if allocated[index / 64] & bit == 0 {
                return Err(MemoryError::Corrupt { va: slab.start, what: "an object is free twice" });
            }
            allocated[index / 64] &= !bit;
            object = self.next(slab, object);
        }
        Ok(())
    }

    /// The next pointer in the free object, decoded (`freelist_ptr`, mm/slub.c).
    fn next(&self, slab: &Slab<'_>, object: Va) -> Va {
        let at = object + self.free_pointer;
        let word = le64(slab.bytes, at - slab.start);
        Va(if self.hardened { word ^ self.random ^ at.0.swap_bytes() } else { word })
    }
}
