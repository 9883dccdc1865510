//! Files that are replaced as a whole.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Puts `text` into `file`, which gets `mode` (0o600: for its owner alone). A reader meets the old content or the new one, never
/// half of it: it is written beside the file, as `NAME.new`, and renamed.
///
/// # Errors
/// It cannot be written or renamed; `file` is as it was then.
pub fn replace(file: &Path, mode: u32, text: &[u8]) -> io::Result<()> {
    let mut new = file.as_os_str().to_owned();
    new.push(".new");
    let new = Path::new(&new);
    let written = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(new);
    written.and_then(|mut opened| opened.write_all(text)).and_then(|()| fs::rename(new, file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_is_replaced_as_a_whole_or_stays() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("record.json");
        replace(&file, 0o600, b"old").unwrap();
        replace(&file, 0o600, b"new").unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"new");
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(folder.path().read_dir().unwrap().count(), 1, "nothing is left beside it");

        fs::create_dir(folder.path().join("record.json.new")).unwrap();
        assert!(replace(&file, 0o600, b"newer").is_err());
        assert_eq!(fs::read(&file).unwrap(), b"new");
    }
}
