//! Who refers to an object: every root word and every tracked object's word that points into it.
//!
//! Slow next to a scan (it looks at everything once for one question), so it is for questions about one object or one cache.

use super::guest::{Extent, GuestMemory, Mapping};
use super::index::Block;
use super::pages::structs_of;
use super::{ScanInput, collect_roots, heap};
use crate::memory::{FrozenMemory, PAGE_SIZE, Va};
use crate::registry::Object;
use rustc_hash::FxHashSet;
use std::ops::Range;

/// Most that are listed.
const MAX: usize = 64;

/// Where a reference is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Referrer {
    /// In a region of the roots, at this physical address.
    Root {
        /// Region, as scans name it.
        region: String,
        /// Guest physical address of the word.
        pa: u64,
    },
    /// In a register of a vCPU.
    Register {
        /// vCPU index.
        cpu: usize,
    },
    /// In a tracked object.
    Object {
        /// The object.
        object: Object,
        /// Offset of the word in it.
        offset: u64,
    },
}

/// A word that points into an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// Where it is.
    pub holder: Referrer,
    /// The word.
    pub word: u64,
}

/// Lists references to `target`, at most [`MAX`] of them; references of an object to itself are left out. Whether such a
/// word counts in a scan depends on its holder: dead objects' words are listed too.
///
/// # Errors
/// As [`super::scan`].
pub fn referrers<M: FrozenMemory>(
    input: &ScanInput<'_, M>,
    target: &Object,
) -> anyhow::Result<Vec<Reference>> {
    let mut found = Vec::new();
    let targets = Targets::of(input, target)?;
    each_word(input, &input.guest()?, &targets.windows(), |holder, word| {
        let own = matches!(&holder, Holder::Object { object, .. } if object.address == target.address);
        if !own && targets.meant_by(word) && found.len() < MAX {
            found.push(Reference { holder: holder.to_referrer(), word });
        }
    })?;
    Ok(found)
}

/// What words refer to an object.
pub(super) struct Targets {
    addresses: Range<u64>,
    /// The `struct page`s of a block of pages or of a large kmalloc; empty for other objects.
    structs: Range<u64>,
}

impl Targets {
    /// Those of `object`.
    ///
    /// # Errors
    /// The guest's memory cannot be read.
    pub(super) fn of<M: FrozenMemory>(input: &ScanInput<'_, M>, object: &Object) -> anyhow::Result<Self> {
        let structs = structs_of(&input.linux.page_places(input.memory)?, object);
        let structs = structs.map_or(0..0, |structs| structs.start.0..structs.end.0);
        Ok(Self { addresses: addresses(object), structs })
    }

    /// Where such words point.
    pub(super) fn windows(&self) -> [Range<u64>; 2] {
        [self.addresses.clone(), self.structs.clone()]
    }

    /// Whether a word in one of them refers to the object.
    fn meant_by(&self, word: u64) -> bool {
        let Range { start, end } = self.addresses;
        self.structs.contains(&word) || Block { start, size: end - start }.is_meant_by(word)
    }

    /// Offset in the object that a word refers to: of a page's structure, that of the page.
    pub(super) fn offset(&self, word: u64) -> u64 {
        if self.addresses.contains(&word) {
            return word - self.addresses.start;
        }
        let pages = (self.addresses.end - self.addresses.start).div_ceil(PAGE_SIZE).max(1);
        let each = ((self.structs.end - self.structs.start) / pages).max(1);
        word.saturating_sub(self.structs.start) / each * PAGE_SIZE
    }
}

/// Where a word is, while all words are looked at.
#[derive(Debug, Clone, Copy)]
pub(super) enum Holder<'r> {
    Root { region: &'r str, pa: u64 },
    Register { cpu: usize },
    Object { object: Object, offset: u64 },
}

impl Holder<'_> {
    pub(super) fn to_referrer(self) -> Referrer {
        match self {
            Self::Root { region, pa } => Referrer::Root { region: region.to_owned(), pa },
            Self::Register { cpu } => Referrer::Register { cpu },
            Self::Object { object, offset } => Referrer::Object { object, offset },
        }
    }
}

/// Calls `visit` with every word of roots and tracked objects that lies in one of the `windows`. Words in the
/// `struct page`s of tracked blocks count as the roots' that those of all others are.
pub(super) fn each_word<M: FrozenMemory>(
    input: &ScanInput<'_, M>,
    guest: &GuestMemory<'_, M>,
    windows: &[Range<u64>],
    mut visit: impl FnMut(Holder<'_>, u64),
) -> anyhow::Result<()> {
    let (pages, roots) = collect_roots(input, guest)?;
    let mut in_extent = |region: &str, extent: Extent| {
        for (offset, word) in guest.bytes(extent).into_iter().flat_map(|bytes| words_into(bytes, windows)) {
            visit(Holder::Root { region, pa: extent.start.0 + offset }, word);
        }
    };
    for region in &roots.regions {
        region.extents.iter().for_each(|&extent| in_extent(&region.name, extent));
    }
    // A block's own structs are the block itself.
    let own = |structs: &Block| windows.iter().any(|window| window.start == structs.start);
    for structs in pages.structs().filter(|structs| !own(structs)) {
        let extents = guest.extents(Va(structs.start)..Va(structs.start) + structs.size);
        extents.into_iter().for_each(|extent| in_extent("page structs", extent));
    }
    for cpu in input.cpus.iter().filter(|c| c.online) {
        for word in cpu.registers.words().into_iter().filter(|word| is_in(windows, *word)) {
            visit(Holder::Register { cpu: cpu.index }, word);
        }
    }
    // Stacks and modules lie in vmalloc blocks, of which the roots have what counts.
    let modules = input.modules.live().flat_map(|module| &module.regions);
    let in_roots: FxHashSet<Va> =
        roots.stacks.iter().copied().chain(modules.map(|region| Va(region.range.start))).collect();
    let objects = heap(input.registry).chain(pages.objects());
    for object in objects.filter(|object| !in_roots.contains(&object.address)) {
        for copy in guest.copies(object.address) {
            // As scans read them: aligned words only.
            let aligned = Va(copy.0.next_multiple_of(8))..copy + object.size;
            for Mapping { va, extent } in guest.mappings(aligned) {
                let words = guest.bytes(extent).into_iter().flat_map(|bytes| words_into(bytes, windows));
                for (offset, word) in words {
                    visit(Holder::Object { object, offset: (va - copy) + offset }, word);
                }
            }
        }
    }
    Ok(())
}

/// Aligned words that lie in one of the `windows`, with their offsets.
fn words_into<'a>(bytes: &'a [u8], windows: &'a [Range<u64>]) -> impl Iterator<Item = (u64, u64)> + 'a {
    let words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()));
    words.enumerate().filter(|(_, word)| is_in(windows, *word)).map(|(n, word)| (n as u64 * 8, word))
}

fn is_in(windows: &[Range<u64>], word: u64) -> bool {
    windows.iter().any(|window| window.contains(&word))
}

/// The addresses of an object.
pub(super) fn addresses(object: &Object) -> Range<u64> {
    let Va(start) = object.address;
    start..start.saturating_add(object.size)
}
