//! Guest RAM: host memory that the guest, the vCPU threads and the detector share.

use super::error::HostError;
use crate::meminfo;
use anyhow::Context;
use introspect::memory::{FrozenMemory, MemoryError, Pa, PhysicalMemory, RamRange};
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard, TryLockError};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, MmapRegion,
};

/// What devices transfer to and from; it notes the pages that are written.
pub type Mappings = GuestMemoryMmap<AtomicBitmap>;

/// Guest RAM; clones share it. Reading never blocks and never tears an aligned 8-byte word.
#[derive(Clone)]
pub struct GuestRam(Arc<Inner>);

struct Inner {
    ranges: Vec<RamRange>,
    regions: Vec<Region>,
    /// Write-locked while a paused machine lends slices.
    frozen: RwLock<()>,
    /// Owns the mappings that `regions` points into.
    mappings: Mappings,
}

/// A range of RAM and where it is mapped.
#[derive(Clone, Copy)]
struct Region {
    start: u64,
    len: u64,
    host: *mut u8,
}

// SAFETY: the pointers are to shared mappings that live as long as the value and are accessed through atomics only,
// or through slices while every writer is locked out.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

/// Why guest RAM could not be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteError {
    /// No RAM there.
    Memory(MemoryError),
    /// The machine is paused and its memory lent out: write through [`super::Paused::write`].
    Frozen,
}

impl fmt::Display for WriteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory(error) => error.fmt(f),
            Self::Frozen => write!(f, "The machine is paused, its memory cannot be written"),
        }
    }
}

impl std::error::Error for WriteError {}

impl GuestRam {
    /// Maps RAM for `ranges`. Pages are taken from the host when first touched.
    ///
    /// # Errors
    /// [`HostError::Memory`] when the host has less than that available.
    pub fn new(ranges: Vec<RamRange>) -> anyhow::Result<Self> {
        let bytes = ranges.iter().map(|r| r.len).sum();
        if let Some(available) = available_memory()
            && available < bytes
        {
            return Err(HostError::Memory { wanted: bytes, available }.into());
        }
        let layout: Vec<_> = ranges.iter().map(|r| (GuestAddress(r.start.0), r.len as usize, None)).collect();
        Self::map(ranges, layout).with_context(|| format!("Cannot map {} MiB of guest memory", bytes >> 20))
    }

    /// RAM whose first contents are those of `file`, each range from its offset on. What is written stays in memory.
    ///
    /// # Errors
    /// An offset is not on a page, or the file cannot be mapped.
    pub fn of_file(file: &Arc<File>, ranges: &[(RamRange, u64)]) -> anyhow::Result<Self> {
        let place = |&(range, offset): &(RamRange, u64)| {
            let part = FileOffset::from_arc(Arc::clone(file), offset);
            (GuestAddress(range.start.0), range.len as usize, Some(part))
        };
        let layout = ranges.iter().map(place).collect();
        Self::map(ranges.iter().map(|&(range, _)| range).collect(), layout).context("Cannot map the file")
    }

    fn map(
        ranges: Vec<RamRange>,
        layout: Vec<(GuestAddress, usize, Option<FileOffset>)>,
    ) -> anyhow::Result<Self> {
        let mut mapped = Vec::with_capacity(layout.len());
        for (start, len, file) in layout {
            // A file is what memory held: writing must not change it.
            let flags = match file {
                Some(_) => libc::MAP_PRIVATE | libc::MAP_NORESERVE,
                None => libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE,
            };
            let builder = MmapRegionBuilder::new(len)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(flags);
            let region = match file {
                Some(part) => builder.with_file_offset(part),
                None => builder,
            };
            let region =
                GuestRegionMmap::new(region.build()?, start).context("RAM at impossible addresses")?;
            mapped.push(region);
        }
        let mappings = Mappings::from_regions(mapped)?;
        let mut regions = Vec::with_capacity(ranges.len());
        for region in mappings.iter() {
            let host =
                region.get_host_address(MemoryRegionAddress(0)).context("Guest memory is not mapped")?;
            regions.push(Region { start: region.start_addr().0, len: region.len(), host });
        }
        Ok(Self(Arc::new(Inner { ranges, regions, frozen: RwLock::new(()), mappings })))
    }

    /// Writes `bytes` at `pa`; an aligned 8-byte write is not torn. For vCPU threads (trap handlers) and before the
    /// machine runs; while it is paused use [`super::Paused::write`].
    ///
    /// # Errors
    /// No RAM there, or the machine is paused.
    pub fn write(&self, pa: Pa, bytes: &[u8]) -> Result<(), WriteError> {
        let _writing = match self.0.frozen.try_read() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(WriteError::Frozen),
        };
        self.store(pa, bytes).map_err(WriteError::Memory)
    }

    /// Lends the mappings to a device that reads and writes for the guest: on the thread of a vCPU, which runs.
    pub fn with_mappings<T>(&self, work: impl FnOnce(&Mappings) -> T) -> T {
        let _writing = self.0.frozen.read().unwrap_or_else(PoisonError::into_inner);
        work(&self.0.mappings)
    }

    /// Keeps every writer out until the guard is dropped. The vCPUs must stand still.
    pub(super) fn freeze(&self) -> RwLockWriteGuard<'_, ()> {
        self.0.frozen.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes regardless of the freeze.
    pub(super) fn store(&self, pa: Pa, bytes: &[u8]) -> Result<(), MemoryError> {
        let host = self.host(pa, bytes.len())?;
        // SAFETY: `host` is mapped for `bytes.len()` bytes.
        unsafe { copy_to_guest(host, bytes) };
        for region in self.0.mappings.iter() {
            let at = pa.0.wrapping_sub(region.start_addr().0);
            if at < region.len() {
                region.bitmap().mark_dirty(at as usize, bytes.len());
            }
        }
        Ok(())
    }

    /// Pages of each range that were written from here, by traps and by devices, since this was last asked: a bit for each
    /// page of the host's.
    pub(super) fn take_written(&self) -> Vec<Vec<u64>> {
        self.0.mappings.iter().map(|region| MmapRegion::bitmap(region).get_and_reset()).collect()
    }

    /// Each range of RAM with the host address it is mapped at, for the hypervisor's memory slots.
    pub(crate) fn mappings(&self) -> impl Iterator<Item = (RamRange, u64)> + '_ {
        self.0.ranges.iter().zip(&self.0.regions).map(|(range, region)| (*range, region.host as u64))
    }

    /// Host address of `pa` when `len` bytes from there are in one range.
    fn host(&self, pa: Pa, len: usize) -> Result<*mut u8, MemoryError> {
        for region in &self.0.regions {
            let offset = pa.0.wrapping_sub(region.start);
            if offset < region.len {
                if len as u64 > region.len - offset {
                    return Err(MemoryError::Unbacked { pa: Pa(region.start + region.len) });
                }
                // SAFETY: `offset` is inside the mapping.
                return Ok(unsafe { region.host.add(offset as usize) });
            }
        }
        Err(MemoryError::Unbacked { pa })
    }
}

impl PhysicalMemory for GuestRam {
    fn ranges(&self) -> &[RamRange] {
        &self.0.ranges
    }

    fn read(&self, pa: Pa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let host = self.host(pa, buf.len())?;
        // SAFETY: `host` is mapped for `buf.len()` bytes.
        unsafe { copy_from_guest(host, buf) };
        Ok(())
    }

    fn read_u64(&self, pa: Pa) -> Result<u64, MemoryError> {
        if !pa.0.is_multiple_of(8) {
            let mut bytes = [0; 8];
            self.read(pa, &mut bytes)?;
            return Ok(u64::from_le_bytes(bytes));
        }
        let host = self.host(pa, 8)?;
        // SAFETY: `host` is mapped for 8 bytes, and aligned because mappings start on pages.
        Ok(u64::from_le(unsafe { AtomicU64::from_ptr(host.cast()) }.load(Relaxed)))
    }
}

/// Guest RAM that stands still: lent by a paused machine.
#[derive(Clone, Copy)]
pub struct FrozenRam<'a> {
    ram: &'a GuestRam,
}

impl<'a> FrozenRam<'a> {
    /// `_proof` is the guard of [`GuestRam::freeze`], which keeps writers out for as long as slices live.
    pub(super) fn new(ram: &'a GuestRam, _proof: &'a RwLockWriteGuard<'_, ()>) -> Self {
        Self { ram }
    }
}

impl PhysicalMemory for FrozenRam<'_> {
    fn ranges(&self) -> &[RamRange] {
        self.ram.ranges()
    }

    fn read(&self, pa: Pa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.ram.read(pa, buf)
    }

    fn read_u64(&self, pa: Pa) -> Result<u64, MemoryError> {
        self.ram.read_u64(pa)
    }
}

impl FrozenMemory for FrozenRam<'_> {
    fn slice(&self, pa: Pa, len: usize) -> Result<&[u8], MemoryError> {
        let host = self.ram.host(pa, len)?;
        // SAFETY: mapped for `len` bytes; vCPUs are parked and writers locked out while `self` can exist.
        Ok(unsafe { std::slice::from_raw_parts(host, len) })
    }
}

/// Byte ranges of a copy of `len` bytes that starts at `address`: up to the first aligned word, and whole words.
fn split(address: usize, len: usize) -> (Range<usize>, Range<usize>) {
    let head = address.wrapping_neg() % 8;
    let head = head.min(len);
    let words = (len - head) / 8 * 8;
    (0..head, head..head + words)
}

/// # Safety
/// `from` must be mapped for `buf.len()` bytes.
unsafe fn copy_from_guest(from: *mut u8, buf: &mut [u8]) {
    let (head, words) = split(from as usize, buf.len());
    let tail = words.end..buf.len();
    for k in head.chain(tail) {
        // SAFETY: `k` is below `buf.len()`.
        buf[k] = unsafe { AtomicU8::from_ptr(from.add(k)) }.load(Relaxed);
    }
    let start = words.start;
    for (k, word) in buf[words].chunks_exact_mut(8).enumerate() {
        // SAFETY: inside the mapping, and aligned by `split`.
        let value = unsafe { AtomicU64::from_ptr(from.add(start + 8 * k).cast()) }.load(Relaxed);
        word.copy_from_slice(&value.to_ne_bytes());
    }
}

/// # Safety
/// `to` must be mapped for `bytes.len()` bytes.
unsafe fn copy_to_guest(to: *mut u8, bytes: &[u8]) {
    let (head, words) = split(to as usize, bytes.len());
    let tail = words.end..bytes.len();
    for k in head.chain(tail) {
        // SAFETY: `k` is below `bytes.len()`.
        unsafe { AtomicU8::from_ptr(to.add(k)) }.store(bytes[k], Relaxed);
    }
    let start = words.start;
    for (k, word) in bytes[words].chunks_exact(8).enumerate() {
        let value = u64::from_ne_bytes(word.try_into().expect("8 bytes"));
        // SAFETY: inside the mapping, and aligned by `split`.
        unsafe { AtomicU64::from_ptr(to.add(start + 8 * k).cast()) }.store(value, Relaxed);
    }
}

/// Bytes the host can still give out, swap included; None when it does not say.
fn available_memory() -> Option<u64> {
    let text = meminfo::read()?;
    Some(meminfo::field(&text, "MemAvailable:")? + meminfo::field(&text, "SwapFree:").unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use introspect::memory::PAGE_SIZE;

    fn ram() -> GuestRam {
        let range = |start, pages| RamRange { start: Pa(start), len: pages * PAGE_SIZE };
        GuestRam::new(vec![range(0, 4), range(0x1_0000_0000, 2)]).unwrap()
    }

    #[test]
    fn what_is_written_is_read_at_every_alignment() {
        let ram = ram();
        let bytes: Vec<u8> = (1..=40).collect();
        for base in [0, 0x1_0000_0000] {
            for offset in 0..16 {
                for len in 0..bytes.len() {
                    let pa = Pa(base + 0x100 + offset);
                    ram.write(pa, &bytes[..len]).unwrap();
                    let mut back = vec![0; len];
                    ram.read(pa, &mut back).unwrap();
                    assert_eq!(back, bytes[..len], "{pa} {len}");
                }
                let pa = Pa(base + 0x100 + offset);
                ram.write(pa, &bytes[..8]).unwrap();
                assert_eq!(ram.read_u64(pa).unwrap(), 0x0807_0605_0403_0201);
            }
        }
    }

    #[test]
    fn accesses_outside_ram_name_the_first_bad_address() {
        let ram = ram();
        let unbacked = |pa| MemoryError::Unbacked { pa: Pa(pa) };
        let mut buf = [0; 16];
        assert_eq!(ram.read(Pa(0x3ff8), &mut buf), Err(unbacked(0x4000)));
        assert_eq!(ram.read(Pa(0x4000), &mut buf), Err(unbacked(0x4000)));
        assert_eq!(ram.read(Pa(u64::MAX), &mut buf), Err(unbacked(u64::MAX)));
        assert_eq!(ram.read_u64(Pa(0x1_0000_2000)), Err(unbacked(0x1_0000_2000)));
        assert_eq!(ram.write(Pa(0x9000), &buf), Err(WriteError::Memory(unbacked(0x9000))));
    }

    #[test]
    fn frozen_memory_lends_slices_and_refuses_writers() {
        let ram = ram();
        ram.write(Pa(8), b"frozen").unwrap();
        let guard = ram.freeze();
        let frozen = FrozenRam::new(&ram, &guard);
        assert_eq!(frozen.slice(Pa(8), 6).unwrap(), b"frozen");
        assert!(frozen.slice(Pa(0x3fff), 2).is_err());
        assert_eq!(ram.write(Pa(8), b"x"), Err(WriteError::Frozen));
        drop(guard);
        assert_eq!(ram.write(Pa(8), b"x"), Ok(()));
    }

    #[test]
    fn more_than_the_host_has_is_refused() {
        let error = GuestRam::new(vec![RamRange { start: Pa(0), len: 1 << 46 }]).err().unwrap();
        assert!(matches!(error.downcast_ref(), Some(HostError::Memory { .. })));
    }
}
