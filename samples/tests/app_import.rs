//! The sample `app_import` on memory that another process lends: `peervram serve`, without a device.

use std::io::{BufRead, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The program `peervram`, beside the sample: cargo makes it, or finds that it is there.
fn peervram() -> PathBuf {
    let folder = Path::new(env!("CARGO_BIN_EXE_app_import")).parent().unwrap();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "--package", "peervram-cli"]);
    command.args((folder.file_name().unwrap() == "release").then_some("--release"));
    assert!(command.status().unwrap().success());
    folder.join("peervram")
}

/// A process that ends with this value.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap())
    }

    fn lines(&mut self) -> impl Iterator<Item = String> + use<> {
        BufReader::new(self.0.stdout.take().unwrap()).lines().map(Result::unwrap)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The sample, and a broker whose operator can be asked.
fn scene(folder: &Path) -> (Running, Running, impl Fn(&[&str]) -> bool) {
    let (program, socket) = (peervram(), folder.join("broker"));
    let mut serve = Command::new(&program);
    serve.args(["serve", "--host", "16M", "--socket"]).arg(&socket).stderr(Stdio::null());
    let mut broker = Running::start(&mut serve);
    assert!(broker.lines().any(|line| line.starts_with("lends ")));
    let mut sample = Command::new(env!("CARGO_BIN_EXE_app_import"));
    let sample = Running::start(sample.arg("--broker").arg(&socket).stderr(Stdio::piped()));
    let operate = move |words: &[&str]| {
        let mut command = Command::new(&program);
        command.args(words).arg("--socket").arg(&socket).stdout(Stdio::null());
        command.status().unwrap().success()
    };
    (sample, broker, operate)
}

fn errors_of(sample: &mut Running) -> String {
    let mut errors = String::new();
    sample.0.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
    errors
}

#[test]
fn an_application_works_on_what_another_process_lends_through_resets() {
    let folder = tempfile::tempdir().unwrap();
    let (mut sample, _broker, operate) = scene(folder.path());
    let mut generations = 0;
    for line in sample.lines() {
        if line.contains("every word is inverted") {
            assert!(line.starts_with(&format!("generation {generations}: ")), "{line}");
            generations += 1;
            if generations <= 3 {
                assert!(operate(&["operate", "reset", "host", "--timeout-ms", "60000"]));
            }
        }
    }
    let errors = errors_of(&mut sample);
    if errors.contains("no Vulkan device") || errors.contains("libvulkan") {
        eprintln!("skipped: an_application_works_on_what_another_process_lends_through_resets: {errors}");
        return;
    }
    assert!(sample.0.wait().unwrap().success(), "{errors}");
    assert_eq!(generations, 4, "{errors}");
}

#[test]
fn an_application_hears_that_its_broker_has_ended() {
    let folder = tempfile::tempdir().unwrap();
    let (mut sample, broker, _) = scene(folder.path());
    if !sample.lines().any(|line| line.contains("every word is inverted")) {
        let errors = errors_of(&mut sample);
        assert!(errors.contains("Vulkan") || errors.contains("libvulkan"), "{errors}");
        eprintln!("skipped: an_application_hears_that_its_broker_has_ended: {errors}");
        return;
    }
    drop(broker);
    assert_eq!(sample.0.wait().unwrap().code(), Some(1));
    let errors = errors_of(&mut sample);
    assert!(errors.contains("whoever lends has ended"), "{errors}");
}
