//! arm64: kernels are often built without data symbols in kallsyms (CONFIG_KALLSYMS_ALL). Data is found otherwise:
//!
//! - the exported symbols are in `__ksymtab`;
//! - the per-CPU section starts where an exported per-CPU variable's address and its offset in BTF say;
//! - sections follow each other in an order that never changed (arch/arm64/kernel/vmlinux.lds.S);
//! - the rest is what known functions load, or pass to others ([`RECIPES`]), read from their code.

use super::{Derived, SymbolTable, exports};
use crate::arch::instruction::{BYTES, Instruction, Register};
use crate::image::KernelImage;
use crate::memory::Va;
use crate::types::Btf;

/// Sections start at multiples of this (`SEGMENT_ALIGN`).
const SEGMENT_ALIGN: u64 = 0x1_0000;
/// Longest function looked at, bytes.
const MAX_FUNCTION: u64 = 4096;
/// Argument registers, which a call does not keep: x0 to x18 (AAPCS64, 6.1.1).
const SCRATCH: usize = 19;

/// How the address of a variable shows in a function's code.
enum Shows {
    /// In this register at the first call of this function that has an address of the image in it.
    Passed(u8, &'static str),
    /// It is the nth that is loaded from, of loads of this many bytes from addresses of the image.
    Loaded(usize, u8),
    /// It is the first list head whose address is made.
    Made,
}

/// Variable, function that refers to it, and how. Sources: mm/slab_common.c, kernel/module/procfs.c, mm/vmalloc.c,
/// mm/percpu.c, arch/arm64/kernel/head.S.
const RECIPES: [(&str, &str, Shows); 10] = [
    ("swapper_pg_dir", "secondary_startup", Shows::Passed(1, "__enable_mmu")),
    ("slab_caches", "slab_start", Shows::Passed(0, "seq_list_start")),
    ("modules", "m_start", Shows::Passed(0, "seq_list_start")),
    ("vmap_area_list", "s_start", Shows::Passed(0, "seq_list_start")),
    // `vmap_area_root.rb_node`, behind the lock.
    ("vmap_area_root", "find_vmap_area", Shows::Loaded(0, 8)),
    // `link_va_augment(..., &free_vmap_area_list)`
    ("free_vmap_area_list", "insert_vmap_area_augment.constprop.0", Shows::Made),
    // `list_replace_init(&purge_vmap_area_list, ...)`
    ("purge_vmap_area_list", "__purge_vmap_area_lazy", Shows::Loaded(0, 8)),
    // `chunk != pcpu_reserved_chunk`, then `&pcpu_chunk_lists[slot]`.
    ("pcpu_reserved_chunk", "pcpu_chunk_relocate", Shows::Loaded(0, 8)),
    // `&pcpu_chunk_lists[pcpu_free_slot]`.
    ("pcpu_free_slot", "pcpu_balance_free", Shows::Loaded(0, 4)),
    ("pcpu_unit_offsets", "per_cpu_ptr_to_phys", Shows::Loaded(0, 8)),
];
/// Those that are `LIST_HEAD`s: in the image they point to themselves.
const LISTS: [&str; 5] =
    ["slab_caches", "modules", "vmap_area_list", "free_vmap_area_list", "purge_vmap_area_list"];
/// The lists are what two functions agree on.
const CHUNK_LISTS: [(&str, Shows); 2] =
    [("pcpu_chunk_relocate", Shows::Loaded(1, 8)), ("pcpu_balance_free", Shows::Loaded(0, 8))];

/// Adds what kallsyms lacks.
pub(crate) fn complete(symbols: &mut SymbolTable, image: &KernelImage, types: Option<&Btf>) {
    let from_exports: Vec<(Va, String)> = exports(image)
        .filter(|export| symbols.lookup(export.name).is_none())
        .map(|export| (export.va, export.name.to_owned()))
        .collect();
    let count = from_exports.len();
    symbols.insert(from_exports);
    if count > 0 {
        symbols.provenance.push_str(&format!(", {count} more of __ksymtab"));
    }
    let mut derived = Vec::new();
    // include/linux/jiffies.h: two names of one variable.
    derived.extend(symbols.lookup("jiffies").map(|va| found("jiffies_64", va, "jiffies of __ksymtab")));
    derived.extend(percpu_section(symbols, types));
    derived.extend(sections(symbols, image));
    let code = Code { symbols, image };
    for (name, function, shows) in &RECIPES {
        let is_one = |va: &Va| !LISTS.contains(name) || is_list_head(image, *va);
        derived.extend(
            code.find(function, shows)
                .filter(is_one)
                .map(|va| found(name, va, &format!("code of {function}"))),
        );
    }
    let [first, second] = CHUNK_LISTS.map(|(function, shows)| code.find(function, &shows));
    let both = first.filter(|_| first == second);
    derived.extend(
        both.map(|va| found("pcpu_chunk_lists", va, "code of pcpu_chunk_relocate, pcpu_balance_free")),
    );
    derived.retain(|symbol| symbols.lookup(&symbol.name).is_none());
    symbols.insert(derived.iter().map(|symbol| (symbol.va, symbol.name.clone())).collect());
    symbols.derived = derived;
}

/// Size of a kernel stack, from code that sets the stack pointer to the end of one: `init_cpu_task` in
/// arch/arm64/kernel/head.S, `call_on_irq_stack` in its entry.S.
pub(crate) fn stack_size(symbols: &SymbolTable, image: &KernelImage) -> Option<u64> {
    let code = Code { symbols, image };
    ["__secondary_switched", "__primary_switched", "call_on_irq_stack"].iter().find_map(|function| {
        let (_, words) = code.words(symbols.lookup(function)?)?;
        words.iter().find_map(|&word| match Instruction::decode(word) {
            Instruction::AddConstant { to: Register::Sp, from: Register::X(_), value, .. }
                if value >= 0x2000 && (value as u64).is_power_of_two() =>
            {
                Some(value as u64)
            }
            _ => None,
        })
    })
}

fn found(name: &str, va: Va, how: &str) -> Derived {
    Derived { name: name.to_owned(), va, how: how.to_owned() }
}

fn is_list_head(image: &KernelImage, va: Va) -> bool {
    image.bytes_at(va, 8) == Some(&va.0.to_le_bytes())
}

/// `__per_cpu_start` and `__per_cpu_end`.
fn percpu_section(symbols: &SymbolTable, types: Option<&Btf>) -> Vec<Derived> {
    let Some((types, size)) = types.and_then(|types| Some((types, types.percpu_bytes()?))) else {
        return Vec::new();
    };
    let starts = types.percpu_variables().filter_map(|(name, offset)| Some(symbols.lookup(name)? - offset));
    let mut starts: Vec<Va> = starts.collect();
    starts.sort_unstable();
    // One name may be two variables': most agree.
    let Some(&start) = starts.get(starts.len() / 2) else { return Vec::new() };
    let how = "per-CPU variables of __ksymtab and BTF";
    vec![found("__per_cpu_start", start, how), found("__per_cpu_end", start + size, how)]
}

/// Bounds of sections. Text, read-only data (with what becomes read-only after initialisation), code and data for
/// initialisation, per-CPU variables, relocations, data, and from the end of the file on what is zero.
fn sections(symbols: &SymbolTable, image: &KernelImage) -> Vec<Derived> {
    let (Some(segment), Some(relocations)) = (image.segments.first(), &image.relocations) else {
        return Vec::new();
    };
    let aligned = |va: Va| Va(va.0.next_multiple_of(SEGMENT_ALIGN));
    let how = "order of sections";
    let file_end = segment.va + segment.file.len() as u64;
    let end = segment.va + segment.mem_size;
    let mut found_ones = vec![
        found("_sdata", aligned(segment.va + relocations.end() as u64), how),
        found("_edata", file_end, how),
        found("__bss_start", file_end, how),
        found("__bss_stop", end, how),
        found("_end", end, how),
    ];
    if let (Some(text_end), Some(init)) = (symbols.lookup("_etext"), symbols.lookup("_sinittext")) {
        for (name, va) in [
            ("__start_rodata", aligned(text_end)),
            ("__start_ro_after_init", aligned(text_end)),
            ("__end_ro_after_init", init),
            ("__end_rodata", init),
        ] {
            found_ones.push(found(name, va, how));
        }
    }
    found_ones
}

/// Functions of the image, looked through with the constants that their registers hold.
struct Code<'a> {
    symbols: &'a SymbolTable,
    image: &'a KernelImage,
}

impl Code<'_> {
    fn find(&self, function: &str, shows: &Shows) -> Option<Va> {
        // Static functions of different files share names: the first that shows something.
        self.symbols.lookup_all(function).find_map(|symbol| self.find_in(symbol.va, shows))
    }

    fn words(&self, start: Va) -> Option<(Va, Vec<u32>)> {
        let size = self.symbols.size_at(start.0).min(MAX_FUNCTION);
        let bytes = self.image.bytes_at(start, size as usize)?;
        Some((start, bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect()))
    }

    fn find_in(&self, start: Va, shows: &Shows) -> Option<Va> {
        let (start, words) = self.words(start)?;
        let mut known = [None; 31];
        let mut seen: Vec<u64> = Vec::new();
        for (n, &word) in words.iter().enumerate() {
            let at = start + n as u64 * BYTES;
            let instruction = Instruction::decode(word);
            if let Instruction::Branch { call: true, .. } = instruction {
                let target = instruction.target(at)?;
                if let Shows::Passed(register, callee) = shows
                    && self.symbols.lookup_all(callee).any(|symbol| symbol.va == target)
                    && let Some(address) = known[usize::from(*register)].filter(|&a| self.is_data(a))
                {
                    return Some(Va(address));
                }
                known[..SCRATCH].fill(None);
                continue;
            }
            if let (Shows::Loaded(index, wanted), Instruction::Load { bytes, place, .. }) =
                (shows, instruction)
                && bytes == *wanted
                && let Some(base) = value(&known, place.base)
            {
                let address = base.wrapping_add(place.offset as u64);
                if self.is_data(address) && !seen.contains(&address) {
                    seen.push(address);
                }
                if let Some(&address) = seen.get(*index) {
                    return Some(Va(address));
                }
            }
            step(&mut known, at, word, instruction);
            if let (Shows::Made, Instruction::AddConstant { to, .. }) = (shows, instruction)
                && let Some(address) = value(&known, to).filter(|&a| is_list_head(self.image, Va(a)))
            {
                return Some(Va(address));
            }
        }
        None
    }

    fn is_data(&self, address: u64) -> bool {
        let text_end = self.symbols.lookup("_etext").map_or(0, |va| va.0);
        self.image.segments.iter().any(|s| address >= s.va.0.max(text_end) && address - s.va.0 < s.mem_size)
            && address.is_multiple_of(4)
    }
}

fn value(known: &[Option<u64>; 31], register: Register) -> Option<u64> {
    match register {
        Register::X(n) => known[usize::from(n)],
        Register::Zero => Some(0),
        Register::Sp => None,
    }
}

/// What registers hold behind an instruction. Branches are not followed: compilers set an address up where it is used, or
/// once for the whole function.
fn step(known: &mut [Option<u64>; 31], at: Va, word: u32, instruction: Instruction) {
    let (to, result) = match instruction {
        Instruction::Adr { to, offset } => (to, Some((at + offset as u64).0)),
        Instruction::Adrp { to, offset } => (to, Some((Va(at.0 & !0xfff) + offset as u64).0)),
        Instruction::AddConstant { wide: true, to, from, value: constant } => {
            (to, value(known, from).map(|base| base.wrapping_add(constant as u64)))
        }
        Instruction::Move { wide: true, to, from } => (to, value(known, from)),
        Instruction::Load { to, .. } | Instruction::ReadTask { to } => (to, None),
        Instruction::LoadPair { to, .. } => {
            to.iter().for_each(|&register| forget(known, register));
            return;
        }
        Instruction::Store { .. }
        | Instruction::StorePair { .. }
        | Instruction::Branch { .. }
        | Instruction::Conditional { .. }
        | Instruction::CompareZero { .. }
        | Instruction::TestBit { .. }
        | Instruction::Nop
        | Instruction::Sign
        | Instruction::Authenticate
        | Instruction::LandingPad => return,
        // Nearly every other instruction names its result in the lowest five bits.
        _ => (if word & 31 == 31 { Register::Zero } else { Register::X((word & 31) as u8) }, None),
    };
    match to {
        Register::X(n) => known[usize::from(n)] = result,
        Register::Sp | Register::Zero => {}
    }
}

fn forget(known: &mut [Option<u64>; 31], register: Register) {
    if let Register::X(n) = register {
        known[usize::from(n)] = None;
    }
}

#[cfg(test)]
#[path = "aarch64_tests.rs"]
mod tests;
