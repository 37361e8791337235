//! The control socket against real Unix streams.

use super::client::Client;
use super::execute::Executor;
use super::fake::{FakeTarget, REPORT};
use super::socket::*;
use crate::cli::failure::{ExitCode, exit_code, render};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

/// A directory that goes away with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("kleak-socket-{}-{}", std::process::id(), NEXT.fetch_add(1, SeqCst));
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("vm.sock")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn serve(scratch: &Scratch) -> (ControlServer, Arc<FakeTarget>) {
    let target = Arc::new(FakeTarget::leaky());
    let mut server = ControlServer::bind(&scratch.socket()).unwrap();
    server.serve(Arc::new(Executor::new(target.clone()))).unwrap();
    (server, target)
}

#[test]
fn replies_are_framed_for_scripts() {
    let scratch = Scratch::new();
    let (_server, _) = serve(&scratch);
    let mut stream = UnixStream::connect(scratch.socket()).unwrap();
    stream.write_all(b"scan\njson scan\r\nnonsense\n").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut all = String::new();
    stream.read_to_string(&mut all).unwrap();
    assert_eq!(
        all,
        "kmemleak: 3 new suspected memory leaks\n\x04\n{\"new_leaks\":3}\nerror: unknown command \"nonsense\": try help\n\x04\n"
    );
}

#[test]
fn the_client_reads_what_the_server_frames() {
    let scratch = Scratch::new();
    let (_server, target) = serve(&scratch);
    let mut client = Client::connect(&scratch.socket()).unwrap();
    assert_eq!(client.request("report").unwrap().body, REPORT);
    assert_eq!(client.request("json status").unwrap().body, "{\"objects\":12,\"tracer\":\"breakpoint\"}\n");
    assert!(client.request("json nonsense").unwrap().failed);
    assert!(client.request("two\nlines").unwrap().failed);
    target.report.lock().unwrap().clear();
    assert_eq!(client.request("report").unwrap().body, "");
    assert!(client.request("quit").unwrap().quit);
}

#[test]
fn several_clients_at_once_and_one_that_stalls_and_one_that_vanishes() {
    let scratch = Scratch::new();
    let (_server, _) = serve(&scratch);
    let mut stalled = UnixStream::connect(scratch.socket()).unwrap();
    stalled.write_all(b"sca").unwrap();
    let mut vanishing = UnixStream::connect(scratch.socket()).unwrap();
    vanishing.write_all(b"report\nreport\nreport\n").unwrap();
    drop(vanishing);
    let mut clients: Vec<_> = (0..8).map(|_| Client::connect(&scratch.socket()).unwrap()).collect();
    for client in clients.iter_mut().rev() {
        assert!(!client.request("scan").unwrap().failed);
    }
    stalled.write_all(b"n\n").unwrap();
    let mut reply = [0; 8];
    stalled.read_exact(&mut reply).unwrap();
    assert_eq!(&reply, b"kmemleak");
}

#[test]
fn ten_thousand_commands_in_a_row() {
    const COMMANDS: usize = 10_000;
    let scratch = Scratch::new();
    let (_server, _) = serve(&scratch);
    let mut stream = UnixStream::connect(scratch.socket()).unwrap();
    let mut source = stream.try_clone().unwrap();
    // Nobody waits for a reply before the next command.
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        source.read_to_end(&mut all).map(|_| all.iter().filter(|byte| **byte == 4).count())
    });
    for _ in 0..COMMANDS {
        stream.write_all(b"scan\n").unwrap();
    }
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(reader.join().unwrap().unwrap(), COMMANDS);
}

#[test]
fn an_endless_line_ends_the_connection() {
    let scratch = Scratch::new();
    let (_server, target) = serve(&scratch);
    let mut stream = UnixStream::connect(scratch.socket()).unwrap();
    // The server hangs up in the middle of it.
    let _ = stream.write_all(&[b'x'; MAX_LINE]);
    let mut all = String::new();
    let _ = stream.read_to_string(&mut all);
    assert!(all.starts_with("error: line longer than"), "{all:?}");
    assert_eq!(target.log(), "");
}

#[test]
fn quit_is_carried_out_after_the_reply() {
    let scratch = Scratch::new();
    let (_server, target) = serve(&scratch);
    let mut stream = UnixStream::connect(scratch.socket()).unwrap();
    stream.write_all(b"quit\n").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut all = String::new();
    stream.read_to_string(&mut all).unwrap();
    assert_eq!(all, "powering off\n\x04\n");
    assert_eq!(target.log(), "quit");
}

#[test]
fn the_socket_is_private_and_goes_with_the_server() {
    let scratch = Scratch::new();
    let (server, _) = serve(&scratch);
    assert_eq!(std::fs::metadata(server.path()).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_dir(&scratch.0).unwrap().count(), 1);
    drop(server);
    assert!(!scratch.socket().exists());
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_refused() {
    let scratch = Scratch::new();
    // A process that was killed leaves the file without a listener.
    drop(UnixListener::bind(scratch.socket()).unwrap());
    assert!(scratch.socket().exists());
    let (_server, _) = serve(&scratch);
    let error = ControlServer::bind(&scratch.socket()).unwrap_err();
    assert_eq!(exit_code(&error), ExitCode::Usage);
    assert!(render(&error).contains("The socket is in use\nhint: another kleak-vmm"));
    assert!(UnixStream::connect(scratch.socket()).is_ok(), "the live one must survive");
}

#[test]
fn what_is_in_the_way_is_said() {
    let scratch = Scratch::new();
    std::fs::write(scratch.socket(), "precious").unwrap();
    let error = ControlServer::bind(&scratch.socket()).unwrap_err();
    assert!(render(&error).contains("no socket is in the way"));
    assert_eq!(std::fs::read(scratch.socket()).unwrap(), b"precious");
    let error = ControlServer::bind(&scratch.0.join("no/such/dir.sock")).unwrap_err();
    assert_eq!((exit_code(&error), render(&error).lines().count()), (ExitCode::Usage, 2));
    let error = ControlServer::bind(&scratch.0.join("x".repeat(200))).unwrap_err();
    assert_eq!(exit_code(&error), ExitCode::Usage);
}

#[test]
fn a_directory_open_to_others_is_refused() {
    let scratch = Scratch::new();
    let dir = scratch.0.join("run");
    super::socket::private_dir(&dir).unwrap();
    assert_eq!(std::fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
    super::socket::private_dir(&dir).unwrap();
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(exit_code(&super::socket::private_dir(&dir).unwrap_err()), ExitCode::Host);
    let link = scratch.0.join("link");
    std::os::unix::fs::symlink(&scratch.0, &link).unwrap();
    assert!(super::socket::private_dir(&link).is_err());
}
