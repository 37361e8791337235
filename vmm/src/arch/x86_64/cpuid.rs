//! CPUID of the guest: what KVM supports, less what the guest must not use, plus its place among the vCPUs.
//!
//! One package, one thread per core: the APIC id is the core's number. Leaves: Intel SDM volume 2 (CPUID), AMD APM
//! volume 3, appendix E; 0x4000_0000 and up are KVM's own and pass as they are.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Which guest the table is for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    /// vCPUs.
    pub cpus: u32,
    /// KVM emulates the TSC-deadline timer.
    pub tsc_deadline: bool,
    /// The kernel is entered with five levels of page tables.
    pub five_levels: bool,
}

const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const LEAF7_ECX_LA57: u32 = 1 << 16;
const LEAF8001_ECX_SVM: u32 = 1 << 2;

/// Cache or topology leaf: deterministic cache parameters, Intel's and AMD's.
const CACHES: [u32; 2] = [0x4, 0x8000_001d];
/// Extended topology, Intel's first and second form.
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];
/// Describe the host's topology or a nested hypervisor's features.
const HIDDEN: [u32; 2] = [0x8000_000a, 0x8000_0026];

/// Whether the processors have five levels of page tables.
pub(super) fn has_five_levels(supported: &[kvm_cpuid_entry2]) -> bool {
    supported.iter().any(|e| e.function == 7 && e.index == 0 && e.ecx & LEAF7_ECX_LA57 != 0)
}

/// The table of the vCPU with APIC id `apic`, from KVM's `supported` entries.
pub(super) fn table(supported: &[kvm_cpuid_entry2], apic: u32, shape: Shape) -> Vec<kvm_cpuid_entry2> {
    let has = |leaf| supported.iter().any(|e| e.function == leaf);
    let mut entries: Vec<_> = supported
        .iter()
        .filter(|e| !TOPOLOGY.contains(&e.function) && !HIDDEN.contains(&e.function))
        .copied()
        .collect();
    for entry in &mut entries {
        adjust(entry, apic, shape);
    }
    for leaf in TOPOLOGY.into_iter().filter(|&leaf| has(leaf)) {
        entries.extend(topology(leaf, apic, shape.cpus));
    }
    entries
}

fn adjust(entry: &mut kvm_cpuid_entry2, apic: u32, shape: Shape) {
    match entry.function {
        0x1 => {
            entry.ecx &= !LEAF1_ECX_VMX;
            entry.ecx |= LEAF1_ECX_HYPERVISOR | LEAF1_ECX_X2APIC;
            if shape.tsc_deadline {
                entry.ecx |= LEAF1_ECX_TSC_DEADLINE;
            }
            // Initial APIC id, logical processors, cache-line size as it is.
            entry.ebx = apic << 24 | shape.cpus << 16 | entry.ebx & 0xffff;
            entry.edx &= !LEAF1_EDX_HTT;
            if shape.cpus > 1 {
                entry.edx |= LEAF1_EDX_HTT;
            }
        }
        leaf if CACHES.contains(&leaf) => share_caches(entry, shape.cpus),
        // A kernel that is entered with 4 levels stays with them.
        0x7 if entry.index == 0 && !shape.five_levels => entry.ecx &= !LEAF7_ECX_LA57,
        0x8000_0001 => entry.ecx &= !LEAF8001_ECX_SVM,
        // APIC id size, cores less one.
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | id_bits(shape.cpus) << 12 | (shape.cpus - 1),
        // Extended APIC id; core id, one thread per core; node 0 of one.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (apic, apic, 0),
        _ => {}
    }
}

/// Caches of level 3 belong to all cores, others to one.
fn share_caches(entry: &mut kvm_cpuid_entry2, cpus: u32) {
    const TYPE: u32 = 0x1f;
    if entry.eax & TYPE == 0 {
        return;
    }
    let level = entry.eax >> 5 & 7;
    let sharing = if level >= 3 { (1 << id_bits(cpus)) - 1 } else { 0 };
    let cores = (1 << id_bits(cpus)) - 1;
    entry.eax = entry.eax & 0x3fff | sharing << 14;
    if entry.function == 0x4 {
        entry.eax |= cores << 26;
    }
}

/// Two levels, threads and cores, and the empty third that ends the list.
fn topology(leaf: u32, apic: u32, cpus: u32) -> [kvm_cpuid_entry2; 3] {
    const THREADS: u32 = 1 << 8;
    const CORES: u32 = 2 << 8;
    let level = |index, eax, ebx, kind| kvm_cpuid_entry2 {
        function: leaf,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: kind | index,
        edx: apic,
        ..Default::default()
    };
    [level(0, 0, 1, THREADS), level(1, id_bits(cpus), cpus, CORES), level(2, 0, 0, 0)]
}

/// Bits of an APIC id for `cpus` vCPUs.
fn id_bits(cpus: u32) -> u32 {
    cpus.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        let ones = u32::MAX;
        kvm_cpuid_entry2 { function, index, eax: ones, ebx: ones, ecx: ones, edx: ones, ..Default::default() }
    }

    fn shape(cpus: u32) -> Shape {
        Shape { cpus, tsc_deadline: true, five_levels: false }
    }

    fn find(table: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *table.iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn each_cpu_has_its_own_id_everywhere() {
        let supported = [entry(1, 0), entry(0xb, 0), entry(0x1f, 0), entry(0x8000_001e, 0)];
        let table = table(&supported, 3, shape(6));
        assert_eq!(find(&table, 1, 0).ebx >> 16, 0x0306);
        for leaf in TOPOLOGY {
            let cores = find(&table, leaf, 1);
            assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (3, 6, 0x201, 3));
            assert_eq!(find(&table, leaf, 2).ecx, 2, "the list ends");
        }
        let amd = find(&table, 0x8000_001e, 0);
        assert_eq!((amd.eax, amd.ebx, amd.ecx), (3, 3, 0));
    }

    #[test]
    fn nested_virtualisation_and_unused_levels_are_hidden() {
        let supported = [entry(1, 0), entry(7, 0), entry(0x8000_0001, 0), entry(0x8000_000a, 0)];
        let hidden = table(&supported, 0, shape(1));
        assert_eq!(find(&hidden, 1, 0).ecx & LEAF1_ECX_VMX, 0);
        assert_eq!(find(&hidden, 0x8000_0001, 0).ecx & LEAF8001_ECX_SVM, 0);
        assert_eq!(find(&hidden, 7, 0).ecx & LEAF7_ECX_LA57, 0);
        assert!(hidden.iter().all(|e| e.function != 0x8000_000a));
        let five = table(&supported, 0, Shape { five_levels: true, ..shape(1) });
        assert_ne!(find(&five, 7, 0).ecx & LEAF7_ECX_LA57, 0);
    }

    #[test]
    fn topology_leaves_are_not_made_up() {
        assert!(table(&[entry(1, 0)], 0, shape(2)).iter().all(|e| !TOPOLOGY.contains(&e.function)));
    }

    #[test]
    fn a_last_level_cache_is_shared_by_all() {
        let cache = |level: u32| kvm_cpuid_entry2 { eax: level << 5 | 3, ..entry(4, level) };
        let table = table(&[cache(1), cache(3)], 0, shape(8));
        assert_eq!(find(&table, 4, 1).eax >> 14 & 0xfff, 0);
        assert_eq!(find(&table, 4, 3).eax >> 14 & 0xfff, 7);
        assert_eq!(find(&table, 4, 1).eax >> 26, 7);
    }
}
