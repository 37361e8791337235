//! What this host's KVM can do, found out by doing it: a guest of a few instructions per trap mechanism, in ring 0 at
//! a kernel address, with a deadline.
//!
//! Capabilities and vendor strings do not tell. A KVM that emulates kernel mode announces guest debugging and answers
//! an `int3` with an internal error; QEMU's SVM never intercepts `int3`, so that the guest takes the #BP itself.

pub(crate) mod deadline;
#[cfg(target_arch = "aarch64")]
#[path = "aarch64.rs"]
mod guest;
#[cfg(target_arch = "x86_64")]
#[path = "x86_64.rs"]
mod guest;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

use crate::arch::TrapInstruction;
use crate::cli::options::TrapChoice;

/// Below this many million instructions per second kernel mode is interpreted by the hypervisor, and a distribution's
/// kernel does not boot in reasonable time. Measured: 1.7 where it is, 400 and more under QEMU's translator, thousands
/// on hardware.
pub const MIN_RING0_MIPS: f64 = 25.0;

/// How one trap mechanism fared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "result")]
pub enum Outcome {
    /// Each trap came back as it should.
    Works {
        /// From one exit to the next, registers read and written, in nanoseconds.
        exit_ns: u64,
    },
    /// It did not.
    Fails {
        /// What came instead.
        reason: String,
    },
}

impl Outcome {
    /// Nanoseconds per exit, where it works.
    pub fn exit_ns(&self) -> Option<u64> {
        match self {
            Self::Works { exit_ns } => Some(*exit_ns),
            Self::Fails { .. } => None,
        }
    }
}

/// A capability of KVM that the virtual machine uses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capability {
    /// KVM's name for it, without the `KVM_CAP_`.
    pub name: String,
    /// Whether nothing runs without it.
    pub required: bool,
    /// Whether it is there.
    pub present: bool,
}

/// Result of the probe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// Each trap instruction, by name.
    #[serde(flatten)]
    pub traps: BTreeMap<TrapInstruction, Outcome>,
    /// A debug register through KVM_GUESTDBG_USE_HW_BP; None where it was not tried.
    pub hardware_breakpoint: Option<Outcome>,
    /// Speed of a loop in ring 0, in million instructions per second; why not, if it did not end.
    #[serde(with = "speed")]
    pub ring0_mips: Result<f64, String>,
    /// Whether registers travel with the exit (KVM_CAP_SYNC_REGS).
    pub sync_regs: bool,
    /// Capabilities looked at.
    pub capabilities: Vec<Capability>,
    /// Most vCPUs a guest may have.
    pub max_vcpus: usize,
}

/// A speed in JSON: `{"mips": 4000.0}` or `{"reason": "..."}`.
mod speed {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Speed {
        Known { mips: f64 },
        Unknown { reason: String },
    }

    pub fn serialize<S: Serializer>(speed: &Result<f64, String>, out: S) -> Result<S::Ok, S::Error> {
        let speed = match speed {
            Ok(mips) => Speed::Known { mips: *mips },
            Err(reason) => Speed::Unknown { reason: reason.clone() },
        };
        speed.serialize(out)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Result<f64, String>, D::Error> {
        Ok(match Speed::deserialize(input)? {
            Speed::Known { mips } => Ok(mips),
            Speed::Unknown { reason } => Err(reason),
        })
    }
}

/// Why there is nothing to probe.
#[derive(Debug)]
pub enum ProbeError {
    /// No such device.
    Missing,
    /// The device is there and may not be opened.
    Permission,
    /// The device is there and does not answer as KVM does.
    Broken(String),
}

impl std::fmt::Display for ProbeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Missing => f.write_str("there is no /dev/kvm"),
            Self::Permission => f.write_str("/dev/kvm may not be opened by this user"),
            Self::Broken(why) => write!(f, "/dev/kvm does not work: {why}"),
        }
    }
}

impl std::error::Error for ProbeError {}

impl ProbeError {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Missing => {
                "load the module kvm_intel or kvm_amd, and switch virtualisation on in the firmware, or nested \
                 virtualisation on the host of this virtual machine"
            }
            Self::Permission => "add yourself to the group kvm (sudo usermod -aG kvm $USER) and log in again",
            Self::Broken(_) => "leave --lab never out, to run in the lab",
        }
    }
}

impl Probe {
    /// The trap instruction for `wish`; an error says why there is none.
    pub fn choose(&self, wish: TrapChoice) -> Result<TrapInstruction, String> {
        if let Some(wanted) = wish.wanted() {
            return self
                .works(wanted)
                .map(|()| wanted)
                .map_err(|reason| format!("this KVM has no {} traps: {reason}", wanted.words()));
        }
        let mut reasons = Vec::new();
        for instruction in TrapInstruction::ALL {
            match self.works(*instruction) {
                Ok(()) => return Ok(*instruction),
                Err(reason) => reasons.push(format!("{}: {reason}", instruction.words())),
            }
        }
        Err(format!("this KVM has no trap that works: {}", reasons.join("; ")))
    }

    fn works(&self, instruction: TrapInstruction) -> Result<(), String> {
        match self.traps.get(&instruction) {
            Some(Outcome::Works { .. }) => Ok(()),
            Some(Outcome::Fails { reason }) => Err(reason.clone()),
            None => Err("not tried".to_owned()),
        }
    }

    /// Whether kernel mode is interpreted instead of run.
    pub fn emulates_kernel_mode(&self) -> bool {
        !self.ring0_mips.as_ref().is_ok_and(|mips| *mips >= MIN_RING0_MIPS)
    }

    /// Whether a guest can run and be traced here; an error says why not.
    pub fn verdict(&self) -> Result<(), String> {
        if let Some(missing) = self.capabilities.iter().find(|cap| cap.required && !cap.present) {
            return Err(format!("KVM lacks KVM_CAP_{}", missing.name));
        }
        match &self.ring0_mips {
            Err(why) => return Err(format!("KVM does not run kernel mode: {why}")),
            Ok(mips) if *mips < MIN_RING0_MIPS => {
                return Err(format!(
                    "KVM emulates kernel mode, {mips:.1} million instructions a second; no kernel boots on it"
                ));
            }
            Ok(_) => {}
        }
        self.choose(TrapChoice::Auto).map(drop)
    }
}

/// How much to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// What decides whether and how a guest is traced.
    Needed,
    /// Hardware breakpoints too, which are only of interest. Not to be tried under QEMU's SVM: the guest passes them
    /// unseen, and they stay armed behind it.
    All,
}

/// Probes KVM at `device`, usually `/dev/kvm`; takes a few milliseconds on hardware, and under two seconds wherever
/// nothing works.
///
/// # Errors
/// There is no KVM that could be asked.
pub fn probe(device: &Path, depth: Depth) -> Result<Probe, ProbeError> {
    let kvm = open(device)?;
    let sync_regs = guest::has_sync_regs(&kvm);
    let measure = |trap| match guest::measure(&kvm, trap, sync_regs) {
        Ok(exit_ns) => Outcome::Works { exit_ns },
        Err(error) => Outcome::Fails { reason: format!("{error:#}") },
    };
    Ok(Probe {
        traps: TrapInstruction::ALL
            .iter()
            .map(|trap| (*trap, measure(guest::Trap::Planted(*trap))))
            .collect(),
        hardware_breakpoint: (depth == Depth::All).then(|| measure(guest::Trap::HardwareBreakpoint)),
        ring0_mips: guest::ring0_mips(&kvm).map_err(|error| format!("{error:#}")),
        sync_regs,
        capabilities: capabilities(&kvm),
        max_vcpus: kvm.get_max_vcpus(),
    })
}

/// Whether the debug registers make exits: see [`Depth::All`] for where not to ask.
pub fn has_debug_registers(device: &Path) -> bool {
    open(device).is_ok_and(|kvm| {
        guest::measure(&kvm, guest::Trap::HardwareBreakpoint, guest::has_sync_regs(&kvm)).is_ok()
    })
}

fn open(device: &Path) -> Result<Kvm, ProbeError> {
    let path = std::ffi::CString::new(device.as_os_str().as_encoded_bytes())
        .map_err(|error| ProbeError::Broken(error.to_string()))?;
    let kvm = Kvm::new_with_path(path).map_err(|error| match io::Error::from(error) {
        error if error.kind() == io::ErrorKind::NotFound => ProbeError::Missing,
        // A node whose driver is not there.
        error if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => ProbeError::Missing,
        error if error.kind() == io::ErrorKind::PermissionDenied => ProbeError::Permission,
        error => ProbeError::Broken(error.to_string()),
    })?;
    match kvm.get_api_version() {
        // KVM's API document: refuse any other version.
        12 => Ok(kvm),
        -1 => Err(ProbeError::Broken("it is not KVM".to_owned())),
        other => Err(ProbeError::Broken(format!("it speaks version {other} of KVM's API, not 12"))),
    }
}

fn capabilities(kvm: &Kvm) -> Vec<Capability> {
    let required = [
        ("USER_MEMORY", Cap::UserMemory),
        ("IRQCHIP", Cap::Irqchip),
        ("IRQFD", Cap::Irqfd),
        ("SET_GUEST_DEBUG", Cap::SetGuestDebug),
        ("MP_STATE", Cap::MpState),
    ];
    let optional = [("SYNC_REGS", Cap::SyncRegs), ("IMMEDIATE_EXIT", Cap::ImmediateExit)];
    let look = |name: &str, cap, required| Capability {
        name: name.to_owned(),
        required,
        present: kvm.check_extension(cap),
    };
    let mut list: Vec<_> = required.into_iter().map(|(name, cap)| look(name, cap, true)).collect();
    list.extend(guest::REQUIRED.iter().map(|(name, cap)| look(name, *cap, true)));
    list.extend(optional.into_iter().map(|(name, cap)| look(name, cap, false)));
    list.extend(guest::OPTIONAL.iter().map(|(name, cap)| look(name, *cap, false)));
    list
}

#[cfg(test)]
mod tests;
