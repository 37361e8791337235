//! The KASLR relocations behind the ELF in a bzImage's payload.

use crate::image::Segment;
use crate::memory::Va;

/// Where the kernel image is linked: a field's physical load address is its link address minus this
/// (`__START_KERNEL_map`, arch/x86/include/asm/page_64_types.h).
pub const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// Fields to add the KASLR slide to, as link addresses (sign-extended 32-bit).
/// Format: arch/x86/boot/compressed/misc.c `handle_relocations`, written by arch/x86/tools/relocs.c.
///
/// A field's bytes are at physical load address `field - START_KERNEL_MAP` of the unslid kernel; that
/// holds for the per-CPU template too, whose segment has link address 0.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Relocations {
    /// 64-bit fields: add.
    pub abs64: Vec<Va>,
    /// 32-bit fields: add.
    pub abs32: Vec<Va>,
    /// 32-bit fields: subtract.
    pub inverse32: Vec<Va>,
}

impl Relocations {
    /// Reads the words behind the ELF. None when there are none or they are no relocation table
    /// of this kernel, every field of which lies in a segment.
    pub(super) fn parse(tail: &[u8], segments: &[Segment]) -> Option<Self> {
        // The decompressor walks from the end backwards, so a table needs no aligned start.
        let words: Vec<u32> =
            tail.rchunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("4 bytes"))).collect();
        let mut tables: Vec<Vec<Va>> =
            words.split(|&word| word == 0).map(|table| table.iter().map(|&w| field(w)).collect()).collect();
        // Behind the last terminator, which is the tail's first word, nothing is left.
        if tables.pop().is_some_and(|rest| !rest.is_empty()) {
            return None;
        }
        let mut tables = tables.into_iter();
        // Since 6.15 per-CPU symbols are linked like all others and there is no inverse table.
        let relocations = match (tables.next(), tables.next(), tables.next(), tables.next()) {
            (Some(abs32), Some(abs64), None, _) => Self { abs64, abs32, inverse32: Vec::new() },
            (Some(abs32), Some(inverse32), Some(abs64), None) => Self { abs64, abs32, inverse32 },
            _ => return None,
        };
        relocations.all_inside(segments).then_some(relocations)
    }

    /// Numbers of 64-bit fields, of 32-bit ones, and of 32-bit ones to subtract from.
    pub fn counts(&self) -> [usize; 3] {
        [self.abs64.len(), self.abs32.len(), self.inverse32.len()]
    }

    /// Number of fields.
    pub fn len(&self) -> usize {
        self.abs64.len() + self.abs32.len() + self.inverse32.len()
    }

    /// True when there is no field.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn all_inside(&self, segments: &[Segment]) -> bool {
        let inside = |va: &Va, size: u64| {
            let Some(pa) = va.0.checked_sub(START_KERNEL_MAP) else { return false };
            segments.iter().any(|s| pa >= s.pa.0 && pa + size <= s.pa.0 + s.mem_size)
        };
        self.abs64.iter().all(|va| inside(va, 8))
            && self.abs32.iter().chain(&self.inverse32).all(|va| inside(va, 4))
    }
}

/// The field a relocation word names.
fn field(word: u32) -> Va {
    Va(i64::from(word as i32) as u64)
}
