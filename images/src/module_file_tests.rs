//! Tests on modules made up here: an ELF header, a `.modinfo`, no code.

use super::*;

/// A relocatable ELF file with these `.modinfo` entries, and `__versions` if asked for.
fn module(entries: &[&str], versions: bool) -> Vec<u8> {
    let names = b"\0.modinfo\0__versions\0.shstrtab\0.bss\0";
    let modinfo: Vec<u8> = entries.iter().flat_map(|entry| [entry.as_bytes(), b"\0"].concat()).collect();
    let mut sections = vec![(0u32, 0u32, Vec::new()), (1, 1, modinfo), (21, 3, names.to_vec())];
    sections.push((31, 8, vec![0; 1 << 12]));
    if versions {
        sections.push((10, 1, vec![0; 64]));
    }
    let mut file = vec![0u8; 64];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[16] = 1;
    let mut headers = Vec::new();
    for (name, kind, content) in &sections {
        let mut header = vec![0u8; 64];
        header[..4].copy_from_slice(&name.to_le_bytes());
        header[4..8].copy_from_slice(&kind.to_le_bytes());
        // What has no content points behind the end of the file.
        let offset = if *kind == 8 { 1u64 << 40 } else { file.len() as u64 };
        header[24..32].copy_from_slice(&offset.to_le_bytes());
        header[32..40].copy_from_slice(&(content.len() as u64).to_le_bytes());
        if *kind != 8 {
            file.extend_from_slice(content);
        }
        headers.extend(header);
    }
    let table = file.len() as u64;
    file[40..48].copy_from_slice(&table.to_le_bytes());
    file[58] = 64;
    file[60] = sections.len() as u8;
    file[62] = 2;
    file.extend(headers);
    file
}

const MAGIC: &str = "vermagic=6.1.0-56-cloud-amd64 SMP preempt mod_unload modversions ";

#[test]
fn reads_what_a_module_says() {
    let entries = [
        "license=GPL",
        "name=leaky",
        MAGIC,
        "depends=libcrc32c,net-failover",
        "parm=case:what",
        "srcversion=",
    ];
    let info = ModuleInfo::parse(&module(&entries, true)).unwrap();
    assert_eq!(info.name, "leaky");
    assert_eq!(info.vermagic, "6.1.0-56-cloud-amd64 SMP preempt mod_unload modversions");
    assert_eq!(info.depends, ["libcrc32c", "net_failover"]);
    assert_eq!(info.parameters, ["case"]);
    assert!(info.has_versions);
    assert!(!ModuleInfo::parse(&module(&["name=a", MAGIC, "depends="], false)).unwrap().has_versions);
}

#[test]
fn damaged_files_are_errors() {
    let good = module(&["name=a", MAGIC], false);
    for end in 0..good.len() {
        assert!(ModuleInfo::parse(&good[..end]).is_err(), "cut to {end}");
    }
    // Every byte changed in turn: an error or another module, never a panic.
    for at in 0..good.len() {
        for change in [0xff, 0x80, 1] {
            let mut bad = good.clone();
            bad[at] ^= change;
            let _ = ModuleInfo::parse(&bad);
        }
    }
    let refused = |file: &[u8]| ModuleInfo::parse(file).unwrap_err().to_string();
    assert!(refused(b"#!/bin/sh\n").contains("no ELF file"));
    assert!(refused(&module(&["name=a"], false)).contains("vermagic"));
}

#[test]
fn fits_by_release_or_by_checksums() {
    let fits = |magic: &str, versions: bool, release: &str| {
        let entry = format!("vermagic={magic}");
        ModuleInfo::parse(&module(&["name=a", &entry], versions)).unwrap().check_fits(release).is_ok()
    };
    let release = "6.1.0-56-cloud-amd64";
    assert!(fits("6.1.0-56-cloud-amd64 SMP preempt mod_unload modversions ", true, release));
    assert!(fits("6.1.0-56-cloud-amd64 SMP ", false, release));
    assert!(fits("6.1.0-55-cloud-amd64 SMP preempt mod_unload modversions ", true, release));
    assert!(!fits("6.1.0-55-cloud-amd64 SMP preempt mod_unload modversions ", false, release));
    assert!(!fits("6.1.0-55-cloud-amd64 SMP preempt mod_unload ", true, release));
    assert!(!fits("6.12.117+deb12-cloud-amd64 SMP preempt mod_unload modversions ", true, release));
    let info = ModuleInfo::parse(&module(&["name=a", "vermagic=5.10.0 SMP "], true)).unwrap();
    let misfit = info.check_fits(release).unwrap_err().to_string();
    assert_eq!(misfit, "Module a does not fit kernel 6.1.0-56-cloud-amd64: its vermagic is \"5.10.0 SMP\"");
}

/// A folder with modules, gone with the value.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str, modules: &[(&str, &str, &str)]) -> Self {
        let folder = Self(std::env::temp_dir().join(format!("kleak-modules-{name}-{}", std::process::id())));
        for (file, name, depends) in modules {
            let path = folder.0.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let entries = [&format!("name={name}"), MAGIC, &format!("depends={depends}")];
            fs::write(path, module(&entries, true)).unwrap();
        }
        folder
    }

    fn resolve(&self, wanted: &[&str], folder: Option<&str>) -> Result<Vec<String>> {
        let wanted = wanted
            .iter()
            .enumerate()
            .map(|(index, file)| WantedModule { path: self.0.join(file), parameters: format!("n={index}") });
        let folder = folder.map(|folder| self.0.join(folder));
        let found = resolve(&wanted.collect::<Vec<_>>(), folder.as_deref())?;
        Ok(found.into_iter().map(|(file, parameters)| format!("{} {parameters}", file.info.name)).collect())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn dependencies_come_first() {
    let folder = Folder::new(
        "order",
        &[
            ("own/top.ko", "top", "middle,low-level"),
            ("own/middle.ko", "middle", "low_level"),
            ("all/kernel/deep/low-level.ko", "low_level", ""),
            ("own/other.ko", "other", ""),
        ],
    );
    let order = folder.resolve(&["own/other.ko", "own/top.ko"], Some("all")).unwrap();
    assert_eq!(order, ["other n=0", "low_level ", "middle ", "top n=1"]);
    // A given one keeps its parameters wherever it goes.
    let order = folder.resolve(&["own/top.ko", "own/middle.ko"], Some("all")).unwrap();
    assert_eq!(order, ["low_level ", "middle n=1", "top n=0"]);
}

#[test]
fn what_is_missing_or_circular_is_named() {
    let folder = Folder::new(
        "wrong",
        &[("a.ko", "a", "b"), ("b.ko", "b", "a"), ("c.ko", "c", "nowhere"), ("text.ko", "text", "")],
    );
    let error = |wanted: &[&str]| format!("{:#}", folder.resolve(wanted, None).unwrap_err());
    assert!(error(&["a.ko"]).contains("Modules a, b need each other"), "{}", error(&["a.ko"]));
    assert!(error(&["c.ko"]).contains("Module c needs module nowhere"));
    assert!(error(&["c.ko", "c.ko"]).contains("given twice"));
    assert!(error(&["missing.ko"]).contains("missing.ko"));
    fs::write(folder.0.join("text.ko"), "no module").unwrap();
    assert!(error(&["text.ko"]).contains("no ELF file"));
}
