//! Every guest physical address of the arm64 machine, ascending.

use introspect::memory::{Pa, RamRange};

/// GIC distributor, [`GIC_DISTRIBUTOR_LEN`] bytes.
pub const GIC_DISTRIBUTOR: Pa = Pa(0x0800_0000);
/// GICv3 (Arm IHI 0069, 12.1): 64 KiB. GICv2 uses the first 4 KiB.
pub const GIC_DISTRIBUTOR_LEN: u64 = 0x1_0000;
/// GICv2's CPU interface, [`GIC_CPU_LEN`] bytes.
pub const GIC_CPU: Pa = Pa(0x0801_0000);
/// Arm IHI 0048, 4.1.3: 8 KiB, the second half for deactivation.
pub const GIC_CPU_LEN: u64 = 0x2000;
/// GICv3's redistributors, [`GIC_REDISTRIBUTOR_LEN`] bytes for each vCPU.
pub const GIC_REDISTRIBUTORS: Pa = Pa(0x080a_0000);
/// Arm IHI 0069, 12.1: two frames of 64 KiB.
pub const GIC_REDISTRIBUTOR_LEN: u64 = 0x2_0000;
/// Serial ports, one page each: console, and the guest's port to the detector.
pub const SERIAL: [Pa; 2] = [Pa(0x0900_0000), Pa(0x0900_1000)];
/// Registers of the first disk; those of the others follow, one page each.
pub const DISKS: Pa = Pa(0x0a00_0000);
/// RAM; the kernel is at its start.
pub const RAM: Pa = Pa(0x4000_0000);

/// Largest device tree that kernels map (Documentation/arch/arm64/booting.rst, "Setup the device tree"), 2 MiB; its place is at
/// the end of RAM.
pub const FDT_MAX: u64 = 2 << 20;

/// Shared peripheral interrupts of the serial ports. The GIC counts them from 32, device trees and KVM from 0.
pub const SERIAL_SPIS: [u32; 2] = [0, 1];
/// One for each disk, [`crate::machine::MAX_DISKS`] at most.
pub const DISK_SPIS: std::ops::Range<u32> = 8..16;

/// RAM of a machine with `bytes` of memory.
pub fn ram(bytes: u64) -> Vec<RamRange> {
    vec![RamRange { start: RAM, len: bytes }]
}
