//! Interrupt chips and ports.

use super::hardware::{FixedHardware, Hardware};
use super::layout::{
    DISKS, KVM_IDENTITY_MAP, KVM_TSS, RESET, RESET_VALUE, SERIAL_IRQS, SERIAL_PORTS, SLEEP_CONTROL, SLEEP_S5,
    SLEEP_STATUS,
};
use super::{DebugStatus, ExitRecord, TRAP_PORT, TrapInstruction};
use crate::arch::Next;
use crate::devices::{SerialPort, VirtioDisk, virtio};
use crate::machine::{ConsoleLog, Devices, Outcome, kvm_error};
use anyhow::Context;
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{VcpuExit, VmFd};
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// What stands behind the guest's ports, shared by all vCPUs.
pub struct Platform {
    /// COM1 and COM2.
    pub serial: [Arc<SerialPort>; 2],
    disks: Vec<Arc<VirtioDisk>>,
    fixed: Option<FixedHardware>,
    console: Arc<ConsoleLog>,
}

/// PC keyboard controller (IBM PC AT technical reference): data, and status or command.
const I8042_DATA: u16 = 0x60;
const I8042_COMMAND: u16 = 0x64;
/// Pulses the processor's reset line.
const I8042_RESET: u8 = 0xfe;
/// MC146818 clock: index and data.
const CMOS_INDEX: u16 = 0x70;
const CMOS_DATA: u16 = 0x71;

impl Platform {
    /// Creates the in-kernel interrupt chips and timer of `vm`, which must come before its vCPUs, and the devices.
    ///
    /// # Errors
    /// What KVM refused.
    pub(super) fn new(vm: &VmFd, hardware: Hardware, devices: Devices<'_>) -> anyhow::Result<Self> {
        let Devices { console, ram, disks } = devices;
        // Only Intel hosts use these two; others take and ignore them.
        vm.set_identity_map_address(KVM_IDENTITY_MAP.0)
            .map_err(kvm_error("Cannot place the identity map"))?;
        vm.set_tss_address(KVM_TSS.0 as usize).map_err(kvm_error("Cannot place the task state segment"))?;
        vm.create_irq_chip().map_err(kvm_error("Cannot create the interrupt controllers"))?;
        // With the dummy speaker KVM answers port 0x61, by which kernels measure the timer.
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).map_err(kvm_error("Cannot create the interval timer"))?;
        let [first, second] = SERIAL_IRQS;
        let serial = [serial_port(vm, first)?, serial_port(vm, second)?];
        let connect = |(disk, irq)| {
            let interrupt = interrupt(vm, irq).context("Cannot connect a disk's interrupt")?;
            Ok(VirtioDisk::new(disk, ram.clone(), interrupt))
        };
        let disks =
            disks.into_iter().zip(hardware.disk_irqs()).map(connect).collect::<anyhow::Result<_>>()?;
        let fixed = (hardware == Hardware::Fixed).then(FixedHardware::default);
        Ok(Self { serial, disks, fixed, console })
    }

    /// Decides what an exit means; carries out accesses to ports.
    pub fn handle(&self, exit: VcpuExit<'_>) -> Next {
        match exit {
            VcpuExit::IoOut(port, &[_]) if port == u16::from(TRAP_PORT) => Next::Trap(TrapInstruction::Pio),
            VcpuExit::IoOut(port, data) => self.write_port(port, data),
            VcpuExit::IoIn(port, data) => {
                self.read_port(port, data);
                Next::Enter
            }
            VcpuExit::Debug(debug) if debug.exception == ExitRecord::BREAKPOINT => {
                Next::Trap(TrapInstruction::Int3)
            }
            VcpuExit::Debug(debug) if debug.exception == ExitRecord::DEBUG => {
                Next::Debug(DebugStatus(debug.dr6))
            }
            VcpuExit::MmioRead(address, data) => {
                match self.disk_register(address) {
                    Some((disk, offset)) => disk.read(offset, data),
                    // Nothing is there: reads are all ones, as on a bus without the device.
                    None => data.fill(0xff),
                }
                Next::Enter
            }
            VcpuExit::MmioWrite(address, data) => {
                if let Some((disk, offset)) = self.disk_register(address) {
                    disk.write(offset, data);
                }
                Next::Enter
            }
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => Next::Checkpoint,
            VcpuExit::Shutdown => Next::End(Outcome::TripleFault),
            VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN, _) => Next::End(Outcome::PowerOff),
            VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_RESET, _) => Next::End(Outcome::Reset),
            VcpuExit::FailEntry(reason, _) => {
                Next::Fail(format!("The processor refused to enter the guest, reason {reason:#x}"))
            }
            VcpuExit::InternalError => {
                Next::Fail("KVM gave up on an instruction it cannot emulate".to_owned())
            }
            other => Next::Fail(format!("KVM left the guest for a reason not expected: {other:?}")),
        }
    }

    fn read_port(&self, port: u16, data: &mut [u8]) {
        if let Some((serial, offset)) = self.serial_register(port) {
            data.iter_mut().for_each(|byte| *byte = serial.read(offset));
            return;
        }
        if let Some(fixed) = self.fixed_hardware(port) {
            data.iter_mut().zip(port..).for_each(|(byte, port)| *byte = fixed.read(port));
            return;
        }
        let value = match port {
            // No keyboard, no clock, awake: polls of their status end at once.
            I8042_DATA | I8042_COMMAND | CMOS_INDEX | CMOS_DATA | SLEEP_CONTROL | SLEEP_STATUS => 0,
            _ => 0xff,
        };
        data.fill(value);
    }

    fn write_port(&self, port: u16, data: &[u8]) -> Next {
        if let Some((serial, offset)) = self.serial_register(port) {
            data.iter().for_each(|&byte| serial.write(offset, byte));
            return self.console.ended().map_or(Next::Enter, Next::End);
        }
        if let Some(fixed) = self.fixed_hardware(port) {
            let off = data.iter().zip(port..).any(|(&byte, port)| fixed.write(port, byte));
            return if off { Next::End(Outcome::PowerOff) } else { Next::Enter };
        }
        match (port, data) {
            (SLEEP_CONTROL, &[SLEEP_S5]) => Next::End(Outcome::PowerOff),
            (RESET, &[RESET_VALUE]) | (I8042_COMMAND, &[I8042_RESET]) => Next::End(Outcome::Reset),
            _ => Next::Enter,
        }
    }

    fn serial_register(&self, port: u16) -> Option<(&SerialPort, u8)> {
        const REGISTERS: u16 = 8;
        let k = SERIAL_PORTS.iter().position(|&base| port.wrapping_sub(base) < REGISTERS)?;
        Some((&self.serial[k], (port - SERIAL_PORTS[k]) as u8))
    }

    fn fixed_hardware(&self, port: u16) -> Option<&FixedHardware> {
        self.fixed.as_ref().filter(|_| FixedHardware::PORTS.contains(&port))
    }

    fn disk_register(&self, address: u64) -> Option<(&VirtioDisk, u64)> {
        let offset = address.checked_sub(DISKS.0)?;
        let disk = self.disks.get((offset / virtio::REGISTERS) as usize)?;
        Some((disk, offset % virtio::REGISTERS))
    }
}

fn serial_port(vm: &VmFd, irq: u32) -> anyhow::Result<Arc<SerialPort>> {
    let interrupt = interrupt(vm, irq).context("Cannot connect a serial port's interrupt")?;
    Ok(Arc::new(SerialPort::new(interrupt)))
}

/// Raises an interrupt when it is written to.
fn interrupt(vm: &VmFd, irq: u32) -> anyhow::Result<EventFd> {
    let event = EventFd::new(libc::EFD_NONBLOCK)?;
    vm.register_irqfd(&event, irq).map_err(kvm_error("KVM takes no such event"))?;
    Ok(event)
}
