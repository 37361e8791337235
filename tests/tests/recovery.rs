//! What is recovered from a stock kernel's image agrees with the kernel's own tables, and with our data; no machine is
//! started.

use anyhow::{Context, Result, ensure};
use iced_x86::{Decoder, DecoderOptions, FlowControl};
use introspect::callee_saved::Register;
use introspect::image::KernelImage;
use introspect::kernel::Kernel;
use introspect::memory::Va;
use introspect::scan::refs::Counter;
use introspect::symbols::SymbolRef;
use introspect::unwind::{Start, Text, Unwinder};
use std::process::ExitCode;
use tests::{kernel, test};

/// Where the made-up stack is, and its frame pointer: nothing of the one lies near the other.
const STACK: Va = Va(0xffff_c900_0000_0000);
const FRAME_POINTER: Va = Va(0xffff_d900_0000_0000);
/// One function of so many is looked at.
const STEP: usize = 7;

fn main() -> ExitCode {
    tests::main(vec![
        test("frames_are_as_orc_says_6.1-cloud", || frames("6.1-cloud")),
        test("frames_are_as_orc_says_6.12-cloud", || frames("6.12-cloud")),
        test("counts_are_where_the_profile_says_6.1-cloud", || counts("6.1-cloud")),
        test("counts_are_where_the_profile_says_6.12-cloud", || counts("6.12-cloud")),
        test("types_come_from_a_file_of_the_same_kernel_only", types_of_a_file),
    ])
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

/// Every row of the profile names a structure of this kernel and a member of it that is a count.
fn counts(line: &str) -> Result<()> {
    let kernel = Kernel::open(&kernel(line)?.vmlinuz)?;
    let types = kernel.types.as_ref().context("no BTF")?;
    let symbol = |name: &str| kernel.symbols.lookup(name);
    let rules = guest_profiles::annotations::builtin().counts;
    ensure!(rules.len() > 10, "only {} rows", rules.len());
    for rule in &rules {
        Counter::of_rule(rule, types, &symbol).with_context(|| format!("{line}: {}", rule.cache))?;
        let (head, last) = rule.member.rsplit_once('.').unwrap_or(("", &rule.member));
        let members = match head {
            "" => types.members(&rule.structure),
            head => {
                let outer = types.members(&rule.structure).unwrap_or_default();
                let inner = outer.iter().find(|member| member.name == head).map(|member| member.ty);
                inner.map(|ty| types.members_of(ty))
            }
        };
        let members = members.unwrap_or_default();
        let member = members.iter().find(|member| member.name == last);
        let ty =
            &member.with_context(|| format!("{line}: no {} in {}", rule.member, rule.structure))?.type_name;
        ensure!(
            ["refcount_t", "atomic_t", "atomic_long_t", "struct kref"].contains(&ty.as_str())
                || head.ends_with("lockref"),
            "{line}: {}.{} is a {ty}",
            rule.structure,
            rule.member
        );
        let known =
            rule.own_if.iter().flat_map(|own_if| &own_if.symbols).filter(|name| symbol(name).is_some());
        let null = rule.own_if.as_ref().is_none_or(|own_if| own_if.null);
        ensure!(null || known.count() > 2, "{line}: {} names no symbols", rule.cache);
    }
    Ok(())
}

/// Types beside the image, raw and in a vmlinux: those of another kernel are refused.
fn types_of_a_file() -> Result<()> {
    let [own, other] = ["6.1-cloud", "6.12-cloud"].map(|line| KernelImage::open(&kernel(line)?.vmlinuz));
    let (own, other) = (own?, other?);
    let btf = |image: &KernelImage| image.section_bytes(".BTF").map(<[u8]>::to_vec).context("no .BTF");
    let expected = Kernel::recover(own.clone())?.types.context("no types")?.type_count();
    for file in [btf(&own)?, own.elf.clone()] {
        let kernel = Kernel::recover_with(own.clone(), Some(file.clone()))?;
        ensure!(kernel.types.is_some_and(|types| types.type_count() == expected));
        ensure!(kernel.types_file == Some(file));
    }
    for file in [btf(&other)?, other.elf.clone()] {
        let refused = Kernel::recover_with(own.clone(), Some(file)).err().context("taken")?;
        ensure!(refused.to_string().starts_with("They are of another kernel: "), "{refused:#}");
    }
    for file in [Vec::new(), b"\x7fELF".to_vec(), vec![0; 100], btf(&own)?[..1000].to_vec()] {
        ensure!(Kernel::recover_with(own.clone(), Some(file)).is_err());
    }
    Ok(())
}
