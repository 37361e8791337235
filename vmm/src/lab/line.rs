//! The lab's end of the line to the host.

use std::fs::{self, File};
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use images::lab::Lab;

/// The port's device node appears a moment after the kernel is up.
const PATIENCE: Duration = Duration::from_secs(10);
/// The serial port in `vmx`.
const SERIAL: &str = "/dev/ttyS1";
/// How many received bytes the serial port lets come together before it interrupts. Until that many are there Bochs takes more
/// from the host; with one, it waits for each to be fetched.
const SERIAL_TRIGGER: (&str, &str) = ("/sys/class/tty/ttyS1/rx_trig_bytes", "1");

/// Opens the line.
pub fn open(lab: Lab) -> Result<File> {
    match lab {
        Lab::Svm | Lab::Arm => open_virtio(),
        Lab::Vmx => open_serial(),
    }
}

fn open_virtio() -> Result<File> {
    let start = Instant::now();
    loop {
        let ports = fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten();
        for port in ports {
            // The name comes in a message of its own after the port.
            let named = fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim() == "kleak");
            let device = Path::new("/dev").join(port.file_name());
            if named && let Ok(file) = File::options().read(true).write(true).open(&device) {
                return Ok(file);
            }
        }
        ensure!(start.elapsed() < PATIENCE, "there is no serial port to the host");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn open_serial() -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_NOCTTY);
    let port = options.open(SERIAL).with_context(|| format!("opening {SERIAL}"))?;
    let (place, trigger) = SERIAL_TRIGGER;
    fs::write(place, trigger).with_context(|| format!("writing {place}"))?;
    let mut modes = MaybeUninit::<libc::termios>::uninit();
    // SAFETY: tcgetattr fills the structure when it returns 0, and only then it is used.
    let set = unsafe {
        libc::tcgetattr(port.as_raw_fd(), modes.as_mut_ptr()) == 0 && {
            let mut modes = modes.assume_init();
            libc::cfmakeraw(&raw mut modes);
            modes.c_cflag = modes.c_cflag & !libc::CBAUD | libc::B115200 | libc::CLOCAL | libc::CREAD;
            libc::tcsetattr(port.as_raw_fd(), libc::TCSANOW, &raw const modes) == 0
        }
    };
    ensure!(set, "setting {SERIAL} up: {}", io::Error::last_os_error());
    Ok(port)
}

/// Reads the line; before a virtio port's driver has learnt that the host is connected it reads as ended, which it is not.
pub struct LineReader(pub File);

impl Read for LineReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let start = Instant::now();
        loop {
            match self.0.read(buffer)? {
                0 if start.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(2)),
                count => return Ok(count),
            }
        }
    }
}
