//! vmcores: the memory and registers of a machine as an ELF core file, the form in which kdump, `virsh dump --memory-only`
//! and QEMU's `dump-guest-memory` save them, and which crash and drgn open.
//!
//! ```text
//! ELF header | PT_NOTE, PT_LOAD... | notes | RAM ranges, each on a page of the file | what else the writer adds
//!                                    NT_PRSTATUS of each CPU, "CORE": struct elf_prstatus
//!                                    "VMCOREINFO": text, what the kernel says of itself (kernel/vmcore_info.c)
//!                                    "kleak-vmm": where in the file the tracker's state is
//! ```
//!
//! Files are untrusted: sizes and offsets are checked against the file's, and nothing they name is allocated before.

mod format;
mod notes;
mod read;
#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
mod write;

pub use format::fingerprint;
pub use notes::Attached;
pub use read::{ANOTHER_VERSION, Piece, Vmcore};
pub use write::{Content, Head};

/// `PT_LOAD` and `PT_NOTE` (ELF-64 Object File Format, "Program header").
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// `ET_CORE`.
const ET_CORE: u16 = 4;
/// Sizes of the headers.
const EHDR: usize = 64;
const PHDR: usize = 56;
/// `PN_XNUM`: the number of program headers is in the first section header.
const PN_XNUM: u16 = 0xffff;
