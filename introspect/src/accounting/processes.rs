//! `procrank`: the memory of processes.

use super::{Column, Role, Table};
use crate::linux::processes::Process;

/// One row per process, in KiB as Android's procrank has it, largest proportional share first.
pub fn table(processes: &[Process]) -> Table {
    let columns = vec![
        Column::new("pid", Role::Key),
        Column::new("vss_kib", Role::Amount),
        Column::new("rss_kib", Role::Amount),
        Column::new("pss_kib", Role::Amount),
        Column::new("uss_kib", Role::Amount),
        Column::new("comm", Role::Fact),
    ];
    let mut table = Table::new(columns, 3);
    for process in processes {
        let [vss, rss, pss, uss] = [process.vss, process.rss, process.pss, process.uss].map(|b| b >> 10);
        let pid = u64::from(process.task.pid.unsigned_abs());
        let name = process.task.name();
        table.rows.push(vec![
            pid.into(),
            vss.into(),
            rss.into(),
            pss.into(),
            uss.into(),
            name.as_str().into(),
        ]);
    }
    table.sort();
    table
}
