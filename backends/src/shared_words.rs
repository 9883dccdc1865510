//! `SharedWords`: words that one process writes and others read, without a call and without a message.
//!
//! The file is a memfd. Its first eight bytes hold the *life word*, 32 bits of it: the number of the thread that writes, as
//! a robust futex (`Documentation/locking/robust-futex-ABI.rst`). When that thread ends, in whatever way, the kernel sets
//! `FUTEX_OWNER_DIED` in it. Of a process that is killed, the kernel does so for each thread before it closes the
//! process's files (`kernel/exit.c`, `do_exit`: `exit_mm` comes before `exit_files`), and so before a device of that
//! process is closed and its memory goes. Behind the life word lie the words, 64 bits each, in the byte order of the
//! machine.
//!
//! Readers can neither write nor shrink the file: it is sealed (`F_SEAL_SHRINK`, `F_SEAL_GROW`, `F_SEAL_FUTURE_WRITE`,
//! `F_SEAL_SEAL`).

#![expect(
    unsafe_code,
    reason = "words in memory that other processes have, and a list that the kernel walks through"
)]

use std::ffi::{c_int, c_long, c_void};
use std::fmt;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::{Error, Kind, Result, page_size_bytes};

/// In front of the words, in bytes.
const LIFE_BYTES: usize = 8;
/// Set by the kernel in the life word when the thread that writes has ended (`include/uapi/linux/futex.h`).
const OWNER_DIED: u32 = 0x4000_0000;

/// The words, for whoever writes them.
pub struct SharedWords {
    file: OwnedFd,
    map: Map,
}

/// The words of another process.
pub struct SharedWordsView(Map);

/// While it exists, readers know that the thread that made it lives. It stays on that thread, whose list of robust
/// futexes it takes the place of: nothing on the thread may lock a robust mutex meanwhile.
pub struct Life<'w> {
    words: &'w SharedWords,
    /// The thread's list before.
    before: *const c_void,
    /// What the kernel walks through when the thread ends. It was a box, and is one when this is dropped.
    list: NonNull<RobustList>,
    stays: PhantomData<*const ()>,
}

/// `struct robust_list_head`, and the one entry of the list.
#[repr(C)]
struct RobustList {
    first: *const c_void,
    futex_offset: c_long,
    pending: *const c_void,
    /// The entry's pointer to the next one: back to the head, which ends the list.
    next: *const c_void,
}

impl RobustList {
    const HEAD_BYTES: usize = 3 * size_of::<*const c_void>();
}

impl SharedWords {
    /// `count` words that are 0, and nobody who lives. Memory is used for as much of them as is written.
    ///
    /// # Errors
    /// No descriptor or no memory is free; a kernel before 5.1, which does not know `F_SEAL_FUTURE_WRITE`.
    pub fn new(count: usize) -> Result<Self> {
        Self::try_new(count).map_err(|errno| Error::os("share words with other processes", errno))
    }

    fn try_new(count: usize) -> Result<Self, Errno> {
        let page = page_size_bytes() as usize;
        let size_bytes = (LIFE_BYTES + count * size_of::<u64>()).next_multiple_of(page);
        let file = memfd_create("peervram-words", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, size_bytes as u64)?;
        let map = Map::new(file.as_fd(), size_bytes, ProtFlags::READ | ProtFlags::WRITE)?;
        // The mapping above may be written to as before.
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
        fcntl_add_seals(&file, seals)?;
        Ok(Self { file, map })
    }

    /// How many words there are.
    pub fn count(&self) -> usize {
        self.map.count()
    }

    /// Writes a word. What was written before, and what is done after, is seen by others in that order.
    ///
    /// # Panics
    /// There is no such word.
    pub fn store(&self, word: usize, value: u64) {
        self.map.word(word).store(value, Ordering::SeqCst);
    }

    /// The calling thread says that it lives, until what this returns is dropped, or the thread ends.
    ///
    /// # Errors
    /// What `get_robust_list` or `set_robust_list` say.
    pub fn live(&self) -> Result<Life<'_>> {
        let failed = |errno: Errno| Error::os("tell other processes that this one lives", errno);
        let before = robust_list().map_err(failed)?;
        let list = NonNull::from(Box::leak(Box::new(RobustList {
            first: ptr::null(),
            futex_offset: 0,
            pending: ptr::null(),
            next: ptr::null(),
        })));
        // SAFETY: nobody else has it yet.
        let entry: *const c_void = unsafe { &raw const (*list.as_ptr()).next }.cast();
        let futex_offset = (self.map.life().as_ptr() as c_long).wrapping_sub(entry as c_long);
        let head = list.as_ptr().cast_const().cast();
        // SAFETY: as above.
        unsafe {
            *list.as_ptr() = RobustList { first: entry, futex_offset, pending: ptr::null(), next: head }
        };
        let life = Life { words: self, before, list, stays: PhantomData };
        set_robust_list(head).map_err(failed)?;
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        self.map.life().store(thread.cast_unsigned(), Ordering::SeqCst);
        Ok(life)
    }
}

/// The file, for other processes. Whoever has it can read.
impl AsFd for SharedWords {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Life<'_> {
    fn drop(&mut self) {
        self.words.map.life().store(OWNER_DIED, Ordering::SeqCst);
        // Before the list is freed, which the kernel would walk through.
        // It fails for another size of the head alone (`kernel/futex/syscalls.c`), which is the same as in `live`.
        let put_back = set_robust_list(self.before);
        debug_assert!(put_back.is_ok(), "{put_back:?}");
        // SAFETY: it was a box, and the kernel does not know it any more.
        drop(unsafe { Box::from_raw(self.list.as_ptr()) });
    }
}

impl SharedWordsView {
    /// The words in `file`, which is closed.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] where it is no file of that kind: too short, or one that its writer could shrink, so that
    /// reading would end the process (`SIGBUS`).
    pub fn open(file: OwnedFd) -> Result<Self> {
        const TRIED: &str = "read words of another process";
        let failed = |errno: Errno| Error::os(TRIED, errno);
        let is_sealed = fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        let size_bytes = fstat(&file).map_err(failed)?.st_size as usize;
        if !is_sealed || size_bytes < LIFE_BYTES {
            let why = "the file is no memfd that keeps its size (F_SEAL_SHRINK)";
            return Err(Error::new(Kind::InvalidInput, TRIED, why));
        }
        Ok(Self(Map::new(file.as_fd(), size_bytes, ProtFlags::READ).map_err(failed)?))
    }

    /// How many words there are.
    pub fn count(&self) -> usize {
        self.0.count()
    }

    /// A word as it is now, or nothing where whoever writes them has ended. What was read from memory before, was read before
    /// the word. What was written before may still be on its way out of this CPU, which takes it nanoseconds, and a writer's
    /// next system call longer.
    ///
    /// # Panics
    /// There is no such word.
    pub fn load(&self, word: usize) -> Option<u64> {
        fence(Ordering::Acquire);
        let value = self.0.word(word).load(Ordering::Acquire);
        let life = self.0.life().load(Ordering::Acquire);
        (life != 0 && life & OWNER_DIED == 0).then_some(value)
    }
}

/// A mapping of the file.
struct Map {
    start: NonNull<u8>,
    size_bytes: usize,
}

// SAFETY: the mapping belongs to the whole process until it is dropped, and everything in it is accessed as atomics.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    fn new(file: BorrowedFd<'_>, size_bytes: usize, protection: ProtFlags) -> Result<Self, Errno> {
        // SAFETY: the kernel chooses the address, so that nothing is mapped over.
        let start = unsafe { mmap(ptr::null_mut(), size_bytes, protection, MapFlags::SHARED, file, 0) }?;
        Ok(Self { start: NonNull::new(start.cast()).ok_or(Errno::FAULT)?, size_bytes })
    }

    fn count(&self) -> usize {
        (self.size_bytes - LIFE_BYTES) / size_of::<u64>()
    }

    fn life(&self) -> &AtomicU32 {
        // SAFETY: the mapping is aligned to pages, at least a page long, and lives as long as `self`. Whoever else has the
        // file accesses the word as an atomic, too; of a reader, `store` is called by nobody.
        unsafe { AtomicU32::from_ptr(self.start.as_ptr().cast()) }
    }

    fn word(&self, word: usize) -> &AtomicU64 {
        assert!(word < self.count(), "there are {} words, and none is number {word}", self.count());
        // SAFETY: as above; it is inside, and its address is a multiple of eight.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(LIFE_BYTES).cast::<u64>().add(word)) }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: nobody has a reference into it any more.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.size_bytes) };
    }
}

/// The list of robust futexes of the calling thread.
fn robust_list() -> Result<*const c_void, Errno> {
    let (this_thread, mut head, mut size_bytes): (c_int, *const c_void, usize) = (0, ptr::null(), 0);
    // SAFETY: the kernel writes a pointer and a size, to where they are.
    let result =
        unsafe { libc::syscall(libc::SYS_get_robust_list, this_thread, &raw mut head, &raw mut size_bytes) };
    if result == 0 { Ok(head) } else { Err(last_errno()) }
}

/// Sets it. What `head` points to stays for as long as the thread, or until the next call.
fn set_robust_list(head: *const c_void) -> Result<(), Errno> {
    // SAFETY: the kernel keeps the address, and looks at it when the thread ends.
    let result = unsafe { libc::syscall(libc::SYS_set_robust_list, head, RobustList::HEAD_BYTES) };
    if result == 0 { Ok(()) } else { Err(last_errno()) }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)
}

impl fmt::Debug for SharedWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedWords").field("count", &self.count()).finish_non_exhaustive()
    }
}

impl fmt::Debug for SharedWordsView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedWordsView").field("count", &self.count()).finish_non_exhaustive()
    }
}

impl fmt::Debug for Life<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Life").field("words", &self.words).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(words: &SharedWords) -> SharedWordsView {
        SharedWordsView::open(words.as_fd().try_clone_to_owned().unwrap()).unwrap()
    }

    #[test]
    fn readers_see_what_is_written() {
        let words = SharedWords::new(1000).unwrap();
        let view = view(&words);
        assert!(words.count() >= 1000 && view.count() == words.count());
        assert_eq!(view.load(999), None, "nobody lives yet");
        let life = words.live().unwrap();
        assert_eq!(view.load(999), Some(0));
        words.store(999, u64::MAX);
        words.store(0, 7);
        assert_eq!((view.load(999), view.load(0), view.load(1)), (Some(u64::MAX), Some(7), Some(0)));
        drop(life);
        assert_eq!(view.load(999), None);
    }

    #[test]
    fn a_thread_that_ends_without_a_word_is_known_to_have_ended() {
        let words = SharedWords::new(1).unwrap();
        let view = view(&words);
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                std::mem::forget(words.live().unwrap());
                assert_eq!(view.load(0), Some(0));
            });
            // Whoever waits for the thread waits for a word that the kernel writes later than the life word (`mm_release`).
            thread.join().unwrap();
        });
        assert_eq!(view.load(0), None);
    }

    #[test]
    fn the_threads_own_list_is_put_back() {
        let before = robust_list().unwrap();
        let words = SharedWords::new(1).unwrap();
        let life = words.live().unwrap();
        assert_ne!(robust_list().unwrap(), before);
        drop(life);
        assert_eq!(robust_list().unwrap(), before);
    }

    #[test]
    fn readers_cannot_write() {
        let words = SharedWords::new(1).unwrap();
        let page = page_size_bytes() as usize;
        let written = Map::new(words.as_fd(), page, ProtFlags::READ | ProtFlags::WRITE);
        assert_eq!(written.err(), Some(Errno::PERM));
        assert_eq!(rustix::io::write(&words, &[1]).err(), Some(Errno::PERM));
        assert_eq!(ftruncate(&words, 0).err(), Some(Errno::PERM));
    }

    #[test]
    fn a_file_that_could_shrink_is_refused() {
        let file = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, 4096).unwrap();
        let refused = SharedWordsView::open(file.try_clone().unwrap()).unwrap_err();
        assert_eq!(refused.kind(), Kind::InvalidInput);
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        SharedWordsView::open(file).unwrap();
        let empty = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        fcntl_add_seals(&empty, SealFlags::SHRINK).unwrap();
        assert_eq!(SharedWordsView::open(empty).unwrap_err().kind(), Kind::InvalidInput);
    }
}
