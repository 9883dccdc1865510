//! Whether bytes that cross between two devices arrive: the test, and the certificate that it leaves.
//!
//! That a buffer was imported proves nothing about the data path. Here the owner of lent memory writes bytes
//! that say where they belong and the importer's engines read them; the importer's engines write and the owner
//! looks. Who looks for the owner is said: its own engine sees what its device has; the CPU sees only what the
//! importer sees, through the same window.
//!
//! Order of calls: [`Attachment::verify`](crate::Attachment::verify) -> [`Store::keep`]; later
//! [`Store::current`], which refuses what anything has voided. An attachment that asks for
//! [`Trust::Verified`](crate::Trust::Verified) does the same by itself.
//!
//! Absent on purpose: opinions about speed. The figures are what one copy took.

mod certificate;
mod date;
mod difference;
mod failure;
mod faults;
mod fingerprint;
mod observer;
mod pattern;
mod places;
mod run;
mod store;
mod subject;
#[cfg(all(test, feature = "host", not(feature = "shuttle")))]
mod tests;
mod text;

use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

use peervram_backends::{Error, Importer, Kind, deadline_after};

pub use certificate::{Certificate, Figure, Tested};
pub use difference::Difference;
pub use failure::Failure;
pub use faults::Faults;
pub use fingerprint::{Fingerprint, Void};
pub use observer::Observer;
pub use places::VerifiedPart;
pub use store::{Ignored, Listing, Store};
pub use subject::{Extent, Party, Request, Subject};

use crate::export_inner::ExportInner;
use crate::piece_lock::PieceLock;
use crate::plan::Evidence;
use crate::{Direction, Path, Result};
use faults::FaultWatch;
use observer::View;
use run::{Findings, Halves, Run};

const TRIED: &str = "verify a path";

/// How much is tested, for how long, and what counts.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Limits {
    /// At most so much in a quick test; a little more where that is less than all borders need, those between
    /// ranges among them.
    pub quick_bytes: u64,
    /// Everything, after the quick test.
    pub full: bool,
    /// For one copy of an engine.
    pub copy_timeout: Duration,
    /// For the quick test of one engine in one direction.
    pub quick_timeout: Duration,
    /// The CPU looks through the BAR, although the owner has an engine.
    pub by_cpu: bool,
    /// A reboot does not void the certificate. What firmware sets up at boot cannot be read, so it does
    /// unless this is asked for.
    pub outlives_reboots: bool,
    /// What patterns are made from; another number each time where it is not given.
    pub seed: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            quick_bytes: 2 << 20,
            full: false,
            copy_timeout: Duration::from_secs(10),
            quick_timeout: Duration::from_secs(30),
            by_cpu: false,
            outlives_reboots: false,
            seed: None,
        }
    }
}

/// How far a test is.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Progress<'a> {
    /// In which direction.
    pub direction: Direction,
    /// By which engine.
    pub engine: &'a str,
    /// Tested so far.
    pub done_bytes: u64,
    /// Of so many.
    pub of_bytes: u64,
}

/// The subject of a certificate for this lender and importer.
pub(crate) fn subject<I: Importer>(export: &ExportInner, importer: &I) -> Subject {
    let address = export.device().exporter().ok().and_then(|device| device.pci_address());
    Subject {
        lender: Party::new(export.device_name(), address),
        region: export.aperture().ranges().region_index(),
        importer: Party::new(&importer.name(), importer.pci_address()),
    }
}

/// The present state of the system, which a certificate for this lender and importer must match.
pub(crate) fn fingerprint<I: Importer>(export: &ExportInner, importer: &I) -> Fingerprint {
    let lender = export.device().exporter().ok().and_then(|device| device.pci_address());
    Fingerprint::now(lender, importer.pci_address(), importer.driver())
}

/// What is tested: an import of one generation.
pub(crate) struct Target<'a, I: Importer> {
    pub export: &'a ExportInner,
    pub importer: &'a I,
    /// The import of `export` by `path`. Nobody else may use it during the test, which restores its content.
    pub memory: &'a I::Memory,
    pub path: Path,
    pub pieces: &'a PieceLock,
    pub generation: u64,
}

/// For who wants a path verified: what a current certificate of `store` says, or a test that is made now and
/// kept there.
///
/// # Errors
/// [`Kind::Unverified`] where the test was made and bytes were wrong; else as [`certify`].
pub(crate) fn certified_or_tested<I: Importer>(
    store: Option<&Store>,
    target: &Target<'_, I>,
    direction: Direction,
    limits: &Limits,
) -> Result<(Evidence, Certificate)> {
    let &Target { export, importer, path, .. } = target;
    let request = request(export, importer, path, direction);
    // An old look through the window is not enough where the owner's engine can look now.
    let has_engine = export.aperture().owner().is_some_and(|owner| owner.engine().is_some());
    let window_only = |certificate: &Certificate| certificate.grants(&request).is_err();
    let mut wrong = Vec::new();
    if let Some(store) = store {
        let (subject, now) = (subject(export, importer), fingerprint(export, importer));
        match store.current(&subject, &request.clone().window_only(!has_engine), &now) {
            Ok(certificate) => {
                let known = Evidence::Right { window_only: window_only(&certificate) };
                return Ok((known, certificate));
            }
            Err(error) => tracing::info!(%error, "a path is tested"),
        }
        let known = store.get(&subject);
        wrong = known.map_or_else(Vec::new, |known| known.wrong_places(&request));
    }
    let certificate = certify(target, direction, limits, &wrong, &mut |_| ())?;
    let granted = certificate.grants(&request.clone().window_only(true));
    let window_only = window_only(&certificate);
    if let Some(store) = store {
        store.keep(certificate.clone());
    }
    granted.map(|()| (Evidence::Right { window_only }, certificate))
}

/// Whether a current certificate of `store` shows that bytes arrived by this path, whoever looked.
pub(crate) fn is_certified<I: Importer>(
    store: &Store,
    export: &ExportInner,
    importer: &I,
    path: Path,
    direction: Direction,
) -> bool {
    let request = request(export, importer, path, direction).window_only(true);
    store.current(&subject(export, importer), &request, &fingerprint(export, importer)).is_ok()
}

/// The request that a certificate must satisfy for this importer, path and direction.
pub(crate) fn request<I: Importer>(
    export: &ExportInner,
    importer: &I,
    path: Path,
    direction: Direction,
) -> Request {
    Request::new(importer.engine_names(), direction, path, export.aperture().ranges())
}

/// Tests a target with each of the importer's engines, where bytes were `wrong` before, too, and says what came of it: a certificate may tell of
/// failures. What was in the tested places is put back, as the observer saw it.
///
/// # Errors
/// Nobody could observe: [`Kind::Unsupported`] where nobody answers for the memory, or the importer has no
/// engine; or what the owner's side says. Then what was in the tested places may be lost. [`Kind::Revoked`] where
/// the memory was taken back in the middle: nothing is written to it then.
pub(crate) fn certify<I: Importer>(
    target: &Target<'_, I>,
    direction: Direction,
    limits: &Limits,
    wrong: &[u64],
    progress: &mut dyn FnMut(&Progress),
) -> Result<Certificate> {
    let &Target { export, importer, memory, path, pieces, generation } = target;
    if path == Path::Staged {
        let why = "bytes are copied for it, so it reaches no memory of the lender's";
        return Err(Error::new(Kind::Unsupported, TRIED, why)
            .on(importer.name())
            .next("the refusals of its attachment say why it has no path of its own"));
    }
    let aperture = export.aperture();
    let ranges = aperture.ranges();
    let owner = aperture.owner().ok_or_else(|| {
        Error::new(Kind::Unsupported, TRIED, "nobody answers for what lies behind its ranges")
            .on(export.device_name())
            .next("lend it by Aperture::owned")
    })?;
    let engines = importer.engines();
    if engines.is_empty() {
        let why = "it has no engine that this process may use, so nobody can tell what it sees";
        return Err(Error::new(Kind::Unsupported, TRIED, why).on(importer.name()).next(
            "import by a device whose driver has one: a Vulkan device (one of your own with \
                 Device::with_queue_lock), or a driver of your own",
        ));
    }
    let exporter = export.device().exporter()?;
    let view = match owner.engine() {
        Some(engine) if !limits.by_cpu => View::Engine { engine, ranges },
        _ => View::Bar(exporter.map(ranges)?),
    };
    let devices: Vec<_> = exporter.pci_address().into_iter().chain(importer.pci_address()).collect();
    let lengths: Vec<u64> = ranges.as_slice().iter().map(|range| range.length_bytes).collect();
    let places = places::quick(&lengths, limits.quick_bytes, wrong);
    let longest = places.iter().map(|place| place.length_bytes).max().unwrap_or(0);
    let longest = if limits.full { places::PIECE_BYTES.min(ranges.size_bytes()) } else { longest };
    let run = Run {
        view,
        owner,
        ranges,
        memory,
        pieces,
        generation,
        halves: Halves::new(longest.min(places::PIECE_BYTES))?,
        seed: limits.seed.unwrap_or_else(random),
        copy_timeout: limits.copy_timeout,
    };
    let fingerprint = fingerprint(export, importer);

    let mut tests = Vec::new();
    for engine in &engines {
        for &way in direction.each() {
            let watch = FaultWatch::begin(devices.iter().copied());
            let mut say = |done_bytes| {
                let of_bytes = ranges.size_bytes();
                progress(&Progress { direction: way, engine: engine.name(), done_bytes, of_bytes });
            };
            say(0);
            let mut findings = run.test(*engine, way, &places, Some(deadline_after(limits.quick_timeout)))?;
            if limits.full {
                test_all(&run, *engine, way, &mut findings, &mut say)?;
            }
            let faults = watch.end();
            tests.push(Tested {
                direction: way,
                engine: text::clean(engine.name()),
                observer: run.view.observer(),
                path: path.name().into(),
                ranges: ranges.as_slice().iter().map(Extent::from).collect(),
                full: limits.full,
                places: places.clone(),
                seed: run.seed,
                when: date::now(),
                copied_bytes: findings.copied_bytes,
                figure: findings.figure,
                failure: findings.failure.or_else(|| faults.failure()),
                faults,
            });
        }
    }
    if pieces.is_torn(generation) {
        // The kernel's messages about the devices may come from the revoke, not from the test.
        return Err(pieces.revoked(TRIED));
    }
    Ok(Certificate::new(subject(export, importer), limits.outlives_reboots, tests, fingerprint))
}

/// Everything, piece after piece, until something is wrong.
fn test_all<M>(
    run: &Run<'_, M>,
    engine: &dyn peervram_backends::Engine<M>,
    way: Direction,
    findings: &mut Findings,
    say: &mut dyn FnMut(u64),
) -> Result<()> {
    for piece in places::full(run.ranges.size_bytes()) {
        if findings.failure.is_some() {
            break;
        }
        let end_bytes = piece.offset_bytes + piece.length_bytes;
        findings.add(run.test(engine, way, &[piece], None)?);
        say(end_bytes);
    }
    Ok(())
}

/// A number that nobody chose. The keys of the standard library's maps are random, once for each thread,
/// and counted up.
fn random() -> u64 {
    std::hash::RandomState::new().build_hasher().finish()
}
