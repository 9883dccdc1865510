//! The memory of the guest, as the device reaches it: through the file that came with a window, or,
//! where none came, by messages to the client.
//!
//! Order of calls: [`DmaSpace::connect`], then [`DmaSpace::map`] and [`DmaSpace::unmap`] by the
//! thread that reads messages, [`DmaSpace::read`] and [`DmaSpace::write`] by engines, in the end
//! [`DmaSpace::disconnect`].
//!
//! Once `unmap` has returned, no access by file to what it covered is under way or will come.
//! Messages are the client's to refuse.
//!
//! Files are kept once per (device, inode, open mode), however many windows lead into them: behind a
//! virtual IOMMU every page can be a window of its own. Nothing is mapped, see [`crate::vram`].

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};

use parking_lot::RwLock;
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use crate::peer::Peer;
use crate::protocol::{DmaMap, DmaUnmap};
use crate::vram::{read_exact_at, write_all_at};
use crate::windows::{Direction, Windows};

const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// What tells one file from another: device, inode, and whether it was opened for writing.
type FileKey = (u64, u64, bool);

#[derive(Debug)]
enum Target {
    File(Arc<OwnedFd>),
    Messages,
}

#[derive(Debug, Default)]
struct Inner {
    windows: Windows<Target>,
    files: HashMap<FileKey, Weak<OwnedFd>>,
    peer: Option<Arc<Peer>>,
}

/// The DMA address space of one device.
#[derive(Debug, Default)]
pub struct DmaSpace {
    inner: RwLock<Inner>,
}

impl DmaSpace {
    /// From now on messages go to `peer`.
    pub fn connect(&self, peer: Arc<Peer>) {
        self.inner.write().peer = Some(peer);
    }

    /// Forgets all windows and the peer.
    pub fn disconnect(&self) {
        *self.inner.write() = Inner::default();
    }

    /// How many windows there are, and how many different files behind them.
    pub fn counts(&self) -> (usize, usize) {
        let inner = self.inner.read();
        let files = inner.files.values().filter(|file| file.strong_count() > 0).count();
        (inner.windows.len(), files)
    }

    /// Whether `address` leads to memory of another device: to a window without a file. Memory of the host
    /// comes with one, unless the machine was not told to share it.
    pub fn is_peer(&self, address: u64) -> bool {
        let inner = self.inner.read();
        let piece = inner.windows.find(address, 1, Direction::Read);
        piece.is_ok_and(|piece| matches!(piece.target, Target::Messages))
    }

    /// Adds a window, with or without a file.
    ///
    /// # Errors
    /// Those of [`Windows::insert`]; `EINVAL` for a file that is not a regular one or ends before the
    /// window does, `EACCES` for one that was not opened for what the window allows.
    pub fn map(&self, map: &DmaMap, file: Option<OwnedFd>) -> Result<(), Errno> {
        let keyed = match file {
            Some(file) => usable(map, &file)?.map(|key| (key, file)),
            None => None,
        };
        let inner = &mut *self.inner.write();
        let Some((key, file)) = keyed else {
            return inner.windows.insert(map, Target::Messages);
        };
        let known = inner.files.get(&key).and_then(Weak::upgrade);
        let shared = known.unwrap_or_else(|| Arc::new(file));
        inner.windows.insert(map, Target::File(Arc::clone(&shared)))?;
        if inner.files.len() >= inner.windows.len() {
            inner.files.retain(|_, file| file.strong_count() > 0);
        }
        inner.files.insert(key, Arc::downgrade(&shared));
        Ok(())
    }

    /// Removes windows; says how many.
    ///
    /// # Errors
    /// Those of [`Windows::remove`].
    pub fn unmap(&self, unmap: DmaUnmap) -> Result<usize, Errno> {
        self.inner.write().windows.remove(unmap)
    }

    /// The device reads.
    ///
    /// # Errors
    /// `EFAULT`, `EACCES`, or what the client says to a message. Part of `buffer` may be filled.
    pub fn read(&self, mut address: u64, mut buffer: &mut [u8]) -> Result<(), Errno> {
        while !buffer.is_empty() {
            let (bytes, peer) = {
                let inner = self.inner.read();
                let piece = inner.windows.find(address, buffer.len(), Direction::Read)?;
                match piece.target {
                    Target::File(file) => {
                        read_exact_at(file.as_fd(), piece.offset, &mut buffer[..piece.bytes])?;
                        (piece.bytes, None)
                    }
                    Target::Messages => (piece.bytes, Some(inner.peer.clone().ok_or(Errno::NOTCONN)?)),
                }
            };
            // The lock is not held here: the reply comes in on the thread that also unmaps.
            if let Some(peer) = peer {
                peer.read(address, &mut buffer[..bytes])?;
            }
            address = address.wrapping_add(bytes as u64);
            buffer = &mut buffer[bytes..];
        }
        Ok(())
    }

    /// The device writes.
    ///
    /// # Errors
    /// Those of [`DmaSpace::read`]. Part of `data` may have been written.
    pub fn write(&self, mut address: u64, mut data: &[u8]) -> Result<(), Errno> {
        while !data.is_empty() {
            let (bytes, peer) = {
                let inner = self.inner.read();
                let piece = inner.windows.find(address, data.len(), Direction::Write)?;
                match piece.target {
                    Target::File(file) => {
                        write_all_at(file.as_fd(), piece.offset, &data[..piece.bytes])?;
                        (piece.bytes, None)
                    }
                    Target::Messages => (piece.bytes, Some(inner.peer.clone().ok_or(Errno::NOTCONN)?)),
                }
            };
            if let Some(peer) = peer {
                peer.write(address, &data[..bytes])?;
            }
            address = address.wrapping_add(bytes as u64);
            data = &data[bytes..];
        }
        Ok(())
    }
}

/// The key of a file that can be read and written at offsets; `None` for one that cannot although it
/// is honest memory (hugetlbfs has no `write`): its window works by messages.
fn usable(map: &DmaMap, file: &OwnedFd) -> Result<Option<FileKey>, Errno> {
    let status = rustix::fs::fstat(file)?;
    if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
        return Err(Errno::INVAL);
    }
    // A write beyond the end would make the client's file grow.
    let size_bytes = u64::try_from(status.st_size).map_err(|_| Errno::INVAL)?;
    match map.offset.checked_add(map.size_bytes) {
        Some(end) if end <= size_bytes => {}
        _ => return Err(Errno::INVAL),
    }
    if rustix::fs::fstatfs(file)?.f_type as u64 == HUGETLBFS_MAGIC {
        return Ok(None);
    }
    let mode = rustix::fs::fcntl_getfl(file)? & OFlags::ACCMODE;
    let (readable, writable) = (mode != OFlags::WRONLY, mode == OFlags::RDWR || mode == OFlags::WRONLY);
    if (map.access.read && !readable) || (map.access.write && !writable) {
        return Err(Errno::ACCESS);
    }
    Ok(Some((status.st_dev, status.st_ino, writable)))
}
