//! The lab's folder in the user's cache: what was made once and is made again if it is lost.
//!
//! Every entry is made in a folder beside its place and renamed when it is whole, so an entry
//! that exists is complete, whoever was interrupted. Its name carries a key of what it was made
//! from: a changed recipe is another entry.

use anyhow::{Context, Result, bail};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

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

/// The entry of that name, made by `make` in an empty folder if it does not exist. Whoever comes
/// second waits for the first.
pub fn entry(name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let folder = folder()?;
    let place = folder.join(name);
    if place.is_dir() {
        return Ok(place);
    }
    fs::create_dir_all(&folder).with_context(|| format!("making the cache folder {}", folder.display()))?;
    let lock = fs::File::create(folder.join(format!("{name}.lock")))
        .with_context(|| format!("locking {}", place.display()))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)
        .with_context(|| format!("locking {}", place.display()))?;
    if place.is_dir() {
        return Ok(place);
    }
    // What an interrupted attempt left behind; nobody else is at work while the lock is ours.
    let draft = folder.join(format!("{name}.draft"));
    remove(&draft)?;
    fs::create_dir(&draft).with_context(|| format!("making {}", draft.display()))?;
    if let Err(error) = make(&draft) {
        remove(&draft).ok();
        return Err(error);
    }
    fs::rename(&draft, &place).with_context(|| format!("moving into {}", place.display()))?;
    Ok(place)
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
}
