//! A folder that looks like a machine's root, for tests.

use std::fs;
use std::path::Path;

/// A folder that looks like a machine's root.
pub struct Root(tempfile::TempDir);

impl Root {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn file(self, path: &str, text: &str) -> Self {
        let path = self.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    /// A link at `path` to something below the root, which is made where it is not there.
    pub fn link(self, path: &str, to: &str) -> Self {
        let (path, to) = (self.path().join(path), self.path().join(to));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        if !to.exists() {
            fs::create_dir_all(&to).unwrap();
        }
        std::os::unix::fs::symlink(to, path).unwrap();
        self
    }

    /// A device of a class, at a place below /sys/devices.
    pub fn device(self, class: &str, at: &str) -> Self {
        let name = at.rsplit('/').next().unwrap().to_owned();
        self.link(&format!("sys/class/{class}/{name}"), &format!("sys/devices/{at}"))
    }
}
