//! Everything recovered from one kernel image.

use crate::callee_saved::CalleeSaved;
use crate::image::KernelImage;
use crate::symbols::{self, SymbolTable};
use crate::types::Btf;
use crate::unwind::OrcTable;
use std::path::Path;

/// The static half of what is known of a guest.
pub struct Kernel {
    /// Unpacked image.
    pub image: KernelImage,
    /// Symbols, link addresses.
    pub symbols: SymbolTable,
    /// Structure layouts; kernels without BTF have none.
    pub types: Option<Btf>,
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

    /// Recovers symbols, types and stack tables.
    ///
    /// # Errors
    /// No symbols found.
    pub fn recover(image: KernelImage) -> anyhow::Result<Self> {
        let mut symbols = SymbolTable::recover(&image)?;
        let types = Btf::recover(&image).ok();
        symbols::complete(&mut symbols, &image, types.as_ref());
        let orc = OrcTable::recover(&image, &symbols, types.as_ref()).ok();
        Ok(Self { image, symbols, types, orc, callee_saved: CalleeSaved::default() })
    }
}
