//! The kernel image's code as a graph of instructions.
//!
//! The kernel patches its code as it boots and while it runs. What that can change of the registers that a function reads is in
//! the kernel's own tables: jump labels (Documentation/staging/static-keys.rst) turn jumps on and off, and alternatives
//! (arch/arm64/include/asm/alternative.h) replace instructions, jumps among them. So all ways are taken at each; the same
//! goes for faults that are expected (`__ex_table`). ftrace and kprobes keep every register.

use super::tables::{Alternative, Bytes};
use crate::arch::instruction::BYTES;
use crate::kernel::Kernel;
use crate::memory::Va;
use rustc_hash::FxHashMap;

/// Code that can be followed.
pub(in crate::callee_saved) trait Source {
    /// The instruction at a link address; None where there is none.
    fn word(&self, at: Va) -> Option<u32>;
    /// The function an address belongs to: its start and name.
    fn function(&self, at: Va) -> Option<(Va, &str)>;
    /// Where else the instruction at `from` can lead.
    fn hidden(&self, from: Va) -> impl Iterator<Item = Va>;

    /// What is carried out behind the instruction at `at` that does not jump.
    fn next(&self, at: Va) -> Va;

    /// Whether a jump to `target` leads to the start of a function, which returns to the caller of the one that jumps.
    fn is_function(&self, target: Va) -> bool {
        self.function(target).is_some_and(|(start, name)| start == target && !is_cold(name))
    }
}

/// True for the part of a function that the compiler moved away from it: no function of its own.
pub(super) fn is_cold(name: &str) -> bool {
    name.contains(".cold")
}

/// The image's own.
pub(in crate::callee_saved) struct ImageCode<'a> {
    pub(in crate::callee_saved) kernel: &'a Kernel,
    pub(in crate::callee_saved) edges: &'a HiddenEdges,
}

impl Source for ImageCode<'_> {
    fn word(&self, at: Va) -> Option<u32> {
        Some(u32::from_le_bytes(*self.kernel.image.bytes_from(at)?.first_chunk()?))
    }

    fn function(&self, at: Va) -> Option<(Va, &str)> {
        let symbol = self.kernel.symbols.resolve(at)?;
        Some((at - symbol.offset, symbol.name))
    }

    fn hidden(&self, from: Va) -> impl Iterator<Item = Va> {
        self.edges.from(from)
    }

    fn next(&self, at: Va) -> Va {
        self.edges.behind.get(&at).copied().unwrap_or(at + BYTES)
    }
}

/// Ways that the code can take and that are not in its instructions, by where they start.
pub(in crate::callee_saved) struct HiddenEdges {
    /// From and to, ascending.
    edges: Vec<(Va, Va)>,
    /// The last instructions of replacements, and what is behind what they replace.
    behind: FxHashMap<Va, Va>,
}

impl HiddenEdges {
    /// From the kernel's tables; None without them.
    pub(in crate::callee_saved) fn recover(kernel: &Kernel) -> Option<Self> {
        let bytes = Bytes::of(&kernel.image)?;
        let mut edges = bytes.jump_labels()?;
        edges.extend(bytes.faults()?);
        let mut behind = FxHashMap::default();
        for Alternative { original, replacement, len } in bytes.alternatives()? {
            if let Some(replacement) = replacement {
                edges.push((original, replacement));
                behind.insert(replacement + len - BYTES, original + len);
            }
            // A jump may be replaced by nothing.
            edges.extend((0..len).step_by(BYTES as usize).map(|n| (original + n, original + n + BYTES)));
        }
        edges.sort_unstable();
        Some(Self { edges, behind })
    }

    fn from(&self, from: Va) -> impl Iterator<Item = Va> {
        let first = self.edges.partition_point(|edge| edge.0 < from);
        self.edges[first..].iter().take_while(move |edge| edge.0 == from).map(|edge| edge.1)
    }
}
