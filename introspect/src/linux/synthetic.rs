//! A miniature guest for tests: an image with BTF and exports, 4 MiB of RAM, and a hand to lay structures out in it.

use super::{Linux, Placement};
use crate::image::KernelImage;
use crate::image::synthetic::{BASE, Block, vmlinux};
use crate::kernel::Kernel;
use crate::memory::{FlatMemory, PAGE_SIZE, Va};
use crate::symbols::SymbolTable;
use crate::types::Btf;
use crate::types::synthetic::{Builder, Part};
use std::sync::Arc;

pub(super) const SLIDE: u64 = 0x20_0000;
pub(super) const RAM: u64 = 0x40_0000;
pub(super) const DIRECT_MAP: Va = Va(0xffff_9000_0000_0000);
pub(super) const PAGE_STRUCTS: Va = Va(0xffff_ec00_0000_0000);
pub(super) const VMALLOC: Va = Va(0xffff_c900_0000_0000);
pub(super) const PAGE_STRUCT: u64 = 64;
pub(super) const HZ: u32 = 250;

/// Physical address of the image, and so of the symbol at offset 0.
const IMAGE: u64 = 0x10_0000;
const STRINGS: u64 = 0x2000;
const PAGE_TABLE: u64 = 0x3000;
const VARIABLES: u64 = 0x4000;
const TYPES: u64 = 0x1_0000;
/// Tables and the arrays they map, physical addresses.
const STRUCTS_AT: u64 = 0x1_0000;
const TABLES: u64 = 0x2000;
/// The one CPU's area.
pub(super) const PERCPU: u64 = 0x8000;
/// Offset of `vm_event_states` in it.
pub(super) const EVENTS: u32 = 0x40;
/// Per-CPU offset of the spare `vmap_area`.
pub(super) const SPARE: u32 = 0x18;
/// Per-CPU offset of what `kfree_rcu` collects.
pub(super) const KRC: u32 = 0x800;
/// From here on RAM is free for a test's structures.
pub(super) const HEAP: u64 = 0x20_0000;

/// Which generation of layouts the guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Era {
    /// 6.1: slab by page flag, one list of vmalloc areas, module layouts, separate per-CPU variables.
    Flags,
    /// 6.12: slab by page type, nodes of vmalloc areas, module blocks, `pcpu_hot`.
    Types,
}

/// Symbols by offset in the variables page, 64 bytes apart.
const SYMBOLS: [&str; 45] = [
    "jiffies_64",
    "__per_cpu_offset",
    "nr_cpu_ids",
    "page_offset_base",
    "vmemmap_base",
    "slab_caches",
    "kmem_cache_node",
    "modules",
    "vmap_area_list",
    "vmap_area_root",
    "vmap_nodes",
    "nr_vmap_nodes",
    "node_data",
    "nr_node_ids",
    "_sdata",
    "_edata",
    "__bss_start",
    "mem_pool",
    "mem_pool_free_count",
    "__bss_stop",
    "_stext",
    "_etext",
    "__start_rodata",
    "__end_rodata",
    "pcpu_chunk_lists",
    "pcpu_nr_slots",
    "pcpu_free_slot",
    "pcpu_unit_offsets",
    "vmstat_text",
    "vm_zone_stat",
    "vm_numa_event",
    "vm_node_stat",
    "nr_memmap_pages",
    "_totalram_pages",
    "totalreserve_pages",
    "nr_vmalloc_pages",
    "vm_committed_as",
    "blockdev_superblock",
    "pcpu_nr_populated",
    "pcpu_nr_units",
    "migratetype_names",
    "hstates",
    "hugetlb_max_hstate",
    "sysctl_overcommit_ratio",
    "sysctl_overcommit_kbytes",
];

/// Where `init_task` is, offset in the image; a stack's worth behind it is `init_stack`.
const INIT_TASK: u64 = 0x5000;
const INIT_STACK: u64 = 0x8000;

pub(super) struct Guest {
    pub linux: Linux,
    pub ram: Vec<u8>,
}

impl Guest {
    pub fn new(era: Era) -> Self {
        Self::without(era, "").expect("a complete guest")
    }

    /// A guest whose image lacks one symbol.
    pub fn without(era: Era, missing: &str) -> anyhow::Result<Self> {
        let image = KernelImage::parse(&image(era, missing)).expect("an image");
        let symbols = SymbolTable::recover(&image).expect("symbols");
        let types = Btf::parse(&types(era)).expect("types");
        let kernel = Kernel {
            image,
            symbols,
            types: Some(types),
            types_file: None,
            orc: None,
            callee_saved: Default::default(),
        };
        let link = BASE - 0xffff_ffff_8000_0000;
        let placement = Placement { slide: SLIDE, phys_base: IMAGE.wrapping_sub(link), levels: 4 };
        let mut guest = Self { linux: Linux::new(Arc::new(kernel), placement)?, ram: vec![0; RAM as usize] };
        guest.boot();
        Ok(guest)
    }

    /// Page tables and variables.
    fn boot(&mut self) {
        let top = IMAGE + PAGE_TABLE;
        for (n, (va, pages, at)) in [(PAGE_STRUCTS, 16, STRUCTS_AT), (VMALLOC, 0, 0)].into_iter().enumerate()
        {
            let tables = TABLES + 3 * PAGE_SIZE * n as u64;
            let index = |shift: u32| 8 * (va.0 >> shift & 511);
            self.put(top + index(39), tables | 3);
            self.put(tables + index(30), (tables + PAGE_SIZE) | 3);
            self.put(tables + PAGE_SIZE + index(21), (tables + 2 * PAGE_SIZE) | 3);
            for page in 0..pages {
                self.put(tables + 2 * PAGE_SIZE + 8 * page, (at + page * PAGE_SIZE) | 3);
            }
        }
        self.set("page_offset_base", DIRECT_MAP.0);
        self.set("vmemmap_base", PAGE_STRUCTS.0);
        self.set("nr_cpu_ids", 1);
        self.set("nr_node_ids", 1);
        self.set("__per_cpu_offset", (DIRECT_MAP + PERCPU).0);
        for list in ["slab_caches", "modules", "vmap_area_list"] {
            if let Some(head) = self.linux.symbol(list) {
                self.set(list, head.0);
            }
        }
        let init = Self::init_task();
        self.task(init, b"swapper/0", 0, init + 0x200);
        self.list(init + 48, &[]);
        self.list(init + 0x200, &[init + 72]);
    }

    pub fn memory(&self) -> FlatMemory {
        FlatMemory::new(self.ram.clone())
    }

    /// Run-time address of a symbol.
    pub fn symbol(&self, name: &str) -> Va {
        self.linux.symbol(name).expect("a symbol of the synthetic guest")
    }

    /// Writes a word at a physical address.
    pub fn put(&mut self, pa: u64, value: u64) {
        self.ram[pa as usize..][..8].copy_from_slice(&value.to_le_bytes());
    }

    pub fn put32(&mut self, pa: u64, value: u32) {
        self.ram[pa as usize..][..4].copy_from_slice(&value.to_le_bytes());
    }

    /// Writes a variable.
    pub fn set(&mut self, name: &str, value: u64) {
        let pa = self.symbol(name) - (Va(BASE) + SLIDE) + IMAGE;
        self.put(pa, value);
    }

    /// Writes the second word of an array.
    pub fn set_second(&mut self, name: &str, value: u64) {
        let pa = self.symbol(name) - (Va(BASE) + SLIDE) + IMAGE;
        self.put(pa + 8, value);
    }

    /// Links list nodes (physical addresses) into a ring with their head.
    pub fn list(&mut self, head: u64, nodes: &[u64]) {
        let ring: Vec<u64> = std::iter::once(head).chain(nodes.iter().copied()).collect();
        for (n, &at) in ring.iter().enumerate() {
            self.put(at, direct(ring[(n + 1) % ring.len()]));
        }
    }

    /// Links nodes behind a variable that is a list head.
    pub fn list_at(&mut self, name: &str, nodes: &[u64]) {
        let head = self.symbol(name);
        self.set(name, nodes.first().map_or(head.0, |&n| direct(n)));
        for (n, &at) in nodes.iter().enumerate() {
            self.put(at, nodes.get(n + 1).map_or(head.0, |&next| direct(next)));
        }
    }

    /// Physical address of `init_task`.
    pub fn init_task() -> u64 {
        IMAGE + INIT_TASK
    }

    /// Fills in a task with its own signal structure.
    pub fn task(&mut self, at: u64, comm: &[u8], pid: u32, signal: u64) {
        self.ram[at as usize..][..comm.len()].copy_from_slice(comm);
        self.put32(at + 16, pid);
        self.put(at + 64, direct(signal));
    }

    /// Physical address of a frame's `struct page`.
    pub fn page(frame: u64) -> u64 {
        STRUCTS_AT + frame * PAGE_STRUCT
    }

    /// A `vmap_area` of three pages at `va`: the `n`th, each beside an unused page.
    pub fn vmap_area(&mut self, n: u64, va: u64) {
        let start = VMALLOC.0 + n * 4 * PAGE_SIZE;
        self.put(va, start);
        self.put(va + 8, start + 3 * PAGE_SIZE);
    }

    /// Maps a page of the vmalloc space.
    pub fn map_vmalloc(&mut self, page: u64, pa: u64) {
        self.put(TABLES + 5 * PAGE_SIZE + 8 * page, pa | 3);
    }
}

/// The kernel's address of RAM: in the direct map, or in the image, where it has its symbols.
pub(super) fn direct(pa: u64) -> u64 {
    if (IMAGE..HEAP).contains(&pa) { BASE + SLIDE + (pa - IMAGE) } else { (DIRECT_MAP + pa).0 }
}

fn image(era: Era, missing: &str) -> Vec<u8> {
    let wanted = |name: &str| match name {
        "vmap_area_list" | "vmap_area_root" => era == Era::Flags,
        "vmap_nodes" | "nr_vmap_nodes" => era == Era::Types,
        name => name != missing,
    };
    let mut symbols: Vec<(&str, u64)> = vec![
        ("init_top_pgt", PAGE_TABLE),
        ("init_task", INIT_TASK),
        ("init_stack", INIT_STACK),
        ("init_stack_end", INIT_STACK + 0x4000),
    ];
    symbols.extend(SYMBOLS.iter().enumerate().map(|(n, &name)| (name, VARIABLES + 64 * n as u64)));
    symbols.retain(|&(name, _)| wanted(name) && name != missing);
    symbols.sort_by_key(|s| s.1);
    let (mut table, mut strings) = (Vec::new(), Vec::new());
    for (n, &(name, at)) in symbols.iter().enumerate() {
        let entry = 12 * n as u64;
        let name_at = STRINGS + strings.len() as u64;
        for distance in [at.wrapping_sub(entry), name_at.wrapping_sub(entry + 4), 0] {
            table.extend_from_slice(&(distance as u32).to_le_bytes());
        }
        strings.extend_from_slice(name.as_bytes());
        strings.push(0);
    }
    let jiffies = (300 * HZ).wrapping_neg().to_le_bytes().to_vec();
    vmlinux(&[
        Block { name: "__ksymtab", at: 0, bytes: table },
        Block { name: "__ksymtab_strings", at: STRINGS, bytes: strings },
        Block { name: ".data", at: VARIABLES, bytes: jiffies },
        Block { name: ".BTF", at: TYPES, bytes: vec![0; 16] },
    ])
}

fn types(era: Era) -> Vec<u8> {
    let mut b = Builder::new();
    let (word, half, short, byte) = (b.int("u64", 8), b.int("u32", 4), b.int("u16", 2), b.int("u8", 1));
    let mut structure = |b: &mut Builder, name: &str, bytes: u32, members: &[(&str, u32, u32)]| {
        let parts: Vec<Part<'_>> = members.iter().map(|&(name, ty, at)| (name, ty, at * 8, 0)).collect();
        b.structure(name, bytes, &parts)
    };
    let (comm, name) = (b.array(byte, 16), b.array(byte, 56));
    let list = structure(&mut b, "list_head", 16, &[("next", word, 0), ("prev", word, 8)]);
    let lists = b.array(list, 14);
    let node = structure(&mut b, "rb_node", 24, &[("rb_right", word, 8), ("rb_left", word, 16)]);
    let thread = structure(&mut b, "thread_struct", 8, &[("sp", word, 0)]);
    structure(
        &mut b,
        "task_struct",
        256,
        &[
            ("comm", comm, 0),
            ("pid", half, 16),
            ("__state", half, 20),
            ("stack", word, 24),
            ("thread", thread, 32),
            ("on_cpu", half, 40),
            ("exit_state", half, 44),
            ("tasks", list, 48),
            ("signal", word, 64),
            ("thread_node", list, 72),
        ],
    );
    structure(&mut b, "signal_struct", 32, &[("thread_head", list, 0)]);
    structure(
        &mut b,
        "kmem_cache",
        128,
        &[
            ("cpu_slab", word, 0),
            ("flags", half, 8),
            ("size", half, 16),
            ("object_size", half, 20),
            ("offset", half, 24),
            ("name", word, 32),
            ("list", list, 40),
            ("random", word, 56),
            ("node", word, 64),
        ],
    );
    structure(&mut b, "kmem_cache_cpu", 32, &[("freelist", word, 0), ("slab", word, 16)]);
    structure(
        &mut b,
        "slab",
        64,
        &[
            ("slab_cache", word, 24),
            ("callback_head", word, 32),
            ("freelist", word, 32),
            ("inuse", short, 40),
            ("objects", short, 42),
        ],
    );
    structure(&mut b, "callback_head", 16, &[("next", word, 0), ("func", word, 8)]);
    structure(
        &mut b,
        "page",
        PAGE_STRUCT as u32,
        &[
            ("flags", word, 0),
            ("compound_head", word, 8),
            ("lru", list, 8),
            ("mapping", word, 24),
            ("private", word, 40),
            ("page_type", half, 48),
            ("_refcount", half, 52),
        ],
    );
    structure(&mut b, "per_cpu_pages", 256, &[("lists", lists, 16)]);
    structure(
        &mut b,
        "vmap_area",
        64,
        &[
            ("va_start", word, 0),
            ("va_end", word, 8),
            ("rb_node", node, 16),
            ("list", list, 40),
            ("vm", word, 56),
        ],
    );
    structure(
        &mut b,
        "vm_struct",
        64,
        &[
            ("addr", word, 8),
            ("size", word, 16),
            ("flags", word, 24),
            ("pages", word, 32),
            ("nr_pages", half, 40),
            ("phys_addr", word, 48),
            ("caller", word, 56),
        ],
    );
    structure(
        &mut b,
        "mod_kallsyms",
        32,
        &[("symtab", word, 0), ("num_symtab", half, 8), ("strtab", word, 16), ("typetab", word, 24)],
    );
    structure(
        &mut b,
        "pcpu_chunk",
        64,
        &[
            ("list", list, 0),
            ("base_addr", word, 16),
            ("alloc_map", word, 24),
            ("start_offset", half, 32),
            ("end_offset", half, 36),
            ("nr_pages", half, 40),
            ("bound_map", word, 48),
        ],
    );
    counter_types(&mut b, &mut structure, [word, half, byte, list]);
    era_types(&mut b, era, &mut structure, [word, half, list, name]);
    b.bytes()
}

/// A node of one zone with three orders and two migrate types, and what is counted of it.
fn counter_types(
    b: &mut Builder,
    structure: &mut impl FnMut(&mut Builder, &str, u32, &[(&str, u32, u32)]) -> u32,
    [word, half, byte, list]: [u32; 4],
) {
    let [one, two, four] = [1, 2, 4].map(|n| b.array(word, n));
    let (byte1, byte2, lists) = (b.array(byte, 1), b.array(byte, 2), b.array(list, 2));
    let area = structure(b, "free_area", 40, &[("free_list", lists, 0), ("nr_free", word, 32)]);
    let areas = b.array(area, 3);
    structure(
        b,
        "zone",
        256,
        &[
            ("per_cpu_pageset", word, 0),
            ("name", word, 8),
            ("present_pages", word, 16),
            ("vm_stat", one, 24),
            ("vm_numa_event", one, 32),
            ("per_cpu_zonestats", word, 40),
            ("_watermark", four, 48),
            ("watermark_boost", word, 80),
            ("free_area", areas, 96),
        ],
    );
    structure(
        b,
        "pglist_data",
        512,
        &[
            ("node_zones", word, 0),
            ("node_id", half, 256),
            ("vm_stat", two, 264),
            ("per_cpu_nodestats", word, 280),
        ],
    );
    structure(b, "per_cpu_zonestat", 16, &[("vm_stat_diff", byte1, 0), ("vm_numa_event", one, 8)]);
    structure(b, "per_cpu_nodestat", 8, &[("vm_node_stat_diff", byte2, 1)]);
    structure(b, "vm_event_state", 16, &[("event", two, 0)]);
    structure(b, "percpu_counter", 32, &[("count", word, 8), ("counters", word, 16)]);
    structure(b, "super_block", 16, &[("s_inodes", list, 0)]);
    structure(b, "inode", 32, &[("i_sb_list", list, 0), ("i_mapping", word, 16)]);
    structure(
        b,
        "hstate",
        24,
        &[("order", half, 0), ("nr_huge_pages", word, 8), ("free_huge_pages", word, 16)],
    );
    structure(b, "address_space", 8, &[("nrpages", word, 0)]);
}

/// What the two generations describe differently.
fn era_types(
    b: &mut Builder,
    era: Era,
    structure: &mut impl FnMut(&mut Builder, &str, u32, &[(&str, u32, u32)]) -> u32,
    [word, half, list, name]: [u32; 4],
) {
    let flags = [("PG_reserved", 12), ("PG_lru", 4), ("PG_swapbacked", 19), ("PG_head", 16)];
    let common = [("__MAX_NR_ZONES", 1), ("MIGRATE_PCPTYPES", 3), ("WMARK_LOW", 1)];
    let mut values: Vec<(&str, u32)> = flags.into_iter().chain(common).collect();
    let module = [("list", list, 0), ("name", name, 16), ("kallsyms", word, 72)];
    let mut percpu = vec![("vm_event_states", EVENTS), ("current_task", 0), ("__preempt_count", 8)];
    let (words, lists) = (b.array(word, 2), b.array(list, 2));
    let (link, head, free, heads) = match era {
        Era::Flags => (("next", word, 8), "bkvhead", "bkvhead_free", words),
        Era::Types => (("list", list, 0), "bulk_head", "bulk_head_free", lists),
    };
    structure(b, "kvfree_rcu_bulk_data", 24, &[link]);
    let work = structure(b, "kfree_rcu_cpu_work", 64, &[(free, heads, 32)]);
    let works = b.array(work, 2);
    structure(b, "kfree_rcu_cpu", 192, &[(head, heads, 8), ("krw_arr", works, 40), ("bkvcache", word, 168)]);
    match era {
        Era::Flags => {
            values.push(("PG_slab", 9));
            let members =
                [("base", word, 0), ("size", half, 8), ("text_size", half, 12), ("ro_size", half, 16)];
            let layout = structure(b, "module_layout", 24, &members);
            let layouts = [("core_layout", layout, 80), ("init_layout", layout, 104)];
            structure(b, "module", 256, &[&module[..], &layouts].concat());
        }
        Era::Types => {
            values.extend([("PGTY_buddy", 0xf0), ("PGTY_table", 0xf2), ("PGTY_slab", 0xf5)]);
            let blocks = ["TEXT", "DATA", "RODATA", "RO_AFTER_INIT", "INIT_TEXT", "INIT_DATA", "INIT_RODATA"];
            let blocks: Vec<String> = blocks.iter().map(|t| format!("MOD_{t}")).collect();
            enumeration(b, &blocks.iter().zip(0..).map(|(t, n)| (t.as_str(), n)).collect::<Vec<_>>());
            let block = structure(b, "module_memory", 16, &[("base", word, 0), ("size", half, 8)]);
            let blocks = b.array(block, 7);
            structure(b, "module", 256, &[&module[..], &[("mem", blocks, 80)]].concat());
            let rb_list = structure(b, "rb_list", 24, &[("root", word, 0), ("head", list, 8)]);
            structure(b, "vmap_node", 32, &[("busy", rb_list, 0)]);
            structure(b, "pcpu_hot", 64, &[("current_task", word, 0), ("preempt_count", half, 8)]);
            percpu = vec![("vm_event_states", EVENTS), ("pcpu_hot", 0)];
        }
    }
    percpu.extend([("ne_fit_preload_node", SPARE), ("krc", KRC)]);
    enumeration(b, &values);
    let mut section = Vec::new();
    for (name, at) in percpu {
        let variable = b.add(14, false, name, word, 0, &[1]);
        section.extend([variable, at, 8]);
    }
    b.add(15, false, ".data..percpu", 64, section.len() as u32 / 3, &section);
}

fn enumeration(b: &mut Builder, values: &[(&str, u32)]) {
    let tail: Vec<u32> = values.iter().flat_map(|&(name, value)| [b.string(name), value]).collect();
    b.add(6, false, "", 4, values.len() as u32, &tail);
}
