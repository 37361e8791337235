//! Miniature kernel images for tests: built from the formats' descriptions, independently of the parsers.

use crate::image::KernelImage;
use std::io::Write;

/// Link address of the first segment.
pub(crate) const BASE: u64 = 0xffff_ffff_8100_0000;
/// Its physical load address, which is the entry point too.
pub(crate) const LOAD: u64 = 0x100_0000;
/// Physical load address of the per-CPU template.
pub(crate) const PERCPU_LOAD: u64 = 0x180_0000;
/// Link address of the segment that has no bytes in the file.
pub(crate) const BSS: u64 = BASE + 0x90_0000;
pub(crate) const BSS_SIZE: u64 = 0x3000;
pub(crate) const PERCPU: [u8; 64] = [0xcc; 64];
pub(crate) const BANNER: &str = "Linux version 6.1.0-test-amd64 (cc) #7 SMP Debian 6.1.1-1 (2026-01-01)";

/// A named section at a distance from [`BASE`].
pub(crate) struct Block {
    pub name: &'static str,
    pub at: u64,
    pub bytes: Vec<u8>,
}

/// A vmlinux ELF of three segments: the blocks and banners, the per-CPU template, .bss.
pub(crate) fn vmlinux(blocks: &[Block]) -> Vec<u8> {
    const ALIGN: usize = 0x1000;
    let text_len = blocks.iter().map(|b| b.at as usize + b.bytes.len()).max().unwrap_or(0);
    let mut text = vec![0; text_len];
    for block in blocks {
        text[block.at as usize..][..block.bytes.len()].copy_from_slice(&block.bytes);
    }
    // The format string and the first link's banner come before the one that counts.
    let first = BANNER.replace("#7", "#");
    text.extend_from_slice(format!("Linux version %s (%s)\0{first}\n\0{BANNER}\n\0").as_bytes());

    let percpu_at = (ALIGN + text.len()).next_multiple_of(ALIGN);
    let mut elf = vec![0; ALIGN];
    elf.extend_from_slice(&text);
    elf.resize(percpu_at, 0);
    elf.extend_from_slice(&PERCPU);

    let mut names = vec![0];
    let mut headers: Vec<[u64; 6]> = vec![[0; 6]];
    let mut section = |names: &mut Vec<u8>, name: &str, kind: u64, va: u64, at: usize, size: u64| {
        headers.push([names.len() as u64, kind, va, at as u64, size, 0]);
        names.extend_from_slice(name.as_bytes());
        names.push(0);
    };
    for b in blocks {
        section(&mut names, b.name, 1, BASE + b.at, ALIGN + b.at as usize, b.bytes.len() as u64);
    }
    section(&mut names, ".data..percpu", 1, 0, percpu_at, PERCPU.len() as u64);
    section(&mut names, ".bss", 8, BSS, elf.len(), BSS_SIZE);
    let names_at = elf.len();
    section(&mut names, ".shstrtab", 3, 0, names_at, 0);
    headers.last_mut().expect("just pushed")[4] = names.len() as u64;
    elf.extend_from_slice(&names);
    elf.resize(elf.len().next_multiple_of(8), 0);

    let sections_at = elf.len();
    for [name, kind, va, at, size, link] in &headers {
        for (value, width) in
            [(name, 4), (kind, 4), (&2, 8), (va, 8), (at, 8), (size, 8), (link, 4), (&0, 4), (&1, 8), (&0, 8)]
        {
            elf.extend_from_slice(&value.to_le_bytes()[..width]);
        }
    }
    let segments = [
        [BASE, LOAD, ALIGN as u64, text.len() as u64, text.len() as u64],
        [0, PERCPU_LOAD, percpu_at as u64, PERCPU.len() as u64, PERCPU.len() as u64],
        [BSS, BSS - BASE + LOAD, percpu_at as u64, 0, BSS_SIZE],
    ];
    let mut head = b"\x7fELF\x02\x01\x01".to_vec();
    head.resize(16, 0);
    let fields =
        [(2, 2), (62, 2), (1, 4), (LOAD, 8), (64, 8), (sections_at as u64, 8), (0, 4), (64, 2), (56, 2)];
    let counts =
        [(segments.len() as u64, 2), (64, 2), (headers.len() as u64, 2), (headers.len() as u64 - 1, 2)];
    for (value, width) in fields.into_iter().chain(counts) {
        head.extend_from_slice(&value.to_le_bytes()[..width]);
    }
    for [va, pa, at, file_size, mem_size] in segments {
        for (value, width) in
            [(1, 4), (7, 4), (at, 8), (va, 8), (pa, 8), (file_size, 8), (mem_size, 8), (ALIGN as u64, 8)]
        {
            head.extend_from_slice(&value.to_le_bytes()[..width]);
        }
    }
    elf[..head.len()].copy_from_slice(&head);
    elf
}

/// The relocation words behind the ELF; without an inverse table as since 6.15.
pub(crate) fn relocation_words(abs64: &[u32], inverse32: Option<&[u32]>, abs32: &[u32]) -> Vec<u8> {
    let tables = std::iter::once(abs64).chain(inverse32).chain(std::iter::once(abs32));
    tables.flat_map(|table| std::iter::once(&0).chain(table)).flat_map(|word| word.to_le_bytes()).collect()
}

/// A bzImage around a packed payload (size word included).
pub(crate) fn bzimage(payload: &[u8], setup_sects: u8) -> Vec<u8> {
    const CODE: usize = 0x2cc;
    let sectors = if setup_sects == 0 { 4 } else { usize::from(setup_sects) };
    let mut image = vec![0; (sectors + 1) * 512 + CODE];
    image[0x1f1] = setup_sects;
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    image[0x236..0x238].copy_from_slice(&0x7fu16.to_le_bytes());
    image[0x248..0x24c].copy_from_slice(&(CODE as u32).to_le_bytes());
    image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    image.extend_from_slice(payload);
    // What is behind the payload is code and, on a signed kernel, a signature.
    image.resize(image.len() + 100, 0x90);
    image
}

/// Packs as the kernel's build does: the compressor's output, then the size word (gzip ends with its own).
pub(crate) fn pack(compression: &str, bytes: &[u8]) -> Vec<u8> {
    let mut packed = match compression {
        "gzip" => gzip(bytes),
        "bzip2" => {
            let mut writer = ::bzip2::write::BzEncoder::new(Vec::new(), ::bzip2::Compression::fast());
            writer.write_all(bytes).expect("memory");
            writer.finish().expect("memory")
        }
        "xz" => {
            let options = lzma_rust2::XzOptions::with_preset(0);
            let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).expect("options");
            writer.write_all(bytes).expect("memory");
            writer.finish().expect("memory")
        }
        "lzma" => {
            let options = lzma_rust2::LzmaOptions::with_preset(0);
            let mut writer =
                lzma_rust2::LzmaWriter::new_use_header(Vec::new(), &options, None).expect("options");
            writer.write_all(bytes).expect("memory");
            writer.finish().expect("memory")
        }
        "zstd" => ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest),
        "lz4" => lz4_legacy(bytes),
        "lzo" => lzop(bytes),
        other => panic!("no packer for {other}"),
    };
    if compression != "gzip" {
        packed.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    }
    packed
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    writer.write_all(bytes).expect("memory");
    writer.finish().expect("memory")
}

fn lz4_legacy(bytes: &[u8]) -> Vec<u8> {
    let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
    for block in bytes.chunks(8 << 20) {
        let block = lz4_flex::block::compress(block);
        packed.extend_from_slice(&(block.len() as u32).to_le_bytes());
        packed.extend_from_slice(&block);
    }
    packed
}

fn lzop(bytes: &[u8]) -> Vec<u8> {
    let mut packed = b"\x89LZO\0\r\n\x1a\n".to_vec();
    // Version, library version, version to extract, method, level.
    packed.extend_from_slice(&[0x10, 0x40, 0x20, 0xa0, 0x09, 0x40, 3, 9]);
    // Flags, mode, two words of time, no name, checksum.
    packed.extend_from_slice(&[0; 4 + 4 + 8 + 1 + 4]);
    for block in bytes.chunks(256 << 10) {
        let mut data = lzokay::compress::compress(block).expect("memory");
        if data.len() >= block.len() {
            data = block.to_vec();
        }
        for word in [block.len() as u32, data.len() as u32, 0] {
            packed.extend_from_slice(&word.to_be_bytes());
        }
        packed.extend_from_slice(&data);
    }
    packed.extend_from_slice(&[0; 4]);
    packed
}

/// The image of a vmlinux with these blocks.
pub(crate) fn image(blocks: &[Block]) -> KernelImage {
    KernelImage::parse(&vmlinux(blocks)).expect("a synthetic vmlinux parses")
}

/// An arm64 Image of 64 KiB with the blocks, a banner, and a hundred relocations that point to offset 0x40.
#[cfg(target_arch = "aarch64")]
pub(crate) fn arm64_image(blocks: &[Block], base: u64) -> Vec<u8> {
    const SIZE: usize = 0x1_0000;
    let mut image = vec![0; SIZE];
    image[8..16].copy_from_slice(&0_u64.to_le_bytes());
    image[16..24].copy_from_slice(&(SIZE as u64 + 0x2000).to_le_bytes());
    image[0x38..0x3c].copy_from_slice(b"ARM\x64");
    let banner = b"Linux version 6.1.0-test-arm64 (cc) #7 SMP Debian 6.1.1-1 (2026-01-01)\n\0";
    image[0x100..0x100 + banner.len()].copy_from_slice(banner);
    for block in blocks {
        image[block.at as usize..][..block.bytes.len()].copy_from_slice(&block.bytes);
    }
    for n in 0..100 {
        let entry = [base + 0x8000 + 8 * n, 0x403, base + 0x40].map(u64::to_le_bytes).concat();
        let at = 0x9000 + 24 * n as usize;
        image[at..at + 24].copy_from_slice(&entry);
    }
    image
}
