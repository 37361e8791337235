//! The vmlinux ELF: program headers and named sections (System V gABI, chapters 4 and 5).

use super::{Section, Segment};
use crate::memory::{Pa, Va};
use anyhow::{Context, bail, ensure};
use std::ops::Range;

const CLASS_64: u8 = 2;
const DATA_LITTLE: u8 = 1;
const HEADER_BYTES: usize = 64;
const SEGMENT_ENTRY: usize = 56;
const SECTION_ENTRY: usize = 64;

const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const SHT_NOBITS: u32 = 8;
const SHN_XINDEX: u16 = 0xffff;

/// What was read of an ELF file.
pub(super) struct Elf {
    /// PT_LOAD segments in file order.
    pub segments: Vec<Segment>,
    /// Sections, the null section left out.
    pub sections: Vec<Section>,
    /// `e_entry`; on x86-64 kernels a physical address.
    pub entry: Pa,
    /// First byte behind all headers, segments and sections.
    pub file_end: usize,
}

/// True when `bytes` begin with the ELF magic.
pub(super) fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF")
}

impl Elf {
    /// Reads a 64-bit x86 ELF executable.
    pub(super) fn parse(bytes: &[u8]) -> anyhow::Result<Self> {
        let file = File(bytes);
        file.check_kind()?;
        let mut end = HEADER_BYTES;
        let segments = file.segments(&mut end)?;
        let sections = file.sections(&mut end)?;
        ensure!(!segments.is_empty(), "The ELF has no loadable segment");
        Ok(Self { segments, sections, entry: Pa(file.u64(24)?), file_end: end })
    }
}

struct File<'a>(&'a [u8]);

impl File<'_> {
    fn check_kind(&self) -> anyhow::Result<()> {
        ensure!(
            self.0.len() >= HEADER_BYTES,
            "The ELF is truncated: it has {} bytes, less than its header",
            self.0.len()
        );
        let machine = self.u16(18)?;
        if machine != EM_X86_64 || self.0[4] != CLASS_64 || self.0[5] != DATA_LITTLE {
            bail!(wrong_machine(machine));
        }
        let kind = self.u16(16)?;
        ensure!(
            kind == ET_EXEC || kind == ET_DYN,
            "The ELF is of type {kind} (an object file, module or core dump), not an executable kernel"
        );
        Ok(())
    }

    fn segments(&self, end: &mut usize) -> anyhow::Result<Vec<Segment>> {
        let (at, size, count) = (self.u64(32)?, self.u16(54)?, self.u16(56)?);
        let table = self.table("program headers", at, size.into(), count.into(), SEGMENT_ENTRY)?;
        *end = (*end).max(table.end);
        let mut segments = Vec::new();
        for entry in table.step_by(usize::from(size).max(1)) {
            if self.u32(entry)? != PT_LOAD {
                continue;
            }
            let (file_size, mem_size) = (self.u64(entry + 32)?, self.u64(entry + 40)?);
            let va = Va(self.u64(entry + 16)?);
            let pa = Pa(self.u64(entry + 24)?);
            let file = self.range("segment", self.u64(entry + 8)?, file_size)?;
            ensure!(
                mem_size >= file_size,
                "The ELF segment at {va} has more bytes in the file than in memory"
            );
            ensure!(
                va.0.checked_add(mem_size).is_some() && pa.0.checked_add(mem_size).is_some(),
                "The ELF segment at {va} ({mem_size:#x} bytes) wraps around the address space"
            );
            *end = (*end).max(file.end);
            segments.push(Segment { va, pa, file, mem_size });
        }
        Ok(segments)
    }

    fn sections(&self, end: &mut usize) -> anyhow::Result<Vec<Section>> {
        let (at, size, mut count) = (self.u64(40)?, self.u16(58)?, u64::from(self.u16(60)?));
        let mut names_index = u32::from(self.u16(62)?);
        if at == 0 {
            return Ok(Vec::new());
        }
        // A vmlinux built with -ffunction-sections may have more sections than 16 bits count:
        // then the null section's sh_size and sh_link hold the numbers.
        let null = self.table("section headers", at, size.into(), 1, SECTION_ENTRY)?.start;
        if count == 0 {
            count = self.u64(null + 32)?;
        }
        if names_index == u32::from(SHN_XINDEX) {
            names_index = self.u32(null + 40)?;
        }
        let table = self.table("section headers", at, size.into(), count, SECTION_ENTRY)?;
        *end = (*end).max(table.end);
        let names = self.names(table.clone(), size.into(), names_index)?;
        let mut sections = Vec::new();
        for entry in table.step_by(usize::from(size).max(1)).skip(1) {
            let section_size = self.u64(entry + 32)?;
            let file = if self.u32(entry + 4)? == SHT_NOBITS {
                0..0
            } else {
                self.range("section", self.u64(entry + 24)?, section_size)?
            };
            *end = (*end).max(file.end);
            let name = c_string(names, self.u32(entry)? as usize);
            sections.push(Section { name, va: Va(self.u64(entry + 16)?), file, size: section_size });
        }
        Ok(sections)
    }

    /// The section name string table.
    fn names(&self, table: Range<usize>, entry_size: usize, index: u32) -> anyhow::Result<&[u8]> {
        let entry = table.start + entry_size * index as usize;
        ensure!(entry < table.end, "The ELF's section names are in section {index}, which does not exist");
        let range = self.range("section name table", self.u64(entry + 24)?, self.u64(entry + 32)?)?;
        Ok(&self.0[range])
    }

    fn table(
        &self,
        what: &str,
        at: u64,
        size: u64,
        count: u64,
        least: usize,
    ) -> anyhow::Result<Range<usize>> {
        ensure!(
            count == 0 || size >= least as u64,
            "The ELF's {what} have {size} bytes each, {least} are needed"
        );
        let bytes = size.checked_mul(count).with_context(|| format!("The ELF has {count} {what}"))?;
        self.range(what, at, bytes)
    }

    fn range(&self, what: &str, at: u64, size: u64) -> anyhow::Result<Range<usize>> {
        match at.checked_add(size) {
            Some(end) if end <= self.0.len() as u64 => Ok(at as usize..end as usize),
            _ => bail!(
                "The ELF is truncated at {:#x}: it says {what} of {size:#x} bytes at {at:#x}",
                self.0.len()
            ),
        }
    }

    fn u16(&self, at: usize) -> anyhow::Result<u16> {
        self.array(at).map(u16::from_le_bytes)
    }

    fn u32(&self, at: usize) -> anyhow::Result<u32> {
        self.array(at).map(u32::from_le_bytes)
    }

    fn u64(&self, at: usize) -> anyhow::Result<u64> {
        self.array(at).map(u64::from_le_bytes)
    }

    fn array<const N: usize>(&self, at: usize) -> anyhow::Result<[u8; N]> {
        let range = self.range("field", at as u64, N as u64)?;
        Ok(self.0[range].try_into()?)
    }
}

/// The NUL-terminated string at `at`; empty outside the table.
fn c_string(table: &[u8], at: usize) -> String {
    let rest = table.get(at..).unwrap_or_default();
    let name = rest.split(|&b| b == 0).next().unwrap_or_default();
    String::from_utf8_lossy(name).into_owned()
}

/// The sentence for an ELF that is not for 64-bit x86.
fn wrong_machine(machine: u16) -> String {
    match machine {
        183 => "It is an arm64 ELF; arm64 kernels need an arm64 host".into(),
        3 => "It is a 32-bit x86 ELF; only 64-bit kernels can be run".into(),
        EM_X86_64 => "It is an x32 or big-endian ELF, not a 64-bit x86 kernel".into(),
        other => {
            let name = match other {
                8 => "MIPS",
                20 | 21 => "PowerPC",
                22 => "s390",
                40 => "32-bit ARM",
                243 => "RISC-V",
                258 => "LoongArch",
                _ => return format!("It is an ELF for machine {other}, not for 64-bit x86"),
            };
            format!("It is an ELF for {name}, not for 64-bit x86")
        }
    }
}
