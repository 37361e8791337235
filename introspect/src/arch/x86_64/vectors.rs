//! Code compiled three times: for every x86-64 processor, for those with AVX2, which compares four words at a time, and for
//! those with AVX-512, which compares eight and puts those together that passed. The baseline has no comparison of 64 bits.

use std::arch::x86_64::{
    _MM_HINT_T0, _mm_prefetch, _mm512_cmplt_epu64_mask, _mm512_loadu_epi64, _mm512_maskz_compress_epi64,
    _mm512_set1_epi64, _mm512_storeu_epi64, _mm512_sub_epi64,
};

/// Bytes that come from memory together.
const LINE: usize = 64;

/// What the code that has it is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lanes {
    /// True only where the processor has AVX-512.
    eight: bool,
}

impl Lanes {
    /// What every processor has.
    #[cfg(test)]
    pub const PLAIN: Self = Self { eight: false };

    /// A bit for each of the words that lies in one of the ranges, each a start and a length; None where no instruction of
    /// this processor is made for that.
    #[inline(always)]
    pub fn inside(self, words: &[u64; 8], ranges: &[(u64, u64)]) -> Option<u8> {
        // No function of its own: that would be called for each group of words.
        // SAFETY: the processor has AVX-512, and eight words are read.
        self.eight.then(|| unsafe {
            let words = _mm512_loadu_epi64(words.as_ptr().cast());
            ranges.iter().fold(0, |bits, &(start, len)| {
                let distance = _mm512_sub_epi64(words, _mm512_set1_epi64(start as i64));
                bits | _mm512_cmplt_epu64_mask(distance, _mm512_set1_epi64(len as i64))
            })
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

/// Does `work` with the widest vectors of this processor. Whatever is inlined into `work` is compiled for them.
#[inline]
pub fn widest<R>(work: impl FnOnce(Lanes) -> R) -> R {
    if std::arch::is_x86_feature_detected!("avx512f") && std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has what the function is compiled for.
        unsafe { avx512(work) }
    } else if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: as above.
        unsafe { avx2(work) }
    } else {
        work(Lanes { eight: false })
    }
}

#[target_feature(enable = "avx512f,avx2")]
fn avx512<R>(work: impl FnOnce(Lanes) -> R) -> R {
    work(Lanes { eight: true })
}

#[target_feature(enable = "avx2")]
fn avx2<R>(work: impl FnOnce(Lanes) -> R) -> R {
    work(Lanes { eight: false })
}

/// Asks for memory that is read soon.
#[inline(always)]
pub fn prefetch<T>(items: &[T]) {
    for line in items.chunks(LINE / size_of::<T>()) {
        // SAFETY: every x86-64 processor has the instruction, and it has no effect that a program sees.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
}
