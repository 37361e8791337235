use super::*;

fn works(exit_ns: u64) -> Outcome {
    Outcome::Works { exit_ns }
}

pub(super) fn hardware() -> Probe {
    Probe {
        traps: TrapInstruction::ALL.iter().map(|trap| (*trap, works(1200))).collect(),
        hardware_breakpoint: Some(works(1400)),
        ring0_mips: Ok(6000.0),
        sync_regs: true,
        capabilities: vec![Capability { name: "IRQCHIP".to_owned(), required: true, present: true }],
        max_vcpus: 8,
    }
}

#[test]
fn verdicts() {
    assert_eq!(hardware().verdict(), Ok(()));
    let slow = Probe { ring0_mips: Ok(1.7), ..hardware() };
    assert!(slow.verdict().unwrap_err().contains("emulates kernel mode"));
    assert!(slow.emulates_kernel_mode() && !hardware().emulates_kernel_mode());
    let stuck = Probe { ring0_mips: Err("it did not come back".to_owned()), ..hardware() };
    assert!(stuck.verdict().unwrap_err().contains("did not come back"));
    let mut poor = hardware();
    poor.capabilities[0].present = false;
    assert!(poor.verdict().unwrap_err().contains("KVM_CAP_IRQCHIP"));
}

#[test]
fn travels_as_json() {
    let mut probe = Probe { ring0_mips: Err("y".to_owned()), ..hardware() };
    probe.traps.insert(TrapInstruction::ALL[0], Outcome::Fails { reason: "x".to_owned() });
    let text = serde_json::to_string(&probe).unwrap();
    assert_eq!(serde_json::from_str::<Probe>(&text).unwrap(), probe);
}

#[test]
fn a_device_that_is_not_kvm() {
    assert!(matches!(probe(Path::new("/nonexistent/kvm"), Depth::Needed), Err(ProbeError::Missing)));
    assert!(matches!(probe(Path::new("/dev/null"), Depth::Needed), Err(ProbeError::Broken(_))));
}
