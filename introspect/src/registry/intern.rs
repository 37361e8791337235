//! Small tables of values that many records share.

use rustc_hash::FxHashMap;
use std::hash::Hash;

/// Gives equal values the same id below 2^BITS. Id 0 is the default value, and stands for every value that came
/// after the ids ran out: a guest that invents names without end costs bounded memory.
pub(super) struct Interner<T, const BITS: u32> {
    values: Vec<T>,
    ids: FxHashMap<T, u32>,
    last: (T, u32),
}

impl<T: Copy + Eq + Hash + Default, const BITS: u32> Default for Interner<T, BITS> {
    fn default() -> Self {
        let zero = T::default();
        Self { values: vec![zero], ids: [(zero, 0)].into_iter().collect(), last: (zero, 0) }
    }
}

impl<T: Copy + Eq + Hash + Default, const BITS: u32> Interner<T, BITS> {
    pub(super) fn intern(&mut self, value: T) -> u32 {
        if self.last.0 != value {
            self.last = (value, self.look_up(value));
        }
        self.last.1
    }

    /// All, by id.
    pub(super) fn values(&self) -> &[T] {
        &self.values
    }

    pub(super) fn get(&self, id: u32) -> T {
        self.values.get(id as usize).copied().unwrap_or_default()
    }

    fn look_up(&mut self, value: T) -> u32 {
        if let Some(&id) = self.ids.get(&value) {
            return id;
        }
        let id = self.values.len() as u32;
        if id >> BITS != 0 {
            return 0;
        }
        self.values.push(value);
        self.ids.insert(value, id);
        id
    }
}
