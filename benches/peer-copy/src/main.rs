//! `peer-copy`: what copies between two devices take, and whether the bytes arrive.
//!
//! [`place`] finds who can lend and import, [`measure`] copies between each two of them by [`route`]s at a [`pace`],
//! [`record`] is what came out, on which [`machine`]: [`matrix`] prints it, [`page`] draws it, [`saved`] keeps it and [`comparison`] holds two side by side.
//! Everything goes by peervram's public interface; [`driver`] is where devices with a driver of their own come in.
#![forbid(unsafe_code)]

mod arguments;
mod attached;
mod bytes;
mod clocks;
mod comparison;
mod driver;
mod host_side;
mod link;
mod machine;
mod matrix;
mod measure;
mod memory;
#[cfg(feature = "model")]
mod model;
mod pace;
mod page;
mod pin;
mod place;
mod record;
mod route;
mod same_gpu;
mod saved;
mod schema;
mod size;
mod spread;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::Parser;
use peervram::backends::topology::Topology;
use peervram_programs::{CANNOT_RUN_HERE, Ending, FAILED, cannot, note, usage};

use arguments::{Arguments, PATHS};
use bytes::Bytes;
use comparison::Comparison;
use machine::MachineRecord;
use matrix::Matrix;
use measure::{Measure, Wish};
use pace::Plan;
use pin::Pin;
use place::{Found, MemoryPlace};
use record::{Direction, Record, Refused, SCHEMA, VERSION};
use saved::Saved;

/// What measuring may cost.
const OVERHEAD_LIMIT: f64 = 0.98;
fn main() -> ExitCode {
    let code = match run(&Arguments::parse(), Saved::of_user(), &mut peervram_programs::output()) {
        Ok(code) => code,
        Err(error) => {
            note!("error: {error:#}");
            let code = error.downcast_ref::<Ending>().map(|ending| ending.code);
            let cannot = || {
                let kind = error.downcast_ref::<peervram::Error>().map(peervram::Error::kind);
                kind.is_some_and(|kind| kind.cannot_run_here()).then_some(CANNOT_RUN_HERE)
            };
            ExitCode::from(code.or_else(cannot).unwrap_or(FAILED))
        }
    };
    peervram_programs::end(code)
}

/// Does what is asked, with the records that are kept there.
fn run(arguments: &Arguments, saved: Result<Saved>, out: &mut dyn Write) -> Result<ExitCode> {
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
    if arguments.json && arguments.compare.is_some() && arguments.html.is_none() {
        let why = "--compare is told in words or on a page, and --json prints neither";
        return Err(usage(format!("{why}: add --html FILE, or leave one of them out")).into());
    }
    // Before anything is measured for nothing.
    arguments.check_places_for_files(&saved)?;
    let before = match &arguments.compare {
        Some(name) => Some((name, saved.as_ref().map_err(|error| usage(error.to_string()))?.read(name)?)),
        None => None,
    };
    if let Some(file) = &arguments.show {
        let record = of_file(file)?;
        check_machine(&record.machine, before.as_ref())?;
        return finish(arguments, &record, saved, before, out);
    }
    // Before it stays on a CPU, and before anything is opened for a comparison that says nothing.
    let machine = MachineRecord::below(Path::new("/"));
    check_machine(&machine, before.as_ref())?;
    let sizes_bytes = arguments.sizes(memory::largest_copy_bytes())?;
    arguments.check_pin()?;
    arguments.pin.map_or(Ok(()), Pin::this_thread)?;

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
    let pinned_cpus = arguments.pin.map(Pin::cpus).unwrap_or_default();
    let mut record = new_record(MachineRecord { pinned_cpus, ..machine }, !arguments.no_verify);
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
    let among = |wanted: &[&Found]| -> Vec<&MemoryPlace> {
        let is_in = |place: &&MemoryPlace| wanted.iter().any(|found| found.name == place.record.name);
        places.iter().filter(is_in).collect()
    };
    let (lenders, importers) = (among(&lenders), among(&importers));
    arguments.check_sizes(&lenders)?;
    arguments.check_engine(&record)?;

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
        pin: arguments.pin,
        overhead: arguments.overhead,
    };
    let bytes = Arc::new(Bytes::new(most_bytes)?);
    let mut say = |what: &str| note!("peer-copy: {what}");
    Measure::new(&wish, bytes, topology, &mut record, &mut say).pairs(&lenders, &importers);
    drop((lenders, importers));
    read_clocks(&places, &mut record);
    drop(places);
    finish(arguments, &record, saved, before, out)
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
    // Before anything is printed: what was measured is kept, whatever becomes of the output.
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
        note!("peer-copy: kept as {}", file.display());
    }
    let width = terminal_width();
    if arguments.json {
        writeln!(out, "{json}")?;
    } else {
        let colour = peervram_programs::is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Matrix { record, colour, every_size: arguments.every_size, width }.print(out)?;
    }
    if let (Some((name, before)), false) = (before, arguments.json) {
        Comparison::new(&before, record).print(name, width, out)?;
    }
    let is_over = record.overheads.iter().any(|overhead| overhead.ratio < OVERHEAD_LIMIT);
    if record.has_failed() {
        note!("peer-copy: WRONG bytes, or copies broke");
        return Ok(ExitCode::from(FAILED));
    }
    if is_over {
        note!("peer-copy: measuring costs more than its limit, {OVERHEAD_LIMIT}");
        return Ok(ExitCode::from(FAILED));
    }
    if record.figures.is_empty() {
        let why = "there are no two places here between which anything could be copied as asked".to_owned();
        return Err(cannot(format!("{why}; `peer-copy --list` shows what there is")).into());
    }
    Ok(ExitCode::SUCCESS)
}

/// Figures of two machines are not held against each other.
fn check_machine(now: &MachineRecord, before: Option<&(&String, Record)>) -> Result<(), Ending> {
    let Some((name, before)) = before else { return Ok(()) };
    now.of_another(&before.machine).map_or(Ok(()), |how| {
        Err(usage(format!("{name:?} is of another machine, and says nothing of this one: {how}")))
    })
}

/// The terminal's columns. What is no terminal, or does not know, has the usual ones.
fn terminal_width() -> usize {
    let columns = rustix::termios::tcgetwinsize(io::stdout()).map_or(0, |size| usize::from(size.ws_col));
    if columns == 0 { matrix::USUAL_WIDTH } else { columns.max(matrix::LEAST_WIDTH) }
}

fn or_all<T: Clone>(given: &[T], all: &[T]) -> Vec<T> {
    if given.is_empty() { all.to_vec() } else { given.to_vec() }
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
) -> Result<Vec<MemoryPlace>> {
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
fn read_clocks(places: &[MemoryPlace], record: &mut Record) {
    let sysfs = Path::new(clocks::SYSFS);
    record.machine.cpu_clock = clocks::of_cpu(sysfs, record.machine.pinned_cpus.first().copied());
    for (of_record, place) in record.places.iter_mut().zip(places) {
        of_record.clocks = place.address.map(|address| clocks::of_gpu(sysfs, address)).unwrap_or_default();
    }
}

/// The PCI tree, if it can be read; without it no limits are known.
fn read_topology(record: &mut Record) -> Option<Topology> {
    match Topology::read() {
        Ok(topology) => {
            record.machine.unread = topology.unread();
            Some(topology)
        }
        Err(error) => {
            record.machine.unread = vec![error.to_string()];
            None
        }
    }
}

fn new_record(machine: MachineRecord, verified: bool) -> Record {
    Record {
        schema: SCHEMA.into(),
        version: VERSION,
        began_unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        machine,
        verified,
        places: Vec::new(),
        refused: Vec::new(),
        failed: Vec::new(),
        figures: Vec::new(),
        overheads: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reader that has gone.
    struct Gone;

    impl Write for Gone {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
    }

    /// A disk that is full.
    struct Full;

    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn whatever_becomes_of_the_reader_wrong_is_wrong_and_files_are_written() {
        let record = record::tests::example();
        assert!(record.has_failed());
        for json in [&[][..], &["--json"]] {
            let folder = tempfile::tempdir().unwrap();
            let files = ["record.json", "page.html"].map(|name| folder.path().join(name));
            let names = files.each_ref().map(|file| file.to_str().unwrap());
            let words = [&["peer-copy", "--json-to", names[0], "--html", names[1]], json].concat();
            let arguments = Arguments::parse_from(words);
            let out = &mut peervram_programs::Output::around(Gone);
            let code = finish(&arguments, &record, Saved::of_user(), None, out).unwrap();
            assert_eq!(code, ExitCode::from(FAILED));
            assert!(files.iter().all(|file| file.metadata().unwrap().len() > 100), "{files:?}");
        }
        // What cannot be printed for another reason is an error, and the files are there all the same.
        let file = tempfile::tempdir().unwrap().keep().join("record.json");
        let arguments = Arguments::parse_from(["peer-copy", "--json-to", file.to_str().unwrap()]);
        let out = &mut peervram_programs::Output::around(Full);
        finish(&arguments, &record, Saved::of_user(), None, out).unwrap_err();
        assert!(file.metadata().unwrap().len() > 100);
        fs::remove_dir_all(file.parent().unwrap()).unwrap();
    }

    #[test]
    fn a_record_of_another_machine_is_not_held_against_this_one() {
        let here = machine::tests::example();
        let elsewhere = MachineRecord {
            boot_id: Some("b2".into()),
            product: Some("Another Tower".into()),
            ..here.clone()
        };
        let (name, record) = ("before".to_owned(), record::tests::example());
        let before = |machine: &MachineRecord| Record { machine: machine.clone(), ..record.clone() };
        check_machine(&here, Some(&(&name, before(&here)))).unwrap();
        check_machine(&here, None).unwrap();
        let error = check_machine(&here, Some(&(&name, before(&elsewhere)))).unwrap_err();
        assert_eq!(error.code, peervram_programs::USAGE);
        assert!(error.reason.contains("\"before\" is of another machine"), "{error}");

        // Both of what measures and of what shows, before anything else.
        let folder = tempfile::tempdir().unwrap();
        let saved = || Ok(Saved::at(folder.path()));
        saved().unwrap().keep("before", &before(&elsewhere)).unwrap();
        let file = folder.path().join("shown.json");
        let shown = serde_json::to_string(&before(&here)).unwrap();
        fs::write(&file, shown).unwrap();
        let file = file.to_str().unwrap();
        let out = &mut peervram_programs::Output::around(io::sink());
        // A machine that says nothing of itself is no other.
        let is_known = MachineRecord::below(Path::new("/")).of_another(&elsewhere).is_some();
        let measures = is_known.then_some(&["--lender", "no such thing"]);
        for words in [Some(&["--show", file]), measures].into_iter().flatten() {
            let words = [&["peer-copy", "--compare", "before"][..], words].concat();
            let error = run(&Arguments::parse_from(words), saved(), out).unwrap_err();
            assert!(error.to_string().contains("of another machine"), "{error:#}");
        }
    }

    #[test]
    fn names_that_nobody_has_are_listed_against() {
        let (found, _) = place::found();
        let error = chosen(&found, &["no such thing".into()]).unwrap_err();
        assert_eq!(error.code, peervram_programs::USAGE);
        assert!(error.reason.contains("there are") && error.reason.contains("host"), "{error}");
        assert_eq!(chosen(&found, &["host".into()]).unwrap()[0].name, "host");
    }
}
