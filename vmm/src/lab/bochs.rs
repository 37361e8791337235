//! Bochs as the lab's machine: emulated instruction by instruction, with Intel's VMX. Kernel and initramfs come on a CD, with
//! isolinux to load them.
//!
//! The line is the second serial port, joined with a TCP connection on the loopback device. Bochs can also join a port with
//! a terminal, but reads that whether or not the port has room, and loses what has none; from a connection it takes a byte
//! only when the last one has been fetched (`bx_serial_c::rx_timer` in its `iodev/serial.cc`).

use std::fs::{self, File};
use std::io::{self, Seek, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use images::lab::Lab;

use super::emulator::{Emulator, Machine, Program, find};
use super::job_process::Terminal;
use super::kernel_arguments;
use super::payload::anonymous_file;
use crate::cli::Failure;
use crate::scratch::Scratch;

/// The program itself, as Debian's `bochs` is a script around it, and what else is needed.
pub const PROGRAM: Program = Program {
    name: "Bochs",
    file: "bochs-bin",
    packages: "bochs bochs-term bochsbios vgabios isolinux syslinux-common xorriso",
};
/// Makes the CD.
const XORRISO: &str = "xorriso";
/// What is on the CD beside kernel and initramfs: a name, and where it comes from.
const LOADER: [(&str, &str); 2] = [
    ("isolinux.bin", "/usr/lib/ISOLINUX/isolinux.bin"),
    ("ldlinux.c32", "/usr/lib/syslinux/modules/bios/ldlinux.c32"),
];
/// The firmware.
const BIOS: [(&str, &str); 2] = [
    ("romimage", "/usr/share/bochs/BIOS-bochs-latest"),
    ("vgaromimage", "/usr/share/bochs/VGABIOS-lgpl-latest"),
];
/// Instructions that the machine takes for a second. Time passes by that count, never faster than real time, and on a host
/// that does fewer slower.
const INSTRUCTIONS_PER_S: u64 = 100_000_000;
/// It connects before it runs anything.
const PATIENCE: Duration = Duration::from_secs(30);
/// A CPU with VMX, EPT and unrestricted guests.
const CPU: &str = "corei7_skylake_x";

/// Whether all that it needs is installed.
pub fn is_installed() -> bool {
    let files = LOADER.iter().chain(&BIOS).all(|(_, path)| Path::new(path).exists());
    files && [PROGRAM.file, XORRISO].into_iter().all(|program| find(program).is_some())
}

/// Starts the machine; also the host's end of its serial port.
///
/// It has one CPU, which the job's vCPUs share: Bochs emulates several in turns.
pub fn start(program: &Path, machine: &Machine<'_>) -> Result<(Emulator, File)> {
    if !is_installed() {
        return Err(Failure::host("The lab vmx lacks what Bochs needs")
            .hint(format!("apt-get install {}", PROGRAM.packages))
            .into());
    }
    if !machine.disks.is_empty() {
        return Err(Failure::usage("The lab vmx has no disks").hint("--disk works with --lab svm").into());
    }
    let disc = disc(machine).context("making the lab's CD")?;
    // Bochs has a debugger built in, which waits to be told to go on.
    let mut commands = anonymous_file(c"kleak-lab-commands")?;
    commands.write_all(b"c\n").context("writing the debugger's commands")?;
    commands.rewind().context("writing the debugger's commands")?;
    let line = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("making the lab's line")?;
    let port = line.local_addr().context("making the lab's line")?.port();
    let screen = Terminal::open().context("making the lab's screen")?;
    let inherited = vec![disc.as_raw_fd(), commands.as_raw_fd()];
    let mut command = Command::new(program);
    command
        // Without a configuration file it would ask what to do.
        .args(["-q", "-f", "/dev/null", "-rc", &descriptor(commands.as_raw_fd())])
        .args(configuration(machine.mem_bytes, disc.as_raw_fd(), port))
        .env("TERM", "vt100")
        .stdin(Stdio::from(screen.user.try_clone().context("cloning the screen")?))
        .stdout(Stdio::from(screen.user));
    let mut bochs = Emulator::spawn(PROGRAM.name, command, inherited)?;
    // Nobody looks at the screen, but a full one would stop the machine.
    let mut shown = screen.controller;
    std::thread::Builder::new()
        .name("lab-screen".to_owned())
        .spawn(move || io::copy(&mut shown, &mut io::sink()))?;
    let line = connection(&line, &mut bochs).context("joining the lab's line")?;
    Ok((bochs, line))
}

/// The connection that the emulator makes; anybody else's is closed.
fn connection(listener: &TcpListener, bochs: &mut Emulator) -> Result<File> {
    listener.set_nonblocking(true)?;
    let here = listener.local_addr()?.port();
    let start = Instant::now();
    loop {
        match listener.accept() {
            Ok((stream, peer)) if has_connection(bochs.pid(), peer.port(), here)? => {
                stream.set_nonblocking(false)?;
                stream.set_nodelay(true)?;
                return Ok(File::from(OwnedFd::from(stream)));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if let Some(status) = bochs.ended() {
                    bail!("Bochs ended, {status}: {}", bochs.tail(1).join(" "));
                }
                ensure!(start.elapsed() < PATIENCE, "Bochs does not connect");
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether process `pid` has a TCP connection from local port `from` to port `to` (proc_pid_net(5), proc_pid_fd(5)).
fn has_connection(pid: u32, from: u16, to: u16) -> Result<bool> {
    let place = format!("/proc/{pid}/net/tcp");
    let table = fs::read_to_string(&place).with_context(|| format!("reading {place}"))?;
    let Some(inode) = inode_of(&table, from, to) else { return Ok(false) };
    let socket = format!("socket:[{inode}]");
    let place = format!("/proc/{pid}/fd");
    let mut descriptors = fs::read_dir(&place).with_context(|| format!("reading {place}"))?.flatten();
    Ok(descriptors.any(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == Path::new(&socket))))
}

/// The socket's inode in a table of connections.
fn inode_of(table: &str, from: u16, to: u16) -> Option<&str> {
    let (from, to) = (format!(":{from:04X}"), format!(":{to:04X}"));
    let row = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    row.into_iter()
        .find(|row| {
            matches!(row[..], [_, local, remote, ..] if local.ends_with(&from) && remote.ends_with(&to))
        })
        .and_then(|row| row.get(9).copied())
}

/// An inherited descriptor as a path.
fn descriptor(fd: RawFd) -> String {
    format!("/proc/self/fd/{fd}")
}

/// Bochs' configuration (bochsrc(5)), an argument each. The first serial port is the console.
fn configuration(mem_bytes: u64, disc: RawFd, port: u16) -> Vec<String> {
    let mib = mem_bytes.div_ceil(1 << 20);
    let mut lines = vec![
        format!("cpu: model={CPU}, count=1, ips={INSTRUCTIONS_PER_S}, reset_on_triple_fault=0"),
        format!("memory: guest={mib}, host={mib}"),
        "ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14".to_owned(),
        format!("ata0-master: type=cdrom, path={}, status=inserted", descriptor(disc)),
        "boot: cdrom".to_owned(),
        "com1: enabled=1, mode=file, dev=/proc/self/fd/2".to_owned(),
        format!("com2: enabled=1, mode=socket-client, dev=127.0.0.1:{port}"),
        "clock: sync=slowdown".to_owned(),
        "display_library: term".to_owned(),
        "log: /proc/self/fd/2".to_owned(),
        "speaker: enabled=0".to_owned(),
        "panic: action=fatal".to_owned(),
    ];
    lines.extend(["error", "info", "debug"].map(|kind| format!("{kind}: action=ignore")));
    lines.extend(BIOS.map(|(what, path)| format!("{what}: file={path}")));
    lines
}

/// The CD (ISO 9660, El Torito) in memory.
fn disc(machine: &Machine<'_>) -> Result<File> {
    let scratch = Scratch::new()?;
    let initrd = scratch.path().join("initrd");
    let mut source = machine.initrd.try_clone()?;
    source.rewind()?;
    io::copy(&mut source, &mut File::create(&initrd)?).context("writing the initramfs")?;
    let loading = scratch.path().join("isolinux.cfg");
    let arguments = kernel_arguments(Lab::Vmx, Some(INSTRUCTIONS_PER_S / 1000));
    fs::write(
        &loading,
        format!("default lab\nlabel lab\nlinux /vmlinuz\ninitrd /initrd\nappend {arguments}\n"),
    )?;
    let disc = anonymous_file(c"kleak-lab-disc")?;
    let mut command = Command::new(XORRISO);
    command
        .args(["-as", "mkisofs", "-quiet", "-graft-points", "-b", LOADER[0].0, "-c", "boot.cat"])
        .args(["-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", "-o", "-"])
        .args(LOADER.map(|(name, path)| format!("/{name}={path}")));
    for (name, path) in [("vmlinuz", &machine.files.kernel), ("initrd", &initrd), ("isolinux.cfg", &loading)]
    {
        let path = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
        // Within a graft point these are special.
        ensure!(!path.contains(['=', '\\']), "{path} has a character that {XORRISO} takes for its own");
        command.arg(format!("/{name}={path}"));
    }
    let output = command.stdout(disc.try_clone()?).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("running {XORRISO}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{XORRISO} failed: {}", said.trim());
    Ok(disc)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;

    #[test]
    fn connections_are_told_apart() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let there = listener.local_addr().unwrap();
        let client = TcpStream::connect(there).unwrap();
        let (_server, peer) = listener.accept().unwrap();
        assert_eq!(peer, client.local_addr().unwrap());
        assert!(has_connection(std::process::id(), peer.port(), there.port()).unwrap());
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        assert!(!has_connection(child.id(), peer.port(), there.port()).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!has_connection(std::process::id(), there.port(), there.port()).unwrap());
        assert_eq!(
            inode_of("  sl  local_address rem_address\n 0: 0100007F:1F90 0100007F:0050 01\n", 8080, 80),
            None
        );
    }
}
