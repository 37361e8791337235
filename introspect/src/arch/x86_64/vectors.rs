//! Code compiled twice: for every x86-64 processor, and for those with AVX2, which compares four words at a time. The
//! baseline has no comparison of 64 bits.

/// Does `work` with the widest vectors of this processor. Whatever is inlined into `work` is compiled for them.
#[inline]
pub fn widest<R>(work: impl FnOnce() -> R) -> R {
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has what the function is compiled for.
        unsafe { avx2(work) }
    } else {
        work()
    }
}

#[target_feature(enable = "avx2")]
fn avx2<R>(work: impl FnOnce() -> R) -> R {
    work()
}
