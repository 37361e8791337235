use super::*;
use crate::memory::FlatMemory;

const KERNEL_48: Va = Va(0xffff_0000_0000_0000);

/// RAM with these words in it.
fn ram(bytes: usize, words: &[(u64, u64)]) -> FlatMemory {
    let mut ram = vec![0; bytes];
    for &(pa, word) in words {
        ram[pa as usize..][..8].copy_from_slice(&word.to_le_bytes());
    }
    FlatMemory::new(ram)
}

/// 48 bits, 4 KiB: a page at the first address of the kernel's half, 2 MiB behind its table, 1 GiB behind that.
fn four_levels() -> (FlatMemory, AddressSpace) {
    let memory = ram(
        0x8000,
        &[
            (0x2000, 0x3000 | 3),
            (0x3000, 0x4000 | 3),
            (0x3008, 0x4000_0000 | 1),
            (0x4000, 0x5000 | 3),
            (0x4008, 0x20_0000 | 1 | SPECIAL),
            (0x5000, (1 << 54) | 0x7000 | 0x703),
            // The last level has no blocks.
            (0x5008, 0x9000 | 1),
        ],
    );
    (memory, AddressSpace { root: Pa(0x2000), translation: Translation::default() })
}

#[test]
fn tcr_says_how_addresses_are_translated() {
    let tcr = |t1sz: u64, tg1: u64, ds: u64| t1sz << 16 | tg1 << 30 | ds << 59 | 25;
    let table = [
        (tcr(16, 2, 0), Some((48, 12, false))),
        (tcr(25, 2, 0), Some((39, 12, false))),
        (tcr(12, 2, 1), Some((52, 12, true))),
        (tcr(17, 1, 0), Some((47, 14, false))),
        (tcr(12, 3, 0), Some((52, 16, false))),
        (tcr(22, 3, 1), Some((42, 16, false))),
        (tcr(16, 0, 0), None),
        (0, None),
    ];
    for (tcr, expected) in table {
        let found = Translation::from_tcr(tcr).map(|t| (t.va_bits, t.page_shift, t.lpa2));
        assert_eq!(found, expected, "{tcr:#x}");
    }
}

#[test]
fn pages_and_blocks_are_found() {
    let (memory, space) = four_levels();
    let leaf = |va: Va| space.leaf(&memory, va).map(|leaf| (leaf.va, leaf.pa, leaf.size, leaf.special));
    assert_eq!(leaf(KERNEL_48 + 0x123), Ok((KERNEL_48, Pa(0x7000), 0x1000, false)));
    let block = KERNEL_48 + 0x20_0000;
    assert_eq!(leaf(block + 0x1234), Ok((block, Pa(0x20_0000), 0x20_0000, true)));
    let large = KERNEL_48 + 0x4000_0000;
    assert_eq!(leaf(large + 0x1234), Ok((large, Pa(0x4000_0000), 0x4000_0000, false)));
    for va in [KERNEL_48 + 0x1000, KERNEL_48 + 0x8000_0000, Va(0x0010_0000_0000_0000)] {
        assert_eq!(space.leaf(&memory, va), Err(MemoryError::NotMapped { va }));
    }
    assert_eq!(space.translate(&memory, block + 0x10_0008), Ok(Pa(0x30_0008)));
}

#[test]
fn ranges_skip_holes() {
    let (memory, space) = four_levels();
    let mut sizes = Vec::new();
    let visit = |leaf: Leaf| {
        sizes.push(leaf.size);
        ControlFlow::Continue(())
    };
    space.leaves(&memory, KERNEL_48, 1 << 47, visit).unwrap();
    assert_eq!(sizes, [0x1000, 0x20_0000, 0x4000_0000]);
}

#[test]
fn tables_are_visited() {
    let (memory, space) = four_levels();
    let mut tables = Vec::new();
    space.tables(&memory, |table| {
        tables.push(table.0);
        true
    });
    assert_eq!(tables, [0x2000, 0x3000, 0x4000, 0x5000]);
}

/// Each granule and size of addresses: one page at the very top of the kernel's half, whose table indexes are all ones.
#[test]
fn every_granule_and_size_finds_its_last_page() {
    for (page_shift, va_bits, levels) in [
        (12, 39, 3),
        (12, 48, 4),
        (12, 52, 5),
        (14, 36, 2),
        (14, 47, 3),
        (14, 48, 4),
        (14, 52, 4),
        (16, 42, 2),
        (16, 48, 3),
        (16, 52, 3),
    ] {
        let translation = Translation { va_bits, page_shift, lpa2: va_bits == 52 && page_shift < 16 };
        let page = 1_u64 << page_shift;
        let level_bits = u32::from(page_shift) - 3;
        let mut words = Vec::new();
        for level in 0..levels {
            let first_bits = u32::from(va_bits) - u32::from(page_shift) - (levels - 1) * level_bits;
            let entries = if level == 0 { 1 << first_bits } else { 1 << level_bits };
            words.push((page * u64::from(level) + 8 * (entries - 1), (page * u64::from(level + 1)) | 3));
        }
        let memory = ram((page * u64::from(levels + 1)) as usize, &words);
        let space = AddressSpace { root: Pa(0), translation };
        let va = Va(u64::MAX - 7);
        let expected = Pa(page * u64::from(levels) + page - 8);
        assert_eq!(space.translate(&memory, va), Ok(expected), "{translation:?}");
        assert!(space.translate(&memory, va - page).is_err(), "{translation:?}");
    }
}

#[test]
fn upper_bits_of_physical_addresses_are_where_the_granule_has_them() {
    let output = |page_shift, lpa2, descriptor| {
        Translation { va_bits: 52, page_shift, lpa2 }.output(descriptor, u32::from(page_shift)).0
    };
    assert_eq!(output(12, false, 0x0068_1234_5678_9f03), 0x1234_5678_9000);
    assert_eq!(output(12, true, 0x0061_1234_5678_9303), 0x000d_1234_5678_9000);
    assert_eq!(output(16, false, 0x0068_1234_5678_a003), 0x000a_1234_5678_0000);
}

#[test]
fn damaged_tables_end() {
    // A table that leads to itself.
    let words: Vec<(u64, u64)> = (0..512).map(|n| (8 * n, 3)).collect();
    let memory = ram(0x1000, &words);
    let space = AddressSpace { root: Pa(0), translation: Translation::default() };
    let mut left = 100_000;
    let result = space.leaves_within(&memory, KERNEL_48, 1 << 48, &mut left, |_| ControlFlow::Continue(()));
    assert!(matches!(result, Err(MemoryError::Corrupt { .. })));
    let outside = ram(0x1000, &[(0, 0x10_0000 | 3)]);
    assert_eq!(space.leaf(&outside, KERNEL_48), Err(MemoryError::Unbacked { pa: Pa(0x10_0000) }));
}
