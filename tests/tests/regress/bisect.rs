//! `git bisect run` with `kleak-vmm regress --bisect-exit-codes`.

use super::{Case, head};
use anyhow::{Context, Result, ensure};
use images::Cache;
use std::path::PathBuf;
use tests::{Scratch, kernel};

/// `git bisect run` on a history of a module's source, built for each commit.
pub fn bisect() -> Result<()> {
    let kernel = kernel("6.1-cloud")?;
    let headers = images::kernel::Headers::fetch(&Cache::of_workspace(), &kernel)?;
    let repository = Scratch::new()?;
    let git = |words: &[&str]| -> Result<String> {
        let mut command = std::process::Command::new("git");
        command.arg("-C").arg(repository.path("")).args([
            "-c",
            "user.name=t",
            "-c",
            "user.email=t@example.org",
        ]);
        let output = command.args(words).output().context("git")?;
        ensure!(output.status.success(), "git {words:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    git(&["init", "-q"])?;
    let mut commits = Vec::new();
    let history = ["kfree(p);", "/* tidy */ kfree(p);", "", "/* later */", "/* newest */"];
    for body in history {
        let source = format!(
            "#include <linux/module.h>\n#include <linux/slab.h>\n\
             static noinline void drop(void *p) {{ {body} }}\n\
             static int __init begin(void) {{ drop(kmalloc(100, GFP_KERNEL)); return 0; }}\n\
             static void __exit end(void) {{ }}\nmodule_init(begin);\nmodule_exit(end);\nMODULE_LICENSE(\"GPL\");\n"
        );
        repository.file("driver.c", source)?;
        repository.file("Kbuild", "obj-m := driver.o\n")?;
        git(&["add", "."])?;
        git(&["commit", "-q", "-m", "change"])?;
        commits.push(git(&["rev-parse", "HEAD"])?);
    }
    // Built beforehand: what `git bisect run` would do itself with a script that calls make.
    let cache = Cache::of_workspace();
    let built = Scratch::new()?;
    for commit in &commits {
        git(&["checkout", "-q", commit])?;
        let source = Scratch::new()?;
        for name in ["driver.c", "Kbuild"] {
            source.file(name, std::fs::read(repository.path(name))?)?;
        }
        let module: PathBuf = images::modules::build(&cache, &headers, &source.path(""), "driver")?;
        std::fs::copy(module, built.path(&format!("{commit}.ko")))?;
    }
    let suite = head(&kernel.vmlinuz, 1)
        + "[[test]]\nname = \"driver\"\nmodules = [\"COMMIT.ko\"]\n"
            .replace("COMMIT", &built.path("now").display().to_string())
            .as_str();
    let case = Case::new(&suite)?;
    let step = format!(
        "cp {0}/$(git rev-parse HEAD).ko {0}/now.ko && exec {1} regress {2} --bisect-exit-codes",
        built.path("").display(),
        tests::binary()?.display(),
        case.0.path("suite.toml").display()
    );
    git(&["bisect", "start", &commits[4], &commits[0]])?;
    let said = git(&["bisect", "run", "sh", "-c", &step])?;
    ensure!(said.contains(&format!("{} is the first bad commit", commits[2])), "{said}");
    Ok(())
}
