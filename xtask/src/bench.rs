//! `cargo xtask bench`: the benchmarks, in the lab's virtual machine or here.
//!
//! Builds them optimised, and the C program that crossings are compared with. Each benchmark prints a table of its
//! own; the last one is of all that was found, with the limit beside each.

use anyhow::{Context, Result, bail};
use clap::Args;
use peervram_lab::machines::MACHINES;
use peervram_lab::wire::Stream;
use peervram_lab::{Clock, Lab, Machine};
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use crate::build::{self, cargo};
use crate::figures::{Figure, Figures};
use crate::lab::{self, Setup};
use crate::peer_copy;
use crate::terminal::{FAILED, Steps};
use peervram_programs::usage;

/// The longest that a benchmark is between two words.
const SILENCE_LIMIT: Duration = Duration::from_secs(300);

/// The C programs: what crossings are compared with, and what counts a crossing's instructions.
const RAW_FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../benches/raw");
const RAW_PROGRAMS: [&str; 2] = ["crossing", "count"];

/// What takes a lender and an importing GPU, and what takes model GPUs.
const OF_A_LENDER: [&str; 6] = [CROSSING, "revoke", "access", "host-pointer", "mapping", "broker"];
const OF_A_MODEL: [&str; 2] = ["descriptors", "staged"];
/// What is measured once more where the clock counts instructions.
const CROSSING: &str = "crossing";
/// What takes a GPU whose memory is coherent with the CPU.
const OF_GRACE: &str = "nvgrace";
/// What takes no device and no guest: the model's server, and the compiler.
const OF_NOTHING: [&str; 2] = [REGISTERS, BUILD];
const REGISTERS: &str = "registers";
const BUILD: &str = "build";

/// The sample whose clean build is timed, and how many seconds that may take on two cores.
const SMALLEST: (&str, f64) = ("share_buffer", 90.0);
/// Where things are that ran without a guest.
const HERE: &str = "this machine";

/// The machine with the model GPUs.
const MODEL_MACHINE: &str = "small-two-models-root-ports";
/// The machine with that GPU.
const GRACE_MACHINE: &str = "small-gh200";

/// What crossings, revokes and accesses cost: peervram against the same calls made raw
///
/// Boots a machine of the lab, whose VFIO device lends and whose virtio GPU imports, and measures
/// there:
///   crossing      export, import and close: exactly 5 system calls, and at most so many user-space instructions and
///                 allocations. Once more where the clock counts the guest's instructions, against
///                 benches/raw/crossing.c; at most 1.08
///   revoke        reset with 1, 8 and 64 imports, against the same ioctl made raw; at most 1.20
///   access        enter and finish; at most 60 ns, of the CPU itself (--here)
///   host-pointer  attach by host pointer, 256 MiB against 4 KiB; at most 1.50
///   mapping       map and touch every page, ns for each MiB
///   broker        borrow and give back, against a bare descriptor; at most 1.50. An access of a client, against one of
///                 the owner's process; at most 1.05. Revoke with 1, 8 and 64 clients, against as many attachments;
///                 at most 1.30. A lease for the last of 1,000 clients, against the first; at most 1.50
/// Then boots one with model GPUs, for a table of its own:
///   descriptors   work through the model GPU's driver, against the same by hand; at most 1.05
///   staged        copies by two engines at once, against one after the other; at most 0.67
///   nvgrace       a crossing of coherent memory, against one of a plain VFIO device; at most 1.10
/// And without one:
///   registers     register reads of the model GPU, against a bare socket; at least 0.80
///   build         a clean build of the smallest sample; at most 90 s, on two cores that are free
/// And one with model GPUs, a device that only lends and Vulkan:
///   peer-copy     what measuring copies of 256 MiB costs; at least 0.98. Where it is named, before it the matrix of
///                 all pairs, its JSON and its page, and a lender that lies
///
/// Figures are medians. Ratios are of one run, each side taking turns: compare those, not times of
/// different machines or hours.
#[derive(Args)]
#[command(
    verbatim_doc_comment,
    after_help = "Exit codes: 0 everything is within its limit; 1 something is not, or \
failed; 2 usage; 4 this machine lacks what it takes.

Examples:
  cargo xtask bench                              everything, each in its machine
  cargo xtask bench crossing --json figures.json one benchmark, every round's figures in a file
  cargo xtask bench peer-copy --html page.html   copies between every two devices, with plots
  cargo xtask bench --here                       what runs on this machine without a VM"
)]
pub struct Bench {
    /// crossing, revoke, access, host-pointer, mapping, broker, descriptors, staged, nvgrace, registers or build; all of
    /// them if left out. peer-copy by itself
    what: Vec<String>,
    /// On this machine, with host memory as lender, instead of in a virtual one
    #[arg(long, conflicts_with = "machine")]
    here: bool,
    /// One machine for everything; `cargo xtask lab list` shows them
    #[arg(long)]
    machine: Option<String>,
    /// How often both sides of a ratio take their turn
    #[arg(long, default_value_t = 15)]
    rounds: u32,
    /// How many crossings, attaches or batches of each side a round has; resets and mappings are fewer
    #[arg(long, default_value_t = 600)]
    cycles: u32,
    /// Write the figures, every round's, to this file as JSON, a line for each machine
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the page with plots of peer-copy to this file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    #[command(flatten)]
    setup: Setup,
}

/// Runs the benchmarks; their exit code is ours.
pub fn run(arguments: &Bench) -> Result<ExitCode> {
    if arguments.what.iter().any(|what| what == peer_copy::NAME) {
        let reason = format!("{} is measured by itself, in a machine of its own", peer_copy::NAME);
        if arguments.what.len() > 1 || arguments.here || arguments.machine.is_some() {
            bail!(usage(reason));
        }
        let files = peer_copy::Files { json: arguments.json.clone(), html: arguments.html.clone() };
        let steps = Steps::default();
        let lab = lab::open(&arguments.setup, &steps)?;
        let mut figures = Figures::default();
        peer_copy::run(&lab, &files, peer_copy::Extent::Usual, &mut figures)?;
        peervram_programs::say!("");
        figures.print(&mut peervram_programs::output())?;
        return Ok(ExitCode::from(if figures.is_over() { FAILED } else { 0 }));
    }
    let known = || {
        let of_a_guest = OF_A_LENDER.into_iter().chain(OF_A_MODEL).chain([OF_GRACE]);
        of_a_guest.chain(OF_NOTHING).chain([peer_copy::NAME])
    };
    if let Some(unknown) = arguments.what.iter().find(|what| known().all(|known| known != what.as_str())) {
        let reason =
            format!("no benchmark {unknown:?}; there are {}", known().collect::<Vec<_>>().join(", "));
        bail!(usage(reason));
    }
    if let Some(file) = &arguments.json {
        fs::write(file, "").with_context(|| format!("writing {}", file.display()))?;
    }
    let mut figures = Figures::default();
    let (of_nothing, others): (Vec<_>, Vec<_>) =
        arguments.what.iter().cloned().partition(|what| OF_NOTHING.contains(&what.as_str()));
    let everything = arguments.what.is_empty();
    let mut code = 0;
    if everything || !others.is_empty() {
        code = match arguments.here {
            true => run_here(arguments, &others, &mut figures)?,
            false => {
                let steps = Steps::default();
                let lab = lab::open(&arguments.setup, &steps)?;
                let code = run_in_lab(&lab, arguments, &others, &mut figures)?;
                if everything && arguments.machine.is_none() {
                    peer_copy::overhead(&lab, &mut figures)?;
                }
                code
            }
        };
    }
    let is_wanted = |what: &str| everything || of_nothing.iter().any(|wanted| wanted == what);
    if is_wanted(REGISTERS) {
        measure_registers(arguments, &mut figures)?;
    }
    if is_wanted(BUILD) {
        measure_build(&mut figures)?;
    }
    peervram_programs::say!("\neverything that was measured\n");
    figures.print(&mut peervram_programs::output())?;
    if code == 0 && figures.is_over() {
        code = i32::from(FAILED);
    }
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(FAILED)))
}

fn run_here(arguments: &Bench, what: &[String], figures: &mut Figures) -> Result<i32> {
    let mut program = Command::new(build::benches()?)
        .args(what)
        .args(options(arguments))
        .arg("--host")
        .stdout(Stdio::piped())
        .spawn()
        .context("starting the benchmarks")?;
    let output = program.stdout.take().context("the benchmarks have no output")?;
    for line in BufReader::new(output).lines() {
        show(arguments, &line?, HERE, figures)?;
    }
    Ok(program.wait()?.code().unwrap_or(1))
}

fn run_in_lab(lab: &Lab, arguments: &Bench, what: &[String], figures: &mut Figures) -> Result<i32> {
    let tables = tables(arguments, what)?;
    let program = build::benches()?;
    let raw = compile_raw(&program, lab.root())?;

    let mut code = 0;
    for (number, (machine, clock, what)) in tables.into_iter().enumerate() {
        if number > 0 {
            peervram_programs::say!("");
        }
        let mut vm = lab.boot_by(machine, clock)?;
        vm.measures();
        let mut words = what;
        words.extend(options(arguments));
        if clock == Clock::Instructions {
            words.push("--instruction-clock".into());
        }
        // The lab has no KVM.
        words.push("--emulated".into());
        for (option, program) in ["--raw", "--count"].into_iter().zip(&raw) {
            words.extend([option.into(), vm.share(program)?]);
        }
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let exit = vm.run_watched(&program, &words, &BTreeMap::new(), SILENCE_LIMIT, |_, stream, line| {
            match stream {
                Stream::Stdout => show(arguments, line, machine.name, figures)?,
                Stream::Stderr => peervram_programs::note!("{line}"),
            }
            Ok(())
        })?;
        // The first that is not well.
        if code == 0 {
            code = exit.code;
        }
    }
    Ok(code)
}

/// The model's server against a bare socket.
fn measure_registers(arguments: &Bench, figures: &mut Figures) -> Result<()> {
    peervram_programs::say!("");
    let output = cargo()
        .args(["bench", "--quiet", "--package", "peervram-model", "--bench", "registers"])
        .stderr(Stdio::inherit())
        .output()
        .context("starting cargo bench")?;
    if !output.status.success() {
        bail!("`cargo bench` of peervram-model: {}", output.status);
    }
    String::from_utf8_lossy(&output.stdout).lines().try_for_each(|line| show(arguments, line, HERE, figures))
}

/// A clean build of the smallest sample, with everything that it uses.
fn measure_build(figures: &mut Figures) -> Result<()> {
    let (sample, limit_s) = SMALLEST;
    let folder = tempfile::tempdir().context("making a folder to build in")?;
    let fetched = cargo().args(["fetch", "--quiet"]).status().context("starting cargo fetch")?;
    if !fetched.success() {
        bail!("`cargo fetch`: {fetched}");
    }
    let start = Instant::now();
    let status = cargo()
        .args(["build", "--quiet", "--package", build::SAMPLES, "--bin", sample, "--target-dir"])
        .arg(folder.path())
        .status()
        .context("starting cargo build")?;
    if !status.success() {
        bail!("`cargo build` of {sample}: {status}");
    }
    let what = format!("a clean build of {sample}");
    figures.push(Figure::seconds(&what, start.elapsed().as_secs_f64(), limit_s), HERE);
    Ok(())
}

/// A machine, what its clock goes by, and what it is to measure.
type Table = (&'static Machine, Clock, Vec<String>);

/// Which machines to boot.
fn tables(arguments: &Bench, what: &[String]) -> Result<Vec<Table>> {
    if let Some(name) = &arguments.machine {
        return Ok(vec![(lab::named(name)?, Clock::Time, what.to_vec())]);
    }
    let all = OF_A_LENDER.into_iter().chain(OF_A_MODEL).chain([OF_GRACE]).map(String::from);
    let chosen = if what.is_empty() { all.collect() } else { what.to_vec() };
    let is_of_a_model = |what: &String| OF_A_MODEL.contains(&what.as_str());
    let (of_a_model, others): (Vec<_>, Vec<_>) = chosen.into_iter().partition(is_of_a_model);
    let (of_grace, of_a_lender): (Vec<_>, Vec<_>) = others.into_iter().partition(|what| what == OF_GRACE);
    let counted = of_a_lender.iter().filter(|what| *what == CROSSING).cloned().collect();
    let tables = [
        (MACHINES[0].name, Clock::Time, of_a_lender),
        (MACHINES[0].name, Clock::Instructions, counted),
        (MODEL_MACHINE, Clock::Time, of_a_model),
        (GRACE_MACHINE, Clock::Time, of_grace),
    ];
    let tables = tables.into_iter().filter(|(_, _, what)| !what.is_empty());
    tables.map(|(name, clock, what)| Ok((lab::named(name)?, clock, what))).collect()
}

/// Passes a line of the benchmarks on: the one of JSON to the table of all and to its file, the others to the terminal.
fn show(arguments: &Bench, line: &str, place: &str, figures: &mut Figures) -> Result<()> {
    if !line.starts_with('{') {
        peervram_programs::say!("{line}");
        return Ok(());
    }
    if let Some(file) = &arguments.json {
        let mut file = OpenOptions::new().append(true).open(file)?;
        writeln!(file, "{line}")?;
    }
    figures.read(line, place)
}

fn options(arguments: &Bench) -> Vec<String> {
    let mut words = vec!["--rounds".into(), arguments.rounds.to_string()];
    words.extend(["--cycles".into(), arguments.cycles.to_string()]);
    words.push("--json".into());
    words
}

/// Compiles the C programs next to the benchmarks, against the kernel headers of the private root.
fn compile_raw(benches: &Path, root: &Path) -> Result<[PathBuf; 2]> {
    let target = benches.ancestors().nth(2).context("the benchmarks lie in no target folder")?;
    let folder = target.join("raw");
    let include = folder.join("include");
    fs::create_dir_all(&include).with_context(|| format!("making {}", include.display()))?;
    // The kernel's headers and no others: the C library's are of this machine.
    for (name, of_the_root) in
        [("asm", "x86_64-linux-gnu/asm"), ("asm-generic", "asm-generic"), ("drm", "drm"), ("linux", "linux")]
    {
        let link = include.join(name);
        fs::remove_file(&link).ok();
        symlink(root.join("usr/include").join(of_the_root), &link)
            .with_context(|| format!("making {}", link.display()))?;
    }
    for name in RAW_PROGRAMS {
        compile(&include, name, &folder.join(name))?;
    }
    Ok(RAW_PROGRAMS.map(|name| folder.join(name)))
}

fn compile(include: &Path, name: &str, program: &Path) -> Result<()> {
    let source = Path::new(RAW_FOLDER).join(name).with_extension("c");
    let by = |how: &[&str]| {
        Command::new("cc")
            .args(["-O2", "-Wall", "-isystem"])
            .arg(include)
            .args(how)
            .arg("-o")
            .args([program, &source])
            .output()
            .context("starting the C compiler cc (package gcc)")
    };
    // Without a static C library the guest's own has to do.
    if !by(&["-static"])?.status.success() {
        let output = by(&[])?;
        if !output.status.success() {
            bail!("compiling {}: {}", source.display(), String::from_utf8_lossy(&output.stderr).trim_end());
        }
    }
    Ok(())
}
