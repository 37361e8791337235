//! The report for people.

use std::fmt::{self, Display, Formatter};

use super::{ArmReport, KvmState, LabReport, Report, Runs, VmxReport};
use crate::lab::own_lab;
use crate::probe::{Outcome, Probe};

/// Width of the first column.
const COLUMN: usize = 22;

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let kvm = match (self.kvm.state, &self.kvm.reason) {
            (KvmState::Good, _) | (_, None) => "good".to_owned(),
            (_, Some(reason)) => format!("no: {reason}"),
        };
        line(f, "/dev/kvm", &kvm)?;
        if let Some(probe) = &self.kvm.probe {
            probe_lines(f, "  ", probe)?;
        }
        if let Some(lab) = &self.lab {
            line(f, &format!("lab {}", own_lab()), &lab_words(lab))?;
            if let Some(probe) = &lab.probe {
                probe_lines(f, "  ", probe)?;
            }
        }
        if let Some(vmx) = &self.vmx {
            line(f, "lab vmx", vmx_words(vmx))?;
        }
        if let Some(arm) = &self.arm {
            line(f, "lab arm", arm_words(arm))?;
        }
        line(f, "processors", &self.cpus.to_string())?;
        if let Some(bytes) = self.memory_available_bytes {
            line(f, "memory available", &format!("{} MiB", bytes >> 20))?;
        }
        let word = match self.verdict.runs {
            Runs::Native => "good",
            Runs::Lab => "usable",
            Runs::Nowhere => "unusable",
        };
        writeln!(f, "verdict: {word}: {}", self.verdict.summary)?;
        match &self.verdict.hint {
            Some(hint) => writeln!(f, "hint: {hint}"),
            None => Ok(()),
        }
    }
}

fn line(f: &mut Formatter<'_>, what: &str, found: &str) -> fmt::Result {
    writeln!(f, "{what:COLUMN$} {found}")
}

fn lab_words(lab: &LabReport) -> String {
    let Some(qemu) = &lab.qemu else { return "no: QEMU is not installed".to_owned() };
    match (lab.start_ms, &lab.problem) {
        (_, Some(problem)) => format!("no: {problem}"),
        (Some(ms), None) => format!("good, up in {:.1} s ({qemu})", ms as f64 / 1000.0),
        (None, None) if lab.prepared => format!("prepared, not tried ({qemu})"),
        (None, None) => format!("not prepared yet ({qemu})"),
    }
}

fn vmx_words(vmx: &VmxReport) -> &'static str {
    match vmx {
        VmxReport { installed: false, .. } => "no: Bochs is not installed (only --lab vmx needs it)",
        VmxReport { prepared: true, .. } => "prepared, not tried (Bochs; run --lab vmx)",
        VmxReport { prepared: false, .. } => "not prepared yet (Bochs; run --lab vmx)",
    }
}

fn arm_words(arm: &ArmReport) -> &'static str {
    match arm {
        ArmReport { installed: false, .. } => {
            "no: qemu-system-arm is not installed (only --lab arm needs it, for arm64 kernels)"
        }
        ArmReport { binary: false, .. } => {
            "no: there is no kleak-vmm-aarch64 beside this program (cargo xtask build --arm64 makes it)"
        }
        ArmReport { prepared: true, .. } => "prepared, not tried (for arm64 kernels; run --lab arm)",
        ArmReport { prepared: false, .. } => "not prepared yet (for arm64 kernels; run --lab arm)",
    }
}

fn probe_lines(f: &mut Formatter<'_>, indent: &str, probe: &Probe) -> fmt::Result {
    let speed = match &probe.ring0_mips {
        Ok(mips) => format!("{mips:.1} million instructions/s"),
        Err(why) => format!("no: {why}"),
    };
    line(f, &format!("{indent}kernel mode"), &speed)?;
    let hardware =
        probe.hardware_breakpoint.as_ref().map(|outcome| ("hardware breakpoint".to_owned(), outcome));
    let traps = probe.traps.iter().map(|(trap, outcome)| (format!("{} trap", trap.words()), outcome));
    for (name, outcome) in traps.chain(hardware) {
        let found = match outcome {
            Outcome::Works { exit_ns } => format!("yes, {:.1} µs an exit", *exit_ns as f64 / 1000.0),
            Outcome::Fails { reason } => format!("no: {reason}"),
        };
        line(f, &format!("{indent}{name}"), &found)?;
    }
    let missing: Vec<_> =
        probe.capabilities.iter().filter(|cap| !cap.present).map(|cap| cap.name.as_str()).collect();
    let found = if missing.is_empty() { "all".to_owned() } else { format!("without {}", missing.join(", ")) };
    line(f, &format!("{indent}capabilities"), &format!("{found}; {} vCPUs at most", probe.max_vcpus))
}
