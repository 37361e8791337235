//! A place for a trap, and why there is none.

use super::Displaced;
use crate::kernel::Kernel;
use crate::memory::Va;
use std::fmt;

/// Longest function decoded, bytes; the longest hooked one is under 8 KiB.
const MAX_FUNCTION: u64 = 64 * 1024;

/// The bytes of a function, but for what the compiler put elsewhere.
///
/// # Errors
/// The image has none there, or more than a function's.
pub(super) fn main_part<'a>(kernel: &'a Kernel, name: &str, start: Va) -> Result<&'a [u8], SiteError> {
    let size = kernel.symbols.size(name).unwrap_or(0);
    if size > MAX_FUNCTION {
        // A part of it would hide returns.
        return Err(SiteError::Unsuitable(start, format!("{size:#x} bytes are no function")));
    }
    let bytes = kernel.image.bytes_at(start, size as usize).filter(|bytes| !bytes.is_empty());
    bytes.ok_or(SiteError::NoCode)
}

/// What the compiler took out of functions of this name as unlikely (GCC's `.cold`), with its places. Functions that share a
/// name are not told apart here.
pub(super) fn cold_parts<'a>(kernel: &'a Kernel, name: &str) -> Vec<(Va, &'a [u8])> {
    let symbols = kernel.symbols.lookup_all(&format!("{name}.cold")).collect::<Vec<_>>();
    let sized = symbols.into_iter().map(|symbol| (symbol.va, kernel.symbols.size_of(symbol)));
    let sized = sized.filter(|&(_, size)| size <= MAX_FUNCTION);
    sized.filter_map(|(va, size)| Some((va, kernel.image.bytes_at(va, size as usize)?))).collect()
}

/// What a displaced instruction does beside changing registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Done,
    /// Store this word there.
    Store(Va, u64),
    /// Store two words, the first there.
    StorePair(Va, [u64; 2]),
    /// Go on there (run-time address), not behind the site.
    Go(Va),
}

/// A place for a trap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    /// Link address of the first byte replaced.
    pub va: Va,
    /// The bytes the image has there: the displaced instructions, whole.
    pub original: Vec<u8>,
    /// What the displaced instructions do, in order.
    pub displaced: Vec<Displaced>,
}

impl Site {
    /// Link address where the guest goes on.
    pub fn resume(&self) -> Va {
        self.va + self.original.len() as u64
    }
}

/// Why a function cannot be trapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SiteError {
    /// The image holds no code there.
    NoCode,
    /// Bytes that are no instruction, at this link address.
    Undecodable(Va),
    /// The function never returns by itself.
    NoReturn,
    /// It leaves by a jump to another function, so that a return there says nothing.
    TailCall(Va),
    /// The instructions at this link address can be neither replaced nor carried out.
    Unsuitable(Va, String),
    /// A trap can be there, or is, but no jump.
    NoJump(Va, String),
}

impl fmt::Display for SiteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCode => write!(f, "The image holds no code for it"),
            Self::Undecodable(va) => write!(f, "Undecodable instruction at {va}"),
            Self::NoReturn => write!(f, "No return instruction"),
            Self::TailCall(va) => write!(f, "Leaves by a jump at {va}"),
            Self::Unsuitable(va, what) => write!(f, "No place for a trap at {va} ({what})"),
            Self::NoJump(va, what) => write!(f, "No place for a jump at {va} ({what})"),
        }
    }
}

impl std::error::Error for SiteError {}
