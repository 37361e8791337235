//! What the host cannot do, as opposed to what the user asked wrongly: the command line ends with code 4 for these.

use std::fmt;

/// Why this host cannot run the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostError {
    /// There is no `/dev/kvm`.
    NoKvm,
    /// `/dev/kvm` is there, but not for us.
    Permission,
    /// `/dev/kvm` cannot be opened for another reason, or a set-up call on it failed: what, and why.
    Kvm(&'static str, String),
    /// KVM is there but lacks something: its name.
    Unsupported(&'static str),
    /// Not enough free memory, bytes.
    Memory {
        /// Size of the guest.
        wanted: u64,
        /// What the host can give out.
        available: u64,
    },
}

impl HostError {
    /// What the user can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NoKvm => {
                "load kvm-intel or kvm-amd, switch virtualisation on in the firmware, or use --lab auto"
            }
            Self::Permission => {
                "join the group kvm (usermod -aG kvm USER, then log in again), or run as root"
            }
            Self::Kvm(..) | Self::Unsupported(_) => "run kleak-vmm doctor, or use --lab svm",
            Self::Memory { .. } => "give the guest less with --mem, or free memory on the host",
        }
    }
}

impl fmt::Display for HostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoKvm => write!(f, "Cannot open /dev/kvm: there is no such device"),
            Self::Permission => write!(f, "Cannot open /dev/kvm: permission denied"),
            Self::Kvm(what, why) => write!(f, "{what}: {why}"),
            Self::Unsupported(what) => write!(f, "Cannot use /dev/kvm: it lacks {what}"),
            Self::Memory { wanted, available } => write!(
                f,
                "Not enough memory on the host: the guest wants {} MiB, {} MiB are available",
                wanted >> 20,
                available >> 20
            ),
        }
    }
}

impl std::error::Error for HostError {}

/// For set-up calls on KVM: `vm.call().map_err(kvm_error("Cannot do it"))`.
pub fn kvm_error(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> HostError {
    move |error| HostError::Kvm(what, std::io::Error::from(error).to_string())
}
