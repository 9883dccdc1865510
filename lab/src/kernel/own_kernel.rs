//! The lab's own kernels: built from Debian's source, with what the machines have and no more.
//!
//! ```text
//! KernelSource   Debian's linux-source, unpacked in the cache
//!   + a change   lab/kernel/*.sh, of one flavour: made in a copy of the source, which is built instead
//!   + fragments  lab/kernel/*.config, on top of allnoconfig
//!   = an entry   build/  the objects, headers and symbols that modules are built against
//!                log     what make said; a build that fails leaves its log beside the entry
//! ```
//! An entry's key is made of the source's version, the fragments' text and the change's, so a changed
//! fragment is another kernel. Compiler and make run in the private root.

use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::architecture::Architecture;
use crate::kernel::source::KernelSource;
use crate::progress::{Progress, step};
use crate::root::cache;
use crate::root::{Root, tail};

/// One of the lab's own kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// The everyday kernel: everything built in, in `init` within two seconds.
    Small,
    /// The same, watching its locks, its sleeps and its DMA mappings.
    Lockdep,
    /// The everyday kernel of 64-bit Arm: the small one with other drivers for the machine itself.
    SmallArm64,
    /// The everyday kernel with the change of `docs/upstream/linux-dma-buf-several-ranges.md` in its source. The library knows such a
    /// kernel by the end of its release, which is this flavour's name.
    Mended,
}

impl Flavour {
    /// All of them.
    pub const ALL: [Flavour; 4] = [Flavour::Small, Flavour::Lockdep, Flavour::SmallArm64, Flavour::Mended];

    /// What a person types, and what the kernel's release ends with.
    pub fn name(self) -> &'static str {
        match self {
            Flavour::Small => "small",
            Flavour::Lockdep => "lockdep",
            Flavour::SmallArm64 => "small-arm64",
            Flavour::Mended => "mended",
        }
    }

    /// For which processors.
    pub const fn architecture(self) -> Architecture {
        match self {
            Flavour::Small | Flavour::Lockdep | Flavour::Mended => Architecture::X86,
            Flavour::SmallArm64 => Architecture::Arm64,
        }
    }

    /// Its configuration, each fragment on top of the one before.
    fn fragments(self) -> &'static [&'static str] {
        const SMALL: &str = include_str!("../../kernel/small.config");
        const LOCKDEP: &str = include_str!("../../kernel/lockdep.config");
        const ARM64: &str = include_str!("../../kernel/arm64.config");
        match self {
            Flavour::Small | Flavour::Mended => &[SMALL],
            Flavour::Lockdep => &[SMALL, LOCKDEP],
            Flavour::SmallArm64 => &[SMALL, ARM64],
        }
    }

    /// The fragments as one: of an option that several name, the last word.
    fn configuration(self) -> String {
        let fragments = self.fragments();
        let mut text = String::new();
        for (number, fragment) in fragments.iter().enumerate() {
            let is_named_again = |name| {
                fragments[number + 1..].iter().flat_map(|later| options(later)).any(|later| later == name)
            };
            let lines = fragment.lines().filter(|line| !option(line).is_some_and(is_named_again));
            lines.for_each(|line| text.extend([line, "\n"]));
        }
        text
    }

    /// What is done to the source before it is built: a script, told where the tree is and where the copy is to be.
    fn change(self) -> Option<&'static str> {
        match self {
            Flavour::Mended => Some(include_str!("../../kernel/mended.sh")),
            Flavour::Small | Flavour::Lockdep | Flavour::SmallArm64 => None,
        }
    }

    /// What makes it another kernel than others of the same name: the parts of its entry's key.
    fn made_from(self, source_version: &str) -> Vec<&str> {
        let mut parts = vec![source_version, CONFIGURE];
        parts.extend(self.fragments());
        parts.extend(self.change());
        parts
    }

    /// How many files make will say that it makes; only people are told.
    fn about_steps(self) -> usize {
        match self {
            Flavour::Small | Flavour::Mended => 2100,
            Flavour::Lockdep => 2150,
            Flavour::SmallArm64 => 2000,
        }
    }
}

/// The option that a line of a fragment sets.
fn option(line: &str) -> Option<&str> {
    Some(line.split_once('=')?.0).filter(|name| name.starts_with("CONFIG_"))
}

fn options(fragment: &str) -> impl Iterator<Item = &str> {
    fragment.lines().filter_map(option)
}

/// How a kernel is built for an architecture.
struct Recipe {
    /// What make is told by its environment, configuring, building and building modules.
    environment: &'static [&'static str],
    /// What is made beside the modules.
    goal: &'static str,
    /// Where that is in the folder of the build, and its name in the cache.
    built: &'static str,
    image: &'static str,
    /// Copies one to the other.
    copy: &'static [&'static str],
}

impl Recipe {
    fn of(architecture: Architecture) -> Recipe {
        match architecture {
            // QEMU loads the plain kernel; symbols are for debuggers.
            Architecture::X86 => Recipe {
                environment: &[],
                goal: "vmlinux",
                built: "vmlinux",
                image: "vmlinux",
                copy: &["objcopy", "--strip-all"],
            },
            Architecture::Arm64 => Recipe {
                environment: &["ARCH=arm64", "CROSS_COMPILE=aarch64-linux-gnu-"],
                goal: "Image",
                built: "arch/arm64/boot/Image",
                image: "Image",
                copy: &["mv"],
            },
        }
    }

    /// make, with what it is told. Programs are found in the private root's own way.
    fn make(&self) -> Vec<&'static str> {
        let mut words = vec!["env"];
        words.extend(self.environment);
        words.push("make");
        words
    }
}

/// A kernel that was built.
#[derive(Clone, Debug)]
pub struct OwnKernel {
    /// Its cache folder.
    pub folder: PathBuf,
    /// What `uname -r` says.
    pub release: String,
    /// The image.
    pub image: PathBuf,
    architecture: Architecture,
    source: KernelSource,
}

impl OwnKernel {
    /// The kernel of that version and flavour, built if it is not there.
    pub fn open(root: &Root, version: &str, flavour: Flavour, progress: &dyn Progress) -> Result<OwnKernel> {
        let source = KernelSource::open(root, version, progress)?;
        let key = cache::key(&flavour.made_from(source.version()));
        let name = format!("kernel-{}-{key}", flavour.name());
        let Recipe { image, .. } = Recipe::of(flavour.architecture());
        let folder = cache::entry(&name, &[image, RELEASE], |draft| {
            let what = format!("building the {} kernel (about ten minutes on two cores)", flavour.name());
            step(progress, &what, || build(root, &source, flavour, draft, progress))
        })?;
        let release = fs::read_to_string(folder.join(RELEASE))
            .with_context(|| format!("no kernel in {}", folder.display()))?;
        let (image, architecture) = (folder.join(image), flavour.architecture());
        Ok(OwnKernel { folder, release: release.trim().into(), image, architecture, source })
    }

    /// Builds the module in `draft`, a folder in the lab's cache, against this kernel.
    pub(crate) fn build_module(&self, root: &Root, draft: &Path) -> Result<()> {
        let tree = inside(&self.source.tree())?;
        let build = format!("O={}", inside(&self.folder.join("build"))?);
        let module = format!("M={}", inside(draft)?);
        let mut make = Recipe::of(self.architecture).make();
        make.extend(["-C", &tree, &build, &module, "modules"]);
        root.output(&cache::folder()?, &make)?;
        Ok(())
    }
}

/// Where a build says which release it is.
const RELEASE: &str = "build/include/config/kernel.release";

/// Configures: `$1` is the source's tree, `$2` the folder for the build, `$3` the fragments.
/// Kconfig drops a line whose dependencies are not met without a word; this does not.
const CONFIGURE: &str = r#"set -eu
make -C "$1" O="$2" KCONFIG_ALLCONFIG="$3" allnoconfig
grep ^CONFIG_ "$3" | while IFS='=' read -r name value; do
    case $value in
        n) ! grep -q "^$name=" "$2/.config" ;;
        *) grep -qxF "$name=$value" "$2/.config" ;;
    esac || echo "$name=$value is asked for, but this source's Kconfig does not give it"
done >"$2/lost"
cat "$2/lost"
[ ! -s "$2/lost" ]
"#;

fn build(
    root: &Root,
    source: &KernelSource,
    flavour: Flavour,
    draft: &Path,
    progress: &dyn Progress,
) -> Result<()> {
    let build = draft.join("build");
    fs::create_dir(&build)?;
    let fragment = draft.join("fragment");
    fs::write(&fragment, flavour.configuration())?;
    // Beside the draft, which goes away if the build fails.
    let log = draft.with_extension("log");

    let original = inside(&source.tree())?;
    // Modules are built against the original later, so a change may not be to headers.
    let copy_of_tree = draft.join("tree");
    let tree = if flavour.change().is_some() { inside(&copy_of_tree)? } else { original.clone() };
    let output = inside(&build)?;
    let fragment = inside(&fragment)?;
    let jobs = std::thread::available_parallelism().map_or(1, |count| count.get());
    let recipe = Recipe::of(flavour.architecture());
    let mut configure = vec!["env"];
    configure.extend(recipe.environment);
    configure.extend(["sh", "-c", CONFIGURE, "configure", &tree, &output, &fragment]);
    let mut make = recipe.make();
    let (folder, version, jobs) =
        (format!("O={output}"), format!("LOCALVERSION=-{}", flavour.name()), format!("-j{jobs}"));
    make.extend([
        "-C",
        &tree,
        &folder,
        &version,
        // The names of the machine and of whoever builds are no part of the kernel.
        "KBUILD_BUILD_USER=lab",
        "KBUILD_BUILD_HOST=peervram",
        &jobs,
        recipe.goal,
        "modules",
    ]);
    let mut writer = File::create(&log).with_context(|| format!("writing {}", log.display()))?;
    let about = flavour.about_steps();
    let mut done = 0;
    let image = inside(&draft.join(recipe.image))?;
    let built = format!("{output}/{}", recipe.built);
    let mut copy = recipe.copy.to_vec();
    copy.extend([&*built, &*image]);
    let change = flavour.change().map(|script| vec!["sh", "-c", script, "change", &*original, &*tree]);
    for program in change.into_iter().chain([configure, make, copy]) {
        watch(root, &program, &mut writer, |line| {
            if is_step(line) {
                done += 1;
                progress.advance(done, done.max(about));
            }
        })
        .with_context(|| {
            let text = fs::read_to_string(&log).unwrap_or_default();
            format!(
                "building the {} kernel; the end of {}:\n{}",
                flavour.name(),
                log.display(),
                tail(&text, 30)
            )
        })?;
    }
    fs::rename(&log, draft.join("log")).with_context(|| format!("moving {}", log.display()))?;
    if flavour.change().is_some() {
        fs::remove_dir_all(&copy_of_tree).with_context(|| format!("removing {}", copy_of_tree.display()))?;
    }
    remove_objects(&build)
}

/// Runs a program in the root to its end, the lab's whole cache as `/lab`. Every line that it
/// says goes to the log and to `said`.
fn watch(root: &Root, program: &[&str], log: &mut File, mut said: impl FnMut(&str)) -> Result<()> {
    let mut child = root
        .command(&cache::folder()?, "sh")
        // One pipe for both, in the order in which they were said.
        .args(["-c", r#"exec "$@" 2>&1"#, "watch"])
        .args(program)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting unshare (package `util-linux`)")?;
    let output = child.stdout.take().context("the program has no output")?;
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("reading what make says")?;
        log.write_all(&line)?;
        log.write_all(b"\n")?;
        said(&String::from_utf8_lossy(&line));
    }
    let status = child.wait().context("waiting for make")?;
    if !status.success() {
        bail!("`{}` in the private root: {status}", program[0]);
    }
    Ok(())
}

/// Whether make says that it makes a file: "  CC      kernel/fork.o".
fn is_step(line: &str) -> bool {
    line.strip_prefix("  ").is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_uppercase()))
}

/// What was linked into the image goes; modules are built from headers, symbols and `scripts`.
fn remove_objects(folder: &Path) -> Result<()> {
    const KEPT: &[&str] = &["scripts", "tools"];
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            if !KEPT.iter().any(|name| path.ends_with(name)) {
                remove_objects(&path)?;
            }
        } else if is_linked(&path) {
            fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        }
    }
    Ok(())
}

fn is_linked(path: &Path) -> bool {
    path.extension().is_some_and(|suffix| suffix == "o" || suffix == "a")
        || path.file_name().is_some_and(|name| name.to_string_lossy().contains("vmlinux"))
}

/// The path inside the root of something in the lab's cache.
fn inside(path: &Path) -> Result<String> {
    let cache = cache::folder()?;
    let below = path
        .strip_prefix(&cache)
        .with_context(|| format!("{} is not in the lab's cache {}", path.display(), cache.display()))?;
    Ok(Path::new("/lab").join(below).to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn makes_lines_are_told_apart() {
        assert!(is_step("  CC      drivers/vfio/pci/vfio_pci_core.o"));
        assert!(is_step("  LD [M]  peervram-holder.ko"));
        assert!(!is_step("make[1]: Entering directory '/lab/kernel'"));
        assert!(!is_step("kernel/fork.c:12:1: warning: unused variable"));
        assert!(!is_step("  12 | int unused;"));
    }

    #[test]
    fn fragments_are_options_and_comments() {
        for flavour in Flavour::ALL {
            for line in flavour.fragments().iter().flat_map(|text| text.lines()) {
                let option = line.starts_with("CONFIG_") && line.contains('=');
                assert!(option || line.is_empty() || line.starts_with('#'), "{line:?}");
            }
        }
    }

    #[test]
    fn configurations_say_everything_once_and_the_last_word_counts() {
        for flavour in Flavour::ALL {
            let all = flavour.configuration();
            let mut names: Vec<_> = options(&all).collect();
            let count = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), count, "{}", flavour.name());
        }
        let arm64 = Flavour::SmallArm64.configuration();
        assert!(arm64.contains("\nCONFIG_INTEL_IOMMU=n\n") && !arm64.contains("CONFIG_INTEL_IOMMU=y"));
        assert!(arm64.contains("\nCONFIG_PCI_P2PDMA=y\n") && arm64.contains("\nCONFIG_ARM_SMMU_V3=y\n"));
        // Their entries in caches are named by this.
        assert_eq!(Flavour::Lockdep.configuration(), Flavour::Lockdep.fragments().concat());
    }

    #[test]
    fn the_mended_kernel_is_the_small_one_and_a_change() {
        let small = Flavour::Small.made_from("7.3.4-1");
        let mended = Flavour::Mended.made_from("7.3.4-1");
        assert_eq!(mended.split_last().unwrap().1, small);
        // Entries in caches are named by these parts: those of others are as they were.
        assert_eq!(small, ["7.3.4-1", CONFIGURE, Flavour::Small.fragments()[0]]);
    }

    /// A tree with the file that is changed, where it has these lines; and what the script makes of it: whether it ends
    /// well, and both files afterwards.
    fn mend(lines: &str) -> (bool, String, String) {
        const FILE: &str = "drivers/dma-buf/dma-buf-mapping.c";
        let folder = tempfile::tempdir().unwrap();
        let (tree, copy) = (folder.path().join("tree"), folder.path().join("copy"));
        fs::create_dir_all(tree.join("drivers/dma-buf")).unwrap();
        fs::write(tree.join(FILE), lines).unwrap();
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", Flavour::Mended.change().unwrap(), "change"]).args([&tree, &copy]);
        let is_done = shell.output().unwrap().status.success();
        let read = |tree: &Path| fs::read_to_string(tree.join(FILE)).unwrap();
        (is_done, read(&tree), read(&copy))
    }

    #[test]
    fn the_change_is_made_in_the_copy_alone_and_once() {
        const FAULTY: &str = "\t    phys_vec[i].paddr, 0,\n\t    phys_vec[i].len, dir);\n";
        let mended = FAULTY.replace(", 0,", ", mapped_len,");
        assert_eq!(mend(FAULTY), (true, FAULTY.into(), mended.clone()));
        // A source that is mended, or written otherwise, is no kernel to show the change on.
        assert!(!mend(&mended).0);
        assert!(!mend(&FAULTY.repeat(2)).0);
    }
}
