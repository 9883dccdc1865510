//! Debian's source package of a kernel, fetched and unpacked: what the lab's own kernels are
//! built from, and what modules for them need.
//!
//! apt runs inside the private root. The unpacked tree is never written to again.

use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

use crate::progress::{Progress, step};
use crate::root::Root;
use crate::root::cache;

/// Fetches and unpacks: `$1` is the package, /lab the folder. Left out are half a gigabyte of
/// register lists that only amdgpu's own driver includes, and the kernel's tests.
const FETCH: &str = r#"set -eu
cd /lab
mkdir -p packages/partial package
apt-get install --yes --download-only -o Dir::Cache::Archives=/lab/packages "$1"
file=$(ls packages/"$1"_*.deb)
dpkg-deb --field "$file" Version >version
dpkg-deb --extract "$file" package
tar --extract --no-same-owner --file "package/usr/src/$1.tar.xz" \
    --exclude='*/drivers/gpu/drm/amd/include' --exclude='*/tools/testing'
mv "$1" tree
rm -r packages package
"#;

/// A kernel's source that exists.
#[derive(Clone, Debug)]
pub struct KernelSource {
    folder: PathBuf,
    version: String,
}

impl KernelSource {
    /// The source of that version ("7.3"), fetched if it is not there.
    pub fn open(root: &Root, wanted: &str, progress: &dyn Progress) -> Result<KernelSource> {
        let folder = cache::entry(&format!("linux-source-{wanted}"), &["version", "tree"], |draft| {
            step(progress, &format!("fetching the source of Linux {wanted} (about 165 MB)"), || {
                fetch(root, wanted, draft, progress)
            })
        })?;
        let file = folder.join("version");
        let version = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        Ok(KernelSource { folder, version: version.trim().into() })
    }

    /// The tree.
    pub fn tree(&self) -> PathBuf {
        self.folder.join("tree")
    }

    /// Debian's version of it.
    pub fn version(&self) -> &str {
        &self.version
    }
}

fn fetch(root: &Root, wanted: &str, draft: &Path, progress: &dyn Progress) -> Result<()> {
    let package = package(root, draft, wanted)?;
    if package != format!("linux-source-{wanted}") {
        progress.note(&format!("Debian has no source of Linux {wanted} any more; taking {package}"));
    }
    root.output(draft, &["sh", "-c", FETCH, "fetch", &package])?;
    Ok(())
}

/// The package with that version's source, or else with the newest, by what the archive has now. `draft` is a folder in the
/// lab's cache.
pub(super) fn package(root: &Root, draft: &Path, wanted: &str) -> Result<String> {
    root.take_name_service()?;
    root.output(draft, &["apt-get", "--quiet", "update"])?;
    let names = root.output(draft, &["apt-cache", "pkgnames", "linux-source-"])?;
    choose(wanted, &names)
}

/// The package with that version's source, or else with the newest.
fn choose(wanted: &str, names: &str) -> Result<String> {
    let newest = names
        .lines()
        .filter_map(|name| {
            let (major, minor) = name.strip_prefix("linux-source-")?.split_once('.')?;
            let version = (major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?);
            let is_wanted = name.strip_prefix("linux-source-") == Some(wanted);
            Some((is_wanted, version, name))
        })
        .max();
    match newest {
        Some((_, _, name)) => Ok(name.to_string()),
        None => bail!("Debian's archive has no package linux-source-{wanted}, nor any other version"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_asked_for_comes_first() {
        let names = "linux-source-6.12\nlinux-source-7.10\nlinux-source-7.3\nlinux-source-7.9-rt\n";
        assert_eq!(choose("7.3", names).unwrap(), "linux-source-7.3");
        assert_eq!(choose("7.2", names).unwrap(), "linux-source-7.10");
        assert!(choose("7.3", "linux-source-nothing\n").is_err());
    }
}
