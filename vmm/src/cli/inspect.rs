//! `kleak-vmm inspect`.

use super::{ExitCode, Failure, InspectOptions, check, print};
use crate::run;
use anyhow::Context;
use guest_profiles::hooks::Tracked;
use introspect::hooks::{self, Gap};
use introspect::image::KernelImage;
use introspect::inspect::Inspection;
use introspect::kernel::Kernel;
use serde::Serialize;
use std::collections::BTreeSet;
use std::fmt::Write;

/// All that is printed.
#[derive(Serialize)]
struct Output {
    #[serde(flatten)]
    image: Inspection,
    hooks: HookPart,
}

/// Which of the built-in hooks apply. Sizes of the trap instruction differ, so places may too.
#[derive(Serialize)]
struct HookPart {
    int3: Traps,
    pio: Traps,
}

#[derive(Serialize)]
struct Traps {
    functions: BTreeSet<String>,
    traps: usize,
    not_tracked: Vec<Gap>,
}

/// Prints what can be recovered from a kernel image.
///
/// # Errors
/// An unreadable or unknown image.
pub fn inspect(options: &InspectOptions) -> anyhow::Result<ExitCode> {
    check::input_file(&options.kernel, "kernel", "give the path of a bzImage or of a vmlinux")?;
    let types = run::types_file(options.types.as_deref())?;
    // The error below names the file.
    let unusable = || Failure::usage("").hint("give an x86-64 bzImage or a vmlinux ELF with kallsyms in it");
    let image = KernelImage::open(&options.kernel).with_context(unusable)?;
    let kernel = run::recover(image, types).with_context(unusable)?;
    let hooks = HookPart { int3: traps(&kernel, 1), pio: traps(&kernel, 2) };
    let output = Output { image: Inspection::of(&kernel), hooks };
    print(&if options.json { serde_json::to_string(&output)? + "\n" } else { text(&output) })?;
    Ok(ExitCode::Success)
}

/// Traps of an instruction of `len` bytes.
fn traps(kernel: &Kernel, len: usize) -> Traps {
    let plan = hooks::plan(kernel, &guest_profiles::hooks::builtin(), &Tracked::ALL, len);
    Traps {
        traps: plan.traps.len(),
        functions: plan.traps.into_iter().map(|trap| trap.function).collect(),
        not_tracked: plan.gaps,
    }
}

fn text(output: &Output) -> String {
    let mut text = output.image.to_string();
    for (name, traps) in [("int3", &output.hooks.int3), ("pio", &output.hooks.pio)] {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "hooks         {name}: {} traps in {} functions",
            traps.traps,
            traps.functions.len()
        );
        for gap in &traps.not_tracked {
            let _ = writeln!(text, "not tracked   {name}: {}: {}", gap.cover, gap.why);
        }
    }
    text
}
