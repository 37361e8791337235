//! What results are written as: valid by the published schemas, and a page that a browser shows by itself. Nothing boots here: the
//! results are made up, and `regress merge` writes them.

use anyhow::{Context, Result, ensure};
use images::cache;
use serde_json::{Value, json};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tests::{Scratch, run, schemas};

/// Text that no form may take as it is.
const EVIL: &str = "<script>&\"'\u{1b}]]>\u{e4}";

fn group(id: &str, state: &str) -> Value {
    json!({
        "id": id, "count": 3, "direct": 2, "bytes": 192, "retained_bytes": 256, "kind": "slab", "cache": "kmalloc-64",
        "backtrace": [
            { "symbol": "kmalloc_trace", "module": null }, { "symbol": format!("{id}_probe"), "module": "driver" },
            { "symbol": EVIL, "module": null }, { "symbol": null, "module": null },
        ],
        "state": state,
    })
}

/// Results with every outcome, and every state of a leak; one of the baseline is fixed.
fn sample(folder: &Scratch) -> Result<()> {
    let outcomes = [
        "passed",
        "leaked",
        "missing",
        "failed",
        "timed-out",
        "crashed",
        "hung",
        "not-booted",
        "worker",
        "host",
        "untracked",
        "canary",
        "interrupted",
    ];
    let tests = outcomes.iter().enumerate().map(|(at, outcome)| {
        let groups = match *outcome {
            "leaked" => vec![group("new", "new"), group("known", "known"), group("meant", "expected")],
            _ => Vec::new(),
        };
        let kernel = if at < 9 { "6.1-cloud" } else { "6.12-cloud" };
        json!({
            "id": format!("{kernel}/small/{outcome}"), "kernel": kernel, "release": EVIL, "guest": "small", "test": outcome,
            "outcome": outcome, "message": EVIL, "status": 0, "millis": 1234 * at, "groups": groups,
            "console": [EVIL], "heap": { "objects": 10_000 + at, "bytes": 2_000_000 + 5000 * (at * at % 7) },
        })
    });
    let growth = json!({ "kind": "site", "name": "grow+0x1/0x2 [driver]", "bytes_per_hour": 1234.5,
        "history": [1, 2, 2, 5, 9, 14] });
    let results = json!({
        "schema": "kleak-regress/1", "suite": "forms", "file": "suites/my forms.toml", "complete": true, "shard": null,
        "started": 1_700_000_000, "millis": 60_000, "tests": tests.collect::<Vec<_>>(), "fixed": [],
        "boots": [{ "kernel": "6.1-cloud", "guest": "small", "millis": 1, "canary": "found", "unasked_leaks": 2,
            "growth": [growth] }],
    });
    let baseline = json!({ "schema": "kleak-baseline/1", "leaks": [
        { "id": "gone", "site": "gone_probe", "tests": ["6.1-cloud/small/passed"] }] });
    folder.file("sample.json", results.to_string())?;
    folder.file("baseline.json", baseline.to_string())?;
    Ok(())
}

/// Has the sample written in these files; its folder.
fn written(files: &[&str]) -> Result<Scratch> {
    let folder = Scratch::new()?;
    sample(&folder)?;
    let path = |name: &str| folder.path(name).display().to_string();
    let mut line = ["regress", "merge"].map(str::to_owned).to_vec();
    line.extend([path("sample.json"), "--baseline".to_owned(), path("baseline.json")]);
    files.iter().for_each(|name| line.extend(["--report".to_owned(), path(name)]));
    run(line)?.expect_code(1)?;
    Ok(folder)
}

/// A copy of the file with one text in place of another must not pass.
fn spoiled(folder: &Scratch, name: &str, from: &str, to: &str) -> Result<PathBuf> {
    let text = std::fs::read_to_string(folder.path(name))?;
    ensure!(text.contains(from), "no {from:?} in {name}");
    folder.file(&format!("spoiled-{name}"), text.replace(from, to))
}

pub fn valid() -> Result<()> {
    let folder = written(&["all.xml", "all.sarif"])?;
    schemas::check_xml(&schemas::JUNIT, &folder.path("all.xml"))?;
    let wrong = spoiled(&folder, "all.xml", "<testcase classname", "<testcase class")?;
    ensure!(schemas::check_xml(&schemas::JUNIT, &wrong).is_err(), "an invalid JUnit file passes");
    schemas::check_json(&schemas::SARIF, &folder.path("all.sarif"))?;
    let wrong = spoiled(&folder, "all.sarif", "\"ruleId\"", "\"rule\"")?;
    ensure!(schemas::check_json(&schemas::SARIF, &wrong).is_err(), "an invalid SARIF file passes");
    Ok(())
}

/// The commands that users are told to put into their CI are taken up to the suite, which is not there.
pub fn documented() -> Result<()> {
    let mut commands = 0;
    for name in ["README.md", "docs/ci/github.yml", "docs/ci/gitlab.yml"] {
        let path = cache::workspace().join(name);
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        for line in text.lines() {
            let Some((_, options)) = line.split_once("kleak-vmm regress leaks.toml") else { continue };
            let options = options.split(" # ").next().unwrap_or_default().split_whitespace();
            let finished = run(["regress", "leaks.toml"].into_iter().chain(options))?;
            finished.expect_code(2)?;
            ensure!(finished.stderr.contains("Cannot read suite leaks.toml"), "{name}: {}", finished.stderr);
            commands += 1;
        }
    }
    ensure!(commands == 4, "{commands} commands");
    Ok(())
}

/// Size of the browser's window.
const WINDOW: (u32, u32) = (1200, 2400);

/// Headless Chromium shows the page with its colours. The page asks no server for anything, and could not.
pub fn page() -> Result<()> {
    let folder = written(&["all.html"])?;
    shows(&photograph(&folder, "all.html")?)?;
    let page = std::fs::read_to_string(folder.path("all.html"))?;
    let server = TcpListener::bind("127.0.0.1:0")?;
    server.set_nonblocking(true)?;
    let image = format!("<img src=\"http://{}/x.png\"></body>", server.local_addr()?);
    let asking = page.replace("</body>", &image);
    let policy = asking.find("<meta http-equiv").context("no policy")?;
    let end = policy + asking[policy..].find('>').context("no policy")?;
    for (name, text, asks) in [
        ("refused.html", asking.clone(), false),
        ("asking.html", format!("{}{}", &asking[..policy], &asking[end + 1..]), true),
    ] {
        folder.file(name, text)?;
        // The browser waits for the picture, which does not come.
        let browser = browser(&folder, name).spawn().context("Cannot run chromium")?;
        let asked = wait_for_caller(&server);
        end_browser(browser);
        ensure!(asked == asks, "{name}: {asked}");
    }
    Ok(())
}

/// Whether somebody calls within a few seconds.
fn wait_for_caller(server: &TcpListener) -> bool {
    (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(100));
        server.accept().is_ok()
    })
}

fn end_browser(mut browser: Child) {
    let _ = Command::new("kill").arg(browser.id().to_string()).status();
    let _ = browser.wait();
}

fn browser(folder: &Scratch, page: &str) -> Command {
    let mut chromium = Command::new("chromium");
    chromium
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
        .arg(format!("--window-size={},{}", WINDOW.0, WINDOW.1))
        .arg(format!("--user-data-dir={}", folder.path("profile").display()))
        .arg(format!("--screenshot={}", folder.path("page.png").display()))
        .arg(format!("file://{}", folder.path(page).display()))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    chromium
}

fn photograph(folder: &Scratch, page: &str) -> Result<PathBuf> {
    let status = browser(folder, page).status().context("Cannot run chromium")?;
    let picture = folder.path("page.png");
    ensure!(status.success() && picture.is_file(), "chromium: {status}");
    Ok(picture)
}

/// The colours of each part of the page are in the picture, and most of it is white.
fn shows(picture: &Path) -> Result<()> {
    let decoder = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(picture)?));
    let mut reader = decoder.read_info().context("png")?;
    let mut pixels = vec![0; reader.output_buffer_size().context("size")?];
    let info = reader.next_frame(&mut pixels).context("png")?;
    ensure!((info.width, info.height) == WINDOW, "{} x {}", info.width, info.height);
    let step = info.color_type.samples();
    let count = |wanted: fn([u8; 3]) -> bool| {
        pixels.chunks_exact(step).filter(|pixel| wanted([pixel[0], pixel[1], pixel[2]])).count()
    };
    let parts = [
        ("white", count(|p| p == [255; 3]), 1_000_000),
        // Warm colours: red most, green between, blue least.
        ("boxes of the flame graph", count(|[r, g, b]| r >= 200 && b <= 60 && g < r), 20_000),
        ("lines of the plots", count(|p| p == [0x2a, 0x6f, 0xb0]), 1000),
        ("passed, in green", count(|p| p == [0x17, 0x6f, 0x2c]), 20),
        ("leaked, in red", count(|p| p == [0xb0, 0x00, 0x20]), 20),
    ];
    for (what, found, least) in parts {
        ensure!(found >= least, "{what}: {found} pixels, not {least}");
    }
    Ok(())
}
