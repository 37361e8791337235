//! ELF notes: `u32 namesz, descsz, type`, then name and descriptor, each padded to 4 bytes.

use crate::arch::{CpuState, prstatus};
use crate::linux::read::{le32, le64};

/// Type of `struct elf_prstatus` (include/uapi/linux/elf.h).
const NT_PRSTATUS: u32 = 1;
/// Type of our own note, and the version of what it describes.
const NT_ATTACHED: u32 = 1;
const VERSION: u32 = 2;
const OWNER: &[u8] = b"kleak-vmm";
/// Bytes of our note's descriptor.
const ATTACHED: usize = 36;

/// Most CPUs of any configuration (`NR_CPUS` with MAXSMP).
const MAX_CPUS: usize = 8192;

/// What lies behind the memory in a file of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attached {
    /// [`super::fingerprint`] of the tracker's state.
    pub format: u32,
    /// CRC-32 of it.
    pub crc: u32,
    /// Where that is in the file, and its bytes.
    pub offset: u64,
    /// See `offset`.
    pub len: u64,
    /// Bytes of the kernel image, which follows.
    pub kernel_len: u64,
}

/// What is found in notes.
#[derive(Default)]
pub(super) struct Found {
    pub cpus: Vec<CpuState>,
    pub vmcoreinfo: Option<String>,
    pub attached: Option<Attached>,
    /// The note's version where it is not ours to read.
    pub unknown_version: Option<u32>,
}

/// Appends a note.
fn put(out: &mut Vec<u8>, name: &[u8], kind: u32, descriptor: &[u8]) {
    let pad = |out: &mut Vec<u8>| out.resize(out.len().next_multiple_of(4), 0);
    for word in [name.len() as u32 + 1, descriptor.len() as u32, kind] {
        out.extend(word.to_le_bytes());
    }
    out.extend(name);
    out.push(0);
    pad(out);
    out.extend(descriptor);
    pad(out);
}

/// The notes of a core. The length does not depend on what `attached` says.
pub(super) fn encode(
    cpus: &[(CpuState, i32)],
    vmcoreinfo: Option<&str>,
    attached: Option<&Attached>,
) -> Vec<u8> {
    let mut out = Vec::new();
    for (cpu, pid) in cpus.iter().filter(|(cpu, _)| cpu.online) {
        put(&mut out, b"CORE", NT_PRSTATUS, &prstatus::encode(cpu, *pid));
    }
    if let Some(text) = vmcoreinfo {
        put(&mut out, b"VMCOREINFO", 0, text.as_bytes());
    }
    if let Some(attached) = attached {
        let mut descriptor = Vec::with_capacity(ATTACHED);
        descriptor.extend(VERSION.to_le_bytes());
        descriptor.extend(attached.crc.to_le_bytes());
        for word in [attached.offset, attached.len, attached.kernel_len] {
            descriptor.extend(word.to_le_bytes());
        }
        descriptor.extend(attached.format.to_le_bytes());
        put(&mut out, OWNER, NT_ATTACHED, &descriptor);
    }
    out
}

/// Looks at the notes in a segment; one that does not fit ends it.
pub(super) fn decode(mut bytes: &[u8], found: &mut Found) {
    while let Some(Note { name, kind, descriptor, rest }) = next(bytes) {
        bytes = rest;
        match (name, kind) {
            (b"CORE", NT_PRSTATUS) if found.cpus.len() < MAX_CPUS => {
                found.cpus.extend(prstatus::decode(descriptor, found.cpus.len()));
            }
            (b"VMCOREINFO", _) => {
                let text = descriptor.split(|&b| b == 0).next().unwrap_or_default();
                found.vmcoreinfo = Some(String::from_utf8_lossy(text).into_owned());
            }
            (OWNER, NT_ATTACHED) if descriptor.len() >= 4 => {
                let version = le32(descriptor, 0);
                if version != VERSION || descriptor.len() != ATTACHED {
                    found.unknown_version = Some(version);
                    continue;
                }
                found.attached = Some(Attached {
                    crc: le32(descriptor, 4),
                    offset: le64(descriptor, 8),
                    len: le64(descriptor, 16),
                    kernel_len: le64(descriptor, 24),
                    format: le32(descriptor, 32),
                });
            }
            _ => {}
        }
    }
}

struct Note<'a> {
    /// Without its zero.
    name: &'a [u8],
    kind: u32,
    descriptor: &'a [u8],
    /// What follows.
    rest: &'a [u8],
}

fn next(bytes: &[u8]) -> Option<Note<'_>> {
    let header = bytes.get(..12)?;
    let (name_len, len, kind) = (le32(header, 0) as usize, le32(header, 4) as usize, le32(header, 8));
    let name_end = 12_usize.checked_add(name_len)?;
    let start = name_end.checked_next_multiple_of(4)?;
    let end = start.checked_add(len)?;
    let name = bytes.get(12..name_end)?;
    let descriptor = bytes.get(start..end)?;
    let rest = bytes.get(end.checked_next_multiple_of(4)?..).unwrap_or_default();
    Some(Note { name: name.strip_suffix(b"\0").unwrap_or(name), kind, descriptor, rest })
}
