//! `kleak-vmm inspect`.

use super::{CtlOptions, ExitCode, Failure, InspectOptions, check, ctl, print};
use crate::arch::{KERNELS, TrapInstruction};
use crate::run;
use anyhow::Context;
use guest_profiles::annotations::{Action, Annotation};
use guest_profiles::hooks::Tracked;
use introspect::hooks::{self, Gap, Plan, Planned};
use introspect::image::KernelImage;
use introspect::inspect::Inspection;
use introspect::kernel::Kernel;
use introspect::scan::has_function;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// All that is printed.
#[derive(Serialize)]
struct Output {
    #[serde(flatten)]
    image: Inspection,
    /// Which of the built-in hooks apply, by trap instruction: sizes of these differ, so places may too.
    hooks: BTreeMap<TrapInstruction, Traps>,
    /// None where no trap can be replaced, as on arm64.
    ring: Option<Jumps>,
    annotations: Vec<AnnotationPart>,
}

/// A built-in annotation, and whether it means anything on this kernel.
#[derive(Serialize)]
struct AnnotationPart {
    action: Action,
    /// Function of the kernel by whose allocations it is; the best of those that the rule names.
    function: Option<String>,
    cache: Option<String>,
    /// False: the kernel has none of its functions. Modules, which may have them, are not in the image; nor are caches.
    applies: bool,
    reason: String,
}

#[derive(Serialize)]
struct Traps {
    functions: BTreeSet<String>,
    traps: usize,
    not_tracked: Vec<Gap>,
}

/// What the ring makes of the traps.
#[derive(Serialize)]
struct Jumps {
    /// Traps that jumps take the place of.
    jumps: usize,
    /// Functions in which traps stay, and why.
    stay_traps: BTreeSet<String>,
}

/// Prints what can be recovered from a kernel image.
///
/// # Errors
/// An unreadable or unknown image; with `--live` no machine that answers.
pub fn inspect(options: &InspectOptions) -> anyhow::Result<ExitCode> {
    let Some(path) = &options.kernel else { return live(options) };
    check::input_file(path, "kernel", "give the path of a bzImage or of a vmlinux")?;
    let types = run::types_file(options.types.as_deref())?;
    // The error below names the file.
    let unusable = || Failure::usage("").hint(format!("give {KERNELS} with kallsyms in it"));
    let image = KernelImage::open(path).with_context(unusable)?;
    let kernel = run::recover(image, types).with_context(unusable)?;
    let plan = |trap: &TrapInstruction| {
        hooks::plan(&kernel, &guest_profiles::hooks::builtin(), &Tracked::ALL, trap.len())
    };
    let plans: Vec<Plan> = TrapInstruction::ALL.iter().map(plan).collect();
    let output = Output {
        image: Inspection::of(&kernel),
        // Where jumps can be is the same whatever the trap before.
        ring: plans.first().and_then(jumps),
        hooks: TrapInstruction::ALL.iter().copied().zip(plans.into_iter().map(traps)).collect(),
        annotations: annotations(&kernel),
    };
    print(&if options.json { serde_json::to_string(&output)? + "\n" } else { text(&output) })?;
    Ok(ExitCode::Success)
}

/// What `roots` on the console says.
fn live(options: &InspectOptions) -> anyhow::Result<ExitCode> {
    let words: &[&str] = if options.json { &["json", "roots"] } else { &["roots"] };
    let command = words.iter().map(|&word| word.to_owned()).collect();
    ctl::ctl(&CtlOptions { control: options.control.clone(), command })
}

fn traps(plan: Plan) -> Traps {
    Traps {
        traps: plan.traps.len(),
        functions: plan.traps.into_iter().map(|trap| trap.function).collect(),
        not_tracked: plan.gaps,
    }
}

fn jumps(plan: &Plan) -> Option<Jumps> {
    let stays = |planned: &Planned| Some(format!("{}: {}", planned.function, planned.jump.as_ref().err()?));
    let jumps = plan.traps.iter().filter(|planned| planned.jump.is_ok()).count();
    (jumps > 0).then(|| Jumps { jumps, stay_traps: plan.traps.iter().filter_map(stays).collect() })
}

/// Every built-in annotation.
fn annotations(kernel: &Kernel) -> Vec<AnnotationPart> {
    let part = |rule: Annotation| {
        let function = rule.functions.iter().find(|name| has_function(kernel, name)).cloned();
        AnnotationPart {
            applies: function.is_some() || rule.functions.is_empty(),
            action: rule.action,
            function,
            cache: rule.cache,
            reason: rule.reason,
        }
    };
    guest_profiles::annotations::builtin().annotations.into_iter().map(part).collect()
}

fn text(output: &Output) -> String {
    let mut text = output.image.to_string();
    for (trap, traps) in &output.hooks {
        let name = trap.name();
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
    if let Some(Jumps { jumps, stay_traps }) = &output.ring {
        let _ = writeln!(text, "hooks         ring: jumps in the place of {jumps} traps");
        for why in stay_traps {
            let _ = writeln!(text, "stays a trap  {why}");
        }
    }
    for rule in output.annotations.iter().filter(|rule| rule.applies) {
        let by = rule.function.as_ref().or(rule.cache.as_ref()).map_or("", String::as_str);
        let _ = writeln!(text, "annotation    {}: {by}: {}", rule.action.name(), rule.reason);
    }
    let idle = output.annotations.iter().filter(|rule| !rule.applies).count();
    let _ = writeln!(text, "annotations   {idle} more are of functions that are not in this image");
    text
}
