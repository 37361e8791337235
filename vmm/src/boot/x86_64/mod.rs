//! Direct 64-bit boot of an x86-64 vmlinux (Documentation/arch/x86/boot.rst): the host does the decompressor's work,
//! KASLR included, and enters the kernel proper.

mod acpi;
mod boot_params;
mod kernel;
mod tables;

use crate::arch::layout::{ACPI, CMDLINE, CMDLINE_LEN, GDT, MMIO_HOLE, PAGE_TABLES, RESET_VECTOR, ZERO_PAGE};
use crate::arch::{Hardware, Platform};
use crate::machine::{Config, GuestRam};
use anyhow::{Context, ensure};
use boot_params::Header;
use introspect::image::KernelImage;
use introspect::kernel::Kernel;
use introspect::linux::Placement;
use introspect::memory::{PAGE_SIZE, Pa, RamRange};
use kvm_ioctls::VcpuFd;

/// How the boot vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// First instruction.
    pub entry: Pa,
    /// `struct boot_params`, for RSI.
    pub boot_params: Pa,
    /// Identity-mapped page tables.
    pub page_tables: Pa,
    /// Descriptor table and its limit.
    pub gdt: Pa,
    /// See `gdt`.
    pub gdt_limit: u16,
    /// Selectors that the boot protocol names.
    pub code_selector: u16,
    /// See `code_selector`.
    pub data_selector: u16,
    /// Where the kernel is.
    pub placement: Placement,
}

/// True when the kernel can be moved to a random address: a vmlinux has no relocations and stays where it is linked.
pub fn can_randomise(image: &KernelImage) -> bool {
    image.relocations.is_some()
}

/// Where the kernel is, for people.
pub fn describe(placement: Placement) -> String {
    format!("{:#x} above its link address, {} levels of page tables", placement.slide, placement.levels)
}

/// Fills guest memory: kernel, initramfs, command line, tables with 4 or 5 `levels`.
///
/// # Errors
/// One sentence on what does not fit: command line, initramfs, kernel, or KASLR without relocations.
pub fn load(ram: &GuestRam, config: &Config<'_>, levels: u8) -> anyhow::Result<Loaded> {
    let header = Header::of(config.image);
    let kernel = kernel::load(ram, config, &header)?;
    let initrd = load_initrd(ram, config, &header, kernel.end)?;
    load_cmdline(ram, &config.cmdline, &header)?;
    let tables = acpi::tables(Hardware::of(&config.cmdline), config.cpus as u8, config.disks.len());
    ensure!(tables.len() as u64 <= RESET_VECTOR - ACPI, "The ACPI tables take {} bytes", tables.len());
    ram.write(ACPI, &tables)?;
    ram.write(RESET_VECTOR, &tables::reset_code())?;
    let zero_page = boot_params::zero_page(ram, &header, initrd, kernel.slide.is_some());
    ram.write(ZERO_PAGE, &zero_page)?;
    ram.write(GDT, &tables::gdt())?;
    ram.write(PAGE_TABLES, &tables::identity_map(levels))?;
    Ok(Loaded {
        entry: config.image.entry,
        boot_params: ZERO_PAGE,
        page_tables: PAGE_TABLES,
        gdt: GDT,
        gdt_limit: tables::GDT_LIMIT,
        code_selector: tables::CODE,
        data_selector: tables::DATA,
        // The image always is where it is linked to be loaded: only its virtual address moves.
        placement: Placement { slide: kernel.slide.unwrap_or(0), phys_base: 0, levels },
    })
}

/// Where the kernel is: where it was put.
///
/// # Errors
/// None here.
pub fn settle(
    _boot: &mut VcpuFd,
    _platform: &Platform,
    _ram: &GuestRam,
    loaded: &Loaded,
    _kernel: &Kernel,
) -> anyhow::Result<Placement> {
    Ok(loaded.placement)
}

/// As high as the kernel takes it, out of the way of what it does early.
fn load_initrd(
    ram: &GuestRam,
    config: &Config<'_>,
    header: &Header,
    kernel_end: Pa,
) -> anyhow::Result<Option<RamRange>> {
    let Some(initrd) = config.initrd.as_deref().filter(|initrd| !initrd.is_empty()) else {
        return Ok(None);
    };
    let len = initrd.len() as u64;
    let top = (config.mem_bytes & !(PAGE_SIZE - 1)).min(MMIO_HOLE.0).min(header.initrd_addr_max + 1);
    let start = top.checked_sub(len).map(|start| start & !(PAGE_SIZE - 1));
    let start = start.filter(|&start| start >= kernel_end.0).with_context(|| {
        format!(
            "The initramfs does not fit: it has {} MiB, between the kernel and its limit are {} MiB",
            len >> 20,
            top.saturating_sub(kernel_end.0) >> 20
        )
    })?;
    ram.write(Pa(start), initrd)?;
    Ok(Some(RamRange { start: Pa(start), len }))
}

fn load_cmdline(ram: &GuestRam, cmdline: &str, header: &Header) -> anyhow::Result<()> {
    let limit = header.cmdline_size.min(CMDLINE_LEN - 1);
    ensure!(
        cmdline.len() as u64 <= limit,
        "The kernel command line has {} bytes, this kernel takes {limit}",
        cmdline.len()
    );
    ensure!(!cmdline.contains('\0'), "The kernel command line contains a NUL byte");
    ram.write(CMDLINE, cmdline.as_bytes())?;
    Ok(())
}

#[cfg(test)]
mod tests;
