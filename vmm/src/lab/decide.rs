//! Here or in the lab.

use images::lab::Lab;

use crate::cli::Failure;
use crate::cli::options::LabChoice;
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
    let wished = match wish {
        LabChoice::Svm => Some(Lab::Svm),
        LabChoice::Vmx => Some(Lab::Vmx),
        LabChoice::Auto | LabChoice::Never => None,
    };
    if let Some(lab) = wished {
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
        _ => Ok(Decision::Lab(Lab::Svm, Some(reason))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::{Outcome, Probe};

    fn probe(mips: f64) -> Probe {
        let works = Outcome::Works { exit_ns: 1000 };
        Probe {
            int3: works.clone(),
            pio: works.clone(),
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
