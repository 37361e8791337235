//! Typed scanning: of objects whose C type is known only the words that can hold a pointer are followed.
//!
//! A number that looks like an address hides a leak from a scanner that takes every word for a pointer. What a cache's
//! objects are, the cache's name says ([`structures`](super::structures)); that it says the truth is checked in the guest: the
//! structure has exactly the cache's object size, SLUB uses the cache under no other name, and no other cache has
//! its name. Which words of a structure count is said in [`Btf::pointer_words`](crate::types::Btf::pointer_words) and in
//! `guest-profiles/data/types.toml`. Objects of all other caches are read as ever.

use super::ScanInput;
use super::structures::structure_of;
use crate::linux::slab::Cache;
use crate::memory::{PhysicalMemory, Va};
use crate::types::Btf;
use guest_profiles::annotations::Rules;
use guest_profiles::types::CacheType;
use rustc_hash::{FxHashMap, FxHashSet};
use std::sync::{Arc, Mutex, PoisonError};

/// Types that one scan tells apart; of a distribution kernel about a hundred caches have one.
const MAX_SHAPES: usize = u8::MAX as usize;

/// Which words of an object can hold a pointer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    words: Vec<u64>,
}

impl Shape {
    /// Which of the 64 words from the one with a number on can; before the first none can.
    #[inline]
    pub fn words_from(&self, number: i64) -> u64 {
        let bits =
            |index: i64| usize::try_from(index).ok().and_then(|i| self.words.get(i)).copied().unwrap_or(0);
        let (index, shift) = (number.div_euclid(64), number.rem_euclid(64));
        // Twice, as all 64 cannot be shifted out at once.
        bits(index) >> shift | bits(index + 1) << 1 << (63 - shift)
    }

    /// True where a word of the object can.
    pub fn new(words: &[bool]) -> Self {
        let pack = |chunk: &[bool]| chunk.iter().rev().fold(0, |bits, &word| bits << 1 | u64::from(word));
        Self { words: words.chunks(64).map(pack).collect() }
    }

    /// Whether the word at this offset can hold a pointer.
    #[inline]
    pub fn holds(&self, offset: u64) -> bool {
        let word = offset / 8;
        self.words.get((word / 64) as usize).is_some_and(|bits| bits >> (word % 64) & 1 != 0)
    }
}

/// Names of a cache and a structure.
type Key = (String, String);

/// What is known of types, for one kernel.
#[derive(Debug, Default)]
pub struct CacheTypes {
    rows: Vec<CacheType>,
    not_pointers: FxHashSet<String>,
    /// By cache name and structure; None where the structure cannot be used.
    known: Mutex<FxHashMap<Key, Option<Arc<Shape>>>>,
}

impl CacheTypes {
    /// With the rows of profiles.
    pub fn new(rules: &Rules) -> Self {
        let not_pointers = rules.not_pointers.iter().cloned().collect();
        Self { rows: rules.types.clone(), not_pointers, known: Mutex::default() }
    }

    /// The row of a cache; the first counts.
    pub(super) fn row(&self, cache: &str) -> Option<&CacheType> {
        self.rows.iter().find(|row| row.cache == cache)
    }

    /// The shape of a structure that is a cache's.
    fn shape(&self, types: &Btf, cache: &str, structure: &str) -> Option<Arc<Shape>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (cache.to_owned(), structure.to_owned());
        known.entry(key).or_insert_with(|| self.make(types, cache, structure).map(Arc::new)).clone()
    }

    fn make(&self, types: &Btf, cache: &str, structure: &str) -> Option<Shape> {
        let mut words = types.pointer_words(structure, &|name| self.not_pointers.contains(name))?;
        for number in self.row(cache).into_iter().flat_map(|row| &row.numbers) {
            if let Some(field) = types.field(structure, number) {
                let inside = field.offset.div_ceil(8)..(field.offset + field.size) / 8;
                inside.for_each(|word| words[word as usize] = false);
            }
        }
        Some(Shape::new(&words))
    }
}

/// Shapes of a guest's caches.
#[derive(Debug, Default)]
pub(super) struct Shapes {
    /// Each shape once.
    pub all: Vec<Arc<Shape>>,
    /// Number in `all` by address of the cache.
    by_cache: FxHashMap<Va, u8>,
}

impl Shapes {
    /// Those of the caches whose type is known and proven.
    pub fn of<M: PhysicalMemory>(input: &ScanInput<'_, M>, caches: &[Cache]) -> Self {
        let mut shapes = Self::default();
        let Some(types) = input.linux.kernel.types.as_ref().filter(|_| input.typed) else { return shapes };
        let mut names: FxHashMap<&str, u32> = FxHashMap::default();
        caches.iter().for_each(|cache| *names.entry(&cache.name).or_default() += 1);
        for cache in caches.iter().filter(|cache| names.get(cache.name.as_str()) == Some(&1)) {
            let structure = structure_of(input, cache.va, &cache.name, cache.object_size);
            let shape = structure.and_then(|name| input.types.shape(types, &cache.name, &name));
            if let Some(shape) = shape
                && shapes.all.len() < MAX_SHAPES
            {
                shapes.by_cache.insert(cache.va, shapes.all.len() as u8);
                shapes.all.push(shape);
            }
        }
        shapes
    }

    /// Number of the shape that the objects of a cache have.
    #[inline]
    pub fn of_cache(&self, cache: Va) -> Option<u8> {
        self.by_cache.get(&cache).copied()
    }
}

/// What typed scanning did in one scan.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TypedStatistics {
    /// Caches whose type is known.
    pub caches: u64,
    /// Objects in them.
    pub objects: u64,
    /// Words that would have been references, but are no pointers.
    pub dropped: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::synthetic::Builder;

    #[test]
    fn shapes_know_each_word() {
        let words: Vec<bool> = (0..150).map(|word| word % 3 == 0).collect();
        let shape = Shape::new(&words);
        for (word, &can) in words.iter().enumerate() {
            assert_eq!(shape.holds(word as u64 * 8), can, "{word}");
        }
        assert!(!shape.holds(150 * 8) && !shape.holds(u64::MAX));
    }

    #[test]
    fn a_row_takes_members_out() {
        let mut b = Builder::new();
        let (char, long) = (b.int("char", 1), b.int("long", 8));
        let (pointer, loff) = (b.pointer(0), b.typedef("loff_t", long));
        let name = b.array(char, 20);
        let parts =
            [("ops", pointer, 0, 0), ("size", loff, 64, 0), ("name", name, 160, 0), ("end", pointer, 320, 0)];
        b.structure("entry", 48, &parts);
        let types = Btf::parse(&b.bytes()).expect("types");
        let rules = guest_profiles::annotations::parse(
            "not_pointers = ['loff_t']
            [[type]]
            cache = 'entries'
            type = 'entry'
            numbers = ['name', 'gone']
            source = []",
        );
        let rules = CacheTypes::new(&rules.expect("rules"));
        let held = |cache: &str| {
            let shape = rules.shape(&types, cache, "entry").expect("a shape");
            (0..6).filter(|word| shape.holds(word * 8)).collect::<Vec<u64>>()
        };
        assert_eq!((held("entries"), held("others")), (vec![0, 5], vec![0, 3, 4, 5]));
        assert_eq!(rules.row("entries").map(|row| row.structure.as_str()), Some("entry"));
    }
}
