//! The files of sysfs by which libdrm finds a device: where the GPU is on the bus, and what.

use core::ffi::{CStr, c_void};

use rustix::fs::{MemfdFlags, SeekFrom};

use crate::{Identity, driver, next, talk};

/// The folder of a DRM node's device in sysfs; 226 is DRM's number.
const NODES: &str = "/sys/dev/char/226:";

/// What stands in that file, as a `FILE *`; none where it is no concern of ours.
pub fn open(path: &CStr) -> Option<*mut c_void> {
    let path = path.to_str().ok()?;
    let address = talk::address()?;
    let text = content(path, &address, driver()?.identity())?;
    let file = rustix::fs::memfd_create("sysfs", MemfdFlags::CLOEXEC).ok()?;
    rustix::io::write(&file, text.as_bytes()).ok()?;
    rustix::fs::seek(&file, SeekFrom::Start(0)).ok()?;
    Some(next::to_read(file))
}

fn content(path: &str, address: &str, identity: Option<Identity>) -> Option<String> {
    let (_, file) = path.strip_prefix(NODES)?.split_once('/')?;
    // Of its lines libdrm reads this one (drmParsePciBusInfo in xf86drm.c).
    if file == "device/uevent" {
        return Some(format!("PCI_SLOT_NAME={address}\n"));
    }
    let Identity { vendor, device } = identity?;
    match file {
        "device/vendor" | "device/subsystem_vendor" => Some(format!("{vendor:#06x}\n")),
        "device/device" | "device/subsystem_device" => Some(format!("{device:#06x}\n")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_it_is_and_what_is_said_otherwise() {
        let said = |path| content(path, "0000:02:00.0", None);
        assert_eq!(said("/sys/dev/char/226:128/device/uevent").unwrap(), "PCI_SLOT_NAME=0000:02:00.0\n");
        assert_eq!(said("/sys/dev/char/226:128/device/vendor"), None);
        assert_eq!(said("/sys/dev/char/1:3/uevent"), None);
        let said = |path| content(path, "0000:02:00.0", Some(Identity { vendor: 0x8086, device: 0xe20b }));
        assert_eq!(said("/sys/dev/char/226:128/device/vendor").unwrap(), "0x8086\n");
        assert_eq!(said("/sys/dev/char/226:128/device/device").unwrap(), "0xe20b\n");
        assert_eq!(said("/sys/dev/char/226:128/device/drm"), None);
    }
}
