//! Tests of Images, on synthetic ones.

use crate::image::synthetic;
use crate::image::{Format, KernelImage};
use crate::memory::Va;
use proptest::prelude::*;

const BASE: u64 = 0xffff_8000_0800_0000;
const FIELD: usize = 0x8000;

fn plain() -> Vec<u8> {
    synthetic::arm64_image(&[], BASE)
}

fn error(bytes: &[u8]) -> String {
    match KernelImage::parse(bytes) {
        Ok(image) => panic!("parsed as {:?}", image.format),
        Err(error) => format!("{error:#}"),
    }
}

#[test]
fn an_image_is_linked_where_its_relocations_say() {
    let image = KernelImage::parse(&plain()).unwrap();
    assert_eq!((&image.format, image.segments[0].va), (&Format::Image(None), Va(BASE)));
    assert_eq!(image.release(), "6.1.0-test-arm64");
    assert_eq!(image.relocations.as_ref().map(|r| r.len()), Some(100));
    assert_eq!(image.bytes_at(Va(BASE + FIELD as u64), 8), Some(&(BASE + 0x40).to_le_bytes()[..]));
    assert_eq!(image.setup().len(), 64);
    assert!(image.segments[0].mem_size > image.elf.len() as u64);
}

#[test]
fn packed_images_are_unpacked() {
    let whole = KernelImage::parse(&plain()).unwrap();
    for compression in ["gzip", "zstd", "xz"] {
        let packed = synthetic::pack(compression, &plain());
        // Files have no size word behind the data, the payload of an EFI-zboot has.
        let file = if compression == "gzip" { &packed[..] } else { &packed[..packed.len() - 4] };
        let image = KernelImage::parse(file).unwrap();
        assert_eq!((&image.format, &image.elf), (&Format::Image(Some(compression)), &whole.elf));
        assert_eq!(image.file(), file);
        let mut zboot = vec![0; 0x400];
        zboot[..8].copy_from_slice(b"MZ\0\0zimg");
        zboot[8..12].copy_from_slice(&0x400_u32.to_le_bytes());
        zboot[12..16].copy_from_slice(&(packed.len() as u32).to_le_bytes());
        zboot.extend_from_slice(&packed);
        let image = KernelImage::parse(&zboot).unwrap();
        assert_eq!((&image.format, &image.elf), (&Format::Zboot(compression), &whole.elf));
    }
}

#[test]
fn foreign_and_damaged_files_are_named() {
    let whole = plain();
    let with = |at: usize, bytes: &[u8]| {
        let mut file = whole.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let mut bzimage = vec![0; 0x400];
    bzimage[0x1fe..0x206].copy_from_slice(b"\x55\xaa\0\0HdrS");
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(64, 0);
    elf[18] = 183;
    let cases: [(Vec<u8>, &str); 9] = [
        (vec![], "The file is empty"),
        (b"#!/bin/sh\necho hello\n".to_vec(), "It is a text file, not a arm64 Image"),
        (bzimage, "It is an x86 bzImage; x86 kernels need an x86 host"),
        (elf, "It is an ELF; arm64 kernels are booted from an Image (arch/arm64/boot)"),
        (synthetic::gzip(b"070701 cpio"), "It is a gzip-packed file that holds an initramfs, not a kernel"),
        (whole[..0x3c].to_vec(), "The Image is truncated inside its header"),
        (with(24, &[1]), "It is a big-endian arm64 kernel"),
        (with(16, &[1, 0, 0, 0, 0, 0, 0, 0]), "The Image's header says 1 bytes of memory"),
        (whole[..0x9000].to_vec(), "Cannot tell where the Image is linked: It has no table of relocations"),
    ];
    for (bytes, message) in cases {
        let error = error(&bytes);
        assert!(error.starts_with(message), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn damaged_images_do_not_panic(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut file = plain();
        for (at, value) in edits {
            let at = at.index(file.len());
            file[at] = value;
        }
        let _ = KernelImage::parse(&file);
    }

    #[test]
    fn arbitrary_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        let _ = KernelImage::parse(&bytes);
    }
}
