//! The lab's folder in the user's cache: what was made once and is made again if it is lost.
//!
//! Every entry is made in a folder beside its place and renamed when it is whole, so an entry
//! that exists is complete, whoever was interrupted. Its name carries a key of what it was made
//! from: a changed recipe is another entry. One that lost a file since is made again, and one that nobody
//! has asked for in two weeks is [swept](sweep): no checkout names it any more.

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// For how long an entry is kept that nobody asks for: several checkouts may name several.
const KEPT: Duration = Duration::from_secs(14 * 24 * 60 * 60);

/// The lab's folder in the user's cache.
pub fn folder() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
        Some(cache) => PathBuf::from(cache),
        None => match std::env::var_os("HOME").filter(|value| !value.is_empty()) {
            Some(home) => Path::new(&home).join(".cache"),
            None => bail!("no place for the lab's cache: set XDG_CACHE_HOME or HOME"),
        },
    };
    if !base.is_absolute() {
        bail!("the cache folder {} is not an absolute path: set XDG_CACHE_HOME", base.display());
    }
    Ok(base.join("peervram"))
}

/// A short name for what an entry is made from (64-bit FNV-1a: it tells recipes apart, it does
/// not defend against anyone).
pub fn key(parts: &[&str]) -> String {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in parts.iter().flat_map(|part| part.bytes().chain([0])) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    format!("{hash:016x}")
}

/// The entry of that name, made by `make` in an empty folder if it does not exist, or lacks one of the files that it
/// `has`. Whoever comes second waits for the first.
pub fn entry(name: &str, has: &[&str], make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    entry_in(&folder()?, name, has, make)
}

fn entry_in(
    folder: &Path,
    name: &str,
    has: &[&str],
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let place = folder.join(name);
    // A link may lead somewhere inside the entry only, where it is a root.
    let is_whole = || place.is_dir() && has.iter().all(|file| place.join(file).symlink_metadata().is_ok());
    fs::create_dir_all(folder).with_context(|| format!("making the cache folder {}", folder.display()))?;
    let lock = File::create(lock_of(folder, name)).with_context(|| format!("locking {}", place.display()))?;
    // When somebody asked last.
    lock.set_modified(SystemTime::now()).with_context(|| format!("dating {}", place.display()))?;
    if is_whole() {
        return Ok(place);
    }
    flock(&lock, FlockOperation::LockExclusive).with_context(|| format!("locking {}", place.display()))?;
    if is_whole() {
        return Ok(place);
    }
    // What an interrupted attempt left behind, or somebody has taken a file of; nobody else is at work while the lock
    // is ours.
    let draft = folder.join(format!("{name}{DRAFT}"));
    remove(&draft)?;
    remove(&place)?;
    fs::create_dir(&draft).with_context(|| format!("making {}", draft.display()))?;
    if let Err(error) = make(&draft) {
        remove(&draft).ok();
        return Err(error);
    }
    fs::rename(&draft, &place).with_context(|| format!("moving into {}", place.display()))?;
    Ok(place)
}

/// The suffix of the folder in which an entry is being made.
const DRAFT: &str = ".draft";
/// Locked by whoever makes or sweeps an entry; its date says when somebody asked for it.
const LOCK: &str = ".lock";

fn lock_of(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}{LOCK}"))
}

/// Removes what nobody has asked for in two weeks, drafts that were given up among it. Gives the names.
pub fn sweep() -> Result<Vec<String>> {
    sweep_in(&folder()?, SystemTime::now())
}

fn sweep_in(folder: &Path, now: SystemTime) -> Result<Vec<String>> {
    let mut swept = Vec::new();
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(swept),
        entries => entries.with_context(|| format!("reading {}", folder.display()))?,
    };
    for entry in entries {
        let file_name = entry?.file_name().to_string_lossy().into_owned();
        let Some(name) = file_name.strip_suffix(LOCK) else { continue };
        let path = lock_of(folder, name);
        let Ok(lock) = File::open(&path) else { continue };
        let asked = lock.metadata().and_then(|metadata| metadata.modified());
        let is_old = asked.is_ok_and(|asked| now.duration_since(asked).is_ok_and(|idle| idle > KEPT));
        // Whoever makes it has it locked.
        if !is_old || flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        remove(&folder.join(format!("{name}{DRAFT}")))?;
        remove(&folder.join(name))?;
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        swept.push(name.to_owned());
    }
    swept.sort();
    Ok(swept)
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", folder.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_parts_apart() {
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
        assert_ne!(key(&["ab"]), key(&["a", "b"]));
        assert_ne!(key(&["a", "b"]), key(&["b", "a"]));
    }

    /// An entry with a file, which says how often it was made.
    fn entry_of(folder: &Path, made: &mut u32) -> PathBuf {
        let make = |draft: &Path| {
            *made += 1;
            Ok(fs::write(draft.join("file"), made.to_string())?)
        };
        entry_in(folder, "an-entry", &["file"], make).unwrap()
    }

    #[test]
    fn an_entry_is_made_once_and_again_where_a_file_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let mut made = 0;
        let place = entry_of(folder.path(), &mut made);
        assert_eq!(entry_of(folder.path(), &mut made), place);
        assert_eq!(made, 1);
        fs::remove_file(place.join("file")).unwrap();
        fs::write(place.join("half of it"), "").unwrap();
        entry_of(folder.path(), &mut made);
        assert_eq!((made, fs::read_to_string(place.join("file")).unwrap().as_str()), (2, "2"));
        assert!(!place.join("half of it").exists());
    }

    #[test]
    fn what_could_not_be_made_leaves_nothing_and_is_tried_again() {
        let folder = tempfile::tempdir().unwrap();
        let failed = entry_in(folder.path(), "an-entry", &[], |draft| {
            fs::write(draft.join("file"), "")?;
            bail!("no room")
        });
        assert!(failed.is_err());
        assert!(!folder.path().join("an-entry").exists() && !folder.path().join("an-entry.draft").exists());
        // Nor does one that was killed in the middle.
        fs::create_dir(folder.path().join("an-entry.draft")).unwrap();
        fs::write(folder.path().join("an-entry.draft/half"), "").unwrap();
        let place = entry_of(folder.path(), &mut 0);
        assert!(!place.join("half").exists());
    }

    #[test]
    fn what_nobody_asks_for_is_swept_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let place = entry_of(folder.path(), &mut 0);
        fs::create_dir(folder.path().join("of-somebody-else")).unwrap();
        let now = SystemTime::now();
        assert_eq!(sweep_in(folder.path(), now + KEPT / 2).unwrap(), [""; 0]);
        // Somebody who makes it has it locked.
        let lock = File::open(lock_of(folder.path(), "an-entry")).unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        assert_eq!(sweep_in(folder.path(), now + 2 * KEPT).unwrap(), [""; 0]);
        drop(lock);
        assert!(place.exists());
        assert_eq!(sweep_in(folder.path(), now + 2 * KEPT).unwrap(), ["an-entry"]);
        let left: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["of-somebody-else"]);
        assert_eq!(sweep_in(&folder.path().join("nowhere"), now).unwrap(), [""; 0]);
    }
}
