//! Loaded modules: memory layout, symbols, stack tables. Read when a module is loaded and kept after
//! it is gone, so that old backtraces keep their names.

use super::Linux;
use super::lookup::Lookup;
use super::read::{Walk, le16, le32, le64};
use crate::memory::{MemoryError, PhysicalMemory, Va};
use crate::symbols::Symbol;
use crate::unwind::OrcTable;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// More modules than any kernel loads; a list beyond it is damage.
const MAX_MODULES: usize = 1 << 16;
/// Most symbols of one module.
const MAX_SYMBOLS: u64 = 1 << 20;
/// Most stack-table entries of one module.
const MAX_ORC: u64 = 4 << 20;
/// Longest symbol name, bytes (`KSYM_NAME_LEN`).
const MAX_SYMBOL_NAME: usize = 512;
/// Largest part of a module, bytes: the whole module space.
pub(super) const MAX_REGION: u64 = 2 << 30;
/// Size of an `Elf64_Sym`, bytes (System V ABI).
const SYMBOL_SIZE: u64 = 24;
/// Section indices from here on are no sections (`SHN_LORESERVE`); 0 is `SHN_UNDEF`.
const SECTIONS: Range<u16> = 1..0xff00;
/// Size of an ORC entry and of its instruction address, bytes (arch/x86/include/asm/orc_types.h).
const ORC_ENTRY_SIZE: u64 = 6;
const ORC_IP_SIZE: u64 = 4;

/// What a module was at load time.
#[derive(Serialize, Deserialize)]
pub struct Module {
    /// `struct module`.
    pub va: Va,
    /// Name.
    pub name: String,
    /// All memory of the module (core and init), by purpose.
    pub regions: Vec<Region>,
    /// Its symbols, ascending by address.
    pub symbols: Vec<Symbol>,
    /// Its stack tables; not saved, as they are in the guest's memory.
    #[serde(skip)]
    pub orc: Option<OrcTable>,
}

/// One part of a module's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Run-time addresses.
    pub range: Range<u64>,
    /// Holds code.
    pub text: bool,
    /// Writable data, also what becomes read-only after initialisation: scanned as roots while the module is loaded.
    pub data: bool,
    /// Freed after initialisation.
    pub init: bool,
}

/// Offsets and addresses this room needs.
pub(super) struct Layout {
    modules: Va,
    list: u64,
    name: u64,
    name_len: usize,
    memory: Memory,
    kallsyms: u64,
    symtab: u64,
    num_symtab: u64,
    strtab: u64,
    typetab: u64,
    orc: Option<Orc>,
}

/// How `struct module` describes the module's memory.
enum Memory {
    /// Until 6.3: a core and an init block, each text, read-only data, read-only after init, data.
    Layouts { core: u64, init: u64, base: u64, size: u64, text: u64, ro: u64 },
    /// Since 6.4: one block per type.
    Blocks { first: u64, stride: u64, base: u64, size: u64, types: Vec<BlockType> },
}

/// One `enum mod_mem_type`.
#[derive(Clone, Copy)]
struct BlockType {
    index: u64,
    text: bool,
    data: bool,
    init: bool,
}

struct Orc {
    count: u64,
    ips: u64,
    entries: u64,
}

impl Layout {
    pub fn new(lookup: &Lookup<'_>) -> anyhow::Result<Self> {
        let module = |member| lookup.offset("module", member);
        let tables = |member| lookup.offset("mod_kallsyms", member);
        let name = lookup.field("module", "name")?;
        let orc = match lookup.types.offset("module", "arch.num_orcs") {
            Some(count) => {
                Some(Orc { count, ips: module("arch.orc_unwind_ip")?, entries: module("arch.orc_unwind")? })
            }
            None => None,
        };
        Ok(Self {
            modules: lookup.symbol("modules")?,
            list: module("list")?,
            name: name.offset,
            name_len: name.size as usize,
            memory: Memory::new(lookup)?,
            kallsyms: module("kallsyms")?,
            symtab: tables("symtab")?,
            num_symtab: tables("num_symtab")?,
            strtab: tables("strtab")?,
            typetab: tables("typetab")?,
            orc,
        })
    }
}

impl Memory {
    fn new(lookup: &Lookup<'_>) -> anyhow::Result<Self> {
        if let Some(core) = lookup.types.offset("module", "core_layout") {
            let layout = |member| lookup.offset("module_layout", member);
            return Ok(Self::Layouts {
                core,
                init: lookup.offset("module", "init_layout")?,
                base: layout("base")?,
                size: layout("size")?,
                text: layout("text_size")?,
                ro: layout("ro_size")?,
            });
        }
        let block = |name, text, data, init| {
            Ok::<_, anyhow::Error>(BlockType { index: lookup.enumerator(name)?, text, data, init })
        };
        Ok(Self::Blocks {
            first: lookup.offset("module", "mem")?,
            stride: lookup.size_of("module_memory")?,
            base: lookup.offset("module_memory", "base")?,
            size: lookup.offset("module_memory", "size")?,
            types: vec![
                block("MOD_TEXT", true, false, false)?,
                block("MOD_DATA", false, true, false)?,
                block("MOD_RODATA", false, false, false)?,
                block("MOD_RO_AFTER_INIT", false, true, false)?,
                block("MOD_INIT_TEXT", true, false, true)?,
                block("MOD_INIT_DATA", false, true, true)?,
                block("MOD_INIT_RODATA", false, false, true)?,
            ],
        })
    }
}

impl Linux {
    /// Reads the module at `va` (`struct module`), complete at the entry of `do_init_module`.
    ///
    /// # Errors
    /// Not mapped, or sizes out of range, with the address. Stack tables that do not fit are left out.
    pub fn module(&self, memory: &impl PhysicalMemory, va: Va) -> Result<Module, MemoryError> {
        let regions = self.module_regions(memory, va)?;
        Ok(Module {
            va,
            name: self.read_string(memory, va + self.modules.name, self.modules.name_len)?,
            symbols: self.module_symbols(memory, va, &regions)?,
            orc: self.module_orc(memory, va)?,
            regions,
        })
    }

    /// `struct module` addresses of all loaded modules (`modules` list), bounded.
    ///
    /// # Errors
    /// A damaged list, with its address.
    pub fn modules(&self, memory: &impl PhysicalMemory) -> Result<Vec<Va>, MemoryError> {
        let nodes = self.list(memory, self.modules.modules, MAX_MODULES)?;
        Ok(nodes.into_iter().map(|node| node - self.modules.list).collect())
    }

    fn module_regions(&self, memory: &impl PhysicalMemory, va: Va) -> Result<Vec<Region>, MemoryError> {
        let mut regions = Vec::new();
        let mut add = |base: Va, from: u64, to: u64, [text, data, init]: [bool; 3]| {
            if from > to || to > MAX_REGION {
                return Err(MemoryError::Corrupt { va, what: "a module has impossible sizes" });
            }
            if from != to {
                regions.push(Region { range: (base + from).0..(base + to).0, text, data, init });
            }
            Ok(())
        };
        match &self.modules.memory {
            Memory::Layouts { core, init, base, size, text, ro } => {
                for (at, init) in [(va + *core, false), (va + *init, true)] {
                    let start = self.read_va(memory, at + *base)?;
                    let word = |offset| self.read_u32(memory, at + offset).map(u64::from);
                    let (size, text, ro) = (word(*size)?, word(*text)?, word(*ro)?);
                    add(start, 0, text, [true, false, init])?;
                    add(start, text, ro, [false, false, init])?;
                    add(start, ro, size, [false, true, init])?;
                }
            }
            Memory::Blocks { first, stride, base, size, types } => {
                for block in types {
                    let at = va + *first + block.index * stride;
                    let start = self.read_va(memory, at + *base)?;
                    let size = u64::from(self.read_u32(memory, at + *size)?);
                    add(start, 0, size, [block.text, block.data, block.init])?;
                }
            }
        }
        Ok(regions)
    }

    /// Symbols inside the module's memory. While the module initialises, its table holds those of the init parts too.
    fn module_symbols(
        &self,
        memory: &impl PhysicalMemory,
        va: Va,
        regions: &[Region],
    ) -> Result<Vec<Symbol>, MemoryError> {
        let layout = &self.modules;
        let tables = self.read_va(memory, va + layout.kallsyms)?;
        if tables == Va(0) {
            return Ok(Vec::new());
        }
        let count = u64::from(self.read_u32(memory, tables + layout.num_symtab)?);
        if count > MAX_SYMBOLS {
            return Err(MemoryError::Corrupt { va, what: "a module has too many symbols" });
        }
        let symtab = self.read_va(memory, tables + layout.symtab)?;
        let strtab = self.read_va(memory, tables + layout.strtab)?;
        let typetab = self.read_va(memory, tables + layout.typetab)?;
        let entries = self.read_vec(memory, symtab, count * SYMBOL_SIZE)?;
        let kinds = self.read_vec(memory, typetab, count)?;
        let mut walk = Walk::default();
        let mut symbols = Vec::new();
        for (entry, &kind) in entries.chunks_exact(SYMBOL_SIZE as usize).zip(&kinds) {
            let (name, section, value) = (le32(entry, 0), le16(entry, 6), le64(entry, 8));
            if !SECTIONS.contains(&section) || !regions.iter().any(|r| r.range.contains(&value)) {
                continue;
            }
            let name = self.read_string_with(memory, &mut walk, strtab + u64::from(name), MAX_SYMBOL_NAME)?;
            if !name.is_empty() && !is_assembler_label(&name) {
                symbols.push(Symbol { va: Va(value), kind: char::from(kind), name });
            }
        }
        // Stable: of several symbols at one address the first in the table names it.
        symbols.sort_by_key(|s| s.va);
        Ok(symbols)
    }

    pub(super) fn module_orc(
        &self,
        memory: &impl PhysicalMemory,
        va: Va,
    ) -> Result<Option<OrcTable>, MemoryError> {
        let (Some(layout), Some(own)) = (&self.modules.orc, &self.kernel.orc) else { return Ok(None) };
        let count = u64::from(self.read_u32(memory, va + layout.count)?);
        if count == 0 || count > MAX_ORC {
            return Ok(None);
        }
        let ips_va = self.read_va(memory, va + layout.ips)?;
        let entries_va = self.read_va(memory, va + layout.entries)?;
        let ips = self.read_vec(memory, ips_va, count * ORC_IP_SIZE)?;
        let entries = self.read_vec(memory, entries_va, count * ORC_ENTRY_SIZE)?;
        Ok(own.from_module(ips_va, &ips, &entries))
    }

    /// Reads `len` bytes; callers bound `len`.
    fn read_vec(&self, memory: &impl PhysicalMemory, va: Va, len: u64) -> Result<Vec<u8>, MemoryError> {
        let mut bytes = vec![0; len as usize];
        self.read(memory, va, &mut bytes)?;
        Ok(bytes)
    }
}

/// Labels that kallsyms never shows (`is_mapping_symbol`, include/linux/module_symbol.h).
fn is_assembler_label(name: &str) -> bool {
    name.starts_with(".L") || name.starts_with("L0") || name.starts_with('$')
}
