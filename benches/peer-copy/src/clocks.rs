//! Clocks: how fast a CPU and GPUs may run and do, as sysfs has it. Nothing is set here, and what sysfs does not tell stays empty:
//! NVIDIA's drivers have no such file, and a device that is bound to VFIO has no driver that would know.
//!
//! They are read when measuring ends, while clocks are still what copies left them at.

use std::fs;
use std::path::{Path, PathBuf};

use peervram::backends::PciAddress;
use serde::{Deserialize, Serialize};

/// Where sysfs is.
pub const SYSFS: &str = "/sys";

/// The CPU's clock.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuClock {
    /// The frequency governor: "performance", "schedutil"; several where CPUs differ.
    pub governor: Option<String>,
    /// Now, of the CPU that everything ran on; nothing where it was not pinned.
    pub now_khz: Option<u64>,
    /// The slowest that is allowed.
    pub least_khz: Option<u64>,
    /// The fastest that is allowed.
    pub most_khz: Option<u64>,
    /// Whether it may go beyond what it can keep up.
    pub boost: Option<bool>,
}

/// One of a GPU's clocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clock {
    /// As its driver has it: "sclk", "mclk", "gt0".
    pub name: String,
    /// Now.
    pub now_mhz: Option<u32>,
    /// The slowest that is allowed.
    pub least_mhz: Option<u32>,
    /// The fastest that is allowed.
    pub most_mhz: Option<u32>,
}

/// The clock of one CPU, or of all where none is meant.
pub fn of_cpu(sysfs: &Path, cpu: Option<usize>) -> CpuClock {
    let cpus = sysfs.join("devices/system/cpu");
    let folders: Vec<PathBuf> = match cpu {
        Some(cpu) => vec![cpus.join(format!("cpu{cpu}/cpufreq"))],
        None => children(&cpus, "cpu").into_iter().map(|one| one.join("cpufreq")).collect(),
    };
    let numbers =
        |name: &str| folders.iter().filter_map(|folder| number(&folder.join(name))).collect::<Vec<u64>>();
    let mut governors: Vec<String> =
        folders.iter().filter_map(|folder| text(&folder.join("scaling_governor"))).collect();
    governors.sort();
    governors.dedup();
    // acpi-cpufreq and amd-pstate tell of boost, intel_pstate of its absence.
    let boost = number::<u8>(&cpus.join("cpufreq/boost")).map(|one| one != 0);
    let boost = boost.or_else(|| number::<u8>(&cpus.join("intel_pstate/no_turbo")).map(|one| one == 0));
    CpuClock {
        governor: (!governors.is_empty()).then(|| governors.join(", ")),
        now_khz: cpu.and_then(|_| numbers("scaling_cur_freq").first().copied()),
        least_khz: numbers("scaling_min_freq").into_iter().min(),
        most_khz: numbers("scaling_max_freq").into_iter().max(),
        boost,
    }
}

/// The clocks of the GPU at that address.
pub fn of_gpu(sysfs: &Path, address: PciAddress) -> Vec<Clock> {
    let device = sysfs.join("bus/pci/devices").join(address.to_string());
    let mut clocks = Vec::new();
    // amdgpu: a list of states, the one that it is in with a star.
    for (name, file) in [("sclk", "pp_dpm_sclk"), ("mclk", "pp_dpm_mclk")] {
        clocks.extend(text(&device.join(file)).and_then(|states| of_states(name, &states)));
    }
    // xe: tile0/gt0/freq0.
    for gt in children(&device, "tile").iter().flat_map(|tile| children(tile, "gt")) {
        clocks.extend(of_files(&gt, &gt.join("freq0"), ["act_freq", "min_freq", "max_freq"]));
    }
    // i915: drm/card0/gt/gt0.
    for card in children(&device.join("drm"), "card") {
        for gt in children(&card.join("gt"), "gt") {
            clocks.extend(of_files(&gt, &gt, ["rps_act_freq_mhz", "rps_min_freq_mhz", "rps_max_freq_mhz"]));
        }
    }
    clocks
}

/// "0: 500Mhz\n1: 2100Mhz *".
fn of_states(name: &str, states: &str) -> Option<Clock> {
    let mhz = |line: &str| -> Option<u32> {
        let (_, state) = line.split_once(':')?;
        let digits = state.trim().trim_end_matches('*').trim().to_ascii_lowercase();
        digits.strip_suffix("mhz")?.parse().ok()
    };
    let all: Vec<u32> = states.lines().filter_map(mhz).collect();
    let now_mhz = states.lines().find(|line| line.trim_end().ends_with('*')).and_then(mhz);
    let (least_mhz, most_mhz) = (all.iter().min().copied(), all.iter().max().copied());
    most_mhz.map(|_| Clock { name: name.to_owned(), now_mhz, least_mhz, most_mhz })
}

fn of_files(named_by: &Path, folder: &Path, files: [&str; 3]) -> Option<Clock> {
    let [now_mhz, least_mhz, most_mhz] = files.map(|file| number(&folder.join(file)));
    let name = named_by.file_name()?.to_string_lossy().into_owned();
    (now_mhz.is_some() || most_mhz.is_some()).then_some(Clock { name, now_mhz, least_mhz, most_mhz })
}

/// Folders whose name is `prefix` and a number, in the order of their numbers.
fn children(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<(u32, PathBuf)> = entries
        .filter_map(|entry| {
            let name = entry.file_name();
            Some((name.to_str()?.strip_prefix(prefix)?.parse().ok()?, entry.path()))
        })
        .collect();
    found.sort();
    found.into_iter().map(|(_, path)| path).collect()
}

fn text(file: &Path) -> Option<String> {
    fs::read_to_string(file).ok().map(|text| text.trim().to_owned())
}

fn number<N: std::str::FromStr>(file: &Path) -> Option<N> {
    text(file)?.parse().ok()
}

impl CpuClock {
    /// In words; nothing where nothing is known.
    pub fn text(&self) -> Option<String> {
        let ghz = |khz: u64| format!("{:.2}", khz as f64 / 1e6);
        let mut words = Vec::new();
        words.extend(self.governor.as_ref().map(|governor| format!("governor {governor}")));
        let range = self
            .least_khz
            .zip(self.most_khz)
            .map(|(least, most)| format!("{} to {} GHz", ghz(least), ghz(most)));
        words.extend(match (self.now_khz, range) {
            (Some(now), Some(range)) => Some(format!("{} GHz of {range}", ghz(now))),
            (Some(now), None) => Some(format!("{} GHz", ghz(now))),
            (None, range) => range,
        });
        words.extend(self.boost.map(|boost| if boost { "boost on" } else { "boost off" }.to_owned()));
        (!words.is_empty()).then(|| words.join(", "))
    }
}

impl Clock {
    /// In words.
    pub fn text(&self) -> String {
        let now = self.now_mhz.map(|now| format!(" {now} MHz")).unwrap_or_default();
        let range = match (self.least_mhz, self.most_mhz) {
            (Some(least), Some(most)) if now.is_empty() => format!(" {least} to {most} MHz"),
            (Some(least), Some(most)) => format!(" of {least} to {most}"),
            _ => String::new(),
        };
        format!("{}{now}{range}", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sysfs with these files.
    fn sysfs(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let file = root.path().join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, format!("{text}\n")).unwrap();
        }
        root
    }

    const ADDRESS: PciAddress = PciAddress { domain: 0, bus: 3, device: 0, function: 0 };

    #[test]
    fn a_pinned_cpu_has_a_clock_and_others_a_range() {
        let root = sysfs(&[
            ("devices/system/cpu/cpu0/cpufreq/scaling_governor", "performance"),
            ("devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "3400000"),
            ("devices/system/cpu/cpu0/cpufreq/scaling_min_freq", "800000"),
            ("devices/system/cpu/cpu0/cpufreq/scaling_max_freq", "4200000"),
            ("devices/system/cpu/cpu10/cpufreq/scaling_governor", "powersave"),
            ("devices/system/cpu/cpu10/cpufreq/scaling_max_freq", "3000000"),
            ("devices/system/cpu/intel_pstate/no_turbo", "1"),
        ]);
        let pinned = of_cpu(root.path(), Some(0));
        assert_eq!(pinned.text().unwrap(), "governor performance, 3.40 GHz of 0.80 to 4.20 GHz, boost off");
        let all = of_cpu(root.path(), None);
        assert_eq!(all.text().unwrap(), "governor performance, powersave, 0.80 to 4.20 GHz, boost off");
    }

    #[test]
    fn what_sysfs_does_not_tell_is_empty() {
        let root = sysfs(&[]);
        assert_eq!(of_cpu(root.path(), Some(0)), CpuClock::default());
        assert_eq!(of_cpu(root.path(), None).text(), None);
        assert_eq!(of_gpu(root.path(), ADDRESS), []);
    }

    #[test]
    fn amdgpu_lists_states() {
        let root = sysfs(&[
            ("bus/pci/devices/0000:03:00.0/pp_dpm_sclk", "0: 500Mhz\n1: 800Mhz *\n2: 2100Mhz"),
            ("bus/pci/devices/0000:03:00.0/pp_dpm_mclk", "0: 96Mhz\n1: 1000Mhz"),
        ]);
        let texts: Vec<String> = of_gpu(root.path(), ADDRESS).iter().map(Clock::text).collect();
        assert_eq!(texts, ["sclk 800 MHz of 500 to 2100", "mclk 96 to 1000 MHz"]);
    }

    #[test]
    fn intels_drivers_have_files() {
        let xe = "bus/pci/devices/0000:03:00.0/tile0/gt1/freq0";
        let i915 = "bus/pci/devices/0000:03:00.0/drm/card1/gt/gt0";
        let files = [
            (format!("{xe}/act_freq"), "1300"),
            (format!("{xe}/min_freq"), "300"),
            (format!("{xe}/max_freq"), "2400"),
            (format!("{i915}/rps_act_freq_mhz"), "0"),
        ];
        let files: Vec<(&str, &str)> = files.iter().map(|(path, text)| (path.as_str(), *text)).collect();
        let texts: Vec<String> = of_gpu(sysfs(&files).path(), ADDRESS).iter().map(Clock::text).collect();
        assert_eq!(texts, ["gt1 1300 MHz of 300 to 2400", "gt0 0 MHz"]);
    }
}
