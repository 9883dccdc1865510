//! `cargo xtask demo`: the main job, on this machine or on a real kernel in the lab.

use anyhow::{Context, Result, bail};
use clap::Args;
use peervram_lab::Vm;
use peervram_lab::host::{self, Missing};
use peervram_lab::machines;
use peervram_lab::progress::step;
use peervram_lab::wire::{self, Stream};
use peervram_programs::picture::Picture;
use std::collections::BTreeMap;
use std::fs;
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
#[derive(Args)]
#[command(after_help = "Examples:
  cargo xtask demo        on this machine; installs a Vulkan driver if there is none
  cargo xtask demo --vm   on a real kernel; makes the lab first, which takes some minutes once")]
pub struct Arguments {
    /// In a virtual machine with a real kernel
    #[arg(long)]
    vm: bool,
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
    pub fn usual(vm: bool) -> Arguments {
        Arguments {
            vm,
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
    let picture = arguments.folder.join("demo.png");
    // Nobody has to install the layers for a demo; where they are, they look on.
    let watched = if validation::is_there() { validation::environment()? } else { Vec::new() };
    let status = Command::new(program)
        .envs(watched)
        .arg("demo")
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

    let guest_file = |name: &str| format!("{}/{name}", wire::SHARE);
    let mut screens = Vec::new();
    let exit = vm.run_watched(
        &program,
        &[
            "demo",
            "--lender",
            &lender,
            "--show",
            &node,
            "--step",
            "--card",
            &guest_file("card.png"),
            "--output",
            &guest_file("painted.png"),
        ],
        &BTreeMap::new(),
        SILENCE_LIMIT,
        |vm, stream, line| {
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
        },
    )?;
    if exit.code != 0 {
        bail!("the demo in the guest ended with code {}", exit.code);
    }
    let [first, second] = &screens[..] else { bail!("the demo showed {} pictures, not two", screens.len()) };
    let equal = [
        compare(&vm, arguments, "card.png", first, "screen-card.png")?,
        compare(&vm, arguments, "painted.png", second, "screen-painted.png")?,
    ];
    Ok(ExitCode::from(if equal == [true, true] { 0 } else { FAILED }))
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
