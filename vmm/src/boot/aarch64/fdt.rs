//! The device tree (Devicetree Specification 0.4; bindings in Documentation/devicetree/bindings).

use super::Loaded;
use crate::arch::Gic;
use crate::arch::layout::{
    DISK_SPIS, DISKS, FDT_MAX, GIC_CPU, GIC_CPU_LEN, GIC_DISTRIBUTOR, GIC_DISTRIBUTOR_LEN,
    GIC_REDISTRIBUTOR_LEN, GIC_REDISTRIBUTORS, RAM, SERIAL, SERIAL_SPIS,
};
use crate::devices::{serial, virtio};
use crate::machine::{Config, GuestRam};
use anyhow::{Context, ensure};
use vm_fdt::{Error, FdtWriter};

/// How other nodes name the interrupt controller and the clock.
const GIC: u32 = 1;
const CLOCK: u32 = 2;
/// Cells of an interrupt (interrupt-controller/arm,gic-v3.yaml): its type and how it is triggered.
const SPI: u32 = 0;
const PPI: u32 = 1;
const EDGE: u32 = 1;
const LEVEL: u32 = 4;
/// The timer's interrupts (timer/arm,arch_timer.yaml): secure and non-secure physical, virtual, hypervisor.
const TIMER_PPIS: [u32; 4] = [13, 14, 11, 10];
/// What the serial ports' clock runs at, which no emulated port cares for.
const CLOCK_HZ: u32 = 24_000_000;

/// Writes the tree to its place in guest memory.
///
/// # Errors
/// It is too large.
pub(crate) fn write_tree(
    ram: &GuestRam,
    config: &Config<'_>,
    loaded: &Loaded,
    gic: Gic,
) -> anyhow::Result<()> {
    let tree = tree(config, loaded, gic).context("Cannot make the device tree")?;
    ensure!(tree.len() as u64 <= FDT_MAX, "The device tree takes {} bytes", tree.len());
    Ok(ram.write(loaded.fdt, &tree)?)
}

pub(super) fn tree(config: &Config<'_>, loaded: &Loaded, gic: Gic) -> Result<Vec<u8>, Error> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_string("compatible", "linux,dummy-virt")?;
    fdt.property_u32("interrupt-parent", GIC)?;
    chosen(&mut fdt, config, loaded)?;
    let memory = fdt.begin_node(&format!("memory@{:x}", RAM.0))?;
    fdt.property_string("device_type", "memory")?;
    fdt.property_array_u64("reg", &[RAM.0, config.mem_bytes & !0xfff])?;
    fdt.end_node(memory)?;
    cpus(&mut fdt, config.cpus)?;
    interrupts(&mut fdt, gic, config.cpus)?;
    serial_ports(&mut fdt)?;
    for (place, spi) in (0..config.disks.len() as u64).zip(DISK_SPIS) {
        let at = DISKS.0 + place * virtio::REGISTERS;
        let node = fdt.begin_node(&format!("virtio_mmio@{at:x}"))?;
        fdt.property_string("compatible", "virtio,mmio")?;
        fdt.property_array_u64("reg", &[at, virtio::REGISTERS])?;
        fdt.property_array_u32("interrupts", &[SPI, spi, EDGE])?;
        fdt.property_null("dma-coherent")?;
        fdt.end_node(node)?;
    }
    fdt.end_node(root)?;
    fdt.finish()
}

fn chosen(fdt: &mut FdtWriter, config: &Config<'_>, loaded: &Loaded) -> Result<(), Error> {
    let node = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", &config.cmdline)?;
    fdt.property_string("stdout-path", &serial_path(0))?;
    if let Some(initrd) = loaded.initrd {
        fdt.property_u64("linux,initrd-start", initrd.start.0)?;
        fdt.property_u64("linux,initrd-end", initrd.start.0 + initrd.len)?;
    }
    if let Some(seed) = loaded.kaslr_seed {
        fdt.property_u64("kaslr-seed", seed)?;
    }
    fdt.end_node(node)?;
    // Decides which port is which.
    let node = fdt.begin_node("aliases")?;
    for port in 0..SERIAL.len() {
        fdt.property_string(&format!("serial{port}"), &serial_path(port))?;
    }
    fdt.end_node(node)
}

fn cpus(fdt: &mut FdtWriter, count: usize) -> Result<(), Error> {
    let cpus = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 1)?;
    fdt.property_u32("#size-cells", 0)?;
    for cpu in 0..count as u32 {
        let node = fdt.begin_node(&format!("cpu@{cpu:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_string("compatible", "arm,armv8")?;
        fdt.property_string("enable-method", "psci")?;
        // Its affinity: KVM numbers up to 16 vCPUs so at the lowest level.
        fdt.property_u32("reg", cpu)?;
        fdt.end_node(node)?;
    }
    fdt.end_node(cpus)?;
    let node = fdt.begin_node("psci")?;
    fdt.property_string_list("compatible", vec!["arm,psci-1.0".into(), "arm,psci-0.2".into()])?;
    fdt.property_string("method", "hvc")?;
    fdt.end_node(node)
}

/// Interrupt controller and timer.
fn interrupts(fdt: &mut FdtWriter, gic: Gic, cpus: usize) -> Result<(), Error> {
    let node = fdt.begin_node(&format!("intc@{:x}", GIC_DISTRIBUTOR.0))?;
    fdt.property_u32("#interrupt-cells", 3)?;
    fdt.property_u32("#address-cells", 0)?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_phandle(GIC)?;
    let distributor = [GIC_DISTRIBUTOR.0, GIC_DISTRIBUTOR_LEN];
    // GICv2's interrupts of one CPU name the CPUs they are wired to.
    let wired = match gic {
        Gic::V3 => {
            fdt.property_string("compatible", "arm,gic-v3")?;
            let redistributors = [GIC_REDISTRIBUTORS.0, cpus as u64 * GIC_REDISTRIBUTOR_LEN];
            fdt.property_array_u64("reg", &[distributor, redistributors].concat())?;
            0
        }
        Gic::V2 => {
            fdt.property_string("compatible", "arm,cortex-a15-gic")?;
            fdt.property_array_u64("reg", &[distributor, [GIC_CPU.0, GIC_CPU_LEN]].concat())?;
            ((1 << cpus) - 1) << 8
        }
    };
    fdt.end_node(node)?;
    let node = fdt.begin_node("timer")?;
    fdt.property_string("compatible", "arm,armv8-timer")?;
    fdt.property_null("always-on")?;
    fdt.property_array_u32("interrupts", &TIMER_PPIS.map(|ppi| [PPI, ppi, wired | LEVEL]).concat())?;
    fdt.end_node(node)
}

fn serial_ports(fdt: &mut FdtWriter) -> Result<(), Error> {
    let node = fdt.begin_node("apb-pclk")?;
    fdt.property_string("compatible", "fixed-clock")?;
    fdt.property_u32("#clock-cells", 0)?;
    fdt.property_u32("clock-frequency", CLOCK_HZ)?;
    fdt.property_phandle(CLOCK)?;
    fdt.end_node(node)?;
    for (port, spi) in SERIAL_SPIS.into_iter().enumerate() {
        let node = fdt.begin_node(&serial_path(port)[1..])?;
        fdt.property_string_list("compatible", vec!["arm,pl011".into(), "arm,primecell".into()])?;
        fdt.property_array_u64("reg", &[SERIAL[port].0, serial::REGISTERS])?;
        fdt.property_array_u32("interrupts", &[SPI, spi, LEVEL])?;
        fdt.property_array_u32("clocks", &[CLOCK, CLOCK])?;
        fdt.property_string_list("clock-names", vec!["uartclk".into(), "apb_pclk".into()])?;
        fdt.end_node(node)?;
    }
    Ok(())
}

fn serial_path(port: usize) -> String {
    format!("/pl011@{:x}", SERIAL[port].0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tree with nothing but the interrupt controller and the timer.
    fn with(gic: Gic, cpus: usize) -> Vec<u8> {
        let mut fdt = FdtWriter::new().unwrap();
        let root = fdt.begin_node("").unwrap();
        interrupts(&mut fdt, gic, cpus).unwrap();
        fdt.end_node(root).unwrap();
        fdt.finish().unwrap()
    }

    fn holds(tree: &[u8], part: &[u8]) -> bool {
        tree.windows(part.len()).any(|window| window == part)
    }

    #[test]
    fn each_interrupt_controller_has_its_place_and_its_timer() {
        let cells = |cells: &[u32]| cells.iter().flat_map(|cell| cell.to_be_bytes()).collect::<Vec<u8>>();
        let timer = |flags: u32| cells(&TIMER_PPIS.map(|ppi| [PPI, ppi, flags]).concat());
        let v3 = (
            b"arm,gic-v3\0".as_slice(),
            cells(&[0, 0x0800_0000, 0, 0x1_0000, 0, 0x080a_0000, 0, 0x6_0000]),
            timer(LEVEL),
        );
        // Its interrupts of one CPU say which CPUs they are wired to: three.
        let v2 = (
            b"arm,cortex-a15-gic\0".as_slice(),
            cells(&[0, 0x0800_0000, 0, 0x1_0000, 0, 0x0801_0000, 0, 0x2000]),
            timer(0x704),
        );
        for (gic, own, other) in [(Gic::V3, &v3, &v2), (Gic::V2, &v2, &v3)] {
            let tree = with(gic, 3);
            for (part, wanted) in [(own, true), (other, false)] {
                assert_eq!([part.0, &part.1, &part.2].map(|part| holds(&tree, part)), [wanted; 3], "{gic:?}");
            }
        }
    }
}
