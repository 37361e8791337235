//! A short note of each exit of a vCPU.

use kvm_ioctls::VcpuExit;
use std::fmt;

/// One exit, small enough to note every one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitRecord {
    kind: Kind,
    /// Physical address, or what else tells more.
    place: u64,
    /// Bytes accessed.
    size: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    MmioRead,
    MmioWrite,
    Debug,
    SystemEvent,
    FailedEntry,
    InternalError,
    Other,
}

impl ExitRecord {
    /// Notes an exit.
    pub fn new(exit: &VcpuExit<'_>) -> Self {
        let (kind, place, size) = match exit {
            VcpuExit::MmioRead(address, data) => (Kind::MmioRead, *address, data.len()),
            VcpuExit::MmioWrite(address, data) => (Kind::MmioWrite, *address, data.len()),
            VcpuExit::Debug(debug) => (Kind::Debug, u64::from(debug.hsr), 0),
            VcpuExit::SystemEvent(event, _) => (Kind::SystemEvent, u64::from(*event), 0),
            VcpuExit::FailEntry(reason, _) => (Kind::FailedEntry, *reason, 0),
            VcpuExit::InternalError => (Kind::InternalError, 0, 0),
            _ => (Kind::Other, 0, 0),
        };
        Self { kind, place, size }
    }
}

impl fmt::Display for ExitRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (place, size) = (self.place, self.size);
        match self.kind {
            Kind::MmioRead => write!(f, "read {place:#x}/{size}"),
            Kind::MmioWrite => write!(f, "write {place:#x}/{size}"),
            Kind::Debug => write!(f, "debug, syndrome {place:#x}"),
            Kind::SystemEvent => write!(f, "system event {place}"),
            Kind::FailedEntry => write!(f, "failed entry {place:#x}"),
            Kind::InternalError => write!(f, "internal error"),
            Kind::Other => write!(f, "other"),
        }
    }
}
