//! Descriptor table and page tables of the first instructions, which the kernel replaces at once; code at the reset
//! vector.

use crate::arch::layout::{PAGE_TABLES, PAGE_TABLES_LEN, RESET, RESET_VALUE};

/// `__BOOT_CS` and `__BOOT_DS` of the boot protocol.
pub(super) const CODE: u16 = 0x10;
/// See [`CODE`].
pub(super) const DATA: u16 = 0x18;
/// Limit of the table of four descriptors.
pub(super) const GDT_LIMIT: u16 = 4 * 8 - 1;

/// Null, unused, flat 64-bit code, flat data (Intel SDM volume 3, 3.4.5).
pub(super) fn gdt() -> Vec<u8> {
    const DESCRIPTORS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    DESCRIPTORS.iter().flat_map(|d| d.to_le_bytes()).collect()
}

/// 4 GiB mapped to themselves in 2 MiB pages (Intel SDM volume 3, 4.5): all of the kernel, the initramfs, the tables.
pub(super) fn identity_map(levels: u8) -> Vec<u8> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    const ENTRIES: usize = 512;
    let table = |index: usize| PAGE_TABLES.0 + index as u64 * 0x1000;
    let mut entries = vec![0; (PAGE_TABLES_LEN / 8) as usize];
    // One table of each level above the one whose entries stand for 1 GiB.
    let middle = usize::from(levels) - 3;
    for level in 0..middle {
        entries[level * ENTRIES] = table(level + 1) | PRESENT_WRITABLE;
    }
    for k in 0..4 {
        entries[middle * ENTRIES + k] = table(middle + 1 + k) | PRESENT_WRITABLE;
    }
    for (k, entry) in (0..).zip(&mut entries[(middle + 1) * ENTRIES..][..4 * ENTRIES]) {
        *entry = k << 21 | PRESENT_WRITABLE | LARGE;
    }
    entries.iter().flat_map(|e: &u64| e.to_le_bytes()).collect()
}

/// Real-mode code that resets the machine: `mov al, value; mov dx, port; out dx, al; hlt; jmp` back to the `hlt`.
///
/// On hardware-reduced ACPI without EFI a kernel takes neither the reset register nor the keyboard controller: it jumps
/// to the firmware's reset vector (arch/x86/platform/efi/quirks.c efi_reboot_required, arch/x86/kernel/reboot.c).
pub(super) fn reset_code() -> Vec<u8> {
    let [low, high] = RESET.to_le_bytes();
    vec![0xb0, RESET_VALUE, 0xba, low, high, 0xee, 0xf4, 0xeb, 0xfd]
}
