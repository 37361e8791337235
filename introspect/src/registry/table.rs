//! Records by address: one open-addressed table that holds the records themselves, so that an event touches one
//! place of memory.
//!
//! Linear probing, records ordered by the hash of their address (Amble and Knuth, "Ordered hash tables", 1974): a
//! search ends at the first record with a greater hash, a removal closes its gap at once (no tombstones), and a growing
//! table is copied in one sequential pass. The table has any size, not only powers of two, so that little is unused.

use super::record::Record;
use crate::memory::Va;

/// Filled up to this share, in percent, before it grows.
const MAX_LOAD: usize = 85;
/// Size after growing, in percent of before.
const GROWTH: usize = 125;
const SMALLEST: usize = 1024;
/// Places behind the last home, for records that are pushed on.
const SPILL: usize = 256;

#[derive(Default)]
pub(super) struct Table {
    places: Vec<Record>,
    /// Places that are some hash's home.
    homes: usize,
    len: usize,
}

impl Table {
    /// Stores a record; returns the one that it replaces at the same address.
    pub(super) fn insert(&mut self, record: Record) -> Option<Record> {
        loop {
            let (at, found) = self.search(record.address());
            if found {
                return Some(std::mem::replace(&mut self.places[at], record));
            }
            let free = self.places.get(at..).and_then(|rest| rest.iter().position(Record::is_vacant));
            let full = self.len * 100 >= self.homes * MAX_LOAD;
            if let Some(shift) = free.filter(|_| !full) {
                self.places.copy_within(at..at + shift, at + 1);
                self.places[at] = record;
                self.len += 1;
                return None;
            }
            self.grow();
        }
    }

    /// Takes a record out.
    pub(super) fn remove(&mut self, address: Va) -> Option<Record> {
        let (at, found) = self.search(address);
        if !found {
            return None;
        }
        let record = self.places[at];
        // Records that were pushed on by this one move back, up to the first that is at home.
        let end = (at + 1..self.places.len())
            .find(|&i| self.places[i].is_vacant() || self.home(hash(self.places[i].address())) == i);
        let end = end.unwrap_or(self.places.len());
        self.places.copy_within(at + 1..end, at);
        self.places[end - 1] = Record::VACANT;
        self.len -= 1;
        Some(record)
    }

    pub(super) fn get(&self, address: Va) -> Option<&Record> {
        let (at, found) = self.search(address);
        found.then(|| &self.places[at])
    }

    pub(super) fn get_mut(&mut self, address: Va) -> Option<&mut Record> {
        let (at, found) = self.search(address);
        found.then(|| &mut self.places[at])
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Record> {
        self.places.iter().filter(|r| !r.is_vacant())
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Bytes of host memory held.
    pub(super) fn memory(&self) -> usize {
        self.places.capacity() * size_of::<Record>()
    }

    /// Where the record of `address` is, or would be, and which of both.
    fn search(&self, address: Va) -> (usize, bool) {
        let wanted = hash(address);
        let mut at = self.home(wanted);
        while let Some(record) = self.places.get(at).filter(|r| !r.is_vacant()) {
            if record.address() == address {
                return (at, true);
            }
            if hash(record.address()) > wanted {
                break;
            }
            at += 1;
        }
        (at, false)
    }

    fn home(&self, hash: u64) -> usize {
        ((u128::from(hash) * self.homes as u128) >> 64) as usize
    }

    fn grow(&mut self) {
        let homes = (self.homes * GROWTH / 100).max(SMALLEST);
        let old = std::mem::replace(&mut self.places, vec![Record::VACANT; homes + SPILL]);
        self.homes = homes;
        let mut next = 0;
        for record in old.into_iter().filter(|r| !r.is_vacant()) {
            next = self.home(hash(record.address())).max(next);
            if next == self.places.len() {
                // A cluster longer than the spill at the very end.
                self.places.push(record);
            } else {
                self.places[next] = record;
            }
            next += 1;
        }
    }
}

/// One-to-one on 64 bits, so that no two addresses share a hash (the finaliser of MurmurHash3, Appleby 2011).
fn hash(address: Va) -> u64 {
    let mut h = address.0;
    h = (h ^ h >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    h = (h ^ h >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ h >> 33
}
