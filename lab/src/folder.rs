//! A machine's folder on the host: made for one boot, gone after it.
//!
//! Whoever is interrupted leaves it behind; so it is locked while it is used, and the next boot
//! removes those that nobody holds.

use anyhow::{Context, Result};
use rustix::fs::FlockOperation;
use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;

const PREFIX: &str = "peervram-lab-";

/// Younger ones may not have been locked yet.
const ABANDONED_AGE: Duration = Duration::from_secs(60);

/// A folder that is removed when dropped.
pub struct Folder {
    folder: TempDir,
    _lock: File,
}

impl Folder {
    /// A new one, among the system's temporary files.
    pub fn new() -> Result<Folder> {
        sweep(&std::env::temp_dir());
        let folder =
            tempfile::Builder::new().prefix(PREFIX).tempdir().context("making a folder for the machine")?;
        let lock = File::open(folder.path())?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).context("locking the folder")?;
        Ok(Folder { folder, _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

/// Removes what interrupted runs left. What cannot be removed is somebody else's.
fn sweep(place: &Path) {
    for entry in fs::read_dir(place).into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let Ok(folder) = File::open(entry.path()) else { continue };
        let age = folder.metadata().and_then(|data| data.modified()).map(|time| time.elapsed());
        let old = matches!(age, Ok(Ok(age)) if age > ABANDONED_AGE);
        if old && rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive).is_ok() {
            fs::remove_dir_all(entry.path()).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    #[test]
    fn only_what_is_old_and_not_held_is_swept() {
        let place = tempfile::tempdir().unwrap();
        let make = |name: &str, age: Duration| {
            let path = place.path().join(name);
            fs::create_dir(&path).unwrap();
            let folder = File::open(&path).unwrap();
            folder.set_modified(SystemTime::now() - age).unwrap();
            (path, folder)
        };
        let old = ABANDONED_AGE * 2;
        let (abandoned, _) = make("peervram-lab-a", old);
        let (held, lock) = make("peervram-lab-b", old);
        let (young, _) = make("peervram-lab-c", Duration::ZERO);
        let (foreign, _) = make("other", old);
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).unwrap();
        sweep(place.path());
        assert!(!abandoned.exists());
        assert!(held.exists() && young.exists() && foreign.exists());
    }
}
