//! What is recovered from a stock kernel's image agrees with the kernel's own tables, and with our data; no machine is
//! started.

#[cfg_attr(target_arch = "aarch64", path = "aarch64.rs")]
#[cfg_attr(target_arch = "x86_64", path = "x86_64.rs")]
mod frames;

use anyhow::{Context, Result, ensure};
use introspect::image::KernelImage;
use introspect::kernel::Kernel;
use introspect::scan::refs::Counter;
use std::process::ExitCode;
use tests::{kernel, test};

fn main() -> ExitCode {
    let mut trials = frames::trials();
    trials.extend([
        test("counts_are_where_the_profile_says_6.1-cloud", || counts("6.1-cloud")),
        test("counts_are_where_the_profile_says_6.12-cloud", || counts("6.12-cloud")),
        test("types_come_from_a_file_of_the_same_kernel_only", types_of_a_file),
    ]);
    tests::main(trials)
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
