//! arm64: instructions of four bytes.

mod displaced;
mod function;
mod jump;
pub mod record;

/// True where a return trap displaces the return itself, so that its event is to be recorded before it is carried out; else
/// it displaces what comes before that.
pub const RETURN_IS_DISPLACED: bool = true;

pub use displaced::Displaced;
pub(super) use function::Function;
pub use jump::{JUMP_LEN, Jump};
