//! Rule files: the guest profile and suppressions.

use crate::cli::Failure;
use anyhow::{Context, Result};
use guest_profiles::annotations::{self, Rules};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

const PROFILE_HINT: &str = "a file has tables [[annotation]] and [[suppress]]; guest-profiles/data/annotations.toml shows the format";
const SUPPRESSIONS_HINT: &str = "a file has tables [[suppress]] with a name and patterns, such as function = \"mydriver_*\"; docs/console.md, `report`, has more";

/// What is in the files, so that a saved machine is looked at by the same rules.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleFiles {
    /// Text of `--profile`.
    pub profile: Option<String>,
    /// Name and text of each of `--suppressions`.
    pub suppressions: Vec<(String, String)>,
}

impl RuleFiles {
    /// Reads and checks them.
    ///
    /// # Errors
    /// A file that cannot be read, or what is wrong in which of its lines.
    pub fn read(profile: Option<&Path>, suppressions: &[PathBuf]) -> Result<Self> {
        let mut files = Self::default();
        if let Some(path) = profile {
            let wrong =
                || Failure::usage(format!("Cannot use guest profile {}", path.display())).hint(PROFILE_HINT);
            let text = std::fs::read_to_string(path).with_context(wrong)?;
            annotations::parse(&text).with_context(wrong)?;
            files.profile = Some(text);
        }
        for path in suppressions {
            let wrong = || {
                Failure::usage(format!("Cannot use suppressions {}", path.display())).hint(SUPPRESSIONS_HINT)
            };
            let text = std::fs::read_to_string(path).with_context(wrong)?;
            annotations::parse(&text).with_context(wrong)?;
            let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
            files.suppressions.push((name, text));
        }
        Ok(files)
    }

    /// The built-in rules and theirs.
    ///
    /// # Errors
    /// None where [`RuleFiles::read`] made them.
    pub fn rules(&self) -> Result<Rules> {
        let mut rules =
            annotations::builtin_and(self.profile.as_deref()).context("Cannot use the guest profile")?;
        for (name, text) in &self.suppressions {
            let file = annotations::parse_file(name, text);
            rules.extend(file.with_context(|| format!("Cannot use suppressions {name}"))?);
        }
        Ok(rules)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_counts_and_says_where_it_is_wrong() {
        let dir = crate::scratch::Scratch::new().expect("a directory");
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).expect("a file");
            path
        };
        let profile = file("p.toml", "[[suppress]]\nname='one'\ncache='a'\n");
        let more =
            [file("a.toml", "\n[[suppress]]\nname='two'\nmodule='m'\n"), file("b.toml", "# nothing\n")];
        let rules = RuleFiles::read(Some(&profile), &more).and_then(|files| files.rules()).expect("rules");
        let places: Vec<_> =
            rules.suppressions.iter().map(|rule| (rule.name.as_str(), rule.place.as_str())).collect();
        assert_eq!(places, [("one", "1"), ("two", "a.toml:2")]);
        for (text, expected) in [
            ("[[suppress]]\nname='x'\n", "Line 1: Suppression \"x\" has no function"),
            ("\n\n[[suppress]]\nnam='x'\n", "Line 4: unknown field `nam`"),
            ("[[suppress]\n", "Line 1: "),
        ] {
            let error = RuleFiles::read(None, &[file("c.toml", text)]).expect_err(text);
            let error = format!("{error:#}");
            assert!(error.contains(expected) && error.contains("c.toml"), "{error}");
        }
    }
}
