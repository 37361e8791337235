//! The kernel image's code as a graph of instructions.
//!
//! The kernel patches its code as it boots and while it runs. None of that changes which callee-saved registers a function
//! reads, but for one thing: jump labels (Documentation/staging/static-keys.rst) turn jumps on and off. So both ways are taken
//! at each, from the kernel's own table; the same goes for faults that are expected (`__ex_table`). What alternatives
//! (arch/x86/include/asm/alternative.h) put in has the operands of what was there, static calls and paravirt calls
//! keep the ABI, ftrace and kprobes keep every register, and returns stay returns.

use super::Register;
use crate::kernel::Kernel;
use crate::memory::Va;
use iced_x86::{Decoder, DecoderOptions, Instruction};

/// Most bytes of an instruction.
const MAX_INSTRUCTION: usize = 15;
/// Entries of a table of edges; the largest kernels have some ten thousand.
const MAX_EDGES: usize = 1 << 20;
/// Functions that jump to the address in the register they are named after (arch/x86/lib/retpoline.S).
const INDIRECT_THUNK: &str = "__x86_indirect_";
/// The registers that are nobody's across a call.
const CALLER_SAVED: [&str; 9] = ["rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11"];

/// Code that can be followed.
pub(in crate::callee_saved) trait Source {
    /// Code from a link address on, as far as it is known; empty where there is none.
    fn bytes(&self, at: Va) -> &[u8];
    /// The function an address belongs to: its start and name.
    fn function(&self, at: Va) -> Option<(Va, &str)>;
    /// Where else the instruction at `from` can lead.
    fn hidden(&self, from: Va) -> impl Iterator<Item = Va>;

    /// Decodes the instruction at a link address; None where there is none.
    fn instruction(&self, at: Va) -> Option<Instruction> {
        let bytes = self.bytes(at);
        let bytes = &bytes[..bytes.len().min(MAX_INSTRUCTION)];
        let instruction = Decoder::with_ip(64, bytes, at.0, DecoderOptions::NONE).decode();
        (!instruction.is_invalid()).then_some(instruction)
    }

    /// What the target of a call or jump is.
    fn callee(&self, target: Va) -> Callee {
        let Some((start, name)) = self.function(target) else { return Callee::Code };
        if let Some(rest) = name.strip_prefix(INDIRECT_THUNK) {
            // `__x86_indirect_thunk_r12`, `__x86_indirect_call_thunk_rbx`.
            let register = rest.rsplit('_').next().unwrap_or_default();
            let caller_saved = CALLER_SAVED.contains(&register);
            return match Register::ALL.into_iter().find(|r| r.name() == register) {
                None if caller_saved => Callee::Function,
                register => Callee::Thunk(register),
            };
        }
        if start == target && !is_cold(name) { Callee::Function } else { Callee::Code }
    }
}

/// True for the part of a function that the compiler moved away from it: no function of its own.
pub(super) fn is_cold(name: &str) -> bool {
    name.contains(".cold")
}

/// What an address outside the flow of a function is.
pub(in crate::callee_saved) enum Callee {
    /// A function, or a part of one.
    Code,
    /// The start of another function than the one that goes there.
    Function,
    /// Goes where a register says: None when it is not known which.
    Thunk(Option<Register>),
}

/// The image's own.
pub(in crate::callee_saved) struct ImageCode<'a> {
    pub(in crate::callee_saved) kernel: &'a Kernel,
    pub(in crate::callee_saved) edges: &'a HiddenEdges,
}

impl Source for ImageCode<'_> {
    fn bytes(&self, at: Va) -> &[u8] {
        self.kernel.image.bytes_from(at).unwrap_or_default()
    }

    fn function(&self, at: Va) -> Option<(Va, &str)> {
        let symbol = self.kernel.symbols.resolve(at)?;
        Some((at - symbol.offset, symbol.name))
    }

    fn hidden(&self, from: Va) -> impl Iterator<Item = Va> {
        self.edges.from(from)
    }
}

/// Ways that the code can take and that are not in its instructions, by where they start.
pub(in crate::callee_saved) struct HiddenEdges {
    /// From and to, ascending.
    edges: Vec<(u64, u64)>,
}

impl HiddenEdges {
    /// From the kernel's tables; None without them.
    pub(in crate::callee_saved) fn recover(kernel: &Kernel) -> Option<Self> {
        // `struct exception_table_entry` (arch/x86/include/asm/extable.h) and `struct jump_entry` (include/linux/jump_label.h)
        // begin alike: two distances, each from its own field.
        let mut edges = table(kernel, "__start___ex_table", "__stop___ex_table", 12)?;
        edges.extend(table(kernel, "__start___jump_table", "__stop___jump_table", 16)?);
        edges.sort_unstable();
        Some(Self { edges })
    }

    fn from(&self, from: Va) -> impl Iterator<Item = Va> {
        let first = self.edges.partition_point(|edge| edge.0 < from.0);
        self.edges[first..].iter().take_while(move |edge| edge.0 == from.0).map(|edge| Va(edge.1))
    }
}

/// Reads one table.
fn table(kernel: &Kernel, start: &str, stop: &str, entry: usize) -> Option<Vec<(u64, u64)>> {
    let (start, stop) = (kernel.symbols.lookup(start)?, kernel.symbols.lookup(stop)?);
    let len = usize::try_from(stop.0.checked_sub(start.0)?).ok().filter(|len| len / entry <= MAX_EDGES)?;
    let bytes = kernel.image.bytes_at(start, len)?;
    let entries = bytes.chunks_exact(entry).enumerate();
    Some(
        entries
            .map(|(n, bytes)| {
                let field = |at: usize| {
                    let word = [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
                    let distance = i64::from(i32::from_le_bytes(word));
                    start.0.wrapping_add((n * entry + at) as u64).wrapping_add_signed(distance)
                };
                (field(0), field(4))
            })
            .collect(),
    )
}
