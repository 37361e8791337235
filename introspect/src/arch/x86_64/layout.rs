//! Where an x86-64 kernel puts things (Documentation/arch/x86/x86_64/mm.rst), ascending.

use crate::memory::Va;

/// Direct map of all RAM, 5 levels, where the kernel has no variable `page_offset_base`.
pub const DIRECT_MAP_5: Va = Va(0xff11_0000_0000_0000);
/// `struct page` array, 5 levels, where the kernel has no variable `vmemmap_base`.
pub const PAGE_STRUCTS_5: Va = Va(0xffd4_0000_0000_0000);
/// Direct map of all RAM, 4 levels, where the kernel has no variable `page_offset_base`.
pub const DIRECT_MAP_4: Va = Va(0xffff_8880_0000_0000);
/// `struct page` array, 4 levels, where the kernel has no variable `vmemmap_base`.
pub const PAGE_STRUCTS_4: Va = Va(0xffff_ea00_0000_0000);
/// The ring of the tracer: the first GiB of the hole below the kernel's text, which Linux leaves to nobody.
pub const TRACER_RING: Va = Va(0xffff_ffff_0000_0000);
/// The stubs of the tracer, in the last MiB of the hole: a jump from all of the kernel's text reaches them.
pub const TRACER_CODE: Va = Va(0xffff_ffff_7ff0_0000);
/// The backtraces that those know, some MiB below: the same GiB, which the kernel cannot write.
pub const TRACER_PATHS: Va = Va(0xffff_ffff_7f00_0000);
/// `__START_KERNEL_map`: the link address of physical address 0.
pub const KERNEL_MAP: Va = Va(0xffff_ffff_8000_0000);

/// The smallest and the largest kernel stack of any configuration, bytes (`THREAD_SIZE`: 16 KiB,
/// 32 KiB with KASAN).
pub const STACK_SIZES: std::ops::RangeInclusive<u64> = 0x2000..=0x1_0000;
