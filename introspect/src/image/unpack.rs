//! Kernel payload compressions, by magic (the kernel's list: lib/decompress.c).
//!
//! Behind the compressed data the build appends the unpacked size as a little-endian u32
//! (scripts/Makefile.lib `size_append`; gzip's own trailer ends with the same word).

use super::MAX_IMAGE_BYTES;
use anyhow::{Context, bail, ensure};
use std::io::Read;

/// Block size of the LZ4 legacy frame as `lz4 -l` writes it, bytes.
const LZ4_BLOCK: usize = 8 << 20;
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// Largest block `lzop` writes, bytes (lib/decompress_unlzo.c).
const LZO_BLOCK: usize = 256 << 10;
const LZO_MAGIC: [u8; 9] = [0x89, b'L', b'Z', b'O', 0x00, 0x0d, 0x0a, 0x1a, 0x0a];
/// `zstd -22 --ultra`, which packs kernels (scripts/Makefile.lib), uses a 128 MiB window.
const ZSTD_MAX_WINDOW: u64 = 128 << 20;
/// Memory an LZMA decoder may take, KiB: 128 MiB of dictionary (scripts/xz_wrap.sh) and its tables.
const LZMA_MAX_KIB: u32 = 160 << 10;

/// A compression: its name, its magic, and what unpacks it.
struct Codec {
    name: &'static str,
    magic: &'static [u8],
    unpack: fn(&[u8], usize) -> anyhow::Result<Vec<u8>>,
}

const CODECS: [Codec; 7] = [
    Codec { name: "gzip", magic: &[0x1f, 0x8b], unpack: gzip },
    Codec { name: "xz", magic: &[0xfd, b'7', b'z', b'X', b'Z', 0], unpack: xz },
    Codec { name: "zstd", magic: &[0x28, 0xb5, 0x2f, 0xfd], unpack: zstd },
    Codec { name: "lz4", magic: &LZ4_LEGACY, unpack: lz4_legacy },
    Codec { name: "bzip2", magic: b"BZh", unpack: bzip2 },
    Codec { name: "lzo", magic: &LZO_MAGIC, unpack: lzop },
    Codec { name: "lzma", magic: &[0x5d, 0, 0], unpack: lzma },
];

/// Name of the compression `bytes` begin with.
pub(super) fn compression(bytes: &[u8]) -> Option<&'static str> {
    codec(bytes).map(|codec| codec.name)
}

fn codec(bytes: &[u8]) -> Option<&'static Codec> {
    CODECS.iter().find(|codec| bytes.starts_with(codec.magic))
}

/// Unpacks a payload with its trailing size word.
pub(super) fn unpack(payload: &[u8]) -> anyhow::Result<(&'static str, Vec<u8>)> {
    let codec = codec(payload).with_context(|| {
        format!("No known compression begins with {:02x?}", &payload[..payload.len().min(8)])
    })?;
    let (_, size) = payload.split_last_chunk().context("Less than 4 bytes")?;
    let size = u32::from_le_bytes(*size);
    ensure!(
        u64::from(size) <= MAX_IMAGE_BYTES,
        "Its size word says {size} bytes, more than the {MAX_IMAGE_BYTES} that are unpacked"
    );
    let size = size as usize;
    let bytes =
        (codec.unpack)(payload, size).with_context(|| format!("Its {} data does not unpack", codec.name))?;
    ensure!(
        bytes.len() <= size,
        "Its {} data unpacks to more than the {size} bytes of its size word",
        codec.name
    );
    ensure!(
        bytes.len() == size,
        "Its {} data unpacks to {} bytes, its size word says {size}",
        codec.name,
        bytes.len()
    );
    Ok((codec.name, bytes))
}

/// Unpacks a whole file, which has no size word; what follows the compressed data is left out.
#[cfg_attr(target_arch = "x86_64", expect(dead_code, reason = "arm64 kernels are packed like that"))]
pub(super) fn unpack_file(packed: &[u8]) -> anyhow::Result<(&'static str, Vec<u8>)> {
    let codec = codec(packed).context("No known compression")?;
    let most = MAX_IMAGE_BYTES as usize;
    let bytes =
        (codec.unpack)(packed, most).with_context(|| format!("Its {} data does not unpack", codec.name))?;
    ensure!(bytes.len() <= most, "It unpacks to more than {most} bytes");
    Ok((codec.name, bytes))
}

/// The first bytes that `packed` (no size word) unpacks to, at most `limit`; for naming what is in there.
/// Empty when nothing unpacks.
pub(super) fn peek(packed: &[u8], limit: usize) -> Vec<u8> {
    let head = match compression(packed) {
        Some("gzip") => gzip(packed, limit),
        Some("zstd") => zstd(packed, limit),
        Some("xz") => xz(packed, limit),
        _ => return Vec::new(),
    };
    let mut head = head.unwrap_or_default();
    head.truncate(limit);
    head
}

/// Reads at most one byte more than `size`, so that too much output shows without being stored.
fn drain(reader: impl Read, size: usize) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // The decoders' own error chains repeat themselves; their first message says it.
    reader.take(size as u64 + 1).read_to_end(&mut bytes).map_err(|e| anyhow::anyhow!("{e}"))?;
    Ok(bytes)
}

fn gzip(payload: &[u8], size: usize) -> anyhow::Result<Vec<u8>> {
    drain(flate2::read::GzDecoder::new(payload), size)
}

fn bzip2(payload: &[u8], size: usize) -> anyhow::Result<Vec<u8>> {
    drain(::bzip2::read::BzDecoder::new(payload), size)
}

fn xz(payload: &[u8], size: usize) -> anyhow::Result<Vec<u8>> {
    drain(lzma_rust2::XzReader::new_mem_limit(payload, false, LZMA_MAX_KIB), size)
}

fn lzma(payload: &[u8], size: usize) -> anyhow::Result<Vec<u8>> {
    drain(lzma_rust2::LzmaReader::new_mem_limit(payload, LZMA_MAX_KIB, None)?, size)
}

fn zstd(payload: &[u8], size: usize) -> anyhow::Result<Vec<u8>> {
    let mut decoder = ruzstd::decoding::StreamingDecoder::new_with_max_window_size(payload, ZSTD_MAX_WINDOW)
        .map_err(|e| anyhow::anyhow!("{e}"))?;
    let bytes = drain(&mut decoder, size)?;
    // The decoder leaves the comparison to its user; there is something to compare once all is read.
    let frame = decoder.into_frame_decoder();
    let (stored, computed) = (frame.get_checksum_from_data(), frame.get_calculated_checksum());
    ensure!(bytes.len() > size || stored.is_none() || stored == computed, "Its checksum does not match");
    Ok(bytes)
}

/// LZ4 legacy frames (lz4's lz4_Frame_format.md, "Legacy frame"): magic, then blocks of
/// (u32 packed size, data) that each unpack to 8 MiB, the last one to less. It has no end mark: the size
/// word ends it.
fn lz4_legacy(payload: &[u8], size: usize) -> anyhow::Result<Vec<u8>> {
    let mut rest = &payload[LZ4_LEGACY.len()..];
    let mut bytes = Vec::new();
    while bytes.len() < size && !rest.is_empty() {
        let (head, tail) = rest.split_first_chunk().context("It ends between blocks")?;
        rest = tail;
        if *head == LZ4_LEGACY {
            continue;
        }
        let packed = u32::from_le_bytes(*head) as usize;
        let block = rest.get(..packed).context("It ends inside a block")?;
        rest = &rest[packed..];
        let start = bytes.len();
        bytes.resize(start + LZ4_BLOCK.min(size - start), 0);
        let unpacked = lz4_flex::block::decompress_into(block, &mut bytes[start..])?;
        ensure!(unpacked != 0, "It has an empty block");
        bytes.truncate(start + unpacked);
    }
    Ok(bytes)
}

/// `lzop` container (lib/decompress_unlzo.c): header, then blocks of big-endian (unpacked size, packed size,
/// checksum), ended by a size of 0; a block that did not shrink is stored.
fn lzop(payload: &[u8], size: usize) -> anyhow::Result<Vec<u8>> {
    let mut cursor = Cursor(payload);
    lzop_header(&mut cursor).context("Its header ends early")?;
    let mut bytes = Vec::new();
    loop {
        let unpacked = cursor.be32().context("It ends between blocks")? as usize;
        if unpacked == 0 {
            return Ok(bytes);
        }
        let packed = cursor.be32().context("It ends between blocks")? as usize;
        cursor.take(4).context("It ends between blocks")?;
        ensure!(
            unpacked <= LZO_BLOCK && packed <= unpacked,
            "A block of {packed} to {unpacked} bytes is no lzop block"
        );
        let block = cursor.take(packed).context("It ends inside a block")?;
        let start = bytes.len();
        ensure!(unpacked <= size - start, "It unpacks to more than the {size} bytes of its size word");
        if packed == unpacked {
            bytes.extend_from_slice(block);
            continue;
        }
        bytes.resize(start + unpacked, 0);
        match lzokay::decompress::decompress(block, &mut bytes[start..]) {
            Ok(n) if n == unpacked => {}
            Ok(n) => bail!("A block unpacks to {n} bytes, {unpacked} were announced"),
            Err(e) => bail!("A block is damaged ({e:?})"),
        }
    }
}

/// Skips magic, versions, method, flags, times, file name and header checksum.
fn lzop_header(cursor: &mut Cursor<'_>) -> Option<()> {
    /// Flag: a filter word follows the flags.
    const HAS_FILTER: u32 = 0x800;
    /// lzop versions from this on write a compression level and a second time word.
    const VERSION_LEVEL: u16 = 0x0940;
    cursor.take(LZO_MAGIC.len())?;
    let version = u16::from_be_bytes(cursor.take(2)?.try_into().ok()?);
    // Library version, version needed to extract, method; the newer header adds the level.
    let level = version >= VERSION_LEVEL;
    cursor.take(2 + 2 + 1 + usize::from(level))?;
    if cursor.be32()? & HAS_FILTER != 0 {
        cursor.take(4)?;
    }
    // Mode, modification time; the newer header adds its upper half.
    cursor.take(if level { 4 + 4 + 4 } else { 4 + 4 })?;
    let name = cursor.take(1)?[0];
    cursor.take(usize::from(name) + 4)?;
    Some(())
}

struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    fn be32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }
}
