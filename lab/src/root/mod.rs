//! The private root: a small Debian in the user's cache folder with QEMU, Mesa, busybox and what
//! it takes to build a kernel. Others are made only when they are wanted: one with a browser, when a page is looked at, and one for
//! machines of another architecture.
//!
//! QEMU runs in it, apt fetches kernels in it, gcc builds them in it, and the guest mounts it read-only as its own
//! userland. Nothing is installed on the host. mmdebstrap makes it, from the archive that the
//! host itself uses if that is a Debian archive.

pub mod cache;
pub mod host;

use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::architecture::Architecture;
use crate::progress::{Progress, step};

const SUITE: &str = "trixie";

/// What a root is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Virtual machines, their kernels, and the userland of their guests.
    Lab,
    /// Machines of 64-bit Arm and their kernels. Its programs are the host's, but for busybox.
    LabArm64,
    /// A browser without a screen. Its programs have no network.
    Browser,
}

impl From<Architecture> for Purpose {
    fn from(architecture: Architecture) -> Self {
        match architecture {
            Architecture::X86 => Self::Lab,
            Architecture::Arm64 => Self::LabArm64,
        }
    }
}

impl Purpose {
    fn packages(self) -> &'static [&'static str] {
        match self {
            Self::Lab => OF_THE_LAB,
            Self::LabArm64 => OF_ARM64,
            Self::Browser => &["chromium-headless-shell", "fonts-liberation"],
        }
    }

    /// mmdebstrap's options for it alone.
    fn options(self) -> &'static [&'static str] {
        match self {
            Self::LabArm64 => &["--architectures=amd64,arm64"],
            Self::Lab | Self::Browser => &[],
        }
    }

    fn about(self) -> &'static str {
        match self {
            Self::Lab => "making the private root (Debian, QEMU, Mesa, gcc; about a minute)",
            Self::LabArm64 => {
                "making the private root for arm64 (Debian, QEMU, a cross compiler; about a minute)"
            }
            Self::Browser => "making the browser's private root (Debian, Chromium; about a minute)",
        }
    }
}

const OF_THE_LAB: &[&str] = &[
    "bc",
    "bison",
    "busybox-static",
    "ca-certificates",
    "flex",
    "gcc",
    "glslang-tools",
    "kmod",
    "libc6-dev",
    "libegl1",
    "libelf-dev",
    "libgbm1",
    "libvulkan1",
    "linux-libc-dev",
    "make",
    "mesa-drm-shim",
    "mesa-vulkan-drivers",
    "qemu-system-gui",
    "qemu-system-modules-opengl",
    "qemu-system-x86",
    "seabios",
    "virgl-server",
    "vulkan-validationlayers",
    "xz-utils",
    "zstd",
];

const OF_ARM64: &[&str] = &[
    "bc",
    "bison",
    "busybox-static:arm64",
    "ca-certificates",
    "flex",
    "gcc",
    "gcc-aarch64-linux-gnu",
    "kmod",
    "libc6-dev",
    "make",
    "qemu-system-arm",
    "xz-utils",
];

/// mmdebstrap's options. Backports are preferred as a whole: asking for single packages from
/// there leaves QEMU with a firmware that is too old for it.
const OPTIONS: &[&str] = &[
    "--variant=apt",
    "--format=tar",
    r#"--aptopt=APT::Default-Release "trixie-backports""#,
    r#"--aptopt=APT::Install-Recommends "false""#,
    r#"--aptopt=APT::Sandbox::User "root""#,
    r#"--aptopt=Acquire::Languages "none""#,
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/info/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
    "--dpkgopt=path-exclude=/usr/share/man/*",
];

/// Adds backports beside the archive that mmdebstrap chose, in either of apt's formats.
const BACKPORTS_HOOK: &str = r#"--setup-hook=cd "$1/etc/apt";
    for list in sources.list sources.list.d/*.list; do
        [ ! -e "$list" ] || sed -n 's/ trixie main$/ trixie-backports main/p' "$list";
    done >backports.list;
    mv backports.list sources.list.d/backports.list;
    for list in sources.list.d/*.sources; do
        [ ! -e "$list" ] || sed -i 's/^Suites: trixie\b/& trixie-backports/' "$list";
    done"#;

/// Runs a program inside the root; see the script.
const ENTER: &str = include_str!("enter.sh");

/// A private root that exists.
#[derive(Clone, Debug)]
pub struct Root {
    folder: PathBuf,
    purpose: Purpose,
}

impl Root {
    /// The root, made if it does not exist or its recipe changed.
    pub fn open(progress: &dyn Progress, purpose: Purpose) -> Result<Root> {
        let mut recipe = vec![SUITE, BACKPORTS_HOOK];
        recipe.extend(purpose.packages());
        recipe.extend(OPTIONS);
        recipe.extend(purpose.options());
        let name = format!("root-{}", cache::key(&recipe));
        let folder = cache::entry(&name, &["root/usr/bin"], |draft| {
            step(progress, purpose.about(), || make(draft, purpose))
        })?;
        Ok(Root { folder: folder.join("root"), purpose })
    }

    /// Where it lies on the host.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A program of the root, run inside it, with the host's `shared` folder as `/lab`. It sees
    /// a /dev of its own and dies with the thread that starts it.
    pub fn command(&self, shared: &Path, program: &str) -> Command {
        let mut command = Command::new("unshare");
        command.arg("--mount");
        if self.purpose == Purpose::Browser {
            command.arg("--net");
        }
        if !host::is_root() {
            command.args(["--user", "--map-root-user"]);
        }
        command.args(["sh", "-c", ENTER, "enter.sh"]).arg(&self.folder).arg(shared).arg(program);
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("LC_ALL", "C.UTF-8");
        command
    }

    /// Runs such a program to its end and gives what it printed.
    pub fn output(&self, shared: &Path, program: &[&str]) -> Result<String> {
        let output = self
            .command(shared, program[0])
            .args(&program[1..])
            .stdin(Stdio::null())
            .output()
            .context("starting unshare")?;
        if !output.status.success() {
            bail!(
                "`{}` in the private root {}: {}\n{}",
                program.join(" "),
                self.folder.display(),
                output.status,
                String::from_utf8_lossy(&output.stderr).trim_end()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Lets programs in the root find hosts by name as the host does now.
    pub fn take_name_service(&self) -> Result<()> {
        if let Ok(text) = fs::read("/etc/resolv.conf") {
            let file = self.folder.join("etc/resolv.conf");
            fs::remove_file(&file).ok();
            fs::write(&file, text).with_context(|| format!("writing {}", file.display()))?;
        }
        Ok(())
    }
}

/// mmdebstrap writes an archive and tar unpacks it: as root and without, the same way, and every
/// file belongs to the caller.
fn make(draft: &Path, purpose: Purpose) -> Result<()> {
    let folder = draft.join("root");
    fs::create_dir(&folder)?;
    let log = draft.join("mmdebstrap.log");

    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap.args(OPTIONS).args(purpose.options()).arg(BACKPORTS_HOOK);
    mmdebstrap.arg(format!("--include={}", purpose.packages().join(",")));
    mmdebstrap.args(proxy_options());
    mmdebstrap.args([SUITE, "-"]).args(host::debian_mirror());
    if host::is_root() {
        // A gigabyte of scratch space: beside the result rather than in a small /tmp.
        mmdebstrap.env("TMPDIR", draft);
    }
    let mut mmdebstrap = mmdebstrap
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(&log)?)
        .spawn()
        .context("starting mmdebstrap (package `mmdebstrap`)")?;
    let archive = mmdebstrap.stdout.take().context("mmdebstrap has no output")?;
    let tar = Command::new("tar")
        .args(["--extract", "--no-same-owner", "--exclude=./dev/*", "--directory"])
        .arg(&folder)
        .stdin(archive)
        .status();
    let status = mmdebstrap.wait().context("waiting for mmdebstrap")?;
    if !status.success() {
        bail!(
            "making the private root: mmdebstrap: {status}; it needs the network and, without \
             root, user namespaces. Its last words:\n{}",
            tail(&fs::read_to_string(&log).unwrap_or_default(), 15)
        );
    }
    let status = tar.context("starting tar")?;
    if !status.success() {
        bail!("unpacking the private root into {}: tar: {status}", folder.display());
    }
    fs::create_dir_all(folder.join("lab"))?;
    Ok(())
}

/// The proxies that the host's apt uses; mmdebstrap does not look there.
fn proxy_options() -> Vec<String> {
    ["Acquire::http::Proxy", "Acquire::https::Proxy"]
        .iter()
        .filter_map(|name| {
            let output = Command::new("apt-config").args(["--format", "%v%n", "dump", name]).output().ok()?;
            let value = String::from_utf8_lossy(&output.stdout).lines().next()?.trim().to_string();
            (!value.is_empty()).then(|| format!("--aptopt={name} \"{value}\""))
        })
        .collect()
}

/// The last lines of a text.
pub(crate) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
