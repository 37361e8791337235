//! Direct boot of an arm64 Image (Documentation/arch/arm64/booting.rst). The kernel moves itself: with a seed in the device
//! tree to a random virtual address, which shows only once it runs.

mod fdt;
mod settle;

pub(crate) use fdt::write_tree;
pub use settle::settle;

use super::random::random;
use crate::arch::layout::{FDT_MAX, RAM};
use crate::machine::{Config, GuestRam};
use anyhow::{Context, ensure};
use introspect::image::KernelImage;
use introspect::linux::Placement;
use introspect::memory::{PAGE_SIZE, Pa, RamRange};

/// COMMAND_LINE_SIZE of arm64 (arch/arm64/include/uapi/asm/setup.h), less the NUL.
const CMDLINE_MAX: usize = 2047;

/// How the boot vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// First instruction.
    pub entry: Pa,
    /// Where the device tree is to be.
    pub fdt: Pa,
    /// Where the initramfs is.
    pub initrd: Option<RamRange>,
    /// For the kernel's KASLR.
    pub kaslr_seed: Option<u64>,
}

/// True when the kernel can be moved to a random address: every arm64 kernel may, and those that do not will not.
pub fn can_randomise(_image: &KernelImage) -> bool {
    true
}

/// Where the kernel is, for people.
pub fn describe(placement: Placement) -> String {
    let bits = placement.translation.va_bits;
    format!("{:#x} above its link address, addresses have {bits} bits", placement.slide)
}

/// Fills guest memory: kernel and initramfs. The device tree follows when the interrupt controller is known.
///
/// # Errors
/// One sentence on what does not fit: command line, initramfs or kernel.
pub fn load(ram: &GuestRam, config: &Config<'_>, _levels: u8) -> anyhow::Result<Loaded> {
    ensure!(
        config.cmdline.len() <= CMDLINE_MAX,
        "The kernel command line has {} bytes, this kernel takes {CMDLINE_MAX}",
        config.cmdline.len()
    );
    ensure!(!config.cmdline.contains('\0'), "The kernel command line contains a NUL byte");
    let image = &config.image.elf;
    let header = Header::of(image)?;
    let start = Pa(RAM.0 + header.text_offset);
    let end = start.0.saturating_add(header.image_size.max(image.len() as u64));
    let fdt = Pa(((RAM.0 + config.mem_bytes) & !(FDT_MAX - 1)) - FDT_MAX);
    ensure!(
        end <= fdt.0,
        "The kernel does not fit: it takes {} MiB, the guest has {} MiB",
        (end - RAM.0).div_ceil(1 << 20),
        config.mem_bytes >> 20
    );
    ram.write(start, image)?;
    Ok(Loaded {
        entry: start,
        fdt,
        initrd: load_initrd(ram, config, end, fdt)?,
        kaslr_seed: config.kaslr.then(|| random(config.kaslr_seed)).transpose()?,
    })
}

/// As high as possible, out of the way of what the kernel does early.
fn load_initrd(
    ram: &GuestRam,
    config: &Config<'_>,
    kernel_end: u64,
    limit: Pa,
) -> anyhow::Result<Option<RamRange>> {
    let Some(initrd) = config.initrd.as_deref().filter(|initrd| !initrd.is_empty()) else {
        return Ok(None);
    };
    let len = initrd.len() as u64;
    let start = limit.0.checked_sub(len).map(|start| start & !(PAGE_SIZE - 1));
    let start = start.filter(|&start| start >= kernel_end).with_context(|| {
        format!(
            "The initramfs does not fit: it has {} MiB, between the kernel and its limit are {} MiB",
            len >> 20,
            limit.0.saturating_sub(kernel_end) >> 20
        )
    })?;
    ram.write(Pa(start), initrd)?;
    Ok(Some(RamRange { start: Pa(start), len }))
}

/// What the head of an Image says (booting.rst, "Call the kernel image").
struct Header {
    /// From the start of RAM to the image.
    text_offset: u64,
    /// Memory that the kernel uses from there on, its .bss included.
    image_size: u64,
}

impl Header {
    fn of(image: &[u8]) -> anyhow::Result<Self> {
        const MAGIC: &[u8] = b"ARM\x64";
        let word = |at: usize| Some(u64::from_le_bytes(image.get(at..at + 8)?.try_into().ok()?));
        let is_image = image.get(56..60) == Some(MAGIC);
        let (true, Some(text_offset), Some(image_size)) = (is_image, word(8), word(16)) else {
            anyhow::bail!("The kernel is no arm64 Image");
        };
        // Before Linux 3.17 both are 0 and mean nothing, and nobody has such a kernel any more.
        ensure!(text_offset < 2 << 20, "The kernel wants to be {text_offset:#x} above the start of RAM");
        Ok(Self { text_offset, image_size })
    }
}

#[cfg(test)]
mod tests;
