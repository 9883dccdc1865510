//! `Saved`: records that are kept under a name, in `$XDG_STATE_HOME/peer-copy`, else `~/.local/state/peer-copy`: not beside
//! the library's certificates, whose folder has nothing else in it.

use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::record::{Record, SCHEMA, VERSION};
use crate::schema;
use peervram_programs::{Ending, replace, usage};

/// Where records are kept.
#[derive(Debug)]
pub struct Saved {
    folder: PathBuf,
}

impl Saved {
    /// This user's.
    ///
    /// # Errors
    /// Neither variable says where.
    pub fn of_user() -> Result<Saved> {
        Saved::of_whom(|name| std::env::var_os(name))
    }

    /// The same, of whoever has those variables.
    fn of_whom(variable: impl Fn(&str) -> Option<OsString>) -> Result<Saved> {
        let from = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let state = from("XDG_STATE_HOME").or_else(|| from("HOME").map(|home| home.join(".local/state")));
        let state = state.context("neither XDG_STATE_HOME nor HOME says where to keep records")?;
        Ok(Saved::at(&state.join("peer-copy")))
    }

    /// In that folder.
    pub fn at(folder: &Path) -> Saved {
        Saved { folder: folder.to_owned() }
    }

    /// Keeps a record; one of the same name is replaced.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn keep(&self, name: &str, record: &Record) -> Result<PathBuf> {
        let file = self.file(name)?;
        fs::create_dir_all(&self.folder).with_context(|| format!("making {}", self.folder.display()))?;
        let mut text = serde_json::to_string_pretty(record)?;
        text.push('\n');
        replace(&file, 0o644, text.as_bytes()).with_context(|| format!("writing {}", file.display()))?;
        Ok(file)
    }

    /// The record of that name.
    ///
    /// # Errors
    /// Exit code 2: there is none, or it is of another version.
    pub fn read(&self, name: &str) -> Result<Record> {
        let file = self.file(name)?;
        let text = fs::read_to_string(&file).map_err(|error| match error.kind() {
            ErrorKind::NotFound => usage(format!("no record {name:?} was kept; {}", self.names())),
            _ => usage(format!("no record {name:?}: {}: {error}", file.display())),
        })?;
        Ok(parse(&text).map_err(|ending| ending.of_file(&file))?)
    }

    /// Which ones there are, in words.
    fn names(&self) -> String {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let name = |entry: fs::DirEntry| Some(entry.file_name().to_str()?.strip_suffix(".json")?.to_owned());
        let mut names: Vec<String> = entries.filter_map(name).collect();
        names.sort();
        let folder = self.folder.display();
        if names.is_empty() {
            format!("{folder} has none")
        } else {
            format!("{folder} has {}", names.join(", "))
        }
    }

    /// Where a record of that name is, or would be.
    ///
    /// # Errors
    /// Exit code 2: it is no name.
    pub fn file(&self, name: &str) -> Result<PathBuf> {
        let is_good = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
        if name.is_empty() || name.starts_with('.') || !name.chars().all(is_good) {
            return Err(usage(format!("{name:?} is no name; use letters, digits, - and _")).into());
        }
        Ok(self.folder.join(format!("{name}.json")))
    }
}

/// Reads a record.
///
/// # Errors
/// Exit code 2: it is no record, or one of another version.
pub fn parse(text: &str) -> Result<Record, Ending> {
    let value: Value =
        serde_json::from_str(text).map_err(|error| usage(format!("it is no JSON: {error}")))?;
    if value["schema"] != SCHEMA {
        return Err(usage("it is no record of peer-copy".to_owned()));
    }
    // Before anything else, which another version may say differently.
    if value["version"] != VERSION {
        let version = &value["version"];
        return Err(usage(format!(
            "it is of schema version {version}, and this program reads {VERSION}; measure again"
        )));
    }
    schema::check(&value).map_err(usage)?;
    serde_json::from_value(value).map_err(|error| usage(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::example;
    use peervram_programs::USAGE;

    #[test]
    fn what_is_kept_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let saved = Saved::at(folder.path());
        let mut record = example();
        // The last bit of a number may be lost in writing.
        record.figures.iter_mut().for_each(|figure| {
            figure.link_share = None;
            figure.ceiling_share = None;
        });
        assert!(saved.read("after").unwrap_err().to_string().ends_with("has none"));
        saved.keep("before", &record).unwrap();
        assert_eq!(saved.read("before").unwrap(), record);
        assert!(saved.read("after").unwrap_err().to_string().ends_with("has before"));
    }

    #[test]
    fn the_certificates_folder_is_another() {
        let of = |wanted: &'static str, value: &'static str| {
            Saved::of_whom(|name| (name == wanted).then(|| value.into())).map(|saved| saved.folder)
        };
        // The library's store has `peervram` below both.
        assert_eq!(of("XDG_STATE_HOME", "/state").unwrap(), Path::new("/state/peer-copy"));
        assert_eq!(of("HOME", "/a").unwrap(), Path::new("/a/.local/state/peer-copy"));
        assert!(of("HOME", "").is_err());
    }

    #[test]
    fn another_version_is_refused_with_code_2() {
        let mut value = serde_json::to_value(example()).unwrap();
        value["version"] = 1.into();
        value["something new"] = true.into();
        let ending = parse(&value.to_string()).unwrap_err();
        assert_eq!(ending.code, USAGE);
        assert!(ending.reason.contains("schema version 1, and this program reads 3"), "{ending}");
    }

    #[test]
    fn what_is_no_record_is_refused() {
        for text in ["", "{", "[]", "{}", r#"{"schema":"peervram-peer-copy","version":3}"#] {
            assert_eq!(parse(text).unwrap_err().code, USAGE, "{text}");
        }
    }

    #[test]
    fn names_lead_nowhere_else() {
        let saved = Saved::at(Path::new("/nowhere"));
        for name in ["", ".", "..", "a/b", "../a", ".hidden", "a b"] {
            let error = saved.read(name).unwrap_err();
            assert_eq!(error.downcast_ref::<Ending>().map(|ending| ending.code), Some(USAGE), "{name:?}");
        }
    }
}
