//! Every module the guest ever loaded, so that a backtrace keeps its names after `rmmod` and after another
//! module took the same addresses.

use super::Linux;
use super::modules::{MAX_REGION, Module};
use crate::memory::{PhysicalMemory, Va};
use crate::symbols::Resolved;
use crate::unwind::{Detours, OrcTable};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Of a map that comes from a file: loads, and parts of a module, of which there are seven kinds.
const MAX_LOADS: usize = 1 << 16;
const MAX_REGIONS: usize = 16;

#[derive(Serialize, Deserialize)]
struct Loaded {
    module: Module,
    /// Event order number at load.
    since: u64,
    /// Event order number at unload.
    until: Option<u64>,
}

/// Modules by address and time. Times are the registry's event order numbers.
#[derive(Default, Serialize, Deserialize)]
pub struct ModuleMap {
    loaded: Vec<Loaded>,
    /// What the tracer led the kernel's code to.
    pub detours: Detours,
}

impl ModuleMap {
    /// A module was laid out.
    pub fn load(&mut self, module: Module, now: u64) {
        // The same `struct module` address again without an unload in between: the unload was not seen.
        self.unload(module.va, now);
        self.loaded.push(Loaded { module, since: now, until: None });
    }

    /// The module with this `struct module` goes away.
    pub fn unload(&mut self, va: Va, now: u64) {
        for entry in self.loaded.iter_mut().filter(|e| e.module.va == va && e.until.is_none()) {
            entry.until = Some(now);
        }
    }

    /// Makes a map that comes from a file whole again: stack tables are read from `memory`, and what no module has goes.
    pub fn restore(&mut self, linux: &Linux, memory: &impl PhysicalMemory) {
        self.detours.restore();
        self.loaded.truncate(MAX_LOADS);
        for Loaded { module, until, .. } in &mut self.loaded {
            module.regions.truncate(MAX_REGIONS);
            module
                .regions
                .retain(|r| r.range.start <= r.range.end && r.range.end - r.range.start <= MAX_REGION);
            module.symbols.sort_by_key(|s| s.va);
            if until.is_none() {
                module.orc = linux.module_orc(memory, module.va).unwrap_or_default();
            }
        }
    }

    /// Number of loads so far.
    pub fn seen(&self) -> usize {
        self.loaded.len()
    }

    /// Modules loaded now.
    pub fn live(&self) -> impl Iterator<Item = &Module> {
        self.loaded.iter().filter(|e| e.until.is_none()).map(|e| &e.module)
    }

    /// Writable data of the modules loaded now: roots of a scan. Initialisation data is left out: it is freed.
    pub fn data(&self) -> impl Iterator<Item = (&str, Range<u64>)> {
        self.live().flat_map(|m| {
            m.regions.iter().filter(|r| r.data && !r.init).map(move |r| (m.name.as_str(), r.range.clone()))
        })
    }

    /// Where the blocks of memory begin that the modules loaded now have. Those of initialisation are left out: they are freed,
    /// and another module's may begin there.
    pub fn blocks(&self) -> impl Iterator<Item = u64> {
        self.live().flat_map(|m| &m.regions).filter(|r| !r.init).map(|r| r.range.start)
    }

    /// Names an address as of event order number `at`; module code mapped at that time wins, else the last known.
    pub fn resolve(&self, va: Va, at: u64) -> Option<Resolved<'_>> {
        let then = |e: &&Loaded| e.since <= at && e.until.is_none_or(|until| at <= until);
        let entry = self.holding(va).find(then).or_else(|| self.holding(va).next())?;
        let symbols = &entry.module.symbols;
        let next = symbols.partition_point(|s| s.va <= va);
        let symbol = symbols[..next].last()?;
        // The first of several symbols at one address, as kallsyms does.
        let first = symbols.partition_point(|s| s.va < symbol.va);
        let region = entry.module.regions.iter().find(|r| r.range.contains(&va.0))?;
        let end = symbols.get(next).map_or(region.range.end, |s| s.va.0.min(region.range.end));
        (region.range.contains(&symbol.va.0)).then(|| Resolved {
            name: &symbols[first].name,
            offset: va - symbol.va,
            size: end.saturating_sub(symbol.va.0),
            module: Some(&entry.module.name),
        })
    }

    /// Stack tables of the code at `va`.
    pub fn orc(&self, va: Va) -> Option<&OrcTable> {
        self.holding(va).find(|e| e.until.is_none())?.module.orc.as_ref()
    }

    /// Loads that had this address, newest first.
    fn holding(&self, va: Va) -> impl Iterator<Item = &Loaded> {
        self.loaded.iter().rev().filter(move |e| e.module.regions.iter().any(|r| r.range.contains(&va.0)))
    }
}

impl Linux {
    /// Names an address of code, the kernel's or a module's, as of event order number `at`.
    pub fn resolve<'a>(&'a self, modules: &'a ModuleMap, va: Va, at: u64) -> Option<Resolved<'a>> {
        self.kernel.symbols.resolve(va - self.placement.slide).or_else(|| modules.resolve(va, at))
    }
}

#[cfg(test)]
mod tests {
    use super::super::modules::Region;
    use super::*;
    use crate::symbols::Symbol;

    fn module(name: &str, va: u64, text: Range<u64>, symbol: u64) -> Module {
        Module {
            va: Va(va),
            name: name.to_owned(),
            regions: vec![Region { range: text, text: true, data: false, init: false }],
            symbols: vec![Symbol { va: Va(symbol), kind: 't', name: format!("{name}_init") }],
            orc: None,
        }
    }

    #[test]
    fn names_outlive_the_module_and_the_reuse_of_its_addresses() {
        let mut map = ModuleMap::default();
        map.load(module("first", 0x10, 0x1000..0x2000, 0x1100), 5);
        map.unload(Va(0x10), 9);
        assert_eq!(map.live().count(), 0);
        assert_eq!(map.resolve(Va(0x1108), 7).map(|r| (r.name, r.offset)), Some(("first_init", 8)));
        map.load(module("second", 0x20, 0x1000..0x2000, 0x1100), 12);
        assert_eq!(map.resolve(Va(0x1108), 7).and_then(|r| r.module), Some("first"));
        assert_eq!(map.resolve(Va(0x1108), 13).and_then(|r| r.module), Some("second"));
    }

    #[test]
    fn addresses_outside_and_before_the_first_symbol_have_no_name() {
        let mut map = ModuleMap::default();
        map.load(module("m", 0x10, 0x1000..0x2000, 0x1100), 1);
        assert_eq!(map.resolve(Va(0x1080), 1), None);
        assert_eq!(map.resolve(Va(0x2000), 1), None);
    }

    #[test]
    fn memory_of_initialisation_is_another_modules_afterwards() {
        let mut map = ModuleMap::default();
        let mut loaded = module("m", 0x10, 0x1000..0x2000, 0x1100);
        let init = Region { range: 0x3000..0x4000, text: false, data: true, init: true };
        loaded.regions.push(init.clone());
        loaded.regions.push(Region { range: 0x5000..0x6000, init: false, ..init });
        map.load(loaded, 1);
        assert_eq!(map.blocks().collect::<Vec<_>>(), [0x1000, 0x5000]);
        assert_eq!(map.data().map(|(_, range)| range.start).collect::<Vec<_>>(), [0x5000]);
    }

    #[test]
    fn a_load_at_the_same_struct_ends_the_one_before() {
        let mut map = ModuleMap::default();
        map.load(module("old", 0x10, 0x1000..0x2000, 0x1100), 1);
        map.load(module("new", 0x10, 0x3000..0x4000, 0x3100), 2);
        assert_eq!(map.live().map(|m| m.name.as_str()).collect::<Vec<_>>(), ["new"]);
    }
}
