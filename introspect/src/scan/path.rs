//! Why an object is not lost, or since where it is: a shortest chain of references to it.
//!
//! Marking once more, nearest first, with a witness that remembers how each object was first reached ([`Trail`]). Real
//! roots go first; gray objects, which scans take for roots too, only count for what nothing else reaches, then young
//! ones, then lost ones. The marker does not say which word it followed; the words of the one chain that is shown are
//! looked for afterwards.

use super::graph::Standing;
use super::guest::{Extent, GuestMemory};
use super::index::Block;
use super::mark::{Contents, Marker, Origin, Reference, Witness};
use super::places::{Place, place};
use super::structures::{member_at, structure_of};
use super::trail::Trail;
use super::{Frozen, ScanInput, read_roots, unreached};
use crate::memory::{FrozenMemory, Va};
use crate::registry::{Object, Paint};
use anyhow::Context;

/// Objects shown at each end of a longer chain: lists are long.
const SHOWN: usize = 32;

/// Result of [`path()`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path {
    /// Where the chain begins.
    pub start: Start,
    /// Objects on it, the one that was asked for last. Only that one when nothing is known of references to it.
    pub hops: Vec<Hop>,
    /// Objects left out after the first [`SHOWN`].
    pub omitted: usize,
}

/// Where a chain begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// At a word among the roots.
    Root(Place),
    /// In a register of the vCPU with this index.
    Register(usize),
    /// At an object that is gray, for this reason.
    Gray(String),
    /// At an object that nothing refers to, but that is too young to be reported.
    Young,
    /// At an object that is lost: referred to only from within its cycle of so many objects, or by nothing (1).
    Lost(usize),
    /// Nowhere: for this reason scans do not look for references to the object.
    Black(String),
}

/// An object of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hop {
    /// The object.
    pub object: Object,
    /// Name of its slab cache.
    pub cache: Option<String>,
    /// Its C type, where the cache's name says so: see [`structure_of`].
    pub structure: Option<String>,
    /// The word that refers to it: None in the first of a chain that begins at an object.
    pub word: Option<u64>,
    /// Offset of the word in it that refers to the next; None in the last.
    pub next: Option<u64>,
    /// The member that this word is, where the C type is known.
    pub member: Option<String>,
}

/// Finds a shortest chain of references to the object at or around `address`.
///
/// # Errors
/// As [`super::scan`]; and no such object.
pub fn path<M: FrozenMemory>(input: &ScanInput<'_, M>, address: Va) -> anyhow::Result<Path> {
    let object = input.object_at(address)?;
    let (frozen, slots) = Frozen::collect(input)?;
    let (mut marker, treated) = frozen.marker(input, &slots, Trail::default())?;
    let slot = marker.slot(object.address.0);
    let slot = slot.with_context(|| {
        format!("Scans do not look for the {} object at {}", object.kind.name(), object.address)
    })?;
    read_roots(input, &frozen, &mut marker);
    marker.run();
    begin(&mut marker, Origin::Gray, treated.gray);
    begin(&mut marker, Origin::Young, treated.young);
    let mut lost = Vec::new();
    if !marker.is_reached(object.address.0) {
        lost = unreached(input.registry, &frozen, &marker);
        let direct = lost.iter().filter(|(_, standing)| standing.direct);
        begin(&mut marker, Origin::Lost, direct.map(|(object, _)| object.address.0).collect());
    }
    let found = marker.witness.to(slot);
    let explain = Explain { input, frozen: &frozen, marker: &marker, lost };
    match found {
        Some((origin, way)) => explain.chain(origin, &way),
        None => {
            let start = Start::Black(explain.why_black(&object));
            Ok(Path { start, hops: vec![explain.hop(object, None, None)], omitted: 0 })
        }
    }
}

/// Goes on with objects that are taken as reached.
fn begin<C: Contents>(marker: &mut Marker<'_, C, Trail>, origin: Origin, objects: Vec<u64>) {
    marker.witness.enter(origin);
    objects.into_iter().for_each(|va| marker.set_gray(va));
    marker.run();
}

/// The first word of the object at `from` that reaches `to`.
pub(super) fn link<C: Contents, W: Witness>(
    marker: &Marker<'_, C, W>,
    from: Block,
    to: Block,
) -> Option<Reference> {
    let mut found = None;
    marker.references(from.start, |reference| {
        if found.is_none() && reference.target.start == to.start {
            found = Some(reference);
        }
    });
    found
}

/// The first word of root memory that reaches `to`.
pub(super) fn root_link<C: Contents, W: Witness>(
    marker: &Marker<'_, C, W>,
    bytes: &[u8],
    to: Block,
) -> Option<Reference> {
    let mut found = None;
    marker.root_references(bytes, |reference| {
        if found.is_none() && reference.target.start == to.start {
            found = Some(reference);
        }
    });
    found
}

/// Turns what marking found into what is shown.
struct Explain<'x, 'a, M> {
    input: &'x ScanInput<'a, M>,
    frozen: &'x Frozen<'a, M>,
    marker: &'x Marker<'x, GuestMemory<'a, M>, Trail>,
    /// Unreached objects, when the one asked for is among them.
    lost: Vec<(Object, Standing)>,
}

impl<M: FrozenMemory> Explain<'_, '_, M> {
    fn chain(&self, origin: Origin, way: &[Block]) -> anyhow::Result<Path> {
        let first = *way.first().context("A chain without objects")?;
        let (start, mut word) = self.start(origin, first)?;
        let omitted = way.len().saturating_sub(2 * SHOWN);
        let mut hops = Vec::with_capacity(way.len() - omitted);
        for (number, block) in way.iter().enumerate() {
            if omitted > 0 && number == SHOWN + omitted {
                word = link(self.marker, way[number - 1], *block).map(|reference| reference.word);
            } else if omitted > 0 && (SHOWN..SHOWN + omitted).contains(&number) {
                continue;
            }
            let next = way.get(number + 1).and_then(|&to| link(self.marker, *block, to));
            hops.push(self.hop(self.object(block)?, word, next.map(|reference| reference.offset)));
            word = next.map(|reference| reference.word);
        }
        Ok(Path { start, hops, omitted })
    }

    /// Where a chain begins, and the word there.
    fn start(&self, origin: Origin, first: Block) -> anyhow::Result<(Start, Option<u64>)> {
        Ok(match origin {
            Origin::Region(number) => {
                let region = self.frozen.roots.regions.get(number).context("No such region")?;
                let link = |&extent: &Extent| {
                    let found = root_link(self.marker, self.frozen.guest.bytes(extent)?, first)?;
                    Some((extent.start + found.offset, found.word))
                };
                let (pa, word) = region.extents.iter().find_map(link).with_context(|| {
                    format!("No word of the {} refers to the object at {}", region.name, Va(first.start))
                })?;
                let place = place(self.input, &self.frozen.guest, &region.name, pa)
                    .context("Cannot find out whose the reference is")?;
                (Start::Root(place), Some(word))
            }
            Origin::Register(index) => {
                let cpu = self.input.cpus.iter().find(|cpu| cpu.index == index);
                let words = cpu.map(|cpu| cpu.registers.words()).unwrap_or_default();
                let refers = |word: &u64| root_link(self.marker, &word.to_le_bytes(), first).is_some();
                (Start::Register(index), words.into_iter().find(refers))
            }
            Origin::Gray => (Start::Gray(self.why_gray(&self.object(&first)?)), None),
            Origin::Young => (Start::Young, None),
            Origin::Lost => (Start::Lost(self.cycle(first)), None),
        })
    }

    fn object(&self, block: &Block) -> anyhow::Result<Object> {
        let object = self.input.registry.get(self.frozen.pages.object_of(Va(block.start)));
        object.with_context(|| format!("No tracked object at {}", Va(block.start)))
    }

    fn hop(&self, object: Object, word: Option<u64>, next: Option<u64>) -> Hop {
        let cache = self.frozen.caches.get(&object.cache).cloned();
        let name = cache.as_deref().unwrap_or_default();
        let structure = structure_of(self.input, object.cache, name, object.size);
        let types = self.input.linux.kernel.types.as_ref();
        let member = next.and_then(|offset| member_at(types?, structure.as_deref()?, offset));
        Hop { structure, object, cache, word, next, member }
    }

    /// Number of lost objects in the cycle of one of them.
    fn cycle(&self, member: Block) -> usize {
        let own = self.lost.iter().find(|(object, _)| object.address.0 == member.start);
        let same = |(_, standing): &&(Object, Standing)| {
            own.is_some_and(|(_, own)| own.component == standing.component)
        };
        self.lost.iter().filter(same).count()
    }

    fn why_gray(&self, object: &Object) -> String {
        let rule = self.input.treatments.of(object, self.frozen.cache_of(object));
        match rule {
            Some(rule) if object.paint != Paint::Gray => rule.reason.clone(),
            _ => "painted gray".to_owned(),
        }
    }

    fn why_black(&self, object: &Object) -> String {
        let rule = self.input.treatments.of(object, self.frozen.cache_of(object));
        let mut module_memory = self.input.modules.live().flat_map(|m| &m.regions);
        if self.frozen.roots.stacks.contains(&object.address) {
            "a kernel stack, which is read from its stack pointer up".to_owned()
        } else if module_memory.any(|region| region.range.start == object.address.0) {
            "memory of a module, of which the writable data are roots".to_owned()
        } else {
            match rule {
                Some(rule) if object.paint != Paint::Black => rule.reason.clone(),
                _ => "painted black".to_owned(),
            }
        }
    }
}
