//! The C type of what is in a slab cache.

use super::ScanInput;
use crate::memory::{PhysicalMemory, Va};

/// C type of the objects of a slab cache that is used under its own name only: the structure that a profile's row names, or
/// that has the cache's name, with or without `_cache` or `_cachep`; and exactly its object size.
pub(super) fn structure_of<M: PhysicalMemory>(
    input: &ScanInput<'_, M>,
    cache: Va,
    name: &str,
    size: u64,
) -> Option<String> {
    let types = input.linux.kernel.types.as_ref()?;
    let row = input.types.row(name).map(|row| row.structure.as_str());
    let plain = name.strip_suffix("_cachep").or_else(|| name.strip_suffix("_cache"));
    let candidates = [row, Some(name), plain].into_iter().flatten();
    let named = candidates.into_iter().find(|name| types.size_of(name) == Some(size))?;
    (sharers(input, cache)? <= 1).then(|| named.to_owned())
}

/// How many names a slab cache is used under: SLUB merges caches of like objects (`__kmem_cache_alias`, mm/slub.c). None
/// when that cannot be told.
pub(super) fn sharers<M: PhysicalMemory>(input: &ScanInput<'_, M>, cache: Va) -> Option<i32> {
    let offset = input.linux.kernel.types.as_ref()?.offset("kmem_cache", "refcount")?;
    let count = input.linux.read_u32(input.memory, cache + offset).ok()?.cast_signed();
    // Caches that are never merged count -1.
    Some(if count < 0 { 1 } else { count })
}
