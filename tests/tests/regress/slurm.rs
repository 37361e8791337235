//! `docs/ci/slurm.sh` on a Slurm of one node, which the test starts and ends: real guests, one shard for each task of a job array.

use super::{Case, head, outcomes, planted};
use anyhow::{Context, Result, ensure};
use images::cache;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tests::{RUN_TIMEOUT, Scratch, binary, kernel, module};

/// How long a daemon may take to come up.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often something is looked at.
const STEP: Duration = Duration::from_millis(200);

/// Slurm's daemons and the one for credentials. They end with the value.
struct Cluster {
    folder: Scratch,
    daemons: Vec<(&'static str, Child)>,
}

impl Cluster {
    fn start() -> Result<Self> {
        let mut cluster = Self { folder: Scratch::new()?, daemons: Vec::new() };
        let path = |name: &str| cluster.folder.path(name).display().to_string();
        for name in ["state", "spool"] {
            std::fs::create_dir(path(name))?;
        }
        let mut key = [0; 128];
        std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut key)?;
        let key = cluster.folder.file("key", key)?;
        std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        let mut munged = Command::new("munged");
        // The folder is among the system's temporary files, which it finds too open otherwise.
        munged.args(["--foreground", "--force"]);
        for (option, name) in
            [("socket", "munge"), ("key-file", "key"), ("pid-file", "munged.pid"), ("seed-file", "seed")]
        {
            munged.arg(format!("--{option}={}", path(name)));
        }
        let host = Command::new("hostname").arg("-s").output().context("hostname")?;
        let host = String::from_utf8_lossy(&host.stdout).trim().to_owned();
        let [controller, node] = [free_port()?, free_port()?];
        let conf = format!(
            "ClusterName=kleak\nSlurmctldHost={host}(127.0.0.1)\nSlurmUser=root\nAuthType=auth/munge\nAuthInfo=socket={}\n\
             CredType=cred/munge\nSlurmctldPort={controller}\nSlurmdPort={node}\nStateSaveLocation={}\nSlurmdSpoolDir={}\n\
             SlurmctldPidFile={}\nSlurmdPidFile={}\nProctrackType=proctrack/pgid\nTaskPlugin=task/none\nReturnToService=2\n\
             JobAcctGatherType=jobacct_gather/none\nSelectType=select/linear\nMpiDefault=none\nNodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=6000\n\
             PartitionName=all Nodes={host} Default=YES State=UP\n",
            path("munge"),
            path("state"),
            path("spool"),
            path("slurmctld.pid"),
            path("slurmd.pid")
        );
        cluster.folder.file("slurm.conf", conf)?;
        cluster.daemon("munged", munged)?;
        let socket = cluster.folder.path("munge");
        cluster.until("munged's socket", || socket.exists())?;
        for (name, option) in [("slurmctld", "-Dc"), ("slurmd", "-D")] {
            let mut daemon = cluster.command(name);
            daemon.arg(option);
            cluster.daemon(name, daemon)?;
        }
        cluster.until("an idle node", || {
            let said = cluster.command("sinfo").args(["--noheader", "--format=%T"]).output();
            said.is_ok_and(|output| output.stdout.starts_with(b"idle"))
        })?;
        Ok(cluster)
    }

    fn daemon(&mut self, name: &'static str, mut command: Command) -> Result<()> {
        let log = std::fs::File::create(self.folder.path(&format!("{name}.log")))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.daemons.push((name, command.spawn().with_context(|| format!("Cannot start {name}"))?));
        Ok(())
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(name);
        command.env("SLURM_CONF", self.folder.path("slurm.conf"));
        command
    }

    fn until(&self, what: &str, there: impl Fn() -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !there() {
            ensure!(Instant::now() < deadline, "no {what}: {}", self.logs());
            std::thread::sleep(STEP);
        }
        Ok(())
    }

    fn logs(&self) -> String {
        let log = |(name, _): &(&str, Child)| {
            let text = std::fs::read_to_string(self.folder.path(&format!("{name}.log"))).unwrap_or_default();
            format!("--- {name}\n{}\n", tests::tail(&text, 20))
        };
        self.daemons.iter().map(log).collect()
    }

    /// Submits a job and waits for its end, all tasks of an array included; its id.
    fn submit(&self, command: &mut Command) -> Result<String> {
        let output = command.output().context("Cannot run sbatch")?;
        let id = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        ensure!(
            output.status.success() && !id.is_empty(),
            "sbatch: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let deadline = Instant::now() + RUN_TIMEOUT * 2;
        loop {
            let said = self.command("squeue").args(["--noheader", "--job", &id]).output()?;
            if said.stdout.is_empty() {
                return Ok(id);
            }
            ensure!(Instant::now() < deadline, "job {id} does not end: {}", self.logs());
            std::thread::sleep(STEP * 5);
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for (_, daemon) in self.daemons.iter_mut().rev() {
            let _ = Command::new("kill").arg(daemon.id().to_string()).status();
            let deadline = Instant::now() + Duration::from_secs(10);
            while matches!(daemon.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(STEP);
            }
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

/// A port of this host that nobody listens on.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

pub fn job_array() -> Result<()> {
    let kernel = kernel("6.1-cloud")?;
    let leaky = module(&kernel, "leaky")?;
    // By their names the boot and the list are the first shard's, the other test is the second's.
    let mut suite =
        head(&kernel.vmlinuz, 1) + &planted(&leaky, "list", "leaks = 5\nfunctions = [\"leaky_list\"]");
    suite += "[[test]]\nname = \"status\"\nrun = \"exit 3\"\nstatus = 3\n";
    let case = Case::new(&suite)?;
    let results = case.0.path("results");
    let cluster = Cluster::start()?;
    let bin = tools(&case.0)?;
    let sbatch = |option: &str| {
        let mut sbatch = cluster.command("sbatch");
        sbatch.args(["--parsable", "--export=ALL", option]).env("PATH", &bin).current_dir(case.0.path(""));
        sbatch
    };
    let mut array = sbatch("--array=1-2");
    array.arg(cache::workspace().join("docs/ci/slurm.sh")).arg(case.0.path("suite.toml")).arg(&results);
    let id = cluster.submit(&mut array)?;
    for name in ["1", "2"] {
        let log = std::fs::read_to_string(results.join(format!("{name}.log"))).unwrap_or_default();
        ensure!(results.join(format!("{name}.json")).is_file(), "shard {name}: {log}\n{}", cluster.logs());
        ensure!(results.join(format!("{name}.guests")).is_dir(), "no logs of shard {name}");
    }
    let merge = "kleak-vmm regress merge results/*.json --report all.json";
    cluster.submit(sbatch(&format!("--dependency=afterany:{id}")).args(["--wrap", merge]))?;
    let all: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(case.0.path("all.json"))?)?;
    let mut found = outcomes(&all)?;
    found.sort_unstable();
    ensure!(found == [("boot", "passed", 0), ("list", "passed", 5), ("status", "passed", 0)], "{all:#}");
    ensure!(all["boots"].as_array().map(Vec::len) == Some(2), "{:#}", all["boots"]);
    Ok(())
}

/// A PATH that has the binary under test as `kleak-vmm`.
fn tools(folder: &Scratch) -> Result<std::ffi::OsString> {
    let bin = folder.path("bin");
    std::fs::create_dir(&bin)?;
    std::os::unix::fs::symlink(std::path::absolute(binary()?)?, bin.join("kleak-vmm"))?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = std::iter::once(bin).chain(std::env::split_paths(&path)).collect();
    std::env::join_paths(folders.iter().map(Path::new)).context("PATH")
}
