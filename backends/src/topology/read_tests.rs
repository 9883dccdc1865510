//! Reads made-up machines: folders like those of sysfs and procfs.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::config_space::tests::root_port;
use super::{Above, ConfigSpace, MapType, Place, Reading, Topology};
use crate::{Kind, PciAddress};

/// A machine without devices, below a folder that goes with it.
struct MadeUp(tempfile::TempDir);

impl MadeUp {
    fn new() -> Self {
        let made_up = Self(tempfile::tempdir().unwrap());
        made_up.put("sys/bus/pci/devices/.keep", "");
        made_up.put("proc/sys/kernel/osrelease", "7.3.4\n");
        made_up.put("proc/sys/kernel/random/boot_id", "one\n");
        made_up.put("proc/cmdline", "quiet\n");
        made_up.put(
            "proc/cpuinfo",
            "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 23\nmodel name\t: EPYC\n\nprocessor\t: 1\n",
        );
        made_up.put("proc/bus/pci/devices", "");
        made_up
    }

    fn put(&self, file: &str, text: impl AsRef<[u8]>) {
        let file = self.0.path().join(file);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
    }

    /// A function at `path` below a host bridge's folder: `pci0000:00/0000:00:02.0`. Its BAR 0 is at `bar`.
    fn function(&self, path: &str, bar: u64) -> PathBuf {
        let folder = self.0.path().join("sys/devices").join(path);
        fs::create_dir_all(&folder).unwrap();
        for (name, text) in [("vendor", "0x1b36\n"), ("device", "0x000c\n"), ("class", "0x060400\n")] {
            fs::write(folder.join(name), text).unwrap();
        }
        let flags = if bar == 0 { 0 } else { 0x40200 };
        fs::write(folder.join("resource"), format!("{bar:#x} {:#x} {flags:#x}\n", bar + 0xfff)).unwrap();
        fs::write(folder.join("config"), root_port(0x148, 0x1d).bytes()).unwrap();
        let name = folder.file_name().unwrap();
        symlink(&folder, self.0.path().join("sys/bus/pci/devices").join(name)).unwrap();
        folder
    }

    /// Its lines in `/proc/bus/pci/devices`: place and BAR.
    fn order(&self, rows: &[(&str, u64)]) {
        let line =
            |(place, bar): &(&str, u64)| format!("{place}\t1b36000c\t10\t{bar:16x}\t0\t0\t0\t0\t0\t0\n");
        self.put("proc/bus/pci/devices", rows.iter().map(line).collect::<String>());
    }

    fn read(&self) -> Topology {
        Topology::read_under(self.0.path()).unwrap()
    }
}

fn addresses(topology: &Topology) -> Vec<String> {
    topology.places().iter().map(|place| place.address().to_string()).collect()
}

fn address(text: &str) -> PciAddress {
    text.parse().unwrap()
}

fn why<T>(reading: &Reading<T>) -> &str {
    match reading {
        Reading::Known(_) => panic!("it was read"),
        Reading::Unread(why) => why,
    }
}

#[test]
fn a_machine_is_read_whole() {
    let machine = MadeUp::new();
    machine.function("pci0000:00/0000:00:02.0", 0);
    let card = machine.function("pci0000:00/0000:00:02.0/0000:01:00.0", 0x1000_0000);
    let group = card.join("group");
    fs::create_dir(&group).unwrap();
    fs::write(group.join("type"), "DMA-FQ\n").unwrap();
    symlink(&group, card.join("iommu_group")).unwrap();
    let virtual_function = machine.function("pci0000:00/0000:00:02.0/0000:01:00.1", 0x2000_0000);
    symlink(&card, virtual_function.join("physfn")).unwrap();
    machine.order(&[("0010", 0), ("0100", 0x1000_0000), ("0101", 0x2000_0008)]);

    let topology = machine.read();
    assert_eq!(topology.unread(), [""; 0]);
    assert_eq!(topology.kernel_release, Reading::Known("7.3.4".into()));
    let cpu = topology.cpu.known().unwrap();
    assert_eq!((cpu.vendor.as_deref(), cpu.family, cpu.model), (Some("AuthenticAMD"), Some(23), None));
    let place = topology.place(address("01:00.0")).unwrap();
    assert_eq!(place.above, Above::Bridge(address("00:02.0")));
    assert_eq!(place.iommu_domain.as_deref(), Some("DMA-FQ"));
    let place = topology.place(address("01:00.1")).unwrap();
    assert_eq!(place.physical_function, Some(address("01:00.0")));
    let (way, host_bridge) = topology.way_up(address("01:00.1")).unwrap();
    assert_eq!((way.len(), host_bridge), (2, "pci0000:00"));
    // The root port redirects, and so do both functions, as they were made up.
    let verdict = topology.expected_map_type(address("01:00.0"), address("01:00.1"));
    assert_eq!(verdict.expected.known(), Some(MapType::ThroughHostBridge));
    assert_eq!(Topology::from_json(&topology.to_json()).unwrap(), Topology { is_captured: true, ..topology });
}

#[test]
fn the_order_is_the_kernels_and_not_that_of_addresses() {
    let machine = MadeUp::new();
    machine.function("pci0000:00/0000:00:00.0", 0);
    machine.function("pci0000:00/0000:00:02.0", 0);
    machine.function("pci0000:00/0000:00:03.0", 0);
    // The first was taken out and found again.
    machine.order(&[("0010", 0), ("0018", 0), ("0000", 0)]);
    let topology = machine.read();
    assert_eq!(addresses(&topology), ["0000:00:02.0", "0000:00:03.0", "0000:00:00.0"]);
    assert_eq!(topology.root_bus("pci0000:00").next().map(Place::address), Some(address("00:02.0")));
}

#[test]
fn domains_are_told_apart_by_bars() {
    let machine = MadeUp::new();
    machine.function("pci0000:00/0000:00:0e.0", 0);
    // Intel's VMD: a host bridge below a function, with a domain beyond 16 bits.
    machine.function("pci0000:00/0000:00:0e.0/pci10000:e0/10000:e0:06.0", 0x3000_0000);
    machine.function("pci0001:e0/0001:e0:06.0", 0x1000_0000);
    machine.order(&[("0070", 0), ("e030", 0x1000_0000), ("e030", 0x3000_0000)]);
    let topology = machine.read();
    assert_eq!(addresses(&topology), ["0000:00:0e.0", "0001:e0:06.0", "10000:e0:06.0"]);
    let above = &topology.place(address("10000:e0:06.0")).unwrap().above;
    assert_eq!(*above, Above::HostBridge("pci10000:e0".into()));
}

#[test]
fn domains_that_look_the_same_leave_the_order_unknown() {
    let machine = MadeUp::new();
    machine.function("pci0000:00/0000:00:02.0", 0);
    machine.function("pci0001:00/0001:00:02.0", 0);
    machine.order(&[("0010", 0), ("0010", 0)]);
    let topology = machine.read();
    assert_eq!(addresses(&topology), ["0000:00:02.0", "0001:00:02.0"]);
    assert!(why(&topology.order).contains("look the same"), "{}", why(&topology.order));
}

#[test]
fn an_order_that_does_not_fit_is_none() {
    let machine = MadeUp::new();
    machine.function("pci0000:00/0000:00:02.0", 0);
    machine.order(&[("0018", 0)]);
    assert!(why(&machine.read().order).contains("0000:00:02.0 is not in"));
    machine.put("proc/bus/pci/devices", "nonsense\n");
    assert!(why(&machine.read().order).contains("nonsense"));
    fs::remove_file(machine.0.path().join("proc/bus/pci/devices")).unwrap();
    assert!(why(&machine.read().order).contains("/proc/bus/pci/devices"));
}

#[test]
fn an_order_that_does_not_fit_is_read_again() {
    let machine = MadeUp::new();
    machine.function("pci0000:00/0000:00:02.0", 0);
    // What comes out of it is another thing each time.
    let order = machine.0.path().join("proc/bus/pci/devices");
    fs::remove_file(&order).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &order, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    // Each time the processor is read after it.
    use rustix::fs::inotify;
    let watch = inotify::init(inotify::CreateFlags::empty()).unwrap();
    let cpuinfo = machine.0.path().join("proc/cpuinfo");
    inotify::add_watch(&watch, &cpuinfo, inotify::WatchFlags::OPEN).unwrap();
    // Where nobody reads it again, this waits for ever, and nobody waits for it.
    std::thread::spawn(move || {
        fs::write(&order, "0018\t1b36000c\t0\t0\t0\t0\t0\t0\t0\n").unwrap();
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        inotify::Reader::new(watch, &mut buffer).next().unwrap();
        fs::write(&order, "0010\t1b36000c\t0\t0\t0\t0\t0\t0\t0\n").unwrap();
    });
    assert_eq!(machine.read().order, Reading::Known(()));
}

#[test]
fn what_is_above_some_functions_is_read_and_nothing_else() {
    let machine = MadeUp::new();
    machine.function("pci0000:00/0000:00:02.0", 0);
    machine.function("pci0000:00/0000:00:02.0/0000:01:00.0", 0x1000_0000);
    machine.function("pci0000:00/0000:00:02.0/0000:01:00.1", 0x2000_0000);
    machine.function("pci0000:00/0000:00:03.0", 0);
    let both = [address("01:00.1"), address("01:00.0")];
    let topology = Topology::read_above_under(machine.0.path(), &both).unwrap();
    assert_eq!(addresses(&topology), ["0000:01:00.1", "0000:00:02.0", "0000:01:00.0"]);
    assert_eq!(topology.kernel_release, Reading::Known("7.3.4".into()));
    // It is not told what else is on the root bus.
    assert!(!topology.is_whole && why(&topology.order).contains("not all functions were read"));
    let missing = Topology::read_above_under(machine.0.path(), &[address("05:00.0")]).unwrap_err();
    assert_eq!((missing.kind(), missing.device()), (Kind::NotFound, Some("0000:05:00.0")));
}

#[test]
fn what_root_would_read_is_told_from_what_nobody_can() {
    let machine = MadeUp::new();
    let bytes = root_port(0x148, 0x1d).bytes().to_vec();
    let place = |number: u8, config: Option<&[u8]>, power: &str| {
        let name = format!("0000:00:{number:02x}.0");
        let folder = machine.function(&format!("pci0000:00/{name}"), 0);
        fs::write(folder.join("power_state"), power).unwrap();
        match config {
            // sysfs says how large it is, whoever asks; a file that is as large is not shorter to read.
            Some(config) => fs::write(folder.join("config"), config).unwrap(),
            None => fs::remove_file(folder.join("config")).unwrap(),
        }
        let topology = Topology::read_above_under(machine.0.path(), &[address(&name)]).unwrap();
        topology.place(address(&name)).unwrap().clone()
    };
    let whole = place(2, Some(&bytes), "D0");
    assert!(!whole.is_short_of_root());
    let cut = |length: usize, value: Option<u8>| {
        let bytes = value.map_or(bytes[..length].to_vec(), |value| vec![value; length]);
        Place { config: Reading::Known(ConfigSpace::new(bytes, 4096).unwrap()), ..whole.clone() }
    };
    assert!(cut(64, None).is_short_of_root());
    assert!(!cut(64, Some(0xff)).is_short_of_root(), "it does not answer root either");
    assert!(place(3, None, "D0").is_short_of_root());
    assert!(!place(4, Some(&bytes), "D3cold").is_short_of_root());
    let mut topology = machine.read();
    topology.places = vec![cut(64, None)];
    topology.order = Reading::Known(());
    assert_eq!(topology.unread(), ["configuration space of 0000:00:02.0: only the first 64 bytes"]);
}

#[test]
fn a_device_that_vanishes_is_left_out() {
    let machine = MadeUp::new();
    machine.function("pci0000:00/0000:00:02.0", 0);
    let half_gone = machine.function("pci0000:00/0000:00:03.0", 0);
    fs::remove_file(half_gone.join("resource")).unwrap();
    let gone = machine.function("pci0000:00/0000:00:04.0", 0);
    fs::remove_dir_all(gone).unwrap();
    machine.order(&[("0010", 0)]);
    let topology = machine.read();
    assert_eq!(addresses(&topology), ["0000:00:02.0"]);
    assert_eq!(topology.order, Reading::Known(()));
}

/// The files in `folder` that were opened while something ran.
fn opened_in(folder: &Path, mut run: impl FnMut()) -> Vec<String> {
    use rustix::fs::inotify;
    let watch = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
    inotify::add_watch(&watch, folder, inotify::WatchFlags::OPEN).unwrap();
    run();
    let mut buffer = [std::mem::MaybeUninit::uninit(); 16 << 10];
    let mut events = inotify::Reader::new(watch, &mut buffer);
    let mut names = Vec::new();
    while let Ok(event) = events.next() {
        names.extend(event.file_name().map(|name| name.to_str().unwrap().to_owned()));
    }
    names
}

#[test]
fn what_sleeps_is_not_asked() {
    // The kernel answers these files by reading configuration space, which wakes the device.
    const WAKING: [&str; 5] =
        ["config", "current_link_speed", "current_link_width", "max_link_speed", "max_link_width"];
    let machine = MadeUp::new();
    let put = |folder: &Path, name: &str, text: &str| {
        let file = folder.join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
    };
    let mut rows = Vec::new();
    // A port with a function below it; how each sleeps; and who is left alone.
    let cases = [
        (2, "D0", "active", "D0", None),
        (3, "D0", "active", "D3hot", None),
        (4, "D0", "active", "D3cold", Some("it sleeps in D3cold")),
        (5, "D3hot", "suspended", "D0", Some("the bridge 0000:00:05.0 above it sleeps")),
        (6, "D3hot", "suspending", "D0", Some("the bridge 0000:00:06.0 above it sleeps")),
        (7, "D3cold", "active", "D0", Some("the bridge 0000:00:07.0 above it sleeps")),
    ];
    let mut folders = Vec::new();
    for (number, port_power, port_status, power, why) in cases {
        let port = machine.function(&format!("pci0000:00/0000:00:{number:02x}.0"), 0);
        put(&port, "power_state", port_power);
        put(&port, "power/runtime_status", port_status);
        let folder =
            machine.function(&format!("pci0000:00/0000:00:{number:02x}.0/0000:{number:02x}:00.0"), 0);
        put(&folder, "power_state", power);
        for name in &WAKING[1..] {
            put(&folder, name, if name.ends_with("speed") { "16.0 GT/s PCIe\n" } else { "8\n" });
        }
        rows.extend([(format!("00{:02x}", number << 3), 0), (format!("{number:02x}00"), 0)]);
        folders.push((folder, why));
    }
    machine.order(&rows.iter().map(|(place, bar)| (place.as_str(), *bar)).collect::<Vec<_>>());
    for (folder, why_not) in folders {
        let mut topology = None;
        let opened = opened_in(&folder, || topology = Some(machine.read()));
        let topology = topology.unwrap();
        let asked: Vec<&str> =
            WAKING.into_iter().filter(|name| opened.iter().any(|file| file == name)).collect();
        let name = folder.file_name().unwrap().to_str().unwrap();
        let place = topology.place(address(name)).unwrap();
        match why_not {
            None => {
                assert_eq!(asked, WAKING, "{name}");
                assert_eq!(place.sleeper, None, "{name}");
                assert!(place.function.link.is_some() && place.function.memory_enabled.is_some(), "{name}");
            }
            Some(said) => {
                assert_eq!(asked, [""; 0], "{name}");
                assert!(why(&place.config).starts_with(said), "{name}: {}", why(&place.config));
                let sleeper = place.sleeper.unwrap().to_string();
                assert_eq!(sleeper == name, said.starts_with("it sleeps"), "{name}: {sleeper}");
                assert!(sleeper == name || said.contains(&sleeper), "{name}: {sleeper}");
                assert!(!place.is_short_of_root(), "{name}");
                assert!(place.function.link.is_none() && place.function.memory_enabled.is_none(), "{name}");
            }
        }
        // Files that do not touch the device are read for every device.
        assert!(opened.iter().any(|file| file == "resource"), "{name}: {opened:?}");
    }
}

#[test]
fn a_virtual_functions_memory_is_on_without_a_bit_for_it() {
    let machine = MadeUp::new();
    let physical = machine.function("pci0000:00/0000:00:02.0", 0);
    let function = machine.function("pci0000:00/0000:00:02.1", 0);
    let mut config = root_port(0x148, 0x1d).bytes().to_vec();
    config[4] = 0;
    for folder in [&physical, &function] {
        fs::write(folder.join("config"), &config).unwrap();
    }
    symlink(&physical, function.join("physfn")).unwrap();
    machine.order(&[("0010", 0), ("0011", 0)]);
    let topology = machine.read();
    let memory_enabled = |name: &str| topology.place(address(name)).unwrap().function.memory_enabled;
    assert_eq!(memory_enabled("00:02.0"), Some(false));
    assert_eq!(memory_enabled("00:02.1"), Some(true));
}

#[test]
fn several_domains_have_verdicts_where_the_order_decides_nothing() {
    let machine = MadeUp::new();
    machine.put("proc/cpuinfo", "processor\t: 0\n");
    for domain in ["0008", "0009"] {
        let port = format!("pci{domain}:00/{domain}:00:00.0");
        let folder = machine.function(&port, 0);
        // A Grace's root port, on the kernel's list as its own host bridge since 7.3.
        fs::write(folder.join("vendor"), "0x10de\n").unwrap();
        fs::write(folder.join("device"), "0x2f95\n").unwrap();
        machine.function(&format!("{port}/{domain}:01:00.0"), 0);
    }
    machine.put(
        "proc/bus/pci/devices",
        "0000\t10de2f95\t0\t0\t0\t0\t0\t0\t0\n0100\t1b36000c\t0\t0\t0\t0\t0\t0\t0\n".repeat(2),
    );
    let topology = machine.read();
    assert!(why(&topology.order).contains("look the same"));
    let verdict = topology.expected_map_type(address("0008:01:00.0"), address("0009:01:00.0"));
    assert_eq!(verdict.expected.known(), Some(MapType::ThroughHostBridge), "{verdict:?}");
    let captured = Topology { is_captured: true, ..topology.clone() };
    assert_eq!(Topology::from_json(&topology.to_json()).unwrap(), captured);

    // A second function on one root bus that would come out otherwise: now the order decides.
    machine.function("pci0008:00/0008:00:01.0", 0x1000_0000);
    machine.put(
        "proc/bus/pci/devices",
        "0000\t10de2f95\t0\t0\t0\t0\t0\t0\t0\n0100\t1b36000c\t0\t0\t0\t0\t0\t0\t0\n".repeat(2)
            + "0008\t1b36000c\t0\t10000000\t0\t0\t0\t0\t0\n",
    );
    let topology = machine.read();
    let verdict = topology.expected_map_type(address("0008:01:00.0"), address("0009:01:00.0"));
    assert_eq!(verdict.expected.known(), None, "{verdict:?}");
    // And what was read in part says nothing of who else is on the bus.
    let part = Topology { is_whole: false, ..topology };
    let verdict = part.expected_map_type(address("0009:01:00.0"), address("0009:00:00.0"));
    assert_eq!(verdict.expected.known(), None, "{verdict:?}");
}

#[test]
fn what_sleeps_is_left_asleep_and_what_is_locked_is_said() {
    let machine = MadeUp::new();
    let asleep = machine.function("pci0000:00/0000:00:02.0", 0);
    fs::write(asleep.join("power_state"), "D3cold\n").unwrap();
    let absent = machine.function("pci0000:00/0000:00:03.0", 0);
    fs::remove_file(absent.join("config")).unwrap();
    let odd = machine.function("pci0000:00/0000:00:04.0", 0);
    fs::write(odd.join("config"), [0; 100]).unwrap();
    let fallen = machine.function("pci0000:00/0000:00:05.0", 0);
    fs::write(fallen.join("config"), [0xff; 4096]).unwrap();
    machine.order(&[("0010", 0), ("0018", 0), ("0020", 0), ("0028", 0)]);
    let unread = machine.read().unread().join("\n");
    for said in ["00:02.0: it sleeps in D3cold", "00:03.0: No such file", "not 100", "00:05.0: all ones"] {
        assert!(unread.contains(said), "{unread}");
    }
}

#[test]
fn a_machine_without_files_says_so() {
    let machine = MadeUp::new();
    for file in ["proc/cpuinfo", "proc/cmdline", "proc/sys/kernel/osrelease"] {
        fs::remove_file(machine.0.path().join(file)).unwrap();
    }
    let topology = machine.read();
    assert!(why(&topology.cpu).contains("/proc/cpuinfo"), "{}", why(&topology.cpu));
    assert_eq!(topology.unread().len(), 3, "{:?}", topology.unread());

    let error = Topology::read_under(Path::new("/nonexistent")).unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.to_string().contains("--tree"), "{error}");
}
