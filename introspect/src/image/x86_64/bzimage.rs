//! The x86 boot executable: setup header and payload (Documentation/arch/x86/boot.rst).

use anyhow::{Context, bail, ensure};

const SETUP_SECTS: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const XLOADFLAGS: usize = 0x236;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

const SECTOR: u64 = 512;
/// `setup_sects` 0 means this, for loaders of the oldest kernels.
const DEFAULT_SETUP_SECTS: u64 = 4;
/// Boot protocol that brought payload_offset and payload_length (2.6.26).
const VERSION_PAYLOAD: u16 = 0x0208;
/// Boot protocol that brought xloadflags (3.8).
const VERSION_XLOADFLAGS: u16 = 0x020c;
/// xloadflags: the kernel has the 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;

/// True when `bytes` begin with an x86 boot sector and setup header.
pub(super) fn is_boot_executable(bytes: &[u8]) -> bool {
    bytes.get(BOOT_FLAG..BOOT_FLAG + 2) == Some(&[0x55, 0xaa])
        && bytes.get(HEADER_MAGIC..HEADER_MAGIC + 4) == Some(b"HdrS")
}

/// The compressed kernel inside the bzImage, its trailing size word included.
pub(super) fn payload(bytes: &[u8]) -> anyhow::Result<&[u8]> {
    const CUT: &str = "The bzImage is truncated: it ends inside its setup header";
    let version = u16_at(bytes, VERSION).context(CUT)?;
    ensure!(
        version >= VERSION_PAYLOAD,
        "The bzImage speaks boot protocol {}.{:02}, which cannot name its payload; 2.08 (Linux 2.6.26) or later is needed",
        version >> 8,
        version & 0xff
    );
    if version >= VERSION_XLOADFLAGS && u16_at(bytes, XLOADFLAGS).context(CUT)? & XLF_KERNEL_64 == 0 {
        bail!("The bzImage holds a 32-bit x86 kernel; only 64-bit kernels can be run");
    }
    let sectors = match *bytes.get(SETUP_SECTS).context(CUT)? {
        0 => DEFAULT_SETUP_SECTS,
        n => u64::from(n),
    };
    let offset = u64::from(u32_at(bytes, PAYLOAD_OFFSET).context(CUT)?);
    let length = u64::from(u32_at(bytes, PAYLOAD_LENGTH).context(CUT)?);
    ensure!(length != 0, "The bzImage has no payload: its setup header names a length of 0");
    let start = (sectors + 1) * SECTOR + offset;
    let end = start + length;
    ensure!(
        end <= bytes.len() as u64,
        "The bzImage is truncated: its payload ends at byte {end}, the file has {} bytes",
        bytes.len()
    );
    Ok(&bytes[start as usize..end as usize])
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}
