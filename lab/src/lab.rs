//! The lab itself: the private root, the programs for the guest, and the way to a machine.

use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::folder::Folder;
use crate::kernel::Kernel;
use crate::kernel::{holder, initrd, selftests};
use crate::machine::{BLOCKS_BYTES, Device, Machine, grace};
use crate::progress::Progress;
use crate::root::cache;
use crate::root::{Purpose, Root};
use crate::vm::Vm;
use crate::vm::model::Model;
use crate::vm::qemu::{Clock, Qemu};
use crate::vm::{validation, wire};

/// The folder of our layer in the guest's [`wire::SHARE`].
pub const LAYERS: &str = "layers";

/// What the lab needs of this workspace, built.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The guest's agent and its tests (package `peervram-lab-guest`).
    pub agent: PathBuf,
    /// The command line (package `peervram`), for tests of what it says.
    pub command_line: PathBuf,
    /// The library that answers for udmabuf (package `peervram-lab-shim`).
    pub shim: PathBuf,
    /// What serves model GPUs (package `peervram-model`).
    pub model: PathBuf,
    /// The Vulkan layer that makes a driver seem another one (package `peervram-lab-layer`).
    pub layer: PathBuf,
}

/// A lab that is ready to boot machines.
pub struct Lab<'a> {
    root: Root,
    programs: Programs,
    /// More of them, by their names.
    more: Vec<PathBuf>,
    progress: &'a dyn Progress,
}

/// The kernels of machines, fetched or built where they are not there, with the private root that this takes. No
/// program of this workspace is needed.
pub fn kernels<'m>(machines: &[&'m Machine], progress: &dyn Progress) -> Result<Vec<(&'m Machine, Kernel)>> {
    let root = Root::open(progress, Purpose::Lab)?;
    let open = |machine: &&'m Machine| Ok((*machine, Kernel::open(&root, machine.kernel, progress)?));
    machines.iter().map(open).collect()
}

impl<'a> Lab<'a> {
    /// Opens the lab, making the private root if it is not there.
    pub fn open(programs: Programs, progress: &'a dyn Progress) -> Result<Lab<'a>> {
        let root = Root::open(progress, Purpose::Lab)?;
        root.output(Folder::new()?.path(), &["true"])
            .context("a mount namespace is refused: run as root, or where user namespaces are allowed")?;
        for name in cache::sweep()? {
            progress.note(&format!("{name} is removed from the cache: nobody has asked for it in two weeks"));
        }
        Ok(Lab { root, programs, more: Vec::new(), progress })
    }

    /// Gives the guests one more program, in [`wire::SHARE`]: one that takes the private root to build.
    #[must_use]
    pub fn with_program(mut self, program: PathBuf) -> Self {
        self.more.push(program);
        self
    }

    /// The private root's place on the host.
    pub fn root(&self) -> &Path {
        self.root.folder()
    }

    /// A program run inside the private root, which sees the host's `shared` folder as `/lab`: on this machine's kernel, with
    /// the root's libraries.
    pub fn command_in_root(&self, shared: &Path, program: &str) -> Command {
        self.root.command(shared, program)
    }

    /// Who is told of what takes long.
    pub fn progress(&self) -> &'a dyn Progress {
        self.progress
    }

    /// The programs that it was opened with.
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// The kernel of a machine, fetched if it is not there.
    pub fn kernel(&self, machine: &Machine) -> Result<Kernel> {
        Kernel::open(&self.root, machine.kernel, self.progress)
    }

    /// The programs of the kernel's own tests of VFIO, of that version, fetched and built if they are not there. One that did not
    /// build is not among them.
    pub fn selftests(&self, version: &str) -> Result<Vec<PathBuf>> {
        let folder = selftests::open(&self.root, version, self.progress)?;
        let files = fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?;
        let mut programs: Vec<PathBuf> = files
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.is_file() && path.extension().is_none())
            .collect();
        programs.sort_unstable();
        Ok(programs)
    }

    /// Makes ready all that a boot of that machine needs.
    pub fn prepare(&self, machine: &Machine) -> Result<()> {
        let kernel = self.kernel(machine)?;
        initrd::open(&self.root, &kernel, &machine.modules(), self.progress)?;
        if let Some(own) = &kernel.own {
            holder::open(&self.root, own, self.progress)?;
        }
        Ok(())
    }

    /// Boots a machine and waits until its agent is up.
    pub fn boot(&self, machine: &Machine) -> Result<Vm> {
        self.boot_by(machine, Clock::Time)
    }

    /// The same, with a clock that goes by something else than time.
    pub fn boot_by(&self, machine: &Machine, clock: Clock) -> Result<Vm> {
        let folder = self.lay_out(machine)?;
        let models = self.start_models(machine, &folder)?;
        let (qemu, channel) = Qemu::start(&self.root, machine, clock, folder.path())
            .with_context(|| format!("starting machine {}", machine.name))?;
        Vm::begin(qemu, models, channel, folder, machine.facts())
            .with_context(|| format!("booting machine {}", machine.name))
    }

    /// Boots a machine with its console on this terminal and a shell in it; `programs` are in
    /// the guest's [`wire::SHARE`].
    pub fn shell(&self, machine: &Machine, programs: &[PathBuf]) -> Result<()> {
        let folder = self.lay_out(machine)?;
        for program in programs {
            share(folder.path(), program)?;
        }
        let _models = self.start_models(machine, &folder)?;
        Qemu::interact(&self.root, machine, folder.path())
    }

    fn start_models(&self, machine: &Machine, folder: &Folder) -> Result<Vec<Model>> {
        Model::start_all(&self.programs.model, machine, folder.path())
            .with_context(|| format!("starting the model GPUs of machine {}", machine.name))
    }

    /// The folder that a QEMU needs, with everything in it.
    fn lay_out(&self, machine: &Machine) -> Result<Folder> {
        let kernel = self.kernel(machine)?;
        let initrd = initrd::open(&self.root, &kernel, &machine.modules(), self.progress)?;
        let folder = Folder::new()?;
        let place = folder.path();
        if machine.devices.contains(&Device::Storage) {
            fs::File::create(place.join("blocks"))?.set_len(BLOCKS_BYTES)?;
        }
        fs::create_dir_all(place.join("share").join(LAYERS))?;
        for (from, to) in [
            (&kernel.image, "kernel"),
            (&initrd, "initrd"),
            (&self.programs.shim, "shim.so"),
            (&self.programs.agent, "share/agent"),
            (&self.programs.command_line, "share/peervram"),
            (&self.programs.layer, "share/layers/layer.so"),
        ] {
            fs::copy(from, place.join(to))
                .with_context(|| format!("copying {} to {}", from.display(), place.display()))?;
        }
        for program in &self.more {
            share(place, program)?;
        }
        let shared = place.join("share");
        let layer = Path::new(wire::SHARE).join(LAYERS).join("layer.so");
        fs::write(shared.join(LAYERS).join("layer.json"), peervram_lab_layer::manifest(&layer))?;
        fs::write(shared.join(validation::SETTINGS), validation::settings(validation::LOG_IN_GUEST))?;
        grace::lay_out(machine, place)?;
        if let Some(own) = &kernel.own {
            share(place, &holder::open(&self.root, own, self.progress)?)?;
        }
        Ok(folder)
    }
}

/// Copies a program where the guest sees it; gives its path there.
pub(crate) fn share(folder: &Path, program: &Path) -> Result<String> {
    let name = program
        .file_name()
        .with_context(|| format!("{} names no program", program.display()))?
        .to_string_lossy();
    fs::copy(program, folder.join("share").join(&*name))
        .with_context(|| format!("copying {} for the guest", program.display()))?;
    Ok(format!("{}/{name}", wire::SHARE))
}
