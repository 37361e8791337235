//! What each part of the roots contributes to a scan, and what is not read: one more marking, with a witness that
//! counts.
//!
//! An object counts for the region that is the first to refer to it; regions are read in the order of the list. What
//! is left out of stacks and tables is small, so its words are looked up, too: these references are dropped. Of
//! pages that are not read only the size is known.

use super::mark::{Marker, Origin, Witness};
use super::roots::Region;
use super::{Frozen, RootStatistics, ScanInput, heap, read_roots, unreached};
use crate::accounting::{Cell, Column, Role, Table};
use crate::linux::pages::Use;
use crate::memory::{FrozenMemory, Pa};
use crate::registry::Kind;
use rustc_hash::FxHashMap;
use serde_json::{Value, json};
use std::fmt::Write;
use std::ops::Range;

/// Result of [`coverage()`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coverage {
    /// Regions in the order in which they are read.
    pub roots: Vec<RootShare>,
    /// What is not read.
    pub not_read: Vec<NotRead>,
    /// Objects first reached from other objects.
    pub through_objects: u64,
    /// Gray objects that nothing else reaches, and what only they reach.
    pub through_gray: u64,
    /// Objects that are too young to be reported and not reached, and what only they reach.
    pub through_young: u64,
    /// Unreachable objects.
    pub unreferenced: u64,
}

/// What one region contributed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootShare {
    /// Its words.
    pub statistics: RootStatistics,
    /// Objects it was the first to refer to.
    pub first: u64,
    /// Guest physical addresses between which it lies, in so many pieces; None for registers.
    pub place: Option<(Range<Pa>, usize)>,
    /// Why it is a root.
    pub reason: &'static str,
}

/// Memory that is not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotRead {
    /// What it is.
    pub name: &'static str,
    /// Size.
    pub bytes: u64,
    /// Words in it that point into objects; None where nobody looked.
    pub references: Option<u64>,
}

/// Counts objects by where they were first reached from.
struct Tally {
    origin: Origin,
    outside: FxHashMap<Origin, u64>,
    inside: u64,
}

impl Witness for Tally {
    fn enter(&mut self, origin: Origin) {
        self.origin = origin;
    }

    fn reached(&mut self, _object: super::index::Hit, from: Option<u32>) {
        match from {
            Some(_) => self.inside += 1,
            None => *self.outside.entry(self.origin).or_default() += 1,
        }
    }
}

/// Marks once and counts.
///
/// # Errors
/// As [`super::scan`].
pub fn coverage<M: FrozenMemory>(input: &ScanInput<'_, M>) -> anyhow::Result<Coverage> {
    let (frozen, slots) = Frozen::collect(input)?;
    let tally = Tally { origin: Origin::Region(0), outside: FxHashMap::default(), inside: 0 };
    let (mut marker, treated) = frozen.marker(input, &slots, tally)?;
    let statistics = read_roots(input, &frozen, &mut marker);
    let outside = &marker.witness.outside;
    let registers: u64 =
        outside.iter().filter(|(o, _)| matches!(o, Origin::Register(_))).map(|(_, n)| n).sum();
    let roots = statistics.into_iter().enumerate().map(|(number, statistics)| {
        // The registers come last.
        let is_region = number < frozen.roots.regions.len();
        let first = outside.get(&Origin::Region(number)).copied().unwrap_or(0);
        let region = frozen.roots.regions.get(number);
        RootShare {
            statistics,
            first: if is_region { first } else { registers },
            place: region.map(|region| (region.span(), region.extents.len())),
            reason: region.map_or("what CPUs work with", Region::reason),
        }
    });
    let roots = roots.collect();
    marker.run();
    let through_objects = marker.witness.inside;
    let mut begin = |origin, objects: Vec<u64>| {
        let before = marker.witness.inside;
        marker.witness.enter(origin);
        objects.into_iter().for_each(|va| marker.set_gray(va));
        marker.run();
        let own = marker.witness.outside.get(&origin).copied().unwrap_or(0);
        own + (marker.witness.inside - before)
    };
    let through_gray = begin(Origin::Gray, treated.gray);
    let through_young = begin(Origin::Young, treated.young);
    let unreferenced = unreached(input.registry, &frozen, &marker).len() as u64;
    let not_read = not_read(input, &frozen, &marker);
    Ok(Coverage { roots, not_read, through_objects, through_gray, through_young, unreferenced })
}

fn not_read<M: FrozenMemory, W: Witness>(
    input: &ScanInput<'_, M>,
    frozen: &Frozen<'_, M>,
    marker: &Marker<'_, super::GuestMemory<'_, M>, W>,
) -> Vec<NotRead> {
    let mut all = Vec::new();
    for unread in &frozen.roots.unread {
        let (mut bytes, mut references) = (0, 0);
        let extents = unread.ranges.iter().flat_map(|range| frozen.guest.extents(range.clone()));
        for part in extents.filter_map(|extent| frozen.guest.bytes(extent)) {
            bytes += part.len() as u64;
            // What a target stands for is no second word.
            marker.root_references(part, |r| references += u64::from(r.entry().is_some()));
        }
        all.push(NotRead { name: unread.name, bytes, references: Some(references) });
    }
    let slab_objects = heap(input.registry).filter(|o| o.kind == Kind::Slab);
    let slab_bytes = slab_objects.map(|o| o.size).fold(0, u64::saturating_add);
    for &(usage, bytes) in &frozen.roots.unread_pages {
        let (name, bytes) = match usage {
            Use::Free => ("free pages", bytes),
            Use::User => ("user pages and page cache", bytes),
            Use::PageTable => ("page tables", bytes),
            Use::Text => ("text and read-only data", bytes),
            Use::Slab => ("slab pages outside of tracked objects", bytes.saturating_sub(slab_bytes)),
            Use::None | Use::Reserved | Use::Kernel => ("pages without a page struct", bytes),
        };
        all.push(NotRead { name, bytes, references: None });
    }
    all
}

impl Coverage {
    /// Two tables and a line.
    pub fn text(&self) -> String {
        let mut text = self.root_table().text();
        let Self { through_objects, through_gray, through_young, unreferenced, .. } = self;
        let _ = writeln!(
            text,
            "# {through_objects} more are reached from these, {through_gray} from gray objects, {through_young} from young \
             ones; {unreferenced} are not referenced\n"
        );
        text + &self.not_read_table().text()
    }

    /// The same for programs.
    pub fn json(&self) -> Value {
        let not_read = self
            .not_read
            .iter()
            .map(|n| json!({ "name": n.name, "bytes": n.bytes, "references": n.references }));
        json!({
            "roots": self.root_table().json(),
            "not_read": not_read.collect::<Vec<_>>(),
            "through_objects": self.through_objects,
            "through_gray": self.through_gray,
            "through_young": self.through_young,
            "unreferenced": self.unreferenced,
        })
    }

    fn root_table(&self) -> Table {
        let columns = vec![
            Column::new("name", Role::Key),
            Column::new("bytes", Role::Amount),
            Column::new("references", Role::Amount),
            Column::new("first", Role::Amount),
            Column::new("pieces", Role::Amount),
            Column::new("from", Role::Fact),
            Column::new("to", Role::Fact),
            Column::new("reason", Role::Fact),
        ];
        let mut table = Table::new(columns, 2);
        let row = |RootShare { statistics: s, first, place, reason }: &RootShare| {
            let (span, pieces) = place.clone().unwrap_or((Pa(0)..Pa(0), 0));
            let address = |pa: Pa| if pieces == 0 { Cell::Absent } else { Cell::Text(pa.to_string()) };
            vec![
                Cell::Text(s.name.clone()),
                s.bytes.into(),
                s.references.into(),
                (*first).into(),
                (pieces as u64).into(),
                address(span.start),
                address(span.end),
                (*reason).into(),
            ]
        };
        table.rows = self.roots.iter().map(row).collect();
        table
    }

    fn not_read_table(&self) -> Table {
        let columns = vec![
            Column::new("not read", Role::Key),
            Column::new("bytes", Role::Amount),
            Column::new("references", Role::Amount),
        ];
        let mut table = Table::new(columns, 1);
        let row =
            |n: &NotRead| vec![n.name.into(), n.bytes.into(), n.references.map_or(Cell::Absent, Cell::from)];
        table.rows = self.not_read.iter().map(row).collect();
        table
    }
}
