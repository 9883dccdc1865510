//! The ACS control registers of a tree's ports: read, written, and put back as they were.
//!
//! ```text
//! AcsPorts::take -> set, any number of times -> (drop: as they were)
//! ```
//! Written behind the kernel's back, through sysfs: it reads them whenever it decides about peers, and its
//! IOMMU groups stay those of its boot.

use anyhow::{Context, Result, ensure};
use peervram::backends::PciAddress;
use peervram_lab::machine::shape::Setting;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use crate::tree::{Found, Tree};

/// `linux/pci_regs.h`.
const FIRST_EXTENDED: u64 = 0x100;
const ACS_CAPABILITY: u32 = 0x0d;
const CONTROL: u64 = 6;

/// The registers of all ports that have one.
#[derive(Debug)]
pub struct AcsPorts(Vec<AcsPort>);

#[derive(Debug)]
struct AcsPort {
    path: String,
    control: AcsControl,
    /// The register's value when the ports were taken.
    before: u16,
}

impl AcsPorts {
    /// The ports of a tree, with their present values.
    pub fn take(tree: &Tree) -> Result<AcsPorts> {
        let port = |Found { path, address, .. }: &Found| {
            let control = AcsControl::find(*address)?;
            let before = control.read()?;
            Ok(AcsPort { path: path.clone(), control, before })
        };
        Ok(AcsPorts(tree.acs_ports().map(port).collect::<Result<_>>()?))
    }

    /// The value of each register when the ports were taken, by the port's place.
    pub fn before(&self) -> impl Iterator<Item = (&str, u16)> {
        self.0.iter().map(|port| (port.path.as_str(), port.before))
    }

    /// Makes them say what a setting says.
    pub fn set(&self, setting: &Setting) -> Result<()> {
        for port in &self.0 {
            let named = setting.ports.iter().find(|(path, _)| *path == port.path);
            let bits = named.map_or(setting.others.unwrap_or(port.before), |(_, bits)| *bits);
            port.control.write(bits)?;
            let seen = port.control.read()?;
            ensure!(seen == bits, "the ACS control of {} says {seen:#x}, not {bits:#x}", port.path);
        }
        Ok(())
    }
}

impl Drop for AcsPorts {
    fn drop(&mut self) {
        for port in &self.0 {
            if let Err(error) = port.control.write(port.before) {
                peervram_programs::note!(
                    "the ACS control of {} stays as it was written: {error:#}",
                    port.path
                );
            }
        }
    }
}

/// One register.
#[derive(Debug)]
struct AcsControl {
    config: File,
    offset: u64,
}

impl AcsControl {
    fn find(address: PciAddress) -> Result<AcsControl> {
        let file = address.sysfs_path().join("config");
        let config = fs::OpenOptions::new().read(true).write(true).open(&file);
        let config = config.with_context(|| file.display().to_string())?;
        let mut at = FIRST_EXTENDED;
        while at >= FIRST_EXTENDED {
            let mut word = [0; 4];
            config.read_exact_at(&mut word, at).with_context(|| file.display().to_string())?;
            let header = u32::from_le_bytes(word);
            if header & 0xffff == ACS_CAPABILITY {
                return Ok(AcsControl { config, offset: at + CONTROL });
            }
            let next = u64::from(header >> 20);
            ensure!(next == 0 || next > at, "the capabilities of {address} go in a circle");
            at = next;
        }
        anyhow::bail!("{address} has no ACS")
    }

    fn read(&self) -> Result<u16> {
        let mut word = [0; 2];
        self.config.read_exact_at(&mut word, self.offset).context("reading an ACS control register")?;
        Ok(u16::from_le_bytes(word))
    }

    fn write(&self, bits: u16) -> Result<()> {
        self.config.write_all_at(&bits.to_le_bytes(), self.offset).context("writing an ACS control register")
    }
}
