//! Which part of the guest's accounting a command asks for.

/// A part of the guest's accounting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Account {
    /// Slab caches.
    Slabinfo,
    /// Areas of the vmalloc space.
    Vmallocinfo,
    /// Memory by use.
    Meminfo,
    /// Free blocks of the page allocator.
    Buddyinfo,
    /// Counters of the memory management.
    Vmstat,
    /// Memory by use, as the crash utility shows it.
    Kmem,
    /// Slab caches, as the crash utility shows them.
    KmemSlabs,
}

impl Account {
    /// All of them: what `mark` remembers.
    pub const ALL: &[Self] = &[
        Self::Slabinfo,
        Self::Vmallocinfo,
        Self::Meminfo,
        Self::Buddyinfo,
        Self::Vmstat,
        Self::Kmem,
        Self::KmemSlabs,
    ];

    /// The command's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Slabinfo => "slabinfo",
            Self::Vmallocinfo => "vmallocinfo",
            Self::Meminfo => "meminfo",
            Self::Buddyinfo => "buddyinfo",
            Self::Vmstat => "vmstat",
            Self::Kmem => "kmem",
            Self::KmemSlabs => "kmem -s",
        }
    }

    pub(super) fn of(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|account| account.name() == name)
    }
}

/// Which accounting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// As it is.
    Now,
    /// What changed since the last mark.
    SinceMark,
}
