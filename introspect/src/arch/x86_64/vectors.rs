//! Code compiled three times: for every x86-64 processor, for those with AVX2, which compares four words at a time, and for
//! those with AVX-512, which compares eight and puts those together that passed. The baseline has no comparison of 64 bits.

use std::arch::x86_64::{
    _MM_HINT_T0, _mm_prefetch, _mm512_cmpeq_epi64_mask, _mm512_cmplt_epu64_mask, _mm512_loadu_epi64,
    _mm512_maskz_compress_epi64, _mm512_set1_epi64, _mm512_storeu_epi64, _mm512_sub_epi64,
};

/// A range of addresses, once for each of eight words that are looked at together: to make eight of one costs more than to
/// load them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wide {
    start: [u64; 8],
    len: [u64; 8],
}

impl Wide {
    /// From its start and length.
    pub fn new(start: u64, len: u64) -> Self {
        Self { start: [start; 8], len: [len; 8] }
    }

    /// Start and length.
    #[inline(always)]
    pub fn both(&self) -> (u64, u64) {
        (self.start[0], self.len[0])
    }
}

/// What the code that has it is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lanes {
    /// True only where the processor has AVX-512.
    eight: bool,
}

impl Lanes {
    /// All of these are made of instructions, which cost less than a branch around them.
    #[inline(always)]
    pub fn are_wide(self) -> bool {
        self.eight
    }

    /// A bit for each of the words that lies in one of the ranges; None where no instruction of this processor is made for
    /// that.
    #[inline(always)]
    pub fn inside(self, words: &[u64; 8], ranges: &[Wide]) -> Option<u8> {
        // No function of its own: that would be called for each group of words.
        // SAFETY: the processor has AVX-512, and eight words are read.
        self.eight.then(|| unsafe {
            let words = _mm512_loadu_epi64(words.as_ptr().cast());
            ranges.iter().fold(0, |bits, range| {
                let start = _mm512_loadu_epi64(range.start.as_ptr().cast());
                let len = _mm512_loadu_epi64(range.len.as_ptr().cast());
                bits | _mm512_cmplt_epu64_mask(_mm512_sub_epi64(words, start), len)
            })
        })
    }

    /// Bits for those of the words, the first of which is at an address, that are their own addresses, and for those that are
    /// that of the word before; None as above.
    #[inline(always)]
    pub fn same(self, words: &[u64; 8], address: u64) -> Option<(u8, u8)> {
        const PLACES: [u64; 8] = [0, 8, 16, 24, 32, 40, 48, 56];
        // SAFETY: the processor has AVX-512, and eight words are read.
        self.eight.then(|| unsafe {
            let all = |number: u64| _mm512_set1_epi64(number as i64);
            let words = _mm512_loadu_epi64(words.as_ptr().cast());
            let places = _mm512_loadu_epi64(PLACES.as_ptr().cast());
            let distances = _mm512_sub_epi64(words, places);
            let is = |address| _mm512_cmpeq_epi64_mask(distances, all(address));
            (is(address), is(address.wrapping_sub(8)))
        })
    }

    /// Writes those of the words that have a bit, in order, and whatever behind them; None as above.
    #[inline(always)]
    pub fn compress(self, words: &[u64; 8], bits: u8, to: &mut [u64; 8]) -> Option<()> {
        // SAFETY: the processor has AVX-512; eight words are read and written.
        self.eight.then(|| unsafe {
            let words = _mm512_loadu_epi64(words.as_ptr().cast());
            _mm512_storeu_epi64(to.as_mut_ptr().cast(), _mm512_maskz_compress_epi64(bits, words));
        })
    }
}

/// Vectors that this processor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vectors(Set);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Set {
    Baseline,
    Avx2,
    Avx512,
}

impl Vectors {
    /// All of this processor, the widest last.
    pub fn all() -> impl DoubleEndedIterator<Item = Self> {
        let has_avx2 = std::arch::is_x86_feature_detected!("avx2")
            && std::arch::is_x86_feature_detected!("bmi2")
            && std::arch::is_x86_feature_detected!("popcnt");
        let has_avx512 = has_avx2 && std::arch::is_x86_feature_detected!("avx512f");
        let sets = [(Set::Baseline, true), (Set::Avx2, has_avx2), (Set::Avx512, has_avx512)];
        sets.into_iter().filter(|(_, is_there)| *is_there).map(|(set, _)| Self(set))
    }

    /// The widest of this processor.
    pub fn widest() -> Self {
        Self::all().next_back().unwrap_or(Self(Set::Baseline))
    }

    /// Does `work` with them. Whatever is inlined into `work` is compiled for them.
    #[inline]
    pub fn run<R>(self, work: impl FnOnce(Lanes) -> R) -> R {
        match self.0 {
            Set::Baseline => work(Lanes { eight: false }),
            // SAFETY: the processor has what the function is compiled for.
            Set::Avx2 => unsafe { avx2(work) },
            // SAFETY: as above.
            Set::Avx512 => unsafe { avx512(work) },
        }
    }
}

#[target_feature(enable = "avx512f,avx2,bmi2,popcnt")]
fn avx512<R>(work: impl FnOnce(Lanes) -> R) -> R {
    work(Lanes { eight: true })
}

#[target_feature(enable = "avx2,bmi2,popcnt")]
fn avx2<R>(work: impl FnOnce(Lanes) -> R) -> R {
    work(Lanes { eight: false })
}

/// Asks for memory that is read soon, or for its start.
#[inline(always)]
pub fn prefetch<T>(item: &T) {
    // SAFETY: every x86-64 processor has the instruction, and it has no effect that a program sees.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(item).cast()) };
}
