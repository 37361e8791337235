//! Places of the kernel's source that tell kmemleak something: `data/sites.toml`, whose head says what the fields mean. Only
//! tests look at them: that none is forgotten.

use serde::Deserialize;

/// The contents of the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sites {
    #[serde(rename = "site")]
    sites: Vec<Site>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Site {
    function: String,
    #[serde(default)]
    call: String,
    source: Vec<String>,
    reason: Option<String>,
}

#[test]
fn every_site_is_a_rule_or_needs_none() {
    let Sites { sites } = toml::from_str(include_str!("../data/sites.toml")).expect("sites");
    let rules = crate::annotations::builtin().annotations;
    let mut mirrored: Vec<&String> = rules.iter().flat_map(|rule| &rule.source).collect();
    for site in &sites {
        let known = |place: &&String| mirrored.contains(place);
        match &site.reason {
            None => {
                assert!(!site.source.is_empty() && site.source.iter().all(|place| known(&place)), "{site:?}")
            }
            Some(reason) => {
                assert!(!reason.is_empty() && !site.source.iter().any(|place| known(&place)), "{site:?}");
            }
        }
        assert!(!site.function.is_empty() && (!site.call.is_empty() || site.source.is_empty()), "{site:?}");
        mirrored.retain(|place| !site.source.contains(place));
    }
    // What kmemleak itself allocates is no call of it.
    mirrored.retain(|place| !place.starts_with("mm/kmemleak.c:"));
    assert!(mirrored.is_empty(), "rules without a site: {mirrored:?}");
    // Of the 97 and 84 calls in the two kernels' sources; the others are in drivers, which are listed without lines.
    let count = |version: &str| sites.iter().flat_map(|s| &s.source).filter(|p| p.ends_with(version)).count();
    assert!(count("(6.1)") >= 60 && count("(6.12)") >= 55, "{} {}", count("(6.1)"), count("(6.12)"));
}
