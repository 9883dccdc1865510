//! The lab itself: the private root, the programs for the guest, and the way to a machine.

use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use crate::folder::Folder;
use crate::kernel::Kernel;
use crate::kernel::{holder, initrd, selftests};
use crate::machine::{Architecture, BLOCKS_BYTES, Device, Machine, device_tree, grace};
use crate::progress::Progress;
use crate::root::cache;
use crate::root::{Purpose, Root};
use crate::vm::Vm;
use crate::vm::model::Model;
use crate::vm::qemu::{Clock, Qemu};
use crate::vm::{driver, validation, wire};

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
    /// The library that stands in for kernel drivers of GPUs (package `peervram-lab-drm`).
    pub drm: PathBuf,
    /// Builds what guests of arm64 run, when the first of them is made ready. The error is [`Absent`] where that cannot be
    /// had on this host.
    pub for_arm64: fn() -> Result<GuestPrograms>,
}

/// What a guest of another architecture runs: programs that need no library.
#[derive(Clone, Debug)]
pub struct GuestPrograms {
    /// As [`Programs::agent`].
    pub agent: PathBuf,
    /// As [`Programs::command_line`].
    pub command_line: PathBuf,
}

/// An error that is no failure: this host cannot have what machines of one kind need. Their tests are skipped.
#[derive(Debug)]
pub struct Absent(pub String);

impl std::fmt::Display for Absent {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Absent {}

/// A lab that is ready to boot machines.
pub struct Lab<'a> {
    root: Root,
    programs: Programs,
    /// More of them, by their names.
    more: Vec<PathBuf>,
    /// [`Programs::for_arm64`], once they are built.
    for_arm64: Mutex<Option<GuestPrograms>>,
    progress: &'a dyn Progress,
}

/// The kernels of machines, fetched or built where they are not there, with the private root that this takes. No
/// program of this workspace is needed.
pub fn kernels<'m>(machines: &[&'m Machine], progress: &dyn Progress) -> Result<Vec<(&'m Machine, Kernel)>> {
    let open = |machine: &&'m Machine| {
        let root = Root::open(progress, machine.architecture().into())?;
        Ok((*machine, Kernel::open(&root, machine.kernel, progress)?))
    };
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
        Ok(Lab { root, programs, more: Vec::new(), for_arm64: Mutex::default(), progress })
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
        Kernel::open(&self.root_of(machine)?, machine.kernel, self.progress)
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
    ///
    /// # Errors
    /// [`Absent`] where this host cannot have it.
    pub fn prepare(&self, machine: &Machine) -> Result<()> {
        self.guest_programs(machine)?;
        let (root, kernel) = (self.root_of(machine)?, self.kernel(machine)?);
        initrd::open(&root, &kernel, &machine.modules(), self.progress)?;
        if let Some(own) = &kernel.own {
            holder::open(&root, own, self.progress)?;
        }
        Ok(())
    }

    /// The private root with that machine's QEMU and compiler, made if it does not exist.
    fn root_of(&self, machine: &Machine) -> Result<Root> {
        match machine.architecture() {
            Architecture::X86 => Ok(self.root.clone()),
            other => Root::open(self.progress, other.into()),
        }
    }

    /// What runs in that machine.
    fn guest_programs(&self, machine: &Machine) -> Result<GuestPrograms> {
        let Programs { agent, command_line, for_arm64, .. } = &self.programs;
        if machine.architecture() == Architecture::X86 {
            return Ok(GuestPrograms { agent: agent.clone(), command_line: command_line.clone() });
        }
        let mut built = self.for_arm64.lock().unwrap_or_else(PoisonError::into_inner);
        match &*built {
            Some(programs) => Ok(programs.clone()),
            None => Ok(built.insert(for_arm64()?).clone()),
        }
    }

    /// Boots a machine and waits until its agent is up.
    pub fn boot(&self, machine: &Machine) -> Result<Vm> {
        self.boot_by(machine, Clock::Time)
    }

    /// The same, with a clock that goes by something else than time.
    pub fn boot_by(&self, machine: &Machine, clock: Clock) -> Result<Vm> {
        let folder = self.lay_out(machine)?;
        let models = self.start_models(machine, &folder)?;
        let (qemu, channel) = Qemu::start(&self.root_of(machine)?, machine, clock, folder.path())
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
        Qemu::interact(&self.root_of(machine)?, machine, folder.path())
    }

    fn start_models(&self, machine: &Machine, folder: &Folder) -> Result<Vec<Model>> {
        Model::start_all(&self.programs.model, machine, folder.path())
            .with_context(|| format!("starting the model GPUs of machine {}", machine.name))
    }

    /// The folder that a QEMU needs, with everything in it.
    fn lay_out(&self, machine: &Machine) -> Result<Folder> {
        let GuestPrograms { agent, command_line } = self.guest_programs(machine)?;
        let (root, kernel) = (self.root_of(machine)?, self.kernel(machine)?);
        let initrd = initrd::open(&root, &kernel, &machine.modules(), self.progress)?;
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
            (&agent, "share/agent"),
            (&command_line, "share/peervram"),
            (&self.programs.layer, "share/layers/layer.so"),
            (&self.programs.drm, &format!("share/{}", driver::LIBRARY)),
        ] {
            fs::copy(from, place.join(to))
                .with_context(|| format!("copying {} to {}", from.display(), place.display()))?;
        }
        // They are linked against libraries of the private root.
        for program in self.more.iter().filter(|_| machine.architecture().is_the_hosts()) {
            share(place, program)?;
        }
        let shared = place.join("share");
        let layer = Path::new(wire::SHARE).join(LAYERS).join("layer.so");
        fs::write(shared.join(LAYERS).join("layer.json"), peervram_lab_layer::manifest(&layer))?;
        fs::write(shared.join(validation::SETTINGS), validation::settings(validation::LOG_IN_GUEST))?;
        grace::lay_out(machine, place)?;
        if device_tree::differs(machine) {
            let tree = device_tree::of(machine, &Qemu::device_tree(&root, machine, place)?)?;
            fs::write(place.join(device_tree::FILE), tree).context("writing the device tree")?;
        }
        if let Some(own) = &kernel.own {
            share(place, &holder::open(&root, own, self.progress)?)?;
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
