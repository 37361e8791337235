//! Frames as the code makes them are as ORC has them.

use anyhow::{Result, ensure};
use iced_x86::{Decoder, DecoderOptions, FlowControl};
use introspect::callee_saved::Register;
use introspect::kernel::Kernel;
use introspect::memory::Va;
use introspect::symbols::SymbolRef;
use introspect::unwind::{Start, Text, Unwinder};
use libtest_mimic::Trial;
use tests::{kernel, test};

/// Where the made-up stack is, and its frame pointer: nothing of the one lies near the other.
const STACK: Va = Va(0xffff_c900_0000_0000);
const FRAME_POINTER: Va = Va(0xffff_d900_0000_0000);
/// One function of so many is looked at.
const STEP: usize = 7;

/// All.
pub fn trials() -> Vec<Trial> {
    vec![
        test("frames_are_as_orc_says_6.1-cloud", || frames("6.1-cloud")),
        test("frames_are_as_orc_says_6.12-cloud", || frames("6.12-cloud")),
    ]
}

#[derive(Default, Debug)]
struct Counts {
    /// Calls whose frame both know.
    both: usize,
    /// Those of them with a saved frame pointer register.
    saved: usize,
    /// Calls whose frame they see otherwise.
    differing: usize,
    /// Calls whose code cannot be followed: those of hand-aligned stacks and cold parts.
    unknown: usize,
}

/// At every call of many functions: the depth of the frame and where rbp was saved.
fn frames(line: &str) -> Result<()> {
    let kernel = Kernel::open(&kernel(line)?.vmlinuz)?;
    let text = Text::recover(&kernel.image, &kernel.symbols)?;
    let unwinder = Unwinder::new(kernel.orc.as_ref(), text, 0);
    let mut counts = Counts::default();
    let code = kernel.symbols.iter().filter(|symbol| matches!(symbol.kind, 't' | 'T'));
    for function in code.step_by(STEP) {
        for call in calls(&kernel, function) {
            if let Err(error) = compare(&kernel, &unwinder, call, &mut counts) {
                counts.differing += 1;
                println!("{line}: {}+{:#x}: {error}", function.name, call - function.va);
            }
        }
    }
    println!("{line}: {counts:?}");
    // Code that never runs, behind calls that do not return, and code written by hand has no frame of its own.
    ensure!(counts.differing * 1000 < counts.both, "too many differ: {counts:?}");
    ensure!(counts.both > 10_000 && counts.saved > 5_000, "too few calls: {counts:?}");
    ensure!(counts.unknown * 8 < counts.both, "too many unknown: {counts:?}");
    Ok(())
}

/// The return addresses of a function's calls.
fn calls(kernel: &Kernel, function: SymbolRef<'_>) -> Vec<Va> {
    let size = kernel.symbols.size_of(function).min(64 << 10);
    let bytes = kernel.image.bytes_at(function.va, size as usize).unwrap_or_default();
    let decoder = Decoder::with_ip(64, bytes, function.va.0, DecoderOptions::NONE);
    let valid = decoder.into_iter().take_while(|i| !i.is_invalid());
    let call = |flow| matches!(flow, FlowControl::Call | FlowControl::IndirectCall);
    valid.filter(|i| call(i.flow_control())).map(|i| Va(i.next_ip())).collect()
}

fn compare(kernel: &Kernel, unwinder: &Unwinder<'_>, call: Va, counts: &mut Counts) -> Result<()> {
    let start = Start { ip: call, sp: STACK, bp: FRAME_POINTER, scratch: None, exact: false };
    // The unwinder reads the return address and, where the function saved it, rbp.
    let mut read = Vec::new();
    let mut frames = Vec::new();
    unwinder.visit(
        &(),
        &start,
        |va| {
            read.push(va);
            Some(call.0)
        },
        |frame| {
            frames.push(frame);
            frames.len() < 2
        },
    );
    let Some(caller) = frames.get(1).filter(|caller| caller.sp < FRAME_POINTER) else { return Ok(()) };
    let Some(saves) = kernel.saves(call, false) else {
        counts.unknown += 1;
        return Ok(());
    };
    ensure!(caller.sp == STACK + saves.depth.unsigned_abs(), "depth {}, ORC {caller:?}", saves.depth);
    let rbp = saves.iter().find(|(register, _)| *register == Register::Rbp);
    let rbp = rbp.map(|(_, offset)| caller.sp - offset);
    let by_orc = read.into_iter().find(|&va| va != caller.sp - 8);
    ensure!(rbp == by_orc, "rbp saved at {rbp:?}, ORC {by_orc:?}");
    counts.both += 1;
    counts.saved += usize::from(rbp.is_some());
    Ok(())
}
