//! Kernel symbols recovered from the image: kallsyms tables, `__ksymtab`. Addresses are link addresses;
//! the KASLR slide is applied by [`crate::linux::Placement`].

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(test)]
#[cfg_attr(target_arch = "aarch64", allow(dead_code, reason = "most of it is for tests on x86-64 kernels"))]
pub(crate) mod encoder;
mod kallsyms;
mod ksymtab;
#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use crate::image::KernelImage;
use crate::memory::Va;
#[cfg(target_arch = "aarch64")]
pub(crate) use aarch64::{complete, stack_size};
use anyhow::bail;
use hashbrown::HashTable;
pub use ksymtab::Export;
use rustc_hash::FxBuildHasher;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::hash::BuildHasher;
use std::ops::Range;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::complete;

/// One symbol, owning its name: what modules bring, and what a table's [`SymbolRef`] turns into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Symbol {
    /// Link address; a per-CPU symbol's is its offset in the per-CPU area.
    pub va: Va,
    /// nm's type letter.
    pub kind: char,
    /// Name.
    pub name: String,
}

/// One symbol of a [`SymbolTable`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SymbolRef<'a> {
    /// Link address; a per-CPU symbol's is its offset in the per-CPU area.
    pub va: Va,
    /// nm's type letter.
    pub kind: char,
    /// Name.
    pub name: &'a str,
}

impl From<SymbolRef<'_>> for Symbol {
    fn from(symbol: SymbolRef<'_>) -> Self {
        Self { va: symbol.va, kind: symbol.kind, name: symbol.name.to_owned() }
    }
}

/// An address named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved<'a> {
    /// Symbol name.
    pub name: &'a str,
    /// Distance from the symbol's start, bytes.
    pub offset: u64,
    /// Distance to the next symbol, bytes: what kallsyms calls the symbol's size.
    pub size: u64,
    /// Module name for module symbols.
    pub module: Option<&'a str>,
}

/// As the kernel's `%pS` prints it: `name+0xOFFSET/0xSIZE [module]`.
impl fmt::Display for Resolved<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{:#x}/{:#x}", self.name, self.offset, self.size)?;
        self.module.map_or(Ok(()), |module| write!(f, " [{module}]"))
    }
}

/// A symbol that no table names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Derived {
    /// Name.
    pub name: String,
    /// Link address.
    #[serde(serialize_with = "as_hex")]
    pub va: Va,
    /// How it was found.
    pub how: String,
}

fn as_hex<S: serde::Serializer>(va: &Va, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(va)
}

/// Every symbol of the kernel image.
///
/// Addresses ascend; equal ones keep the image's order. Names lie in one buffer, found through a hash table of
/// symbol numbers: 155 k symbols take about 7 MiB.
pub struct SymbolTable {
    addresses: Vec<u64>,
    names: Names,
    by_name: HashTable<u32>,
    /// Where [`SymbolTable::resolve`] answers: kernel text and, with CONFIG_KALLSYMS_ALL, data.
    kernel: Vec<Range<u64>>,
    provenance: String,
    derived: Vec<Derived>,
}

impl SymbolTable {
    /// Recovers the tables: kallsyms, and for a kernel without it the exported symbols.
    ///
    /// # Errors
    /// When no table validates; says what was tried.
    pub fn recover(image: &KernelImage) -> anyhow::Result<Self> {
        let mut table = match Self::from_kallsyms(image) {
            Some(table) => table,
            None => Self::from_exports(image),
        };
        if table.addresses.is_empty() {
            bail!(
                "No symbols in the kernel image: no kallsyms table (layouts A, A2, B) validates in its {} segments, \
                 and it has no __ksymtab section",
                image.segments.len()
            );
        }
        table.kernel = table.kernel_ranges(image);
        Ok(table)
    }

    fn from_kallsyms(image: &KernelImage) -> Option<Self> {
        let is_kernel = |address: u64| {
            image.segments.iter().any(|s| s.va.0 != 0 && address >= s.va.0 && address - s.va.0 < s.mem_size)
        };
        image.segments.iter().filter(|s| s.va.0 % 8 == 0).find_map(|segment| {
            let (layout, mut table) = kallsyms::recover(&image.elf[segment.file.clone()], &is_kernel)?;
            table.provenance = format!("kallsyms, layout {}, {} symbols", layout.name(), table.len());
            Some(table)
        })
    }

    fn from_exports(image: &KernelImage) -> Self {
        let mut exports: Vec<Export<'_>> = ksymtab::exports(image).collect();
        exports.sort_by_key(|export| export.va);
        let mut names = Names::with_capacity(exports.len());
        let mut addresses = Vec::with_capacity(exports.len());
        for export in exports {
            let kind = kind_of(image, export.va);
            if names.push([&[kind][..], export.name.as_bytes()].into_iter(), usize::MAX).is_some() {
                addresses.push(export.va.0);
            }
        }
        let mut table = Self::new(addresses, names);
        table.provenance = format!("__ksymtab, {} symbols", table.len());
        table
    }

    /// Indexes symbols, which must ascend by address.
    fn new(addresses: Vec<u64>, names: Names) -> Self {
        let mut by_name = HashTable::with_capacity(addresses.len());
        for n in 0..addresses.len() as u32 {
            let name = names.name(n as usize);
            // The first of a name wins, as in kallsyms_lookup_name.
            by_name
                .entry(hash(name), |&m| names.name(m as usize) == name, |&m| hash(names.name(m as usize)))
                .or_insert(n);
        }
        Self { addresses, names, by_name, kernel: Vec::new(), provenance: String::new(), derived: Vec::new() }
    }

    /// Adds data symbols. Where names are asked for by address ([`SymbolTable::resolve`]) stays as it is.
    #[cfg_attr(target_arch = "x86_64", expect(dead_code, reason = "kallsyms has them"))]
    fn insert(&mut self, more: Vec<(Va, String)>) {
        let mut all: Vec<(u64, char, &str)> =
            self.iter().map(|symbol| (symbol.va.0, symbol.kind, symbol.name)).collect();
        all.extend(more.iter().map(|(va, name)| (va.0, 'D', name.as_str())));
        // Stable: of several at one address those of the table stay the first.
        all.sort_by_key(|symbol| symbol.0);
        let (mut names, mut addresses) = (Names::with_capacity(all.len()), Vec::with_capacity(all.len()));
        for (va, kind, name) in all {
            if names.push([&[kind as u8][..], name.as_bytes()].into_iter(), usize::MAX).is_some() {
                addresses.push(va);
            }
        }
        let (kernel, provenance) = (std::mem::take(&mut self.kernel), std::mem::take(&mut self.provenance));
        *self = Self { kernel, provenance, ..Self::new(addresses, names) };
    }

    /// Symbols that no table of the image names, and how they were found.
    pub fn derived(&self) -> &[Derived] {
        &self.derived
    }

    /// Number of symbols.
    pub fn len(&self) -> usize {
        self.addresses.len()
    }

    /// True when there is no symbol; a recovered table has some.
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty()
    }

    /// All symbols in kallsyms order (ascending address).
    pub fn iter(&self) -> impl Iterator<Item = SymbolRef<'_>> {
        (0..self.len()).map(|n| self.get(n))
    }

    fn get(&self, n: usize) -> SymbolRef<'_> {
        SymbolRef { va: Va(self.addresses[n]), kind: self.names.kind(n), name: self.names.name(n) }
    }

    /// First symbol of that name.
    pub fn lookup(&self, name: &str) -> Option<Va> {
        self.find(name).map(|n| Va(self.addresses[n]))
    }

    /// Every symbol of that name, ascending; static functions of different files may share one.
    pub fn lookup_all(&self, name: &str) -> impl Iterator<Item = SymbolRef<'_>> {
        let first = self.find(name).unwrap_or(self.len());
        (first..self.len()).map(|n| self.get(n)).filter(move |symbol| symbol.name == name)
    }

    fn find(&self, name: &str) -> Option<usize> {
        let found = self.by_name.find(hash(name), |&n| self.names.name(n as usize) == name)?;
        Some(*found as usize)
    }

    /// Names a link address inside kernel text or data, as kallsyms_lookup does (aliases: the first in table
    /// order). Per-CPU offsets and addresses outside the kernel have no name.
    pub fn resolve(&self, va: Va) -> Option<Resolved<'_>> {
        if !self.kernel.iter().any(|range| range.contains(&va.0)) {
            return None;
        }
        let last = self.addresses.partition_point(|&a| a <= va.0).checked_sub(1)?;
        let start = self.addresses[last];
        let first = self.addresses.partition_point(|&a| a < start);
        Some(Resolved {
            name: self.names.name(first),
            offset: va.0 - start,
            size: self.size_at(start),
            module: None,
        })
    }

    /// Size of a symbol: distance to the next higher address.
    pub fn size(&self, name: &str) -> Option<u64> {
        self.lookup(name).map(|va| self.size_at(va.0))
    }

    /// The same of one symbol of several that share a name.
    pub fn size_of(&self, symbol: SymbolRef<'_>) -> u64 {
        self.size_at(symbol.va.0)
    }

    /// As kernel/kallsyms.c `get_symbol_pos`: to the next higher address, or to the end of the kernel's range.
    fn size_at(&self, start: u64) -> u64 {
        let next = self.addresses.partition_point(|&a| a <= start);
        let end = self.addresses.get(next).copied();
        let end =
            end.or_else(|| self.kernel.iter().find(|range| range.contains(&start)).map(|range| range.end));
        end.map_or(0, |end| end - start)
    }

    /// Where the table came from ("kallsyms, layout A2, 87347 symbols", "__ksymtab, 6000 symbols"), for `inspect`.
    pub fn provenance(&self) -> String {
        self.provenance.clone()
    }

    /// What is_ksym_addr accepts (include/linux/kallsyms.h): `_stext` to `_end`, or without data symbols
    /// (CONFIG_KALLSYMS_ALL off) the two text ranges. Bounds that have no symbol come from the segments.
    fn kernel_ranges(&self, image: &KernelImage) -> Vec<Range<u64>> {
        let segments = || image.segments.iter().filter(|s| s.va.0 != 0);
        let lowest = segments().map(|s| s.va.0).min().unwrap_or(0);
        let highest = segments().map(|s| s.va.0 + s.mem_size).max().unwrap_or(0);
        let bound = |name: &str| self.lookup(name).map(|va| va.0);
        let start = bound("_stext").unwrap_or(lowest);
        let has_data = (0..self.len()).any(|n| matches!(self.names.kind(n), 'd' | 'D' | 'b' | 'B'));
        let mut ranges = Vec::new();
        if has_data {
            ranges.push(start..bound("_end").unwrap_or(highest));
        } else {
            ranges.push(start..bound("_etext").unwrap_or(highest));
            ranges.extend(bound("_sinittext").zip(bound("_einittext")).map(|(start, end)| start..end));
        }
        ranges
    }
}

/// The image's exported symbols (`__ksymtab`, `__ksymtab_gpl`) in table order.
pub fn exports(image: &KernelImage) -> impl Iterator<Item = Export<'_>> {
    ksymtab::exports(image)
}

/// nm's type letter for an exported address, by the section it lies in.
fn kind_of(image: &KernelImage, va: Va) -> u8 {
    let section = image.sections.iter().find(|s| s.va <= va && va.0 - s.va.0 < s.size);
    match section.map(|s| s.name.as_str()) {
        Some(name) if name.ends_with("text") => b'T',
        Some(".bss") => b'B',
        Some(name) if name.contains("rodata") => b'R',
        _ => b'D',
    }
}

fn hash(name: &str) -> u64 {
    FxBuildHasher.hash_one(name)
}

/// Names and type letters, end to end in one buffer.
struct Names {
    text: String,
    /// Where each symbol's letter and name end in `text`.
    ends: Vec<u32>,
}

impl Names {
    /// Bytes of a name and its letter, on average: 24 on Debian's 6.12.
    const TYPICAL: usize = 26;
    /// Bytes of all names; thirty times a stock kernel's.
    const MAX_TEXT: usize = 128 << 20;

    fn with_capacity(symbols: usize) -> Self {
        Self { text: String::with_capacity(symbols * Self::TYPICAL), ends: Vec::with_capacity(symbols) }
    }

    /// Appends the type letter and name that `parts` make up. None, and nothing usable, when they make less than
    /// one or more than `most` bytes, are no text, or there are more of them than any kernel has.
    fn push<'a>(&mut self, parts: impl Iterator<Item = &'a [u8]>, most: usize) -> Option<()> {
        let start = self.text.len();
        for part in parts {
            self.text.push_str(str::from_utf8(part).ok()?);
            if self.text.len() - start > most || self.text.len() > Self::MAX_TEXT {
                return None;
            }
        }
        let letter = *self.text.as_bytes().get(start)?;
        if !letter.is_ascii() {
            return None;
        }
        self.ends.push(self.text.len() as u32);
        Some(())
    }

    fn entry(&self, n: usize) -> &str {
        let start = n.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.text[start as usize..self.ends[n] as usize]
    }

    fn kind(&self, n: usize) -> char {
        char::from(self.entry(n).as_bytes()[0])
    }

    fn name(&self, n: usize) -> &str {
        &self.entry(n)[1..]
    }
}
