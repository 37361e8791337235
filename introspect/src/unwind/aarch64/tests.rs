use super::walk::pt_regs;
use super::{Link, SleepingFrame, Start};
use crate::callee_saved::Register;
use crate::linux::tasks::Task;
use crate::memory::Va;
use crate::unwind::{End, Text, Unwinder};
use std::collections::HashMap;

const TEXT: u64 = 0xffff_8000_0801_0000;
const SLIDE: u64 = 0x60_0000;
const STACK: u64 = 0xffff_8000_1000_0000;
/// EL1h and EL0t in PSTATE.
const KERNEL: u64 = 5;
const USER: u64 = 0;

/// Run-time address of code.
fn code(at: u64) -> u64 {
    TEXT + SLIDE + at
}

/// The address as `paciasp` signs it.
fn signed(at: u64) -> u64 {
    code(at) & !(0x7f << 56) & !(0x7f << 48) | 0x25 << 56 | 0x13 << 48
}

/// nop, nop, paciasp, stp, mov x29 sp, bl, cbz, ldp, autiasp, ret, mov x0 #0, ret: a function at 0x100 with a
/// second return, to which `cbz` jumps, and one more block behind it.
const FUNCTION: [u32; 12] = [
    0xaa1e_03e9,
    0xd503_201f,
    0xd503_233f,
    0xa9bd_7bfd,
    0x9100_03fd,
    0x9400_0000,
    0xb400_0080,
    0xa8c3_7bfd,
    0xd503_23bf,
    0xd65f_03c0,
    0xd280_0000,
    0x1400_0000,
];
const AT: u64 = 0x100;

struct Machine(HashMap<u64, u64>);

impl Machine {
    fn new() -> Self {
        let words = FUNCTION.chunks(2).zip(0..);
        let words = words.map(|(pair, n)| (code(AT + 8 * n), u64::from(pair[0]) | u64::from(pair[1]) << 32));
        Self(words.collect())
    }

    /// A frame record.
    fn record(mut self, at: u64, next: u64, ip: u64) -> Self {
        self.0.extend([(STACK + at, next), (STACK + at + 8, ip)]);
        self
    }

    /// Saved registers with their record, at that offset of the stack.
    fn registers(mut self, at: u64, [fp, link, sp, pc, state]: [u64; 5], record: [u64; 2]) -> Self {
        let base = STACK + at;
        self.0.extend([
            (base + pt_regs::FP, fp),
            (base + pt_regs::LINK, link),
            (base + pt_regs::SP, sp),
            (base + pt_regs::PC, pc),
            (base + pt_regs::STATE, state),
        ]);
        self.record(at + pt_regs::RECORD, record[0], record[1])
    }

    fn unwind(&self, start: &Start) -> (Vec<u64>, End) {
        let text = Text { ranges: [(TEXT, TEXT + 0x1000), (0, 0)] };
        let mut out = [Va(0); 16];
        let read = |va: Va| self.0.get(&va.0).copied();
        let trace = Unwinder::new(None, text, SLIDE).unwind(&(), start, read, &mut out);
        let ips = out[..trace.len].iter().map(|ip| ip.0.wrapping_sub(TEXT + SLIDE)).collect();
        (ips, trace.end)
    }
}

fn running(at: u64, fp: u64, link: u64) -> Start {
    Start { ip: Va(code(at)), sp: Va(STACK), fp: Va(STACK + fp), link: Link::Register(link), exact: true }
}

#[test]
fn records_are_followed_to_the_one_of_zeros() {
    let machine = Machine::new()
        .record(0x10, STACK + 0x40, signed(0x300))
        .record(0x40, STACK + 0x80, code(0x400))
        .record(0x80, 0, 0);
    let start =
        Start { ip: Va(code(0x200)), sp: Va(STACK), fp: Va(STACK + 0x10), link: Link::Lost, exact: false };
    assert_eq!(machine.unwind(&start), (vec![0x200, 0x300, 0x400], End::Complete));
}

#[test]
fn without_a_record_the_link_register_has_the_caller() {
    let machine = Machine::new().record(0x10, 0, code(0x400));
    let mut machine = machine;
    machine.0.insert(STACK, 0);
    for (index, frameless) in [
        (2, true),
        (3, true),
        (4, true),
        (5, false),
        (6, false),
        (7, false),
        (8, true),
        (9, true),
        (10, false),
    ] {
        let (trace, _) = machine.unwind(&running(AT + 4 * index, 0x10, signed(0x300)));
        assert_eq!(trace.contains(&0x300), frameless, "instruction {index}: {trace:x?}");
        assert!(trace.contains(&0x400), "instruction {index}: {trace:x?}");
    }
    let boundary = Start { link: Link::ReturnAddress(signed(0x300)), ..running(AT + 40, 0x10, 0) };
    assert_eq!(machine.unwind(&boundary).0[..3], [AT + 40, 0x300, 0x400]);
}

#[test]
fn interrupted_code_is_exact_and_may_have_no_record() {
    // Interrupted behind the signing: x30 is the return address.
    let regs = [STACK + 0x400, signed(0x300), STACK + 0x3f0, code(AT + 12), KERNEL];
    let machine = Machine::new()
        .record(0x10, STACK + 0x40 + pt_regs::RECORD, code(0x700))
        .registers(0x40, regs, [STACK + 0x400, code(AT + 12)])
        .record(0x400, STACK + 0x500, code(0x400))
        .record(0x500, 0, 0);
    let start =
        Start { ip: Va(code(0x200)), sp: Va(STACK), fp: Va(STACK + 0x10), link: Link::Lost, exact: false };
    assert_eq!(machine.unwind(&start), (vec![0x200, 0x700, AT + 12, 0x300, 0x400], End::Complete));
}

#[test]
fn a_user_task_ends_in_user_code() {
    let regs = [0, 0, 0x7fff_0000, 0x40_0000, USER];
    let machine = Machine::new().record(0x10, STACK + 0x40 + pt_regs::RECORD, code(0x700)).registers(
        0x40,
        regs,
        [0, 0],
    );
    let start =
        Start { ip: Va(code(0x200)), sp: Va(STACK), fp: Va(STACK + 0x10), link: Link::Lost, exact: false };
    assert_eq!(machine.unwind(&start), (vec![0x200, 0x700], End::User));
}

#[test]
fn since_6_14_a_record_of_zeros_may_mean_saved_registers() {
    let regs = [STACK + 0x400, signed(0x300), STACK + 0x3f0, code(AT + 20), KERNEL];
    let mut machine = Machine::new()
        .record(0x10, STACK + 0x40 + pt_regs::RECORD, code(0x700))
        .registers(0x40, regs, [0, 0])
        .record(0x400, 0, 0);
    machine.0.insert(STACK + 0x40 + pt_regs::RECORD + 16, 2);
    let start =
        Start { ip: Va(code(0x200)), sp: Va(STACK), fp: Va(STACK + 0x10), link: Link::Lost, exact: false };
    assert_eq!(machine.unwind(&start), (vec![0x200, 0x700, AT + 20], End::Complete));
}

#[test]
fn damaged_stacks_end() {
    let start = |fp: u64| Start {
        ip: Va(code(0x200)),
        sp: Va(STACK),
        fp: Va(STACK + fp),
        link: Link::Lost,
        exact: false,
    };
    let machine = Machine::new().record(0x10, STACK + 0x10, code(0x300));
    assert!(matches!(machine.unwind(&start(0x10)), (_, End::Backwards(_))));
    let machine = Machine::new().record(0x10, STACK + 0x40, 0x1234);
    assert_eq!(machine.unwind(&start(0x10)).1, End::NotCode(Va(0x1234)));
    assert_eq!(Machine::new().unwind(&start(0x10)).1, End::Unreadable(Va(STACK + 0x10)));
    assert_eq!(Machine::new().unwind(&start(0x11)).1, End::Unreadable(Va(STACK + 0x11)));
}

#[test]
fn a_sleeping_task_starts_where_it_was_switched_out() {
    let saved = Register::ALL.map(|register| (register, 8 * register as u64));
    let frame = SleepingFrame { saved, fp: 0x50, sp: 0x58, pc: 0x60, fork_return: Some(Va(TEXT + 0x40)) };
    let task = Task { va: Va(0xffff_0000_1000_0000), ..Task::default() };
    for (pc, exact) in [(code(0x200), false), (code(0x40), true)] {
        let words = HashMap::from([(0x50, STACK + 0x10), (0x58, STACK), (0x60, pc)]);
        let read = |va: Va| words.get(&(va - task.va)).copied();
        let start = frame.start(&task, SLIDE, read).unwrap();
        let expected = Start { ip: Va(pc), sp: Va(STACK), fp: Va(STACK + 0x10), link: Link::Lost, exact };
        assert_eq!(start, expected);
    }
    assert_eq!(frame.start(&task, SLIDE, |_| None), None);
}
