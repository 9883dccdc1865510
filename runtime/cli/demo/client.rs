//! The demo's client: a process of another user that borrows, draws or shows, stops when it is told, and goes on.

use std::io;
use std::path::Path as FilePath;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use peervram::backends::drm::{BufferObject, Node, ScanOut};
use peervram::backends::vulkan::{self, Buffer, Engine, Instance, Selector};
use peervram::backends::{ImageLayout, Importer};
use peervram::broker::client::{self, Lease, Wish};
use peervram::{Attachment, Direction, Error, EventKind, Events, Kind, Outcome, Path, Result, Trust};
use peervram_programs::bytes;

use super::told::{Row, Told, tell};
use super::{Arguments, Check, card_of, painted_of, size_in_memory};
use crate::import::DEVICE_LIMIT;
use crate::picture::{Picture, layout_of};

const TRIED: &str = "use borrowed memory";
/// In a user namespace this process has another name than outside, where it is put in the place of this.
const WHO: &str = "client";
/// How long anybody may leave the client without a word.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long returning the memory may take: nobody is in it any more.
const RETURN_LIMIT: Duration = Duration::from_secs(10);

/// Does all of it, and tells it on standard output.
pub fn run(socket: &FilePath, arguments: &Arguments) -> ExitCode {
    // As `peervram status` shows it; the path that it was started by says less.
    let _ = rustix::thread::set_name(c"peervram");
    let done = match &arguments.show {
        Some(node) => show(socket, node, arguments),
        None => draw(socket, arguments),
    };
    let last = match done {
        Ok(()) => Told::Finished,
        Err(error) => Told::Failed {
            code: error.kind().code().into(),
            why: error.headline().to_string(),
            next: error.next_step().map(str::to_owned),
        },
    };
    let is_heard = tell(&mut peervram_programs::output(), &last, &[]).is_ok();
    if is_heard && matches!(last, Told::Finished) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn draw(socket: &FilePath, arguments: &Arguments) -> Result<()> {
    let Ok(selector) = arguments.vulkan.parse::<Selector>();
    let device = Arc::new(Instance::open()?.open_device(&selector)?);
    let engine = Engine::new(&device)?;
    Client::new(socket, arguments, Drawer { device, engine, card: card_of(arguments) })?.run()
}

fn show(socket: &FilePath, node: &FilePath, arguments: &Arguments) -> Result<()> {
    let node = Node::open(node).map_err(|error| match error.kind() {
        Kind::PermissionDenied => {
            error.next("let the client's user open it: setfacl -m u:nobody:rw NODE, or a rule of udev")
        }
        _ => error,
    })?;
    let layout = layout_of(&card_of(arguments));
    Client::new(socket, arguments, Screen { node: Arc::new(node), layout })?.run()
}

/// What a client does with memory.
trait Use {
    type Importer: Importer;
    /// What lasts until the memory is taken back.
    type Held<'m>;
    const DIRECTION: Direction;

    fn importer(&self) -> Arc<Self::Importer>;

    /// Has the picture of that generation in use. Returns what is held meanwhile, and the bytes that the device reads.
    fn begin<'m>(
        &mut self,
        memory: &'m <Self::Importer as Importer>::Memory,
        at: &At,
    ) -> Result<(Self::Held<'m>, Vec<u8>)>;
}

/// Of which generation, and by which path.
struct At {
    path: Path,
    generation: u64,
}

impl At {
    fn did(&self, what: &str, begun: Instant, check: Check) -> Result<()> {
        did(Row::new(WHO, what, begun, check).of_memory(self.path, self.generation))
    }
}

/// Vulkan draws into the memory: the test card at first, and after a revoke the card painted over.
struct Drawer {
    device: Arc<vulkan::Device>,
    engine: Engine,
    card: Picture,
}

impl Use for Drawer {
    type Importer = vulkan::Device;
    type Held<'m> = ();
    const DIRECTION: Direction = Direction::Both;

    fn importer(&self) -> Arc<vulkan::Device> {
        Arc::clone(&self.device)
    }

    fn begin(&mut self, memory: &Buffer, at: &At) -> Result<((), Vec<u8>)> {
        let deadline = || Instant::now() + DEVICE_LIMIT;
        let size_bytes = self.card.bytes().len();
        let mut seen = vec![0; size_bytes];
        if at.generation == 0 {
            let begun = Instant::now();
            self.engine.read_back(memory, 0, &mut seen, deadline())?;
            let left = seen.iter().filter(|byte| **byte != 0).count();
            let what = match left {
                0 => format!("all {size_bytes} bytes zero"),
                left => format!("{left} of {size_bytes} bytes are not zero"),
            };
            at.did("finds no old bytes", begun, Check { passed: left == 0, what })?;
        }
        let begun = Instant::now();
        self.engine.upload(memory, 0, self.card.bytes(), deadline())?;
        let sum = self.engine.checksum(memory, 0..size_bytes as u64, deadline())?;
        let expected = vulkan::checksum(self.card.bytes());
        let check = Check::equal(&sum, &expected, format!("sum {sum:08x}"));
        at.did("draws a test card", begun, check)?;
        let mut expected = self.card.clone();
        let mut what = "reads it back";
        let begun = Instant::now();
        if at.generation > 0 {
            expected = painted_of(&self.card)?;
            what = "paints over it";
            self.engine.paint(memory, &layout_of(&self.card), super::PAINT_PARAMETER, deadline())?;
        }
        self.engine.read_back(memory, 0, &mut seen, deadline())?;
        at.did(what, begun, Check::of_bytes(&seen, expected.bytes()))?;
        Ok(((), seen))
    }
}

/// A screen shows what the owner has painted.
struct Screen {
    node: Arc<Node>,
    layout: ImageLayout,
}

impl Use for Screen {
    type Importer = Node;
    type Held<'m> = ScanOut<'m>;
    const DIRECTION: Direction = Direction::Read;

    fn importer(&self) -> Arc<Node> {
        Arc::clone(&self.node)
    }

    fn begin<'m>(&mut self, memory: &'m BufferObject, at: &At) -> Result<(ScanOut<'m>, Vec<u8>)> {
        let begun = Instant::now();
        let scan_out = ScanOut::start(memory, self.layout)?;
        let check = Check { passed: true, what: "accepted by the driver".into() };
        at.did("shows it", begun, check)?;
        Ok((scan_out, Vec::new()))
    }
}

/// A client with a lease.
struct Client<U: Use> {
    // Fields drop in this order: the import, the lease, the importer.
    attachment: Attachment<U::Importer>,
    events: Events,
    lease: Lease,
    work: U,
}

impl<U: Use> Client<U> {
    /// Borrows memory for a picture, and attaches the importer to it.
    fn new(socket: &FilePath, arguments: &Arguments, work: U) -> Result<Self> {
        let begun = Instant::now();
        let broker = client::Broker::connect(socket)?;
        let lease = broker.borrow(Wish::of_size(size_in_memory(arguments)).with_label("peervram demo"))?;
        let size = bytes::in_words(lease.size_bytes());
        let what = format!("lease {}, {size}", lease.number());
        let row = Row::new(WHO, "borrows", begun, Check { passed: true, what });
        did(Row { generation: Some(lease.generation()), ..row })?;
        let events = lease.events()?;

        let begun = Instant::now();
        let importer = work.importer();
        let name = importer.name();
        let attachment = lease.attach(importer, Trust::Unverified)?;
        for (path, error) in attachment.refused() {
            say(&Told::Refused(format!("{name} by {path}: {}", error.why())))?;
        }
        let row = Row::new(WHO, "imports", begun, Check { passed: true, what: name });
        did(row.of_memory(attachment.path(), attachment.generation()))?;
        Ok(Self { attachment, events, lease, work })
    }

    fn run(mut self) -> Result<()> {
        say(&Told::Attached)?;
        wait_for_line()?;
        self.until_taken_back()?;

        let begun = Instant::now();
        let mut heard = vec!["draining"];
        self.hear_until("restored", &mut heard)?;
        self.attachment.current()?;
        let generation = self.attachment.generation();
        let check = Check { passed: generation > 0, what: heard.join(", ") };
        did(Row::new(WHO, "hears, imports anew", begun, check).of_memory(self.attachment.path(), generation))?;
        self.once_more()?;

        let begun = Instant::now();
        let Self { attachment, lease, .. } = self;
        attachment.detach()?;
        lease.give_back(RETURN_LIMIT)?;
        did(Row::new(WHO, "gives it back", begun, Check { passed: true, what: "the lease is over".into() }))
    }

    /// Has the first picture in use until it is told to stop; stops, which answers the broker.
    fn until_taken_back(&mut self) -> Result<()> {
        let access = self.attachment.enter(U::DIRECTION)?;
        let at = At { path: self.attachment.path(), generation: access.generation() };
        let (held, seen) = self.work.begin(access.memory(), &at)?;
        drawn(access.generation(), &seen)?;
        self.hear_until("draining", &mut Vec::new())?;

        let begun = Instant::now();
        let check = match self.attachment.enter(U::DIRECTION) {
            Err(refused) => {
                Check { passed: true, what: format!("gate shut: {}", Error::from(refused).why()) }
            }
            Ok(_) => Check { passed: false, what: "let in, though the memory is taken back".into() },
        };
        at.did("enters once more", begun, check)?;
        let begun = Instant::now();
        drop(held);
        let outcome = access.finish();
        let what = "nobody is in any more".into();
        let stops = Check { passed: outcome == Outcome::Ok, what };
        did(Row::new(WHO, "stops", begun, stops).of_memory(at.path, at.generation))
    }

    /// The picture of the next generation: what the memory holds after a revoke nobody knows.
    fn once_more(&mut self) -> Result<()> {
        let access = self.attachment.enter(U::DIRECTION)?;
        let at = At { path: self.attachment.path(), generation: access.generation() };
        let (held, seen) = self.work.begin(access.memory(), &at)?;
        drawn(access.generation(), &seen)?;
        wait_for_line()?;
        drop(held);
        access.finish().check()
    }

    /// Waits for an event, and keeps what comes before.
    ///
    /// # Errors
    /// [`Kind::Gone`]: the broker has ended.
    fn hear_until(&self, wanted: &str, heard: &mut Vec<&'static str>) -> Result<()> {
        let begun = Instant::now();
        loop {
            let left = PATIENCE.saturating_sub(begun.elapsed());
            let Some(event) = self.events.next_within(left)? else {
                let why = format!("nothing was heard of the memory for {} s", PATIENCE.as_secs());
                return Err(Error::new(Kind::TimedOut, TRIED, why));
            };
            heard.push(event.kind.code());
            match event.kind {
                _ if event.kind.code() == wanted => return Ok(()),
                EventKind::Gone => return Err(self.is_gone(begun)),
                EventKind::CalledOff => {
                    return Err(Error::new(
                        Kind::StillInUse,
                        TRIED,
                        "the memory was not taken back after all",
                    ));
                }
                _ => {}
            }
        }
    }

    /// What it means for a client that its broker has ended.
    fn is_gone(&self, begun: Instant) -> Error {
        let (is_refused, what) = match self.attachment.enter(U::DIRECTION) {
            Err(refused) => (true, format!("gone; its gate is shut: {}", Error::from(refused).why())),
            Ok(_) => (false, "gone; and yet it is let in".to_owned()),
        };
        let row = Row::new(WHO, "hears of its broker", begun, Check { passed: is_refused, what });
        match did(row) {
            Ok(()) => Error::new(Kind::Gone, TRIED, "the broker has ended in the middle"),
            Err(error) => error,
        }
    }
}

fn drawn(generation: u64, seen: &[u8]) -> Result<()> {
    let told = Told::Drawn { generation, size_bytes: seen.len() };
    tell(&mut peervram_programs::output(), &told, seen)
}

fn did(row: Row) -> Result<()> {
    say(&Told::Did(row))
}

fn say(told: &Told) -> Result<()> {
    tell(&mut peervram_programs::output(), told, &[])
}

/// Waits until it is told to go on.
///
/// # Errors
/// Whoever has started it is gone.
fn wait_for_line() -> Result<()> {
    let read = io::stdin().read_line(&mut String::new()).map_err(|error| Error::os(TRIED, error))?;
    match read {
        0 => Err(Error::new(Kind::Gone, TRIED, "the demo has ended in the middle")),
        _ => Ok(()),
    }
}
