//! The kernel's segments in guest memory, and KASLR.

use super::boot_params::Header;
use crate::arch::layout::{HIGH_RAM, MMIO_HOLE};
use crate::boot::random::random;
use crate::machine::{Config, GuestRam};
use anyhow::{Context, ensure};
use introspect::image::{KernelImage, Relocations};
use introspect::memory::{Pa, PhysicalMemory, Va};

/// `__START_KERNEL_map`: where the kernel maps physical address `phys_base` (arch/x86/include/asm/page_64_types.h).
const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// KERNEL_IMAGE_SIZE with CONFIG_RANDOMIZE_BASE: the image must end below this offset from the map's start.
const KERNEL_IMAGE_SIZE: u64 = 1 << 30;
/// Least step of the virtual address: the kernel maps itself with 2 MiB pages.
const LEAST_ALIGNMENT: u64 = 2 << 20;

/// What [`load`] did.
pub(super) struct Kernel {
    /// First address behind all that the kernel uses before it manages memory itself.
    pub end: Pa,
    /// Virtual displacement, with KASLR.
    pub slide: Option<u64>,
}

/// Copies the image to its load address and relocates it.
pub(super) fn load(ram: &GuestRam, config: &Config<'_>, header: &Header) -> anyhow::Result<Kernel> {
    let image = config.image;
    let start = image.segments.iter().map(|s| s.pa.0).min().context("The kernel has no segments")?;
    let segments_end = image.segments.iter().map(|s| s.pa.0.saturating_add(s.mem_size)).max().unwrap_or(0);
    let end = segments_end.max(start.saturating_add(header.init_size));
    let low_ram = config.mem_bytes.min(MMIO_HOLE.0);
    ensure!(start >= HIGH_RAM.0, "The kernel wants to be loaded at {:#x}, below 1 MiB", start);
    ensure!(
        end <= low_ram,
        "The kernel does not fit: it needs memory up to {} MiB, the guest has {} MiB",
        end.div_ceil(1 << 20),
        low_ram >> 20
    );
    ensure!(
        (start..segments_end).contains(&image.entry.0),
        "The kernel's entry point {} is outside of its segments",
        image.entry
    );
    for segment in &image.segments {
        ram.write(segment.pa, &image.elf[segment.file.clone()])
            .with_context(|| format!("Cannot load the kernel segment at {}", segment.pa))?;
    }
    let slide = if config.kaslr { Some(randomise(ram, config, header, segments_end)?) } else { None };
    Ok(Kernel { end: Pa(end), slide })
}

fn randomise(ram: &GuestRam, config: &Config<'_>, header: &Header, end: u64) -> anyhow::Result<u64> {
    let relocations = relocations(config.image)?;
    let slide = choose_slide(random(config.kaslr_seed)?, end, header.kernel_alignment.max(LEAST_ALIGNMENT));
    relocate(ram, relocations, slide).context("A relocation of the kernel points outside of it")?;
    Ok(slide)
}

fn relocations(image: &KernelImage) -> anyhow::Result<&Relocations> {
    image.relocations.as_ref().context("KASLR is not possible: the kernel image carries no relocations")
}

/// A displacement that is a multiple of `alignment` and leaves an image whose offsets end at `end` inside the map.
fn choose_slide(random: u64, end: u64, alignment: u64) -> u64 {
    let places = KERNEL_IMAGE_SIZE.saturating_sub(end) / alignment + 1;
    random % places * alignment
}

/// Adds `slide` to every field, as the decompressor's handle_relocations does (arch/x86/boot/compressed/misc.c).
fn relocate(ram: &GuestRam, relocations: &Relocations, slide: u64) -> anyhow::Result<()> {
    let place = |field: &Va| Pa(*field - Va(START_KERNEL_MAP));
    for field in &relocations.abs64 {
        let mut bytes = [0; 8];
        ram.read(place(field), &mut bytes)?;
        ram.write(place(field), &u64::from_le_bytes(bytes).wrapping_add(slide).to_le_bytes())?;
    }
    let add = relocations.abs32.iter().map(|field| (field, slide as u32));
    let subtract = relocations.inverse32.iter().map(|field| (field, (slide as u32).wrapping_neg()));
    for (field, delta) in add.chain(subtract) {
        let mut bytes = [0; 4];
        ram.read(place(field), &mut bytes)?;
        ram.write(place(field), &u32::from_le_bytes(bytes).wrapping_add(delta).to_le_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::layout;
    use crate::boot::random::mix;

    #[test]
    fn slides_are_aligned_and_keep_the_image_inside_the_map() {
        let end = 70 << 20;
        let slides: Vec<u64> =
            (0..10_000).map(|seed| choose_slide(mix(seed), end, LEAST_ALIGNMENT)).collect();
        assert!(slides.iter().all(|s| s % LEAST_ALIGNMENT == 0 && end + s <= KERNEL_IMAGE_SIZE));
        let distinct: std::collections::HashSet<u64> = slides.iter().copied().collect();
        assert_eq!(distinct.len() as u64, (KERNEL_IMAGE_SIZE - end) / LEAST_ALIGNMENT + 1, "all places used");
    }

    #[test]
    fn an_image_that_fills_the_map_stays_where_it_is() {
        assert_eq!(choose_slide(u64::MAX, KERNEL_IMAGE_SIZE + 1, LEAST_ALIGNMENT), 0);
    }

    #[test]
    fn each_kind_of_field_moves_its_way() {
        let ram = GuestRam::new(layout::ram(128 << 20)).unwrap();
        let field = |pa: u64| Va(START_KERNEL_MAP + pa);
        ram.write(Pa(0x100_0000), &0xffff_ffff_8100_0000_u64.to_le_bytes()).unwrap();
        ram.write(Pa(0x100_0010), &0x8100_0000_u32.to_le_bytes()).unwrap();
        ram.write(Pa(0x100_0020), &0x8200_0000_u32.to_le_bytes()).unwrap();
        let relocations = Relocations {
            abs64: vec![field(0x100_0000)],
            abs32: vec![field(0x100_0010)],
            inverse32: vec![field(0x100_0020)],
        };
        relocate(&ram, &relocations, 0x1a00_0000).unwrap();
        let word = |pa| ram.read_u64(Pa(pa)).unwrap();
        assert_eq!(word(0x100_0000), 0xffff_ffff_9b00_0000);
        assert_eq!(word(0x100_0010), 0x9b00_0000);
        assert_eq!(word(0x100_0020), 0x6800_0000);
    }
}
