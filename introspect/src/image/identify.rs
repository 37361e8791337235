//! What a file is that is no kernel image of ours, for the error message.

use super::platform::{HEADERS, KERNELS};
use super::unpack;

/// Offset and magic of the arm64 Image header (Documentation/arch/arm64/booting.rst).
const ARM64_MAGIC: (usize, &[u8]) = (0x38, b"ARM\x64");
/// Offset and magic of the x86 boot header (Documentation/arch/x86/boot.rst).
const X86_MAGIC: (usize, &[u8]) = (0x202, b"HdrS");
/// Offset and magic of an EFI-zboot image (drivers/firmware/efi/libstub/zboot-header.S).
const ZBOOT_MAGIC: (usize, &[u8]) = (4, b"zimg");
/// A bzImage begins like an EFI executable; its own magic comes at 0x202.
const BOOT_HEADER_END: usize = 0x206;
/// Bytes looked at to tell text from data.
const TEXT_SAMPLE: usize = 512;
const ARM64: &str = "arm64 kernels need an arm64 host";

/// One sentence that names the file's format.
pub(super) fn describe(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "The file is empty".into();
    }
    if has(bytes, ARM64_MAGIC) {
        return format!("It is an arm64 Image; {ARM64}");
    }
    if has(bytes, X86_MAGIC) {
        return "It is an x86 bzImage; x86 kernels need an x86 host".into();
    }
    if bytes.starts_with(b"\x7fELF") {
        return "It is an ELF; arm64 kernels are booted from an Image (arch/arm64/boot)".into();
    }
    if bytes.starts_with(b"MZ") {
        return describe_pe(bytes);
    }
    if let Some(compression) = unpack::compression(bytes) {
        return describe_packed(bytes, compression);
    }
    if bytes.starts_with(b"!<arch>\ndebian-binary") {
        return "It is a Debian package; unpack it and give the vmlinuz inside".into();
    }
    if is_text(bytes) {
        return format!("It is a text file, not a {KERNELS}");
    }
    format!("It is {HEADERS}: it has no known header")
}

fn describe_pe(bytes: &[u8]) -> String {
    if has(bytes, ZBOOT_MAGIC) {
        let inner = zboot_payload(bytes).map(|payload| unpack::peek(payload, 0x40)).unwrap_or_default();
        return if has(&inner, ARM64_MAGIC) {
            format!("It is an EFI-zboot arm64 image; {ARM64}")
        } else {
            "It is an EFI-zboot image, which x86 kernels never are: a kernel for another machine".into()
        };
    }
    if bytes.len() < BOOT_HEADER_END {
        return format!("It begins like a bzImage and ends after {} bytes: truncated", bytes.len());
    }
    // A unified kernel image keeps the kernel in a PE section of this name (UAPI group, UKI specification).
    if bytes[..bytes.len().min(4096)].windows(8).any(|w| w == b".linux\0\0") {
        return "It is a unified kernel image (EFI); give the kernel that was packed into it".into();
    }
    "It is an EFI or Windows executable without a Linux boot header, not a kernel image".into()
}

fn describe_packed(bytes: &[u8], compression: &str) -> String {
    let inner = unpack::peek(bytes, 0x40);
    if has(&inner, ARM64_MAGIC) {
        return format!("It is a {compression}-packed arm64 Image; {ARM64}");
    }
    let content = if inner.starts_with(b"\x7fELF") {
        "an ELF; unpack it first"
    } else if inner.starts_with(b"070701") {
        "an initramfs, not a kernel"
    } else {
        "something that is no kernel image"
    };
    format!("It is a {compression}-packed file that holds {content}")
}

/// The packed kernel of an EFI-zboot image: u32 offset at 8, u32 size at 12.
pub(super) fn zboot_payload(bytes: &[u8]) -> Option<&[u8]> {
    if !bytes.starts_with(b"MZ") || !has(bytes, ZBOOT_MAGIC) {
        return None;
    }
    let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?) as usize);
    let (offset, size) = (word(8)?, word(12)?);
    let rest = bytes.get(offset..)?;
    Some(&rest[..size.min(rest.len())])
}

fn has(bytes: &[u8], (at, magic): (usize, &[u8])) -> bool {
    bytes.get(at..at + magic.len()) == Some(magic)
}

fn is_text(bytes: &[u8]) -> bool {
    let sample = &bytes[..bytes.len().min(TEXT_SAMPLE)];
    sample.iter().all(|&b| matches!(b, b'\t' | b'\n' | b'\r' | 0x20..=0x7e | 0x80..))
}
