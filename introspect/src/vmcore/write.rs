//! What stands before the memory in a core.

use super::notes::{self, Attached};
use super::{EHDR, ET_CORE, PHDR, PT_LOAD, PT_NOTE};
use crate::arch::{CpuState, prstatus};
use crate::memory::{PAGE_SIZE, RamRange, Va};
use anyhow::ensure;

/// What a core is made of.
pub struct Content<'a> {
    /// RAM, ascending.
    pub ranges: &'a [RamRange],
    /// Where the kernel maps physical address 0, if it does yet.
    pub direct_map: Option<Va>,
    /// Where it maps its image, and the image's place in `ranges`: drgn begins there.
    pub image: (Va, RamRange),
    /// Every CPU, and the pid of what it runs.
    pub cpus: &'a [(CpuState, i32)],
    /// What the kernel says of itself; crash and drgn need it.
    pub vmcoreinfo: Option<&'a str>,
    /// The tracker's state and the kernel image, which are to follow the memory; where that is does not matter here.
    pub attached: Option<Attached>,
}

/// The beginning of a core: all ranges of RAM follow, one behind the other, then what is attached.
pub struct Head {
    /// ELF header, program headers and notes, padded to a page.
    pub bytes: Vec<u8>,
    /// Bytes of the whole file.
    pub file_len: u64,
}

impl Head {
    /// Lays a core out.
    ///
    /// # Errors
    /// More ranges of RAM than an ELF file of this form has.
    pub fn new(content: &Content<'_>) -> anyhow::Result<Self> {
        let (va, image) = content.image;
        // Bytes of RAM before the image, where it lies in one range.
        let mut before = 0;
        let mut place = None;
        for range in content.ranges {
            if image.start >= range.start && image.start + image.len <= range.start + range.len {
                place = Some(before + (image.start - range.start));
            }
            before += range.len;
        }
        let headers = content.ranges.len() + 1 + usize::from(place.is_some());
        ensure!(
            headers < usize::from(super::PN_XNUM),
            "{headers} ranges of RAM are too many for a core file"
        );
        let notes = |offset| {
            let attached = content.attached.map(|attached| Attached { offset, ..attached });
            notes::encode(content.cpus, content.vmcoreinfo, attached.as_ref())
        };
        let notes_at = EHDR + headers * PHDR;
        let start = (notes_at + notes(0).len()).next_multiple_of(PAGE_SIZE as usize);
        let ram: u64 = content.ranges.iter().map(|range| range.len).sum();
        let notes = notes(start as u64 + ram);
        let mut bytes = elf_header(headers as u16);
        program_header(&mut bytes, PT_NOTE, notes_at as u64, [0, 0], notes.len() as u64);
        if let Some(place) = place {
            program_header(&mut bytes, PT_LOAD, start as u64 + place, [va.0, image.start.0], image.len);
        }
        let mut offset = start as u64;
        for range in content.ranges {
            let va = content.direct_map.map_or(0, |base| (base + range.start.0).0);
            program_header(&mut bytes, PT_LOAD, offset, [va, range.start.0], range.len);
            offset += range.len;
        }
        bytes.extend(notes);
        bytes.resize(start, 0);
        let attached = content.attached.map_or(0, |attached| attached.len + attached.kernel_len);
        Ok(Self { bytes, file_len: offset + attached })
    }
}

/// `Elf64_Ehdr` of a core with program headers right behind it.
fn elf_header(headers: u16) -> Vec<u8> {
    let mut out = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0];
    out.resize(16, 0);
    out.extend(ET_CORE.to_le_bytes());
    out.extend(prstatus::MACHINE.to_le_bytes());
    out.extend(1_u32.to_le_bytes());
    // Entry, program headers, section headers.
    for word in [0, EHDR as u64, 0] {
        out.extend(word.to_le_bytes());
    }
    out.extend(0_u32.to_le_bytes());
    for half in [EHDR as u16, PHDR as u16, headers, 0, 0, 0] {
        out.extend(half.to_le_bytes());
    }
    out
}

/// `Elf64_Phdr` of `len` bytes at `offset`; `addresses` are virtual and physical.
fn program_header(out: &mut Vec<u8>, kind: u32, offset: u64, addresses: [u64; 2], len: u64) {
    const READ_WRITE_EXECUTE: u32 = 7;
    out.extend(kind.to_le_bytes());
    out.extend(if kind == PT_LOAD { READ_WRITE_EXECUTE } else { 0 }.to_le_bytes());
    // Alignment zero, as kdump has it: by that crash tells its files from those of netdump, which have no VMCOREINFO.
    for word in [offset, addresses[0], addresses[1], len, len, 0] {
        out.extend(word.to_le_bytes());
    }
}
