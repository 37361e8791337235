//! Here or in the lab.

use images::lab::Lab;

use std::env::consts::ARCH;

use crate::cli::Failure;
use crate::cli::options::{LabChoice, RunOptions};
use crate::probe::{Probe, ProbeError};

/// Where a virtual machine is to run.
#[derive(Debug)]
pub enum Decision {
    /// On this host's KVM, which the probe found good.
    Here(Box<Probe>),
    /// In a lab; why not here, for the one line that says so. None where the user asked for the lab.
    Lab(Lab, Option<String>),
}

/// Decides by the user's wish, and by the probe where that leaves it open.
///
/// Errors when the host's KVM cannot be used and the lab must not be.
pub fn decide(
    wish: LabChoice,
    probe: impl FnOnce() -> Result<Probe, ProbeError>,
) -> Result<Decision, Failure> {
    if let Some(lab) = wished(wish) {
        return Ok(Decision::Lab(lab, None));
    }
    let (reason, hint) = match probe() {
        Ok(probe) => match probe.verdict() {
            Ok(()) => return Ok(Decision::Here(Box::new(probe))),
            Err(reason) => (reason, "leave --lab never out, to run in the lab"),
        },
        Err(error) => (error.to_string(), error.hint()),
    };
    match wish {
        LabChoice::Never => Err(Failure::host(format!("No usable KVM: {reason}")).hint(hint)),
        _ => Ok(Decision::Lab(own_lab(), Some(reason))),
    }
}

/// The lab that was asked for.
fn wished(wish: LabChoice) -> Option<Lab> {
    match wish {
        LabChoice::Svm => Some(Lab::Svm),
        LabChoice::Vmx => Some(Lab::Vmx),
        LabChoice::Arm => Some(Lab::Arm),
        LabChoice::Auto | LabChoice::Never => None,
    }
}

/// The lab where guests of this host's architecture go by themselves.
pub fn own_lab() -> Lab {
    let mut labs = Lab::ALL.into_iter();
    labs.find(|lab| lab.arch() == ARCH).unwrap_or(Lab::Svm)
}

/// The lab of another architecture that was asked for. All else of the guest is looked at there: this program knows its own
/// architecture's kernels only.
pub fn foreign(options: &RunOptions) -> Option<Lab> {
    wished(options.lab).filter(|lab| lab.arch() != ARCH)
}

/// The architecture of the guest, as Rust names it.
pub fn guest_arch(options: &RunOptions) -> &'static str {
    arch_in(options.lab)
}

/// The architecture of guests in the lab of this choice.
pub fn arch_in(wish: LabChoice) -> &'static str {
    wished(wish).map_or(ARCH, Lab::arch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::TrapInstruction;
    use crate::probe::{Outcome, Probe};

    fn probe(mips: f64) -> Probe {
        let works = Outcome::Works { exit_ns: 1000 };
        Probe {
            traps: TrapInstruction::ALL.iter().map(|trap| (*trap, works.clone())).collect(),
            hardware_breakpoint: Some(works),
            ring0_mips: Ok(mips),
            sync_regs: true,
            capabilities: Vec::new(),
            max_vcpus: 8,
        }
    }

    #[test]
    fn decisions() {
        let here = |decision| matches!(decision, Ok(Decision::Here(_)));
        let lab = |decision| matches!(decision, Ok(Decision::Lab(Lab::Svm, _)));
        assert!(here(decide(LabChoice::Auto, || Ok(probe(5000.0)))));
        assert!(here(decide(LabChoice::Never, || Ok(probe(5000.0)))));
        assert!(lab(decide(LabChoice::Svm, || Ok(probe(5000.0)))));
        assert!(matches!(decide(LabChoice::Vmx, || Ok(probe(5000.0))), Ok(Decision::Lab(Lab::Vmx, None))));
        assert!(lab(decide(LabChoice::Auto, || Ok(probe(1.6)))));
        assert!(lab(decide(LabChoice::Auto, || Err(ProbeError::Missing))));
        let refused = decide(LabChoice::Never, || Ok(probe(1.6))).unwrap_err();
        assert!(refused.to_string().contains("emulates kernel mode"), "{refused}");
        let refused = decide(LabChoice::Never, || Err(ProbeError::Permission)).unwrap_err();
        assert_eq!(crate::cli::failure::exit_code(&refused.into()), crate::cli::ExitCode::Host);
    }
}
