use super::*;

fn works(exit_ns: u64) -> Outcome {
    Outcome::Works { exit_ns }
}

fn fails(reason: &str) -> Outcome {
    Outcome::Fails { reason: reason.to_owned() }
}

fn hardware() -> Probe {
    Probe {
        int3: works(1200),
        pio: works(1300),
        hardware_breakpoint: Some(works(1400)),
        ring0_mips: Ok(6000.0),
        sync_regs: true,
        capabilities: vec![Capability { name: "IRQCHIP".to_owned(), required: true, present: true }],
        max_vcpus: 8,
    }
}

#[test]
fn takes_int3_where_it_works_else_a_port_write() {
    let hardware = hardware();
    assert_eq!(hardware.choose(TrapChoice::Auto), Ok(TrapInstruction::Int3));
    assert_eq!(hardware.choose(TrapChoice::Pio), Ok(TrapInstruction::Pio));
    let lab = Probe { int3: fails("the guest took it"), ..hardware.clone() };
    assert_eq!(lab.choose(TrapChoice::Auto), Ok(TrapInstruction::Pio));
    assert!(lab.choose(TrapChoice::Int3).unwrap_err().contains("the guest took it"));
    let nothing = Probe { pio: fails("no exit"), ..lab };
    let why = nothing.choose(TrapChoice::Auto).unwrap_err();
    assert!(why.contains("the guest took it") && why.contains("no exit"), "{why}");
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
    let probe = Probe { int3: fails("x"), ring0_mips: Err("y".to_owned()), ..hardware() };
    let text = serde_json::to_string(&probe).unwrap();
    assert_eq!(serde_json::from_str::<Probe>(&text).unwrap(), probe);
}

#[test]
fn a_device_that_is_not_kvm() {
    assert!(matches!(probe(Path::new("/nonexistent/kvm"), Depth::Needed), Err(ProbeError::Missing)));
    assert!(matches!(probe(Path::new("/dev/null"), Depth::Needed), Err(ProbeError::Broken(_))));
}
