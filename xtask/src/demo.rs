//! `cargo xtask demo`: the main job, on this machine or on a real kernel in the lab.

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use peervram_lab::Vm;
use peervram_lab::host::{self, Missing};
use peervram_lab::machines;
use peervram_lab::progress::step;
use peervram_lab::wire::{self, Stream};
use peervram_programs::picture::Picture;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use crate::build;
use crate::in_guest::Devices;
use crate::lab::{self, Setup};
use crate::terminal::{self, FAILED, Steps};
use crate::validation;
use peervram_programs::usage;

/// Longest silence of the program in the guest: a shader is compiled by an emulated CPU.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);

/// Lend a picture to another device, and see what it makes of it
///
/// Without --vm: host memory stands in for VRAM, and a Vulkan driver of this machine imports it. With
/// --vm: a virtual machine with a real kernel, where the memory is a VFIO device's VRAM, a second GPU
/// shows it on its screen, and Vulkan compute paints it over. Either ends with a picture and a table.
///
/// With --broker between two processes of two users, where root runs this: the one lends, the other borrows. Nobody's
/// process draws into memory that root's `peervram serve` lends, is told when it is taken back, stops, and draws again. With
/// --vm, too: root's process lends VRAM of a VFIO device and paints it, and nobody's shows it on the second GPU's screen.
/// The exit code is 0 only if every byte was right.
#[derive(Args)]
#[command(after_help = "Examples:
  cargo xtask demo                 on this machine; installs a Vulkan driver if there is none
  cargo xtask demo --vm            on a real kernel; makes the lab first, which takes some minutes once
  cargo xtask demo --broker        between two processes of two users, on this machine
  cargo xtask demo --broker --vm   the same on a real kernel")]
pub struct Arguments {
    /// In a virtual machine with a real kernel
    #[arg(long)]
    vm: bool,
    /// From one process to another, by a broker
    #[arg(long)]
    broker: bool,
    /// Which machine of the lab
    #[arg(long, requires = "vm", default_value = machines::STOCK, value_name = "NAME")]
    machine: String,
    /// Where to put the pictures
    #[arg(long, value_name = "FOLDER", default_value = "target/demo")]
    folder: PathBuf,
    #[command(flatten)]
    setup: Setup,
}

impl Arguments {
    /// Pictures in the usual place, nobody asked.
    pub fn usual(vm: bool, broker: bool) -> Arguments {
        Arguments {
            vm,
            broker,
            machine: machines::STOCK.into(),
            folder: "target/demo".into(),
            setup: Setup { yes: true },
        }
    }
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    fs::create_dir_all(&arguments.folder)
        .with_context(|| format!("making the folder {}", arguments.folder.display()))?;
    if arguments.vm { in_a_machine(arguments) } else { here(arguments) }
}

/// What this machine lacks for Vulkan.
pub fn missing_vulkan() -> Vec<Missing> {
    let has_driver = ["/usr/share/vulkan/icd.d", "/etc/vulkan/icd.d", "/usr/local/share/vulkan/icd.d"]
        .iter()
        .any(|folder| fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()))
        || std::env::var_os("VK_DRIVER_FILES").is_some();
    if has_driver && host::has_library("libvulkan.so.1") {
        return Vec::new();
    }
    vec![Missing {
        packages: &["libvulkan1", "mesa-vulkan-drivers"],
        why: "the Vulkan loader and Mesa's drivers, one of which needs no GPU",
    }]
}

fn here(arguments: &Arguments) -> Result<ExitCode> {
    terminal::install(&missing_vulkan(), arguments.setup.yes)?;
    let program = &build::command_line()?;
    let picture = arguments.folder.join(if arguments.broker { "broker.png" } else { "demo.png" });
    // Nobody has to install the layers for a demo; where they are, they look on.
    let watched = if validation::is_there() { validation::environment()? } else { Vec::new() };
    let status = Command::new(program)
        .envs(watched)
        .arg("demo")
        .args(arguments.broker.then_some("--broker"))
        .arg("--output")
        .arg(&picture)
        .arg("--card")
        .arg(arguments.folder.join("card.png"))
        .status()
        .with_context(|| format!("starting {}", program.display()))?;
    Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(FAILED)))
}

fn in_a_machine(arguments: &Arguments) -> Result<ExitCode> {
    let Some(machine) = machines::named(&arguments.machine) else {
        let reason = format!("no machine {:?}; `cargo xtask lab list` shows them", arguments.machine);
        bail!(usage(reason));
    };
    let steps = Steps::default();
    let lab = lab::open(&arguments.setup, &steps)?;
    let program = build::command_line()?;
    lab.prepare(machine)?;
    let booting = format!("booting {}: {}", machine.name, machine.about);
    let mut vm = step(&steps, &booting, || lab.boot(machine))?;
    peervram_programs::say!("Linux {} on {}, {}\n", vm.release(), machine.name, machine.about);

    let Devices { lender, node, .. } = Devices::find(&mut vm, &program)?;
    let node = node.context("`peervram devices` names no node of a device that can import")?;

    if arguments.broker {
        open_to_all(&mut vm, &node)?;
    }

    let guest_file = |name: &str| format!("{}/{name}", wire::SHARE);
    let mut screens = Vec::new();
    let (card, painted) = (guest_file("card.png"), guest_file("painted.png"));
    let mut words = vec!["demo", "--lender", &lender, "--show", &node, "--step"];
    words.extend(["--card", &card, "--output", &painted]);
    words.extend(arguments.broker.then_some("--broker"));
    let exit = vm.run_watched(&program, &words, &BTreeMap::new(), SILENCE_LIMIT, |vm, stream, line| {
        if stream == Stream::Stdout && line.ends_with("is on the screen") {
            screens.push(vm.screendump()?);
            return vm.input("");
        }
        match stream {
            // Where it lies in the guest; where it lies here is said below.
            Stream::Stdout if line.starts_with("Picture: ") => {}
            Stream::Stdout => peervram_programs::say!("{line}"),
            Stream::Stderr if !line.ends_with("is on the screen") => peervram_programs::note!("{line}"),
            Stream::Stderr => {}
        }
        Ok(())
    })?;
    if exit.code != 0 {
        bail!("the demo in the guest ended with code {}", exit.code);
    }
    let [first, second] = &screens[..] else { bail!("the demo showed {} pictures, not two", screens.len()) };
    let named = |name: &str| if arguments.broker { format!("broker-{name}") } else { name.to_owned() };
    let equal = [
        compare(&vm, arguments, "card.png", first, &named("screen-card.png"))?,
        compare(&vm, arguments, "painted.png", second, &named("screen-painted.png"))?,
    ];
    Ok(ExitCode::from(if equal == [true, true] { 0 } else { FAILED }))
}

/// Lets every user of the guest open a node, as a rule of udev or a login does on a machine that has these.
fn open_to_all(vm: &mut Vm, node: &str) -> Result<()> {
    let folder = tempfile::tempdir().context("making a folder for a script")?;
    let script = folder.path().join("open-node.sh");
    fs::write(&script, format!("#!/bin/sh\nexec chmod 666 {node}\n")).context("writing a script")?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).context("making a script executable")?;
    let exit = vm.run(&script, &[])?;
    ensure!(exit.code == 0, "{node} is not opened to the guest's users: {}", exit.stderr);
    Ok(())
}

/// Compares what was in VRAM, as the lender saw it, with what the other GPU showed; keeps both.
fn compare(vm: &Vm, arguments: &Arguments, name: &str, screen: &Picture, screen_name: &str) -> Result<bool> {
    let folder = &arguments.folder;
    fs::copy(vm.shared_folder().join(name), folder.join(name)).with_context(|| format!("fetching {name}"))?;
    let memory = Picture::load(&folder.join(name)).with_context(|| format!("reading {name}"))?;
    screen.save(&folder.join(screen_name)).with_context(|| format!("writing {screen_name}"))?;
    let wrong = screen.count_differing(&memory);
    let equal = wrong == 0;
    peervram_programs::say!(
        "{}: {} x {} pixels on the screen, {}",
        folder.join(screen_name).display(),
        screen.width(),
        screen.height(),
        if equal {
            format!("all equal to {name} in VRAM")
        } else {
            format!("WRONG: {wrong} differ from {name}")
        }
    );
    Ok(equal)
}
