//! `Arguments`: the command line, and what of it can be seen to be wrong before anything is measured.

use std::path::PathBuf;

use anyhow::Result;
use clap::{ArgGroup, Parser};
use peervram::Mover;

use crate::pin::Pin;
use crate::place::MemoryPlace;
use crate::record::{Direction, Record};
use crate::same_gpu;
use crate::saved::Saved;
use crate::size::{self, Size};
use peervram_programs::{Ending, usage};

/// The largest copy unless a larger one is asked for.
const USUAL_MOST: Size = Size(1 << 30);

/// Copies between every two devices, and tells how fast, and whether the bytes arrived.
///
/// Rows of the matrix lend memory: devices bound to vfio-pci, Vulkan devices, and the host. Columns import it: Vulkan
/// devices, devices with a driver of their own, and the host. A VFIO device is reset when it is opened, and what its
/// memory holds is lost.
#[derive(Parser)]
#[command(
    name = "peer-copy",
    // Of what is measured, and of what is told of a record: other tasks have no use for it.
    group = ArgGroup::new("measured").multiple(true),
    group = ArgGroup::new("told").multiple(true),
    after_help = "Exit codes: 0 measured; 1 bytes were WRONG, or copies broke; 2 usage; 4 this \
machine has nothing to measure.

Examples:
  peer-copy --list                           what there is
  peer-copy                                  all of it, 4 KiB to 1 GiB
  peer-copy --lender 01:00.0 --importer vulkan0 --sizes 4K,64M
  peer-copy --save before                    keep the figures, and later:
  peer-copy --compare before --html page.html"
)]
pub struct Arguments {
    /// Whose memory: a PCI address, vulkan0, a part of a Vulkan device's name, or host; all if left out
    #[arg(long, value_name = "NAME", group = "measured")]
    pub lender: Vec<String>,
    /// Who copies: a PCI address, vulkan0, a part of a Vulkan device's name, or host; all if left out
    #[arg(long, value_name = "NAME", group = "measured")]
    pub importer: Vec<String>,
    /// peer, host-pointer, staged, owner (the lender's engine, to the host), window (the CPU); within one GPU: opaque-fd,
    /// dma-buf, local (a plain copy)
    #[arg(long, value_delimiter = ',', value_parser = PATHS, group = "measured")]
    pub path: Vec<String>,
    /// read, write, or both: two places write to each other at once
    #[arg(long, value_delimiter = ',', group = "measured")]
    pub direction: Vec<Direction>,
    /// Only engines whose name contains this
    #[arg(long, group = "measured")]
    pub engine: Option<String>,
    /// Sizes of copies, as 4K,1M,1G; from 4 KiB on in steps of four if left out
    #[arg(long, value_delimiter = ',', group = "measured")]
    pub sizes: Vec<Size>,
    /// No copy is larger; nor than an eighth of the host's free memory
    #[arg(long, value_name = "SIZE", default_value_t = USUAL_MOST, group = "measured")]
    pub max_bytes: Size,
    /// Copies of each kind at most
    #[arg(long, default_value = "100", value_parser = at_least_one, group = "measured")]
    pub copies: usize,
    /// Copies of each kind at least, however long they take
    #[arg(long, default_value = "5", value_parser = at_least_one, group = "measured")]
    pub least_copies: usize,
    /// Copies before, which are not counted
    #[arg(long, default_value_t = 2, group = "measured")]
    pub warm_up: usize,
    /// When so much time has gone into one figure, only the least number of copies is made
    #[arg(long, value_name = "MS", default_value_t = 500, group = "measured")]
    pub budget_ms: u64,
    /// Stay on this CPU; with two, each side of `both` on one of its own, and without a second one `both` is left out
    #[arg(long, value_name = "CPU[,CPU]", group = "measured")]
    pub pin: Option<Pin>,
    /// Do not look whether bytes arrive
    #[arg(long, group = "measured")]
    pub no_verify: bool,
    /// Measure what measuring costs, too: the same copies in a bare loop, in turns
    #[arg(long, group = "measured")]
    pub overhead: bool,
    /// Print a line for each size
    #[arg(long, group = "told")]
    pub every_size: bool,
    /// Print the record as JSON instead
    #[arg(long, group = "told")]
    pub json: bool,
    /// Write the record as JSON to a file, too
    #[arg(long, value_name = "FILE", group = "told")]
    pub json_to: Option<PathBuf>,
    /// Write a page with plots
    #[arg(long, value_name = "FILE", group = "told")]
    pub html: Option<PathBuf>,
    /// Keep the record under this name
    #[arg(long, value_name = "NAME", group = "told")]
    pub save: Option<String>,
    /// Hold the figures against a record of this machine that was kept
    #[arg(long, value_name = "NAME", group = "told")]
    pub compare: Option<String>,
    /// Only list what could lend and import
    #[arg(long, conflicts_with_all = ["measured", "told"])]
    pub list: bool,
    /// Only check that a file is a record of this program's version
    #[arg(long, value_name = "FILE", conflicts_with_all = ["measured", "told", "list"])]
    pub check: Option<PathBuf>,
    /// Print and draw a record that was written before, and measure nothing
    #[arg(long, value_name = "FILE", conflicts_with_all = ["measured", "check", "list", "save"])]
    pub show: Option<PathBuf>,
    /// Print the schema of records
    #[arg(long, conflicts_with_all = ["measured", "told", "list", "check", "show"])]
    pub schema: bool,
}

/// A number of copies.
fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("no copies measure nothing; at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(_) => Err("not a number".to_owned()),
    }
}

/// The ways that can be asked for.
pub const PATHS: [&str; 8] = [
    "peer",
    "host-pointer",
    "staged",
    "owner",
    "window",
    same_gpu::OPAQUE_FD,
    same_gpu::DMA_BUF,
    same_gpu::LOCAL,
];

impl Arguments {
    /// What is written at the end must not fail then.
    pub fn check_places_for_files(&self, saved: &Result<Saved>) -> Result<()> {
        for file in [&self.json_to, &self.html].into_iter().flatten() {
            let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
            if folder.is_some_and(|folder| !folder.is_dir()) || file.is_dir() {
                return Err(usage(format!(
                    "{} cannot be written: no such folder, or one itself",
                    file.display()
                ))
                .into());
            }
        }
        if let Some(name) = &self.save {
            saved.as_ref().map_err(|error| usage(error.to_string()))?.file(name)?;
        }
        Ok(())
    }

    /// The sizes that are asked for, the smallest first. None is larger than the host can hold.
    pub fn sizes(&self, largest_bytes: u64) -> Result<Vec<u64>, Ending> {
        let mut sizes = self.sizes.clone();
        if let Some(size) = sizes.iter().find(|&&size| size > self.max_bytes) {
            return Err(usage(format!("{size} is more than --max-bytes, {}", self.max_bytes)));
        }
        if let Some(size) = sizes.iter().find(|size| size.0 > largest_bytes) {
            let largest = Size(largest_bytes >> 20 << 20);
            return Err(usage(format!("{size} is more than the host can hold for copies now, {largest}")));
        }
        if sizes.is_empty() {
            sizes = size::usual(self.max_bytes);
            sizes.retain(|size| size.0 <= largest_bytes);
        }
        sizes.sort_unstable();
        sizes.dedup();
        Ok(sizes.into_iter().map(|Size(bytes)| bytes).collect())
    }

    /// Where both ways at once are asked for by name, one CPU is a mistake: the sides would take turns.
    pub fn check_pin(&self) -> Result<(), Ending> {
        match self.pin {
            Some(Pin { first, other: None }) if self.direction.contains(&Direction::Both) => {
                Err(usage(format!("both ways at once need a CPU for each side; --pin {first},OTHER")))
            }
            _ => Ok(()),
        }
    }

    /// A size that was asked for by name and that no lender has is a mistake; the usual ones end where memory does.
    pub fn check_sizes(&self, lenders: &[&MemoryPlace]) -> Result<(), Ending> {
        let most = lenders.iter().map(|place| place.record.lends_bytes).max().unwrap_or(0);
        match self.sizes.iter().find(|size| size.0 > most) {
            Some(size) if most > 0 => Err(usage(format!(
                "{size} is more than any of these lenders has; the most is {}",
                Size(most)
            ))),
            _ => Ok(()),
        }
    }

    /// A part of a name that no engine has is a mistake, too.
    pub fn check_engine(&self, record: &Record) -> Result<(), Ending> {
        let Some(wanted) = &self.engine else { return Ok(()) };
        let mut engines: Vec<&str> =
            record.places.iter().flat_map(|place| &place.engines).map(String::as_str).collect();
        engines.extend([Mover::OwnerEngine, Mover::ImporterEngine, Mover::Cpu].map(Mover::name));
        if engines.iter().any(|engine| engine.contains(wanted.as_str())) {
            return Ok(());
        }
        engines.sort_unstable();
        engines.dedup();
        Err(usage(format!("no engine's name contains {wanted:?}; there are {}", engines.join(", "))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parsed(words: &[&str]) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(["peer-copy"].iter().chain(words))
    }

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn what_would_have_no_effect_is_refused() {
        for words in [
            &["--list", "--lender", "host"][..],
            &["--list", "--json"],
            &["--list", "--copies", "3"],
            &["--check", "a.json", "--html", "a.html"],
            &["--check", "a.json", "--list"],
            &["--show", "a.json", "--sizes", "4K"],
            &["--show", "a.json", "--no-verify"],
            &["--show", "a.json", "--save", "a"],
            &["--schema", "--json"],
            &["--schema", "--show", "a.json"],
        ] {
            let error = parsed(words).err().unwrap_or_else(|| panic!("{words:?} is taken"));
            assert_eq!(error.kind(), clap::error::ErrorKind::ArgumentConflict, "{words:?}");
        }
        for words in [
            &["--show", "a.json", "--html", "a.html", "--every-size", "--compare", "b"][..],
            &["--lender", "host", "--importer", "vulkan0", "--sizes", "4K", "--json", "--save", "a"],
            &["--check", "a.json"],
            &["--schema"],
        ] {
            assert!(parsed(words).is_ok(), "{words:?}");
        }
    }

    #[test]
    fn sizes_end_at_the_largest() {
        let sizes = |words: &[&str]| parsed(words).unwrap().sizes(256 << 20);
        assert_eq!(sizes(&[]).unwrap().last(), Some(&(256 << 20)));
        let too_much = sizes(&["--sizes", "512M"]).unwrap_err();
        assert!(
            too_much.code == peervram_programs::USAGE && too_much.reason.contains("the host can hold"),
            "{too_much}"
        );
        assert_eq!(sizes(&["--max-bytes", "64K"]), Ok(vec![4096, 16 << 10, 64 << 10]));
        assert_eq!(sizes(&["--sizes", "1M,4K,1M"]), Ok(vec![4096, 1 << 20]));
        let beyond = sizes(&["--sizes", "2G"]).unwrap_err();
        assert_eq!(
            (beyond.code, beyond.reason.as_str()),
            (peervram_programs::USAGE, "2 GiB is more than --max-bytes, 1 GiB")
        );
    }

    #[test]
    fn both_ways_at_once_need_two_cpus() {
        let code = |words: &[&str]| parsed(words).unwrap().check_pin().map_err(|ending| ending.code);
        assert_eq!(code(&["--pin", "0", "--direction", "read,both"]), Err(peervram_programs::USAGE));
        for words in [&["--pin", "0,1", "--direction", "both"][..], &["--pin", "0"], &["--direction", "both"]]
        {
            assert_eq!(code(words), Ok(()), "{words:?}");
        }
    }

    #[test]
    fn words_that_mean_nothing_are_usage() {
        for words in [
            &["--path", "fast"][..],
            &["--direction", "up"],
            &["--sizes", "4"],
            &["--copies", "0"],
            &["--list", "--save", "a"],
            &["--pin", "1,1"],
        ] {
            assert_eq!(parsed(words).err().map(|error| error.exit_code()), Some(2), "{words:?}");
        }
    }
}
