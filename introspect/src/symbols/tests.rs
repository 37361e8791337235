//! Tests of the symbols room, on synthetic tables.

use super::encoder::{Offsets, encode};
use super::kallsyms::Layout;
use super::*;
use crate::image::synthetic::{self, BASE, BSS, BSS_SIZE, Block};
use proptest::prelude::*;

const LAYOUTS: [Layout; 3] = [Layout::A, Layout::A2, Layout::B];
/// Where the tables lie in the synthetic image.
const TABLES: u64 = 0x4000;

fn symbol(va: u64, kind: char, name: &str) -> Symbol {
    Symbol { va: Va(va), kind, name: name.to_owned() }
}

/// Per-CPU symbols, aliases, text, data, bss, in table order.
fn sample() -> Vec<Symbol> {
    vec![
        symbol(0, 'A', "__per_cpu_start"),
        symbol(0, 'A', "fixed_percpu_data"),
        symbol(0x1f300, 'A', "current_task"),
        symbol(BASE, 'T', "_stext"),
        symbol(BASE, 'T', "startup_64"),
        symbol(BASE + 0x70, 't', "m_start"),
        symbol(BASE + 0x90, 'T', "__pfx_kfree"),
        symbol(BASE + 0xa0, 'T', "kfree"),
        symbol(BASE + 0x1b0, 'T', "__kmalloc"),
        symbol(BASE + 0x300, 't', "m_start"),
        symbol(BASE + 0x1000, 'T', "_etext"),
        symbol(BASE + 0x2000, 'D', "init_task"),
        symbol(BSS, 'B', "__bss_start"),
        symbol(BSS + BSS_SIZE - 8, 'b', "late"),
        symbol(BSS + BSS_SIZE, 'B', "_end"),
        symbol(BSS + BSS_SIZE + 0x100_0000, 'd', "sme_workarea"),
    ]
}

/// `sample` and enough others to need several markers.
fn many() -> Vec<Symbol> {
    let mut symbols = sample();
    for n in 0..700u64 {
        symbols.push(symbol(BASE + 0x3000 + n * 24, 't', &format!("tcp_free_{n}.isra.0")));
    }
    // Longer than one length byte counts.
    symbols.push(symbol(BASE + 0x9_0000, 'T', &"long_rust_symbol".repeat(20)));
    symbols.sort_by_key(|s| s.va);
    symbols
}

fn image_with(tables: Vec<u8>) -> KernelImage {
    synthetic::image(&[Block { name: ".rodata", at: TABLES, bytes: tables }])
}

fn recovered(symbols: &[Symbol], layout: Layout, offsets: Offsets) -> SymbolTable {
    SymbolTable::recover(&image_with(encode(symbols, layout, offsets, BASE))).unwrap()
}

fn owned(table: &SymbolTable) -> Vec<Symbol> {
    table.iter().map(Symbol::from).collect()
}

#[test]
fn all_layouts_decode_to_the_same_symbols() {
    let percpu = many();
    let plain: Vec<Symbol> = percpu.iter().filter(|s| s.va.0 >= BASE).cloned().collect();
    for layout in LAYOUTS {
        for (symbols, offsets) in [(&percpu, Offsets::AbsolutePercpu), (&plain, Offsets::Plain)] {
            let table = recovered(symbols, layout, offsets);
            assert!(&owned(&table) == symbols, "{layout:?} {offsets:?}");
            let expected = format!("kallsyms, layout {}, {} symbols", layout.name(), symbols.len());
            assert_eq!(table.provenance(), expected);
        }
    }
}

#[test]
fn every_number_of_symbols_around_a_marker_is_found() {
    for layout in LAYOUTS {
        for count in (1..40).chain(250..262).chain(508..520) {
            let symbols: Vec<Symbol> =
                (0..count).map(|n| symbol(BASE + n * 16, 'T', &format!("f{n}"))).collect();
            assert_eq!(owned(&recovered(&symbols, layout, Offsets::Plain)), symbols, "{layout:?} {count}");
        }
    }
}

#[test]
fn a_token_table_of_something_else_does_not_mislead() {
    let symbols = many();
    let tables = encode(&symbols, Layout::A2, Offsets::AbsolutePercpu, BASE);
    // A whole table whose names are damaged, digits without tokens around them, then the real one.
    let mut decoy = tables.clone();
    let names = symbols.len().next_multiple_of(2) * 4 + 16;
    decoy[names + 40..names + 48].fill(0);
    decoy.extend_from_slice(b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0");
    decoy.resize(decoy.len().next_multiple_of(8) + 64, 0);
    decoy.extend_from_slice(&tables);
    assert!(owned(&SymbolTable::recover(&image_with(decoy)).unwrap()) == symbols);
}

#[test]
fn names_are_looked_up() {
    let table = recovered(&many(), Layout::B, Offsets::AbsolutePercpu);
    assert_eq!(table.lookup("kfree"), Some(Va(BASE + 0xa0)));
    assert_eq!(table.lookup("current_task"), Some(Va(0x1f300)));
    assert_eq!(table.lookup("m_start"), Some(Va(BASE + 0x70)), "the first of a name");
    let all: Vec<_> = table.lookup_all("m_start").map(|s| s.va.0 - BASE).collect();
    assert_eq!(all, [0x70, 0x300]);
    assert_eq!((table.lookup("kfre"), table.lookup("")), (None, None));
    assert_eq!(table.lookup_all("nothing").count(), 0);
}

#[test]
fn addresses_resolve_as_the_kernel_prints_them() {
    let table = recovered(&sample(), Layout::A2, Offsets::AbsolutePercpu);
    let name = |va: u64| table.resolve(Va(va)).map(|r| format!("{}+{:#x}/{:#x}", r.name, r.offset, r.size));
    let cases = [
        (BASE, Some("_stext+0x0/0x70")),
        (BASE + 0x6f, Some("_stext+0x6f/0x70")),
        (BASE + 0x70, Some("m_start+0x0/0x20")),
        (BASE + 0x98, Some("__pfx_kfree+0x8/0x10")),
        (BASE + 0xa5, Some("kfree+0x5/0x110")),
        (BASE + 0x2010, Some("init_task+0x10/0x8fe000")),
        (BSS + BSS_SIZE - 1, Some("late+0x7/0x8")),
        (BSS + BSS_SIZE, None),
        (BASE - 1, None),
        (0x1f300, None),
        (0, None),
        (u64::MAX, None),
    ];
    for (va, expected) in cases {
        assert_eq!(name(va).as_deref(), expected, "{va:#x}");
    }
    assert_eq!(table.size("kfree"), Some(0x110));
    assert_eq!(table.size("__per_cpu_start"), Some(0x1f300));
    assert_eq!(table.size("absent"), None);
}

#[test]
fn without_data_symbols_only_text_resolves() {
    let symbols: Vec<Symbol> = vec![
        symbol(BASE, 'T', "_stext"),
        symbol(BASE + 0x100, 'T', "kfree"),
        symbol(BASE + 0x1000, 'T', "_etext"),
        symbol(BASE + 0x4000, 'T', "_sinittext"),
        symbol(BASE + 0x4010, 't', "start_kernel"),
    ];
    let mut with_end = symbols.clone();
    with_end.push(symbol(BASE + 0x5000, 'T', "_einittext"));
    let table = recovered(&with_end, Layout::A, Offsets::Plain);
    let size = |va: u64| table.resolve(Va(va)).map(|r| r.size);
    assert_eq!(size(BASE + 0x110), Some(0xf00));
    assert_eq!(size(BASE + 0x2000), None);
    assert_eq!(size(BASE + 0x4020), Some(0xff0));
    assert_eq!(size(BASE + 0x5000), None);
    let table = recovered(&symbols, Layout::A, Offsets::Plain);
    assert_eq!(table.resolve(Va(BASE + 0x4020)), None);
}

/// A `__ksymtab` section at `at` and its names behind it.
fn ksymtab(name: &'static str, at: u64, exports: &[(u64, &str)]) -> Block {
    let mut entries = Vec::new();
    let mut names = Vec::new();
    for (n, (va, name)) in exports.iter().enumerate() {
        let entry = BASE + at + 12 * n as u64;
        let name_va = BASE + at + (12 * exports.len() + names.len()) as u64;
        let fields = [va.wrapping_sub(entry) as u32, name_va.wrapping_sub(entry + 4) as u32, 0];
        entries.extend(fields.into_iter().flat_map(u32::to_le_bytes));
        names.extend_from_slice(name.as_bytes());
        names.push(0);
    }
    entries.extend_from_slice(&names);
    Block { name, at, bytes: entries }
}

/// The blocks as two sections each would have it: the table without its names.
fn with_exports() -> KernelImage {
    let plain = [(BASE + 0xa0, "kfree"), (0x1f300, "current_task")];
    let gpl = [(BSS + 8, "init_mm")];
    let text = Block { name: ".text", at: 0, bytes: vec![0x90; 0x1000] };
    let blocks = [text, ksymtab("__ksymtab", 0x2000, &plain), ksymtab("__ksymtab_gpl", 0x3000, &gpl)];
    let mut image = synthetic::image(&blocks);
    for (name, count) in [("__ksymtab", plain.len()), ("__ksymtab_gpl", gpl.len())] {
        let section = image.sections.iter_mut().find(|s| s.name == name).unwrap();
        section.file.end = section.file.start + 12 * count;
    }
    image
}

#[test]
fn exports_are_read() {
    let image = with_exports();
    let found: Vec<_> = exports(&image).map(|e| (e.name, e.va.0, e.gpl)).collect();
    let expected =
        [("kfree", BASE + 0xa0, false), ("current_task", 0x1f300, false), ("init_mm", BSS + 8, true)];
    assert_eq!(found, expected);
}

#[test]
fn without_kallsyms_the_exports_are_the_table() {
    let table = SymbolTable::recover(&with_exports()).unwrap();
    assert_eq!(table.provenance(), "__ksymtab, 3 symbols");
    let expected = [
        symbol(0x1f300, 'D', "current_task"),
        symbol(BASE + 0xa0, 'T', "kfree"),
        symbol(BSS + 8, 'B', "init_mm"),
    ];
    assert_eq!(owned(&table), expected);
}

#[test]
fn no_symbols_at_all_is_an_error() {
    let Err(error) = SymbolTable::recover(&image_with(vec![0; 4096])) else { panic!("symbols from nothing") };
    assert!(error.to_string().starts_with("No symbols in the kernel image: no kallsyms table"), "{error}");
}

#[test]
fn a_hostile_image_ends_soon() {
    // Words that could each start markers, before a token table that is in order.
    let tables = encode(&many(), Layout::A, Offsets::AbsolutePercpu, BASE);
    let token_table = tables.windows(20).position(|w| w.starts_with(b"0\x001\x002\x003\0")).unwrap() & !0xff;
    let mut hostile = Vec::new();
    for n in 0..200_000u64 {
        hostile.extend((n % 3 * 600).to_le_bytes());
    }
    hostile.extend_from_slice(&tables[token_table..]);
    for _ in 0..3 {
        hostile.extend_from_within(..);
    }
    assert!(SymbolTable::recover(&image_with(hostile)).is_err());
}

/// Names over the characters that the encoder knows, addresses as a kernel has them.
fn symbols(least_va: u64) -> impl Strategy<Value = Vec<Symbol>> {
    let percpu = (0u64..0x3_0000).prop_filter("below the base", move |&va| va >= least_va);
    let va = prop_oneof![1 => percpu.boxed(), 8 => (0u64..0x20_0000).prop_map(|o| BASE + o).boxed()];
    let one = (va, "[TtDdBbA]", "[a-z_.0-9]{1,40}").prop_map(|(va, kind, name)| Symbol {
        va: Va(va),
        kind: kind.chars().next().unwrap(),
        name,
    });
    prop::collection::vec(one, 1..900).prop_map(|mut symbols| {
        // The base must be the lowest kernel address, and lie in the image.
        symbols.push(symbol(BASE, 'T', "_text"));
        symbols.sort_by_key(|s| s.va);
        symbols
    })
}

/// What resolve must say, by looking at every symbol.
fn resolve_naively(symbols: &[Symbol], va: u64, end: u64) -> Option<(&str, u64, u64)> {
    if !(BASE..end).contains(&va) {
        return None;
    }
    let start = symbols.iter().filter(|s| s.va.0 <= va).map(|s| s.va.0).max()?;
    let first = symbols.iter().find(|s| s.va.0 == start)?;
    let next = symbols.iter().map(|s| s.va.0).filter(|&a| a > start).min().unwrap_or(end);
    Some((&first.name, va - start, next - start))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_symbols_survive_any_layout(symbols in symbols(0), which in 0usize..3) {
        let table = recovered(&symbols, LAYOUTS[which], Offsets::AbsolutePercpu);
        prop_assert!(owned(&table) == symbols);
    }

    #[test]
    fn lookups_agree_with_a_search_of_all(mut symbols in symbols(0), at in prop::collection::vec(0u64..0x21_0000, 50)) {
        symbols.push(symbol(BASE + 0x20_0000, 'D', "the_last"));
        let table = recovered(&symbols, Layout::B, Offsets::AbsolutePercpu);
        let end = BSS + BSS_SIZE;
        for va in at.iter().map(|o| BASE + o).chain([end - 1, end, BASE - 1]) {
            let fast = table.resolve(Va(va)).map(|r| (r.name, r.offset, r.size));
            prop_assert_eq!(fast, resolve_naively(&symbols, va, end));
        }
        for s in &symbols {
            let first = symbols.iter().find(|t| t.name == s.name).unwrap();
            prop_assert_eq!(table.lookup(&s.name), Some(first.va));
        }
    }

    #[test]
    fn damaged_tables_do_not_panic(
        which in 0usize..3,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u32>(), 1usize..=4), 1..12),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut tables = encode(&many(), LAYOUTS[which], Offsets::AbsolutePercpu, BASE);
        for (at, word, len) in &edits {
            let at = at.index(tables.len() - 4);
            tables[at..at + len].copy_from_slice(&word.to_le_bytes()[..*len]);
        }
        for tables in [tables[..cut.index(tables.len())].to_vec(), tables] {
            if let Ok(table) = SymbolTable::recover(&image_with(tables)) {
                for symbol in table.iter() {
                    let _ = (table.resolve(symbol.va), table.lookup(symbol.name));
                }
            }
        }
    }

    #[test]
    fn damaged_exports_do_not_panic(
        edits in prop::collection::vec((0x1000usize..0x5000, any::<u32>()), 1..20),
    ) {
        let mut image = with_exports();
        for (at, word) in edits {
            image.elf[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        for export in exports(&image) {
            prop_assert!(!export.name.is_empty());
        }
        let _ = SymbolTable::recover(&image);
    }
}
