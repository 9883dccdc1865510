//! What a test is, and one test's run in a process of its own.
//!
//! ```ignore
//! Test::new("vfio/exports-a-range", exports_a_range).on(Facts::exports_dma_bufs)
//!
//! fn exports_a_range(guest: &Guest) -> Verdict {
//!     let lender = guest.lender()?;
//!     ensure!(export(lender)?.size() == 4096, "the size is wrong");
//!     Ok(())
//! }
//! ```
//! An error is a failure; `skip!("no render node")` is a skip; a panic is a failure with its
//! message. What the kernel complains of meanwhile fails the test, unless it is allowed.

use anyhow::{Context, Result};
use peervram_lab::machine::{Facts, Topology};
use peervram_lab::{LAYERS, validation, wire};
use std::ffi::OsString;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::driver;
use crate::guest::Guest;
use crate::tests;

/// How a test's function ends.
pub type Verdict = Result<()>;

/// How long a test may take that runs only where it is named.
const LONG: Duration = Duration::from_secs(30 * 60);

/// A test.
#[derive(Debug)]
pub struct Test {
    /// "part/what-is-so".
    pub name: &'static str,
    function: fn(&Guest) -> Verdict,
    with: fn(&Facts) -> bool,
    on: fn(&Facts) -> bool,
    is_of_a_topology: bool,
    is_only_when_named: bool,
    allowed: &'static [&'static str],
    /// What the Vulkan driver pretends.
    pretence: Option<&'static str>,
    /// The real Vulkan driver that it runs under.
    driver: Option<&'static str>,
}

impl Test {
    /// A test for every machine with a device that only lends and a GPU with a screen.
    pub const fn new(name: &'static str, function: fn(&Guest) -> Verdict) -> Test {
        Test {
            name,
            function,
            with: |facts| {
                facts.has_lender_and_screen()
                    && !facts.has_every_importer()
                    && !facts.has_grace()
                    && !facts.drivers
            },
            on: |_| true,
            is_of_a_topology: true,
            is_only_when_named: false,
            allowed: &[],
            pretence: None,
            driver: None,
        }
    }

    /// A test for every machine with model GPUs.
    pub const fn of_models(name: &'static str, function: fn(&Guest) -> Verdict) -> Test {
        let with: fn(&Facts) -> bool =
            |facts| facts.has_models() && !facts.has_every_importer() && !facts.has_grace();
        Test { with, ..Test::new(name, function) }
    }

    /// A test for the machine with every kind of lender and importer, where memory is taken back from all.
    pub const fn of_revoke(name: &'static str, function: fn(&Guest) -> Verdict) -> Test {
        Test { with: Facts::has_every_importer, ..Test::new(name, function) }
    }

    /// A test for every machine with GPUs whose memory is memory of the machine.
    pub const fn of_grace(name: &'static str, function: fn(&Guest) -> Verdict) -> Test {
        Test { with: Facts::has_grace, ..Test::new(name, function) }
    }

    /// A test for every machine with a network card that imports.
    pub const fn of_network_card(name: &'static str, function: fn(&Guest) -> Verdict) -> Test {
        Test { with: Facts::has_network_card, ..Test::new(name, function) }
    }

    /// A test for every machine with two Vulkan drivers.
    pub const fn of_two_drivers(name: &'static str, function: fn(&Guest) -> Verdict) -> Test {
        Test { with: Facts::has_two_vulkan_drivers, ..Test::new(name, function) }
    }

    /// A test under the real Vulkan driver of that name, on a stand-in for its GPU ([`peervram_lab::driver`]).
    pub const fn of_driver(
        name: &'static str,
        driver: &'static str,
        function: fn(&Guest) -> Verdict,
    ) -> Test {
        Test { with: |facts| facts.drivers, driver: Some(driver), ..Test::new(name, function) }
    }

    /// A test for every machine that has a row of devices, whatever these are.
    pub const fn of_all(name: &'static str, function: fn(&Guest) -> Verdict) -> Test {
        Test { with: |facts| facts.topology != Topology::Tree, ..Test::new(name, function) }
    }

    /// A test for the machines for shapes, which have a tree of functions instead.
    pub const fn of_shapes(name: &'static str, function: fn(&Guest) -> Verdict) -> Test {
        Test { with: |facts| facts.topology == Topology::Tree, ..Test::new(name, function) }
    }

    /// The same, only for machines like this; elsewhere it is not even counted.
    pub const fn on(self, on: fn(&Facts) -> bool) -> Test {
        Test { on, ..self }
    }

    /// The same, and it comes out the same whatever the topology and the IOMMU are: where no machine is named, it runs
    /// on the usual ones only, with each kernel.
    pub const fn on_any_topology(self) -> Test {
        Test { is_of_a_topology: false, ..self }
    }

    /// The same, and it takes long: it runs only where its whole name is given. The host hears of it all the while, by cells or
    /// otherwise, or takes the guest for lost.
    pub const fn only_when_named(self) -> Test {
        Test { is_only_when_named: true, ..self }
    }

    /// The same, allowed to make the kernel say these things.
    pub const fn allowing(self, allowed: &'static [&'static str]) -> Test {
        Test { allowed, ..self }
    }

    /// The same, with a Vulkan driver that seems to be another one (lab/layer).
    pub const fn pretending(self, what: &'static str) -> Test {
        Test { pretence: Some(what), ..self }
    }

    /// What it is started with: the validation layers watch, and the driver is another one where it says so.
    pub fn environment(&self) -> Result<Vec<(&'static str, OsString)>> {
        let mut all = validated();
        all.extend(
            self.pretence
                .into_iter()
                .flat_map(|what| validation::pretending(what, &Path::new(wire::SHARE).join(LAYERS))),
        );
        if let Some(driver) = self.driver {
            all.extend(driver::environment(driver)?);
        }
        Ok(all)
    }

    /// How long it may take.
    pub fn limit(&self) -> Duration {
        if self.is_only_when_named { LONG } else { wire::TEST_LIMIT }
    }

    /// Whether it is for that machine.
    pub fn is_for(&self, facts: &Facts) -> bool {
        (self.with)(facts) && (self.on)(facts)
    }

    /// The form in which the host lists the test.
    pub fn listed(&self) -> wire::Listed {
        let Test { name, is_of_a_topology, is_only_when_named, .. } = *self;
        wire::Listed { name: name.into(), is_of_a_topology, is_only_when_named }
    }

    /// Whether the kernel may say that during this test.
    pub fn allows(&self, message: &str) -> bool {
        self.allowed.iter().any(|part| message.contains(part))
    }
}

/// What every program of the guest is started with: the validation layers watch its calls of Vulkan.
pub fn validated() -> Vec<(&'static str, OsString)> {
    validation::environment(&Path::new(wire::SHARE).join(validation::SETTINGS)).into()
}

/// An error that is no failure: something that the test needs is not there.
#[derive(Debug)]
pub struct Skip(pub String);

impl std::fmt::Display for Skip {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// Ends a test as skipped, with the reason.
#[macro_export]
macro_rules! skip {
    ($($reason:tt)+) => {
        return Err($crate::test::Skip(format!($($reason)+)).into())
    };
}

/// The child process: runs one test and tells the agent.
pub fn run_child(name: &str) -> Result<()> {
    let test = tests::all().find(|test| test.name == name).with_context(|| format!("no test {name}"))?;
    let guest = Guest::new()?;
    // A test may give up the rights that this takes.
    let link = guest.link()?;
    let start = Instant::now();
    let verdict = verdict(test, &guest);
    let seconds = start.elapsed().as_secs_f64();
    // After all else that the test has said, so by the same link: another one could overtake it.
    link.send(&wire::Event::Tested { name: name.into(), verdict, seconds })
}

fn verdict(test: &Test, guest: &Guest) -> wire::Verdict {
    let panicked = Arc::new(Mutex::new(String::new()));
    let message = Arc::clone(&panicked);
    panic::set_hook(Box::new(move |info| {
        peervram_programs::note!("{info}");
        *message.lock().unwrap_or_else(PoisonError::into_inner) = info.to_string();
    }));
    let result = panic::catch_unwind(AssertUnwindSafe(|| (test.function)(guest)));
    drop(panic::take_hook());
    match result {
        Ok(Ok(())) => wire::Verdict::Passed,
        Ok(Err(error)) => match error.downcast_ref::<Skip>() {
            Some(Skip(reason)) => wire::Verdict::Skipped { reason: reason.clone() },
            None => wire::Verdict::Failed { reason: format!("{error:#}") },
        },
        Err(_) => {
            let message = panicked.lock().unwrap_or_else(PoisonError::into_inner);
            wire::Verdict::Failed { reason: message.clone() }
        }
    }
}
