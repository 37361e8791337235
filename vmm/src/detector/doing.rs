//! What the machine is doing: tasks, backtraces, registers.

use super::Detector;
use crate::console::Answer;
use anyhow::{Context, Result, bail};
use introspect::accounting::processes;
use introspect::accounting::tasks::{self, Doing};
use introspect::arch::CpuState;
use introspect::linux::ModuleMap;
use introspect::linux::tasks::Task;
use introspect::memory::Va;
use serde_json::{Map, Value, json};
use std::fmt::Write;
use std::sync::PoisonError;

impl Detector {
    pub(super) fn tasks_now(&self) -> Result<Answer> {
        let linux = &self.parts.linux;
        let paused = self.parts.guest.pause()?;
        let memory = &paused.memory();
        let tasks = linux.tasks(memory).context("Cannot read the guest's list of tasks")?;
        let table = tasks::table(linux, memory, &tasks, paused.cpus())
            .context("Cannot read which tasks the guest's CPUs run")?;
        Ok(Answer { text: table.text(), json: json!({ "ps": table.json() }) })
    }

    pub(super) fn procrank_now(&self) -> Result<Answer> {
        let linux = &self.parts.linux;
        let paused = self.parts.guest.pause()?;
        let memory = &paused.memory();
        let tasks = linux.tasks(memory).context("Cannot read the guest's list of tasks")?;
        let processes = linux.processes(memory, &tasks).context("Cannot read the guest's processes")?;
        let table = processes::table(&processes);
        Ok(Answer { text: table.text(), json: json!({ "procrank": table.json() }) })
    }

    pub(super) fn backtrace_of(&self, pid: Option<i32>) -> Result<Answer> {
        let linux = &self.parts.linux;
        let paused = self.parts.guest.pause()?;
        let memory = &paused.memory();
        let mut wanted = linux.tasks(memory).context("Cannot read the guest's list of tasks")?;
        match pid {
            Some(pid) => wanted.retain(|task| task.pid == pid),
            None => {
                let online = paused.cpus().iter().filter(|cpu| cpu.online);
                let running: Vec<Va> = online
                    .map(|cpu| linux.current(memory, cpu.index))
                    .collect::<Result<_, _>>()
                    .context("Cannot read which tasks the guest's CPUs run")?;
                wanted.retain(|task| running.contains(&task.va));
            }
        }
        if wanted.is_empty() {
            match pid {
                Some(pid) => bail!("The guest has no task with pid {pid}; ps lists them"),
                None => bail!("The guest runs no task yet"),
            }
        }
        let modules = self.parts.recorder.modules.read().unwrap_or_else(PoisonError::into_inner);
        let unwinder = self.parts.recorder.unwinder();
        let (mut text, mut json) = (String::new(), Vec::new());
        for task in &wanted {
            let doing = match tasks::backtrace(linux, memory, &unwinder, &*modules, task, paused.cpus()) {
                Ok(doing) => doing,
                // One damaged stack of several hides none of the others.
                Err(error) if wanted.len() > 1 => {
                    let _ = writeln!(text, "pid {} \"{}\": {error:#}", task.pid, task.name());
                    json.push(json!({ "pid": task.pid, "comm": task.name(), "error": format!("{error:#}") }));
                    continue;
                }
                Err(error) => return Err(error),
            };
            self.describe(task, &doing, &modules, &mut text);
            let frames: Vec<Value> =
                doing.frames.iter().map(|&ip| self.frame(ip, u64::MAX, &modules)).collect();
            json.push(json!({
                "pid": task.pid, "comm": task.name(), "state": task.state.to_string(), "cpu": doing.cpu,
                "complete": doing.end.is_whole(), "backtrace": frames,
            }));
        }
        Ok(Answer { text, json: json!({ "bt": json }) })
    }

    fn describe(&self, task: &Task, doing: &Doing, modules: &ModuleMap, text: &mut String) {
        let place = doing.cpu.map_or("not running".to_owned(), |cpu| format!("on CPU {cpu}"));
        let _ = writeln!(text, "pid {} \"{}\", state {}, {place}", task.pid, task.name(), task.state);
        for &frame in &doing.frames {
            let _ = writeln!(text, "  {}", self.symbolise(frame, u64::MAX, modules));
        }
        if doing.frames.is_empty() {
            text.push_str("  in user code\n");
        }
        if !doing.end.is_whole() {
            let _ = writeln!(text, "  the trace is not complete: {:?}", doing.end);
        }
    }

    /// A frame of a backtrace taken at event `at`, as reports have it.
    pub(super) fn frame(&self, ip: Va, at: u64, modules: &ModuleMap) -> Value {
        let resolved = self.parts.linux.resolve(modules, ip, at);
        let ip = format!("{:#x}", ip.0);
        match resolved {
            Some(r) => {
                json!({ "ip": ip, "symbol": r.name, "offset": r.offset, "size": r.size, "module": r.module })
            }
            None => json!({ "ip": ip, "symbol": null, "offset": 0, "size": 0, "module": null }),
        }
    }

    pub(super) fn registers_now(&self) -> Result<Answer> {
        let paused = self.parts.guest.pause()?;
        let (mut text, mut json) = (String::new(), Vec::new());
        for cpu in paused.cpus() {
            self.cpu_text(cpu, &mut text);
            let hex = |(name, value): (&str, u64)| (name.to_owned(), json!(format!("{value:#x}")));
            let mut members: Map<String, Value> = cpu.registers.named().into_iter().map(hex).collect();
            members.insert("cpu".into(), json!(cpu.index));
            members.insert("online".into(), json!(cpu.online));
            members.insert("user_mode".into(), json!(cpu.user_mode));
            members.extend(cpu.named().map(hex));
            json.push(Value::Object(members));
        }
        Ok(Answer { text, json: json!({ "regs": json }) })
    }

    fn cpu_text(&self, cpu: &CpuState, text: &mut String) {
        if !cpu.online {
            let _ = writeln!(text, "cpu {}: not started", cpu.index);
            return;
        }
        let mode = if cpu.user_mode { "user" } else { "kernel" };
        let ip = cpu.registers.ip();
        let symbol = if cpu.user_mode { None } else { self.name(ip) };
        let _ =
            writeln!(text, "cpu {}: {mode} mode, {}", cpu.index, symbol.unwrap_or_else(|| ip.to_string()));
        let all: Vec<(&str, u64)> = cpu.registers.named().into_iter().chain(cpu.named()).collect();
        for line in all.chunks(4) {
            let cells: Vec<String> =
                line.iter().map(|(name, value)| format!("{name:>7} {value:016x}")).collect();
            let _ = writeln!(text, "  {}", cells.join(" "));
        }
    }
}
