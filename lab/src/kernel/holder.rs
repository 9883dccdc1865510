//! The holder: the lab's importer of dma-bufs that does as it is told, a kernel module.
//!
//! Its source is `lab/holder`; it is built in the private root against the kernel that loads it.

use anyhow::{Context, Result};
use std::fs;
use std::path::PathBuf;

use crate::kernel::own_kernel::OwnKernel;
use crate::progress::{Progress, step};
use crate::root::Root;
use crate::root::cache;

/// The module's file, here and in the guest's [`crate::vm::wire::SHARE`].
pub const FILE: &str = "peervram-holder.ko";

const SOURCES: &[(&str, &str)] =
    &[("Kbuild", include_str!("../../holder/Kbuild")), ("holder.c", include_str!("../../holder/holder.c"))];

/// The module for that kernel, built if it is not there.
pub fn open(root: &Root, kernel: &OwnKernel, progress: &dyn Progress) -> Result<PathBuf> {
    let place = kernel.folder.to_string_lossy();
    let mut inputs = vec![&*place];
    inputs.extend(SOURCES.iter().map(|(_, text)| *text));
    let entry = cache::entry(&format!("holder-{}", cache::key(&inputs)), &[FILE], |draft| {
        step(progress, &format!("building the holder for Linux {}", kernel.release), || {
            for (name, text) in SOURCES {
                fs::write(draft.join(name), text)
                    .with_context(|| format!("writing {name} to {}", draft.display()))?;
            }
            kernel.build_module(root, draft)
        })
    })?;
    Ok(entry.join(FILE))
}
