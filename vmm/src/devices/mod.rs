//! Devices of the machine: serial ports, disks. A device owns its registers and nothing else; what an access means for the
//! machine (power off, reset) is an action it returns.

#[cfg(target_arch = "aarch64")]
#[path = "pl011.rs"]
pub mod serial;
#[cfg(target_arch = "x86_64")]
#[path = "uart16550.rs"]
pub mod serial;
pub mod virtio;

pub use serial::SerialPort;
pub use virtio::{Disk, VirtioDisk};

/// What stands behind a serial port on the host side. Called on vCPU threads: must not block.
pub trait SerialSink: Send {
    /// Bytes the guest sent.
    fn output(&mut self, bytes: &[u8]);

    /// The guest's driver opened the port (`true`: receive interrupt enabled and DTR raised) or closed it.
    /// `unread` counts the input that was queued for the guest and that its driver has not taken.
    /// What is returned says whether the port is to keep that input (a console does) or to drop it.
    fn open_changed(&mut self, open: bool, unread: usize) -> Unread {
        let _ = (open, unread);
        Unread::Keep
    }
}

/// What becomes of input that a guest's driver has not taken when it closes or opens a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unread {
    /// The next opener gets it.
    Keep,
    /// It is dropped before the next opener sees anything.
    Drop,
}

/// The guest's receiving side of a serial port.
pub trait SerialInput: Send + Sync {
    /// Queues bytes, which the guest gets as its driver drains the port. Never blocks.
    fn push(&self, bytes: &[u8]);

    /// Bytes queued and not taken by the guest's driver yet.
    fn pending(&self) -> usize;
}

/// Throws everything away: a port that nobody listens to.
pub struct NullSink;

impl SerialSink for NullSink {
    fn output(&mut self, _bytes: &[u8]) {}
}
