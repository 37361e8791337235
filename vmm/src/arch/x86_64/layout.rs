//! Every guest physical address and port of the x86-64 machine, ascending.

use introspect::memory::{Pa, RamRange};

/// Boot global descriptor table, four entries of 8 bytes.
pub const GDT: Pa = Pa(0x500);
/// `struct boot_params`, one page.
pub const ZERO_PAGE: Pa = Pa(0x7000);
/// Boot page tables: [`PAGE_TABLES_LEN`] bytes.
pub const PAGE_TABLES: Pa = Pa(0x9000);
/// A table of each level, three at the most, above four whose entries stand for 2 MiB: 4 GiB.
pub const PAGE_TABLES_LEN: u64 = 7 * 0x1000;
/// Kernel command line, [`CMDLINE_LEN`] bytes.
pub const CMDLINE: Pa = Pa(0x2_0000);
/// Room for the command line and for what the kernel copies behind it (COMMAND_LINE_SIZE is 2048 on x86).
pub const CMDLINE_LEN: u64 = 0x1_0000;
/// End of the RAM below the legacy hole that the kernel may use.
pub const LOW_RAM_END: Pa = Pa(0x9_fc00);
/// ACPI tables, up to [`RESET_VECTOR`]; the RSDP comes first, where a search of the BIOS area finds it too.
pub const ACPI: Pa = Pa(0xe_0000);
/// Where a PC starts after a reset in real mode (f000:fff0), 16 bytes.
pub const RESET_VECTOR: Pa = Pa(0xf_fff0);
/// RAM above the legacy hole.
pub const HIGH_RAM: Pa = Pa(0x10_0000);
/// Hole for devices below 4 GiB.
pub const MMIO_HOLE: Pa = Pa(0xc000_0000);
/// Registers of the first disk; those of the others follow.
pub const DISKS: Pa = Pa(0xd000_0000);
/// Inputs of the I/O APIC that no ISA interrupt has: one for each disk, [`crate::machine::MAX_DISKS`] at most.
pub const DISK_IRQS: std::ops::Range<u32> = 16..24;
/// The same for kernels that know only the 8259's: ISA interrupts that no other device here has.
pub const ISA_DISK_IRQS: [u32; 8] = [5, 6, 7, 10, 11, 12, 14, 15];
/// I/O APIC (Intel 82093AA).
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page for KVM's identity map on Intel hosts without unrestricted guests.
pub const KVM_IDENTITY_MAP: Pa = Pa(0xfffb_c000);
/// Three pages for KVM's task state segment on Intel hosts.
pub const KVM_TSS: Pa = Pa(0xfffb_d000);
/// RAM that found no place below [`MMIO_HOLE`].
pub const RAM_ABOVE_HOLE: Pa = Pa(0x1_0000_0000);
/// The ring of the tracer and, in the GiB behind, its stubs and what they know: no RAM of the guest's, which ends below.
pub const TRACER_RING: Pa = Pa(0x4_0000_0000);
/// The GiB that holds the stubs and the backtraces that they know.
pub const TRACER_CODE: Pa = Pa(0x4_4000_0000);

/// First port of each serial port, eight each: COM1, COM2.
pub const SERIAL_PORTS: [u16; 2] = [0x3f8, 0x2f8];
/// ISA interrupt of each serial port.
pub const SERIAL_IRQS: [u32; 2] = [4, 3];
/// ISA interrupt of ACPI's events, where there is fixed hardware.
pub const SCI: u32 = 9;
/// ACPI sleep control register (ACPI 6.5, 4.8.3.7); the status register is the next port.
pub const SLEEP_CONTROL: u16 = 0x600;
/// ACPI sleep status register.
pub const SLEEP_STATUS: u16 = 0x601;
/// ACPI reset register.
pub const RESET: u16 = 0x602;
/// What the guest writes to [`RESET`].
pub const RESET_VALUE: u8 = 1;

/// PM1 status register of ACPI's fixed hardware (ACPI 6.5, 4.8.3.1), two bytes as the others.
pub const PM1_STATUS: u16 = 0x604;
/// PM1 enable register, behind it.
pub const PM1_ENABLE: u16 = 0x606;
/// PM1 control register (ACPI 6.5, 4.8.3.2).
pub const PM1_CONTROL: u16 = 0x608;
/// ACPI 6.5, 4.8.3.7: SLP_EN, and S5's type in the bits above 1, of the sleep control register; the PM1 control register has them
/// in its high byte.
pub const SLEEP_S5: u8 = 0x20 | S5 << 2;
/// Type of the sleep that is power off, as the DSDT says.
pub const S5: u8 = 5;

/// RAM of a machine with `bytes` of memory.
pub fn ram(bytes: u64) -> Vec<RamRange> {
    let low = bytes.min(MMIO_HOLE.0);
    let mut ranges = vec![RamRange { start: Pa(0), len: low }];
    if bytes > low {
        ranges.push(RamRange { start: RAM_ABOVE_HOLE, len: bytes - low });
    }
    ranges
}
