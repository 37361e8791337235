//! `vmallocinfo`: the vmalloc space by area.

use super::{Column, Role, Table};
use crate::linux::vmalloc_info::AreaInfo;
use crate::memory::Va;

/// One row per area, ascending: its addresses and bytes with the guard page, the pages that belong to it, who asked for it
/// and what it is, in the words of /proc/vmallocinfo. `name` names a code address.
pub fn table(areas: &[AreaInfo], name: &dyn Fn(Va) -> Option<String>) -> Table {
    let columns = vec![
        Column::new("range", Role::Key),
        Column::new("bytes", Role::Amount),
        Column::new("pages", Role::Amount),
        Column::new("caller", Role::Key),
        Column::new("flags", Role::Key),
    ];
    let mut table = Table::new(columns, 1);
    for area in areas {
        let range = format!("{:#018x}-{:#018x}", area.start.0, (area.start + area.size).0);
        let caller = area.caller.map(|va| name(va).unwrap_or_else(|| va.to_string()));
        let physical = area.physical.map(|pa| format!("phys={pa:#018x}"));
        let flags: Vec<&str> = physical.as_deref().into_iter().chain(area.flags.iter().copied()).collect();
        table.rows.push(vec![
            range.as_str().into(),
            area.size.into(),
            area.pages.into(),
            caller.as_deref().unwrap_or("-").into(),
            flags.join(" ").as_str().into(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_shown_with_caller_and_kind() {
        let area = |start, caller, flags: &[&'static str]| AreaInfo {
            start: Va(start),
            size: 0x2000,
            caller,
            pages: 1,
            physical: None,
            flags: flags.to_vec(),
        };
        let mut areas = vec![
            area(0xffff_c900_0000_0000, Some(Va(0x10)), &["vmalloc", "vpages"]),
            area(0xffff_c900_0000_2000, Some(Va(0x20)), &["ioremap"]),
            area(u64::MAX, None, &["vm_map_ram"]),
        ];
        areas[1].physical = Some(0xfed0_0000);
        let name = |va: Va| (va == Va(0x10)).then(|| "f+0x1/0x2 [m]".to_owned());
        let text = "\
range                                  bytes  pages  caller         flags
0xffffc90000000000-0xffffc90000002000   8192      1  f+0x1/0x2 [m]  vmalloc vpages
0xffffc90000002000-0xffffc90000004000   8192      1  0x20           phys=0x00000000fed00000 ioremap
0xffffffffffffffff-0x0000000000001fff   8192      1  -              vm_map_ram
";
        let before = table(&areas, &name);
        assert_eq!(before.text(), text);
        areas.remove(1);
        let gone = table(&areas, &name).since(&before);
        assert_eq!((gone.rows.len(), gone.text().contains("-8192     -1  0x20")), (1, true));
    }
}
