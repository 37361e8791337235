//! arm64: Image (Documentation/arch/arm64/booting.rst), plain, packed, or in an EFI-zboot.
//!
//! An Image is the kernel's memory from `_text` to its last byte that is not zero: no sections, no symbols beside kallsyms, and
//! pointers are zero until the kernel relocates itself. What the other rooms want of an ELF is found by its own shape: the
//! relocations first, which say where the image is linked.

mod relocations;
mod sections;
#[cfg(test)]
mod tests;

use super::{Format, KernelImage, Parsed, Segment, identify, unpack};
use crate::memory::Pa;
use anyhow::{Context, bail, ensure};
pub use relocations::Relocations;

/// What it unpacks to and what it takes, for error messages.
pub(super) const UNPACKED: &str = "Image";
pub(super) const KERNELS: &str = "arm64 Image";
pub(super) const HEADERS: &str = "no arm64 Image";

/// Offset and magic of the header.
const MAGIC: (usize, &[u8]) = (0x38, b"ARM\x64");
const HEADER_BYTES: usize = 64;
/// Offset in the header: distance from a multiple of 2 MiB at which the image is loaded and linked.
const TEXT_OFFSET: usize = 8;
/// Offset in the header: size in memory.
const IMAGE_SIZE: usize = 16;
/// Offset in the header, and the bit that says big-endian.
const FLAGS: usize = 24;
const BIG_ENDIAN: u64 = 1;
/// Most bytes an image takes in memory beyond those of its file: its .bss.
const MAX_BSS: u64 = 256 << 20;

/// Reads a file's bytes.
pub(super) fn unpack(bytes: Vec<u8>) -> anyhow::Result<KernelImage> {
    if is_image(&bytes) {
        return parse(Format::Image(None), bytes, Vec::new());
    }
    if let Some(payload) = identify::zboot_payload(&bytes) {
        let (compression, image) =
            unpack::unpack(payload).context("The payload of the EFI-zboot image is damaged")?;
        ensure!(is_image(&image), "The EFI-zboot image holds no arm64 Image");
        return parse(Format::Zboot(compression), image, bytes);
    }
    let head = unpack::peek(&bytes, HEADER_BYTES);
    if is_image(&head) {
        let (compression, image) = unpack::unpack_file(&bytes).context("The packed Image is damaged")?;
        return parse(Format::Image(Some(compression)), image, bytes);
    }
    bail!(identify::describe(&bytes))
}

/// See [`KernelImage::setup`].
pub(super) fn setup(image: &KernelImage) -> &[u8] {
    &image.elf[..image.elf.len().min(HEADER_BYTES)]
}

fn is_image(bytes: &[u8]) -> bool {
    let (at, magic) = MAGIC;
    bytes.get(at..at + magic.len()) == Some(magic)
}

fn parse(format: Format, mut image: Vec<u8>, packed: Vec<u8>) -> anyhow::Result<KernelImage> {
    let header = |at: usize| Some(u64::from_le_bytes(image.get(at..at + 8)?.try_into().ok()?));
    let fields = header(TEXT_OFFSET).zip(header(IMAGE_SIZE)).zip(header(FLAGS));
    let ((text_offset, size), flags) =
        fields.filter(|_| image.len() >= HEADER_BYTES).context("The Image is truncated inside its header")?;
    ensure!(flags & BIG_ENDIAN == 0, "It is a big-endian arm64 kernel; only little-endian ones can be run");
    let len = image.len() as u64;
    // 0 before 3.17.
    let size = if size == 0 { len } else { size };
    ensure!(
        size >= len && size - len <= MAX_BSS,
        "The Image's header says {size} bytes of memory, the file has {len}: truncated or damaged"
    );
    let found =
        relocations::find(&image, size, text_offset).context("Cannot tell where the Image is linked")?;
    relocations::apply(&mut image, &found)?;
    let base = found.base;
    let segment = Segment { va: base, pa: Pa(0), file: 0..image.len(), mem_size: size };
    let sections = sections::find(&image, base);
    let parsed = Parsed { segments: vec![segment], sections, entry: Pa(0) };
    let relocations = found.relocations();
    KernelImage::assemble(format, image, parsed, Some(relocations), packed)
}
