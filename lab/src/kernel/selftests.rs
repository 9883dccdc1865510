//! The kernel's own tests of VFIO (tools/testing/selftests/vfio), built from Debian's source of it: a referee that is not ours.
//!
//! They are GPL-2.0-only and stay in the cache folder. The entry has the tests' folder alone; everything else that they include
//! is in the [`KernelSource`]'s tree, to which it has links.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

use crate::kernel::source::{self, KernelSource};
use crate::progress::{Progress, step};
use crate::root::Root;
use crate::root::cache;

/// Fetches the package again, of which the source's tree has everything but the tests, and builds: `$1` is the package, `$2`
/// the source's tree, /lab the cache folder, `$3` the entry's. They want libuuid, which the private root has no headers of. A
/// program that does not build is missed by whoever runs it.
const MAKE: &str = r#"set -eu
cd "$3"
mkdir -p packages/partial package tree/tools
apt-get install --yes --download-only -o Dir::Cache::Archives="$3/packages" "$1" uuid-dev
dpkg-deb --extract packages/"$1"_*.deb package
tar --extract --no-same-owner --strip-components=1 --directory tree --file "package/usr/src/$1.tar.xz" \
    --wildcards "$1/tools/testing/selftests/lib.mk" "$1/tools/testing/selftests/*.h" "$1/tools/testing/selftests/vfio"
mkdir uuid
dpkg-deb --extract packages/uuid-dev_*.deb uuid
rm -r packages package uuid/usr/lib/*/libuuid.so
export CPATH="$3/uuid/usr/include" LIBRARY_PATH="$(echo "$3"/uuid/usr/lib/*-linux-gnu)"
for part in arch drivers include scripts; do ln -s "../../$2/$part" "tree/$part"; done
for part in "$3/../$2/tools"/*; do [ "${part##*/}" = testing ] || ln -s "../../../$2/tools/${part##*/}" "tree/tools/"; done
mkdir bin
make --keep-going --jobs="$(nproc)" --directory tree/tools/testing/selftests/vfio OUTPUT="$3/bin" all >log 2>&1 || true
rm -r tree uuid
"#;

/// The tests' programs, built if they are not there.
pub fn open(root: &Root, version: &str, progress: &dyn Progress) -> Result<PathBuf> {
    let source = KernelSource::open(root, version, progress)?;
    let name = format!("selftests-{}", cache::key(&[source.version(), MAKE]));
    let entry = cache::entry(&name, &["bin"], |draft| {
        step(progress, "building the kernel's own tests of VFIO (its source again, about 165 MB)", || {
            let package = source::package(root, draft, version)?;
            let folder = cache::folder()?;
            let inside = |path: &Path| -> Result<String> {
                let relative = path.strip_prefix(&folder).context("it is not in the cache folder")?;
                Ok(relative.display().to_string())
            };
            let (tree, entry) = (inside(&source.tree())?, format!("/lab/{}", inside(draft)?));
            root.output(&folder, &["sh", "-c", MAKE, "make", &package, &tree, &entry])?;
            Ok(())
        })
    })?;
    Ok(entry.join("bin"))
}
