//! x86-64: kernels have data symbols in kallsyms, or nothing is known of them.

use super::SymbolTable;
use crate::image::KernelImage;
use crate::types::Btf;

/// Adds what kallsyms lacks: nothing.
pub(crate) fn complete(_symbols: &mut SymbolTable, _image: &KernelImage, _types: Option<&Btf>) {}
