//! Devices in memory, and what exits mean.

use super::layout::{DISK_SPIS, DISKS, SERIAL, SERIAL_SPIS};
use super::{DebugStatus, TrapInstruction};
use crate::arch::Next;
use crate::devices::serial::{self, SerialPort};
use crate::devices::{VirtioDisk, virtio};
use crate::machine::{ConsoleLog, Devices, Outcome, kvm_error};
use anyhow::Context;
use kvm_bindings::{
    KVM_ARM_IRQ_TYPE_SHIFT, KVM_ARM_IRQ_TYPE_SPI, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VmFd};
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// First shared peripheral interrupt, as the GIC counts.
const FIRST_SPI: u32 = 32;
/// Exception class of a syndrome (Arm ARM, ESR_ELx), and that of BRK in AArch64 state.
const CLASS_SHIFT: u32 = 26;
pub(super) const CLASS_BRK: u32 = 0x3c;
/// The same of a single step from a lower exception level.
const CLASS_STEP: u32 = 0x32;

/// What stands behind the guest's device addresses, shared by all vCPUs.
pub struct Platform {
    /// The console, and the port to the detector.
    pub serial: [Arc<SerialPort>; 2],
    disks: Vec<Arc<VirtioDisk>>,
    console: Arc<ConsoleLog>,
}

impl Platform {
    /// Creates the devices of `vm`, whose interrupt controller is there.
    ///
    /// # Errors
    /// What KVM refused.
    pub(super) fn new(vm: &Arc<VmFd>, devices: Devices<'_>) -> anyhow::Result<Self> {
        let Devices { console, ram, disks } = devices;
        let serial = SERIAL_SPIS.map(|spi| {
            let vm = Arc::clone(vm);
            let line = KVM_ARM_IRQ_TYPE_SPI << KVM_ARM_IRQ_TYPE_SHIFT | (FIRST_SPI + spi);
            Arc::new(SerialPort::new(Box::new(move |level| {
                // It cannot fail: the interrupt is one of the controller's.
                let _ = vm.set_irq_line(line, level);
            })))
        });
        let connect = |(disk, spi)| {
            let interrupt = EventFd::new(libc::EFD_NONBLOCK)?;
            vm.register_irqfd(&interrupt, spi)
                .map_err(kvm_error("KVM takes no such event"))
                .context("Cannot connect a disk's interrupt")?;
            Ok(VirtioDisk::new(disk, ram.clone(), interrupt))
        };
        let disks = disks.into_iter().zip(DISK_SPIS).map(connect).collect::<anyhow::Result<_>>()?;
        Ok(Self { serial, disks, console })
    }

    /// Decides what an exit means; carries out accesses to devices.
    pub fn handle(&self, exit: VcpuExit<'_>) -> Next {
        match exit {
            VcpuExit::MmioRead(address, data) => {
                self.read(address, data);
                Next::Enter
            }
            VcpuExit::MmioWrite(address, data) => self.write(address, data),
            VcpuExit::Debug(debug) if debug.hsr >> CLASS_SHIFT == CLASS_BRK => {
                Next::Trap(TrapInstruction::Brk)
            }
            VcpuExit::Debug(debug) if debug.hsr >> CLASS_SHIFT == CLASS_STEP => {
                Next::Debug(DebugStatus(u64::from(debug.hsr)))
            }
            VcpuExit::Intr => Next::Checkpoint,
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Next::End(Outcome::PowerOff),
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Next::End(Outcome::Reset),
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _) => Next::End(self.panic()),
            VcpuExit::FailEntry(reason, _) => {
                Next::Fail(format!("The processor refused to enter the guest, reason {reason:#x}"))
            }
            VcpuExit::InternalError => {
                Next::Fail("KVM gave up on an instruction it cannot emulate".to_owned())
            }
            other => Next::Fail(format!("KVM left the guest for a reason not expected: {other:?}")),
        }
    }

    fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some((port, offset)) = self.serial_register(address) {
            let value = port.read(offset).to_le_bytes();
            data.iter_mut().zip(value).for_each(|(byte, value)| *byte = value);
        } else if let Some((disk, offset)) = self.disk_register(address) {
            disk.read(offset, data);
        }
    }

    fn write(&self, address: u64, data: &[u8]) -> Next {
        if let Some((port, offset)) = self.serial_register(address) {
            let mut value = [0; 4];
            value.iter_mut().zip(data).for_each(|(value, byte)| *value = *byte);
            port.write(offset, u32::from_le_bytes(value));
            return self.console.ended().map_or(Next::Enter, Next::End);
        }
        if let Some((disk, offset)) = self.disk_register(address) {
            disk.write(offset, data);
        }
        Next::Enter
    }

    fn serial_register(&self, address: u64) -> Option<(&SerialPort, u64)> {
        let k = SERIAL.iter().position(|base| address.wrapping_sub(base.0) < serial::REGISTERS)?;
        Some((&self.serial[k], address - SERIAL[k].0))
    }

    fn disk_register(&self, address: u64) -> Option<(&VirtioDisk, u64)> {
        let offset = address.checked_sub(DISKS.0)?;
        let disk = self.disks.get((offset / virtio::REGISTERS) as usize)?;
        Some((disk, offset % virtio::REGISTERS))
    }

    fn panic(&self) -> Outcome {
        let line = self.console.panicked().map(|(line, _)| line);
        Outcome::Panic(line.unwrap_or_else(|| "it said nothing on its console".to_owned()))
    }
}
