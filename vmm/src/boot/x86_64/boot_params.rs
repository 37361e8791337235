//! The zero page, `struct boot_params` (Documentation/arch/x86/zero-page.rst, arch/x86/include/uapi/asm/bootparam.h).

use crate::arch::layout::{ACPI, CMDLINE, HIGH_RAM, LOW_RAM_END};
use crate::machine::GuestRam;
use introspect::image::KernelImage;
use introspect::memory::{PAGE_SIZE, Pa, PhysicalMemory, RamRange};

const ACPI_RSDP_ADDR: usize = 0x70;
const EXT_RAMDISK_IMAGE: usize = 0xc0;
const EXT_RAMDISK_SIZE: usize = 0xc4;
const E820_ENTRIES: usize = 0x1e8;
const SETUP_HEADER: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
/// Offset of the header's end from [`HEADER_MAGIC`] (the jump over it at 0x200).
const JUMP_OFFSET: usize = 0x201;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;
const INITRD_ADDR_MAX: usize = 0x22c;
const KERNEL_ALIGNMENT: usize = 0x230;
const CMDLINE_SIZE: usize = 0x238;
const INIT_SIZE: usize = 0x260;
/// Highest end of a setup header: what follows in the zero page is not the header's.
const HEADER_LIMIT: usize = 0x290;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY: usize = 20;

/// Loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
const LOADED_HIGH: u8 = 1;
/// Says that the kernel was moved, so that it randomises its memory map as well.
const KASLR_FLAG: u8 = 1 << 1;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// What the kernel's setup header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    /// The header, from [`SETUP_HEADER`] on.
    bytes: Vec<u8>,
    /// Highest address of an initramfs byte.
    pub initrd_addr_max: u64,
    /// Longest command line, bytes.
    pub cmdline_size: u64,
    /// Alignment of the kernel, 0 when unknown.
    pub kernel_alignment: u64,
    /// Memory the kernel needs from its load address on, 0 when unknown.
    pub init_size: u64,
}

impl Header {
    /// The header of a bzImage, or for a vmlinux the one that any bzImage of today has.
    pub fn of(image: &KernelImage) -> Self {
        Self::parse(image.setup()).unwrap_or_else(|| {
            let mut bytes = vec![0; HEADER_LIMIT - SETUP_HEADER];
            let mut put = |at: usize, value: &[u8]| {
                bytes[at - SETUP_HEADER..at - SETUP_HEADER + value.len()].copy_from_slice(value);
            };
            put(BOOT_FLAG, &[0x55, 0xaa]);
            put(HEADER_MAGIC, b"HdrS");
            // Protocol 2.15 (Linux 5.5), the newest so far.
            put(VERSION, &0x20f_u16.to_le_bytes());
            put(LOADFLAGS, &[LOADED_HIGH]);
            Self {
                bytes,
                initrd_addr_max: 0x7fff_ffff,
                cmdline_size: 2047,
                kernel_alignment: 0,
                init_size: 0,
            }
        })
    }

    fn parse(setup: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u64::from(u32::from_le_bytes(setup.get(at..at + 4)?.try_into().ok()?)));
        if setup.get(HEADER_MAGIC..HEADER_MAGIC + 4)? != b"HdrS" {
            return None;
        }
        let end = (HEADER_MAGIC + usize::from(*setup.get(JUMP_OFFSET)?)).min(HEADER_LIMIT);
        Some(Self {
            bytes: setup.get(SETUP_HEADER..end)?.to_vec(),
            initrd_addr_max: word(INITRD_ADDR_MAX)?,
            cmdline_size: word(CMDLINE_SIZE)?,
            kernel_alignment: word(KERNEL_ALIGNMENT)?,
            init_size: word(INIT_SIZE)?,
        })
    }
}

/// The page for a guest with this RAM and initramfs.
pub(super) fn zero_page(ram: &GuestRam, header: &Header, initrd: Option<RamRange>, kaslr: bool) -> Vec<u8> {
    let mut page = vec![0; PAGE_SIZE as usize];
    page[SETUP_HEADER..SETUP_HEADER + header.bytes.len()].copy_from_slice(&header.bytes);
    page[TYPE_OF_LOADER] = LOADER_UNDEFINED;
    page[LOADFLAGS] |= LOADED_HIGH;
    page[LOADFLAGS] &= !KASLR_FLAG;
    if kaslr {
        page[LOADFLAGS] |= KASLR_FLAG;
    }
    let mut put = |at: usize, value: &[u8]| page[at..at + value.len()].copy_from_slice(value);
    put(CMD_LINE_PTR, &(CMDLINE.0 as u32).to_le_bytes());
    put(ACPI_RSDP_ADDR, &ACPI.0.to_le_bytes());
    if let Some(initrd) = initrd {
        let (start, len) = (initrd.start.0, initrd.len);
        put(RAMDISK_IMAGE, &(start as u32).to_le_bytes());
        put(EXT_RAMDISK_IMAGE, &((start >> 32) as u32).to_le_bytes());
        put(RAMDISK_SIZE, &(len as u32).to_le_bytes());
        put(EXT_RAMDISK_SIZE, &((len >> 32) as u32).to_le_bytes());
    }
    let map = e820(ram.ranges());
    put(E820_ENTRIES, &[map.len() as u8]);
    for (k, (range, kind)) in map.iter().enumerate() {
        let at = E820_TABLE + k * E820_ENTRY;
        put(at, &range.start.0.to_le_bytes());
        put(at + 8, &range.len.to_le_bytes());
        put(at + 16, &kind.to_le_bytes());
    }
    page
}

/// The memory map: RAM, less the legacy hole in its first range, where the ACPI tables are.
fn e820(ram: &[RamRange]) -> Vec<(RamRange, u32)> {
    let range = |start: Pa, end: Pa| RamRange { start, len: end - start };
    let mut map = vec![(range(Pa(0), LOW_RAM_END), E820_RAM), (range(LOW_RAM_END, HIGH_RAM), E820_RESERVED)];
    for (k, r) in ram.iter().enumerate() {
        let start = if k == 0 { HIGH_RAM } else { r.start };
        map.push((range(start, r.start + r.len), E820_RAM));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::layout;

    fn setup() -> Vec<u8> {
        let mut setup = vec![0xee; 4096];
        setup[JUMP_OFFSET] = 0x6a;
        setup[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        setup[LOADFLAGS] = KASLR_FLAG;
        setup[CMDLINE_SIZE..CMDLINE_SIZE + 4].copy_from_slice(&2047_u32.to_le_bytes());
        setup
    }

    fn word(page: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(page[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn only_the_header_is_taken_from_the_image() {
        let ram = GuestRam::new(layout::ram(128 << 20)).unwrap();
        let page = zero_page(&ram, &Header::parse(&setup()).unwrap(), None, false);
        assert_eq!(page[SETUP_HEADER - 2], 0, "the sentinel stays clear");
        assert_eq!(page[HEADER_MAGIC + 0x6a], 0, "nothing behind the header");
        assert_eq!(page[HEADER_MAGIC + 0x69], 0xee);
        assert_eq!(page[LOADFLAGS], LOADED_HIGH);
    }

    #[test]
    fn a_moved_kernel_is_told_so() {
        let ram = GuestRam::new(layout::ram(128 << 20)).unwrap();
        let page = zero_page(&ram, &Header::parse(&setup()).unwrap(), None, true);
        assert_eq!(page[LOADFLAGS], LOADED_HIGH | KASLR_FLAG);
    }

    #[test]
    fn the_memory_map_covers_ram_on_both_sides_of_the_holes() {
        let map = e820(&layout::ram(8 << 30));
        let ram: Vec<(u64, u64)> =
            map.iter().filter(|(_, kind)| *kind == E820_RAM).map(|(r, _)| (r.start.0, r.len)).collect();
        assert_eq!(
            ram,
            [(0, 0x9_fc00), (0x10_0000, 0xc000_0000 - 0x10_0000), (0x1_0000_0000, (8 << 30) - 0xc000_0000)]
        );
    }

    #[test]
    fn an_initramfs_is_named() {
        let ram = GuestRam::new(layout::ram(128 << 20)).unwrap();
        let initrd = RamRange { start: Pa(0x700_0000), len: 0x1234 };
        let page = zero_page(&ram, &Header::parse(&setup()).unwrap(), Some(initrd), false);
        assert_eq!(word(&page, RAMDISK_IMAGE), 0x1234 << 32 | 0x700_0000);
        assert_eq!(word(&page, ACPI_RSDP_ADDR), ACPI.0);
    }

    #[test]
    fn a_cut_header_is_none() {
        let setup = setup();
        for len in 0..INIT_SIZE + 4 {
            assert_eq!(Header::parse(&setup[..len]), None, "{len}");
        }
    }
}
