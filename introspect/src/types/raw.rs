//! BTF's wire format: header, type records, strings (Documentation/bpf/btf.rst, include/uapi/linux/btf.h).
//!
//! ```text
//! header:  u16 magic 0xeb9f | u8 version 1 | u8 flags | u32 header bytes
//!          u32 types at | u32 types bytes | u32 strings at | u32 strings bytes     (from the header's end)
//! type:    u32 name | u32 info | u32 size or type | what its kind brings
//! info:    bits 0-15 count, 24-28 kind, 31 kind flag
//! ```
//!
//! Types are numbered from 1 in file order; 0 is `void`. The bytes stay as they are, and only where each
//! record begins is remembered: a boot waits for this, and asks for some hundred of 150 k types.

use anyhow::{Context, bail, ensure};
use std::ops::Range;

/// First bytes of a header: magic, version, flags.
pub(super) const MAGIC: [u8; 4] = [0x9f, 0xeb, 1, 0];
/// Bytes of the header's fixed part; newer ones may be longer.
const HEADER_BYTES: usize = 24;
const RECORD_BYTES: usize = 12;

/// What a type is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are BTF's")]
pub enum Kind {
    Void,
    Int,
    Pointer,
    Array,
    Struct,
    Union,
    Enum,
    Forward,
    Typedef,
    Volatile,
    Const,
    Restrict,
    Function,
    FunctionPrototype,
    Variable,
    DataSection,
    Float,
    DeclTag,
    TypeTag,
    Enum64,
}

impl Kind {
    fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            1 => Self::Int,
            2 => Self::Pointer,
            3 => Self::Array,
            4 => Self::Struct,
            5 => Self::Union,
            6 => Self::Enum,
            7 => Self::Forward,
            8 => Self::Typedef,
            9 => Self::Volatile,
            10 => Self::Const,
            11 => Self::Restrict,
            12 => Self::Function,
            13 => Self::FunctionPrototype,
            14 => Self::Variable,
            15 => Self::DataSection,
            16 => Self::Float,
            17 => Self::DeclTag,
            18 => Self::TypeTag,
            19 => Self::Enum64,
            _ => return None,
        })
    }

    /// Bytes behind the record of a type of this kind with `count` parts.
    fn tail_bytes(self, count: usize) -> usize {
        match self {
            Self::Int | Self::Variable | Self::DeclTag => 4,
            Self::Array => 12,
            Self::Struct | Self::Union | Self::DataSection | Self::Enum64 => 12 * count,
            Self::Enum | Self::FunctionPrototype => 8 * count,
            _ => 0,
        }
    }
}

/// A type's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TypeId(pub(super) u32);

/// One type record.
#[derive(Clone, Copy)]
pub(super) struct Record<'a> {
    pub kind: Kind,
    /// Offset of the name in the strings; 0 for anonymous types.
    pub name: u32,
    /// Struct and union: members' bit fields have their width in the upper 8 bits of the offset.
    /// Enum: values are signed.
    pub flag: bool,
    /// `size` or `type`, whichever the kind has.
    pub value: u32,
    tail: &'a [u8],
}

/// A structure member as recorded.
pub(super) struct RawMember {
    pub name: u32,
    pub ty: TypeId,
    /// From the start of its structure, bits.
    pub bit: u32,
    /// Bits; 0 when not a bit field.
    pub width: u8,
}

impl Record<'_> {
    pub fn target(&self) -> TypeId {
        TypeId(self.value)
    }

    /// Members of a struct or union; nothing for other kinds.
    pub fn members(&self) -> impl Iterator<Item = RawMember> {
        let of_kind = matches!(self.kind, Kind::Struct | Kind::Union);
        let tail = if of_kind { self.tail } else { &[] };
        tail.chunks_exact(12).map(|m| {
            let place = word(m, 8);
            let (bit, width) = if self.flag { (place & 0xff_ffff, (place >> 24) as u8) } else { (place, 0) };
            RawMember { name: word(m, 0), ty: TypeId(word(m, 4)), bit, width }
        })
    }

    /// Element type and number of elements of an array.
    pub fn array(&self) -> Option<(TypeId, u32)> {
        (self.kind == Kind::Array).then(|| (TypeId(word(self.tail, 0)), word(self.tail, 8)))
    }

    /// Names and values of an enum, sign-extended as its flag and size say.
    pub fn enumerators(&self) -> impl Iterator<Item = (u32, i64)> {
        let (step, wide) = match self.kind {
            Kind::Enum => (8, false),
            Kind::Enum64 => (12, true),
            _ => (1, false),
        };
        let tail = if step > 1 { self.tail } else { &[] };
        tail.chunks_exact(step).map(move |e| {
            let low = word(e, 4);
            let value = if wide {
                (u64::from(low) | u64::from(word(e, 8)) << 32) as i64
            } else if self.flag {
                i64::from(low as i32)
            } else {
                i64::from(low)
            };
            (word(e, 0), value)
        })
    }

    /// Names and types of a prototype's parameters.
    pub fn parameters(&self) -> impl Iterator<Item = (u32, TypeId)> {
        let tail = if self.kind == Kind::FunctionPrototype { self.tail } else { &[] };
        tail.chunks_exact(8).map(|p| (word(p, 0), TypeId(word(p, 4))))
    }

    /// Variables of a data section and their offsets in it, bytes.
    pub fn variables(&self) -> impl Iterator<Item = (TypeId, u32)> {
        let tail = if self.kind == Kind::DataSection { self.tail } else { &[] };
        tail.chunks_exact(12).map(|v| (TypeId(word(v, 0)), word(v, 4)))
    }
}

/// The bytes of one BTF and where its types begin.
pub(super) struct Raw {
    bytes: Box<[u8]>,
    strings: Range<usize>,
    /// Offset in `bytes` of type n + 1.
    starts: Vec<u32>,
}

impl Raw {
    /// Reads the BTF that `bytes` begin with; what follows it is left alone.
    pub fn parse(bytes: &[u8]) -> anyhow::Result<Self> {
        let (types, strings) = sections(bytes)?;
        let end = types.end.max(strings.end);
        let bytes: Box<[u8]> = bytes[..end].into();
        let mut starts = Vec::with_capacity(types.len() / 24);
        let mut at = types.start;
        while at < types.end {
            let number = starts.len() + 1;
            let rest = &bytes[at..types.end];
            let length = record_bytes(rest).with_context(|| format!("BTF type {number} is damaged"))?;
            starts.push(at as u32);
            at += length;
        }
        Ok(Self { bytes, strings, starts })
    }

    /// Number of types, `void` left out.
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// All types, ascending.
    pub fn ids(&self) -> impl Iterator<Item = TypeId> + use<> {
        (1..=self.starts.len() as u32).map(TypeId)
    }

    /// The record of a type; None for `void` and numbers out of range.
    pub fn get(&self, id: TypeId) -> Option<Record<'_>> {
        let start = *self.starts.get((id.0 as usize).checked_sub(1)?)? as usize;
        let record = &self.bytes[start..];
        let info = word(record, 4);
        let kind = Kind::from_number(info >> 24 & 0x1f)?;
        let tail = &record[RECORD_BYTES..][..kind.tail_bytes((info & 0xffff) as usize)];
        Some(Record { kind, name: word(record, 0), flag: info >> 31 != 0, value: word(record, 8), tail })
    }

    /// The string at `offset` without its NUL; empty outside the strings.
    pub fn string_bytes(&self, offset: u32) -> &[u8] {
        let strings = &self.bytes[self.strings.clone()];
        let rest = strings.get(offset as usize..).unwrap_or_default();
        &rest[..memchr::memchr(0, rest).unwrap_or(0)]
    }

    /// As [`Raw::string_bytes`], empty when it is no text.
    pub fn string(&self, offset: u32) -> &str {
        str::from_utf8(self.string_bytes(offset)).unwrap_or_default()
    }

    /// True when the string at `offset` is `name`; cheaper than reading it.
    pub fn string_is(&self, offset: u32, name: &str) -> bool {
        let strings = &self.bytes[self.strings.clone()];
        strings
            .get(offset as usize..)
            .and_then(|rest| rest.strip_prefix(name.as_bytes()))
            .is_some_and(|rest| rest.first() == Some(&0))
    }
}

/// Where types and strings lie in `bytes`.
fn sections(bytes: &[u8]) -> anyhow::Result<(Range<usize>, Range<usize>)> {
    ensure!(
        bytes.len() >= HEADER_BYTES,
        "The BTF is truncated: it has {} bytes, less than its header",
        bytes.len()
    );
    ensure!(bytes.starts_with(&MAGIC), "The BTF has an unknown magic or version");
    let header = word(bytes, 4) as usize;
    ensure!(header >= HEADER_BYTES, "The BTF's header claims {header} bytes, {HEADER_BYTES} are needed");
    let range = |what: &str, at: usize| {
        let start = header.checked_add(word(bytes, at) as usize);
        let end = start.and_then(|start| start.checked_add(word(bytes, at + 4) as usize));
        match start.zip(end) {
            // Starts are kept as u32.
            Some((start, end)) if end <= bytes.len() && u32::try_from(end).is_ok() => Ok(start..end),
            _ => bail!("The BTF is truncated: its {what} reach behind its end at {:#x}", bytes.len()),
        }
    };
    Ok((range("types", 8)?, range("strings", 16)?))
}

/// Length of the record that `bytes` begin with.
fn record_bytes(bytes: &[u8]) -> anyhow::Result<usize> {
    ensure!(bytes.len() >= RECORD_BYTES, "{} bytes are left for it", bytes.len());
    let info = word(bytes, 4);
    let number = info >> 24 & 0x1f;
    let kind = Kind::from_number(number).with_context(|| format!("It is of unknown kind {number}"))?;
    let length = RECORD_BYTES + kind.tail_bytes((info & 0xffff) as usize);
    ensure!(length <= bytes.len(), "It needs {length} bytes, {} are left", bytes.len());
    Ok(length)
}

/// The u32 at `at`, which callers have checked to be inside.
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}
