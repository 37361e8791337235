//! `kleak-vmm ctl`: one console command to a running virtual machine.
//!
//! Exit codes: 0 with the reply on standard output; 2 when the command is unknown, refused or failed, or when it is
//! not clear which machine is meant; 4 when no machine answers.

use super::{CtlOptions, ExitCode, Failure, print};
use crate::console::Reply;
use crate::console::client::Client;
use crate::console::command::{Command, Request, help};
use crate::console::socket::{live_sockets, runtime_dir};
use crate::files::resolved;
use anyhow::Context;
use std::path::{Path, PathBuf};

/// Sends the command and prints the reply.
///
/// # Errors
/// See the module; the codes travel as [`Failure`]s.
pub fn ctl(options: &CtlOptions) -> anyhow::Result<ExitCode> {
    let (control, words) = without_control(options)?;
    let mut line = words.join(" ");
    let hint = "kleak-vmm ctl help lists the commands";
    let Request { command, json } = Request::parse(&line);
    match command {
        Err(what) => return Err(Failure::usage(what).hint(hint).into()),
        // Needs no machine, so that one can read it before there is any.
        Ok(Command::Help(entry)) if !json => {
            print(&help(entry))?;
            return Ok(ExitCode::Success);
        }
        // The machine may have another working directory.
        Ok(Command::Save(how, path)) => {
            let absolute = resolved(&path);
            if absolute.as_os_str().as_encoded_bytes().iter().any(u8::is_ascii_whitespace) {
                let what = format!(
                    "Cannot save to {}: the console takes no name with white space",
                    absolute.display()
                );
                return Err(Failure::usage(what).hint("name a folder that has none").into());
            }
            line = format!("{}{}={}", if json { "json " } else { "" }, how.name(), absolute.display());
        }
        Ok(_) => {}
    }
    let path = socket(control)?;
    let failure = || unanswered(&path);
    let mut client = Client::connect(&path).with_context(failure)?;
    let reply = client.request(&line).with_context(failure)?;
    said(&reply)
}

/// The socket asked for, before or behind the words of the command, and these.
fn without_control(options: &CtlOptions) -> anyhow::Result<(Option<&Path>, Vec<&str>)> {
    let (mut control, mut words) = (options.control.as_deref(), Vec::new());
    let mut all = options.command.iter().map(String::as_str);
    while let Some(word) = all.next() {
        match (word, word.strip_prefix("--control=")) {
            ("--control", _) => {
                let what = || Failure::usage("--control takes a socket").hint("kleak-vmm ctl --help");
                control = Some(Path::new(all.next().ok_or_else(what)?));
            }
            (_, Some(path)) => control = Some(Path::new(path)),
            _ => words.push(word),
        }
    }
    Ok((control, words))
}

/// Prints a reply; one in text that is an error goes where errors go.
///
/// # Errors
/// See the module.
pub fn said(reply: &Reply) -> anyhow::Result<ExitCode> {
    if reply.failed && !reply.body.starts_with('{') {
        let what = reply.body.trim_end().trim_start_matches("error: ").to_owned();
        return Err(Failure::usage(what).into());
    }
    print(&reply.body)?;
    Ok(if reply.failed { ExitCode::Usage } else { ExitCode::Success })
}

/// The socket asked for, else that of the only virtual machine running.
///
/// # Errors
/// None was asked for, and there is not exactly one.
pub fn socket(asked: Option<&Path>) -> anyhow::Result<PathBuf> {
    asked.map_or_else(|| only_socket(&runtime_dir()), |path| Ok(path.to_owned()))
}

/// That nobody is at the other end of a socket.
pub fn unanswered(path: &Path) -> Failure {
    Failure::host(format!("No virtual machine answers on {}", path.display()))
        .hint("start one with kleak-vmm run, or check --control")
}

/// The only live socket in `dir`.
fn only_socket(dir: &Path) -> anyhow::Result<PathBuf> {
    let mut sockets = live_sockets(dir);
    match sockets.len() {
        1 => Ok(sockets.remove(0)),
        0 => {
            let what =
                format!("No virtual machine is running that has its control socket in {}", dir.display());
            Err(Failure::host(what)
                .hint("start one with kleak-vmm run, or name its socket with --control")
                .into())
        }
        n => {
            let names: Vec<String> = sockets.iter().map(|path| path.display().to_string()).collect();
            let what = format!("{n} virtual machines are running: {}", names.join(", "));
            Err(Failure::usage(what).hint("choose one with --control").into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::failure::{exit_code, render};
    use super::*;
    use crate::console::execute::Executor;
    use crate::console::fake::FakeTarget;
    use crate::console::socket::ControlServer;
    use std::sync::Arc;

    fn options(control: &Path, command: &str) -> CtlOptions {
        let command = command.split(' ').map(str::to_owned).collect();
        CtlOptions { control: Some(control.to_owned()), command }
    }

    #[test]
    fn the_only_machine_is_found_and_several_are_listed() {
        let dir = std::env::temp_dir().join(format!("kleak-ctl-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        assert_eq!(exit_code(&only_socket(&dir).unwrap_err()), ExitCode::Host);

        let (one, two) = (dir.join("1.sock"), dir.join("2.sock"));
        let target = Arc::new(FakeTarget::leaky());
        let mut first = ControlServer::bind(&one).unwrap();
        first.serve(Arc::new(Executor::new(target.clone()))).unwrap();
        assert_eq!(only_socket(&dir).unwrap(), one);

        let second = ControlServer::bind(&two).unwrap();
        let error = only_socket(&dir).unwrap_err();
        assert_eq!(exit_code(&error), ExitCode::Usage);
        assert!(render(&error).contains("1.sock") && render(&error).contains("2.sock"));
        drop(second);
        assert_eq!(only_socket(&dir).unwrap(), one);

        assert_eq!(ctl(&options(&one, "scan=on")).unwrap(), ExitCode::Success);
        assert_eq!(exit_code(&ctl(&options(&one, "scam")).unwrap_err()), ExitCode::Usage);
        let nowhere = dir.join("3.sock");
        for behind in
            [format!("scan=on --control {}", one.display()), format!("--control={} scan=on", one.display())]
        {
            assert_eq!(ctl(&options(&nowhere, &behind)).unwrap(), ExitCode::Success);
        }
        let error = ctl(&options(&one, "scan --control")).unwrap_err();
        assert!(render(&error).starts_with("kleak-vmm: error: --control takes a socket\nhint: "));
        target.broken.store(true, std::sync::atomic::Ordering::SeqCst);
        let error = ctl(&options(&one, "scan")).unwrap_err();
        assert_eq!(render(&error), "kleak-vmm: error: The guest is gone\n");
        assert_eq!(ctl(&options(&one, "json scan")).unwrap(), ExitCode::Usage);
        drop(first);
        assert_eq!(exit_code(&ctl(&options(&one, "scan")).unwrap_err()), ExitCode::Host);
        assert_eq!(ctl(&options(&one, "help scan")).unwrap(), ExitCode::Success, "without a machine");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
