use super::format::{Base, Format, Frame};
use super::*;
use crate::callee_saved::Register;
use crate::image::KernelImage;
use crate::image::synthetic::{self, BASE, Block};
use crate::linux::tasks::Task;
use crate::symbols::{Symbol, SymbolTable, encoder};
use crate::types::Btf;
use crate::types::synthetic::Builder;
use crate::unwind::{Detour, Detours, MAX_STACKS, Text, Trace};
use proptest::prelude::*;
use std::collections::HashMap;

const TEXT: u64 = 0xffff_ffff_8100_0000;
pub(super) const SLIDE: u64 = 0x60_0000;
pub(super) const STACK: u64 = 0xffff_c900_0001_0000;
/// A code segment selector of kernel code, and one of user code (arch/x86/include/asm/segment.h).
pub(super) const KERNEL_CS: u64 = 0x10;
pub(super) const USER_CS: u64 = 0x33;

pub(super) const CALL: u16 = 2;
pub(super) const REGISTERS: u16 = 3;
const INTERRUPT: u16 = 4;
pub(super) const SIGNAL: u16 = 8;

/// An entry from `TEXT + at` on, as 6.4 and later encode it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    at: u64,
    sp: (u16, i16),
    bp: (u16, i16),
    /// Type, and `SIGNAL`.
    kind: u16,
}

pub(super) fn row(at: u64, sp: (u16, i16), bp: (u16, i16), kind: u16) -> Row {
    Row { at, sp, bp, kind }
}

fn entry_bytes(row: &Row, flags: u16) -> impl Iterator<Item = u8> {
    let words = [row.sp.1 as u16, row.bp.1 as u16, row.sp.0 | row.bp.0 << 4 | flags];
    words.into_iter().flat_map(u16::to_le_bytes)
}

/// `.orc_unwind_ip` at `ip_va`, and `.orc_unwind`.
fn encode(ip_va: u64, base: u64, rows: &[Row]) -> (Vec<u8>, Vec<u8>) {
    let distance = |(n, row): (usize, &Row)| ((base + row.at) as i64 - (ip_va + 4 * n as u64) as i64) as i32;
    let ips = rows.iter().enumerate().flat_map(|r| distance(r).to_le_bytes()).collect();
    (ips, rows.iter().flat_map(|r| entry_bytes(r, r.kind << 8)).collect())
}

pub(super) fn table(rows: &[Row]) -> OrcTable {
    let ip_va = TEXT + 0x100_0000;
    let (ips, entries) = encode(ip_va, TEXT, rows);
    OrcTable::new(Format::WITH_TYPES, Va(ip_va), &ips, &entries).expect("well-formed")
}

/// Functions of 0x100 bytes each: at TEXT an ordinary one, at +0x100 one that nobody called, at +0x200 one that
/// nothing is known of, then whatever a test wants at +0x300.
fn with_special(sp: (u16, i16), bp: (u16, i16), kind: u16) -> OrcTable {
    table(&[
        row(0, (5, 8), (0, 0), CALL),
        row(0x100, (0, 0), (0, 0), 1),
        row(0x200, (0, 0), (0, 0), 0),
        row(0x300, sp, bp, kind),
        row(0x400, (0, 0), (0, 0), 0),
    ])
}

pub(super) fn text() -> Text {
    Text { ranges: [(TEXT, TEXT + 0x1000), (0, 0)] }
}

/// Run-time address of `at` in the text.
pub(super) fn code(at: u64) -> u64 {
    TEXT + SLIDE + at
}

pub(super) const LEAF: u64 = 0x10;
const BOTTOM: u64 = 0x110;
const UNKNOWN: u64 = 0x210;
const SPECIAL: u64 = 0x310;

pub(super) fn start(at: u64) -> Start {
    let scratch = Scratch { r10: STACK + 0x110, r13: STACK + 0x120, di: STACK + 0x130, dx: STACK + 0x140 };
    Start { ip: Va(code(at)), sp: Va(STACK), bp: Va(STACK + 0x80), scratch: Some(scratch), exact: true }
}

/// Unwinds over `stack` (offset from STACK, word); returns the frames as offsets in the text.
fn unwind(orc: &OrcTable, start: &Start, stack: &[(u64, u64)]) -> (Vec<u64>, End) {
    let memory: HashMap<u64, u64> = stack.iter().map(|&(at, word)| (STACK + at, word)).collect();
    let mut out = [Va(0); 16];
    let unwinder = Unwinder::new(Some(orc), text(), SLIDE);
    let trace = unwinder.unwind(&(), start, |va| memory.get(&va.0).copied(), &mut out);
    (out[..trace.len].iter().map(|ip| ip.0.wrapping_sub(code(0))).collect(), trace.end)
}

#[test]
fn every_stack_pointer_base() {
    // Base, offset, where the return address is, another word.
    let cases = [
        (5, 0x18, 0x10, (0x800, 0)),
        (4, 0x10, 0x88, (0x800, 0)),
        (9, 8, 0xf8, (0, STACK + 0xf8)),
        (8, -8, 0xf8, (0x78, STACK + 0x100)),
        (6, 0, 0x108, (0x800, 0)),
        (7, 0, 0x118, (0x800, 0)),
        (3, 0, 0x128, (0x800, 0)),
        (2, 0, 0x138, (0x800, 0)),
    ];
    for (base, offset, returns_at, word) in cases {
        let orc = with_special((base, offset), (0, 0), CALL);
        let stack = [word, (returns_at, code(BOTTOM))];
        assert_eq!(
            unwind(&orc, &start(SPECIAL), &stack),
            (vec![SPECIAL, BOTTOM], End::Complete),
            "base {base}"
        );
    }
}

#[test]
fn registers_are_gone_after_a_call() {
    let orc = with_special((6, 0), (0, 0), CALL);
    let stack = [(0, code(SPECIAL))];
    let expected = (vec![LEAF, SPECIAL], End::MissingRegister(Va(code(SPECIAL))));
    assert_eq!(unwind(&orc, &start(LEAF), &stack), expected);
    let sleeping = Start { scratch: None, ..start(SPECIAL) };
    assert_eq!(unwind(&orc, &sleeping, &[]).1, End::MissingRegister(Va(code(SPECIAL))));
}

#[test]
fn every_frame_pointer_base() {
    // The function at SPECIAL gives bp, by which the one after it finds its return address.
    for (bp, words) in [
        ((0, 0), vec![(0, code(0x410)), (0x88, code(BOTTOM))]),
        ((1, -16), vec![(0, code(0x410)), (-8i64 as u64, STACK + 0x200), (0x208, code(BOTTOM))]),
        ((4, 8), vec![(0, code(0x410)), (0x88, STACK + 0x300), (0x308, code(BOTTOM))]),
    ] {
        let orc = table(&[
            row(0, (0, 0), (0, 0), 0),
            row(0x100, (0, 0), (0, 0), 1),
            row(0x300, (5, 8), bp, CALL),
            row(0x400, (4, 16), (0, 0), CALL),
        ]);
        let memory: HashMap<u64, u64> =
            words.iter().map(|&(at, word)| (STACK.wrapping_add(at), word)).collect();
        let mut out = [Va(0); 4];
        let unwinder = Unwinder::new(Some(&orc), text(), SLIDE);
        let trace = unwinder.unwind(&(), &start(SPECIAL), |va| memory.get(&va.0).copied(), &mut out);
        assert_eq!((trace.len, trace.end), (3, End::Complete), "bp {bp:?}");
    }
}

/// `struct pt_regs` at STACK + `at`: the interrupted code at `ip`, its stack and frame pointer.
pub(super) fn saved(at: u64, ip: u64, sp: u64, bp: u64, cs: u64) -> Vec<(u64, u64)> {
    use walk::pt_regs::*;
    vec![(at + BP, bp), (at + R10, STACK + 0x408), (at + IP, ip), (at + CS, cs), (at + SP, STACK + sp)]
}

#[test]
fn saved_registers_continue_in_the_interrupted_code() {
    let orc = with_special((5, 0), (0, 0), REGISTERS | SIGNAL);
    // Exact: the first byte of a function is its own, though nothing was called there.
    let mut stack = saved(0, code(0), 0x200, 0, KERNEL_CS);
    stack.push((0x200, code(BOTTOM)));
    assert_eq!(unwind(&orc, &start(SPECIAL), &stack), (vec![SPECIAL, 0, BOTTOM], End::Complete));
}

#[test]
fn an_interrupted_function_finds_its_frame_by_the_saved_registers() {
    let orc = table(&[
        row(0, (0, 0), (0, 0), 0),
        row(0x100, (0, 0), (0, 0), 1),
        row(0x300, (5, 0), (0, 0), REGISTERS | SIGNAL),
        row(0x400, (5, 0), (0, 0), INTERRUPT | SIGNAL),
        row(0x500, (6, 0), (0, 0), CALL),
    ]);
    // Registers, then an interrupt frame on top of them, then code that needs r10 of the registers.
    let mut stack = saved(0, code(0x410), 0x100, 0, KERNEL_CS);
    stack.extend([(0x100, code(0x510)), (0x108, KERNEL_CS), (0x118, STACK + 0x200), (0x400, code(BOTTOM))]);
    let frames = vec![SPECIAL, 0x410, 0x510, BOTTOM];
    assert_eq!(unwind(&orc, &start(SPECIAL), &stack), (frames, End::Complete));
}

/// A thunk's first instruction is described like the bottom of a stack, and its caller's is on the stack.
#[test]
fn what_runs_is_at_no_bottom() {
    let orc = with_special((5, 0), (0, 0), REGISTERS | SIGNAL);
    assert_eq!(unwind(&orc, &start(BOTTOM), &[]), (vec![BOTTOM], End::Undefined(Va(code(BOTTOM)))));
    let interrupted = saved(0, code(BOTTOM), 0x200, 0, KERNEL_CS);
    let expected = (vec![SPECIAL, BOTTOM], End::Undefined(Va(code(BOTTOM))));
    assert_eq!(unwind(&orc, &start(SPECIAL), &interrupted), expected);
    let new = Start { scratch: None, ..start(BOTTOM) };
    assert_eq!(unwind(&orc, &new, &[]), (vec![BOTTOM], End::Complete));
}

#[test]
fn user_code_ends_the_trace() {
    let registers = with_special((5, 0), (0, 0), REGISTERS);
    let stack = saved(0, 0x40_1000, 0, 0, USER_CS);
    assert_eq!(unwind(&registers, &start(SPECIAL), &stack), (vec![SPECIAL], End::User));
    let interrupt = with_special((5, 0), (0, 0), INTERRUPT);
    let stack = [(0, 0x40_1000), (8, USER_CS), (24, 0x7fff_0000)];
    assert_eq!(unwind(&interrupt, &start(SPECIAL), &stack), (vec![SPECIAL], End::User));
}

#[test]
fn a_call_is_looked_up_before_its_return_address() {
    // The return address is the first byte of the next function: the call never returns.
    let orc = with_special((5, 8), (0, 0), CALL);
    let stack = [(0, code(0x400)), (8, code(BOTTOM))];
    assert_eq!(unwind(&orc, &start(LEAF), &stack), (vec![LEAF, 0x400, BOTTOM], End::Complete));
}

#[test]
fn improper_ends_say_where() {
    let orc = with_special((15, 0), (0, 0), CALL);
    let at = |end: fn(Va) -> End, va| end(Va(va));
    assert_eq!(unwind(&orc, &start(SPECIAL), &[]).1, at(End::BadEntry, code(SPECIAL)));
    assert_eq!(unwind(&orc, &start(UNKNOWN), &[]).1, at(End::Undefined, code(UNKNOWN)));
    assert_eq!(unwind(&orc, &start(LEAF), &[]).1, at(End::Unreadable, STACK));
    assert_eq!(unwind(&orc, &start(LEAF), &[(0, 0x1234)]).1, at(End::NotCode, 0x1234));
    assert_eq!(unwind(&orc, &Start { ip: Va(0), ..start(0) }, &[]).1, at(End::NotCode, 0));
    let kind = with_special((5, 8), (0, 0), 7);
    assert_eq!(unwind(&kind, &start(SPECIAL), &[]).1, at(End::BadEntry, code(SPECIAL)));
    let bp = with_special((5, 8), (6, 0), CALL);
    assert_eq!(unwind(&bp, &start(SPECIAL), &[(0, code(LEAF))]).1, at(End::BadEntry, code(SPECIAL)));
    let down = with_special((5, -8), (0, 0), CALL);
    let memory = HashMap::from([(STACK - 16, code(LEAF))]);
    let unwinder = Unwinder::new(Some(&down), text(), SLIDE);
    let trace = unwinder.unwind(&(), &start(SPECIAL), |va| memory.get(&va.0).copied(), &mut [Va(0); 4]);
    assert_eq!(trace.end, at(End::Backwards, code(SPECIAL)));
}

#[test]
fn the_output_bounds_the_trace() {
    let orc = with_special((5, 8), (0, 0), CALL);
    let unwinder = Unwinder::new(Some(&orc), text(), SLIDE);
    for room in [0, 1, 7] {
        let mut out = vec![Va(0); room];
        let trace = unwinder.unwind(&(), &start(LEAF), |_| Some(code(LEAF)), &mut out);
        assert_eq!(trace, Trace { len: room, end: End::Full });
    }
}

#[test]
fn saved_registers_that_lead_down_for_ever_end() {
    let orc = with_special((5, 0), (0, 0), REGISTERS);
    let unwinder = Unwinder::new(Some(&orc), text(), SLIDE);
    // Every word is the address of the code: cs is kernel's, and sp goes down each time by reading less.
    let read = |va: Va| match va.0 & 0xff {
        0x80 => Some(code(SPECIAL)),
        0x98 => Some((va.0 & !0xff) - 0x100),
        _ => Some(KERNEL_CS),
    };
    let mut out = [Va(0); 64];
    let trace = unwinder.unwind(&(), &start(SPECIAL), read, &mut out);
    assert_eq!(trace, Trace { len: 1 + MAX_STACKS as usize, end: End::Backwards(Va(code(SPECIAL))) });
}

struct OneModule(Range<u64>, OrcTable);

impl ModuleTables for OneModule {
    fn table(&self, ip: Va) -> Option<&OrcTable> {
        self.0.contains(&ip.0).then_some(&self.1)
    }
}

#[test]
fn modules_bring_their_tables_and_generated_code_a_frame_pointer() {
    let orc = with_special((5, 8), (0, 0), CALL);
    let module = 0xffff_ffff_c030_0000;
    let ip_va = module + 0x4000;
    let (ips, entries) = encode(ip_va, module, &[row(0, (5, 24), (0, 0), CALL)]);
    let module_table = orc.from_module(Va(ip_va), &ips, &entries).expect("well-formed");
    assert_eq!(module_table.len(), 1);
    let modules = OneModule(module..module + 0x1000, module_table);
    let generated = module + 0x10_0000;
    let memory = HashMap::from([
        (STACK, module + 0x20),
        (STACK + 8 + 16, generated),
        (STACK + 0x80, STACK + 0x400),
        (STACK + 0x88, code(BOTTOM)),
    ]);
    let mut out = [Va(0); 8];
    let unwinder = Unwinder::new(Some(&orc), text(), SLIDE);
    let trace = unwinder.unwind(&modules, &start(LEAF), |va| memory.get(&va.0).copied(), &mut out);
    assert_eq!(trace, Trace { len: 4, end: End::Complete });
    assert_eq!(out[..4], [Va(code(LEAF)), Va(module + 0x20), Va(generated), Va(code(BOTTOM))]);
    assert!(orc.from_module(Va(ip_va), &ips, &entries[..5]).is_none());
    assert!(orc.from_module(Va(ip_va), &[], &[]).is_none());
}

/// Code elsewhere that stands for two instructions of [`LEAF`]: before and behind a push of its own, and the second one.
fn detours() -> Detours {
    let detour = |from, to, pushed| Detour { from: Va(ELSEWHERE + from), to: Va(code(to)), pushed };
    let mut detours = Detours::default();
    let all = [detour(0, LEAF, 0), detour(1, LEAF, 8), detour(4, LEAF + 5, 0)];
    detours.add(&all, Va(ELSEWHERE + 8));
    detours
}

const ELSEWHERE: u64 = 0xffff_ffff_4000_0000;

struct Elsewhere(Detours);

impl ModuleTables for Elsewhere {
    fn table(&self, _ip: Va) -> Option<&OrcTable> {
        None
    }

    fn detour(&self, ip: Va) -> Option<&Detour> {
        self.0.find(ip)
    }
}

#[test]
fn whoever_is_on_a_detour_is_where_the_kernel_would_be() {
    let orc = with_special((5, 0), (0, 0), REGISTERS | SIGNAL);
    let elsewhere = Elsewhere(detours());
    for unwinder in [Unwinder::new(Some(&orc), text(), SLIDE), Unwinder::new(None, text(), SLIDE)] {
        for (from, to, pushed) in [(0, LEAF, 0), (1, LEAF, 8), (3, LEAF, 8), (4, LEAF + 5, 0)] {
            // At the start, and in what an interrupt saved.
            let mut memory = HashMap::from([(STACK + pushed, code(BOTTOM)), (STACK + 0x80, 0)]);
            let read = |memory: &HashMap<u64, u64>, va: Va| memory.get(&va.0).copied();
            let mut out = [Va(0); 4];
            let running = Start { ip: Va(ELSEWHERE + from), ..start(0) };
            unwinder.unwind(&elsewhere, &running, |va| read(&memory, va), &mut out);
            assert_eq!(out[..2], [Va(code(to)), Va(code(BOTTOM))], "{from}");

            memory.extend(
                saved(0x100, ELSEWHERE + from, 0x200, 0, KERNEL_CS).iter().map(|&(at, w)| (STACK + at, w)),
            );
            memory.insert(STACK + 0x200 + pushed, code(BOTTOM));
            let interrupt = Start { sp: Va(STACK + 0x100), bp: Va(STACK + 0x101), ..start(SPECIAL) };
            let mut frames = Vec::new();
            unwinder.visit(
                &elsewhere,
                &interrupt,
                |va| read(&memory, va),
                |frame| {
                    frames.push((frame.ip, frame.sp));
                    frames.len() < 2
                },
            );
            assert_eq!(frames[1], (Va(code(to)), Va(STACK + 0x200 + pushed)), "{from}");
        }
    }
}

#[test]
fn all_encodings_mean_the_same() {
    // Base and meaning, then the flags' upper half in each encoding.
    let cases = [
        (5, Frame::Call, false, [0b000, 0b0000, 0b0010]),
        (5, Frame::Registers, true, [0b001, 0b0101, 0b1011]),
        (5, Frame::Interrupt, true, [0b010, 0b0110, 0b1100]),
        (0, Frame::End, false, [0b100, 0b1000, 0b0001]),
        (0, Frame::Undefined, false, [0b000, 0b0000, 0b0000]),
    ];
    let formats = [Format::WITH_END, Format::WITH_SIGNAL_AND_END, Format::WITH_TYPES];
    for (which, format) in formats.into_iter().enumerate() {
        let mut all = Vec::new();
        for (base, frame, signal, upper) in cases {
            let row = row(0, (base, -16), (4, 24), 0);
            let bytes: Vec<u8> = entry_bytes(&row, upper[which] << 8).collect();
            let entry = format.decode(&bytes);
            assert_eq!((entry.frame, entry.signal), (frame, signal), "{format:?}");
            assert_eq!((entry.sp_offset, entry.bp_offset, entry.bp), (-16, 24, Base::Bp));
            all.extend(bytes.repeat(if frame == Frame::Call { 9 } else { 1 }));
        }
        assert_eq!(Format::guess(&all), format);
    }
}

#[test]
fn btf_says_which_encoding() {
    let describe = |flags: &[(&str, u32)]| {
        let mut b = Builder::new();
        let (short, unsigned) = (b.int("s16", 2), b.int("unsigned int", 4));
        let mut parts = vec![("sp_offset", short, 0, 0), ("bp_offset", short, 16, 0)];
        let mut bit = 32;
        for &(name, width) in flags {
            parts.push((name, unsigned, bit, width));
            bit += width;
        }
        b.structure("orc_entry", 6, &parts);
        Format::from_types(&Btf::parse(&b.bytes()).expect("well-formed"))
    };
    let registers = [("sp_reg", 4), ("bp_reg", 4)];
    let with = |more: &[(&'static str, u32)]| describe(&[&registers, more].concat());
    assert_eq!(with(&[("type", 2), ("end", 1)]), Some(Format::WITH_END));
    assert_eq!(with(&[("type", 2), ("signal", 1), ("end", 1)]), Some(Format::WITH_SIGNAL_AND_END));
    assert_eq!(with(&[("type", 3), ("signal", 1)]), Some(Format::WITH_TYPES));
    assert_eq!(with(&[]), None);
    assert_eq!(with(&[("type", 9)]), None, "more than the flags hold");
}

#[test]
fn the_kernels_sort_order_is_restored() {
    // At 0x20 one entry knows nothing: the other counts, wherever it stood.
    let orc = table(&[
        row(0x40, (0, 0), (0, 0), 1),
        row(0x20, (5, 8), (0, 0), CALL),
        row(0x20, (0, 0), (0, 0), 0),
        row(0, (0, 0), (0, 0), 0),
    ]);
    let frame = |at| orc.find(Va(TEXT + at)).map(|e| e.frame);
    assert_eq!(frame(0), Some(Frame::Undefined));
    assert_eq!(frame(0x2f), Some(Frame::Call));
    assert_eq!(frame(0x4000), Some(Frame::End));
    assert_eq!(orc.find(Va(TEXT - 1)), None);
}

/// Where the synthetic image has its ORC tables, from BASE.
const IPS_AT: u64 = 0x8000;
const ENTRIES_AT: u64 = 0x9000;

/// An image with tables of three entries, in sections of these names, with symbols around them.
fn image_with_tables(names: [&'static str; 2]) -> (KernelImage, SymbolTable) {
    let rows = [row(0, (5, 8), (0, 0), CALL), row(0x40, (5, 16), (0, 0), CALL), row(0x80, (0, 0), (0, 0), 0)];
    let (ips, entries) = encode(BASE + IPS_AT, BASE, &rows);
    let mut symbols: Vec<Symbol> = [
        (BASE, "_stext"),
        (BASE + 0x1000, "_etext"),
        (BASE + IPS_AT, "__start_orc_unwind_ip"),
        (BASE + IPS_AT + ips.len() as u64, "__stop_orc_unwind_ip"),
        (BASE + ENTRIES_AT, "__start_orc_unwind"),
        (BASE + ENTRIES_AT + entries.len() as u64, "__stop_orc_unwind"),
    ]
    .map(|(va, name)| Symbol { va: Va(va), kind: 'T', name: name.to_owned() })
    .into();
    symbols.extend((0..300).map(|n| Symbol {
        va: Va(BASE + 0x2000 + n * 8),
        kind: 'd',
        name: format!("filler_{n}"),
    }));
    symbols.sort_by_key(|s| s.va);
    let block = |name, at, bytes| Block { name, at, bytes };
    let image = synthetic::image(&[
        block(".rodata", 0x1_0000, encoder::tables(&symbols, BASE)),
        block(names[0], IPS_AT, ips),
        block(names[1], ENTRIES_AT, entries),
    ]);
    let symbols = SymbolTable::recover(&image).expect("well-formed");
    (image, symbols)
}

#[test]
fn an_images_tables_are_found_by_section_or_by_symbol() {
    for names in [[".orc_unwind_ip", ".orc_unwind"], [".init.data", ".init.data2"]] {
        let (image, symbols) = image_with_tables(names);
        let orc = OrcTable::recover(&image, &symbols, None).expect("well-formed");
        assert_eq!(orc.len(), 3);
        assert_eq!(orc.find(Va(BASE + 0x7f)).map(|e| (e.sp, e.sp_offset)), Some((Base::Sp, 16)));
        let text = Text::recover(&image, &symbols).expect("well-formed");
        assert!(text.contains(Va(BASE)) && !text.contains(Va(BASE + 0x1000)));
    }
}

#[test]
fn a_kernel_without_tables_is_said_to_have_none() {
    let (_, symbols) = image_with_tables([".orc_unwind_ip", ".orc_unwind"]);
    let bare = synthetic::image(&[Block { name: ".text", at: 0, bytes: vec![0xc3; 64] }]);
    let error = OrcTable::recover(&bare, &symbols, None).err().map(|e| e.to_string());
    assert_eq!(error.as_deref(), Some("The kernel image has no ORC tables (CONFIG_UNWINDER_ORC)"));
}

#[test]
fn damaged_tables_are_refused() {
    let far = encode(TEXT, TEXT, &[row(0, (5, 8), (0, 0), CALL), row(0x7000_0000, (5, 8), (0, 0), CALL)]);
    let new = |ips: &[u8], entries: &[u8]| {
        let table = OrcTable::new(Format::WITH_TYPES, Va(TEXT), ips, entries);
        table.err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert_eq!(new(&[0; 8], &[0; 6]), "There are 2 addresses but 1 entries");
    assert_eq!(new(&[], &[]), "They are empty");
    assert_eq!(new(&far.0, &far.1), "", "2 GiB is as far as it goes");
    let mut ips = i32::MIN.to_le_bytes().to_vec();
    ips.extend(i32::MAX.to_le_bytes());
    assert!(new(&ips, &far.1).starts_with("They span code from"));
}

#[test]
fn a_sleeping_task_starts_at_its_switch() {
    let frame = SleepingFrame {
        saved: [(Register::Rbx, 0); 6],
        bytes: 56,
        bp_at: 40,
        ip_at: 48,
        fork_return: Some(Va(TEXT + 0x300)),
    };
    for (ip, exact) in [(code(LEAF), false), (code(0x300), true)] {
        let memory = HashMap::from([(STACK + 40, 7), (STACK + 48, ip)]);
        let start = frame
            .start(&Task { saved_sp: Va(STACK), ..Task::default() }, SLIDE, |va| memory.get(&va.0).copied());
        let expected = Start { ip: Va(ip), sp: Va(STACK + 56), bp: Va(7), scratch: None, exact };
        assert_eq!(start, Some(expected));
    }
    assert_eq!(frame.start(&Task::default(), SLIDE, |_| None), None);
}

pub(super) fn rows() -> impl Strategy<Value = Vec<Row>> {
    let row = (0u64..0x1000, 0u16..16, -64i16..64, 0u16..16, -64i16..64, 0u16..16);
    let row = row.prop_map(|(at, sp, sp_offset, bp, bp_offset, kind)| Row {
        at,
        sp: (sp, sp_offset * 8),
        bp: (bp, bp_offset * 8),
        kind,
    });
    prop::collection::vec(row, 1..64)
}

proptest! {
    #[test]
    fn the_index_finds_what_a_search_finds(mut rows in rows(), wide in any::<bool>(), at in 0u64..0x20_0000) {
        for row in rows.iter_mut().filter(|_| wide) {
            row.at *= 0x123;
        }
        rows.sort_by_key(|r| r.at);
        let orc = table(&rows);
        let address = TEXT + rows[0].at + at;
        let naive = rows.iter().rfind(|r| TEXT + r.at <= address).expect("the first does");
        let found = orc.find(Va(address)).expect("behind the first");
        let expected = Format::WITH_TYPES.decode(&entry_bytes(naive, naive.kind << 8).collect::<Vec<_>>());
        prop_assert_eq!(*found, expected);
    }

    #[test]
    fn any_tables_over_any_memory_end(
        rows in rows(),
        words in prop::collection::vec(any::<u16>(), 64),
        first in 0u64..0x1000,
        room in 0usize..40,
        orc in any::<bool>(),
        live in any::<bool>(),
    ) {
        // Words are code, stack addresses (odd ones too), code segments or junk.
        let read = |va: Va| {
            let word = u64::from(words[(va.0 / 8 % 64) as usize]);
            match word & 3 {
                0 => Some(code(word >> 4)),
                1 => Some(STACK + (word >> 4)),
                2 => Some(word),
                _ => None,
            }
        };
        let table = table(&rows);
        let unwinder = Unwinder::new(orc.then_some(&table), text(), SLIDE);
        let mut start = start(first);
        start.scratch = start.scratch.filter(|_| live);
        let mut out = vec![Va(0); room];
        let trace = unwinder.unwind(&(), &start, read, &mut out);
        prop_assert!(trace.len <= room);
        prop_assert_eq!(trace.end == End::Full, trace.len == room);
    }

    #[test]
    fn any_bytes_are_tables_or_are_refused(
        ips in prop::collection::vec(any::<u8>(), 0..64),
        entries in prop::collection::vec(any::<u8>(), 0..96),
        ip in any::<u64>(),
    ) {
        Format::guess(&entries);
        if let Ok(table) = OrcTable::new(Format::WITH_END, Va(ip), &ips, &entries) {
            table.find(Va(ip));
        }
    }
}
