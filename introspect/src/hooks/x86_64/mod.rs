//! x86-64: variable-length instructions, decoded by iced-x86.

mod displaced;
mod function;

/// True where a return trap displaces the return itself, so that its event is to be recorded before it is carried out; else
/// it displaces what comes before that.
pub const RETURN_IS_DISPLACED: bool = false;

pub use displaced::Displaced;
pub(super) use function::Function;
