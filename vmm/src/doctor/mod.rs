//! Can this host run it, and how fast; what to do if not.

mod memory;
mod text;

use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};

pub use memory::available_memory_bytes;

use crate::lab::{self, Lab};
use crate::probe::{Depth, Probe, ProbeError, probe};

/// Where KVM is.
const DEVICE: &str = "/dev/kvm";

/// All that was found, `"schema": "kleak-doctor/1"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// `kleak-doctor/1`.
    pub schema: String,
    /// Version of this program.
    pub version: String,
    /// What it comes to.
    pub verdict: Verdict,
    /// The host's KVM.
    pub kvm: KvmReport,
    /// The lab where runs go by themselves (`svm`, on arm64 `arm`), as seen from here; absent in a lab itself.
    pub lab: Option<LabReport>,
    /// The lab `vmx`, as seen from here; absent in a lab itself.
    pub vmx: Option<VmxReport>,
    /// The lab `arm`, for kernels of another architecture than this host's; absent where it is this one's, and in a lab itself.
    pub arm: Option<ArmReport>,
    /// The lab that this report was made in.
    pub inside: Option<String>,
    /// Processors of the host.
    pub cpus: usize,
    /// Memory a guest could have, in bytes.
    pub memory_available_bytes: Option<u64>,
}

/// What it comes to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Where guests run.
    pub runs: Runs,
    /// A sentence.
    pub summary: String,
    /// What to do about it, where something can be done.
    pub hint: Option<String>,
}

/// Where guests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Runs {
    /// On this host's KVM.
    Native,
    /// In the lab.
    Lab,
    /// Nowhere.
    Nowhere,
}

/// The host's KVM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KvmReport {
    /// In a word.
    pub state: KvmState,
    /// Why it is not good.
    pub reason: Option<String>,
    /// What the probe found, where it could be made.
    pub probe: Option<Probe>,
}

/// The state of the host's KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvmState {
    /// Guests run and can be traced.
    Good,
    /// No device.
    Missing,
    /// A device this user may not open.
    NoPermission,
    /// Kernel mode is interpreted.
    Emulated,
    /// It lacks a capability, or a trap that works.
    Unfit,
    /// It does not answer as KVM does.
    Broken,
}

/// The lab `vmx`, which is never tried here: it takes a minute to be up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmxReport {
    /// Whether Bochs and what it needs are installed.
    pub installed: bool,
    /// Whether the helper's kernel is there; the first use fetches it.
    pub prepared: bool,
}

/// The lab `arm` on hosts of another architecture. It is never tried here: no run goes there by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArmReport {
    /// Whether QEMU for arm64 is installed.
    pub installed: bool,
    /// Whether this program's binary for arm64 is beside this one.
    pub binary: bool,
    /// Whether the helper's kernel is there; the first use fetches it.
    pub prepared: bool,
}

/// The lab where runs go by themselves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LabReport {
    /// QEMU's version, if it is there.
    pub qemu: Option<String>,
    /// Whether the helper's kernel is there; the first use fetches it.
    pub prepared: bool,
    /// Milliseconds from the start of QEMU to the first command in the lab, where it was tried.
    pub start_ms: Option<u64>,
    /// What the probe found in it, where it was tried.
    pub probe: Option<Probe>,
    /// Why it did not work, where it was tried and did not.
    pub problem: Option<String>,
}

impl From<Result<Probe, ProbeError>> for KvmReport {
    fn from(probed: Result<Probe, ProbeError>) -> Self {
        match probed {
            Ok(probe) => {
                let reason = probe.verdict().err();
                let state = match reason {
                    None => KvmState::Good,
                    Some(_) if probe.emulates_kernel_mode() => KvmState::Emulated,
                    Some(_) => KvmState::Unfit,
                };
                Self { state, reason, probe: Some(probe) }
            }
            Err(error) => {
                let state = match error {
                    ProbeError::Missing => KvmState::Missing,
                    ProbeError::Permission => KvmState::NoPermission,
                    ProbeError::Broken(_) => KvmState::Broken,
                };
                Self { state, reason: Some(error.to_string()), probe: None }
            }
        }
    }
}

impl KvmReport {
    fn hint(&self) -> Option<&'static str> {
        match self.state {
            KvmState::Good => None,
            KvmState::Missing => Some(ProbeError::Missing.hint()),
            KvmState::NoPermission => Some(ProbeError::Permission.hint()),
            KvmState::Emulated => Some("for full speed take a machine with hardware virtualisation"),
            KvmState::Unfit | KvmState::Broken => Some("for full speed take a machine with a newer kernel"),
        }
    }
}

impl LabReport {
    /// Whether a run would go to the lab, as far as is known.
    fn usable(&self) -> bool {
        self.qemu.is_some()
            && self.problem.is_none()
            && self.probe.as_ref().is_none_or(|probe| probe.verdict().is_ok())
    }
}

impl Verdict {
    /// What `kvm` and `lab` come to.
    pub fn of(kvm: &KvmReport, lab: Option<&LabReport>) -> Self {
        let reason = kvm.reason.clone().unwrap_or_default();
        match (kvm.state, lab) {
            (KvmState::Good, _) => Self {
                runs: Runs::Native,
                summary: "guests run here, on this host's KVM".to_owned(),
                hint: None,
            },
            (_, Some(lab)) if lab.usable() => {
                let first = if lab.prepared {
                    ""
                } else {
                    ", which the first run prepares (about 35 MB to download)"
                };
                Self {
                    runs: Runs::Lab,
                    summary: format!(
                        "guests run in the lab, under emulation and slowly{first}, because {reason}"
                    ),
                    hint: kvm.hint().map(str::to_owned),
                }
            }
            (_, lab) => {
                let qemu = lab::program(lab::own_lab());
                let (why, lab_hint) = match lab {
                    Some(LabReport { qemu: None, .. }) => (
                        format!("there is no {} for the lab", qemu.file),
                        Some(format!("apt-get install {}", qemu.packages)),
                    ),
                    Some(LabReport { problem: Some(problem), .. }) => {
                        (format!("the lab failed: {problem}"), None)
                    }
                    Some(_) => ("the lab's KVM does not work either".to_owned(), None),
                    None => ("this is the lab already".to_owned(), None),
                };
                let hints: Vec<_> = lab_hint.into_iter().chain(kvm.hint().map(str::to_owned)).collect();
                Self {
                    runs: Runs::Nowhere,
                    summary: format!("guests do not run here: {reason}, and {why}"),
                    hint: (!hints.is_empty()).then(|| hints.join("; or ")),
                }
            }
        }
    }
}

impl Report {
    /// Looks at the host. Where its KVM does not do, the lab is tried, if it is prepared.
    pub fn make() -> Self {
        let inside = lab::inside();
        // QEMU's SVM leaves the guest's breakpoint armed when the guest is left, and the lab's own kernel may run into it.
        let depth = if inside.is_some() { Depth::Needed } else { Depth::All };
        let kvm = KvmReport::from(probe(Path::new(DEVICE), depth));
        let lab = inside.is_none().then(|| look_at_lab(kvm.state != KvmState::Good));
        let vmx = inside.is_none().then(|| VmxReport {
            installed: lab::bochs_is_installed(),
            prepared: lab::is_prepared(Lab::Vmx),
        });
        let foreign = inside.is_none() && lab::own_lab() != Lab::Arm;
        let arm = foreign.then(|| ArmReport {
            installed: lab::qemu_version(Lab::Arm).is_some(),
            binary: lab::has_binary(Lab::Arm),
            prepared: lab::is_prepared(Lab::Arm),
        });
        Self {
            schema: "kleak-doctor/1".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            verdict: Verdict::of(&kvm, lab.as_ref()),
            kvm,
            lab,
            vmx,
            arm,
            inside,
            cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory_available_bytes: available_memory_bytes(),
        }
    }
}

fn look_at_lab(try_it: bool) -> LabReport {
    let own = lab::own_lab();
    let mut report = LabReport {
        qemu: lab::qemu_version(own),
        prepared: lab::is_prepared(own),
        start_ms: None,
        probe: None,
        problem: None,
    };
    if try_it && report.qemu.is_some() && report.prepared {
        match probe_lab() {
            Ok((start_ms, probe)) => (report.start_ms, report.probe) = (Some(start_ms), probe),
            Err(error) => report.problem = Some(format!("{error:#}")),
        }
    }
    report
}

/// Runs the doctor in the lab: how long that took to be up, and what it found.
fn probe_lab() -> anyhow::Result<(u64, Option<Probe>)> {
    let captured = lab::capture(&lab::Job::new(lab::own_lab(), ["kleak-vmm", "doctor", "--json"])?)?;
    let report: Report =
        serde_json::from_slice(&captured.stdout).context("the lab's doctor did not answer")?;
    Ok((captured.start.as_millis() as u64, report.kvm.probe))
}

#[cfg(test)]
mod tests;
