//! Backtraces that were seen before, found again without looking into the tables.
//!
//! Most events come from where others came from. A tree holds the return addresses seen: a node is one of them with all
//! that lie below it on the stack, and knows what the tables say of how to go on from there. So a backtrace that was seen
//! before costs a comparison for each of its frames.
//!
//! What hangs on more than the stack and the frame pointer, as across an interrupt, is not kept: such backtraces are
//! unwound each time.
//!
//! Stubs in the guest can know the tree, too ([`super::paths`]): it tells them of each backtrace what it can.

use super::format::{self, Base, Frame};
use super::paths::{Onward, Paths};
use super::walk::{WORD, end_at_user_code, pt_regs};
use super::{ModuleTables, Start, Unwinder};
use crate::memory::Va;
use hashbrown::HashTable;
use rustc_hash::FxBuildHasher;
use std::hash::BuildHasher;

/// Nodes at which the tree is begun anew: many times what a kernel has, and a bound for one that invents backtraces.
const MAX_NODES: usize = 1 << 20;
/// [`WORD`], as steps have it.
const STEP: i16 = WORD as i16;
/// No node.
const NONE: u32 = u32::MAX;
/// In the place of the number of a stub's entry: none yet, and none at all.
const NO_ENTRY: u32 = 0;
/// See [`NO_ENTRY`].
const NEVER: u32 = u32::MAX;

/// Finds what was kept of a backtrace, such as its number.
pub struct Memo<T> {
    nodes: Vec<Node<T>>,
    /// Nodes, by the node before them and their return address.
    children: HashTable<u32>,
    /// Frames of a whole backtrace.
    depth: usize,
    /// What stubs know of it, where there are some.
    told: Option<Told<T>>,
}

/// What stubs know, and what their entries are here. These stay when stubs forget, until their places are used again.
struct Told<T> {
    paths: Paths,
    entries: Vec<Entry<T>>,
}

#[derive(Clone, Copy)]
struct Entry<T> {
    ip: Va,
    /// The number of the entry before; of the first, no entry's.
    before: u32,
    node: u32,
    /// Of the backtrace that ends here.
    kept: Option<T>,
}

struct Node<T> {
    ip: Va,
    parent: u32,
    /// The child found last: most often it is the next, too.
    last: u32,
    step: Step,
    /// Of the backtrace that ends here.
    kept: Option<T>,
    /// The number of its entry for stubs.
    entry: u32,
}

/// How to go on from a frame to its caller's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// There is none.
    End,
    /// The frame ends so far above its base, the return address last; the caller's frame pointer may lie so far from there.
    Call(Anchor, i16, Option<i16>),
    /// User code entered the kernel here, if the `struct pt_regs` so far above the stack pointer says so.
    User(i16),
    /// By other registers, or somewhere else.
    Unknown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Anchor {
    StackPointer,
    FramePointer,
}

/// What comes after a frame.
enum Next {
    Caller(Va),
    Nothing,
    Unknown,
}

impl<T: Copy> Memo<T> {
    /// An empty one for backtraces of at most `depth` frames.
    pub fn new(depth: usize) -> Self {
        Self { nodes: Vec::new(), children: HashTable::new(), depth, told: None }
    }

    /// Has stubs know from now on what it knows.
    pub fn share(&mut self, paths: Paths) {
        let entries = vec![Entry { ip: Va(0), before: 0, node: NONE, kept: None }; paths.capacity()];
        self.told = Some(Told { paths, entries });
    }

    /// Forgets everything, as it must when modules come or go, but what was kept of backtraces that stubs have found by now.
    pub fn clear(&mut self) {
        self.nodes.clear();
        self.children.clear();
        if let Some(told) = &mut self.told {
            told.paths.forget();
        }
    }

    /// What was kept of the backtrace whose end a stub named by this number.
    pub fn known(&self, number: u32) -> Option<T> {
        self.told.as_ref()?.entry(number)?.kept
    }

    /// Writes the return addresses that a stub named by this number, innermost first, and says how many they are. None when it
    /// names none, or there is no room.
    pub fn frames(&self, number: u32, out: &mut [Va]) -> Option<usize> {
        let told = self.told.as_ref()?;
        let (mut entry, mut len) = (Some(told.entry(number)?), 0);
        while let Some(&Entry { ip, before, .. }) = entry {
            *out.get_mut(len)? = ip;
            len += 1;
            entry = told.entry(before);
        }
        out[..len].reverse();
        Some(len)
    }

    /// What was kept of the backtrace from `start`, if it was seen before.
    #[inline]
    pub fn find(&mut self, start: &Start, read: impl FnMut(Va) -> Option<u64>) -> Option<T> {
        let node = self.child(NONE, start.ip).filter(|_| start.exact)?;
        self.follow((node, 1), start, read)
    }

    /// The same of the backtrace that goes on at `start` behind so many frames, the last of which a stub named by this number.
    pub fn find_behind(
        &mut self,
        (number, frames): (u32, usize),
        start: &Start,
        read: impl FnMut(Va) -> Option<u64>,
    ) -> Option<T> {
        let last = self.told.as_ref()?.entry(number)?.node;
        self.nodes.get(last as usize).filter(|node| node.entry == number)?;
        let node = self.child(last, start.ip)?;
        self.follow((node, frames + 1), start, read)
    }

    /// The same from a node on, which has so many frames.
    #[inline]
    fn follow(
        &mut self,
        (mut node, frames): (u32, usize),
        start: &Start,
        mut read: impl FnMut(Va) -> Option<u64>,
    ) -> Option<T> {
        let (mut sp, mut bp) = (start.sp, start.bp);
        for _ in frames..self.depth {
            match self.nodes[node as usize].step.take(&mut sp, &mut bp, &mut read) {
                Next::Caller(ip) => node = self.child(node, ip)?,
                Next::Nothing => break,
                Next::Unknown => return None,
            }
        }
        let Node { kept, entry, .. } = self.nodes[node as usize];
        if entry == NO_ENTRY && kept.is_some() && self.told.is_some() {
            self.tell(node);
        }
        kept
    }

    /// Keeps something of the backtrace that `unwinder` found to have these frames.
    pub fn keep(
        &mut self,
        unwinder: &Unwinder<'_>,
        modules: &impl ModuleTables,
        start: &Start,
        frames: &[Va],
        what: T,
    ) {
        if !start.exact || frames.first() != Some(&start.ip) || frames.len() > self.depth {
            return;
        }
        if self.nodes.len() + frames.len() > MAX_NODES {
            self.clear();
        }
        let mut node = NONE;
        for (n, &ip) in frames.iter().enumerate() {
            if node != NONE && !matches!(self.nodes[node as usize].step, Step::Call(..)) {
                return;
            }
            node = match self.child(node, ip) {
                Some(node) => node,
                None => self.add(node, ip, unwinder.step(modules, if n == 0 { ip } else { ip - 1 })),
            };
        }
        if node != NONE {
            self.nodes[node as usize].kept = Some(what);
            self.tell(node);
        }
    }

    /// Has stubs know the backtrace that ends at a node, if they can.
    #[cold]
    fn tell(&mut self, end: u32) {
        let Some(told) = &mut self.told else { return };
        if !told.paths.is_open() {
            return;
        }
        let mut way = vec![end];
        while let Some(&Node { parent, .. }) = way.last().and_then(|&node| self.nodes.get(node as usize)) {
            if parent == NONE {
                break;
            }
            way.push(parent);
        }
        if told.add_way(&mut self.nodes, &way, self.depth).is_none() {
            self.nodes[end as usize].entry = NEVER;
        }
    }

    #[inline]
    fn child(&mut self, parent: u32, ip: Va) -> Option<u32> {
        let last = self.nodes.get(parent as usize).map_or(NONE, |node| node.last);
        if self.nodes.get(last as usize).is_some_and(|node| node.ip == ip) {
            return Some(last);
        }
        let is = |&node: &u32| {
            let node = &self.nodes[node as usize];
            node.ip == ip && node.parent == parent
        };
        let found = *self.children.find(hash(parent, ip), is)?;
        if let Some(node) = self.nodes.get_mut(parent as usize) {
            node.last = found;
        }
        Some(found)
    }

    fn add(&mut self, parent: u32, ip: Va, step: Step) -> u32 {
        let Self { nodes, children, .. } = self;
        let number = nodes.len() as u32;
        nodes.push(Node { ip, parent, last: NONE, step, kept: None, entry: NO_ENTRY });
        let rehash = |&node: &u32| hash(nodes[node as usize].parent, nodes[node as usize].ip);
        children.insert_unique(hash(parent, ip), number, rehash);
        number
    }
}

impl<T: Copy> Told<T> {
    fn entry(&self, number: u32) -> Option<&Entry<T>> {
        self.entries.get(self.paths.entry(number)?).filter(|entry| entry.ip != Va(0))
    }

    /// Has stubs know a backtrace, whose nodes are these from the last frame to the first, or its first frames: it may be cut off
    /// where the copy of a stack was. None when they cannot know it to its last frame.
    fn add_way(&mut self, nodes: &mut [Node<T>], way: &[u32], depth: usize) -> Option<()> {
        let (&first, behind) = way.split_last().filter(|(_, behind)| !behind.is_empty())?;
        let Node { ip, step, .. } = nodes[first as usize];
        // A stub begins where the return address is on top.
        if step != Step::Call(Anchor::StackPointer, STEP, None) {
            return None;
        }
        let mut before = ip.0 as u32;
        for (left, &number) in behind.iter().enumerate().rev() {
            let node = &mut nodes[number as usize];
            let end = if left == 0 { node.step.as_end(way.len() == depth) } else { None };
            if matches!(node.entry, NO_ENTRY | NEVER) {
                node.entry = self.paths.add(before, node.ip, end.or_else(|| node.step.onward())?)?;
                let entry = self.paths.entry(node.entry)?;
                self.entries[entry] = Entry { ip: node.ip, before, node: number, kept: None };
            }
            if end.is_some() {
                let entry = self.paths.entry(node.entry)?;
                self.entries[entry].kept = node.kept;
            }
            before = node.entry;
        }
        Some(())
    }
}

fn hash(parent: u32, ip: Va) -> u64 {
    FxBuildHasher.hash_one((parent, ip))
}

impl Unwinder<'_> {
    /// What the tables say of code at `ip`.
    fn step(&self, modules: &impl ModuleTables, ip: Va) -> Step {
        let entry = self.orc.and_then(|orc| self.entry(orc, modules, ip));
        entry.map_or(Step::Unknown, |entry| Step::of(&entry))
    }
}

impl Step {
    fn of(entry: &format::Entry) -> Self {
        let from = match entry.sp {
            Base::Sp => Anchor::StackPointer,
            Base::Bp => Anchor::FramePointer,
            _ if entry.frame == Frame::End => return Self::End,
            _ => return Self::Unknown,
        };
        let bp = match entry.bp {
            Base::Undefined => None,
            Base::PreviousSp => Some(entry.bp_offset),
            _ => return Self::Unknown,
        };
        match (entry.frame, from) {
            (Frame::End, _) => Self::End,
            (Frame::Call, _) if !entry.signal => Self::Call(from, entry.sp_offset, bp),
            (Frame::Registers, Anchor::StackPointer) => Self::User(entry.sp_offset),
            _ => Self::Unknown,
        }
    }

    /// The same for stubs. None for what they do not do, and for frames that no compiler makes: a stub reads between the
    /// word that it has found and the next.
    fn onward(self) -> Option<Onward> {
        let Self::Call(from, offset, saved_bp) = self else { return None };
        let up = if from == Anchor::StackPointer { offset } else { offset.checked_sub(STEP)? };
        let saved = saved_bp.map_or(Some(0), |offset| {
            offset.checked_add(STEP).filter(|&saved| saved <= -STEP && saved >= -up)
        })?;
        let is_usual = up >= STEP && up % STEP == 0 && saved % STEP == 0;
        is_usual.then_some(match from {
            Anchor::StackPointer => Onward::Call { up, saved },
            Anchor::FramePointer => Onward::FramedCall { up, saved },
        })
    }

    /// The same where a backtrace ends, for this is its frame or it `is_full`.
    fn as_end(self, is_full: bool) -> Option<Onward> {
        match self {
            _ if is_full => Some(Onward::End),
            Self::End => Some(Onward::End),
            Self::User(offset) => {
                let up = offset.checked_add(STEP + pt_regs::CS as i16)?;
                (up > 0 && up % STEP == 0).then_some(Onward::User { up })
            }
            _ => None,
        }
    }

    #[inline]
    fn take(self, sp: &mut Va, bp: &mut Va, read: &mut impl FnMut(Va) -> Option<u64>) -> Next {
        let distance = |offset: i16| i64::from(offset) as u64;
        match self {
            Self::End => Next::Nothing,
            Self::Unknown => Next::Unknown,
            Self::User(offset) => match read(*sp + distance(offset) + pt_regs::CS) {
                Some(cs) if end_at_user_code(cs).is_ok() => Next::Unknown,
                _ => Next::Nothing,
            },
            Self::Call(from, offset, saved_bp) => {
                let base = if from == Anchor::StackPointer { *sp } else { *bp };
                let top = base + distance(offset);
                let Some(ip) = read(top - WORD) else { return Next::Nothing };
                if let Some(offset) = saved_bp {
                    let Some(saved) = read(top + distance(offset)) else { return Next::Nothing };
                    *bp = Va(saved);
                }
                if top <= *sp {
                    return Next::Unknown;
                }
                *sp = top;
                Next::Caller(Va(ip))
            }
        }
    }
}
