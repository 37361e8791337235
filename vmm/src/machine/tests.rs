//! The state machine of the vCPU threads, with threads that are no vCPUs.

use super::control::*;
use super::{Order, Stop, Why};
use introspect::arch::CpuState;
use introspect::memory::{PAGE_SIZE, Pa, RamRange, Va};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(20);

/// A thread that counts while it "runs" and looks at its flag as KVM_RUN would.
struct Worker {
    thread: JoinHandle<()>,
    count: Arc<AtomicU64>,
}

fn worker(control: &Arc<Control>, cpu: usize, deaf: bool) -> Worker {
    let count = Arc::new(AtomicU64::new(0));
    let (control, counter) = (control.clone(), count.clone());
    control.starting(cpu);
    let thread = std::thread::spawn(move || {
        let flag = AtomicU8::new(0);
        // SAFETY: the flag lives until `ended`.
        control.started(cpu, unsafe { Kicker::new(NonNull::from(&flag)) });
        let snapshot = || Snapshot {
            state: Ok(CpuState { index: counter.load(SeqCst) as usize, ..Default::default() }),
            debug: None,
            exits: Vec::new(),
        };
        while deaf && control.outcome().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        while control.checkpoint(cpu, snapshot) != Verdict::End {
            while flag.swap(0, SeqCst) == 0 {
                counter.fetch_add(1, SeqCst);
                std::thread::yield_now();
            }
        }
        control.ended(cpu, snapshot());
    });
    Worker { thread, count }
}

fn setup(cpus: usize) -> (Arc<Control>, Vec<Worker>) {
    super::install_kick_handler().unwrap();
    let control = Arc::new(Control::new(cpus));
    let workers = (0..cpus).map(|cpu| worker(&control, cpu, false)).collect();
    (control, workers)
}

fn finish(control: &Control, workers: Vec<Worker>) {
    control.finish(Outcome::HostStop);
    assert_eq!(control.wait(PATIENCE), Some(Outcome::HostStop));
    workers.into_iter().for_each(|w| w.thread.join().unwrap());
}

#[test]
fn nothing_runs_during_a_pause_and_all_run_after_it() {
    let (control, workers) = setup(3);
    for _ in 0..200 {
        let snapshots = control.pause(PATIENCE).unwrap();
        let counts: Vec<u64> = workers.iter().map(|w| w.count.load(SeqCst)).collect();
        std::thread::yield_now();
        for ((worker, count), snapshot) in workers.iter().zip(&counts).zip(&snapshots) {
            assert_eq!(worker.count.load(SeqCst), *count);
            assert_eq!(snapshot.state.as_ref().unwrap().index as u64, *count);
        }
        control.resume();
    }
    let before: Vec<u64> = workers.iter().map(|w| w.count.load(SeqCst)).collect();
    while workers.iter().zip(&before).any(|(w, b)| w.count.load(SeqCst) == *b) {
        std::thread::yield_now();
    }
    finish(&control, workers);
}

#[test]
fn a_cpu_that_does_not_stop_is_named_and_the_others_go_on() {
    super::install_kick_handler().unwrap();
    let control = Arc::new(Control::new(2));
    let workers = vec![worker(&control, 0, false), worker(&control, 1, true)];
    let error = control.pause(Duration::from_millis(50)).unwrap_err();
    assert!(error.starts_with("vCPU 1 did not stop"), "{error}");
    let before = workers[0].count.load(SeqCst);
    while workers[0].count.load(SeqCst) == before {
        std::thread::yield_now();
    }
    finish(&control, workers);
}

#[test]
fn a_machine_that_ended_is_paused() {
    let (control, workers) = setup(2);
    finish(&control, workers);
    assert_eq!(control.pause(Duration::ZERO).unwrap().len(), 2);
    control.resume();
    assert_eq!(control.outcome(), Some(Outcome::HostStop));
}

#[test]
fn a_machine_not_started_is_paused() {
    let control = Control::new(4);
    assert_eq!(
        control.pause(Duration::ZERO).unwrap()[3].state,
        Ok(CpuState { index: 3, ..Default::default() })
    );
}

#[test]
fn a_stop_ends_parked_cpus_too() {
    let (control, workers) = setup(2);
    control.pause(PATIENCE).unwrap();
    finish(&control, workers);
}

#[test]
fn the_first_outcome_stays() {
    let control = Control::new(0);
    control.finish(Outcome::PowerOff);
    control.finish(Outcome::HostStop);
    assert_eq!(control.outcome(), Some(Outcome::PowerOff));
}

#[test]
fn a_held_pause_outlasts_others_until_it_is_released() {
    let (control, workers) = setup(2);
    let counts = || workers.iter().map(|w| w.count.load(SeqCst)).collect::<Vec<_>>();
    control.pause(PATIENCE).unwrap();
    assert!(!control.hold(true));
    control.resume();
    control.pause(PATIENCE).unwrap();
    control.resume();
    let before = counts();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(counts(), before);
    assert!(control.held() && control.hold(false) && !control.held());
    control.resume();
    let deadline = std::time::Instant::now() + PATIENCE;
    while counts().iter().zip(&before).any(|(now, then)| now <= then) {
        assert!(std::time::Instant::now() < deadline, "a worker does not run again");
        std::thread::sleep(Duration::from_millis(1));
    }
    finish(&control, workers);
}

#[test]
fn a_debugger_stops_all_and_lets_those_go_on_that_it_wants() {
    let (control, workers) = setup(3);
    let ram = super::GuestRam::new(vec![RamRange { start: Pa(0), len: PAGE_SIZE }]).unwrap();
    let guest = super::Guest::new(ram, control.clone(), Arc::default(), OnceLock::new(), None);
    let counts = || workers.iter().map(|w| w.count.load(SeqCst)).collect::<Vec<_>>();
    let moved = |wanted: [bool; 3]| {
        let before = counts();
        std::thread::sleep(Duration::from_millis(30));
        let now = counts();
        (0..3).all(|cpu| (now[cpu] > before[cpu]) == wanted[cpu])
    };
    let until = |wanted: [bool; 3]| {
        let deadline = std::time::Instant::now() + PATIENCE;
        while !moved(wanted) {
            assert!(std::time::Instant::now() < deadline, "{wanted:?} do not go on alone");
        }
    };
    guest.debugger_stops().unwrap();
    assert!(guest.held() && moved([false; 3]));
    // Pauses and holds of others neither wait for the debugger nor end its stop.
    drop(guest.pause().unwrap());
    assert!(guest.hold().unwrap() && guest.release() && moved([false; 3]));
    let (site, orders) = (Va(0x1000), vec![Order::Stay, Order::Run, Order::Step]);
    guest.debugger_goes_on(orders.clone(), [site].into(), Vec::new());
    until([false, true, true]);
    drop(guest.pause().unwrap());
    until([false, true, true]);
    assert!(guest.debugger_waits(Duration::ZERO).is_none() && control.breaks_at(site));
    let steps: Vec<bool> = (0..3).map(|cpu| control.take_orders(cpu).unwrap().step).collect();
    assert_eq!(steps, [false, false, true]);
    assert!(control.take_orders(2).is_none(), "orders are carried out once");
    // The first reason counts; the other vCPU will meet its own again.
    control.stop_for_debugger(1, Why::Breakpoint);
    control.stop_for_debugger(2, Why::Step);
    assert_eq!(guest.debugger_waits(PATIENCE), Some(Stop::Cpu(1, Why::Breakpoint)));
    drop(guest.pause().unwrap());
    assert!(moved([false; 3]));
    // Held by somebody else, it stays so when the debugger leaves.
    assert!(guest.hold().unwrap());
    guest.debugger_goes_on(Vec::new(), Default::default(), Vec::new());
    assert!(moved([false; 3]) && !control.breaks_at(site));
    assert!(guest.release());
    until([true; 3]);
    finish(&control, workers);
    assert_eq!(guest.debugger_waits(PATIENCE), Some(Stop::Ended));
}
