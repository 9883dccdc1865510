//! A QEMU process: started in the private root, controlled over QMP, ended with its owner.
//!
//! Its folder on the host is `/lab` inside: kernel, initramfs, shim, the sockets on which QEMU
//! connects to us, the console's log, and `share`, which the guest sees.

use anyhow::{Context, Result, bail};
use serde_json::json;
use std::fs::{self, File};
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::machine::{Device, Machine, device_tree};
use crate::root::{Root, tail};
use crate::vm::change::Change;
use crate::vm::model;
use crate::vm::qmp::Qmp;

const START_LIMIT: Duration = Duration::from_secs(60);

/// Always: no devices but those asked for; the guest's reboot, which is how a panic ends, is the
/// end of QEMU.
const ALWAYS: &[&str] = &[
    "-nodefaults",
    "-no-user-config",
    "-no-reboot",
    "-vga",
    "none",
    "-kernel",
    "/lab/kernel",
    "-initrd",
    "/lab/initrd",
    "-fsdev",
    "local,id=share,path=/lab/share,security_model=none",
    "-device",
    "virtio-9p-pci,fsdev=share,mount_tag=share,addr=19.0",
];

/// The private root, for guests that can run its programs.
const USERLAND: &[&str] = &[
    "-fsdev",
    "local,id=root,path=/,readonly=on,security_model=none,multidevs=remap",
    "-device",
    "virtio-9p-pci,fsdev=root,mount_tag=root,addr=18.0",
];

/// Console and channel are the two serial ports; QEMU connects to us, so there is nothing to
/// wait for but the connection.
const CHANNELS: &[&str] = &[
    "-chardev",
    "file,id=console,path=/lab/console.log",
    "-serial",
    "chardev:console",
    "-chardev",
    "socket,id=channel,path=/lab/channel",
    "-serial",
    "chardev:channel",
    "-chardev",
    "socket,id=qmp,path=/lab/qmp",
    "-mon",
    "chardev=qmp,mode=control",
];

/// Nothing is drawn.
const NO_DISPLAY: &[&str] = &["-display", "none"];

/// OpenGL and Vulkan for a GPU with 3D, both Mesa's for CPUs, whatever the host has: no GPU of it is in the root's /dev.
/// SDL's driver without a screen takes EGL, so that no X server is needed. Mesa's cache of shaders goes to the root's
/// /tmp, which is of this mount namespace.
const DISPLAY_3D: &[&str] = &["-display", "sdl,gl=on"];
const ENVIRONMENT_3D: &[&str] = &[
    "SDL_VIDEODRIVER=offscreen",
    "VK_DRIVER_FILES=/usr/share/vulkan/icd.d/lvp_icd.json",
    "HOME=/tmp",
    "XDG_RUNTIME_DIR=/tmp",
];

/// For speed, as every instruction is emulated: few lines on the console (warnings and worse), no
/// defences against anybody, no self-tests, and no certificates: checking the modules' signatures
/// takes a second. A virtual IOMMU cannot isolate interrupts; without the last two VFIO refuses it.
const COMMAND_LINE: &str = "panic=-1 loglevel=5 mitigations=off init_on_alloc=0 \
    audit=0 nokaslr nowatchdog random.trust_cpu=on \
    rcupdate.rcu_expedited=1 cryptomgr.notests initcall_blacklist=load_system_certificate_list \
    vfio_iommu_type1.allow_unsafe_interrupts=1 iommufd.allow_unsafe_interrupts=1";

/// What a guest's clock goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// Time. Its CPUs run beside each other.
    Time,
    /// One nanosecond for each instruction of the guest, whatever the host does meanwhile, and on to the next timer while
    /// nothing runs. Its CPUs take turns.
    Instructions,
}

impl Clock {
    fn arguments(self) -> &'static [&'static str] {
        match self {
            Clock::Time => &["-accel", "tcg,thread=multi"],
            Clock::Instructions => &["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"],
        }
    }
}

/// A running QEMU. Dropping it ends it.
pub struct Qemu {
    child: Child,
    qmp: Qmp,
    folder: PathBuf,
    machine: Machine,
    changes: u32,
}

impl Qemu {
    /// Starts a machine whose files are in `folder`; gives it and the guest's channel.
    pub fn start(root: &Root, machine: &Machine, clock: Clock, folder: &Path) -> Result<(Qemu, UnixStream)> {
        let channel = UnixListener::bind(folder.join("channel"))
            .with_context(|| format!("making a socket in {}", folder.display()))?;
        let qmp = UnixListener::bind(folder.join("qmp"))?;
        let child = command(root, machine, folder)
            .args(clock.arguments())
            .args(CHANNELS)
            .arg("-append")
            .arg(command_line(machine))
            .stdin(Stdio::null())
            .stdout(File::create(folder.join("qemu.log"))?)
            .stderr(File::options().append(true).open(folder.join("qemu.log"))?)
            .spawn()
            .context("starting unshare (package `util-linux`)")?;
        let mut starting = Starting { child: Some(child), folder };
        let channel = starting.accept(&channel)?;
        let qmp = Qmp::new(starting.accept(&qmp)?);
        // What QEMU does not like about its devices it says after it has connected.
        let qmp = qmp.with_context(|| format!("QEMU says\n{}", last_words(folder, 20)))?;
        let qemu = Qemu {
            child: starting.child.take().expect("taken once"),
            qmp,
            folder: folder.into(),
            machine: *machine,
            changes: 0,
        };
        Ok((qemu, channel))
    }

    /// Starts a machine with its console here and a shell in the guest; returns at its end.
    pub fn interact(root: &Root, machine: &Machine, folder: &Path) -> Result<()> {
        let status = command(root, machine, folder)
            .args(Clock::Time.arguments())
            .args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"])
            .args(["-serial", "null"])
            .arg("-append")
            .arg(format!("{} peervram.shell", command_line(machine)))
            .status()
            .context("starting unshare (package `util-linux`)")?;
        if !status.success() {
            bail!("QEMU ended with {status}");
        }
        Ok(())
    }

    /// The device tree that it makes for a machine's board, which bridges and devices are no part of.
    pub fn device_tree(root: &Root, machine: &Machine, folder: &Path) -> Result<Vec<u8>> {
        const FILE: &str = "device-tree.qemu";
        let dump = format!("dumpdtb=/lab/{FILE}");
        let board = machine.board_arguments();
        // The second serial port is only there if something is behind it.
        let mut words =
            vec![machine.architecture().qemu(), "-nodefaults", "-serial", "null", "-serial", "null"];
        words.extend(NO_DISPLAY);
        words.extend(board.iter().map(String::as_str));
        words.extend(["-machine", &dump]);
        root.output(folder, &words).context("asking QEMU for its device tree")?;
        let path = folder.join(FILE);
        fs::read(&path).with_context(|| format!("reading {}", path.display()))
    }

    /// Writes what the virtio GPU shows into a file of the shared folder (PPM).
    pub fn screendump(&mut self, name: &str) -> Result<()> {
        let screen = self.machine.devices.iter().position(|device| *device == Device::VirtioGpu);
        let screen = screen.context("this machine has no virtio GPU whose screen can be dumped")?;
        let screen = Device::qemu_name(screen, 0);
        let file = format!("/lab/share/{name}");
        self.qmp.execute("screendump", json!({ "filename": file, "device": screen }))?;
        Ok(())
    }

    /// Does something to a device.
    pub fn change(&mut self, change: Change) -> Result<()> {
        self.changes += 1;
        change.make(&self.machine, self.changes, &mut self.qmp)
    }

    /// The last lines of the guest's console, QEMU's own complaints after them.
    pub fn last_words(&self, lines: usize) -> String {
        last_words(&self.folder, lines)
    }
}

/// QEMU with that machine, still without a way to talk to it.
fn command(root: &Root, machine: &Machine, folder: &Path) -> Command {
    let mut command = root.command(folder, "env");
    command.arg("LD_PRELOAD=/lab/shim.so");
    let display = if machine.has_venus() {
        command.args(ENVIRONMENT_3D);
        DISPLAY_3D
    } else {
        NO_DISPLAY
    };
    let architecture = machine.architecture();
    command.arg(architecture.qemu()).args(ALWAYS);
    // Before the machine's other root buses, which QEMU would put it on.
    if architecture.is_the_hosts() {
        command.args(USERLAND);
    }
    command.args(display).args(machine.qemu_arguments()).args(device_tree::qemu_arguments(machine));
    command
}

/// What the kernel is told.
fn command_line(machine: &Machine) -> String {
    format!("{} {COMMAND_LINE} {}", machine.architecture().command_line(), machine.command_line())
}

impl Drop for Qemu {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// A QEMU that has not connected yet; dropped without having done so, it is ended.
struct Starting<'a> {
    child: Option<Child>,
    folder: &'a Path,
}

impl Starting<'_> {
    fn accept(&mut self, listener: &UnixListener) -> Result<UnixStream> {
        let child = self.child.as_mut().expect("not taken yet");
        let start = Instant::now();
        listener.set_nonblocking(true)?;
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    return Ok(stream);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("waiting for QEMU"),
            }
            if let Some(status) = child.try_wait()? {
                bail!("QEMU does not start: {status}\n{}", last_words(self.folder, 20));
            }
            if start.elapsed() > START_LIMIT {
                bail!("QEMU does not connect within {} s", START_LIMIT.as_secs());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            end(child);
        }
    }
}

/// The guest has nothing to lose, so there is nothing to say goodbye to.
fn end(child: &mut Child) {
    child.kill().ok();
    child.wait().ok();
}

/// The end of the guest's console, or what began the end, then QEMU's own complaints, then what
/// its model GPUs said.
fn last_words(folder: &Path, lines: usize) -> String {
    let read = |name: &str| {
        let text = fs::read(folder.join(name)).unwrap_or_default();
        String::from_utf8_lossy(&text).replace('\r', "")
    };
    let console = read("console.log");
    let all: Vec<&str> = console.lines().collect();
    let begins_the_end = |line: &&str| {
        ["BUG: ", "Oops: ", "Kernel panic", "sysrq: Trigger a crash"].iter().any(|word| line.contains(word))
    };
    let console = match all.iter().position(begins_the_end) {
        Some(first) => all[first..all.len().min(first + lines)].join("\n"),
        None => tail(&console, lines),
    };
    // The first: one fault that repeats has a beginning.
    let qemu: Vec<String> = read("qemu.log")
        .lines()
        // Said at each start: what the CPU has and its emulation lacks, and what is old.
        .filter(|line| !line.contains("requested feature") && !line.contains("is deprecated"))
        .take(lines)
        .map(ToString::to_string)
        .collect();
    let mut words = vec![console, qemu.join("\n")];
    words.extend(model::logs(folder).iter().map(|name| tail(&read(name), lines)));
    words.retain(|text| !text.is_empty());
    words.join("\n").trim().to_string()
}
