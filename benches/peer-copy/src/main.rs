//! `peer-copy`: what copies between two devices take, and whether the bytes arrive.
//!
//! [`place`] finds who can lend and import, [`measure`] copies between each two of them by [`route`]s at a [`pace`],
//! [`record`] is what came out: [`matrix`] prints it, [`page`] draws it, [`saved`] keeps it and [`comparison`] holds two side by side.
//! Everything goes by peervram's public interface; [`driver`] is where devices with a driver of their own come in.
#![forbid(unsafe_code)]

mod attached;
mod bytes;
mod clocks;
mod comparison;
mod driver;
mod ending;
mod host_side;
mod link;
mod matrix;
mod measure;
mod memory;
#[cfg(feature = "model")]
mod model;
mod only;
mod pace;
mod page;
mod place;
mod record;
mod route;
mod same_gpu;
mod saved;
mod schema;
mod size;
mod spread;

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::Parser;
use peervram::Mover;
use peervram::backends::topology::{Reading, Topology};
use rustix::io::Errno;
use rustix::thread::{CpuSet, sched_setaffinity};

use bytes::Bytes;
use clocks::CpuClock;
use comparison::Comparison;
use ending::{Ending, FAILED, cannot, usage};
use matrix::Matrix;
use measure::{Measure, Wish};
use pace::Plan;
use place::{Found, Place};
use record::{Direction, Machine, Record, Refused, SCHEMA, VERSION};
use saved::Saved;
use size::Size;

/// What measuring may cost.
const OVERHEAD_LIMIT: f64 = 0.98;
/// The largest copy unless a larger one is asked for.
const USUAL_MOST: Size = Size(1 << 30);

/// Copies between every two devices, and tells how fast, and whether the bytes arrived.
///
/// Rows of the matrix lend memory: devices bound to vfio-pci, Vulkan devices, and the host. Columns import it: Vulkan
/// devices, devices with a driver of their own, and the host. A VFIO device is reset when it is opened, and what its
/// memory holds is lost.
#[derive(Parser)]
#[command(
    name = "peer-copy",
    after_help = "Exit codes: 0 measured; 1 bytes were WRONG, or copies broke; 2 usage; 4 this \
machine has nothing to measure.

Examples:
  peer-copy --list                           what there is
  peer-copy                                  all of it, 4 KiB to 1 GiB
  peer-copy --lender 01:00.0 --importer vulkan0 --sizes 4K,64M
  peer-copy --save before                    keep the figures, and later:
  peer-copy --compare before --html page.html"
)]
struct Arguments {
    /// Whose memory: a PCI address, vulkan0, a part of a Vulkan device's name, or host; all if left out
    #[arg(long, value_name = "NAME")]
    lender: Vec<String>,
    /// Who copies: a PCI address, vulkan0, a part of a Vulkan device's name, or host; all if left out
    #[arg(long, value_name = "NAME")]
    importer: Vec<String>,
    /// peer, host-pointer, staged, owner (the lender's engine, to the host), window (the CPU); within one GPU: opaque-fd,
    /// dma-buf, local (a plain copy)
    #[arg(long, value_delimiter = ',', value_parser = PATHS)]
    path: Vec<String>,
    /// read, write, or both: two places write to each other at once
    #[arg(long, value_delimiter = ',')]
    direction: Vec<Direction>,
    /// Only engines whose name contains this
    #[arg(long)]
    engine: Option<String>,
    /// Sizes of copies, as 4K,1M,1G; from 4 KiB on in steps of four if left out
    #[arg(long, value_delimiter = ',')]
    sizes: Vec<Size>,
    /// No copy is larger; nor than an eighth of the host's free memory
    #[arg(long, value_name = "SIZE", default_value_t = USUAL_MOST)]
    max_bytes: Size,
    /// Copies of each kind at most
    #[arg(long, default_value = "100", value_parser = at_least_one)]
    copies: usize,
    /// Copies of each kind at least, however long they take
    #[arg(long, default_value = "5", value_parser = at_least_one)]
    least_copies: usize,
    /// Copies before, which are not counted
    #[arg(long, default_value_t = 2)]
    warm_up: usize,
    /// When so much time has gone into one figure, only the least number of copies is made
    #[arg(long, value_name = "MS", default_value_t = 500)]
    budget_ms: u64,
    /// Stay on this CPU
    #[arg(long, value_name = "CPU")]
    pin: Option<usize>,
    /// Do not look whether bytes arrive
    #[arg(long)]
    no_verify: bool,
    /// Measure what measuring costs, too: the same copies in a bare loop, in turns
    #[arg(long)]
    overhead: bool,
    /// Print a line for each size
    #[arg(long)]
    every_size: bool,
    /// Print the record as JSON instead
    #[arg(long)]
    json: bool,
    /// Write the record as JSON to a file, too
    #[arg(long, value_name = "FILE")]
    json_to: Option<PathBuf>,
    /// Write a page with plots
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Keep the record under this name
    #[arg(long, value_name = "NAME")]
    save: Option<String>,
    /// Hold the figures against a record that was kept
    #[arg(long, value_name = "NAME")]
    compare: Option<String>,
    /// Only list what could lend and import
    #[arg(long, conflicts_with_all = ["save", "compare", "html", "json", "json_to"])]
    list: bool,
    /// Only check that a file is a record of this program's version
    #[arg(long, value_name = "FILE")]
    check: Option<PathBuf>,
    /// Print and draw a record that was written before, and measure nothing
    #[arg(long, value_name = "FILE", conflicts_with_all = ["check", "list", "save"])]
    show: Option<PathBuf>,
    /// Print the schema of records
    #[arg(long)]
    schema: bool,
}

/// A number of copies.
fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("no copies measure nothing; at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(_) => Err("not a number".to_owned()),
    }
}

const PATHS: [&str; 8] = [
    "peer",
    "host-pointer",
    "staged",
    "owner",
    "window",
    same_gpu::OPAQUE_FD,
    same_gpu::DMA_BUF,
    same_gpu::LOCAL,
];

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            let code = error.downcast_ref::<Ending>().map(|ending| ending.code);
            let cannot = || {
                let kind = error.downcast_ref::<peervram::Error>().map(peervram::Error::kind);
                kind.is_some_and(|kind| kind.cannot_run_here()).then_some(ending::CANNOT_RUN_HERE)
            };
            ExitCode::from(code.or_else(cannot).unwrap_or(FAILED))
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let mut out = io::stdout().lock();
    if arguments.schema {
        out.write_all(schema::TEXT.as_bytes())?;
        return Ok(ExitCode::SUCCESS);
    }
    let of_file = |file: &PathBuf| {
        let text = fs::read_to_string(file);
        let text = text.map_err(|error| usage(format!("reading {}: {error}", file.display())))?;
        saved::parse(&text).map_err(|ending| ending.of_file(file))
    };
    if let Some(file) = &arguments.check {
        let record = of_file(file)?;
        writeln!(out, "a record of version {VERSION}: {} figures", record.figures.len())?;
        return Ok(ExitCode::SUCCESS);
    }
    // Before anything is measured for nothing.
    let saved = Saved::of_user();
    check_places_for_files(arguments, &saved)?;
    let before = match &arguments.compare {
        Some(name) => Some((name, saved.as_ref().map_err(|error| usage(error.to_string()))?.read(name)?)),
        None => None,
    };
    if let Some(file) = &arguments.show {
        return finish(arguments, &of_file(file)?, saved, before, &mut out);
    }
    let sizes_bytes = sizes(arguments, memory::largest_copy_bytes())?;
    let pinned = arguments.pin.map(pin).transpose()?;

    let (found, troubles) = place::found();
    if arguments.list {
        for place in &found {
            writeln!(out, "{:<12}  {}", place.name, place.about)?;
        }
        troubles.iter().try_for_each(|trouble| writeln!(out, "no Vulkan: {trouble}"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let lenders = chosen(&found, &arguments.lender)?;
    let importers = chosen(&found, &arguments.importer)?;

    let most_bytes = sizes_bytes.last().copied().unwrap_or(4096);
    let mut record = new_record(pinned, !arguments.no_verify);
    let places = open_all(&found, &lenders, &importers, most_bytes, &mut record)?;
    for trouble in troubles {
        let why = format!("no Vulkan device: {trouble}");
        record.refused.push(Refused {
            lender: String::new(),
            importer: "vulkan".into(),
            path: String::new(),
            why,
        });
    }
    let among = |wanted: &[&Found]| -> Vec<&Place> {
        let is_in = |place: &&Place| wanted.iter().any(|found| found.name == place.record.name);
        places.iter().filter(is_in).collect()
    };
    let (lenders, importers) = (among(&lenders), among(&importers));
    check_sizes(arguments, &lenders)?;
    check_engine(arguments, &record)?;

    let topology = read_topology(&mut record);
    let least_copies = arguments.least_copies;
    let wish = Wish {
        sizes_bytes,
        paths: or_all(&arguments.path, &PATHS.map(String::from)),
        directions: or_all(&arguments.direction, &[Direction::Read, Direction::Write, Direction::Both]),
        engine: arguments.engine.clone(),
        plan: Plan {
            warm_up: arguments.warm_up,
            least: least_copies,
            most: arguments.copies.max(least_copies),
            budget: Duration::from_millis(arguments.budget_ms),
        },
        verify: !arguments.no_verify,
        overhead: arguments.overhead,
    };
    let bytes = Arc::new(Bytes::new(most_bytes)?);
    let mut say = |what: &str| eprintln!("peer-copy: {what}");
    Measure::new(&wish, bytes, topology, &mut record, &mut say).pairs(&lenders, &importers);
    drop((lenders, importers));
    read_clocks(&places, &mut record);
    drop(places);
    finish(arguments, &record, saved, before, &mut out)
}

/// Prints, writes and keeps the record, and judges it.
fn finish(
    arguments: &Arguments,
    record: &Record,
    saved: Result<Saved>,
    before: Option<(&String, Record)>,
    out: &mut dyn Write,
) -> Result<ExitCode> {
    let json = serde_json::to_string_pretty(record)?;
    let width = terminal_width();
    if arguments.json {
        writeln!(out, "{json}")?;
    } else {
        let colour = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Matrix { record, colour, every_size: arguments.every_size, width }.print(out)?;
    }
    let write = |file: &PathBuf, text: &str| {
        fs::write(file, text).with_context(|| format!("writing {}", file.display()))
    };
    if let Some(file) = &arguments.json_to {
        write(file, &json)?;
    }
    if let Some(file) = &arguments.html {
        let before = before.as_ref().map(|(name, before)| (name.as_str(), before));
        write(file, &page::page(record, before))?;
    }
    if let Some(name) = &arguments.save {
        let file = saved?.keep(name, record)?;
        eprintln!("peer-copy: kept as {}", file.display());
    }
    if let (Some((name, before)), false) = (before, arguments.json) {
        Comparison::new(&before, record).print(name, width, out)?;
    }
    let is_over = record.overheads.iter().any(|overhead| overhead.ratio < OVERHEAD_LIMIT);
    if record.has_failed() {
        eprintln!("peer-copy: WRONG bytes, or copies broke");
        return Ok(ExitCode::from(FAILED));
    }
    if is_over {
        eprintln!("peer-copy: measuring costs more than its limit, {OVERHEAD_LIMIT}");
        return Ok(ExitCode::from(FAILED));
    }
    if record.figures.is_empty() {
        let why = "there are no two places here between which anything could be copied as asked".to_owned();
        return Err(cannot(format!("{why}; `peer-copy --list` shows what there is")).into());
    }
    Ok(ExitCode::SUCCESS)
}

/// The terminal's columns. What is no terminal, or does not know, has the usual ones.
fn terminal_width() -> usize {
    let columns = rustix::termios::tcgetwinsize(io::stdout()).map_or(0, |size| usize::from(size.ws_col));
    if columns == 0 { matrix::USUAL_WIDTH } else { columns.max(matrix::LEAST_WIDTH) }
}

fn or_all<T: Clone>(given: &[T], all: &[T]) -> Vec<T> {
    if given.is_empty() { all.to_vec() } else { given.to_vec() }
}

/// What is written at the end must not fail then.
fn check_places_for_files(arguments: &Arguments, saved: &Result<Saved>) -> Result<()> {
    for file in [&arguments.json_to, &arguments.html].into_iter().flatten() {
        let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
        if folder.is_some_and(|folder| !folder.is_dir()) || file.is_dir() {
            return Err(usage(format!(
                "{} cannot be written: no such folder, or one itself",
                file.display()
            ))
            .into());
        }
    }
    if let Some(name) = &arguments.save {
        saved.as_ref().map_err(|error| usage(error.to_string()))?.file(name)?;
    }
    Ok(())
}

/// The sizes that are asked for, the smallest first. None is larger than the host can hold.
fn sizes(arguments: &Arguments, largest_bytes: u64) -> Result<Vec<u64>, Ending> {
    let mut sizes = arguments.sizes.clone();
    if let Some(size) = sizes.iter().find(|&&size| size > arguments.max_bytes) {
        return Err(usage(format!("{size} is more than --max-bytes, {}", arguments.max_bytes)));
    }
    if let Some(size) = sizes.iter().find(|size| size.0 > largest_bytes) {
        let largest = Size(largest_bytes >> 20 << 20);
        return Err(usage(format!("{size} is more than the host can hold for copies now, {largest}")));
    }
    if sizes.is_empty() {
        sizes = size::usual(arguments.max_bytes);
        sizes.retain(|size| size.0 <= largest_bytes);
    }
    sizes.sort_unstable();
    sizes.dedup();
    Ok(sizes.into_iter().map(|Size(bytes)| bytes).collect())
}

/// A size that was asked for by name and that no lender has is a mistake; the usual ones end where memory does.
fn check_sizes(arguments: &Arguments, lenders: &[&Place]) -> Result<(), Ending> {
    let most = lenders.iter().map(|place| place.record.lends_bytes).max().unwrap_or(0);
    match arguments.sizes.iter().find(|size| size.0 > most) {
        Some(size) if most > 0 => {
            Err(usage(format!("{size} is more than any of these lenders has; the most is {}", Size(most))))
        }
        _ => Ok(()),
    }
}

/// A part of a name that no engine has is a mistake, too.
fn check_engine(arguments: &Arguments, record: &Record) -> Result<(), Ending> {
    let Some(wanted) = &arguments.engine else { return Ok(()) };
    let mut engines: Vec<&str> =
        record.places.iter().flat_map(|place| &place.engines).map(String::as_str).collect();
    engines.extend([Mover::OwnerEngine, Mover::ImporterEngine, Mover::Cpu].map(Mover::name));
    if engines.iter().any(|engine| engine.contains(wanted.as_str())) {
        return Ok(());
    }
    engines.sort_unstable();
    engines.dedup();
    Err(usage(format!("no engine's name contains {wanted:?}; there are {}", engines.join(", "))))
}

/// Those that are meant, or all.
fn chosen<'a>(found: &'a [Found], names: &[String]) -> Result<Vec<&'a Found>, Ending> {
    if names.is_empty() {
        return Ok(found.iter().collect());
    }
    let one = |name: &String| {
        found.iter().find(|place| place.is_meant(name)).ok_or_else(|| {
            let there: Vec<&str> = found.iter().map(|place| place.name.as_str()).collect();
            usage(format!("there is no {name:?} here; there are {}", there.join(", ")))
        })
    };
    names.iter().map(one).collect()
}

/// Opens what is wanted. One that was named has to open; of the others it is noted.
fn open_all(
    found: &[Found],
    lenders: &[&Found],
    importers: &[&Found],
    most_bytes: u64,
    record: &mut Record,
) -> Result<Vec<Place>> {
    let mut places = Vec::new();
    let mut first = None;
    for found in found {
        let is_in = |wanted: &[&Found]| wanted.iter().any(|one| one.name == found.name);
        if !is_in(lenders) && !is_in(importers) {
            continue;
        }
        match place::open(found, most_bytes) {
            Ok(place) => {
                record.places.push(place.record.clone());
                places.push(place);
            }
            Err(error) => {
                let why = format!("{error:#}");
                record.refused.push(Refused {
                    lender: found.name.clone(),
                    importer: String::new(),
                    path: String::new(),
                    why,
                });
                first.get_or_insert(error);
            }
        }
    }
    match first {
        Some(error) if places.is_empty() => Err(error),
        _ => Ok(places),
    }
}

/// What copies left the clocks at.
fn read_clocks(places: &[Place], record: &mut Record) {
    let sysfs = Path::new(clocks::SYSFS);
    record.machine.cpu_clock = clocks::of_cpu(sysfs, record.machine.pinned_cpu);
    for (of_record, place) in record.places.iter_mut().zip(places) {
        of_record.clocks = place.address.map(|address| clocks::of_gpu(sysfs, address)).unwrap_or_default();
    }
}

/// The PCI tree, if it can be read; without it no limits are known.
fn read_topology(record: &mut Record) -> Option<Topology> {
    match Topology::read() {
        Ok(topology) => {
            record.machine.unread = topology.unread();
            if let Reading::Known(cpu) = &topology.cpu {
                record.machine.processor = cpu.name.clone();
            }
            Some(topology)
        }
        Err(error) => {
            record.machine.unread = vec![error.to_string()];
            None
        }
    }
}

fn new_record(pinned_cpu: Option<usize>, verified: bool) -> Record {
    Record {
        schema: SCHEMA.into(),
        version: VERSION,
        began_unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        machine: Machine {
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            processor: None,
            cpus: std::thread::available_parallelism().map_or(1, NonZero::get),
            pinned_cpu,
            cpu_clock: CpuClock::default(),
            unread: Vec::new(),
        },
        verified,
        places: Vec::new(),
        refused: Vec::new(),
        failed: Vec::new(),
        figures: Vec::new(),
        overheads: Vec::new(),
    }
}

/// Stays on a CPU, with all threads that are started later.
fn pin(cpu: usize) -> Result<usize, Ending> {
    let refused = |why: String| usage(format!("cannot stay on CPU {cpu}: {why}"));
    if cpu >= CpuSet::MAX_CPU {
        return Err(refused(format!("there are at most {}", CpuSet::MAX_CPU)));
    }
    let mut this = CpuSet::new();
    this.set(cpu);
    sched_setaffinity(None, &this).map_err(|errno| match errno {
        Errno::INVAL => refused("it is not there, is off, or is not this process's to run on".to_owned()),
        other => refused(other.to_string()),
    })?;
    Ok(cpu)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parsed(words: &[&str]) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(["peer-copy"].iter().chain(words))
    }

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn sizes_end_at_the_largest() {
        let sizes = |words: &[&str]| sizes(&parsed(words).unwrap(), 256 << 20);
        assert_eq!(sizes(&[]).unwrap().last(), Some(&(256 << 20)));
        let too_much = sizes(&["--sizes", "512M"]).unwrap_err();
        assert!(
            too_much.code == ending::USAGE && too_much.reason.contains("the host can hold"),
            "{too_much}"
        );
        assert_eq!(sizes(&["--max-bytes", "64K"]), Ok(vec![4096, 16 << 10, 64 << 10]));
        assert_eq!(sizes(&["--sizes", "1M,4K,1M"]), Ok(vec![4096, 1 << 20]));
        let beyond = sizes(&["--sizes", "2G"]).unwrap_err();
        assert_eq!(
            (beyond.code, beyond.reason.as_str()),
            (ending::USAGE, "2 GiB is more than --max-bytes, 1 GiB")
        );
    }

    #[test]
    fn words_that_mean_nothing_are_usage() {
        for words in [
            &["--path", "fast"][..],
            &["--direction", "up"],
            &["--sizes", "4"],
            &["--copies", "0"],
            &["--list", "--save", "a"],
        ] {
            assert_eq!(parsed(words).err().map(|error| error.exit_code()), Some(2), "{words:?}");
        }
    }

    #[test]
    fn names_that_nobody_has_are_listed_against() {
        let (found, _) = place::found();
        let error = chosen(&found, &["no such thing".into()]).unwrap_err();
        assert_eq!(error.code, ending::USAGE);
        assert!(error.reason.contains("there are") && error.reason.contains("host"), "{error}");
        assert_eq!(chosen(&found, &["host".into()]).unwrap()[0].name, "host");
    }

    #[test]
    fn a_cpu_that_is_not_there_is_usage() {
        assert_eq!(pin(1_000_000).unwrap_err().code, ending::USAGE);
    }
}
