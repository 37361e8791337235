//! What a kernel says of itself in VMCOREINFO (Documentation/admin-guide/kdump/vmcoreinfo.rst): lines `NAME=VALUE`.

use crate::linux::Placement;
use anyhow::Context;

/// Where that kernel was put.
///
/// # Errors
/// A line that is needed is missing or no number.
pub fn placement(vmcoreinfo: &str) -> anyhow::Result<Placement> {
    let value = |name: &str| {
        vmcoreinfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).map(str::trim)
    };
    // Kernels that cannot be moved have no such line.
    let slide = match value("KERNELOFFSET") {
        Some(text) => u64::from_str_radix(text, 16).with_context(|| format!("KERNELOFFSET is {text:?}"))?,
        None => 0,
    };
    let base = value("NUMBER(phys_base)").context("It does not say phys_base")?;
    let base: i64 = base.parse().with_context(|| format!("phys_base is {base:?}"))?;
    let levels = if value("NUMBER(pgtable_l5_enabled)") == Some("1") { 5 } else { 4 };
    Ok(Placement { slide, phys_base: slide.wrapping_add(base as u64), levels })
}
