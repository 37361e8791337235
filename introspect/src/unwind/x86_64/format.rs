//! How the kernel encodes an ORC entry, and what one means (arch/x86/include/asm/orc_types.h).
//!
//! An entry is 6 bytes: s16 distance to the previous stack pointer, s16 distance to the saved frame pointer, and
//! 16 bits of flags, whose upper half changed:
//!
//! | kernel | bits 0-3 | 4-7 | 8-10 | 11 | source |
//! | --- | --- | --- | --- | --- | --- |
//! | 5.10 to 6.2 | sp base | bp base | type:2, end:1 | - | their orc_types.h |
//! | 6.3 | sp base | bp base | type:2, signal:1 | end | commit ffb1b4a41016 |
//! | 6.4 and later | sp base | bp base | type:3 | signal | commit fb799447ae29 |
//!
//! Up to 6.3 types are 0 call, 1 registers, 2 interrupt frame, and an entry without sp base is the end of the stack
//! or, without `end`, unknown. From 6.4 on they are 0 unknown, 1 end, 2 call, 3 registers, 4 interrupt frame.
//! No version is asked for: BTF's `struct orc_entry` says where the fields are, and the presence of `end` what
//! the types mean.

use crate::types::Btf;

/// Size of an entry of `.orc_unwind`, bytes.
pub(super) const ENTRY_BYTES: usize = 6;
/// Where the flags start in an entry, bytes.
const FLAGS_AT: u64 = 4;

/// What a register is found relative to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Base {
    Undefined,
    PreviousSp,
    Dx,
    Di,
    Bp,
    Sp,
    R10,
    R13,
    BpIndirect,
    SpIndirect,
    Unknown,
}

impl Base {
    /// Numbers of ORC_REG_*.
    fn from_number(number: u16) -> Self {
        match number {
            0 => Self::Undefined,
            1 => Self::PreviousSp,
            2 => Self::Dx,
            3 => Self::Di,
            4 => Self::Bp,
            5 => Self::Sp,
            6 => Self::R10,
            7 => Self::R13,
            8 => Self::BpIndirect,
            9 => Self::SpIndirect,
            _ => Self::Unknown,
        }
    }
}

/// What lies at the top of the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Frame {
    /// Nothing is known of code here.
    Undefined,
    /// Nobody called this code.
    End,
    /// A return address.
    Call,
    /// `struct pt_regs`.
    Registers,
    /// What an interrupt pushes: ip, cs, flags, sp, ss.
    Interrupt,
    Unknown,
}

/// One entry, whatever its encoding was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub sp_offset: i16,
    pub bp_offset: i16,
    pub sp: Base,
    pub bp: Base,
    pub frame: Frame,
    /// The caller was interrupted, it did not call: look its address up as it is.
    pub signal: bool,
}

impl Entry {
    /// For generated code, which has no tables: it keeps a frame pointer (`orc_fp_entry` of
    /// arch/x86/kernel/unwind_orc.c).
    pub const FRAME_POINTER: Self = Self {
        sp_offset: 16,
        bp_offset: -16,
        sp: Base::Bp,
        bp: Base::PreviousSp,
        frame: Frame::Call,
        signal: false,
    };
}

/// A bit field of the flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Bits {
    shift: u8,
    width: u8,
}

impl Bits {
    const fn new(shift: u8, width: u8) -> Self {
        Self { shift, width }
    }

    fn of(self, flags: u16) -> u16 {
        flags >> self.shift & ((1 << self.width) - 1)
    }
}

/// Where the fields of an entry's flags are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Format {
    sp: Bits,
    bp: Bits,
    kind: Bits,
    signal: Option<Bits>,
    end: Option<Bits>,
}

impl Format {
    /// Up to 6.2.
    pub const WITH_END: Self = Self {
        sp: Bits::new(0, 4),
        bp: Bits::new(4, 4),
        kind: Bits::new(8, 2),
        signal: None,
        end: Some(Bits::new(10, 1)),
    };
    /// 6.3.
    pub const WITH_SIGNAL_AND_END: Self =
        Self { signal: Some(Bits::new(10, 1)), end: Some(Bits::new(11, 1)), ..Self::WITH_END };
    /// 6.4 and later.
    pub const WITH_TYPES: Self =
        Self { kind: Bits::new(8, 3), signal: Some(Bits::new(11, 1)), end: None, ..Self::WITH_END };

    /// The kernels that have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::WITH_END => "5.10 to 6.2",
            Self::WITH_SIGNAL_AND_END => "6.3",
            Self::WITH_TYPES => "6.4 and later",
            _ => "no known kernel",
        }
    }

    /// As BTF describes it; None when it does not, or describes something else.
    pub fn from_types(types: &Btf) -> Option<Self> {
        let bits = |name: &str| {
            let field = types.field("orc_entry", name)?;
            let shift = field.offset.checked_sub(FLAGS_AT)? * 8 + u64::from(field.bits.0);
            let width = field.bits.1;
            let fits = width > 0 && shift + u64::from(width) <= 16 && width < 16;
            fits.then(|| Bits::new(shift as u8, width))
        };
        let same_size = types.size_of("orc_entry") == Some(ENTRY_BYTES as u64);
        let format = Self {
            sp: bits("sp_reg")?,
            bp: bits("bp_reg")?,
            kind: bits("type")?,
            signal: bits("signal"),
            end: bits("end"),
        };
        same_size.then_some(format)
    }

    /// For a kernel without BTF: nearly all code is between calls, so the most frequent type is the one that
    /// means call; and up to 6.3 only entries without sp base have `end` set.
    pub fn guess(entries: &[u8]) -> Self {
        let flags = || entries.chunks_exact(ENTRY_BYTES).map(flags);
        let with_base = |f: &u16| Self::WITH_END.sp.of(*f) != 0;
        let calls = |format: Self, call: u16| {
            flags().filter(with_base).filter(|&f| format.kind.of(f) == call).count()
        };
        if calls(Self::WITH_TYPES, 2) > calls(Self::WITH_END, 0) {
            Self::WITH_TYPES
        } else if flags().any(|f| !with_base(&f) && f >> 11 & 1 != 0) {
            Self::WITH_SIGNAL_AND_END
        } else {
            Self::WITH_END
        }
    }

    /// Decodes an entry of [`ENTRY_BYTES`].
    pub fn decode(self, bytes: &[u8]) -> Entry {
        let flags = flags(bytes);
        let (sp, kind) = (Base::from_number(self.sp.of(flags)), self.kind.of(flags));
        let frame = match self.end {
            Some(end) if sp == Base::Undefined => {
                if end.of(flags) != 0 {
                    Frame::End
                } else {
                    Frame::Undefined
                }
            }
            Some(_) => match kind {
                0 => Frame::Call,
                1 => Frame::Registers,
                2 => Frame::Interrupt,
                _ => Frame::Unknown,
            },
            None => match kind {
                0 => Frame::Undefined,
                1 => Frame::End,
                2 => Frame::Call,
                3 => Frame::Registers,
                4 => Frame::Interrupt,
                _ => Frame::Unknown,
            },
        };
        let signal = match self.signal {
            Some(signal) => signal.of(flags) != 0,
            None => matches!(frame, Frame::Registers | Frame::Interrupt),
        };
        Entry {
            sp_offset: i16::from_le_bytes([bytes[0], bytes[1]]),
            bp_offset: i16::from_le_bytes([bytes[2], bytes[3]]),
            sp,
            bp: Base::from_number(self.bp.of(flags)),
            frame,
            signal,
        }
    }
}

fn flags(entry: &[u8]) -> u16 {
    u16::from_le_bytes([entry[4], entry[5]])
}
