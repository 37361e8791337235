//! A jump in the place of a trap: where five bytes can be had, and what they displace.
//!
//! The trap of a hook must hold in every phase of the kernel's life; a jump is there only while nothing is patched, so it
//! may take the return itself: a `jmp` to a return thunk, or the `ret` with its filling that patching makes of it. At an
//! entry it takes whole instructions from where the trap was, which a copy elsewhere can do as well.

use super::function::RETURN_THUNKS;
use crate::kernel::Kernel;
use crate::memory::Va;
use anyhow::{Context, ensure};
use guest_profiles::hooks::Role;
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};

/// `jmp rel32`.
pub const JUMP_LEN: usize = 5;

/// A place for a jump, link address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Jump {
    /// Whole instructions from `va` on, `len` bytes.
    Entry {
        /// First byte.
        va: Va,
        /// At least [`JUMP_LEN`].
        len: usize,
    },
    /// The return at `va`.
    Return {
        /// First byte.
        va: Va,
    },
}

impl Jump {
    /// Link address of the first byte.
    pub fn va(self) -> Va {
        match self {
            Self::Entry { va, .. } | Self::Return { va } => va,
        }
    }

    /// Bytes displaced.
    pub fn len(self) -> usize {
        match self {
            Self::Entry { len, .. } => len,
            Self::Return { .. } => JUMP_LEN,
        }
    }

    /// False: no jump is.
    pub fn is_empty(self) -> bool {
        false
    }

    /// The instructions that a jump displaces from `live`, what a guest's memory holds there now, traps taken out. Those of
    /// an entry must be the image's; relocation changes what they name. `slide` is run-time minus link address.
    ///
    /// # Errors
    /// Memory holds something else: what.
    pub fn displaced(self, kernel: &Kernel, slide: u64, live: &[u8]) -> anyhow::Result<Vec<Instruction>> {
        let at = self.va() + slide;
        ensure!(live.len() == self.len(), "{} bytes at {at} instead of {}", live.len(), self.len());
        let found = decode(live, at);
        match self {
            Self::Entry { va, len } => {
                let image = kernel.image.bytes_at(va, len).context("The image has no code there")?;
                let image = decode(image, va);
                let same = found.len() == image.len()
                    && found.iter().zip(&image).all(|(a, b)| a.code() == b.code() && a.len() == b.len());
                ensure!(same, "The code at {at} is not the image's: {live:02x?}");
                Ok(found)
            }
            Self::Return { .. } => {
                let ret = found.first().context("Nothing at the return")?;
                let is_return = match ret.flow_control() {
                    // What fills the rest is never reached.
                    FlowControl::Return => ret.len() == 1 && live[1..].iter().all(|&byte| byte == 0xcc),
                    FlowControl::UnconditionalBranch => {
                        ret.len() == JUMP_LEN
                            && is_return_thunk(kernel, Va(ret.near_branch_target().wrapping_sub(slide)))
                    }
                    _ => false,
                };
                ensure!(is_return, "No return at {at}: {live:02x?}");
                Ok(vec![*ret])
            }
        }
    }
}

/// True when code of the kernel at this link address does nothing but return.
fn is_return_thunk(kernel: &Kernel, link: Va) -> bool {
    kernel.symbols.resolve(link).is_some_and(|symbol| {
        let known = RETURN_THUNKS.contains(&symbol.name) || symbol.name.ends_with("return_thunk");
        known && symbol.offset == 0
    })
}

fn decode(bytes: &[u8], at: Va) -> Vec<Instruction> {
    Decoder::with_ip(64, bytes, at.0, DecoderOptions::NONE).into_iter().collect()
}

/// True for a role whose events are the host's to act on while the guest stands still: it changes its text, its modules, or what it
/// says of an object, all of it seldom.
pub(super) fn needs_host(role: Role) -> bool {
    match role {
        Role::NotLeak
        | Role::Ignore
        | Role::NoScan
        | Role::ScanArea
        | Role::Patching
        | Role::Patched
        | Role::ModuleLoad
        | Role::ModuleUnload => true,
        Role::SlabAlloc
        | Role::Kmalloc
        | Role::LargeAlloc
        | Role::Free
        | Role::RcuFree
        | Role::BulkAlloc
        | Role::BulkFree
        | Role::Vmalloc
        | Role::Vfree
        | Role::Vmap
        | Role::PercpuAlloc
        | Role::Ioremap
        | Role::PageAlloc
        | Role::PageBulkAlloc
        | Role::PageFree
        | Role::PageListFree
        | Role::PageBatchFree => false,
    }
}

/// The last argument that matters of those from `argument` on.
pub(super) fn last_argument(role: Role, argument: u8) -> u8 {
    argument.saturating_add(u8::from(role == Role::PageFree))
}

/// True for an instruction that does the same elsewhere, that the kernel never patches, and that cannot fault by design. A branch
/// does, if it stays `inside` the function and does not go to what is moved with it; one that leaves may be a static call,
/// which is patched.
pub(super) fn is_movable(i: &Instruction, inside: impl Fn(Va) -> bool) -> bool {
    if i.is_jcc_short_or_near() {
        return inside(Va(i.near_branch_target()));
    }
    let plain = i.flow_control() == FlowControl::Next && !i.has_lock_prefix() && !i.has_rep_prefix();
    plain
        && matches!(
            i.mnemonic(),
            Mnemonic::Push
                | Mnemonic::Pop
                | Mnemonic::Mov
                | Mnemonic::Movsxd
                | Mnemonic::Movzx
                | Mnemonic::Movsx
                | Mnemonic::Lea
                | Mnemonic::Add
                | Mnemonic::Sub
                | Mnemonic::And
                | Mnemonic::Or
                | Mnemonic::Xor
                | Mnemonic::Test
                | Mnemonic::Cmp
                | Mnemonic::Shl
                | Mnemonic::Shr
                | Mnemonic::Sar
                | Mnemonic::Neg
                | Mnemonic::Not
                | Mnemonic::Inc
                | Mnemonic::Dec
        )
}
