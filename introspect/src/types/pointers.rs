//! Which words of a structure can hold a pointer.
//!
//! In doubt a word can: an integer of 8 bytes may be a pointer with flags in it, an array of bytes the room of another
//! structure. What cannot are smaller integers, enumerations, bit fields, floating-point numbers, padding, and what the
//! caller knows to be a number by the name of its type (`loff_t`). Where members overlap, as in unions, one that can is
//! enough.

use super::{Btf, Kind, TypeId};

/// Members and array elements that are looked at for one structure.
const MAX_VISITS: u32 = 1 << 16;
/// Deepest nesting of structures and arrays.
const MAX_DEPTH: u32 = 32;
const WORD: u64 = 8;
/// Largest structure: that of any slab object.
const MAX_SIZE: u64 = 1 << 20;

impl Btf {
    /// For every whole word of a structure, whether it can hold a pointer. `is_number` is asked for the name of each type
    /// as C writes it, without array bounds. None when there is no such structure, or it is endless.
    pub fn pointer_words(&self, structure: &str, is_number: &dyn Fn(&str) -> bool) -> Option<Vec<bool>> {
        let ty = self.resolve(self.structure(structure)?)?;
        let size = self.size(ty).filter(|&size| size <= MAX_SIZE)?;
        let words = vec![false; (size / WORD) as usize];
        let mut search = Search { types: self, is_number, words, visits: MAX_VISITS };
        search.add(ty, "", 0, MAX_DEPTH)?;
        Some(search.words)
    }
}

struct Search<'a> {
    types: &'a Btf,
    is_number: &'a dyn Fn(&str) -> bool,
    words: Vec<bool>,
    visits: u32,
}

impl Search<'_> {
    /// Adds what is at offset `at`, of the type `ty` behind typedefs and qualifiers, which C calls `name`.
    fn add(&mut self, ty: TypeId, name: &str, at: u64, depth: u32) -> Option<()> {
        self.visits = self.visits.checked_sub(1)?;
        let depth = depth.checked_sub(1)?;
        if (self.is_number)(name) {
            return Some(());
        }
        let size = self.types.size(ty)?;
        match self.types.kind(ty) {
            Kind::Int if size < WORD => {}
            Kind::Enum | Kind::Enum64 | Kind::Float => {}
            Kind::Struct | Kind::Union => {
                let members = self.types.members_of(ty);
                if members.is_empty() {
                    self.set(at, at.checked_add(size)?);
                }
                for member in members.iter().filter(|member| member.field.bits.1 == 0) {
                    let at = at.checked_add(member.field.offset)?;
                    self.add(member.ty, element_name(&member.type_name), at, depth)?;
                }
            }
            Kind::Array => self.add_array(ty, name, at, depth)?,
            _ => self.set(at, at.checked_add(size)?),
        }
        Some(())
    }

    fn add_array(&mut self, array: TypeId, name: &str, at: u64, depth: u32) -> Option<()> {
        let (element, count) = self.types.elements_of(array)?;
        let size = self.types.size(element)?;
        if count == 0 {
            // A flexible array: whatever is behind.
            self.set(at, u64::MAX);
        } else if size == 1 && self.types.kind(element) == Kind::Int {
            // Room for something else, unless it is too small for a pointer.
            let end = at.checked_add(count.into())?;
            self.set(at.next_multiple_of(WORD), end / WORD * WORD);
        } else {
            for number in 0..u64::from(count) {
                self.add(element, name, at.checked_add(number.checked_mul(size)?)?, depth)?;
            }
        }
        Some(())
    }

    /// The words that meet the bytes from `start` to `end`.
    fn set(&mut self, start: u64, end: u64) {
        let clamp = |word: u64| usize::try_from(word).unwrap_or(usize::MAX).min(self.words.len());
        let (first, last) = (clamp(start / WORD), clamp(end.div_ceil(WORD)));
        if first < last {
            self.words[first..last].fill(true);
        }
    }
}

/// The name of what an array is of: `loff_t` of `loff_t[4]`.
fn element_name(name: &str) -> &str {
    name.split_once('[').map_or(name, |(element, _)| element).trim_end()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::synthetic::Builder;

    fn types() -> Btf {
        let mut b = Builder::new();
        let (byte, short, int, long) =
            (b.int("char", 1), b.int("short", 2), b.int("int", 4), b.int("long", 8));
        let pointer = b.pointer(0);
        let offset = b.typedef("loff_t", long);
        let link = b.structure("list_head", 16, &[("next", pointer, 0, 0), ("prev", pointer, 64, 0)]);
        let opaque = b.structure("opaque", 8, &[]);
        let either = b.union("", 8, &[("size", offset, 0, 0), ("private", pointer, 0, 0)]);
        let never = b.union("", 8, &[("size", offset, 0, 0), ("halves", int, 0, 0)]);
        let (bytes, small) = (b.array(byte, 20), b.array(byte, 4));
        let (offsets, longs, ints, rest) =
            (b.array(offset, 2), b.array(long, 2), b.array(int, 4), b.array(short, 0));
        let parts = [
            ("pointer", pointer, 0, 0),
            ("flags", long, 64, 0),
            ("size", offset, 128, 0),
            ("low", int, 192, 0),
            ("small", small, 224, 0),
            ("link", link, 256, 0),
            ("", either, 384, 0),
            ("", never, 448, 0),
            // From the middle of a word to the middle of another.
            ("room", bytes, 544, 0),
            ("bits", long, 704, 48),
            ("offsets", offsets, 768, 0),
            ("longs", longs, 896, 0),
            ("ints", ints, 1024, 0),
            ("opaque", opaque, 1152, 0),
            ("tail", rest, 1280, 0),
        ];
        b.structure("thing", 176, &parts);
        let half = b.structure("packed", 12, &[("n", int, 0, 0), ("p", pointer, 32, 0)]);
        b.structure("unaligned", 16, &[("inner", half, 0, 0)]);
        let (mut level, mut number) = (b.array(long, 4096), 0);
        while number < 3 {
            level = b.array(level, 4096);
            number += 1;
        }
        b.structure("huge", 8, &[("all", level, 0, 0)]);
        Btf::parse(&b.bytes()).expect("types")
    }

    #[test]
    fn words_that_can_hold_a_pointer() {
        let types = types();
        let words = types.pointer_words("thing", &|name| name == "loff_t").expect("a structure");
        let held: Vec<usize> =
            words.iter().enumerate().filter(|(_, can)| **can).map(|(word, _)| word).collect();
        // pointer, flags, link, either, the whole words of room, longs, opaque, and the tail.
        assert_eq!(held, [0, 1, 4, 5, 6, 9, 10, 14, 15, 18, 20, 21]);
        assert_eq!(words.len(), 22);
    }

    #[test]
    fn numbers_are_what_the_caller_says() {
        let types = types();
        let words = types.pointer_words("thing", &|_| false).expect("a structure");
        assert!([2, 7, 12, 13].iter().all(|&word| words[word]));
        assert!(types.pointer_words("gone", &|_| false).is_none());
        // An unaligned pointer lies in two words.
        assert_eq!(types.pointer_words("unaligned", &|_| false), Some(vec![true, true]));
        // What would take for ever is not known.
        assert_eq!(types.pointer_words("huge", &|_| false), None);
    }
}
