//! Everything recovered from one kernel image.

use crate::callee_saved::CalleeSaved;
use crate::image::KernelImage;
use crate::symbols::{self, SymbolTable};
use crate::types::Btf;
use crate::unwind::OrcTable;
use anyhow::{bail, ensure};
use std::path::Path;

/// The static half of what is known of a guest.
pub struct Kernel {
    /// Unpacked image.
    pub image: KernelImage,
    /// Symbols, link addresses.
    pub symbols: SymbolTable,
    /// Structure layouts; kernels without BTF have none, unless a file had them.
    pub types: Option<Btf>,
    /// That file, as it is.
    pub types_file: Option<Vec<u8>>,
    /// Stack tables; frame-pointer kernels have none.
    pub orc: Option<OrcTable>,
    /// What is known of its functions' saved registers.
    pub callee_saved: CalleeSaved,
}

impl Kernel {
    /// Opens an image and recovers all that it holds.
    ///
    /// # Errors
    /// Unreadable or unknown image, or no symbols in it.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let image = KernelImage::open(path)?;
        Self::recover(image)
    }

    /// Whether it was built for five levels of page tables, too (CONFIG_X86_5LEVEL; since 6.17 every kernel is):
    /// arch/x86/kernel/head64.c keeps what it started with.
    pub fn takes_five_levels(&self) -> bool {
        self.symbols.lookup("__pgtable_l5_enabled").is_some()
    }

    /// Recovers symbols, types and stack tables.
    ///
    /// # Errors
    /// No symbols found.
    pub fn recover(image: KernelImage) -> anyhow::Result<Self> {
        Self::recover_with(image, None)
    }

    /// The same with structure layouts from a file, for a kernel that was built without CONFIG_DEBUG_INFO_BTF: what
    /// `pahole --btf_encode_detached FILE vmlinux` writes, or a vmlinux with a section `.BTF`.
    ///
    /// # Errors
    /// As [`Self::recover`]; or the file has no types, or those of another kernel.
    pub fn recover_with(image: KernelImage, types_file: Option<Vec<u8>>) -> anyhow::Result<Self> {
        let mut symbols = SymbolTable::recover(&image)?;
        let types = match &types_file {
            Some(bytes) => Some(types_of_file(bytes, &image, &symbols)?),
            None => Btf::recover(&image).ok(),
        };
        symbols::complete(&mut symbols, &image, types.as_ref());
        let orc = OrcTable::recover(&image, &symbols, types.as_ref()).ok();
        Ok(Self { image, symbols, types, types_file, orc, callee_saved: CalleeSaved::default() })
    }
}

/// The types in a file; that they are this kernel's is told by its banner, or by where its per-CPU variables are.
fn types_of_file(bytes: &[u8], image: &KernelImage, symbols: &SymbolTable) -> anyhow::Result<Btf> {
    if !bytes.starts_with(b"\x7fELF") {
        let types = Btf::parse(bytes)?;
        return match misplaced(&types, symbols) {
            Some(name) => {
                bail!("They are of another kernel: the per-CPU variable {name} is elsewhere in this one")
            }
            None => Ok(types),
        };
    }
    let vmlinux = KernelImage::parse(bytes)?;
    ensure!(vmlinux.banner == image.banner, "They are of another kernel: {}", vmlinux.banner);
    Btf::recover(&vmlinux)
}

/// A per-CPU variable that is not where the types say.
fn misplaced<'t>(types: &'t Btf, symbols: &SymbolTable) -> Option<&'t str> {
    let start = symbols.lookup("__per_cpu_start")?;
    let there = |(name, offset): &(&str, u64)| {
        let mut places = symbols.lookup_all(name).map(|symbol| symbol.va - start).peekable();
        places.peek().is_none() || places.any(|place| place == *offset)
    };
    types.percpu_variables().find(|variable| !there(variable)).map(|(name, _)| name)
}
