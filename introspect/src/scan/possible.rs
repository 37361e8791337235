//! Objects that are in use only by a pointer into their middle: possible leaks, as valgrind grades them.
//!
//! An object that is found through a list or tree inside it is in use like that all its life, so these are no leaks; but
//! where all objects of one origin have a pointer to their beginning and one has none, it is worth a look. A pointer with
//! flags in its low bits is one to the beginning.

use super::mark::Marker;
use super::structures::{member_at, structure_of};
use super::{Frozen, GuestMemory, ScanInput, each_reference, mark_all};
use crate::accounting::{Cell, Column, Role, Table};
use crate::memory::FrozenMemory;
use crate::registry::{Kind, Object, Paint, StackId};
use rustc_hash::FxHashMap;
use std::cmp::Reverse;
use std::collections::BTreeSet;

/// Low bits of pointers that hold flags.
const FLAGS: u64 = 7;
/// Offsets that are told apart.
const OFFSETS: usize = 4;

/// Objects of one origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Possible {
    /// Those in use only by a pointer into their middle.
    pub objects: Vec<Object>,
    /// Others of the same origin and size, with a pointer to their beginning.
    pub others: u64,
    /// Offsets that the pointers lead to, the first few.
    pub offsets: Vec<u64>,
    /// Name of the slab cache.
    pub cache: Option<String>,
    /// Names of the members there, where the type is known.
    pub members: Vec<String>,
}

/// How an object is referred to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Held {
    exact: bool,
    inside: BTreeSet<u64>,
}

impl Held {
    fn note(&mut self, entry: Option<u64>) {
        match entry {
            // To what stands for the object.
            None => self.exact = true,
            Some(inside) if inside & !FLAGS == 0 => self.exact = true,
            Some(inside) => {
                if self.inside.len() < OFFSETS {
                    self.inside.insert(inside);
                }
            }
        }
    }

    fn only_inside(&self) -> bool {
        !self.exact && !self.inside.is_empty()
    }
}

/// Finds such objects; those come first that are unlike most of their origin, and of equals the youngest.
///
/// # Errors
/// As [`super::scan`].
pub fn possible<M: FrozenMemory>(input: &ScanInput<'_, M>) -> anyhow::Result<Vec<Possible>> {
    let (frozen, slots) = Frozen::collect(input)?;
    let (mut marker, treated) = frozen.marker(input, &slots, ())?;
    mark_all(input, &frozen, &mut marker, &treated);
    let held = references(input, &frozen, &marker);
    let mut found: FxHashMap<(StackId, u64, Kind), Possible> = FxHashMap::default();
    for object in frozen.objects(input.registry) {
        let usual =
            object.paint == Paint::Normal && input.treatments.of(&object, frozen.cache_of(&object)).is_none();
        let Some(held) = held.get(&object.address.0).filter(|_| usual && object.kind != Kind::Page) else {
            continue;
        };
        let group = found.entry((object.stack, object.size, object.kind)).or_insert_with(|| Possible {
            objects: Vec::new(),
            others: 0,
            offsets: Vec::new(),
            cache: frozen.caches.get(&object.cache).cloned(),
            members: Vec::new(),
        });
        if held.only_inside() {
            group.objects.push(object);
            group.offsets.extend(&held.inside);
        } else {
            group.others += 1;
        }
    }
    let mut found: Vec<Possible> = found.into_values().filter(|group| !group.objects.is_empty()).collect();
    for group in &mut found {
        group.objects.sort_unstable_by_key(|object| object.sequence);
        group.offsets.sort_unstable();
        group.offsets.dedup();
        group.offsets.truncate(OFFSETS);
        group.members = members(input, group);
    }
    found.sort_by_key(|group| {
        let likeness = group.objects.len() as u64 * 1000 / (group.objects.len() as u64 + group.others);
        (likeness, Reverse(group.objects[0].sequence))
    });
    Ok(found)
}

/// What refers to every object: words of the roots, and of objects that are in use.
fn references<M: FrozenMemory>(
    input: &ScanInput<'_, M>,
    frozen: &Frozen<'_, M>,
    marker: &Marker<'_, GuestMemory<'_, M>>,
) -> FxHashMap<u64, Held> {
    let mut held: FxHashMap<u64, Held> = FxHashMap::default();
    each_reference(input, frozen, marker, |_, r| held.entry(r.target.start).or_default().note(r.entry()));
    held
}

fn members<M: FrozenMemory>(input: &ScanInput<'_, M>, group: &Possible) -> Vec<String> {
    let object = &group.objects[0];
    let cache = group.cache.as_deref().unwrap_or_default();
    let structure = structure_of(input, object.cache, cache, object.size);
    let Some((structure, types)) = structure.zip(input.linux.kernel.types.as_ref()) else {
        return Vec::new();
    };
    group.offsets.iter().filter_map(|&offset| member_at(types, &structure, offset)).collect()
}

/// A row for each origin; `site` names it.
pub fn table(found: &[Possible], site: &dyn Fn(&Object) -> String) -> Table {
    let columns = vec![
        Column::new("objects", Role::Amount),
        Column::new("others", Role::Amount),
        Column::new("bytes", Role::Amount),
        Column::new("first", Role::Key),
        Column::new("offsets", Role::Fact),
        Column::new("cache", Role::Fact),
        Column::new("site", Role::Fact),
    ];
    let mut table = Table::new(columns, 3);
    table.rows = found.iter().map(|group| row(group, site)).collect();
    table
}

fn row(group: &Possible, site: &dyn Fn(&Object) -> String) -> Vec<Cell> {
    let bytes = group.objects.iter().map(|object| object.size).fold(0, u64::saturating_add);
    let offsets: Vec<String> = match group.members.is_empty() {
        true => group.offsets.iter().map(|offset| format!("{offset:#x}")).collect(),
        false => group.members.clone(),
    };
    let first = &group.objects[0];
    let cache = group.cache.clone().unwrap_or_else(|| first.kind.name().to_owned());
    vec![
        (group.objects.len() as u64).into(),
        group.others.into(),
        bytes.into(),
        Cell::Text(format!("{:#x}", first.address.0)),
        Cell::Text(offsets.join(",")),
        Cell::Text(cache),
        Cell::Text(site(first)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_no_offset() {
        let held = |entries: &[Option<u64>]| {
            let mut held = Held::default();
            entries.iter().for_each(|&entry| held.note(entry));
            held.only_inside()
        };
        for (entries, only_inside) in [
            (&[][..], false),
            (&[Some(0)], false),
            (&[Some(3), Some(40)], false),
            (&[Some(40), None], false),
            (&[Some(8)], true),
            (&[Some(40), Some(9)], true),
        ] {
            assert_eq!(held(entries), only_inside, "{entries:?}");
        }
    }

    #[test]
    fn a_row_has_members_where_they_are_known() {
        let group = Possible {
            objects: vec![Object::sample(), Object::sample()],
            others: 7,
            offsets: vec![0x18, 0x40],
            cache: Some("kmalloc-96".into()),
            members: Vec::new(),
        };
        let text = |group| table(&[group], &|_| "maker+0x1/0x2".into()).text();
        let plain = text(group.clone());
        assert!(
            plain.contains("0x18,0x40") && plain.contains("kmalloc-96") && plain.contains("maker"),
            "{plain}"
        );
        let named = text(Possible { members: vec!["list".into()], ..group });
        assert!(named.contains("  list  ") && !named.contains("0x18"), "{named}");
    }
}
