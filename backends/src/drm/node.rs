//! `Node`: an open `/dev/dri/card*` or `/dev/dri/renderD*`, as an importer.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use drm::Device as _;
use drm::buffer::Handle;
use drm::control::Device as _;
use parking_lot::{Mutex, MutexGuard};
use rustix::io::Errno;

use super::BufferObject;
use super::handles::{Handles, User};
use crate::pci::Function;
use crate::uapi::fcntl::is_same_open_file;
use crate::{
    DmaBuf, Error, ImportSupport, Importer, Kind, OnRevoke, PciAddress, Result, import_support,
    import_support_of,
};

/// An open DRM node. Cheap to clone; buffer objects hold it open.
///
/// All nodes of one open file are the same value: GEM handles belong to the open file, and each has one owner there.
#[derive(Debug, Clone)]
pub struct Node(Arc<Open>);

#[derive(Debug)]
struct Open {
    file: File,
    path: PathBuf,
    device_number: u64,
    driver: String,
    pci_address: Option<PciAddress>,
    handles: Mutex<Handles>,
    /// Whether this process opened it here, and so may give up being DRM master.
    is_ours: bool,
    /// How many show something, for which the open file has to be DRM master.
    screens: Mutex<usize>,
}

/// The open nodes of this process.
static NODES: Mutex<Vec<Weak<Open>>> = Mutex::new(Vec::new());

/// A file that may be a DRM node.
struct Bare<'a>(BorrowedFd<'a>);

impl AsFd for Bare<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0
    }
}

impl drm::Device for Bare<'_> {}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
    }
}

impl drm::Device for Node {}
impl drm::control::Device for Node {}

impl Node {
    /// Opens the node at `path`.
    ///
    /// Whoever opens a card node that nobody else has is DRM master at once, and a display manager that starts later
    /// finds no screen. That is given up here: only a [`ScanOut`](super::ScanOut) takes the screen.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::PermissionDenied`], or [`Kind::InvalidInput`] where the file is
    /// no DRM node.
    pub fn open(path: &Path) -> Result<Self> {
        const TRIED: &str = "open a DRM node";
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(|error| {
            let error = Error::os(TRIED, error).on(path.display());
            match error.kind() {
                Kind::NotFound => error.next("ls /dev/dri lists the nodes of this machine"),
                Kind::PermissionDenied => error.next("join the groups video and render, or run as root"),
                _ => error,
            }
        })?;
        let open = Open { is_ours: true, ..Self::describe(TRIED, file, path.to_owned())? };
        // EINVAL where it was not, and of a render node: there is nothing to give up then.
        let _ = Bare(open.file.as_fd()).release_master_lock();
        // A new open file, which no other node can have.
        Ok(Self::register(&mut NODES.lock(), open))
    }

    /// Takes over an open node: a duplicate of a compositor's, which shares its open file. GEM handles of both are
    /// the same then, and so is being DRM master. Taken over twice, it is one node.
    ///
    /// The compositor must not import the same dma-buf in that open file: it has one handle there, and whoever closes
    /// it first ends it for both. What this library imports is counted.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] where the file is no DRM node; [`Kind::Unsupported`] where the process has another node
    /// of the device, and the kernel, older than Linux 6.10, cannot tell whether it is of the same open file. The
    /// descriptor is closed in each case.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        const TRIED: &str = "take over a DRM node";
        let path = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
            .map_err(|error| Error::os(TRIED, error))?;
        let open = Self::describe(TRIED, File::from(fd), path)?;
        // Kept beyond the lock: closing the last descriptor of a node can block.
        let known: Vec<Arc<Open>>;
        let mut nodes = NODES.lock();
        known = nodes.iter().filter_map(Weak::upgrade).collect();
        for other in known.iter().filter(|other| other.device_number == open.device_number) {
            match is_same_open_file(&open.file, &other.file) {
                Ok(true) => return Ok(Self(Arc::clone(other))),
                Ok(false) => {}
                Err(errno) => {
                    let why = "whether it is the open file of another node here cannot be told";
                    return Err(Error::new(Kind::Unsupported, TRIED, why)
                        .on(open.path.display())
                        .errno(errno)
                        .next("drop the other node first, or boot Linux 6.10 or later"));
                }
            }
        }
        Ok(Self::register(&mut nodes, open))
    }

    fn register(nodes: &mut Vec<Weak<Open>>, open: Open) -> Self {
        let open = Arc::new(open);
        nodes.retain(|other| other.strong_count() > 0);
        nodes.push(Arc::downgrade(&open));
        Self(open)
    }

    fn describe(tried: &'static str, file: File, path: PathBuf) -> Result<Open> {
        let status = rustix::fs::fstat(&file).map_err(|errno| Error::os(tried, errno).on(path.display()))?;
        let driver = Bare(file.as_fd()).get_driver().map_err(|error| {
            Error::new(Kind::InvalidInput, tried, format!("it is no DRM node: {error}"))
                .on(path.display())
                .next("ls /dev/dri lists the nodes of this machine")
        })?;
        Ok(Open {
            device_number: status.st_rdev,
            driver: driver.name().to_string_lossy().into_owned(),
            pci_address: pci_address_of(status.st_rdev),
            path,
            handles: Mutex::default(),
            is_ours: false,
            screens: Mutex::new(0),
            file,
        })
    }

    /// Its kernel driver, as DRM names it.
    pub fn driver(&self) -> &str {
        &self.0.driver
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Whether both are one open file, so that a handle of one is one of the other.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// What is known about its driver as an importer of VFIO dma-bufs, in the mode that the device is in.
    pub fn import_support(&self) -> Option<&'static ImportSupport> {
        let function = self.0.pci_address.and_then(|address| Function::read(address).ok());
        function.as_ref().and_then(import_support_of).or_else(|| import_support(self.driver()))
    }

    /// Has the open file be DRM master, until as many have given that back. A compositor's is left as it is: the kernel
    /// lets only the process that opened a file take the screen by it, which may be a session's and not ours.
    pub(super) fn take_master(&self) -> Result<(), Errno> {
        if !self.0.is_ours {
            return Ok(());
        }
        let mut screens = self.0.screens.lock();
        // Asked each time, for it may have been lost to a switch of consoles. Nothing happens where it is.
        self.acquire_master_lock().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        *screens += 1;
        Ok(())
    }

    /// The last gives it up.
    pub(super) fn give_master_back(&self) -> std::io::Result<()> {
        if !self.0.is_ours {
            return Ok(());
        }
        let mut screens = self.0.screens.lock();
        *screens -= 1;
        if *screens > 0 {
            return Ok(());
        }
        match self.release_master_lock() {
            // DRM master was lost before, to a switch of consoles.
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => Ok(()),
            result => result,
        }
    }

    /// The GEM handles of its open file. Whoever opens or closes one holds them meanwhile.
    pub(crate) fn handles(&self) -> MutexGuard<'_, Handles> {
        self.0.handles.lock()
    }

    /// Imports a dma-buf by PRIME: its handle in this open file, whoever else has it.
    pub(crate) fn handle_of(&self, dma_buf: &DmaBuf) -> Result<Handle> {
        self.prime_fd_to_buffer(dma_buf.as_fd())
            .map_err(|error| self.explain(Errno::from_io_error(&error).unwrap_or(Errno::IO)))
    }

    /// Gives one import back; the last closes the handle.
    pub(super) fn release_handle(&self, handle: Handle) -> std::io::Result<()> {
        // Held over the close: an import in between would be given the handle that is being closed.
        let mut handles = self.handles();
        if handles.give_back(handle) { self.close_buffer(handle) } else { Ok(()) }
    }

    fn explain(&self, errno: Errno) -> Error {
        let error = |kind, why: String| {
            Error::new(kind, "import a dma-buf by PRIME", why).on(self.name()).errno(errno)
        };
        match errno {
            Errno::OPNOTSUPP => {
                let because = self.import_support().map_or("it does not attach peer-to-peer", |row| row.because);
                error(
                    Kind::ImporterCannot,
                    format!("the driver {} cannot take memory of another device: {because}", self.driver()),
                )
                .next("amdgpu, xe, and virtio-gpu with blob resources and without 3D can")
            }
            Errno::INVAL => error(
                Kind::RouteRefused,
                "the kernel allows no peer-to-peer transfer between the two devices, or the buffer is no dma-buf".into(),
            )
            .next(format!(
                "peervram route LENDER {} says why, and what would change it",
                self.pci_address().map_or_else(|| self.path().display().to_string(), |address| address.to_string()),
            )),
            // dma_buf_phys_vec_to_sgt links every range at offset zero of the same IO addresses (seen
            // on Linux 7.3): the second finds them taken.
            Errno::ADDRINUSE => error(
                Kind::RouteRefused,
                "this kernel cannot map a buffer of several ranges through an IOMMU and a host bridge".into(),
            )
            .next("export one range, put both devices behind one PCIe switch, or boot with iommu=pt"),
            Errno::NODEV => error(Kind::MemoryDisabled, "the memory is revoked, or its device is gone".into())
                .next("switch the exporter's memory on and import again"),
            Errno::BADF => error(Kind::InvalidInput, "the descriptor is no dma-buf".into()),
            errno => Error::os("import a dma-buf by PRIME", errno).on(self.name()),
        }
    }
}

impl Importer for Node {
    type Memory = BufferObject;

    fn name(&self) -> String {
        format!("{}, {}", self.0.path.display(), self.0.driver)
    }

    fn pci_address(&self) -> Option<PciAddress> {
        self.0.pci_address
    }

    fn on_revoke(&self) -> OnRevoke {
        on_revoke(self.driver())
    }

    fn governed_by_p2pdma(&self) -> bool {
        true
    }

    fn import(&self, dma_buf: &DmaBuf) -> Result<BufferObject> {
        let mut handles = self.handles();
        let handle = self.handle_of(dma_buf)?;
        handles.take(handle, User::Node).map_err(|error| error.on(self.name()))?;
        drop(handles);
        Ok(BufferObject::new(self.clone(), handle, dma_buf.size_bytes()))
    }

    /// A buffer of its own would have to be copied to by the CPU: the kernel maps it in a way that no other
    /// device's DMA can pin (`drm_gem_shmem_mmap` sets VM_PFNMAP), and a screen has to be told of each change.
    fn stage(&self, _: u64) -> Result<BufferObject> {
        let why = "memory of a DRM node cannot be pinned for the engine that would copy to it";
        Err(Error::new(Kind::Unsupported, "make staging memory", why)
            .on(self.name())
            .next("stage to a Vulkan device, and show what that has"))
    }

    fn release(&self, memory: BufferObject) -> Result<()> {
        memory.close()
    }
}

/// What an import needs around a revoke, by the kernel's driver.
fn on_revoke(driver: &str) -> OnRevoke {
    match driver {
        // Unmaps when it is told, and is told at once (virtgpu_dma_buf_move_notify in virtgpu_prime.c). It maps again
        // only for a framebuffer's next commit.
        "virtio_gpu" => OnRevoke::Reimport,
        // amdgpu unmaps when it is told (amdgpu_dma_buf_move_notify), and as long as the memory is away refuses with
        // ENODEV every submission whose list has the import: user-space drivers put all that is resident there. xe
        // unmaps only at its next validation (xe_bo_move), for which the reset would wait. What others do is not known,
        // and what was freed is right for all.
        _ => OnRevoke::FreeBefore,
    }
}

/// The PCI function above a DRM node: the last address in its path through sysfs. For virtio-gpu
/// the node's own device is a virtio one, a level below.
fn pci_address_of(device_number: u64) -> Option<PciAddress> {
    let (major, minor) = (rustix::fs::major(device_number), rustix::fs::minor(device_number));
    let path = std::fs::canonicalize(format!("/sys/dev/char/{major}:{minor}/device")).ok()?;
    path.iter().rev().find_map(|component| component.to_str()?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_import_is_freed_before_a_revoke_unless_its_driver_is_known_to_let_go() {
        assert_eq!(on_revoke("virtio_gpu"), OnRevoke::Reimport);
        for driver in ["amdgpu", "xe", "nova", "unheard_of", ""] {
            assert_eq!(on_revoke(driver), OnRevoke::FreeBefore, "{driver}");
        }
    }
}
