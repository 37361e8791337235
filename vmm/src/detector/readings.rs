//! What the accounts are made of, read once at one pause however many of them are wanted.

use crate::machine::FrozenRam;
use anyhow::{Context, Result};
use introspect::linux::Linux;
use introspect::linux::counters::Counter;
use introspect::linux::slab::SlabMap;
use introspect::linux::totals::Totals;
use introspect::linux::vmalloc_info::AreaInfo;
use introspect::linux::zones::Zone;
use std::cell::OnceCell;

/// See the module.
pub(super) struct Readings<'a> {
    linux: &'a Linux,
    memory: &'a FrozenRam<'a>,
    slabs: OnceCell<SlabMap>,
    counters: OnceCell<Vec<Counter>>,
    totals: OnceCell<Totals>,
}

impl<'a> Readings<'a> {
    /// Nothing is read before it is asked for.
    pub fn new(linux: &'a Linux, memory: &'a FrozenRam<'a>) -> Self {
        Self { linux, memory, slabs: OnceCell::new(), counters: OnceCell::new(), totals: OnceCell::new() }
    }

    pub fn slabs(&self) -> Result<&SlabMap> {
        let read = || self.linux.slab_map(self.memory).context("Cannot read the guest's slab metadata");
        once(&self.slabs, read)
    }

    pub fn counters(&self) -> Result<&Vec<Counter>> {
        once(&self.counters, || self.linux.counters(self.memory).context("Cannot read the guest's counters"))
    }

    pub fn totals(&self) -> Result<&Totals> {
        let read = || self.linux.totals(self.memory).context("Cannot read the guest's amounts of memory");
        once(&self.totals, read)
    }

    pub fn shared_pages(&self) -> Result<i64> {
        self.linux.shared_pages(self.memory).context("Cannot read the guest's page structures")
    }

    pub fn areas(&self) -> Result<Vec<AreaInfo>> {
        self.linux.vmalloc_info(self.memory).context("Cannot read the guest's vmalloc areas")
    }

    pub fn zones(&self) -> Result<Vec<Zone>> {
        self.linux.memory_zones(self.memory).context("Cannot read the guest's memory zones")
    }
}

fn once<T>(cell: &OnceCell<T>, read: impl FnOnce() -> Result<T>) -> Result<&T> {
    if let Some(value) = cell.get() {
        return Ok(value);
    }
    let value = read()?;
    Ok(cell.get_or_init(|| value))
}
