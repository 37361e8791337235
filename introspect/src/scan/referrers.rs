//! Who refers to an object: every root word and every tracked object's word that points into it.
//!
//! Slow next to a scan (it looks at everything once for one object), so it is for `dump=`.

use super::guest::{GuestMemory, Mapping};
use super::{ScanInput, collect_roots, heap};
use crate::memory::{FrozenMemory, Va};
use crate::registry::Object;
use anyhow::Context;
use std::fmt;
use std::ops::Range;

/// Most that are listed.
const MAX: usize = 64;

/// Where a reference is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Referrer {
    /// In a region of the roots, at this physical address.
    Root {
        /// Region, as scans name it.
        region: String,
        /// Guest physical address of the word.
        pa: u64,
    },
    /// In a register of a vCPU.
    Register {
        /// vCPU index.
        cpu: usize,
    },
    /// In a tracked object.
    Object {
        /// The object.
        object: Object,
        /// Offset of the word in it.
        offset: u64,
    },
}

impl fmt::Display for Referrer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root { region, pa } => write!(f, "root {region}, physical address {pa:#x}"),
            Self::Register { cpu } => write!(f, "a register of vCPU {cpu}"),
            Self::Object { object, offset } => {
                write!(
                    f,
                    "{} object {} (size {}) at offset {offset:#x}",
                    object.kind.name(),
                    object.address,
                    object.size
                )
            }
        }
    }
}

/// Lists references into `target` (addresses), at most [`MAX`] of them; references of an object to itself are left
/// out. Whether such a word counts in a scan depends on its holder: dead objects' words are listed too.
///
/// # Errors
/// As [`super::scan`].
pub fn referrers<M: FrozenMemory>(
    input: &ScanInput<'_, M>,
    target: &Range<u64>,
) -> anyhow::Result<Vec<Referrer>> {
    let guest = GuestMemory::new(input.linux, input.memory)
        .context("Cannot find the guest's direct map and per-CPU memory")?;
    let roots = collect_roots(input, &guest)?;
    let mut found = Vec::new();
    for region in &roots.regions {
        for &extent in &region.extents {
            for offset in guest.bytes(extent).into_iter().flat_map(|bytes| words_into(bytes, target)) {
                found.push(Referrer::Root { region: region.name.clone(), pa: extent.start.0 + offset });
            }
        }
    }
    for cpu in input.cpus.iter().filter(|c| c.online) {
        if cpu.registers.words().iter().any(|word| target.contains(word)) {
            found.push(Referrer::Register { cpu: cpu.index });
        }
    }
    for object in heap(input.registry).filter(|o| !target.contains(&o.address.0)) {
        for copy in guest.copies(object.address) {
            for Mapping { va, extent } in guest.mappings(copy..copy + object.size) {
                for offset in guest.bytes(extent).into_iter().flat_map(|bytes| words_into(bytes, target)) {
                    found.push(Referrer::Object { object, offset: (va - copy) + offset });
                }
            }
        }
        if found.len() >= MAX {
            break;
        }
    }
    found.truncate(MAX);
    Ok(found)
}

/// Offsets of the aligned words that lie in `target`.
fn words_into<'a>(bytes: &'a [u8], target: &'a Range<u64>) -> impl Iterator<Item = u64> + 'a {
    let words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()));
    words.enumerate().filter(|(_, word)| target.contains(word)).map(|(n, _)| n as u64 * 8)
}

/// The addresses of an object.
pub fn addresses(object: &Object) -> Range<u64> {
    let Va(start) = object.address;
    start..start.saturating_add(object.size)
}
