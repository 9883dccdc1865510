//! `MachineRecord`: what a run was made on. [`MachineRecord::of_another`] says whether two runs can be held against each other at all, and
//! [`MachineRecord::conditions`] what else differed.

use std::fs;
use std::num::NonZero;
use std::path::Path;
use std::thread;

use serde::{Deserialize, Serialize};

use crate::clocks::CpuClock;

/// A machine, as it was during a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineRecord {
    /// The kernel's release.
    pub kernel: String,
    /// Which boot: the kernel's `boot_id`, which is random and says nothing else.
    pub boot_id: Option<String>,
    /// Maker and product, as the firmware has them.
    pub product: Option<String>,
    /// The processor's name.
    pub processor: Option<String>,
    /// How many CPUs are on, whichever of them this process may use.
    pub cpus: usize,
    /// The CPUs that the program was pinned to: one, or one for each side of `both`. Empty if it was not pinned.
    pub pinned_cpus: Vec<usize>,
    /// The first of those CPUs' clock, or the range of all.
    pub cpu_clock: CpuClock,
    /// What of the PCI tree could not be read, so that limits are missing.
    pub unread: Vec<String>,
}

impl MachineRecord {
    /// This one, whose files are below `root`. Nothing that staying on a CPU changes is asked.
    pub fn below(root: &Path) -> MachineRecord {
        let text = |file: &str| {
            let text = fs::read_to_string(root.join(file)).ok()?.trim().to_owned();
            (!text.is_empty()).then_some(text)
        };
        let dmi = |name: &str| text(&format!("sys/class/dmi/id/{name}"));
        let product: Vec<String> = [dmi("sys_vendor"), dmi("product_name")].into_iter().flatten().collect();
        let name_of_cpu = |text: String| {
            let fields = text.lines().filter_map(|line| line.split_once(':'));
            let mut names = fields.filter(|(field, _)| field.trim() == "model name");
            names.next().map(|(_, name)| name.trim().to_owned())
        };
        MachineRecord {
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            boot_id: text("proc/sys/kernel/random/boot_id"),
            product: (!product.is_empty()).then(|| product.join(" ")),
            processor: text("proc/cpuinfo").and_then(name_of_cpu),
            cpus: text("sys/devices/system/cpu/online")
                .and_then(|list| count(&list))
                .unwrap_or_else(|| thread::available_parallelism().map_or(1, NonZero::get)),
            pinned_cpus: Vec::new(),
            cpu_clock: CpuClock::default(),
            unread: Vec::new(),
        }
    }

    /// What proves that this is another machine than that one; nothing if it may be the same.
    pub fn of_another(&self, before: &MachineRecord) -> Option<String> {
        if self.boot_id.is_some() && self.boot_id == before.boot_id {
            return None;
        }
        let named: Vec<String> = [
            differs("product", before.product.as_deref(), self.product.as_deref()),
            differs("processor", before.processor.as_deref(), self.processor.as_deref()),
        ]
        .into_iter()
        .flatten()
        .collect();
        (!named.is_empty()).then(|| named.join("; "))
    }

    /// What differed on the same machine when the earlier record was made.
    pub fn conditions(&self, before: &MachineRecord) -> Vec<String> {
        let pinned = |machine: &MachineRecord| {
            let cpus: Vec<String> = machine.pinned_cpus.iter().map(usize::to_string).collect();
            Some(if cpus.is_empty() { "none".to_owned() } else { cpus.join(" and ") })
        };
        let cpus = |machine: &MachineRecord| Some(machine.cpus.to_string());
        let is_other_boot = self.boot_id != before.boot_id;
        let all = [
            differs("number of CPUs", cpus(before).as_deref(), cpus(self).as_deref()),
            differs("kernel", Some(&before.kernel), Some(&self.kernel)),
            differs("choice of CPUs to stay on", pinned(before).as_deref(), pinned(self).as_deref()),
            differs("CPU governor", before.cpu_clock.governor.as_deref(), self.cpu_clock.governor.as_deref()),
            is_other_boot.then(|| "it is another boot".to_owned()),
        ];
        all.into_iter().flatten().collect()
    }
}

/// What is not known on one side does not differ.
fn differs(what: &str, before: Option<&str>, now: Option<&str>) -> Option<String> {
    let (before, now) = before.zip(now)?;
    (before != now).then(|| format!("the {what} was {before} and is {now}"))
}

/// How many CPUs a list of the kernel's has: "0-3,6".
fn count(list: &str) -> Option<usize> {
    let one = |range: &str| -> Option<usize> {
        match range.split_once('-') {
            Some((first, last)) => {
                last.parse::<usize>().ok()?.checked_sub(first.parse().ok()?)?.checked_add(1)
            }
            None => range.parse::<usize>().ok().map(|_| 1),
        }
    };
    list.split(',').map(one).sum()
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::pin::Pin;

    /// A machine of which everything is known.
    pub fn example() -> MachineRecord {
        MachineRecord {
            kernel: "7.3.4".into(),
            boot_id: Some("b1".into()),
            product: Some("Maker Tower".into()),
            processor: Some("a processor".into()),
            cpus: 8,
            pinned_cpus: vec![1],
            cpu_clock: CpuClock {
                governor: Some("performance".into()),
                now_khz: Some(3_400_000),
                least_khz: None,
                most_khz: None,
                boost: Some(true),
            },
            unread: vec!["nothing <&>".into()],
        }
    }

    #[test]
    fn another_machine_is_known_by_what_it_is_made_of() {
        let before = example();
        let now = MachineRecord { boot_id: Some("b2".into()), ..example() };
        assert_eq!(now.of_another(&before), None);
        let other =
            MachineRecord { processor: Some("another".into()), product: Some("Box".into()), ..now.clone() };
        assert_eq!(
            other.of_another(&before).unwrap(),
            "the product was Maker Tower and is Box; the processor was a processor and is another"
        );
        // What one record does not know is no difference, and one boot is of one machine.
        assert_eq!(MachineRecord { product: None, processor: None, ..now.clone() }.of_another(&before), None);
        assert_eq!(MachineRecord { boot_id: before.boot_id.clone(), ..other }.of_another(&before), None);
        let unknown = [MachineRecord { boot_id: None, ..now }, MachineRecord { boot_id: None, ..example() }];
        assert_eq!(unknown[0].of_another(&unknown[1]), None);
    }

    #[test]
    fn what_else_differs_is_named() {
        let before = example();
        assert!(before.conditions(&before).is_empty());
        let now = MachineRecord {
            kernel: "7.4.0".into(),
            boot_id: Some("b2".into()),
            cpus: 4,
            pinned_cpus: vec![],
            cpu_clock: CpuClock { governor: Some("powersave".into()), ..before.cpu_clock.clone() },
            ..example()
        };
        assert_eq!(
            now.conditions(&before),
            [
                "the number of CPUs was 8 and is 4",
                "the kernel was 7.3.4 and is 7.4.0",
                "the choice of CPUs to stay on was 1 and is none",
                "the CPU governor was performance and is powersave",
                "it is another boot"
            ]
        );
    }

    #[test]
    fn staying_on_one_cpu_takes_none_from_the_machine() {
        let root = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let file = root.path().join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        file("sys/devices/system/cpu/online", "0-2,5,7-8\n");
        file(
            "proc/cpuinfo",
            "processor\t: 0\nmodel name\t: a: fast one\n\nprocessor\t: 1\nmodel name\t: b\n",
        );
        file("sys/class/dmi/id/product_name", "Tower\n");
        // In a thread of its own, so that the other tests keep their CPUs.
        let machine = thread::scope(|scope| {
            let pinned = || {
                let first = (0..1024).find(|&cpu| Pin { first: cpu, other: None }.this_thread().is_ok());
                assert!(first.is_some());
                assert_eq!(thread::available_parallelism().unwrap().get(), 1);
                MachineRecord::below(root.path())
            };
            scope.spawn(pinned).join().unwrap()
        });
        assert_eq!(machine.cpus, 6);
        assert_eq!(machine.processor.as_deref(), Some("a: fast one"));
        assert_eq!(machine.product.as_deref(), Some("Tower"));
        assert_eq!(machine.boot_id, None);
    }

    #[test]
    fn lists_of_cpus_are_counted() {
        assert_eq!(
            [count("0"), count("0-7"), count("1,3-4"), count(""), count("3-1")],
            [Some(1), Some(8), Some(3), None, None]
        );
    }
}
