//! ORC tables: which entry describes the code at an address.
//!
//! `.orc_unwind_ip` holds for each entry the distance (s32) from its own address to the first instruction it
//! describes; `.orc_unwind` the entries (arch/x86/kernel/unwind_orc.c). They are decoded once, and a block index
//! like the kernel's `orc_lookup` leaves a look-up a handful of entries to search.

use super::format::{ENTRY_BYTES, Entry, Format, Frame};
use crate::image::KernelImage;
use crate::memory::Va;
use crate::symbols::SymbolTable;
use crate::types::Btf;
use anyhow::{Context, ensure};

/// Bytes of an element of `.orc_unwind_ip`.
const IP_BYTES: usize = 4;
/// log2 of the fewest bytes of code per block; the kernel's LOOKUP_BLOCK_ORDER.
const MIN_BLOCK_SHIFT: u32 = 8;
/// Farthest apart that the code of one table can be, bytes: the 2 GiB that kernel and modules share.
const MAX_SPREAD: u64 = 1 << 31;

/// ORC entries of the kernel image or of one module, indexed for look-up by instruction address.
pub struct OrcTable {
    format: Format,
    /// First address described.
    base: u64,
    /// Address of each entry minus `base`, ascending.
    ips: Vec<u32>,
    entries: Vec<Entry>,
    /// For each block of code the number of entries that start before it; one more for the end.
    blocks: Vec<u32>,
    block_shift: u32,
}

impl OrcTable {
    /// The image's tables (link addresses).
    ///
    /// # Errors
    /// When the image has none (frame-pointer kernel) or they are damaged.
    pub fn recover(image: &KernelImage, symbols: &SymbolTable, types: Option<&Btf>) -> anyhow::Result<Self> {
        let (ip_va, ips) = table(image, symbols, "orc_unwind_ip")
            .context("The kernel image has no ORC tables (CONFIG_UNWINDER_ORC)")?;
        let (_, entries) = table(image, symbols, "orc_unwind")
            .context("The kernel image has .orc_unwind_ip but no .orc_unwind")?;
        let format = types.and_then(Format::from_types).unwrap_or_else(|| Format::guess(entries));
        Self::new(format, ip_va, ips, entries).context("The kernel image's ORC tables are damaged")
    }

    /// A module's tables, in the encoding of the kernel's: raw `orc_unwind_ip` (s32 each, relative to its own
    /// address, the first at `ip_va`) and `orc_unwind` bytes. None when they do not fit together.
    pub fn from_module(&self, ip_va: Va, ips: &[u8], entries: &[u8]) -> Option<Self> {
        Self::new(self.format, ip_va, ips, entries).ok()
    }

    pub(super) fn new(format: Format, ip_va: Va, ips: &[u8], entries: &[u8]) -> anyhow::Result<Self> {
        let (count, others) = (ips.len() / IP_BYTES, entries.len() / ENTRY_BYTES);
        ensure!(count == others, "There are {count} addresses but {others} entries");
        ensure!(count > 0, "They are empty");
        ensure!(u32::try_from(count).is_ok(), "They have {count} entries, too many for a kernel");
        let address = |(n, ip): (usize, &[u8])| {
            let distance = i32::from_le_bytes(ip.try_into().expect("4 bytes"));
            (ip_va + (n * IP_BYTES) as u64 + i64::from(distance) as u64).0
        };
        let addresses: Vec<u64> = ips.chunks_exact(IP_BYTES).enumerate().map(address).collect();
        let entries: Vec<Entry> = entries.chunks_exact(ENTRY_BYTES).map(|e| format.decode(e)).collect();
        let (addresses, entries) = sorted(addresses, entries);
        let (base, last) = (addresses[0], addresses[count - 1]);
        ensure!(last - base < MAX_SPREAD, "They span code from {:#x} to {last:#x}", base);
        let ips: Vec<u32> = addresses.into_iter().map(|a| (a - base) as u32).collect();
        let (blocks, block_shift) = index(&ips);
        Ok(Self { format, base, ips, entries, blocks, block_shift })
    }

    /// The encoding of the entries, by the kernels that have it, for `inspect`.
    pub fn encoding(&self) -> &'static str {
        self.format.name()
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True when there is no entry.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entry for the instruction at `ip`: the last that starts at or before it. Code behind the last entry's
    /// start is that entry's; the caller knows where code ends.
    #[inline]
    pub(super) fn find(&self, ip: Va) -> Option<&Entry> {
        let offset = u32::try_from(ip.0.checked_sub(self.base)?).ok()?;
        let block = ((offset >> self.block_shift) as usize).min(self.blocks.len() - 2);
        let (start, end) = (self.blocks[block] as usize, self.blocks[block + 1] as usize);
        let after = start + self.ips[start..end].partition_point(|&at| at <= offset);
        // `base` is the first entry's address, so that at least one starts at or before `ip`.
        self.entries.get(after.checked_sub(1)?)
    }
}

/// Address and bytes of a table, by section name, else by the symbols around it.
fn table<'a>(image: &'a KernelImage, symbols: &SymbolTable, name: &str) -> Option<(Va, &'a [u8])> {
    let section = format!(".{name}");
    if let Some(bytes) = image.section_bytes(&section) {
        return Some((image.section(&section)?.va, bytes));
    }
    let start = symbols.lookup(&format!("__start_{name}"))?;
    let end = symbols.lookup(&format!("__stop_{name}"))?;
    let length = usize::try_from(end.0.checked_sub(start.0)?).ok()?;
    Some((start, image.bytes_at(start, length)?))
}

/// The kernel's order: by address, and of several entries at one address those that know nothing first, so that
/// the last one counts (`orc_sort_cmp`). The image's tables are sorted when it is built, a module's when it is loaded.
fn sorted(addresses: Vec<u64>, entries: Vec<Entry>) -> (Vec<u64>, Vec<Entry>) {
    if addresses.is_sorted() {
        return (addresses, entries);
    }
    let mut both: Vec<(u64, Entry)> = addresses.into_iter().zip(entries).collect();
    both.sort_by_key(|&(address, entry)| (address, entry.frame != Frame::Undefined));
    both.into_iter().unzip()
}

/// Entries before each block of code. Blocks are larger where entries are few, which bounds the index.
fn index(ips: &[u32]) -> (Vec<u32>, u32) {
    let last = ips.last().copied().unwrap_or(0);
    let mut shift = MIN_BLOCK_SHIFT;
    while (last >> shift) as usize > ips.len() {
        shift += 1;
    }
    let count = (last >> shift) as usize + 1;
    let mut blocks = Vec::with_capacity(count + 1);
    for (n, &ip) in ips.iter().enumerate() {
        while blocks.len() <= (ip >> shift) as usize {
            blocks.push(n as u32);
        }
    }
    blocks.push(ips.len() as u32);
    (blocks, shift)
}
