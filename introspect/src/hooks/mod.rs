//! Which functions to trap and where in them.
//!
//! [`guest_profiles::hooks`] says what to look for; [`plan`] finds it in one image: the function's symbol,
//! and inside it the instructions that a trap may replace. Such a place must hold in every phase of the kernel's
//! life: it is never an ftrace slot, a return that becomes a thunk, an alternative, a static call or a
//! jump label, because the kernel rewrites those; and nothing may jump between its instructions. The displaced
//! instructions are carried out by [`Displaced`], so the trap is never lifted and no other vCPU slips past.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod site;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
use aarch64 as code;
pub use code::{Displaced, JUMP_LEN, Jump, RETURN_IS_DISPLACED, record};
pub use site::{Site, SiteError, Step};
#[cfg(target_arch = "x86_64")]
use x86_64 as code;
#[cfg(target_arch = "x86_64")]
pub use x86_64::{
    Base, Instruction, IsSlab, Slabs, Stub, StubFilled, StubPages, StubPoint, StubSource, Surroundings,
    Writer,
};

use crate::kernel::Kernel;
use crate::memory::Va;
use guest_profiles::hooks::{Hook, Point, Role, Tracked};
use serde::Serialize;
use std::ops::Range;

/// Said of where a bulk call puts pages, which is kept from its entry to its return: an array, not a list. No address of either has
/// the bit.
pub const KEPT_ARRAY: u64 = 1;

/// One trap to plant.
#[derive(Debug, Clone)]
pub struct Planned {
    /// What it means.
    pub role: Role,
    /// Function it is in.
    pub function: String,
    /// True for the entry trap of a function, false for a return trap.
    pub entry: bool,
    /// Argument position for one-argument roles.
    pub argument: u8,
    /// Place and displaced instructions, link addresses.
    pub site: Site,
    /// Where a jump can take its place while the kernel does not patch its text.
    pub jump: Result<Jump, SiteError>,
}

/// What [`plan`] chose and what it could not cover.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// Traps.
    pub traps: Vec<Planned>,
    /// What is not tracked on this kernel and why.
    pub gaps: Vec<Gap>,
}

/// Something a kernel does that no hook covers.
#[derive(Debug, Clone, Serialize)]
pub struct Gap {
    /// What is not tracked.
    pub cover: String,
    /// Why: no such function, or no place in it.
    pub why: String,
}

impl Plan {
    /// How many of the planned traps carry this role.
    pub fn count(&self, role: Role) -> usize {
        self.traps.iter().filter(|t| t.role == role).count()
    }
}

/// Finds the traps of those `hooks` in `kernel` that are for what is `tracked`, for a trap instruction of `trap_len` bytes.
pub fn plan(kernel: &Kernel, hooks: &[Hook], tracked: &[Tracked], trap_len: usize) -> Plan {
    let mut plan = Plan::default();
    for hook in hooks.iter().filter(|hook| hook.is_for(tracked)) {
        if hook.unless.iter().any(|name| kernel.symbols.lookup(name).is_some()) {
            continue;
        }
        let found = hook.functions.iter().find_map(|name| Some((name, kernel.symbols.lookup(name)?)));
        let Some((name, start)) = found else {
            if !hook.optional {
                plan.gaps.push(Gap {
                    cover: hook.cover.clone(),
                    why: format!("no symbol {}", hook.functions.join(" or ")),
                });
            }
            continue;
        };
        match sites_of(kernel, hook, name, start, trap_len) {
            Ok(traps) => plan.traps.extend(traps),
            Err(why) => plan.gaps.push(Gap { cover: hook.cover.clone(), why: format!("{name}: {why}") }),
        }
    }
    plan
}

/// The code of the function of this name, what the compiler put elsewhere included; link addresses. Nothing where there is none.
pub fn code_of(kernel: &Kernel, name: &str) -> Vec<Range<Va>> {
    let main = kernel.symbols.lookup(name).and_then(|va| Some((va, site::main_part(kernel, name, va).ok()?)));
    let parts = main.into_iter().chain(site::cold_parts(kernel, name));
    parts.map(|(va, bytes)| va..va + bytes.len() as u64).collect()
}

fn sites_of(
    kernel: &Kernel,
    hook: &Hook,
    name: &str,
    start: Va,
    trap_len: usize,
) -> Result<Vec<Planned>, SiteError> {
    let function = code::Function::decode(kernel, name, start)?;
    let planned = |site: Site, entry| Planned {
        role: hook.role,
        function: name.to_owned(),
        entry,
        argument: hook.argument,
        jump: function.jump(hook.role, hook.argument, entry, &site),
        site,
    };
    let mut traps = Vec::new();
    if hook.point != Point::Return {
        traps.push(planned(function.entry(trap_len)?, true));
    }
    if hook.point != Point::Entry {
        traps.extend(function.returns(trap_len)?.into_iter().map(|site| planned(site, false)));
    }
    Ok(traps)
}
