//! The witness of a marking run that remembers how every object was first reached, so that chains can be followed
//! back.

use super::index::{Block, Hit};
use super::mark::{Origin, Witness};
use rustc_hash::FxHashMap;

/// See the module.
pub struct Trail {
    origin: Origin,
    first: FxHashMap<u32, First>,
}

/// How an object was first reached.
struct First {
    block: Block,
    from: Step,
}

#[derive(Clone, Copy)]
enum Step {
    Outside(Origin),
    /// The object in this slot, which was reached before.
    Object(u32),
}

impl Default for Trail {
    fn default() -> Self {
        Self { origin: Origin::Region(0), first: FxHashMap::default() }
    }
}

impl Witness for Trail {
    fn enter(&mut self, origin: Origin) {
        self.origin = origin;
    }

    fn reached(&mut self, object: Hit, from: Option<u32>) {
        let from = from.map_or(Step::Outside(self.origin), Step::Object);
        self.first.insert(object.slot, First { block: object.block, from });
    }
}

impl Trail {
    /// The way to the object in `slot`: where it begins, and all objects on it, that one included. None when the object
    /// was not reached. A shortest way when the run was nearest first.
    pub fn to(&self, slot: u32) -> Option<(Origin, Vec<Block>)> {
        let mut way = Vec::new();
        let mut first = self.first.get(&slot)?;
        loop {
            way.push(first.block);
            match first.from {
                Step::Object(slot) => first = self.first.get(&slot)?,
                Step::Outside(origin) => {
                    way.reverse();
                    return Some((origin, way));
                }
            }
        }
    }
}
