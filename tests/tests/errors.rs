//! What a user sees when something is wrong: one line, a hint, the contract's exit code. Nothing boots here.

use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::process::{Command, ExitCode};
use tests::{Finished, Scratch, kernel, run, test};

fn main() -> ExitCode {
    tests::main(vec![
        test("a_text_file_is_no_kernel", || refused_kernel(b"#!/bin/sh\necho hello\n", "text")),
        test("an_empty_file_is_no_kernel", || refused_kernel(b"", "empty")),
        test("an_arm64_image_is_named_as_such", || refused_kernel(&arm64_image(), "arm64")),
        test("a_truncated_kernel_is_named_as_such", truncated),
        test("a_damaged_kernel_is_refused", damaged),
        test("a_missing_kernel_is_named", || {
            expect(&["run", "--kernel", "/nonexistent/bzImage"], 2, &["/nonexistent/bzImage"])
        }),
        test("a_missing_initrd_is_named", missing_initrd),
        test("a_missing_module_is_named", missing_module),
        test("more_memory_than_the_host_has", too_much_memory),
        test("an_unknown_command", || expect(&["frobnicate"], 2, &["frobnicate"])),
        test("an_unknown_option", || expect(&["run", "--frobnicate"], 2, &["--frobnicate"])),
        test("ctl_without_a_machine", no_machine),
        test("a_socket_in_use_is_refused", socket_in_use),
        test("an_address_in_use_is_no_place_for_gdb", address_in_use),
        test("without_permission_on_kvm", no_permission),
        test("inspect_refuses_what_run_refuses", inspect_text),
    ])
}

/// Every error is `kleak-vmm: error: ...` on one line and `hint: ...` on the next, and never a backtrace.
fn expect(arguments: &[&str], code: i32, words: &[&str]) -> Result<()> {
    check(&run(arguments)?, code, words)
}

fn check(finished: &Finished, code: i32, words: &[&str]) -> Result<()> {
    finished.expect_code(code)?;
    let lines: Vec<&str> = finished.stderr.lines().collect();
    let error = lines.iter().find(|l| l.starts_with("kleak-vmm: error: "));
    let error = error.with_context(|| format!("no error line in {lines:?}"))?;
    ensure!(lines.iter().any(|l| l.starts_with("hint: ")), "no hint in {lines:?}");
    ensure!(
        !finished.stderr.contains("backtrace") && !finished.stderr.contains("panicked"),
        "{}",
        finished.stderr
    );
    for word in words {
        ensure!(error.to_lowercase().contains(&word.to_lowercase()), "{error:?} does not say {word:?}");
    }
    Ok(())
}

fn run_kernel(kernel: &Path, more: &[&str]) -> Result<Finished> {
    let kernel = kernel.to_str().context("path")?;
    run(["run", "--kernel", kernel].iter().chain(more))
}

fn refused_kernel(content: &[u8], word: &str) -> Result<()> {
    let scratch = Scratch::new()?;
    let file = scratch.file("kernel", content)?;
    check(&run_kernel(&file, &[])?, 2, &[word])
}

/// The header of an arm64 Image (Documentation/arm64/booting.rst).
fn arm64_image() -> Vec<u8> {
    let mut image = vec![0; 4096];
    image[0x38..0x3c].copy_from_slice(b"ARM\x64");
    image
}

fn truncated() -> Result<()> {
    let bytes = std::fs::read(kernel("6.1-cloud")?.vmlinuz)?;
    let scratch = Scratch::new()?;
    let file = scratch.file("kernel", &bytes[..bytes.len() / 2])?;
    check(&run_kernel(&file, &[])?, 2, &["truncated"])
}

fn damaged() -> Result<()> {
    let mut bytes = std::fs::read(kernel("6.1-cloud")?.vmlinuz)?;
    let middle = bytes.len() / 2;
    bytes[middle..middle + 4096].fill(0xff);
    let scratch = Scratch::new()?;
    let file = scratch.file("kernel", bytes)?;
    check(&run_kernel(&file, &[])?, 2, &[])
}

fn missing_initrd() -> Result<()> {
    let finished = run_kernel(&kernel("6.1-cloud")?.vmlinuz, &["--initrd", "/nonexistent/initrd"])?;
    check(&finished, 2, &["/nonexistent/initrd"])
}

fn missing_module() -> Result<()> {
    let finished = run_kernel(&kernel("6.1-cloud")?.vmlinuz, &["--module", "/nonexistent/driver.ko"])?;
    check(&finished, 2, &["/nonexistent/driver.ko"])
}

fn too_much_memory() -> Result<()> {
    let finished = run_kernel(&kernel("6.1-cloud")?.vmlinuz, &["--mem", "4000G"])?;
    // Beyond what any guest may have or what this host has: either way one line.
    ensure!(matches!(finished.code, Some(2 | 4)), "{finished:?}");
    check(&finished, finished.code.unwrap_or(0), &["mem"])
}

fn no_machine() -> Result<()> {
    let scratch = Scratch::new()?;
    let socket = scratch.path("none.sock");
    let finished = run(["ctl", "--control", socket.to_str().context("path")?, "status"])?;
    check(&finished, finished.code.unwrap_or(0), &["none.sock"])?;
    ensure!(finished.code != Some(0), "{finished:?}");
    Ok(())
}

fn socket_in_use() -> Result<()> {
    let scratch = Scratch::new()?;
    let socket = scratch.path("busy.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&socket)?;
    let finished =
        run_kernel(&kernel("6.1-cloud")?.vmlinuz, &["--control", socket.to_str().context("path")?])?;
    ensure!(matches!(finished.code, Some(2 | 4)), "{finished:?}");
    check(&finished, finished.code.unwrap_or(0), &["busy.sock", "in use"])
}

fn address_in_use() -> Result<()> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    let kernel = kernel("6.1-cloud")?.vmlinuz;
    check(&run_kernel(&kernel, &["--gdb", &address])?, 2, &["debugger", &address, "in use"])?;
    let wrong = run_kernel(&kernel, &["--gdb", "1234"])?;
    wrong.expect_code(2)?;
    ensure!(wrong.stderr.contains("expected HOST:PORT"), "{}", wrong.stderr);
    Ok(())
}

/// As another user, without the lab: /dev/kvm is there and closed, or not there at all.
fn no_permission() -> Result<()> {
    let scratch = Scratch::new()?;
    let binary = scratch.path("kleak-vmm");
    std::fs::copy(tests::binary()?, &binary)?;
    let image = scratch.path("bzImage");
    std::fs::copy(kernel("6.1-cloud")?.vmlinuz, &image)?;
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "env", "-u", "XDG_RUNTIME_DIR"])
        .arg(&binary)
        .args(["run", "--lab", "never", "--kernel"])
        .arg(&image)
        .output()
        .context("Cannot run setpriv")?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let finished =
        Finished { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) };
    check(&finished, 4, &["/dev/kvm"])
}

fn inspect_text() -> Result<()> {
    let scratch = Scratch::new()?;
    let file = scratch.file("notes.txt", "not a kernel\n")?;
    expect(&["inspect", file.to_str().context("path")?], 2, &["text"])
}
