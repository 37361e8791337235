//! On a synthetic Image whose kallsyms has text only.

use super::*;
use crate::image::synthetic::{self, Block};
use crate::symbols::{Symbol, encoder};

const BASE: u64 = 0xffff_8000_0800_0000;
const CALLEE: u64 = 0x2000;
const FUNCTION: u64 = 0x2100;
const TEXT_END: u64 = 0x3000;
/// A list head that points to itself; it is one of the fields that have relocations.
const HEAD: u64 = 0x8000;

/// An Image with `words` as the code of `function`.
fn recovered(function: &str, callee: &str, words: &[u32]) -> (KernelImage, SymbolTable) {
    let symbols = [
        ("_stext", 0x1000),
        (callee, CALLEE),
        (function, FUNCTION),
        ("behind", FUNCTION + 4 * words.len() as u64),
        ("_etext", TEXT_END),
        ("_sinittext", 0x7000),
    ];
    let symbols = symbols.map(|(name, at)| Symbol { va: Va(BASE + at), kind: 'T', name: name.to_owned() });
    let blocks = [
        Block { name: ".text", at: FUNCTION, bytes: words.iter().flat_map(|w| w.to_le_bytes()).collect() },
        Block { name: ".rodata", at: 0x4000, bytes: encoder::tables(&symbols, BASE) },
    ];
    let mut file = synthetic::arm64_image(&blocks, BASE);
    // The first relocation is the head's.
    file[0x9010..0x9018].copy_from_slice(&(BASE + HEAD).to_le_bytes());
    let image = KernelImage::parse(&file).unwrap();
    let mut symbols = SymbolTable::recover(&image).unwrap();
    complete(&mut symbols, &image, None);
    (image, symbols)
}

/// `adrp register, page` at `FUNCTION + 4 * n`.
fn adrp(register: u32, page: u64, n: u64) -> u32 {
    let pages = ((page >> 12) as i64 - ((FUNCTION + 4 * n) >> 12) as i64) as u32;
    0x9000_0000 | (pages & 3) << 29 | (pages >> 2 & 0x7_ffff) << 5 | register
}

fn call(n: u64) -> u32 {
    let distance = (CALLEE as i64 - (FUNCTION + 4 * n) as i64) / 4;
    0x9400_0000 | (distance as u32 & 0x3ff_ffff)
}

/// `add x0, x19, #offset`
fn add_x0_x19(offset: u32) -> u32 {
    0x9100_0260 | offset << 10
}

#[test]
fn a_list_is_what_its_reader_passes_on() {
    // mov x20, x1; adrp x19; ldr x1, [x20]; add x0, x19, #0; bl; ret
    let words = [0xaa01_03f4, adrp(19, HEAD, 1), 0xf940_0281, add_x0_x19(0), call(4), 0xd65f_03c0];
    let (_, symbols) = recovered("slab_start", "seq_list_start", &words);
    assert_eq!(symbols.lookup("slab_caches"), Some(Va(BASE + HEAD)));
    let derived = symbols.derived().iter().find(|symbol| symbol.name == "slab_caches").unwrap();
    assert_eq!(derived.how, "code of slab_start");
    // Names are asked for by address in text only, as the kernel has it.
    assert_eq!(symbols.resolve(Va(BASE + HEAD)), None);
    assert_eq!(symbols.resolve(Va(BASE + FUNCTION + 4)).map(|s| (s.name, s.offset)), Some(("slab_start", 4)));
}

#[test]
fn what_is_no_list_head_is_not_taken_for_one() {
    let words = [0xaa01_03f4, adrp(19, HEAD, 1), 0xf940_0281, add_x0_x19(0x10), call(4), 0xd65f_03c0];
    assert_eq!(recovered("slab_start", "seq_list_start", &words).1.lookup("slab_caches"), None);
}

#[test]
fn a_root_is_what_is_read_behind_its_lock() {
    // adrp x20; add x21, x20, #0x70; casa w4, w2, [x21]; ldr x0, [x21, #8]; ldur x1, [x0, #-16]; ret
    let words = [adrp(20, 0xb000, 0), 0x9101_c295, 0x88e4_7ea2, 0xf940_06a0, 0xf85f_0001, 0xd65f_03c0];
    let (_, symbols) = recovered("find_vmap_area", "g", &words);
    assert_eq!(symbols.lookup("vmap_area_root"), Some(Va(BASE + 0xb078)));
}

#[test]
fn a_list_is_the_first_head_whose_address_is_made() {
    // adrp x21; add x21, x21, #0x10, which is no list; adrp x21; add x21, x21, #0; ret
    let words = [adrp(21, HEAD, 0), 0x9100_42b5, adrp(21, HEAD, 2), 0x9100_02b5, 0xd65f_03c0];
    let (_, symbols) = recovered("insert_vmap_area_augment.constprop.0", "g", &words);
    assert_eq!(symbols.lookup("free_vmap_area_list"), Some(Va(BASE + HEAD)));
    let (_, symbols) = recovered("insert_vmap_area_augment.constprop.0", "g", &words[..2]);
    assert_eq!(symbols.lookup("free_vmap_area_list"), None);
}

#[test]
fn a_register_lost_in_a_call_is_not_known() {
    // adrp x0; bl; bl: the second call's x0 is a result.
    let words = [0xaa01_03f4, adrp(1, HEAD, 1), 0x9400_0040, call(3), 0xd65f_03c0];
    assert_eq!(recovered("secondary_startup", "__enable_mmu", &words).1.lookup("swapper_pg_dir"), None);
    let words = [0xaa01_03f4, adrp(1, HEAD, 1), call(2), 0xd65f_03c0];
    let (_, symbols) = recovered("secondary_startup", "__enable_mmu", &words);
    assert_eq!(symbols.lookup("swapper_pg_dir"), Some(Va(BASE + HEAD)));
}

#[test]
fn sections_are_where_their_order_says() {
    let (image, symbols) = recovered("f", "g", &[0xd65f_03c0]);
    let end = image.segments[0].mem_size;
    for (name, at) in [("_edata", 0x1_0000), ("__bss_stop", end), ("__start_rodata", 0x1_0000)] {
        assert_eq!(symbols.lookup(name), Some(Va(BASE + at)), "{name}");
    }
}

#[test]
fn the_size_of_stacks_is_in_the_code_that_starts_a_cpu() {
    // ldr x1, [x2, #32]; add sp, x1, #4, lsl #12; sub sp, sp, #0x150
    let words = [0xf940_1041, 0x9140_103f, 0xd105_43ff];
    let (image, symbols) = recovered("__secondary_switched", "g", &words);
    assert_eq!(stack_size(&symbols, &image), Some(0x4000));
}
