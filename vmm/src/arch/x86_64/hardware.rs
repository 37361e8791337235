//! What of ACPI's hardware a kernel finds. Hardware-reduced ACPI has no SCI and no timer that a kernel would wait for, but a kernel
//! that finds it takes neither the 8259 nor the interval timer (arch/x86/kernel/acpi/boot.c). One that is told to leave the APICs
//! alone has nothing else, and is given the fixed hardware of ACPI 6.5, 4.8: with it kernels take both.

use super::layout::{DISK_IRQS, ISA_DISK_IRQS, PM1_CONTROL, PM1_ENABLE, PM1_STATUS, SLEEP_S5};
use crate::machine::MAX_DISKS;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hardware {
    /// Sleep and reset registers only.
    Reduced,
    /// PM1 event and control registers, and an SCI that never comes.
    Fixed,
}

/// Parameters after which a kernel does not use the I/O APIC (arch/x86/kernel/apic/io_apic.c, kernel/smp.c) or any APIC
/// (arch/x86/kernel/apic/apic.c), whatever their values.
const NAMES: [&str; 4] = ["nosmp", "noapic", "nolapic", "disableapic"];
/// The same with their values (arch/x86/kernel/acpi/boot.c).
const WORDS: [&str; 2] = ["acpi=noirq", "pci=noacpi"];

impl Hardware {
    /// What a kernel with this command line needs. A word that is not meant for the kernel does no harm: all kernels run on either.
    pub fn of(cmdline: &str) -> Self {
        let without_apic = |word: &str| match word.split_once('=') {
            Some(("maxcpus", count)) => is_zero(count),
            Some((name, _)) => NAMES.contains(&name) || WORDS.contains(&word),
            None => NAMES.contains(&word),
        };
        if cmdline.split_whitespace().any(without_apic) { Self::Fixed } else { Self::Reduced }
    }

    /// The interrupt of each disk; the 8259 has no others than ISA's.
    pub fn disk_irqs(self) -> [u32; MAX_DISKS] {
        match self {
            Self::Reduced => std::array::from_fn(|k| DISK_IRQS.start + k as u32),
            Self::Fixed => ISA_DISK_IRQS,
        }
    }
}

/// As kernels read a number (lib/cmdline.c), zero where there is none.
fn is_zero(count: &str) -> bool {
    !count.trim_start_matches(['0', 'x']).starts_with(|c: char| c.is_ascii_digit())
}

/// The registers of [`Hardware::Fixed`]: nothing ever happens, and the machine is always in ACPI mode.
#[derive(Default)]
pub(super) struct FixedHardware {
    /// Which events are enabled: kernels check that what they wrote is there.
    enabled: [AtomicU8; 2],
}

impl FixedHardware {
    /// Where they are.
    pub const PORTS: Range<u16> = PM1_STATUS..PM1_CONTROL + 2;

    /// One byte.
    pub fn read(&self, port: u16) -> u8 {
        // Bit 0 of the low byte: interrupts are SCIs, not SMIs.
        const SCI_EN: u8 = 1;
        match port {
            PM1_CONTROL => SCI_EN,
            _ => self.enable(port).map_or(0, |byte| byte.load(Relaxed)),
        }
    }

    /// One byte; true when it switches the machine off.
    pub fn write(&self, port: u16, byte: u8) -> bool {
        // SLP_EN and SLP_TYP; the other bits of PM1_CONTROL's high byte mean nothing.
        const SLEEP: u8 = 0x3c;
        if let Some(enable) = self.enable(port) {
            enable.store(byte, Relaxed);
        }
        port == PM1_CONTROL + 1 && byte & SLEEP == SLEEP_S5
    }

    fn enable(&self, port: u16) -> Option<&AtomicU8> {
        self.enabled.get(usize::from(port.checked_sub(PM1_ENABLE)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::layout::{SCI, SERIAL_IRQS};

    #[test]
    fn words_that_leave_the_apics_alone_ask_for_fixed_hardware() {
        let words = ["nosmp", "maxcpus=0", "noapic", "nolapic", "disableapic", "acpi=noirq", "pci=noacpi"];
        for word in words.into_iter().chain(["maxcpus=0x0", "nosmp=1"]) {
            assert_eq!(Hardware::of(&format!("console=ttyS0 {word} quiet")), Hardware::Fixed, "{word}");
        }
        for line in
            ["", "maxcpus=1", "maxcpus=10", "maxcpus=0x2", "nosmpx nr_cpus=0", "x=nosmp", "acpi=force"]
        {
            assert_eq!(Hardware::of(line), Hardware::Reduced, "{line}");
        }
    }

    #[test]
    fn no_two_devices_share_an_interrupt() {
        let timer_cascade_clock = [0, 2, 8];
        let taken = [&timer_cascade_clock[..], &SERIAL_IRQS, &[SCI]].concat();
        for (hardware, range) in [(Hardware::Reduced, 16..24), (Hardware::Fixed, 0..16)] {
            let irqs = hardware.disk_irqs();
            for (k, irq) in irqs.iter().enumerate() {
                assert!(range.contains(irq) && !taken.contains(irq) && !irqs[..k].contains(irq), "{irq}");
            }
        }
    }

    #[test]
    fn events_are_enabled_and_never_happen() {
        let fixed = FixedHardware::default();
        for port in FixedHardware::PORTS {
            assert!(!fixed.write(port, 0xa5), "{port:#x}");
        }
        let bytes: Vec<u8> = FixedHardware::PORTS.map(|port| fixed.read(port)).collect();
        assert_eq!(bytes, [0, 0, 0xa5, 0xa5, 1, 0]);
    }

    #[test]
    fn only_sleep_of_type_five_is_power_off() {
        let fixed = FixedHardware::default();
        for byte in 0..=u8::MAX {
            let off = byte & 0x20 != 0 && byte >> 2 & 7 == 5;
            assert_eq!(fixed.write(PM1_CONTROL + 1, byte), off, "{byte:#x}");
            assert!(!fixed.write(PM1_CONTROL, byte) && !fixed.write(PM1_ENABLE, byte));
        }
    }
}
