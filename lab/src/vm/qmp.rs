//! QEMU's control socket (QMP): JSON commands, one at a time.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// A connection that takes commands.
pub struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Takes the greeting and leaves negotiation mode.
    pub fn new(stream: UnixStream) -> Result<Qmp> {
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        let mut qmp = Qmp { stream: BufReader::new(stream) };
        let greeting = qmp.line().context("waiting for QEMU's greeting")?;
        if greeting.get("QMP").is_none() {
            bail!("QEMU greets with {greeting}, which is not QMP");
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and gives what it returned.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut request = json!({ "execute": command, "arguments": arguments }).to_string();
        request.push('\n');
        self.stream
            .get_mut()
            .write_all(request.as_bytes())
            .with_context(|| format!("sending `{command}` to QEMU"))?;
        loop {
            let mut answer = self.line().with_context(|| format!("QEMU's answer to `{command}`"))?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses `{command}` {arguments}: {}", error["desc"]);
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            // Everything else is an event.
        }
    }

    /// Runs a command of the monitor for people, for what has no other; gives what it says, refusals too.
    pub fn human(&mut self, line: &str) -> Result<String> {
        let said = self.execute("human-monitor-command", json!({ "command-line": line }))?;
        Ok(said.as_str().unwrap_or_default().to_owned())
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            bail!("QEMU closed its control socket");
        }
        Ok(serde_json::from_str(&line)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_passed_over_and_errors_named() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (&theirs)
            .write_all(
                b"{\"QMP\":{}}\n{\"return\":{}}\n{\"event\":\"RESUME\"}\n{\"return\":{\"a\":1}}\n\
                  {\"error\":{\"desc\":\"no such device\"}}\n",
            )
            .unwrap();
        let mut qmp = Qmp::new(ours).unwrap();
        assert_eq!(qmp.execute("query-status", json!({})).unwrap()["a"], 1);
        let error = qmp.execute("screendump", json!({})).unwrap_err().to_string();
        assert!(error.contains("screendump") && error.contains("no such device"), "{error}");
    }
}
