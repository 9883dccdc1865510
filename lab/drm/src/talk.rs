//! What a test says to the stand-in, and hears of it: two small files in a folder.

use std::path::PathBuf;
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// What can be made to fail.
#[derive(Clone, Copy)]
pub enum Call {
    /// A submission that lists an import.
    Submit,
    /// Giving an import an address in the GPU's address space.
    MapAddress,
}

impl Call {
    /// Its word in the file `errnos`.
    fn word(self) -> &'static str {
        match self {
            Call::Submit => "submit",
            Call::MapAddress => "map-address",
        }
    }
}

fn folder() -> Option<&'static PathBuf> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    FOLDER.get_or_init(|| std::env::var_os("PEERVRAM_DRM_TALK").map(PathBuf::from)).as_ref()
}

/// The errno that a test wants of that call: a line `submit 19`.
pub fn asked(call: Call) -> Result<(), Errno> {
    let Some(text) = folder().and_then(|folder| read(&folder.join("errnos"))) else { return Ok(()) };
    errno_in(&text, call).map_or(Ok(()), Err)
}

fn errno_in(text: &str, call: Call) -> Option<Errno> {
    let wanted = |line: &str| line.strip_prefix(call.word())?.trim().parse().ok();
    text.lines().find_map(wanted).map(Errno::from_raw_os_error)
}

/// Tells how many imports a submission has listed.
pub fn submitted(imports: usize) {
    let Some(folder) = folder() else { return };
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::CLOEXEC;
    let Ok(file) = rustix::fs::open(folder.join("submissions"), flags, Mode::RUSR | Mode::WUSR) else {
        return;
    };
    // A test that finds fewer lines than submissions says so.
    rustix::io::write(&file, format!("{imports}\n").as_bytes()).ok();
}

/// Where the GPU is on the bus: where the lab says, or a test says otherwise, in the file `address`.
pub fn address() -> Option<String> {
    let said = folder().and_then(|folder| read(&folder.join("address")));
    said.or_else(|| std::env::var("PEERVRAM_DRM_ADDRESS").ok())
}

/// By system calls: this runs inside of the C library's `ioctl`.
fn read(path: &std::path::Path) -> Option<String> {
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let mut text = [0; 256];
    let length = rustix::io::read(&file, &mut text).ok()?;
    Some(String::from_utf8_lossy(&text[..length]).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errno_is_of_one_call() {
        let text = "submit 19\n";
        assert_eq!(errno_in(text, Call::Submit), Some(Errno::NODEV));
        assert_eq!(errno_in(text, Call::MapAddress), None);
        assert_eq!(errno_in("map-address 12", Call::MapAddress), Some(Errno::NOMEM));
        assert_eq!(errno_in("", Call::Submit), None);
    }
}
