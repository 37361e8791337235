use super::*;
use crate::arch::TrapInstruction;
use crate::probe::{Capability, Outcome};

fn good_probe() -> Probe {
    let works = Outcome::Works { exit_ns: 1500 };
    Probe {
        traps: TrapInstruction::ALL.iter().map(|trap| (*trap, works.clone())).collect(),
        hardware_breakpoint: Some(works),
        ring0_mips: Ok(4000.0),
        sync_regs: true,
        capabilities: vec![Capability { name: "IRQCHIP".to_owned(), required: true, present: true }],
        max_vcpus: 8,
    }
}

fn emulated_probe() -> Probe {
    let reason = "the trap brought an internal error of KVM (suberror 1)".to_owned();
    let mut probe = Probe { ring0_mips: Ok(1.6), ..good_probe() };
    probe.traps.insert(TrapInstruction::ALL[0], Outcome::Fails { reason });
    probe
}

fn lab(qemu: bool, prepared: bool) -> LabReport {
    let qemu = qemu.then(|| "QEMU 7.2".to_owned());
    LabReport { qemu, prepared, start_ms: None, probe: None, problem: None }
}

fn verdict(probed: Result<Probe, ProbeError>, lab: Option<LabReport>) -> Verdict {
    Verdict::of(&KvmReport::from(probed), lab.as_ref())
}

#[test]
fn hardware_is_good_with_or_without_a_lab() {
    assert_eq!(verdict(Ok(good_probe()), None).runs, Runs::Native);
    assert_eq!(verdict(Ok(good_probe()), Some(lab(false, false))).runs, Runs::Native);
}

#[test]
fn hosts_without_kvm_go_to_the_lab() {
    for probed in [Err(ProbeError::Missing), Err(ProbeError::Permission), Ok(emulated_probe())] {
        let verdict = verdict(probed, Some(lab(true, true)));
        assert_eq!(verdict.runs, Runs::Lab, "{}", verdict.summary);
    }
    let unprepared = verdict(Err(ProbeError::Missing), Some(lab(true, false)));
    assert!(unprepared.runs == Runs::Lab && unprepared.summary.contains("first run prepares"));
}

#[test]
fn reasons_and_hints_are_named() {
    let emulated = verdict(Ok(emulated_probe()), Some(lab(true, true)));
    assert!(emulated.summary.contains("emulates kernel mode"), "{}", emulated.summary);
    let denied = verdict(Err(ProbeError::Permission), Some(lab(false, false)));
    assert_eq!(denied.runs, Runs::Nowhere);
    let hint = denied.hint.unwrap();
    assert!(hint.contains("group kvm") && hint.contains("apt-get install qemu-system-x86"), "{hint}");
    let inside = verdict(Ok(emulated_probe()), None);
    assert!(inside.runs == Runs::Nowhere && inside.summary.contains("the lab already"));
}

#[test]
fn a_lab_that_was_tried_and_failed_is_no_lab() {
    let failed = LabReport { problem: Some("QEMU ended".to_owned()), ..lab(true, true) };
    let verdict = verdict(Err(ProbeError::Missing), Some(failed));
    assert!(verdict.runs == Runs::Nowhere && verdict.summary.contains("QEMU ended"));
    let useless = LabReport { probe: Some(emulated_probe()), ..lab(true, true) };
    assert_eq!(self::verdict(Err(ProbeError::Missing), Some(useless)).runs, Runs::Nowhere);
}

#[test]
fn prints_and_travels() {
    let kvm = KvmReport::from(Ok(emulated_probe()));
    let lab = LabReport { start_ms: Some(2300), probe: Some(good_probe()), ..lab(true, true) };
    let report = Report {
        schema: "kleak-doctor/1".to_owned(),
        version: "0".to_owned(),
        verdict: Verdict::of(&kvm, Some(&lab)),
        kvm,
        lab: Some(lab),
        vmx: Some(VmxReport { installed: true, prepared: false }),
        arm: Some(ArmReport { installed: true, binary: false, prepared: true }),
        inside: None,
        cpus: 2,
        memory_available_bytes: Some(4 << 30),
    };
    let text = report.to_string();
    for expected in [
        "no: KVM emulates",
        "suberror 1",
        "up in 2.3 s",
        "1.5 µs",
        "4096 MiB",
        "not prepared yet (Bochs",
        "no kleak-vmm-aarch64 beside this program",
        "verdict: usable",
        "hint: ",
    ] {
        assert!(text.contains(expected), "{expected} in\n{text}");
    }
    let json = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
}
