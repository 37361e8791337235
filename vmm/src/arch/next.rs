//! What an exit of a vCPU asks for.

use super::{DebugStatus, TrapInstruction};
use crate::machine::Outcome;

/// What an exit asks of the vCPU thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Go on.
    Enter,
    /// Look whether a pause or stop is wanted, then go on.
    Checkpoint,
    /// An instruction that may be a trap of ours.
    Trap(TrapInstruction),
    /// A debug exception: a debugger's, or the guest's own.
    Debug(DebugStatus),
    /// The machine has ended.
    End(Outcome),
    /// It cannot go on: why.
    Fail(String),
}
