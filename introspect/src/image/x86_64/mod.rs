//! x86-64: bzImage and vmlinux ELF.

mod bzimage;
mod relocations;
#[cfg(test)]
mod tests;

use super::{Format, KernelImage, Parsed, elf, identify, unpack};
use anyhow::{Context, bail};
pub use relocations::Relocations;

/// Bytes of a bzImage that go to [`KernelImage::setup`].
const SETUP_BYTES: usize = 4096;
/// What it unpacks to and what it takes, for error messages.
pub(super) const UNPACKED: &str = "ELF";
pub(super) const KERNELS: &str = "bzImage or vmlinux";
pub(super) const HEADERS: &str = "neither a bzImage nor an ELF";

/// Reads a file's bytes.
pub(super) fn unpack(bytes: Vec<u8>) -> anyhow::Result<KernelImage> {
    if elf::is_elf(&bytes) {
        let parsed = elf::Elf::parse(&bytes)?;
        return KernelImage::assemble(Format::Elf, bytes, parts(parsed), None, Vec::new());
    }
    if !bzimage::is_boot_executable(&bytes) {
        bail!(identify::describe(&bytes));
    }
    let payload = bzimage::payload(&bytes)?;
    let (compression, mut elf) = unpack::unpack(payload).context("The bzImage's payload is damaged")?;
    let parsed = elf::Elf::parse(&elf).context("The bzImage's payload holds no usable kernel")?;
    let relocations = Relocations::parse(&elf[parsed.file_end..], &parsed.segments);
    elf.truncate(parsed.file_end);
    KernelImage::assemble(Format::BzImage(compression), elf, parts(parsed), relocations, bytes)
}

fn parts(elf: elf::Elf) -> Parsed {
    let elf::Elf { segments, sections, entry, .. } = elf;
    Parsed { segments, sections, entry }
}

/// See [`KernelImage::setup`].
pub(super) fn setup(image: &KernelImage) -> &[u8] {
    &image.packed[..image.packed.len().min(SETUP_BYTES)]
}
