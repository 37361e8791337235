//! The C type of what is in a slab cache.

use super::ScanInput;
use crate::memory::{PhysicalMemory, Va};
use crate::types::{Btf, Kind, Member};
use std::fmt::Write;

/// Deepest nesting that a member's path has.
const MAX_DEPTH: u32 = 8;

/// C type of the objects of a slab cache that is used under its own name only: the structure that a profile's row names, or
/// that has the cache's name, with or without `_cache` or `_cachep`; and exactly its object size, where the row does not say
/// that objects are cut short.
pub(super) fn structure_of<M: PhysicalMemory>(
    input: &ScanInput<'_, M>,
    cache: Va,
    name: &str,
    size: u64,
) -> Option<String> {
    let types = input.linux.kernel.types.as_ref()?;
    let row = input.types.row(name);
    // From where on objects may end.
    let cut = row.and_then(|row| types.offset(&row.structure, row.cut.as_deref()?));
    let row = row.map(|row| row.structure.as_str());
    let fits = |structure: &&str| {
        let least = cut.filter(|_| row == Some(structure));
        types.size_of(structure).is_some_and(|whole| (least.unwrap_or(whole)..=whole).contains(&size))
    };
    let plain = name.strip_suffix("_cachep").or_else(|| name.strip_suffix("_cache"));
    let candidates = [row, Some(name), plain].into_iter().flatten();
    let named = candidates.into_iter().find(fits)?;
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

/// Dotted path of the member of a structure at an offset, `f_path.dentry` or `slots[3]`; of several, as in unions, the one that
/// begins last.
pub(super) fn member_at(types: &Btf, structure: &str, offset: u64) -> Option<String> {
    let mut members = types.members(structure)?;
    let (mut path, mut offset) = (String::new(), offset);
    for _ in 0..MAX_DEPTH {
        let around = |m: &&Member<'_>| offset.checked_sub(m.field.offset).is_some_and(|at| at < m.field.size);
        let Some(member) = members.iter().filter(around).max_by_key(|m| m.field.offset) else { break };
        offset -= member.field.offset;
        let _ = write!(path, "{}{}", if path.is_empty() { "" } else { "." }, member.name);
        let (mut ty, mut kind) = (member.ty, member.kind);
        while kind == Kind::Array {
            let Some((element, size)) = types.elements_of(ty).and_then(|(e, _)| Some((e, types.size(e)?)))
            else {
                return Some(path);
            };
            let number = offset.checked_div(size).unwrap_or(0);
            let _ = write!(path, "[{number}]");
            offset -= number * size;
            (ty, kind) = (element, types.kind(element));
        }
        members = types.members_of(ty);
    }
    (!path.is_empty()).then_some(path)
}
