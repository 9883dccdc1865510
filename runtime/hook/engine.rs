//! Guarded engines. An importer or an owner gives its engines by reference, so that each is asked for anew where it
//! is used.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use peervram_backends::{Aperture, DmaRanges, Engine, Error, HostSlice, Importer, Kind};

use super::{Hook, ask, call};
use crate::Result;

/// What an engine is called that cannot be asked.
const NAMELESS: &str = "engine";

/// Where an engine is found.
pub(super) trait Finds: Send + Sync {
    type Memory: ?Sized + 'static;
    fn find(&self) -> Option<&dyn Engine<Self::Memory>>;
    fn whose(&self) -> String;
}

/// An engine, found at each use.
pub(super) struct GuardedEngine<F>(pub F);

impl<F: Finds> GuardedEngine<F> {
    fn call<T>(&self, hook: Hook, act: impl FnOnce(&dyn Engine<F::Memory>) -> Result<T>) -> Result<T> {
        call(
            hook,
            || self.0.whose(),
            || match self.0.find() {
                Some(engine) => act(engine),
                None => {
                    Err(Error::new(Kind::Unsupported, "use an engine", "it has none any more")
                        .on(self.0.whose()))
                }
            },
        )
    }
}

#[deny(clippy::missing_trait_methods)]
impl<F: Finds> Engine<F::Memory> for GuardedEngine<F> {
    fn name(&self) -> &str {
        let name = || self.0.find().map_or(NAMELESS, Engine::name);
        ask(Hook::EngineName, || self.0.whose(), NAMELESS, name)
    }

    fn read(&self, memory: &F::Memory, offset_bytes: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
        self.call(Hook::EngineRead, |engine| engine.read(memory, offset_bytes, host, deadline))
    }

    fn write(
        &self,
        memory: &F::Memory,
        offset_bytes: u64,
        host: &HostSlice,
        deadline: Instant,
    ) -> Result<()> {
        self.call(Hook::EngineWrite, |engine| engine.write(memory, offset_bytes, host, deadline))
    }

    fn copy(
        &self,
        from: (&F::Memory, u64),
        to: (&F::Memory, u64),
        length_bytes: u64,
        deadline: Instant,
    ) -> Result<Option<Duration>> {
        self.call(Hook::EngineCopy, |engine| engine.copy(from, to, length_bytes, deadline))
    }
}

/// The engine of the aperture's owner.
pub(super) struct OfOwner(pub Aperture);

impl Finds for OfOwner {
    type Memory = DmaRanges;

    fn find(&self) -> Option<&dyn Engine<DmaRanges>> {
        self.0.owner()?.engine()
    }

    fn whose(&self) -> String {
        self.0.owner().map_or_else(String::new, |owner| owner.name().to_owned())
    }
}

/// An engine of an importer, by its place among them.
pub(super) struct OfImporter<I> {
    importer: Arc<I>,
    number: usize,
}

impl<I: Importer> Finds for OfImporter<I> {
    type Memory = I::Memory;

    fn find(&self) -> Option<&dyn Engine<I::Memory>> {
        self.importer.engines().get(self.number).copied()
    }

    fn whose(&self) -> String {
        self.importer.name()
    }
}

/// As many engines of an importer as it had at any time.
pub(super) struct ImporterEngines<I>(OnceLock<Box<Known<I>>>);

struct Known<I> {
    engine: GuardedEngine<OfImporter<I>>,
    next: ImporterEngines<I>,
}

impl<I> Default for ImporterEngines<I> {
    fn default() -> Self {
        Self(OnceLock::new())
    }
}

impl<I: Importer> ImporterEngines<I> {
    /// The first `count` engines of `importer`.
    pub fn first(&self, importer: &Arc<I>, count: usize) -> Vec<&dyn Engine<I::Memory>> {
        let mut at = self;
        let engine = |number| {
            let known = at.0.get_or_init(|| {
                let engine = GuardedEngine(OfImporter { importer: Arc::clone(importer), number });
                Box::new(Known { engine, next: Self::default() })
            });
            at = &known.next;
            &known.engine as &dyn Engine<I::Memory>
        };
        (0..count).map(engine).collect()
    }
}
