//! Kernel image files, unpacked to what the guest will run: on x86-64 bzImage and vmlinux ELF, on arm64 Image.
//!
//! ```text
//! bzImage:  setup sectors | protected-mode code | payload ............. | u32 size
//!                                                 unpacks to
//!                                                 ELF | KASLR relocations
//! Image:    header | text | read-only data, symbols, BTF | relocations | data      (plain, packed, or in an EFI-zboot)
//! ```
//!
//! The file is untrusted: every offset in it is checked, and no size it names is allocated before
//! that many bytes were produced.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod elf;
mod identify;
#[cfg(test)]
#[cfg_attr(target_arch = "aarch64", allow(dead_code, reason = "most of it is for tests on x86-64 kernels"))]
pub(crate) mod synthetic;
mod unpack;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use crate::memory::{Pa, Va};
#[cfg(target_arch = "aarch64")]
use aarch64 as platform;
use anyhow::{Context, bail};
pub use platform::Relocations;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;
#[cfg(target_arch = "x86_64")]
use x86_64 as platform;

/// Largest file that is read and largest kernel that is unpacked, bytes. A stock kernel unpacks to less
/// than 100 MiB; a vmlinux with debug information has several hundred.
pub const MAX_IMAGE_BYTES: u64 = 1 << 30;

/// How the file was packed; named in errors and by `inspect`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Format {
    /// x86 boot executable with a compressed ELF payload; the compression's name.
    BzImage(&'static str),
    /// ELF vmlinux.
    Elf,
    /// arm64 Image; the compression's name where it is packed.
    Image(Option<&'static str>),
    /// arm64 Image in an EFI executable that unpacks it; the compression's name.
    Zboot(&'static str),
}

/// A loadable segment of the unpacked kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Link address. 0 for the per-CPU template of x86 kernels before 6.15.
    pub va: Va,
    /// Physical load address.
    pub pa: Pa,
    /// Bytes in [`KernelImage::elf`].
    pub file: Range<usize>,
    /// Size in memory (at least the file's; the rest is zero).
    pub mem_size: u64,
}

/// A kernel section that survives stripping, by name (`.orc_unwind`, `.return_sites`, `.BTF`, ...).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Section name.
    pub name: String,
    /// Link address, 0 when not loaded.
    pub va: Va,
    /// Bytes in [`KernelImage::elf`]; empty for .bss.
    pub file: Range<usize>,
    /// Size in memory.
    pub size: u64,
}

/// What a platform reads of an unpacked kernel.
struct Parsed {
    segments: Vec<Segment>,
    sections: Vec<Section>,
    entry: Pa,
}

/// An unpacked kernel.
#[derive(Debug, Clone)]
pub struct KernelImage {
    /// Packing of the file it came from.
    pub format: Format,
    /// The unpacked ELF (after the payload's trailing relocations were cut off), or the unpacked Image with its relocations
    /// applied.
    pub elf: Vec<u8>,
    /// PT_LOAD segments in file order.
    pub segments: Vec<Segment>,
    /// Named sections.
    pub sections: Vec<Section>,
    /// Physical entry point (`startup_64`); of an Image the distance from where it is loaded.
    pub entry: Pa,
    /// KASLR relocations, when the image has them.
    pub relocations: Option<Relocations>,
    /// The file, where it is packed; an ELF is [`KernelImage::elf`]. See [`KernelImage::file`].
    pub packed: Vec<u8>,
    /// `Linux version ...` banner.
    pub banner: String,
}

impl KernelImage {
    /// Reads and unpacks a file.
    ///
    /// # Errors
    /// One sentence that names the format found when it is not one of ours (text, arm64 Image, truncated, ...).
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let context = || format!("Cannot use kernel image {}", path.display());
        let bytes = read_bounded(path).with_context(context)?;
        Self::from_vec(bytes).with_context(context)
    }

    /// Unpacks `bytes`.
    ///
    /// # Errors
    /// As [`KernelImage::open`].
    pub fn parse(bytes: &[u8]) -> anyhow::Result<Self> {
        Self::from_vec(bytes.to_vec())
    }

    fn from_vec(bytes: Vec<u8>) -> anyhow::Result<Self> {
        platform::unpack(bytes)
    }

    fn assemble(
        format: Format,
        elf: Vec<u8>,
        parsed: Parsed,
        relocations: Option<Relocations>,
        packed: Vec<u8>,
    ) -> anyhow::Result<Self> {
        let Parsed { segments, sections, entry } = parsed;
        let mut image =
            Self { format, elf, segments, sections, entry, relocations, packed, banner: String::new() };
        image.banner = image.find_banner().with_context(|| {
            let what = platform::UNPACKED;
            format!("The {what} is no Linux kernel: it has no `Linux version` banner in its loaded segments")
        })?;
        Ok(image)
    }

    /// The bytes of the file it came from.
    pub fn file(&self) -> &[u8] {
        if self.packed.is_empty() { &self.elf } else { &self.packed }
    }

    /// The header as the boot protocol wants it: the first 4 KiB of a bzImage (boot sector and setup header), for
    /// boot_params, or the first 64 bytes of an Image; empty for an ELF.
    pub fn setup(&self) -> &[u8] {
        platform::setup(self)
    }

    /// The image's bytes at link address `va`; None outside file-backed segments.
    pub fn bytes_at(&self, va: Va, len: usize) -> Option<&[u8]> {
        let rest = self.bytes_from(va)?;
        rest.get(..len)
    }

    /// The image's bytes from link address `va` to the end of its segment's file-backed part.
    pub fn bytes_from(&self, va: Va) -> Option<&[u8]> {
        self.segments.iter().find_map(|segment| {
            let offset = va.0.checked_sub(segment.va.0)?;
            let bytes = &self.elf[segment.file.clone()];
            if offset < bytes.len() as u64 { bytes.get(offset as usize..) } else { None }
        })
    }

    /// Link address of the byte at offset `file` in [`KernelImage::elf`]; None outside loaded segments.
    pub fn va_of(&self, file: usize) -> Option<Va> {
        self.segments.iter().find(|s| s.file.contains(&file)).map(|s| s.va + (file - s.file.start) as u64)
    }

    /// Named section.
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|s| s.name == name)
    }

    /// Bytes of a named section; None when there is no such section or it has no bytes in the file.
    pub fn section_bytes(&self, name: &str) -> Option<&[u8]> {
        let section = self.section(name)?;
        (!section.file.is_empty()).then(|| &self.elf[section.file.clone()])
    }

    /// `uname -r` from the banner.
    pub fn release(&self) -> &str {
        self.banner.split_whitespace().nth(2).unwrap_or("unknown")
    }

    /// `linux_banner`. Since 6.1 there are two in the image: the one of the first link, whose build
    /// number is still empty (`# SMP`, init/version.c), and the final one (init/version-timestamp.c).
    fn find_banner(&self) -> Option<String> {
        let mut first = None;
        for banner in self.segments.iter().flat_map(|s| banners(&self.elf[s.file.clone()])) {
            let numbered = banner
                .split_once(" #")
                .is_some_and(|(_, rest)| rest.starts_with(|c: char| c.is_ascii_digit()));
            if numbered {
                return Some(banner);
            }
            first.get_or_insert(banner);
        }
        first
    }
}

/// Every `Linux version ` line that a release follows, which leaves out /proc/version's format string.
fn banners(bytes: &[u8]) -> impl Iterator<Item = String> {
    const START: &[u8] = b"Linux version ";
    const MAX_BANNER: usize = 1024;
    find_all(bytes, START).filter_map(move |at| {
        let line = &bytes[at..bytes.len().min(at + MAX_BANNER)];
        let line = line.split(|&b| b == 0 || b == b'\n').next()?;
        line.get(START.len())?.is_ascii_digit().then(|| String::from_utf8_lossy(line).into_owned())
    })
}

/// Offsets of `needle` in `haystack`, ascending, not overlapping.
pub(crate) fn find_all<'a>(haystack: &'a [u8], needle: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
    let finder = memchr::memmem::Finder::new(needle);
    let mut from = 0;
    std::iter::from_fn(move || {
        let at = from + finder.find(haystack.get(from..)?)?;
        from = at + needle.len().max(1);
        Some(at)
    })
}

fn read_bounded(path: &Path) -> anyhow::Result<Vec<u8>> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        bail!("It is a directory, not a kernel image");
    }
    if metadata.len() > MAX_IMAGE_BYTES {
        bail!("It has {} bytes, more than the {MAX_IMAGE_BYTES} that are read", metadata.len());
    }
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    // A device or a pipe has no length: the bound holds for those too.
    file.take(MAX_IMAGE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_IMAGE_BYTES {
        bail!("It has more than the {MAX_IMAGE_BYTES} bytes that are read");
    }
    Ok(bytes)
}
