//! What was recovered of a kernel image, for `kleak-vmm inspect`: one structure, as JSON and as text.

use crate::image::{Format, KernelImage};
use crate::kernel::Kernel;
use crate::symbols::{self, Derived};
use crate::types::Btf;
use crate::unwind::{HAS_TABLES, OrcTable};
use serde::Serialize;
use std::fmt;

/// Sections worth naming: what the rooms of this crate read or watch the guest rewrite.
const NOTABLE: [&str; 22] = [
    ".text",
    ".init.text",
    ".rodata",
    ".data",
    ".data..percpu",
    ".bss",
    ".brk",
    "__ksymtab",
    "__ksymtab_gpl",
    "__ex_table",
    "__bug_table",
    ".BTF",
    ".orc_header",
    ".orc_unwind",
    ".orc_unwind_ip",
    ".altinstructions",
    ".parainstructions",
    ".retpoline_sites",
    ".return_sites",
    ".call_sites",
    ".ibt_endbr_seal",
    ".smp_locks",
];

/// Everything `inspect` says of one kernel. Addresses are hexadecimal strings, sizes bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Inspection {
    /// How the file is packed: `bzImage, zstd` or `vmlinux ELF`.
    pub format: String,
    /// `uname -r`.
    pub release: String,
    /// The `Linux version ...` banner.
    pub banner: String,
    /// Physical entry point.
    pub entry: String,
    /// What is loaded.
    pub segments: Vec<SegmentPart>,
    /// KASLR relocations by kind; none in a vmlinux ELF or with CONFIG_RANDOMIZE_BASE off.
    pub relocations: Option<RelocationPart>,
    /// Symbols.
    pub symbols: SymbolPart,
    /// Symbols that no table names, and how they were found.
    pub derived: Vec<Derived>,
    /// Symbols that modules may use.
    pub exports: ExportPart,
    /// Structure layouts.
    pub types: Option<TypePart>,
    /// Stack tables.
    pub stack_tables: Option<StackPart>,
    /// Sections that matter to a tracer.
    pub sections: Vec<SectionPart>,
    /// What could not be recovered, and why.
    pub missing: Vec<String>,
}

/// A segment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SegmentPart {
    /// Link address.
    pub va: String,
    /// Physical load address.
    pub pa: String,
    /// Bytes in the image.
    pub file_bytes: u64,
    /// Bytes in memory.
    pub mem_bytes: u64,
}

/// Numbers of relocations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RelocationPart {
    /// 64-bit fields.
    pub abs64: usize,
    /// 32-bit fields.
    pub abs32: usize,
    /// 32-bit fields to subtract from.
    pub inverse32: usize,
}

/// The symbol table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SymbolPart {
    /// Where it came from.
    pub source: String,
    /// Number of symbols.
    pub count: usize,
}

/// Numbers of exports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExportPart {
    /// All.
    pub count: usize,
    /// EXPORT_SYMBOL_GPL.
    pub gpl: usize,
}

/// BTF.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TypePart {
    /// Size of the section.
    pub bytes: u64,
    /// Number of types.
    pub count: usize,
}

/// ORC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StackPart {
    /// Which encoding, by the kernels that have it.
    pub encoding: String,
    /// Number of entries.
    pub entries: usize,
}

/// A section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SectionPart {
    /// Name.
    pub name: String,
    /// Link address.
    pub va: String,
    /// Bytes in memory.
    pub bytes: u64,
}

impl Inspection {
    /// Sums up a recovered kernel.
    pub fn of(kernel: &Kernel) -> Self {
        let image = &kernel.image;
        let gpl = |gpl: bool| symbols::exports(image).filter(move |e| e.gpl == gpl).count();
        let (plain, gpl) = (gpl(false), gpl(true));
        Self {
            format: format_name(&image.format),
            release: image.release().to_owned(),
            banner: image.banner.clone(),
            entry: image.entry.to_string(),
            segments: segments(image),
            relocations: image.relocations.as_ref().map(|relocations| {
                let [abs64, abs32, inverse32] = relocations.counts();
                RelocationPart { abs64, abs32, inverse32 }
            }),
            symbols: SymbolPart { source: kernel.symbols.provenance(), count: kernel.symbols.len() },
            derived: kernel.symbols.derived().to_vec(),
            exports: ExportPart { count: plain + gpl, gpl },
            types: kernel.types.as_ref().map(|types| TypePart {
                bytes: image.section(".BTF").map_or(0, |s| s.size),
                count: types.type_count(),
            }),
            stack_tables: kernel
                .orc
                .as_ref()
                .map(|orc| StackPart { encoding: orc.encoding().to_owned(), entries: orc.len() }),
            sections: sections(image),
            missing: missing(kernel),
        }
    }
}

fn format_name(format: &Format) -> String {
    match format {
        Format::BzImage(compression) => format!("bzImage, {compression}"),
        Format::Elf => "vmlinux ELF".to_owned(),
        Format::Image(None) => "Image".to_owned(),
        Format::Image(Some(compression)) => format!("Image, {compression}"),
        Format::Zboot(compression) => format!("EFI-zboot Image, {compression}"),
    }
}

fn segments(image: &KernelImage) -> Vec<SegmentPart> {
    let part = |s: &crate::image::Segment| SegmentPart {
        va: s.va.to_string(),
        pa: s.pa.to_string(),
        file_bytes: s.file.len() as u64,
        mem_bytes: s.mem_size,
    };
    image.segments.iter().map(part).collect()
}

fn sections(image: &KernelImage) -> Vec<SectionPart> {
    let notable = NOTABLE.iter().filter_map(|name| image.section(name));
    notable.map(|s| SectionPart { name: s.name.clone(), va: s.va.to_string(), bytes: s.size }).collect()
}

/// Recovers again what is not there, for the reason.
fn missing(kernel: &Kernel) -> Vec<String> {
    let mut missing = Vec::new();
    if kernel.types.is_none()
        && let Err(error) = Btf::recover(&kernel.image)
    {
        missing.push(format!("types: {error:#}"));
    }
    if HAS_TABLES
        && kernel.orc.is_none()
        && let Err(error) = OrcTable::recover(&kernel.image, &kernel.symbols, kernel.types.as_ref())
    {
        missing.push(format!("stack tables: {error:#}"));
    }
    missing
}

impl fmt::Display for Inspection {
    /// One fact per line, its name in the first column.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "format        {}", self.format)?;
        writeln!(f, "release       {}", self.release)?;
        writeln!(f, "banner        {}", self.banner)?;
        writeln!(f, "entry         {}", self.entry)?;
        for s in &self.segments {
            let (va, pa) = (&s.va, &s.pa);
            writeln!(
                f,
                "segment       {va:<18} at {pa:<9} {:>9} bytes in the file, {:>9} in memory",
                s.file_bytes, s.mem_bytes
            )?;
        }
        match &self.relocations {
            Some(r) => writeln!(
                f,
                "relocations   {} 64-bit, {} 32-bit, {} inverse 32-bit",
                r.abs64, r.abs32, r.inverse32
            )?,
            None => writeln!(f, "relocations   none")?,
        }
        writeln!(f, "symbols       {}", self.symbols.source)?;
        for s in &self.derived {
            writeln!(f, "symbol        {:<18} {:<19} by {}", s.va.to_string(), s.name, s.how)?;
        }
        writeln!(f, "exports       {}, of them {} GPL", self.exports.count, self.exports.gpl)?;
        if let Some(types) = &self.types {
            writeln!(f, "types         BTF, {} types in {} bytes", types.count, types.bytes)?;
        }
        if let Some(tables) = &self.stack_tables {
            writeln!(f, "stack tables  ORC, {} entries, encoding of {}", tables.entries, tables.encoding)?;
        }
        if !HAS_TABLES {
            writeln!(f, "stacks        along frame pointers")?;
        }
        for s in &self.sections {
            writeln!(f, "section       {:<18} {:<18} {:>9} bytes", s.name, s.va, s.bytes)?;
        }
        self.missing.iter().try_for_each(|what| writeln!(f, "missing       {what}"))
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::image::synthetic::{self, BANNER, BASE, Block};
    use crate::memory::Va;
    use crate::symbols::{Symbol, encoder};

    fn inspection() -> Inspection {
        let symbols = [("_stext", 0), ("kfree", 0x40)].map(|(name, at)| Symbol {
            va: Va(BASE + at),
            kind: 'T',
            name: name.into(),
        });
        let blocks = [
            Block { name: ".text", at: 0, bytes: vec![0x90; 0x100] },
            Block { name: ".rodata", at: 0x1000, bytes: encoder::tables(&symbols, BASE) },
        ];
        let mut payload = synthetic::vmlinux(&blocks);
        payload.extend(synthetic::relocation_words(&[0x8100_0010], Some(&[]), &[0x8100_0020, 0x8100_0028]));
        let image = KernelImage::parse(&synthetic::bzimage(&synthetic::pack("lz4", &payload), 4)).unwrap();
        Inspection::of(&Kernel::recover(image).unwrap())
    }

    #[test]
    fn text_has_a_fact_per_line() {
        let text = inspection().to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[..4],
            [
                "format        bzImage, lz4",
                "release       6.1.0-test-amd64",
                &format!("banner        {BANNER}"),
                "entry         0x1000000",
            ]
        );
        for line in [
            "segment       0x0                at 0x1800000        64 bytes in the file,        64 in memory",
            "relocations   1 64-bit, 2 32-bit, 0 inverse 32-bit",
            "symbols       kallsyms, layout B, 2 symbols",
            "exports       0, of them 0 GPL",
            "section       .text              0xffffffff81000000       256 bytes",
        ] {
            assert!(lines.contains(&line), "{line} not in\n{text}");
        }
        assert!(lines.iter().any(|l| l.starts_with("missing       types: ")), "{text}");
        assert!(lines.iter().any(|l| l.starts_with("missing       stack tables: ")), "{text}");
    }

    #[test]
    fn json_has_the_same_facts() {
        let json = serde_json::to_value(inspection()).unwrap();
        assert_eq!(json["relocations"]["abs32"], 2);
        assert_eq!(json["symbols"]["count"], 2);
        assert_eq!(json["segments"][0]["va"], "0xffffffff81000000");
        assert_eq!(
            (&json["types"], &json["stack_tables"]),
            (&serde_json::Value::Null, &serde_json::Value::Null)
        );
        assert_eq!(json["missing"].as_array().map(Vec::len), Some(2));
    }
}
