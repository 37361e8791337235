//! ACPI tables (ACPI specification 6.5): processors, interrupt controllers, serial ports, power off and reset.
//!
//! The platform is hardware-reduced, unless the kernel must find fixed hardware ([`Hardware`]): no fixed hardware but the
//! sleep and reset registers, so no SCI. There is no PM timer, no keyboard controller and no CMOS clock that a kernel would
//! wait for, either way.

use crate::arch::Hardware;
use crate::arch::layout::{
    ACPI, DISKS, IO_APIC, LOCAL_APIC, PM1_CONTROL, PM1_STATUS, RESET, RESET_VALUE, S5, SCI, SERIAL_IRQS,
    SERIAL_PORTS, SLEEP_CONTROL, SLEEP_STATUS,
};
use crate::devices::virtio;
use acpi_tables::aml::{self, Device, EISAName, Interrupt, Name, Package, Path, ResourceTemplate};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

const OEM: [u8; 6] = *b"KLEAK ";
const TABLE: [u8; 8] = *b"KLEAKVMM";
const OEM_REVISION: u32 = 1;
/// Where each table may start.
const ALIGNMENT: usize = 64;

/// All tables for a machine of `cpus` vCPUs and `disks` disks, for [`ACPI`]; the RSDP is the first.
pub(super) fn tables(hardware: Hardware, cpus: u8, disks: usize) -> Vec<u8> {
    // The RSDP's place is known, its content only at the end.
    let mut tables = Tables(vec![0; Rsdp::len().next_multiple_of(ALIGNMENT)]);
    let dsdt = tables.add(&dsdt(hardware, disks));
    let fadt = match hardware {
        Hardware::Reduced => fadt(dsdt).flag(Flags::HwReducedAcpi),
        Hardware::Fixed => with_fixed_hardware(fadt(dsdt), tables.add(&bytes(&FACS::new()))),
    };
    let fadt = tables.add(&bytes(&fadt.finalize()));
    let madt = tables.add(&madt(hardware, cpus));
    let mut xsdt = XSDT::new(OEM, TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = tables.add(&bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM, xsdt));
    tables.0[..rsdp.len()].copy_from_slice(&rsdp);
    tables.0
}

struct Tables(Vec<u8>);

impl Tables {
    /// Appends a table; its guest physical address.
    fn add(&mut self, table: &[u8]) -> u64 {
        let at = self.0.len().next_multiple_of(ALIGNMENT);
        self.0.resize(at, 0);
        self.0.extend(table);
        ACPI.0 + at as u64
    }
}

fn fadt(dsdt: u64) -> FADTBuilder {
    // iapc_boot_arch: neither VGA nor CMOS clock; the bit for a keyboard controller stays clear.
    const NO_VGA: u16 = 1 << 2;
    const NO_CMOS_RTC: u16 = 1 << 5;
    let port =
        |address: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(address));
    let mut fadt = FADTBuilder::new(OEM, TABLE, OEM_REVISION).dsdt_64(dsdt).flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.reset_reg = port(RESET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL);
    fadt.sleep_status_reg = port(SLEEP_STATUS);
    fadt
}

/// No buttons, no general-purpose events, no idle states of processors but C1, no SMI to enter ACPI mode by, which the machine
/// is always in.
fn with_fixed_hardware(fadt: FADTBuilder, facs: u64) -> FADTBuilder {
    // Latencies above these say that there is no such state (ACPI 6.5, 5.2.9).
    const MOST_C2: u16 = 100;
    const MOST_C3: u16 = 1000;
    let mut fadt = fadt
        .firmware_ctrl_64(facs)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.sci_int = (SCI as u16).into();
    (fadt.pm1a_evt_blk, fadt.pm1_evt_len) = (u32::from(PM1_STATUS).into(), 4);
    (fadt.pm1a_cnt_blk, fadt.pm1_cnt_len) = (u32::from(PM1_CONTROL).into(), 2);
    (fadt.p_lvl2_lat, fadt.p_lvl3_lat) = ((MOST_C2 + 1).into(), (MOST_C3 + 1).into());
    fadt
}

fn madt(hardware: Hardware, cpus: u8) -> Vec<u8> {
    const IO_APIC_ID: u8 = 0;
    let mut madt = MADT::new(OEM, TABLE, OEM_REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(IO_APIC_ID, IO_APIC, 0));
    let mut madt = bytes(&madt);
    if hardware == Hardware::Fixed {
        // There are two 8259s, too. The sum of all bytes stays 0.
        const CHECKSUM: usize = 9;
        const FLAGS: usize = 40;
        const PCAT_COMPAT: u8 = 1;
        madt[FLAGS] |= PCAT_COMPAT;
        madt[CHECKSUM] = madt[CHECKSUM].wrapping_sub(PCAT_COMPAT);
    }
    madt
}

/// Power off, the disks, and the serial ports: without a legacy interrupt controller a kernel takes ISA interrupts from here.
fn dsdt(hardware: Hardware, disks: usize) -> Vec<u8> {
    const REVISION: u8 = 6;
    const EMPTY_LEN: u32 = 36;
    let mut dsdt = Sdt::new(*b"DSDT", EMPTY_LEN, REVISION, OEM, TABLE, OEM_REVISION);
    let s5 = Package::new(vec![&S5, &S5, &0u8, &0u8]);
    dsdt.append_slice(&bytes(&Name::new(Path::new("_S5_"), &s5)));
    for k in 0..SERIAL_PORTS.len() {
        dsdt.append_slice(&serial_port(k));
    }
    for (k, irq) in hardware.disk_irqs().into_iter().enumerate().take(disks) {
        dsdt.append_slice(&disk(k, irq));
    }
    dsdt.as_slice().to_vec()
}

fn serial_port(k: usize) -> Vec<u8> {
    let port = SERIAL_PORTS[k];
    let io = aml::IO::new(port, port, 0, 8);
    let (consumer, edge, active_low, shared) = (true, true, false, false);
    let interrupt = Interrupt::new(consumer, edge, active_low, shared, SERIAL_IRQS[k]);
    let id = Name::new(Path::new("_HID"), &EISAName::new("PNP0501"));
    let number = Name::new(Path::new("_UID"), &(k as u8));
    let resources = ResourceTemplate::new(vec![&io, &interrupt]);
    let resources = Name::new(Path::new("_CRS"), &resources);
    let path = Path::new(&format!("_SB_.COM{}", k + 1));
    bytes(&Device::new(path, vec![&id, &number, &resources]))
}

/// A virtio device with memory-mapped registers, by the name that Linux and QEMU have for those.
fn disk(k: usize, irq: u32) -> Vec<u8> {
    let base = DISKS.0 + k as u64 * virtio::REGISTERS;
    let registers = aml::Memory32Fixed::new(true, base as u32, virtio::REGISTERS as u32);
    let (consumer, edge, active_low, shared) = (true, true, false, false);
    let interrupt = Interrupt::new(consumer, edge, active_low, shared, irq);
    let id = Name::new(Path::new("_HID"), &"LNRO0005");
    let number = Name::new(Path::new("_UID"), &(k as u8));
    let coherent = Name::new(Path::new("_CCA"), &1u8);
    let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
    let resources = Name::new(Path::new("_CRS"), &resources);
    let path = Path::new(&format!("_SB_.DSK{k}"));
    bytes(&Device::new(path, vec![&id, &number, &coherent, &resources]))
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    struct Sink(Vec<u8>);
    impl AmlSink for Sink {
        fn byte(&mut self, byte: u8) {
            self.0.push(byte);
        }
    }
    let mut sink = Sink(Vec::new());
    table.to_aml_bytes(&mut sink);
    sink.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(bytes: &[u8], at: usize) -> usize {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The table at a guest address, its checksum checked.
    fn table(tables: &[u8], address: u64) -> &[u8] {
        let at = (address - ACPI.0) as usize;
        let table = &tables[at..at + u32_at(tables, at + 4)];
        assert_eq!(table.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0, "checksum");
        table
    }

    #[test]
    fn every_table_is_found_from_the_rsdp() {
        let tables = tables(Hardware::Reduced, 8, 2);
        assert_eq!(&tables[..8], b"RSD PTR ");
        let xsdt = table(&tables, u64_at(&tables, 24));
        let names: Vec<&[u8]> =
            xsdt[36..].chunks(8).map(|entry| &table(&tables, u64_at(entry, 0))[..4]).collect();
        assert_eq!(names, [b"FACP", b"APIC"]);
        let fadt = table(&tables, u64_at(xsdt, 36));
        let dsdt = table(&tables, u64_at(fadt, 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        assert!(dsdt.windows(4).any(|w| w == b"_S5_"));
        assert_eq!(dsdt.windows(8).filter(|w| *w == b"LNRO0005").count(), 2);
    }

    #[test]
    fn every_processor_is_listed() {
        for cpus in [1, 8] {
            let tables = tables(Hardware::Reduced, cpus, 0);
            let xsdt = table(&tables, u64_at(&tables, 24));
            let madt = table(&tables, u64_at(xsdt, 44));
            assert_eq!(madt.len(), 44 + usize::from(cpus) * 8 + 12);
            assert_eq!(madt[44 + 3], 0, "the boot processor comes first");
        }
    }

    #[test]
    fn fixed_hardware_is_described_where_a_kernel_needs_it() {
        const HW_REDUCED: usize = 1 << 20;
        for hardware in [Hardware::Reduced, Hardware::Fixed] {
            let fixed = hardware == Hardware::Fixed;
            let tables = tables(hardware, 2, 2);
            let xsdt = table(&tables, u64_at(&tables, 24));
            let (fadt, madt) = (table(&tables, u64_at(xsdt, 36)), table(&tables, u64_at(xsdt, 44)));
            // ACPI 6.5, 5.2.9 and 5.2.12: flags; SCI_INT; PM1a_EVT_BLK and PM1a_CNT_BLK with their lengths; flags.
            assert_eq!(u32_at(fadt, 112) & HW_REDUCED == 0, fixed);
            let registers = (fadt[46], u32_at(fadt, 56), fadt[88], u32_at(fadt, 64), fadt[89]);
            assert_eq!(registers, if fixed { (9, 0x604, 4, 0x608, 2) } else { (0, 0, 0, 0, 0) });
            assert_eq!(u32_at(madt, 40), usize::from(fixed));
            let facs = u64_at(fadt, 132);
            assert_eq!(facs != 0, fixed);
            assert_eq!(facs % 64, 0);
            if fixed {
                assert_eq!(&tables[(facs - ACPI.0) as usize..][..4], b"FACS");
            }
            // The last interrupt is the second disk's: an extended interrupt descriptor has it behind five bytes (6.4.3.6).
            let dsdt = table(&tables, u64_at(fadt, 140));
            let at = dsdt.windows(3).rposition(|w| w == [0x89, 6, 0]).unwrap();
            assert_eq!(u32_at(dsdt, at + 5), if fixed { 6 } else { 17 });
        }
    }
}
