//! Headers and notes of a core.

use super::notes::{self, Attached, Found};
use super::{EHDR, ET_CORE, PHDR, PN_XNUM, PT_LOAD, PT_NOTE};
use crate::arch::{CpuState, prstatus};
use crate::linux::read::{le16, le32, le64};
use crate::memory::{PAGE_SIZE, Pa, RamRange};
use anyhow::{Context, bail, ensure};
use std::io::{Read, Seek, SeekFrom};

/// Most bytes of notes that are read: of any machine there are a few kilobytes for each CPU.
const MAX_NOTES: u64 = 64 << 20;
/// What is said of a file whose state this program cannot read.
pub const ANOTHER_VERSION: &str =
    "It was saved by another version of kleak-vmm: analyze it with that one, or save the machine again";
/// Most program headers.
const MAX_HEADERS: u64 = 1 << 16;
/// Physical addresses have 52 bits.
const MAX_ADDRESS: u64 = 1 << 52;

/// A range of RAM and where the file has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Whole pages.
    pub range: RamRange,
    /// In the file, bytes.
    pub offset: u64,
    /// Bytes in the file, the first of the range; the others are zero.
    pub file_len: u64,
}

/// What a core says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vmcore {
    /// RAM, ascending, no byte twice.
    pub pieces: Vec<Piece>,
    /// CPUs that were online, in the order of their notes.
    pub cpus: Vec<CpuState>,
    /// VMCOREINFO.
    pub vmcoreinfo: Option<String>,
    /// What our own files have behind the memory.
    pub attached: Option<Attached>,
}

impl Vmcore {
    /// Reads headers and notes of a file of `file_len` bytes.
    ///
    /// # Errors
    /// One sentence on what the file is, or what is wrong with it.
    pub fn read(file: &mut (impl Read + Seek), file_len: u64) -> anyhow::Result<Self> {
        let header = bytes(file, 0, EHDR as u64, file_len).context(what_it_is(file))?;
        if !header.starts_with(b"\x7fELF") {
            bail!(what_it_is(file));
        }
        ensure!(header[4..6] == [2, 1], "It is an ELF file, and none of 64 bits, little endian");
        let (kind, machine) = (le16(&header, 16), le16(&header, 18));
        ensure!(
            kind == ET_CORE,
            "It is an ELF file of type {kind}, no core (an executable, a library or a module)"
        );
        ensure!(
            machine == prstatus::MACHINE,
            "It is the core of a machine of type {machine}, this program reads those of type {}",
            prstatus::MACHINE
        );
        let count = match le16(&header, 56) {
            PN_XNUM => {
                let section =
                    bytes(file, le64(&header, 40), 64, file_len).context("It has no section header")?;
                u64::from(le32(&section, 44))
            }
            count => u64::from(count),
        };
        ensure!(
            usize::from(le16(&header, 54)) == PHDR,
            "Its program headers have {} bytes",
            le16(&header, 54)
        );
        ensure!(count <= MAX_HEADERS, "It has {count} program headers");
        let headers = bytes(file, le64(&header, 32), count * PHDR as u64, file_len)
            .context("It ends within its program headers")?;
        let mut found = Found::default();
        let mut notes_len = 0_u64;
        let mut pieces = Vec::new();
        for header in headers.chunks_exact(PHDR) {
            let (offset, pa) = (le64(header, 8), le64(header, 24));
            let (file_size, mem_size) = (le64(header, 32), le64(header, 40));
            match le32(header, 0) {
                PT_NOTE => {
                    notes_len = notes_len.saturating_add(file_size);
                    ensure!(notes_len <= MAX_NOTES, "It has {notes_len} bytes of notes and more");
                    let segment =
                        bytes(file, offset, file_size, file_len).context("It ends within its notes")?;
                    notes::decode(&segment, &mut found);
                }
                PT_LOAD => pieces.extend(piece(offset, pa, file_size, mem_size, file_len)?),
                _ => {}
            }
        }
        if let Some(version) = found.unknown_version {
            bail!("{ANOTHER_VERSION} (its note has version {version})");
        }
        ensure!(!pieces.is_empty(), "It holds no memory");
        Ok(Self {
            pieces: disjoint(pieces),
            cpus: found.cpus,
            vmcoreinfo: found.vmcoreinfo,
            attached: found.attached,
        })
    }
}

/// The whole pages of a segment; None when there are none.
fn piece(
    offset: u64,
    pa: u64,
    file_size: u64,
    mem_size: u64,
    file_len: u64,
) -> anyhow::Result<Option<Piece>> {
    let end = pa.checked_add(mem_size).filter(|&end| end <= MAX_ADDRESS);
    let end =
        end.with_context(|| format!("It has {mem_size:#x} bytes of memory at physical address {pa:#x}"))?;
    let in_file = offset.checked_add(file_size).is_some_and(|end| end <= file_len);
    ensure!(in_file, "It is cut off: memory at physical address {pa:#x} is not in it");
    let start = pa.next_multiple_of(PAGE_SIZE);
    let skipped = start - pa;
    let len = (end / PAGE_SIZE * PAGE_SIZE).saturating_sub(start);
    if len == 0 {
        return Ok(None);
    }
    let file_len = file_size.min(mem_size).saturating_sub(skipped).min(len);
    Ok(Some(Piece { range: RamRange { start: Pa(start), len }, offset: offset + skipped, file_len }))
}

/// Ascending, each byte once: kdump has the kernel's own memory twice, at two virtual addresses.
fn disjoint(mut pieces: Vec<Piece>) -> Vec<Piece> {
    pieces.sort_by_key(|piece| (piece.range.start, std::cmp::Reverse(piece.range.len)));
    let mut out: Vec<Piece> = Vec::with_capacity(pieces.len());
    for mut piece in pieces {
        let end = out.last().map_or(Pa(0), |last| last.range.start + last.range.len);
        let known = (end.0.saturating_sub(piece.range.start.0)).min(piece.range.len);
        piece.range = RamRange { start: piece.range.start + known, len: piece.range.len - known };
        piece.offset += known.min(piece.file_len);
        piece.file_len = piece.file_len.saturating_sub(known);
        if piece.range.len > 0 {
            out.push(piece);
        }
    }
    out
}

/// `len` bytes at `offset`, which must lie in the file.
fn bytes(file: &mut (impl Read + Seek), offset: u64, len: u64, file_len: u64) -> anyhow::Result<Vec<u8>> {
    let end = offset.checked_add(len);
    ensure!(end.is_some_and(|end| end <= file_len), "It has {file_len} bytes");
    let mut out = vec![0; len as usize];
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(&mut out)?;
    Ok(out)
}

/// A sentence on a file that is no ELF file.
fn what_it_is(file: &mut (impl Read + Seek)) -> &'static str {
    let mut beginning = [0; 16];
    let read = file.seek(SeekFrom::Start(0)).and_then(|_| file.read_exact(&mut beginning));
    match &beginning {
        _ if read.is_err() => "It is too short for a core",
        // makedumpfile's own forms (its diskdump_mod.h and makedumpfile.h).
        [b'K', b'D', b'U', b'M', b'P', b' ', ..] => {
            "It is in kdump's compressed form; makedumpfile -E writes ELF, and so does cp from /proc/vmcore"
        }
        [b'm', b'a', b'k', b'e', b'd', b'u', b'm', b'p', ..] => {
            "It is in makedumpfile's flattened form; makedumpfile -R puts it together"
        }
        _ => "It is no ELF core",
    }
}
