//! A process that borrows from a broker: another user, without a privilege, who does as the test tells it.
//!
//! Orders are lines on its standard input, a socket, and each has one line as its answer:
//!
//! ```text
//! borrow BYTES      ok NUMBER            a lease; its events are kept from here on
//! many COUNT BYTES  ok                   that many more leases, which it keeps
//! attach            ok                   its importer imports the lease
//! look GENERATION   ok RIGHT TORN WRONG  looks until it has seen right bytes of that generation twice
//! until-gone        ok RIGHT TORN WRONG  looks until the memory is gone for good
//! look-for GENERATION  the same          the bytes of that generation of the lender, in whichever of its own
//! store SEED        ok GENERATION        its engine fills the lease
//! has SEED, zeros   ok yes | ok no       what its engine sees in the lease
//! inside, finish    ok, ok OUTCOME       an access, from the one to the other
//! hear              ok draining(reset) restored        the events since the last time
//! hear-until KIND   the same             and waits for that one
//! hide              ok INODE             sends the dma-buf over its standard input
//! return            ok                   gives the lease back
//! churn SEED        wrong bytes, if any  works on leases until it is killed or the broker is gone
//! ```
//! An answer that begins with `failed` has the error's code and its words.

mod hands;
mod program;

use std::fs;
use std::io::{BufRead, BufReader, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::chown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use peervram::backends::PciAddress;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, Signal, kill_process};

use crate::crossing::check_screen;
use crate::guest::Guest;
use crate::holder;
use crate::painted::picture_of;

pub use program::run;

/// Who borrows: nobody, as Debian has it.
pub const USER: u32 = 65534;

/// What it imports with.
#[derive(Clone, Debug)]
pub enum With {
    /// A model GPU's engine, by iommufd.
    Engine(PciAddress),
    /// The machine's virtio GPU.
    Screen,
    /// The holder, on behalf of the virtio GPU.
    Holder,
    /// The same, but its imports must be freed before memory is taken back.
    HolderFreedBefore,
    /// A CPU, of what the broker copies for it.
    Copies,
    /// Nothing: it is never told to attach.
    Nothing,
}

/// A borrower; ended with this value.
pub struct Borrower<'guest> {
    guest: &'guest Guest,
    child: Child,
    orders: UnixStream,
    answers: BufReader<ChildStdout>,
    _nodes: Nodes,
}

impl<'guest> Borrower<'guest> {
    /// Starts one that is connected to the broker at `socket`.
    pub fn start(guest: &'guest Guest, socket: &Path, with: &With) -> Result<Self> {
        let (nodes, words) = with.prepare(guest)?;
        let nodes = Nodes::give(nodes)?;
        let (orders, input) = UnixStream::pair()?;
        let mut child = Command::new("/proc/self/exe")
            .arg("borrow")
            .arg(socket)
            .args(words)
            .stdin(OwnedFd::from(input))
            .stdout(Stdio::piped())
            .uid(USER)
            .gid(USER)
            .spawn()
            .context("starting a borrower")?;
        let answers = BufReader::new(child.stdout.take().context("it has no output")?);
        let mut borrower = Self { guest, child, orders, answers, _nodes: nodes };
        borrower.hear().context("a borrower that starts")?;
        Ok(borrower)
    }

    /// Tells it something, and waits for its answer.
    pub fn ask(&mut self, order: &str) -> Result<String> {
        self.tell(order)?;
        self.hear().with_context(|| format!("a borrower, told to {order:?}"))
    }

    /// Tells it something. Its answer is to be heard.
    pub fn tell(&mut self, order: &str) -> Result<()> {
        writeln!(self.orders, "{order}").with_context(|| format!("telling a borrower to {order:?}"))
    }

    /// Its answer to what it was told. Looks at the screen meanwhile, where it asks for that.
    pub fn hear(&mut self) -> Result<String> {
        loop {
            let line = self.line()?;
            if let Some(generation) = line.strip_prefix("showing ") {
                let picture = picture_of(generation.parse()?)?;
                let is_right = check_screen(&self.guest.screendump()?, &picture).is_ok();
                self.tell(if is_right { "right" } else { "wrong" })?;
                continue;
            }
            return match line.split_once(' ') {
                None if line == "ok" => Ok(String::new()),
                Some(("ok", answer)) => Ok(answer.to_owned()),
                _ => bail!("{line}"),
            };
        }
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.answers.read_line(&mut line).context("listening to a borrower")?;
        ensure!(!line.is_empty(), "it is gone; standard error has its reason");
        Ok(line.trim_end().to_owned())
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Kills it as hard as a process can be killed. What it sent is still there, unread, until the socket is dropped. Says
    /// what it had said and nobody had heard.
    pub fn kill(mut self) -> Result<(UnixStream, Vec<String>)> {
        self.child.kill()?;
        self.child.wait()?;
        let said = self.answers.by_ref().lines().map_while(Result::ok).collect();
        Ok((self.orders.try_clone()?, said))
    }
}

/// The descriptor that a borrower has hidden in its socket.
pub fn receive_descriptor(socket: &UnixStream) -> Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let descriptors = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    descriptors.flatten().next().context("nothing is hidden in the socket")
}

impl Drop for Borrower<'_> {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl With {
    /// What belongs to the borrower for as long as it lives, and the words that its program is started with.
    fn prepare(&self, guest: &Guest) -> Result<(Vec<PathBuf>, [String; 2])> {
        let words = |what: &str, of: String| [what.to_owned(), of];
        Ok(match self {
            Self::Engine(address) => {
                let folder = address.sysfs_path().join("vfio-dev");
                let entry = fs::read_dir(&folder).with_context(|| folder.display().to_string())?.next();
                let name = entry.context("it has no VFIO character device")??.file_name();
                let nodes = vec![Path::new("/dev/vfio/devices").join(name), "/dev/iommu".into()];
                (nodes, words("engine", address.to_string()))
            }
            Self::Screen => {
                let node = guest.virtio_gpu_node()?;
                (vec![node.clone()], words("screen", node.display().to_string()))
            }
            Self::Holder | Self::HolderFreedBefore => {
                // Loads the module.
                holder::Hold::open()?;
                let is_freed_before = matches!(self, Self::HolderFreedBefore);
                let what = if is_freed_before { "holder-freed-before" } else { "holder" };
                (vec![holder::DEVICE.into()], words(what, guest.virtio_gpu()?))
            }
            Self::Copies => (Vec::new(), words("copied", String::new())),
            Self::Nothing => (Vec::new(), words("holder", "0000:00:00.0".into())),
        })
    }
}

/// Device nodes that belong to the borrowers' user, as a rule of udev would have it; root's again when this is dropped.
struct Nodes(Vec<PathBuf>);

impl Nodes {
    fn give(nodes: Vec<PathBuf>) -> Result<Self> {
        for node in &nodes {
            chown(node, Some(USER), Some(USER)).with_context(|| format!("giving {} away", node.display()))?;
        }
        Ok(Self(nodes))
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for node in &self.0 {
            chown(node, Some(0), Some(0)).ok();
        }
    }
}
