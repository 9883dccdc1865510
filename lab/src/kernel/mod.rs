//! The kernels of the lab: Debian's packages, fetched and unpacked, never installed, and our own.
//!
//! apt runs inside the private root, so it uses the root's archive and its keys. Each kernel has
//! a cache folder of its own.

pub(crate) mod cpio;
pub mod holder;
pub(crate) mod initrd;
mod modules;
pub mod own_kernel;
pub(crate) mod selftests;
mod source;

use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

use crate::kernel::own_kernel::OwnKernel;
use crate::machine;
use crate::progress::{Progress, step};
use crate::root::Root;
use crate::root::cache;

/// The packages that hold nothing but what the newest kernel's name is.
const META_PACKAGE: &str = "linux-image-amd64";

/// Where the packages put the modules, and we the image without its compression.
const MODULES: &str = "tree/usr/lib/modules";
const PLAIN_IMAGE: &str = "vmlinux";

/// Fetches and unpacks: `$1` is the package, /lab the folder. Only the kernel's own packages are
/// unpacked; what they depend on is for installing.
const FETCH: &str = r#"set -eu
cd /lab
mkdir -p packages/partial tree
apt-get install --yes --download-only -o Dir::Cache::Archives=/lab/packages "$1"
for package in packages/linux-*.deb; do dpkg-deb --extract "$package" tree; done
cd tree
[ -e lib ] || ln -s usr/lib lib
[ -e usr/lib/modules ] || { mkdir -p usr/lib; ln -s ../../lib/modules usr/lib/modules; }
for release in $(ls lib/modules); do depmod -b /lab/tree "$release"; done
rm -r /lab/packages
"#;

/// A kernel that can be booted.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Its cache folder.
    pub folder: PathBuf,
    /// What `uname -r` will say.
    pub release: String,
    /// The image.
    pub image: PathBuf,
    /// Its modules with depmod's files; none if everything is built in.
    pub modules: Option<PathBuf>,
    /// If it is one of our own: what modules can be built against.
    pub own: Option<OwnKernel>,
}

impl Kernel {
    /// The kernel of a machine's row, fetched or built if it is not there.
    pub fn open(root: &Root, wanted: machine::Kernel, progress: &dyn Progress) -> Result<Kernel> {
        let (version, suite) = match wanted {
            machine::Kernel::Debian { version, suite } => (version, suite),
            machine::Kernel::Own { version, flavour } => {
                let own = OwnKernel::open(root, version, flavour, progress)?;
                let OwnKernel { folder, release, image, .. } = own.clone();
                return Ok(Kernel { folder, release, image, modules: None, own: Some(own) });
            }
        };
        let name = format!("kernel-debian-{version}-{}", cache::key(&[suite, FETCH, "vmlinux"]));
        let folder = cache::entry(&name, &[MODULES], |draft| {
            step(progress, &format!("fetching Debian's Linux {version} (about 130 MB)"), || {
                fetch(root, version, suite, draft, progress)?;
                unpack_image(root, draft)
            })
        })?;
        Kernel::found_in(folder)
    }

    /// The kernel in a cache folder.
    fn found_in(folder: PathBuf) -> Result<Kernel> {
        let (release, compressed) = locate(&folder)?;
        let plain = folder.join(PLAIN_IMAGE);
        let image = if plain.exists() { plain } else { compressed };
        let modules = Some(folder.join(MODULES).join(&release));
        Ok(Kernel { folder, release, image, modules, own: None })
    }
}

/// The release and the compressed image in an unpacked package.
fn locate(folder: &Path) -> Result<(String, PathBuf)> {
    let modules = folder.join(MODULES);
    let release = fs::read_dir(&modules)
        .with_context(|| format!("looking for a kernel in {}", modules.display()))?
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .max()
        .with_context(|| format!("no kernel in {}", modules.display()))?;
    // Debian moved the image from /boot to the modules' folder in Linux 7.
    let places =
        [modules.join(&release).join("vmlinuz"), folder.join(format!("tree/boot/vmlinuz-{release}"))];
    let image = places
        .into_iter()
        .find(|image| image.exists())
        .with_context(|| format!("no vmlinuz in {}: remove the folder", folder.display()))?;
    Ok((release, image))
}

/// Puts the plain kernel beside the compressed one, if it is packed in a way that is known: an
/// emulated CPU takes two seconds to unpack it, at each boot.
fn unpack_image(root: &Root, folder: &Path) -> Result<()> {
    let (_, compressed) = locate(folder)?;
    let image = fs::read(&compressed).with_context(|| format!("reading {}", compressed.display()))?;
    let Some(payload) = zstd_payload(&image) else { return Ok(()) };
    fs::write(folder.join("payload.zst"), payload)?;
    let plain = format!("/lab/{PLAIN_IMAGE}");
    root.output(folder, &["zstd", "--quiet", "-d", "--rm", "/lab/payload.zst", "-o", &plain])?;
    Ok(())
}

/// The compressed kernel in a bzImage, whose header says where it is
/// (Documentation/arch/x86/boot.rst). The build appends the plain size, which zstd does not know.
fn zstd_payload(image: &[u8]) -> Option<&[u8]> {
    let number = |at: usize| -> Option<usize> {
        let bytes = image.get(at..at + 4)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    let setup_sectors = match *image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (setup_sectors + 1) * 512 + number(0x248)?;
    let payload = image.get(start..start.checked_add(number(0x24c)?)?)?;
    let payload = payload.get(..payload.len().checked_sub(4)?)?;
    payload.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]).then_some(payload)
}

fn fetch(root: &Root, version: &str, suite: &str, draft: &Path, progress: &dyn Progress) -> Result<()> {
    root.take_name_service()?;
    root.output(draft, &["apt-get", "--quiet", "update"])?;
    let versions = root.output(draft, &["apt-cache", "madison", META_PACKAGE])?;
    let names = root.output(draft, &["apt-cache", "pkgnames", &format!("linux-image-{version}.")])?;
    let (package, note) = choose(version, suite, &versions, &names)?;
    if let Some(note) = note {
        progress.note(&note);
    }
    root.output(draft, &["sh", "-c", FETCH, "fetch", &package])?;
    Ok(())
}

/// The package to fetch, and what to tell a person if it is not quite what was asked for.
fn choose(version: &str, suite: &str, versions: &str, names: &str) -> Result<(String, Option<String>)> {
    let prefix = format!("{version}.");
    // "linux-image-amd64 | 7.3.4-1~bpo13+1 | ADDRESS trixie-backports/main amd64 Packages"
    let newest = versions.lines().find_map(|line| {
        let mut fields = line.split('|').map(str::trim);
        let (_, number, source) = (fields.next()?, fields.next()?, fields.next()?);
        source.split(' ').any(|word| word == format!("{suite}/main")).then_some(number)
    });
    if newest.is_some_and(|number| number.starts_with(&prefix)) {
        return Ok((format!("{META_PACKAGE}/{suite}"), None));
    }
    let older = names
        .lines()
        .filter_map(|name| {
            let number = name.strip_prefix("linux-image-")?.strip_suffix("-amd64")?;
            let (patch, build) = number.strip_prefix(&prefix)?.split_once('+')?;
            // Flavours ("cloud-amd64") have one more part.
            (!build.contains('-')).then_some((patch.parse::<u32>().ok()?, name))
        })
        .max();
    match (older, newest) {
        (Some((_, name)), _) => Ok((name.to_string(), None)),
        (None, Some(number)) => Ok((
            format!("{META_PACKAGE}/{suite}"),
            Some(format!("{suite} has no Linux {version} any more; taking its {number}")),
        )),
        (None, None) => bail!("{suite} has no package {META_PACKAGE}: is it in the root's sources?"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSIONS: &str = "\
linux-image-amd64 | 7.3.4-1~bpo13+1 | http://mirror.example/debian trixie-backports/main amd64 Packages
linux-image-amd64 | 6.12.107-1 | http://mirror.example/debian trixie/main amd64 Packages
";

    #[test]
    fn the_payload_is_where_the_header_says() {
        let mut image = vec![0; 2048];
        image[0x1f1] = 1;
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&12u32.to_le_bytes());
        let payload = [0x28, 0xb5, 0x2f, 0xfd, 1, 2, 3, 4];
        image[1040..1048].copy_from_slice(&payload);
        assert_eq!(zstd_payload(&image), Some(&payload[..]));
        image[1040] = 0;
        assert_eq!(zstd_payload(&image), None);
        assert_eq!(zstd_payload(b"MZ"), None);
    }

    #[test]
    fn the_suite_has_it() {
        let (package, note) = choose("6.12", "trixie", VERSIONS, "").unwrap();
        assert_eq!((package.as_str(), note), ("linux-image-amd64/trixie", None));
    }

    #[test]
    fn an_older_build_is_still_there() {
        let names = "linux-image-7.2.6+deb13-amd64\nlinux-image-7.2.12+deb13-amd64\n\
                     linux-image-7.2.13+deb13-cloud-amd64\n";
        let (package, note) = choose("7.2", "trixie-backports", VERSIONS, names).unwrap();
        assert_eq!((package.as_str(), note), ("linux-image-7.2.12+deb13-amd64", None));
    }

    #[test]
    fn the_archive_moved_on() {
        let (package, note) = choose("7.1", "trixie-backports", VERSIONS, "").unwrap();
        assert_eq!(package, "linux-image-amd64/trixie-backports");
        assert!(note.unwrap().contains("7.3.4-1~bpo13+1"));
        assert!(choose("7.1", "sid", VERSIONS, "").is_err());
    }
}
