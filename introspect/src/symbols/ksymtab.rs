//! Symbols exported to modules: `__ksymtab` and `__ksymtab_gpl`.
//!
//! With CONFIG_HAVE_ARCH_PREL32_RELOCATIONS an entry is three s32, each relative to its own address:
//! value, name, namespace (include/linux/export-internal.h, include/linux/export.h before 6.10;
//! the namespace came in 5.4).

use crate::image::KernelImage;
use crate::memory::Va;

const ENTRY_BYTES: usize = 12;
/// Longest exported name, bytes; more than MODULE_NAME_LEN and KSYM_NAME_LEN.
const MAX_NAME: usize = 1024;

/// A symbol that modules may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Export<'a> {
    /// Link address; a per-CPU variable's is its offset in the per-CPU area.
    pub va: Va,
    /// Name.
    pub name: &'a str,
    /// EXPORT_SYMBOL_GPL.
    pub gpl: bool,
}

/// The image's exports in table order. Entries that do not decode are left out.
pub(super) fn exports(image: &KernelImage) -> impl Iterator<Item = Export<'_>> {
    [("__ksymtab", false), ("__ksymtab_gpl", true)].into_iter().flat_map(move |(section, gpl)| {
        let va = image.section(section).map_or(Va(0), |s| s.va);
        let bytes = image.section_bytes(section).unwrap_or_default();
        bytes.chunks_exact(ENTRY_BYTES).enumerate().filter_map(move |(n, entry)| {
            let at = va + (n * ENTRY_BYTES) as u64;
            let name = image.bytes_from(relative(at + 4, &entry[4..8]))?;
            let name = &name[..memchr::memchr(0, &name[..name.len().min(MAX_NAME)])?];
            let name = str::from_utf8(name).ok().filter(|name| !name.is_empty())?;
            Some(Export { va: relative(at, &entry[..4]), name, gpl })
        })
    })
}

/// The address that the s32 at `at` is the distance to.
fn relative(at: Va, field: &[u8]) -> Va {
    let distance = i32::from_le_bytes(field.try_into().expect("4 bytes"));
    at + i64::from(distance) as u64
}
