//! Tests of the image room, on synthetic images.

use crate::image::synthetic::{self, BANNER, BASE, BSS, BSS_SIZE, Block, LOAD, PERCPU, PERCPU_LOAD};
use crate::image::{Format, KernelImage, Relocations, elf, find_all, unpack};
use crate::memory::{Pa, Va};
use proptest::prelude::*;
use std::path::Path;

const COMPRESSIONS: [&str; 7] = ["gzip", "xz", "zstd", "lz4", "bzip2", "lzo", "lzma"];

fn blocks() -> Vec<Block> {
    let noise = |len: usize| (0..len as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    vec![
        Block { name: ".text", at: 0, bytes: noise(70_000) },
        Block { name: ".rodata", at: 0x2_0000, bytes: b"read only ".repeat(3000) },
    ]
}

fn bzimage(compression: &str) -> Vec<u8> {
    let mut payload = synthetic::vmlinux(&blocks());
    payload.extend(synthetic::relocation_words(
        &[0x8100_0010],
        Some(&[0x8100_0020]),
        &[0x8100_0030, 0x8100_0034],
    ));
    synthetic::bzimage(&synthetic::pack(compression, &payload), 39)
}

fn error(bytes: &[u8]) -> String {
    match KernelImage::parse(bytes) {
        Ok(image) => panic!("parsed as {:?}", image.format),
        Err(error) => format!("{error:#}"),
    }
}

#[test]
fn every_compression_unpacks_to_the_same_kernel() {
    let plain = KernelImage::parse(&synthetic::vmlinux(&blocks())).unwrap();
    assert_eq!(plain.format, Format::Elf);
    assert_eq!((plain.setup().len(), &plain.relocations), (0, &None));
    for name in COMPRESSIONS {
        let file = bzimage(name);
        let image = KernelImage::parse(&file).unwrap_or_else(|e| panic!("{name}: {e:#}"));
        assert_eq!(image.format, Format::BzImage(name));
        assert_eq!(image.elf, plain.elf, "{name}");
        assert_eq!(image.setup(), &file[..4096]);
        let relocations = image.relocations.expect("relocations");
        assert_eq!(relocations.abs64, [Va(BASE + 0x10)]);
        assert_eq!(relocations.inverse32, [Va(BASE + 0x20)]);
        assert_eq!(relocations.abs32, [Va(BASE + 0x34), Va(BASE + 0x30)]);
    }
}

#[test]
fn an_elf_gives_segments_sections_and_banner() {
    let image = synthetic::image(&blocks());
    assert_eq!(image.banner, BANNER);
    assert_eq!(image.release(), "6.1.0-test-amd64");
    assert_eq!(image.entry, Pa(LOAD));
    let places: Vec<_> =
        image.segments.iter().map(|s| (s.va, s.pa, s.file.len() as u64, s.mem_size)).collect();
    assert_eq!(places[1], (Va(0), Pa(PERCPU_LOAD), PERCPU.len() as u64, PERCPU.len() as u64));
    assert_eq!(places[2], (Va(BSS), Pa(BSS - BASE + LOAD), 0, BSS_SIZE));
    let names: Vec<_> = image.sections.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, [".text", ".rodata", ".data..percpu", ".bss", ".shstrtab"]);
    assert!(image.section_bytes(".rodata").unwrap().starts_with(b"read only"));
    assert_eq!((image.section(".bss").unwrap().size, image.section_bytes(".bss")), (BSS_SIZE, None));
}

#[test]
fn addresses_and_file_offsets_translate_both_ways() {
    let image = synthetic::image(&blocks());
    let rodata = Va(BASE + 0x2_0000);
    assert_eq!(image.bytes_at(rodata, 9), Some(&b"read only"[..]));
    assert_eq!(image.bytes_at(Va(8), 8), Some(&PERCPU[8..16]));
    assert_eq!(image.bytes_at(Va(PERCPU.len() as u64 - 4), 8), None);
    assert_eq!(image.bytes_at(Va(BSS), 1), None);
    assert_eq!(image.bytes_at(Va(BASE - 1), 1), None);
    assert_eq!(image.bytes_at(Va(u64::MAX), 1), None);
    assert_eq!(image.va_of(image.section(".rodata").unwrap().file.start), Some(rodata));
    assert_eq!(image.va_of(0), None);
}

#[test]
fn setup_sects_0_means_4() {
    let payload = synthetic::pack("gzip", &synthetic::vmlinux(&blocks()));
    for sectors in [0, 1, 4, 64] {
        KernelImage::parse(&synthetic::bzimage(&payload, sectors))
            .unwrap_or_else(|e| panic!("{sectors}: {e:#}"));
    }
}

#[test]
fn lz4_payloads_of_several_blocks_and_frames_unpack() {
    let mut blocks = blocks();
    blocks.push(Block { name: ".data", at: 0x3_0000, bytes: vec![7; 9 << 20] });
    let elf = synthetic::vmlinux(&blocks);
    let mut packed = synthetic::pack("lz4", &elf);
    let image = KernelImage::parse(&synthetic::bzimage(&packed, 1)).unwrap();
    assert_eq!(image.elf, elf);
    // The magic may come again between two blocks.
    let first = 4 + 4 + u32::from_le_bytes(packed[4..8].try_into().unwrap()) as usize;
    packed.splice(first..first, [0x02, 0x21, 0x4c, 0x18]);
    assert_eq!(KernelImage::parse(&synthetic::bzimage(&packed, 1)).unwrap().elf, elf);
}

#[test]
fn relocations_without_an_inverse_table_are_read() {
    let elf = synthetic::vmlinux(&blocks());
    let segments = elf::Elf::parse(&elf).unwrap().segments;
    let tail = synthetic::relocation_words(&[0x8100_0008, 0x8100_0010], None, &[0x8100_0020]);
    let found = Relocations::parse(&tail, &segments).unwrap();
    assert_eq!(found.abs64, [Va(BASE + 0x10), Va(BASE + 8)]);
    assert_eq!((found.abs32, found.inverse32), (vec![Va(BASE + 0x20)], vec![]));
}

#[test]
fn words_that_are_no_relocations_of_this_kernel_are_none() {
    let elf = synthetic::vmlinux(&blocks());
    let segments = elf::Elf::parse(&elf).unwrap().segments;
    let outside = synthetic::relocation_words(&[0x8100_0008], Some(&[]), &[0x1234]);
    let four_tables = [vec![0, 0, 0, 0, 0x10, 0, 0, 0x81], outside.clone()].concat();
    for tail in [vec![], vec![1; 40], outside, four_tables] {
        assert_eq!(Relocations::parse(&tail, &segments), None, "{tail:x?}");
    }
    // The per-CPU template's fields go by its load address.
    let percpu = (PERCPU_LOAD + 0x8000_0000) as u32;
    let tail = synthetic::relocation_words(&[percpu], Some(&[]), &[]);
    assert_eq!(Relocations::parse(&tail, &segments).unwrap().len(), 1);
}

/// A file with `magic` at `at`, else zero.
fn file_with(parts: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; 0x400];
    for (at, magic) in parts {
        bytes[*at..at + magic.len()].copy_from_slice(magic);
    }
    bytes
}

#[test]
fn foreign_files_are_named() {
    let arm64 = file_with(&[(0, b"MZ"), (0x38, b"ARM\x64")]);
    let packed = synthetic::gzip(&arm64);
    let mut zboot = file_with(&[
        (0, b"MZ"),
        (4, b"zimg"),
        (8, &[0, 4, 0, 0]),
        (12, &(packed.len() as u32).to_le_bytes()),
    ]);
    zboot.extend_from_slice(&packed);
    let elf = |machine: u8, class: u8| {
        file_with(&[(0, b"\x7fELF"), (4, &[class, 1, 1]), (16, &[2, 0, machine, 0])])
    };
    let cases: [(Vec<u8>, &str); 16] = [
        (vec![], "The file is empty"),
        (b"#!/bin/sh\necho hello\n".to_vec(), "It is a text file, not a bzImage or vmlinux"),
        (arm64.clone(), "It is an arm64 Image; arm64 kernels need an arm64 host"),
        (packed, "It is a gzip-packed arm64 Image; arm64 kernels need an arm64 host"),
        (
            synthetic::pack("zstd", &arm64),
            "It is a zstd-packed arm64 Image; arm64 kernels need an arm64 host",
        ),
        (zboot, "It is an EFI-zboot arm64 image; arm64 kernels need an arm64 host"),
        (elf(183, 2), "It is an arm64 ELF; arm64 kernels need an arm64 host"),
        (elf(3, 1), "It is a 32-bit x86 ELF; only 64-bit kernels can be run"),
        (elf(243, 2), "It is an ELF for RISC-V, not for 64-bit x86"),
        (
            file_with(&[(0, b"MZ")]),
            "It is an EFI or Windows executable without a Linux boot header, not a kernel image",
        ),
        (
            file_with(&[(0, b"MZ"), (0x180, b".linux\0\0")]),
            "It is a unified kernel image (EFI); give the kernel that was packed into it",
        ),
        (synthetic::gzip(b"070701 cpio"), "It is a gzip-packed file that holds an initramfs, not a kernel"),
        (
            b"!<arch>\ndebian-binary   1".to_vec(),
            "It is a Debian package; unpack it and give the vmlinuz inside",
        ),
        (b"MZ\xea\x07".to_vec(), "It begins like a bzImage and ends after 4 bytes: truncated"),
        (vec![0; 4096], "It is neither a bzImage nor an ELF: it has no known header"),
        (b"\x7fELF\x02\x01".to_vec(), "The ELF is truncated: it has 6 bytes, less than its header"),
    ];
    for (bytes, message) in cases {
        assert_eq!(error(&bytes), message);
    }
}

#[test]
fn damaged_boot_executables_are_named() {
    let whole = bzimage("gzip");
    let with = |at: usize, bytes: &[u8]| {
        let mut file = whole.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let payload = (39 + 1) * 512 + 0x2cc;
    let cases: [(Vec<u8>, &str); 7] = [
        (whole[..0x210].to_vec(), "The bzImage is truncated: it ends inside its setup header"),
        (whole[..24_000].to_vec(), "The bzImage is truncated: its payload ends at byte"),
        (with(0x206, &[2, 2]), "The bzImage speaks boot protocol 2.02"),
        (with(0x236, &[0, 0]), "The bzImage holds a 32-bit x86 kernel"),
        (with(0x24c, &[0; 4]), "The bzImage has no payload"),
        (with(payload, b"what is?"), "The bzImage's payload is damaged: No known compression begins with"),
        (with(payload + 3000, &[0xff; 64]), "The bzImage's payload is damaged: Its gzip data "),
    ];
    for (bytes, message) in cases {
        let error = error(&bytes);
        assert!(error.starts_with(message), "{error}");
    }
}

#[test]
fn sizes_that_lie_are_refused() {
    let elf = synthetic::vmlinux(&blocks());
    for name in COMPRESSIONS {
        for lie in [elf.len() as u32 - 1, elf.len() as u32 + 1, u32::MAX] {
            let mut packed = synthetic::pack(name, &elf);
            let at = packed.len() - 4;
            packed[at..].copy_from_slice(&lie.to_le_bytes());
            let error = error(&synthetic::bzimage(&packed, 1));
            assert!(error.starts_with("The bzImage's payload is damaged: "), "{name}, {lie}: {error}");
        }
    }
}

#[test]
fn a_flipped_bit_does_not_get_past_a_checksum() {
    let elf = synthetic::vmlinux(&blocks());
    for name in ["gzip", "xz", "zstd", "bzip2"] {
        let whole = synthetic::pack(name, &elf);
        for n in 0..40 {
            let mut packed = whole.clone();
            let at = 40 + n * (packed.len() - 100) / 40;
            packed[at] ^= 0x10;
            match unpack::unpack(&packed) {
                Ok((_, bytes)) => assert_eq!(bytes, elf, "{name}, byte {at}: a part that is not read back"),
                Err(error) => assert!(format!("{error:#}").starts_with("Its "), "{error:#}"),
            }
        }
    }
}

#[test]
fn an_elf_that_is_no_kernel_is_named() {
    let mut elf = synthetic::vmlinux(&blocks());
    for at in find_all(&elf.clone(), b"Linux version ") {
        elf[at] = b'X';
    }
    assert!(error(&elf).starts_with("The ELF is no Linux kernel"), "{}", error(&elf));
    elf[16] = 1;
    assert!(error(&elf).starts_with("The ELF is of type 1"), "{}", error(&elf));
}

#[test]
fn open_names_the_path() {
    let error = KernelImage::open(Path::new("/nonexistent/vmlinuz")).unwrap_err();
    assert!(format!("{error:#}").starts_with("Cannot use kernel image /nonexistent/vmlinuz: "), "{error:#}");
}

/// Overwrites bytes of `file` at positions that are taken modulo its length.
fn mutate(file: &mut [u8], edits: &[(usize, [u8; 4], usize)]) {
    for (at, bytes, len) in edits {
        let at = at % file.len();
        let len = (*len).min(file.len() - at);
        file[at..at + len].copy_from_slice(&bytes[..len]);
    }
}

fn edits(reach: usize) -> impl Strategy<Value = Vec<(usize, [u8; 4], usize)>> {
    prop::collection::vec((0..reach, any::<[u8; 4]>(), 1usize..=4), 1..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn truncated_images_are_errors(which in 0..COMPRESSIONS.len(), cut in any::<prop::sample::Index>()) {
        let file = bzimage(COMPRESSIONS[which]);
        let payload_end = file.len() - 100;
        prop_assert!(KernelImage::parse(&file[..cut.index(payload_end)]).is_err());
        let elf = synthetic::vmlinux(&blocks());
        prop_assert!(KernelImage::parse(&elf[..cut.index(elf.len())]).is_err());
    }

    #[test]
    fn mutated_boot_executables_do_not_panic(which in 0..COMPRESSIONS.len(), edits in edits(1 << 20)) {
        let mut file = bzimage(COMPRESSIONS[which]);
        mutate(&mut file, &edits);
        let _ = KernelImage::parse(&file);
    }

    #[test]
    fn mutated_headers_do_not_panic(edits in edits(0x260)) {
        let mut file = bzimage("lz4");
        mutate(&mut file[0x1f0..], &edits);
        let _ = KernelImage::parse(&file);
        let mut elf = synthetic::vmlinux(&blocks());
        let sections = elf.len() - 6 * 64;
        mutate(&mut elf[..64 + 3 * 56], &edits);
        let _ = KernelImage::parse(&elf);
        let mut elf = synthetic::vmlinux(&blocks());
        mutate(&mut elf[sections..], &edits);
        if let Ok(image) = KernelImage::parse(&elf) {
            for section in &image.sections {
                let _ = image.section_bytes(&section.name);
                let _ = image.bytes_at(section.va, section.size as usize);
            }
        }
    }

    #[test]
    fn arbitrary_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        let _ = KernelImage::parse(&bytes);
        let _ = unpack::unpack(&bytes);
    }

    #[test]
    fn arbitrary_relocation_words_stay_inside(words in prop::collection::vec(0u32..4, 0..40)) {
        let segments = elf::Elf::parse(&synthetic::vmlinux(&blocks())).unwrap().segments;
        let tail: Vec<u8> =
            words.iter().map(|&w| if w == 0 { 0 } else { 0x8100_0000 + 8 * w }).flat_map(u32::to_le_bytes).collect();
        if let Some(found) = Relocations::parse(&tail, &segments) {
            prop_assert_eq!(found.len(), words.iter().filter(|&&w| w != 0).count());
        }
    }
}
