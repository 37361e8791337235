//! Guest virtual memory to guest physical memory, cheap enough for every trap.

use super::Linux;
use crate::arch::Leaf;
use crate::memory::{MemoryError, Pa, PhysicalMemory, Va};

/// Translations remembered while nothing can change under them: inside one trap of a vCPU (whose own stack and
/// current task stay mapped), or as long as the machine is paused.
#[derive(Debug, Clone, Copy, Default)]
pub struct Walk {
    direct_map: Leaf,
    last: Leaf,
}

impl Linux {
    /// Reads guest virtual memory through the kernel's page tables. Addresses of the kernel image and of the direct
    /// map of RAM are translated by arithmetic, so that they work before the tables are up.
    ///
    /// # Errors
    /// Names the first address that is not mapped or not RAM.
    pub fn read(&self, memory: &impl PhysicalMemory, va: Va, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.read_with(memory, &mut Walk::default(), va, buf)
    }

    /// [`Linux::read`] with remembered translations.
    ///
    /// # Errors
    /// As [`Linux::read`].
    pub fn read_with(
        &self,
        memory: &impl PhysicalMemory,
        walk: &mut Walk,
        va: Va,
        buf: &mut [u8],
    ) -> Result<(), MemoryError> {
        let mut done = 0;
        while done < buf.len() {
            let at = va + done as u64;
            let leaf = self.leaf_with(memory, walk, at)?;
            let offset = at - leaf.va;
            let len = usize::try_from(leaf.size - offset).unwrap_or(usize::MAX).min(buf.len() - done);
            memory.read(leaf.pa + offset, &mut buf[done..done + len])?;
            done += len;
        }
        Ok(())
    }

    /// Reads words for an unwinder, with remembered translations; None where nothing can be read. To be used no longer
    /// than a [`Walk`] may be.
    pub fn word_reader(&self, memory: &impl PhysicalMemory) -> impl FnMut(Va) -> Option<u64> {
        let mut walk = Walk::default();
        move |va| {
            let mut word = [0; 8];
            self.read_with(memory, &mut walk, va, &mut word).ok()?;
            Some(u64::from_le_bytes(word))
        }
    }

    /// Physical address of a kernel address.
    ///
    /// # Errors
    /// Nothing mapped there.
    pub fn translate(&self, memory: &impl PhysicalMemory, va: Va) -> Result<Pa, MemoryError> {
        let leaf = self.leaf_with(memory, &mut Walk::default(), va)?;
        Ok(leaf.pa + (va - leaf.va))
    }

    /// Reads a word.
    ///
    /// # Errors
    /// As [`Linux::read`].
    pub fn read_u64(&self, memory: &impl PhysicalMemory, va: Va) -> Result<u64, MemoryError> {
        let mut b = [0; 8];
        self.read(memory, va, &mut b)?;
        Ok(u64::from_le_bytes(b))
    }

    /// Reads a 32-bit word.
    ///
    /// # Errors
    /// As [`Linux::read`].
    pub fn read_u32(&self, memory: &impl PhysicalMemory, va: Va) -> Result<u32, MemoryError> {
        let mut b = [0; 4];
        self.read(memory, va, &mut b)?;
        Ok(u32::from_le_bytes(b))
    }

    /// Reads a pointer.
    ///
    /// # Errors
    /// As [`Linux::read`].
    pub fn read_va(&self, memory: &impl PhysicalMemory, va: Va) -> Result<Va, MemoryError> {
        self.read_u64(memory, va).map(Va)
    }

    /// Reads a NUL-terminated string of at most `max` bytes; what is not UTF-8 is replaced.
    ///
    /// # Errors
    /// As [`Linux::read`], and a string that does not end.
    pub fn read_string(
        &self,
        memory: &impl PhysicalMemory,
        va: Va,
        max: usize,
    ) -> Result<String, MemoryError> {
        self.read_string_with(memory, &mut Walk::default(), va, max)
    }

    pub(super) fn read_string_with(
        &self,
        memory: &impl PhysicalMemory,
        walk: &mut Walk,
        va: Va,
        max: usize,
    ) -> Result<String, MemoryError> {
        let mut bytes = Vec::new();
        while bytes.len() < max {
            // Pieces that never cross a 64-byte line, and so never a page the string does not reach.
            let at = va + bytes.len() as u64;
            let mut piece = [0; 64];
            let len = (64 - at.0 as usize % 64).min(max - bytes.len());
            self.read_with(memory, walk, at, &mut piece[..len])?;
            if let Some(end) = piece[..len].iter().position(|&b| b == 0) {
                bytes.extend_from_slice(&piece[..end]);
                return Ok(String::from_utf8_lossy(&bytes).into_owned());
            }
            bytes.extend_from_slice(&piece[..len]);
        }
        Err(MemoryError::Corrupt { va, what: "a string does not end" })
    }

    /// The `list_head`s of a list, its head excluded, in order. Ends on every input: a list that runs into itself
    /// elsewhere than at its head, or has more than `max` entries, is an error.
    pub(super) fn list(
        &self,
        memory: &impl PhysicalMemory,
        head: Va,
        max: usize,
    ) -> Result<Vec<Va>, MemoryError> {
        let mut nodes = Vec::new();
        let mut walk = Walk::default();
        let mut node = self.next_with(memory, &mut walk, head)?;
        // Brent's cycle detection: compare with one earlier node, moved up at every power of two.
        let mut checkpoint = head;
        while node != head {
            if node == checkpoint || nodes.len() >= max {
                return Err(MemoryError::Corrupt { va: head, what: "a list does not return to its head" });
            }
            nodes.push(node);
            if nodes.len().is_power_of_two() {
                checkpoint = node;
            }
            node = self.next_with(memory, &mut walk, node)?;
        }
        Ok(nodes)
    }

    fn next_with(&self, memory: &impl PhysicalMemory, walk: &mut Walk, node: Va) -> Result<Va, MemoryError> {
        let mut b = [0; 8];
        self.read_with(memory, walk, node, &mut b)?;
        Ok(Va(u64::from_le_bytes(b)))
    }

    /// The mapping that holds `va`: one of `walk`'s, or found and remembered there.
    pub(super) fn leaf_with(
        &self,
        memory: &impl PhysicalMemory,
        walk: &mut Walk,
        va: Va,
    ) -> Result<Leaf, MemoryError> {
        for leaf in [self.addresses.image, walk.direct_map, walk.last] {
            if va - leaf.va < leaf.size {
                return Ok(leaf);
            }
        }
        if walk.direct_map.size == 0 {
            let size = physical_end(memory);
            walk.direct_map = Leaf { va: self.direct_map_base(memory)?, pa: Pa(0), size, special: false };
            if va - walk.direct_map.va < size {
                return Ok(walk.direct_map);
            }
        }
        walk.last = self.space.leaf(memory, va)?;
        Ok(walk.last)
    }

    pub(super) fn read_image_u64(&self, memory: &impl PhysicalMemory, va: Va) -> Result<u64, MemoryError> {
        let pa = self.addresses.image.translate(va).ok_or(MemoryError::NotMapped { va })?;
        memory.read_u64(pa)
    }
}

/// Behind the last byte of RAM.
pub(super) fn physical_end(memory: &impl PhysicalMemory) -> u64 {
    memory.ranges().last().map_or(0, |r| (r.start + r.len).0)
}

/// Little-endian word at `offset` of `bytes`; 0 where it does not fit, which callers rule out by checking the
/// structure's size when they look its offsets up.
pub(crate) fn le64(bytes: &[u8], offset: u64) -> u64 {
    let at = offset as usize;
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// 32-bit [`le64`].
pub(crate) fn le32(bytes: &[u8], offset: u64) -> u32 {
    let at = offset as usize;
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// 16-bit [`le64`].
pub(crate) fn le16(bytes: &[u8], offset: u64) -> u16 {
    let at = offset as usize;
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_le_bytes)
}
