//! x86-64: variable-length instructions, decoded by iced-x86.

mod displaced;
mod function;
mod jump;
pub mod record;
mod stub;

/// True where a return trap displaces the return itself, so that its event is to be recorded before it is carried out; else
/// it displaces what comes before that.
pub const RETURN_IS_DISPLACED: bool = false;

pub use displaced::Displaced;
pub(super) use function::Function;
pub use iced_x86::Instruction;
pub use jump::{JUMP_LEN, Jump};
pub use stub::{
    Base, Filled as StubFilled, IsSlab, Pages as StubPages, Point as StubPoint, Slabs, Source as StubSource,
    Stub, Surroundings, Writer,
};
