//! Names to addresses and offsets, with errors that say what is missing.

use super::platform::{Placement, percpu_slide};
use crate::image::KernelImage;
use crate::kernel::Kernel;
use crate::memory::Va;
use crate::symbols::SymbolTable;
use crate::types::{Btf, Field};
use anyhow::Context;

/// What [`super::Linux::new`] looks its layout up in.
pub(super) struct Lookup<'a> {
    pub image: &'a KernelImage,
    pub types: &'a Btf,
    pub symbols: &'a SymbolTable,
    slide: u64,
    percpu_slide: u64,
}

impl<'a> Lookup<'a> {
    pub fn new(kernel: &'a Kernel, placement: Placement) -> anyhow::Result<Self> {
        let types = kernel.types.as_ref().context(
            "The kernel image has no BTF, so its structures cannot be read without a file of types",
        )?;
        let percpu_slide = percpu_slide(placement);
        Ok(Self {
            image: &kernel.image,
            types,
            symbols: &kernel.symbols,
            slide: placement.slide,
            percpu_slide,
        })
    }

    /// Run-time address of a symbol that only some kernels have.
    pub fn symbol_if_any(&self, name: &str) -> Option<Va> {
        self.symbols.lookup(name).map(|va| va + self.slide)
    }

    /// Run-time address of a symbol.
    pub fn symbol(&self, name: &str) -> anyhow::Result<Va> {
        self.symbol_if_any(name).with_context(|| format!("The kernel image has no symbol {name}"))
    }

    /// Link address of a symbol, and its size.
    pub fn link(&self, name: &str) -> Option<(Va, u64)> {
        Some((self.symbols.lookup(name)?, self.symbols.size(name)?))
    }

    /// Distance of a variable from each CPU's `__per_cpu_offset`; None when the kernel has no such variable.
    pub fn percpu_if_any(&self, name: &str) -> Option<u64> {
        let symbol = |name| self.symbols.lookup(name).map(|va| va.0 + self.percpu_slide);
        symbol(name).or_else(|| {
            // BTF counts from the start of the section, which is linked at 0 where nothing else is said.
            let start = symbol("__per_cpu_start").unwrap_or(self.percpu_slide);
            self.types.percpu_offset(name).map(|offset| start + offset)
        })
    }

    /// Offset of a variable in each CPU's area.
    pub fn percpu(&self, name: &str) -> anyhow::Result<u64> {
        self.percpu_if_any(name).with_context(|| format!("The kernel image has no per-CPU variable {name}"))
    }

    /// A member.
    pub fn field(&self, structure: &str, path: &str) -> anyhow::Result<Field> {
        self.types
            .field(structure, path)
            .with_context(|| format!("The kernel's BTF has no member {path} in struct {structure}"))
    }

    /// Offset of a member.
    pub fn offset(&self, structure: &str, path: &str) -> anyhow::Result<u64> {
        self.field(structure, path).map(|f| f.offset)
    }

    /// Size of a structure.
    pub fn size_of(&self, structure: &str) -> anyhow::Result<u64> {
        self.types.size_of(structure).with_context(|| format!("The kernel's BTF has no struct {structure}"))
    }

    /// An enumerator.
    pub fn enumerator(&self, name: &str) -> anyhow::Result<u64> {
        let value = self
            .types
            .enumerator(name)
            .with_context(|| format!("The kernel's BTF has no enumerator {name}"))?;
        u64::try_from(value).with_context(|| format!("The kernel's enumerator {name} is negative: {value}"))
    }
}
