//! VMCOREINFO as the guest keeps it in its memory, from its `subsys_initcall`s on (kernel/vmcore_info.c, before 6.9
//! kernel/crash_core.c).

use super::Linux;
use crate::memory::{MemoryError, PAGE_SIZE, PhysicalMemory, Va};

/// The text has a page at most (`VMCOREINFO_BYTES`).
const MAX: u64 = PAGE_SIZE;

impl Linux {
    /// The text; None on a kernel without it, or before it is there.
    ///
    /// # Errors
    /// The variables are not in RAM, or their values are none of theirs.
    pub fn vmcoreinfo(&self, memory: &impl PhysicalMemory) -> Result<Option<String>, MemoryError> {
        let (Some(data), Some(size)) = (self.symbol("vmcoreinfo_data"), self.symbol("vmcoreinfo_size"))
        else {
            return Ok(None);
        };
        let (start, len) = (self.read_va(memory, data)?, self.read_u64(memory, size)?);
        if start == Va(0) || len == 0 {
            return Ok(None);
        }
        if len > MAX {
            return Err(MemoryError::Corrupt { va: size, what: "VMCOREINFO is longer than a page" });
        }
        let mut text = vec![0; len as usize];
        self.read(memory, start, &mut text)?;
        Ok(Some(String::from_utf8_lossy(&text).into_owned()))
    }
}
