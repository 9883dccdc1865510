//! `Browser`: Chromium without a screen or a network, to look at a page that was made here.
//!
//! Order of calls: [`Browser::start`] (which makes its private root if it is not there) -> [`Browser::open`] a page as
//! somebody with a [`View`] sees it -> [`Opened::evaluate`], [`Opened::picture`].
//!
//! It is spoken to by its devtools protocol over two pipes, message by message, each ended by a zero. It runs as root in
//! its private root, without a sandbox: what it is shown is ours, and it has a network namespace with nothing in it.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use crate::folder::Folder;
use crate::progress::Progress;
use crate::root::{Purpose, Root, tail};

/// For one answer. Under load a first page takes seconds.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// For its end, when it was asked to.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Its descriptors 3 and 4 are what it is asked and answers by; standard input and output are ours.
const BY_PIPES: &str = "exec \"$@\" 3<&0 4>&1 </dev/null >&2";
const OPTIONS: &[&str] = &[
    "chromium-headless-shell",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--user-data-dir=/tmp/browser",
];
/// The page's name in the folder that both see.
const PAGE: &str = "page.html";

/// How somebody sees a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// The window's width in CSS pixels.
    pub width: u32,
    /// Whether they like it dark.
    pub is_dark: bool,
    /// Which colours they cannot tell apart, in Chromium's words: "none", "deuteranopia".
    pub deficiency: &'static str,
}

/// A running browser. Dropping it ends it.
pub struct Browser {
    child: Child,
    input: ChildStdin,
    messages: Receiver<Value>,
    folder: Folder,
    asked: u64,
}

/// A page that is shown.
pub struct Opened<'a> {
    browser: &'a mut Browser,
    session: String,
    view: View,
    complaints: Vec<String>,
}

impl Browser {
    /// Starts it.
    ///
    /// # Errors
    /// The root cannot be made, or the browser does not answer.
    pub fn start(progress: &dyn Progress) -> Result<Browser> {
        let root = Root::open(progress, Purpose::Browser)?;
        let folder = Folder::new()?;
        let mut child = root
            .command(folder.path(), "sh")
            .args(["-c", BY_PIPES, "sh"])
            .args(OPTIONS)
            .env("HOME", "/tmp")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(folder.path().join("browser.log"))?)
            .spawn()
            .context("starting unshare (package `util-linux`)")?;
        let input = child.stdin.take().context("the browser has no input")?;
        let output = BufReader::new(child.stdout.take().context("the browser has no output")?);
        let (sender, messages) = mpsc::channel();
        std::thread::spawn(move || {
            for message in output.split(0).map_while(Result::ok) {
                let Ok(message) = serde_json::from_slice(&message) else { continue };
                if sender.send(message).is_err() {
                    break;
                }
            }
        });
        Ok(Browser { child, input, messages, folder, asked: 0 })
    }

    /// Shows a page, and waits until it is there.
    ///
    /// # Errors
    /// The browser ended, or does not answer.
    pub fn open(&mut self, html: &str, view: View) -> Result<Opened<'_>> {
        std::fs::write(self.folder.path().join(PAGE), html).context("writing the page")?;
        let target = self.ask(None, "Target.createTarget", json!({ "url": "about:blank" }), &mut |_| ())?;
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let attached = self.ask(None, "Target.attachToTarget", attach, &mut |_| ())?;
        let session = attached["sessionId"].as_str().context("the browser attaches to no page")?.to_owned();
        let mut opened = Opened { browser: self, session, view, complaints: Vec::new() };
        for domain in ["Page", "Runtime", "Log", "Network"] {
            opened.ask(&format!("{domain}.enable"), json!({}))?;
        }
        let scheme = if view.is_dark { "dark" } else { "light" };
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        opened.ask("Emulation.setEmulatedMedia", json!({ "features": features }))?;
        let metrics = json!({ "width": view.width, "height": 800, "deviceScaleFactor": 1, "mobile": false });
        opened.ask("Emulation.setDeviceMetricsOverride", metrics)?;
        let went = opened.ask("Page.navigate", json!({ "url": format!("file:///lab/{PAGE}") }))?;
        ensure!(went["errorText"].is_null(), "the page is not shown: {}", went["errorText"]);
        let start = Instant::now();
        while opened.evaluate("document.readyState")? != "complete" {
            ensure!(start.elapsed() < ANSWER_LIMIT, "the page does not come to its end");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(opened)
    }

    /// Asks for one thing; events that come before the answer go to `hear`.
    fn ask(
        &mut self,
        session: Option<&str>,
        method: &str,
        parameters: Value,
        hear: &mut dyn FnMut(&Value),
    ) -> Result<Value> {
        self.asked += 1;
        let mut message = json!({ "id": self.asked, "method": method, "params": parameters });
        if let Some(session) = session {
            message["sessionId"] = session.into();
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        let sent = self.input.write_all(&bytes).and_then(|()| self.input.flush());
        sent.with_context(|| format!("the browser ended:\n{}", self.last_words()))?;
        let end = Instant::now() + ANSWER_LIMIT;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let message = self.messages.recv_timeout(left).with_context(|| {
                format!("the browser does not answer to {method}:\n{}", self.last_words())
            })?;
            if message["id"] != self.asked {
                hear(&message);
                continue;
            }
            if !message["error"].is_null() {
                bail!("the browser refuses {method}: {}", message["error"]["message"]);
            }
            return Ok(message["result"].clone());
        }
    }

    fn last_words(&self) -> String {
        tail(&std::fs::read_to_string(self.folder.path().join("browser.log")).unwrap_or_default(), 10)
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Asked first: it has processes of its own to end.
        let asked = self.input.write_all(b"{\"id\":0,\"method\":\"Browser.close\"}\0");
        let end = Instant::now() + END_LIMIT;
        while asked.is_ok() && Instant::now() < end {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Opened<'_> {
    /// The value of an expression of JavaScript, as JSON has it.
    ///
    /// # Errors
    /// The exception that the expression throws.
    pub fn evaluate(&mut self, expression: &str) -> Result<Value> {
        let asked = json!({ "expression": expression, "returnByValue": true });
        let answer = self.ask("Runtime.evaluate", asked)?;
        if !answer["exceptionDetails"].is_null() {
            bail!("a script threw {}", answer["exceptionDetails"]);
        }
        Ok(answer["result"]["value"].clone())
    }

    /// All of the page, as a PNG file. Last: [`Opened::complaints`] has more afterwards.
    ///
    /// # Errors
    /// The browser does not answer.
    pub fn picture(&mut self) -> Result<Vec<u8>> {
        // Not before: the browser does it by a filter that it fetches for the page.
        let deficiency = json!({ "type": self.view.deficiency });
        self.ask("Emulation.setEmulatedVisionDeficiency", deficiency)?;
        let metrics = self.ask("Page.getLayoutMetrics", json!({}))?;
        let size = &metrics["cssContentSize"];
        let clip = json!({ "x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1 });
        let asked = json!({ "format": "png", "captureBeyondViewport": true, "clip": clip });
        let answer = self.ask("Page.captureScreenshot", asked)?;
        from_base64(answer["data"].as_str().unwrap_or_default()).context("the browser gives no picture")
    }

    /// What the page complained of on its console, what it fetched besides itself, and what it ran.
    pub fn complaints(&self) -> &[String] {
        &self.complaints
    }

    fn ask(&mut self, method: &str, parameters: Value) -> Result<Value> {
        let (session, complaints) = (&self.session, &mut self.complaints);
        let mut hear = |event: &Value| complaints.extend(complaint(event));
        self.browser.ask(Some(session), method, parameters, &mut hear)
    }
}

/// What is wrong with a page that causes such an event.
fn complaint(event: &Value) -> Option<String> {
    let parameters = &event["params"];
    match event["method"].as_str()? {
        "Runtime.consoleAPICalled" => Some(format!("it writes to the console: {}", parameters["args"])),
        "Runtime.exceptionThrown" => Some(format!("it throws {}", parameters["exceptionDetails"]["text"])),
        "Log.entryAdded" => Some(format!("the browser logs {}", parameters["entry"]["text"])),
        "Network.requestWillBeSent" => {
            let url = parameters["request"]["url"].as_str().unwrap_or_default();
            (!url.ends_with(&format!("/lab/{PAGE}"))).then(|| format!("it fetches {url}"))
        }
        _ => None,
    }
}

/// RFC 4648, with padding.
fn from_base64(text: &str) -> Option<Vec<u8>> {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for four in text.trim_end_matches('=').as_bytes().chunks(4) {
        let mut word = 0;
        for letter in four {
            word = word << 6 | LETTERS.iter().position(|one| one == letter)? as u32;
        }
        word <<= 6 * (4 - four.len());
        bytes.extend_from_slice(&word.to_be_bytes()[1..four.len()]);
    }
    (!bytes.is_empty()).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_read() {
        assert_eq!(from_base64("Zm9vYmFy").as_deref(), Some(&b"foobar"[..]));
        assert_eq!(from_base64("Zm9vYg==").as_deref(), Some(&b"foob"[..]));
        assert_eq!(from_base64("Zm9vYmE=").as_deref(), Some(&b"fooba"[..]));
        assert_eq!(from_base64("Zm9v*g=="), None);
        assert_eq!(from_base64(""), None);
    }

    #[test]
    fn whatever_a_page_fetches_or_says_is_a_complaint() {
        let fetches = |url: &str| {
            let request = json!({ "request": { "url": url } });
            complaint(&json!({ "method": "Network.requestWillBeSent", "params": request }))
        };
        assert_eq!(fetches("file:///lab/page.html"), None);
        assert_eq!(
            fetches("https://example.org/a.css").as_deref(),
            Some("it fetches https://example.org/a.css")
        );
        let says = json!({ "method": "Runtime.consoleAPICalled", "params": { "args": [] } });
        assert!(complaint(&says).is_some());
        assert_eq!(complaint(&json!({ "method": "Page.loadEventFired", "params": {} })), None);
    }
}
