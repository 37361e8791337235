//! The vCPUs before their first instruction.

use super::cpuid::{self, Shape};
use super::registers::MSR_KERNEL_GS_BASE;
use super::{Hardware, Platform};
use crate::boot::Loaded;
use crate::machine::{Config, Devices, FiveLevels, HostError, kvm_error};
use anyhow::{Context, ensure};
use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs,
    kvm_segment, kvm_sregs, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use std::sync::Arc;

/// Extensions that the machine cannot do without.
const NEEDED: [(Cap, &str); 10] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::SyncRegs, "KVM_CAP_SYNC_REGS"),
];

/// Checks that this KVM has all the machine needs.
///
/// # Errors
/// Names the first thing missing.
pub fn check_capabilities(kvm: &Kvm) -> Result<(), HostError> {
    if kvm.get_api_version() != KVM_API_VERSION as i32 {
        return Err(HostError::Unsupported("the stable KVM interface (API version 12)"));
    }
    match NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(HostError::Unsupported(name)),
        None => Ok(()),
    }
}

/// Levels of the page tables that the kernel is entered with.
///
/// # Errors
/// Five are asked for, and this host's processors have none.
pub fn page_table_levels(kvm: &Kvm, wanted: FiveLevels) -> Result<u8, HostError> {
    let possible = wanted != FiveLevels::Never && cpuid::has_five_levels(supported_cpuid(kvm)?.as_slice());
    match wanted {
        FiveLevels::Always if !possible => Err(HostError::Unsupported("five levels of page tables (LA57)")),
        _ => Ok(if possible { 5 } else { 4 }),
    }
}

fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, HostError> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm_error("Cannot ask KVM for CPUID"))
}

/// True when the guest's processors have pages of one GiB (Pdpe1gb, AMD APM volume 3, appendix E).
pub fn has_gigabyte_pages(kvm: &Kvm) -> bool {
    const LEAF8001_EDX_PDPE1GB: u32 = 1 << 26;
    supported_cpuid(kvm).is_ok_and(|table| {
        let features = table.as_slice().iter().find(|entry| entry.function == 0x8000_0001);
        features.is_some_and(|entry| entry.edx & LEAF8001_EDX_PDPE1GB != 0)
    })
}

/// Creates the interrupt chips, then the vCPUs, the first at the kernel's entry, the others waiting to be started by it.
///
/// # Errors
/// What KVM refused.
pub fn assemble(
    kvm: &Kvm,
    vm: &Arc<VmFd>,
    config: &Config<'_>,
    loaded: &Loaded,
    devices: Devices<'_>,
) -> anyhow::Result<(Platform, Vec<VcpuFd>)> {
    let platform = Platform::new(vm, Hardware::of(&config.cmdline), devices)?;
    Ok((platform, create_vcpus(kvm, vm, config, loaded)?))
}

fn create_vcpus(kvm: &Kvm, vm: &VmFd, config: &Config<'_>, loaded: &Loaded) -> anyhow::Result<Vec<VcpuFd>> {
    let supported = supported_cpuid(kvm)?;
    let shape = Shape {
        cpus: config.cpus as u32,
        tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
        five_levels: loaded.placement.levels == 5,
    };
    (0..shape.cpus)
        .map(|id| {
            let vcpu =
                vm.create_vcpu(u64::from(id)).map_err(kvm_error("Cannot create a virtual processor"))?;
            let table = cpuid::table(supported.as_slice(), id, shape);
            set_up(&vcpu, &table).with_context(|| format!("Cannot set up vCPU {id}"))?;
            if id == 0 {
                enter_at(&vcpu, loaded).context("Cannot set up the boot vCPU")?;
            }
            Ok(vcpu)
        })
        .collect()
}

fn set_up(vcpu: &VcpuFd, table: &[kvm_bindings::kvm_cpuid_entry2]) -> anyhow::Result<()> {
    // CPUID first: it decides which MSRs exist.
    vcpu.set_cpuid2(&CpuId::from_entries(table).context("CPUID has too many leaves")?)
        .context("KVM refuses its CPUID")?;
    set_msrs(vcpu)?;
    enable_xsave_features(vcpu, table)?;
    // Power-up values of the x87 control word and MXCSR (Intel SDM volume 3, table 11-1).
    vcpu.set_fpu(&kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() })
        .context("KVM refuses its FPU state")?;
    connect_interrupt_pins(vcpu)
}

/// Starts with every XSAVE feature the guest may have switched on. A kernel does that itself, but a nested hypervisor
/// under QEMU's translator never sees it (XSETBV is not intercepted there), goes on to report the size of an XSAVE area
/// without them, and Linux warns of the inconsistency and does without AVX.
fn enable_xsave_features(vcpu: &VcpuFd, table: &[kvm_bindings::kvm_cpuid_entry2]) -> anyhow::Result<()> {
    /// Intel SDM volume 1, 13.3: tile registers need the process's permission (arch_prctl(2)).
    const TILES: u64 = 3 << 17;
    let leaf = table.iter().find(|e| e.function == 0xd && e.index == 0);
    let features = leaf.map_or(0, |e| u64::from(e.edx) << 32 | u64::from(e.eax)) & !TILES;
    if features == 0 {
        return Ok(());
    }
    let mut registers = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    registers.xcrs[0].value = features;
    vcpu.set_xcrs(&registers).context("KVM refuses its extended control register")
}

fn set_msrs(vcpu: &VcpuFd) -> anyhow::Result<()> {
    // Intel SDM volume 4; the firmware of a PC leaves these so.
    const SYSENTER: [u32; 3] = [0x174, 0x175, 0x176];
    const STAR_LSTAR_CSTAR_MASK: [u32; 4] = [0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084];
    const TSC: u32 = 0x10;
    const MISC_ENABLE: (u32, u64) = (0x1a0, 1); // fast strings
    const MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 0x806); // enabled, write-back
    let zero = SYSENTER.into_iter().chain(STAR_LSTAR_CSTAR_MASK).chain([MSR_KERNEL_GS_BASE, TSC]);
    let entries: Vec<kvm_msr_entry> = zero
        .map(|index| (index, 0))
        .chain([MISC_ENABLE, MTRR_DEF_TYPE])
        .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() })
        .collect();
    let msrs = Msrs::from_entries(&entries).context("Too many MSRs")?;
    let written = vcpu.set_msrs(&msrs).context("KVM refuses its MSRs")?;
    ensure!(written == entries.len(), "KVM refuses MSR {:#x}", entries[written.min(entries.len() - 1)].index);
    Ok(())
}

/// LINT0 takes the 8259's interrupts, LINT1 is the NMI (Intel MultiProcessor Specification, 3.6.2).
fn connect_interrupt_pins(vcpu: &VcpuFd) -> anyhow::Result<()> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const EXT_INT: u32 = 0x700;
    const NMI: u32 = 0x400;
    let mut lapic = vcpu.get_lapic().context("Cannot read its local APIC")?;
    set_lapic_register(&mut lapic, LVT_LINT0, EXT_INT);
    set_lapic_register(&mut lapic, LVT_LINT1, NMI);
    vcpu.set_lapic(&lapic).context("KVM refuses its local APIC")
}

fn set_lapic_register(lapic: &mut kvm_lapic_state, register: usize, value: u32) {
    for (to, from) in lapic.regs[register..register + 4].iter_mut().zip(value.to_le_bytes()) {
        *to = from as _;
    }
}

/// 64-bit mode at the kernel's entry, as the boot protocol wants it (Documentation/arch/x86/boot.rst, 64-bit boot
/// protocol): flat segments, identity-mapped page tables, RSI at `boot_params`, interrupts off.
fn enter_at(vcpu: &VcpuFd, loaded: &Loaded) -> anyhow::Result<()> {
    const CR0_PE: u64 = 1;
    const CR0_ET: u64 = 1 << 4;
    const CR0_PG: u64 = 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const CR4_LA57: u64 = 1 << 12;
    const EFER_LME: u64 = 1 << 8;
    const EFER_LMA: u64 = 1 << 10;
    let mut system: kvm_sregs = vcpu.get_sregs().context("Cannot read its system registers")?;
    system.gdt.base = loaded.gdt.0;
    system.gdt.limit = loaded.gdt_limit;
    system.idt.limit = 0;
    system.cs = flat_segment(loaded.code_selector, true);
    let data = flat_segment(loaded.data_selector, false);
    (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
    system.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, ..Default::default() };
    system.cr0 = CR0_PE | CR0_ET | CR0_PG;
    system.cr3 = loaded.page_tables.0;
    system.cr4 = if loaded.placement.levels == 5 { CR4_PAE | CR4_LA57 } else { CR4_PAE };
    system.efer = EFER_LME | EFER_LMA;
    vcpu.set_sregs(&system).context("KVM refuses its system registers")?;
    let registers =
        kvm_regs { rip: loaded.entry.0, rsi: loaded.boot_params.0, rflags: 2, ..Default::default() };
    vcpu.set_regs(&registers).context("KVM refuses its general registers")
}

fn flat_segment(selector: u16, code: bool) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        // Accessed, readable and executable, or writable.
        type_: if code { 0xb } else { 0x3 },
        present: 1,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}
