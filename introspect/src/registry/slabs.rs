//! Records of slab objects, page by page.
//!
//! Objects that start in one page are of one cache, so of one size, and do not overlap: the quotient of an object's
//! offset in its page and that size is a place of its own. An event finds the page in a table that stays in the
//! processor's caches, and then touches one record; objects that are neighbours in the guest are neighbours here, and
//! neither address nor size is stored for each.
//!
//! What does not fit, because a free was missed or the tracer is confused, is refused: [`super::Registry`] keeps it apart.

use super::record::Record;
use crate::memory::{PAGE_SHIFT, PAGE_SIZE, Va};
use hashbrown::{HashMap, HashTable};
use rustc_hash::FxBuildHasher;
use std::hash::BuildHasher;

/// Pages of a group, a power of two.
const GROUP: u64 = 64;

/// See the module.
#[derive(Default)]
pub(super) struct Slabs {
    groups: HashTable<Group>,
    shapes: Shapes,
    records: Arena,
    len: usize,
}

/// Neighbouring pages, by their number over [`GROUP`].
struct Group {
    number: u64,
    /// Pages in which objects start; at least one.
    used: u32,
    pages: Box<[Page; GROUP as usize]>,
}

/// A page in which objects start, or may.
#[derive(Clone, Copy, Default)]
struct Page {
    /// Its first record.
    first: u32,
    /// Of its objects, in [`Shapes`].
    shape: u16,
    /// Objects; the page has no records when there are none.
    live: u16,
}

/// How a page is divided.
#[derive(Clone, Copy)]
struct Shape {
    /// Size of every object.
    size: u32,
    /// ceil(2^32 / size); 0 where one object has the whole page.
    reciprocal: u32,
}

/// What became of a record that was to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    /// It is there.
    New,
    /// It is there, in the place of another one of the same address.
    Replaced,
    /// The page has objects of another size, or another object in its place.
    Refused,
}

impl Slabs {
    /// Stores the record of an object of `size` bytes, 1 at least.
    pub(super) fn insert(&mut self, address: Va, size: u32, record: Record) -> Stored {
        let Self { groups, shapes, records, .. } = self;
        let Some(page) = find_mut(groups, address).map(|(_, page)| page).filter(|page| page.live > 0) else {
            let Some(number) = shapes.number(size) else { return Stored::Refused };
            let shape = shapes.get(number);
            let page = Page { first: records.take(shape.places()), shape: number, live: 1 };
            records.all[page.place(shape, address)] = record;
            self.add_page(address, page);
            self.len += 1;
            return Stored::New;
        };
        let shape = shapes.get(page.shape);
        let place = &mut records.all[page.place(shape, address)];
        if shape.size != size || !place.is_vacant() && !place.is_at(offset(address)) {
            return Stored::Refused;
        }
        let old = std::mem::replace(place, record);
        if !old.is_vacant() {
            return Stored::Replaced;
        }
        page.live += 1;
        self.len += 1;
        Stored::New
    }

    /// Takes a record out; also returns the object's size.
    pub(super) fn remove(&mut self, address: Va) -> Option<(u64, Record)> {
        let Self { groups, shapes, records, .. } = self;
        let (used, page) = find_mut(groups, address)?;
        let shape = shapes.get(page.shape);
        let place = records.all.get_mut(page.place(shape, address)).filter(|_| page.live > 0)?;
        if !place.is_at(offset(address)) {
            return None;
        }
        let record = std::mem::replace(place, Record::VACANT);
        page.live -= 1;
        self.len -= 1;
        if page.live == 0 {
            records.give_back(page.first, shape.places());
            *used -= 1;
            if *used == 0
                && let Ok(group) = groups.find_entry(hash(group_of(address)), is(group_of(address)))
            {
                group.remove();
            }
        }
        Some((u64::from(shape.size), record))
    }

    pub(super) fn get(&self, address: Va) -> Option<(u64, &Record)> {
        let (size, place) = self.find(address)?;
        Some((size, &self.records.all[place]))
    }

    pub(super) fn get_mut(&mut self, address: Va) -> Option<&mut Record> {
        let (_, place) = self.find(address)?;
        Some(&mut self.records.all[place])
    }

    /// Addresses, sizes and records, ascending.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Va, u64, &Record)> {
        let mut groups: Vec<&Group> = self.groups.iter().collect();
        groups.sort_unstable_by_key(|group| group.number);
        let numbered = |group: &'_ Group| group.number * GROUP;
        let pages = groups.into_iter().flat_map(move |group| (numbered(group)..).zip(group.pages.iter()));
        pages.filter(|(_, page)| page.live > 0).flat_map(|(number, page)| {
            let shape = self.shapes.get(page.shape);
            let first = page.first as usize;
            let records = self.records.all[first..first + shape.places()].iter();
            let taken = records.filter(|record| !record.is_vacant());
            let start = Va(number << PAGE_SHIFT);
            taken.map(move |record| (start + record.offset(), u64::from(shape.size), record))
        })
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Bytes of host memory held.
    pub(super) fn memory(&self) -> usize {
        let pages = self.groups.len() * size_of::<[Page; GROUP as usize]>();
        self.groups.allocation_size() + pages + self.shapes.memory() + self.records.memory()
    }

    fn add_page(&mut self, address: Va, page: Page) {
        let number = group_of(address);
        let vacant = || Group { number, used: 0, pages: Box::new([Page::default(); GROUP as usize]) };
        let group = self.groups.entry(hash(number), is(number), |group| hash(group.number));
        let mut group = group.or_insert_with(vacant);
        let group = group.get_mut();
        group.used += 1;
        group.pages[page_in_group(address)] = page;
    }

    /// Size of the object that starts at `address`, and where its record is.
    fn find(&self, address: Va) -> Option<(u64, usize)> {
        let group = self.groups.find(hash(group_of(address)), is(group_of(address)))?;
        let page = group.pages[page_in_group(address)];
        let shape = self.shapes.get(page.shape);
        let place = page.place(shape, address);
        let is_there = page.live > 0 && self.records.all[place].is_at(offset(address));
        is_there.then_some((u64::from(shape.size), place))
    }
}

/// The page of an address, and how many pages of its group are used.
#[inline]
fn find_mut(groups: &mut HashTable<Group>, address: Va) -> Option<(&mut u32, &mut Page)> {
    let group = groups.find_mut(hash(group_of(address)), is(group_of(address)))?;
    Some((&mut group.used, &mut group.pages[page_in_group(address)]))
}

fn group_of(address: Va) -> u64 {
    (address.0 >> PAGE_SHIFT) / GROUP
}

fn page_in_group(address: Va) -> usize {
    (address.0 >> PAGE_SHIFT & (GROUP - 1)) as usize
}

fn offset(address: Va) -> u64 {
    address.0 & (PAGE_SIZE - 1)
}

fn is(number: u64) -> impl Fn(&Group) -> bool {
    move |group| group.number == number
}

fn hash(group: u64) -> u64 {
    FxBuildHasher.hash_one(group)
}

impl Page {
    /// Index of the record of the object at an address in it.
    #[inline]
    fn place(&self, shape: Shape, address: Va) -> usize {
        self.first as usize + shape.place_of(offset(address))
    }
}

impl Shape {
    /// Number of places of a page.
    fn places(self) -> usize {
        self.place_of(PAGE_SIZE - 1) + 1
    }

    #[inline]
    fn place_of(self, offset: u64) -> usize {
        ((offset * u64::from(self.reciprocal)) >> 32) as usize
    }
}

/// The sizes seen.
struct Shapes {
    all: Vec<Shape>,
    numbers: HashMap<u32, u16, FxBuildHasher>,
}

impl Default for Shapes {
    /// With a shape for pages that have none.
    fn default() -> Self {
        Self { all: vec![Shape { size: 0, reciprocal: 0 }], numbers: HashMap::default() }
    }
}

impl Shapes {
    #[inline]
    fn get(&self, number: u16) -> Shape {
        self.all[usize::from(number)]
    }

    /// None when there are 2^16 others.
    fn number(&mut self, size: u32) -> Option<u16> {
        if let Some(&number) = self.numbers.get(&size) {
            return Some(number);
        }
        let number = u16::try_from(self.all.len()).ok()?;
        let whole = u64::from(size) >= PAGE_SIZE;
        let reciprocal = if whole { 0 } else { (1u64 << 32).div_ceil(u64::from(size)) };
        // Objects of one byte, which are none of a slab's, share places by twos, and the second is refused.
        self.all.push(Shape { size, reciprocal: u32::try_from(reciprocal).unwrap_or(1 << 31) });
        self.numbers.insert(size, number);
        Some(number)
    }

    fn memory(&self) -> usize {
        self.all.capacity() * size_of::<Shape>() + self.numbers.allocation_size()
    }
}

/// Runs of records, each a page's.
#[derive(Default)]
struct Arena {
    all: Vec<Record>,
    /// Starts of vacant runs, by their length.
    vacant: Vec<Vec<u32>>,
}

impl Arena {
    /// A vacant run.
    fn take(&mut self, len: usize) -> u32 {
        if let Some(first) = self.vacant.get_mut(len).and_then(Vec::pop) {
            return first;
        }
        let end = self.all.len() + len;
        if end > self.all.capacity() {
            // An eighth at a time: doubling would leave a quarter of it unused.
            self.all.reserve_exact(len.max(self.all.len() / 8));
        }
        self.all.resize(end, Record::VACANT);
        // Cannot truncate: that would be 100 GB of records.
        (end - len) as u32
    }

    /// Takes back a run, whose records are vacant.
    fn give_back(&mut self, first: u32, len: usize) {
        if self.vacant.len() <= len {
            self.vacant.resize_with(len + 1, Vec::new);
        }
        self.vacant[len].push(first);
    }

    fn memory(&self) -> usize {
        let vacant: usize = self.vacant.iter().map(|runs| runs.capacity() * 4).sum();
        self.all.capacity() * size_of::<Record>() + self.vacant.capacity() * size_of::<Vec<u32>>() + vacant
    }
}
