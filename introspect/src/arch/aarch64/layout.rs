//! Where an arm64 kernel puts things (Documentation/arch/arm64/memory.rst, arch/arm64/include/asm/memory.h), ascending.

use crate::memory::Va;

/// First address of kernel virtual addresses of `va_bits` (`_PAGE_OFFSET`): the linear map starts here.
pub const fn page_offset(va_bits: u32) -> Va {
    Va(u64::MAX << va_bits)
}

/// The linear map is the lower half of the kernel's addresses; modules, the image and vmalloc are above (`_PAGE_END`). An
/// image for 52 bits has them where one for 48 bits has.
pub const fn page_end(va_bits: u32) -> Va {
    let va_bits = if va_bits > MIN_VA_BITS { MIN_VA_BITS } else { va_bits };
    Va(u64::MAX << (va_bits - 1))
}

/// `VA_BITS_MIN` where the image is for more.
pub const MIN_VA_BITS: u32 = 48;
/// `STRUCT_PAGE_MAX_SHIFT`: `struct page` takes 64 bytes.
pub const PAGE_STRUCT_SHIFT: u32 = 6;

/// The smallest and the largest kernel stack of any configuration, bytes (`THREAD_SIZE`: 16 KiB, 32 KiB with KASAN, or a page
/// of 64 KiB).
pub const STACK_SIZES: std::ops::RangeInclusive<u64> = 0x2000..=0x2_0000;
