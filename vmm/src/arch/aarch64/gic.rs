//! The in-kernel interrupt controller: GICv3, or GICv2 where the host has only that (Linux,
//! Documentation/virt/kvm/devices/arm-vgic-v3.rst and arm-vgic.rst).

use super::layout::{GIC_CPU, GIC_DISTRIBUTOR, GIC_REDISTRIBUTORS};
use crate::machine::{HostError, kvm_error};
use kvm_bindings::{
    KVM_CREATE_DEVICE_TEST, KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_DEV_ARM_VGIC_GRP_NR_IRQS, KVM_VGIC_V2_ADDR_TYPE_CPU, KVM_VGIC_V2_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_REDIST, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
};
use kvm_ioctls::{DeviceFd, VmFd};

/// Interrupts, the first 32 of which are each CPU's own: a multiple of 32, and more than the machine has.
const INTERRUPTS: u32 = 64;

/// Which one it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gic {
    /// Redistributors for CPUs.
    V3,
    /// A CPU interface in memory.
    V2,
}

impl Gic {
    /// The one that the host has.
    pub fn of(vm: &VmFd) -> Self {
        // A test opens nothing: the descriptor that it is said to have is 0, standard input, which is not to be closed.
        let test =
            |gic: Self| vm.create_device(&mut gic.device(KVM_CREATE_DEVICE_TEST)).map(std::mem::forget);
        Self::choose(|gic| test(gic).is_ok())
    }

    /// The better one that is there. KVM says when the other is not there either.
    fn choose(is_there: impl Fn(Self) -> bool) -> Self {
        if is_there(Self::V3) { Self::V3 } else { Self::V2 }
    }

    /// Creates it for a machine whose vCPUs are there.
    ///
    /// # Errors
    /// What KVM refused.
    pub fn create(self, vm: &VmFd) -> Result<(), HostError> {
        let device = vm
            .create_device(&mut self.device(0))
            .map_err(kvm_error("Cannot create the interrupt controller"))?;
        let places = match self {
            Self::V3 => [
                (KVM_VGIC_V3_ADDR_TYPE_DIST, GIC_DISTRIBUTOR.0),
                (KVM_VGIC_V3_ADDR_TYPE_REDIST, GIC_REDISTRIBUTORS.0),
            ],
            Self::V2 => {
                [(KVM_VGIC_V2_ADDR_TYPE_DIST, GIC_DISTRIBUTOR.0), (KVM_VGIC_V2_ADDR_TYPE_CPU, GIC_CPU.0)]
            }
        };
        for (what, address) in places {
            set(&device, KVM_DEV_ARM_VGIC_GRP_ADDR, what.into(), &raw const address as u64)?;
        }
        let interrupts = INTERRUPTS;
        set(&device, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, &raw const interrupts as u64)?;
        set(&device, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT.into(), 0)
    }

    fn device(self, flags: u32) -> kvm_create_device {
        let kind = match self {
            Self::V3 => kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
            Self::V2 => kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2,
        };
        kvm_create_device { type_: kind, fd: 0, flags }
    }
}

/// `value` is the address of what is to be set, or 0.
fn set(device: &DeviceFd, group: u32, attr: u64, value: u64) -> Result<(), HostError> {
    let attr = kvm_device_attr { flags: 0, group, attr, addr: value };
    device.set_device_attr(&attr).map_err(kvm_error("Cannot set up the interrupt controller"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newer_one_is_taken_where_it_is_there() {
        assert_eq!(Gic::choose(|_| true), Gic::V3);
        assert_eq!(Gic::choose(|gic| gic == Gic::V2), Gic::V2);
        assert_eq!(Gic::choose(|_| false), Gic::V2);
    }

    #[test]
    fn each_is_a_device_of_its_own() {
        assert_ne!(Gic::V2.device(0).type_, Gic::V3.device(0).type_);
        assert_eq!(Gic::V2.device(KVM_CREATE_DEVICE_TEST).flags, KVM_CREATE_DEVICE_TEST);
    }
}
