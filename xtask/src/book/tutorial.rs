//! `Tutorial`: the section of the page for beginners that ends with a buffer of one's own, done as it says.
//!
//! The commands run one after the other in an empty folder that has the project beside it, the program is written where
//! the page says, and what it prints has to be what the page says it does. The one thing that a reader does not do:
//! the new package begins with the project's `Cargo.lock`, so that what other people release meanwhile does not count.

use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use super::PROJECT;
use super::shown::{blocks, commands};

/// The page.
pub const PAGE: &str = "docs/start-here.md";

/// The section, by the beginning of its headline.
const SECTION: &str = "## 2. ";
/// What the page calls the project's folder.
const PROJECT_NAME: &str = "peervram";

/// What the section shows.
pub struct Tutorial {
    commands: Vec<String>,
    program: String,
    /// What the program may print, one of these.
    prints: Vec<String>,
}

/// The section, and the rest of the page with empty lines in its place.
pub fn split(text: &str) -> Result<(Tutorial, String)> {
    let (mut section, mut others) = (String::new(), String::new());
    let mut is_in = false;
    for line in text.lines() {
        if line.starts_with("## ") {
            is_in = line.starts_with(SECTION);
        }
        let (own, other) = if is_in { (line, "") } else { ("", line) };
        section += &format!("{own}\n");
        others += &format!("{other}\n");
    }
    let of = |mark: &str| blocks(&section).into_iter().filter(|block| block.mark == mark).collect::<Vec<_>>();
    let program = of("rust,no_run").into_iter().next().context("the section has no program")?;
    let prints = of("text").into_iter().next().context("the section does not say what the program prints")?;
    let mut commands: Vec<_> = commands(PAGE, &section).into_iter().map(|shown| shown.command).collect();
    ensure!(
        commands.first().is_some_and(|first| first == "cd .."),
        "the section does not begin with `cd ..`"
    );
    commands.remove(0);
    let prints = prints.lines.join("\n");
    // By which path depends on the driver, as the page says.
    let prints = vec![prints.replace("by host-pointer", "by peer"), prints];
    Ok((Tutorial { commands, program: program.lines.join("\n"), prints }, others))
}

impl Tutorial {
    /// Does it.
    pub fn run(&self) -> Result<()> {
        let target = Path::new(PROJECT).join("target/book");
        fs::create_dir_all(&target).context("making target/book")?;
        let folder = tempfile::tempdir().context("making a folder")?;
        let project = fs::canonicalize(PROJECT).context("finding the project")?;
        symlink(project, folder.path().join(PROJECT_NAME)).context("putting the project beside it")?;
        let mut place = folder.path().to_owned();
        let mut printed = String::new();
        for command in &self.commands {
            let words: Vec<&str> = command.split_whitespace().collect();
            match words[..] {
                ["cd", to] => {
                    place = place.join(to);
                    fs::copy(Path::new(PROJECT).join("Cargo.lock"), place.join("Cargo.lock"))
                        .context("copying Cargo.lock")?;
                }
                ["cargo", ..] => {
                    if words[1] == "run" {
                        fs::write(place.join("src/main.rs"), &self.program).context("writing src/main.rs")?;
                    }
                    let output = Command::new(words[0])
                        .args(&words[1..])
                        .current_dir(&place)
                        .env("CARGO_TARGET_DIR", &target)
                        .stdin(Stdio::null())
                        .output()
                        .context("starting cargo")?;
                    let error = String::from_utf8_lossy(&output.stderr);
                    ensure!(output.status.success(), "`{command}`: {}\n{error}", output.status);
                    printed = String::from_utf8_lossy(&output.stdout).trim().to_owned();
                }
                _ => bail!("`{command}` is no command that the section may have"),
            }
        }
        ensure!(
            self.prints.contains(&printed),
            "it prints\n{printed}\nand the page says\n{}",
            self.prints[1]
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_section_is_taken_out_and_lines_keep_their_numbers() {
        let page = "# P\n```sh\ncargo xtask demo\n```\n## 2. Own\n```sh\ncd ..\ncargo new a\n```\n```rust,no_run\nfn main() {}\n\
                    ```\n```text\nthe bytes go by host-pointer\n```\n## 3. On\n```sh\ncargo run\n```\n";
        let (tutorial, others) = split(page).unwrap();
        assert_eq!(tutorial.commands, ["cargo new a"]);
        assert_eq!(tutorial.program, "fn main() {}");
        assert_eq!(tutorial.prints, ["the bytes go by peer", "the bytes go by host-pointer"]);
        let left: Vec<_> =
            commands("p", &others).into_iter().map(|shown| (shown.line, shown.command)).collect();
        assert_eq!(left, [(3, "cargo xtask demo".to_owned()), (18, "cargo run".to_owned())]);
    }
}
