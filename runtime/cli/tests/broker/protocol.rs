//! docs/broker-protocol.md against a broker: each of its examples, and a client of another language that was written
//! from the page.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use super::served::{PATIENCE, Served, ended, errors_of};
use serde_json::{Value, json};

const PAGE: &str = include_str!("../../../../docs/broker-protocol.md");
const INTERFACE: &str = include_str!("../../../broker/io.peervram.Broker.varlink");
/// What is of this machine, or of this run.
const VARIES: &[&str] = &["connection", "user", "process", "program", "since", "deadlineMs", "drain"];

/// What a client says and hears.
struct Connection {
    socket: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Connection {
    fn new(served: &Served) -> Self {
        let socket = UnixStream::connect(&served.socket).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { reader: BufReader::new(socket.try_clone().unwrap()), socket }
    }

    fn say(&mut self, message: &Value) {
        self.socket.write_all(&[message.to_string().as_bytes(), &[0]].concat()).unwrap();
    }

    fn hear(&mut self) -> Value {
        let mut message = Vec::new();
        self.reader.read_until(0, &mut message).unwrap();
        assert_eq!(message.pop(), Some(0), "the broker has closed the connection");
        serde_json::from_slice(&message).unwrap()
    }
}

/// A block of the page: a call, and what it is answered.
struct Example {
    call: Value,
    replies: Vec<Value>,
}

impl Example {
    fn method(&self) -> &str {
        self.call["method"].as_str().unwrap().rsplit('.').next().unwrap()
    }
}

/// The blocks of the page that are marked `json`.
fn examples() -> Vec<Example> {
    let blocks = PAGE.split("\n```json\n").skip(1).map(|rest| rest.split("\n```").next().unwrap());
    let messages = blocks.map(|block| {
        let messages: Result<Vec<Value>, _> = serde_json::Deserializer::from_str(block).into_iter().collect();
        messages.unwrap_or_else(|error| panic!("{error}: {block}"))
    });
    messages.map(|mut messages| Example { call: messages.remove(0), replies: messages }).collect()
}

/// Whether `seen` is what the page has, but for what varies.
fn is_like(shown: &Value, seen: &Value) -> bool {
    match (shown, seen) {
        (Value::Object(shown), Value::Object(seen)) => {
            shown.keys().eq(seen.keys())
                && shown
                    .iter()
                    .all(|(key, value)| VARIES.contains(&key.as_str()) || is_like(value, &seen[key]))
        }
        (Value::Array(shown), Value::Array(seen)) => {
            shown.len() == seen.len() && shown.iter().zip(seen).all(|(shown, seen)| is_like(shown, seen))
        }
        _ => shown == seen,
    }
}

#[track_caller]
fn assert_like(shown: &Value, seen: &Value) {
    assert!(is_like(shown, seen), "the page has\n{shown:#}\nand the broker says\n{seen:#}");
}

/// In the order of the page: what listens and what waits have connections of their own, and are answered when the
/// drain is.
#[test]
fn every_example_of_the_protocols_page_is_what_a_broker_says() {
    let served = Served::new(&["--host", "64M"]);
    served.wait_for("scrubbed memory", |status| status["memories"][0]["unscrubbed"] == 0);
    let [mut client, mut listener, mut operator] = [(); 3].map(|()| Connection::new(&served));
    let (mut events, mut answer) = (Vec::new(), None);
    for example in examples() {
        match example.method() {
            "Watch" if example.call["more"] == true => {
                listener.say(&example.call);
                events = example.replies.clone();
            }
            "Reset" => {
                operator.say(&example.call);
                answer = example.replies.first().cloned();
            }
            "Drained" => {
                let draining = listener.hear();
                assert_like(&events.remove(0), &draining);
                let mut call = example.call.clone();
                call["parameters"]["drain"] = draining["parameters"]["event"]["drain"].clone();
                client.say(&call);
                assert_like(&example.replies[0], &client.hear());
                for event in events.drain(..) {
                    assert_like(&event, &listener.hear());
                }
                assert_like(&answer.take().unwrap(), &operator.hear());
            }
            _ => {
                client.say(&example.call);
                for reply in &example.replies {
                    assert_like(reply, &client.hear());
                }
            }
        }
    }
    assert!(answer.is_none());
}

#[test]
fn every_method_of_the_interface_has_an_example() {
    let mut shown: BTreeMap<String, usize> = BTreeMap::new();
    for example in examples() {
        *shown.entry(example.method().to_owned()).or_default() += 1;
    }
    let methods = INTERFACE.lines().filter_map(|line| line.strip_prefix("method ")?.split('(').next());
    let methods: Vec<&str> = methods.collect();
    assert!(methods.len() > 8, "{methods:?}");
    for method in methods {
        assert!(shown.contains_key(method), "{method} has no example");
        assert!(PAGE.contains(&format!("| `{method}` |")), "{method} is in no table");
    }
}

/// Python's own library of Varlink takes no descriptors: a socket does.
#[test]
fn a_client_in_python_borrows_is_told_answers_and_returns() {
    const NAME: &str = "a_client_in_python_borrows_is_told_answers_and_returns";
    if !Command::new("python3").arg("--version").output().is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: {NAME}: there is no python3");
        return;
    }
    let mut served = Served::new(&["--host", "16M"]);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/broker/foreign.py");
    let mut client = Command::new("python3");
    client.arg(script).arg(&served.socket);
    client.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut client = client.spawn().unwrap();
    let mut lines = BufReader::new(client.stdout.take().unwrap()).lines();
    let mut next = |client: &mut std::process::Child| match lines.next() {
        Some(line) => line.unwrap(),
        None => panic!("{}", errors_of(client)),
    };
    assert_eq!(next(&mut client), "borrowed 1048576 of host");
    let status = served.status();
    assert_eq!(status["leases"][0]["label"], "python");
    let reset = served.run(&["operate", "reset", "host", "--timeout-ms", "60000", "--json"]);
    let reset: Value = serde_json::from_slice(&reset.stdout).unwrap_or_else(|_| panic!("{reset:?}"));
    assert_eq!(reset["generation"], 1);
    assert_eq!(next(&mut client), "draining reset");
    assert_eq!(next(&mut client), "restored");
    assert_eq!(next(&mut client), "returned");
    assert_eq!(next(&mut client), "refused not-found");
    assert_eq!(next(&mut client), "borrowed again");
    // The kernel says so, for a broker that cannot any more: nothing is read from a socket here.
    served.child.kill().unwrap();
    served.child.wait().unwrap();
    client.stdin.take().unwrap().write_all(b"\n").unwrap();
    assert_eq!(next(&mut client), "has ended");
    assert!(ended(&mut client).success(), "{}", errors_of(&mut client));
}

/// Where it is there: with Python's own library, what the interface says of itself.
#[test]
fn pythons_varlink_reads_the_interface() {
    const NAME: &str = "pythons_varlink_reads_the_interface";
    if !Command::new("python3")
        .args(["-c", "import varlink"])
        .output()
        .is_ok_and(|output| output.status.success())
    {
        eprintln!("skipped: {NAME}: python3 has no module varlink");
        return;
    }
    let served = Served::new(&["--host", "16M"]);
    let script = "import sys, varlink\n\
        with varlink.Client(address='unix:' + sys.argv[1]) as client:\n    \
        with client.open('io.peervram.Broker') as broker:\n        \
        print(broker.List()['memories'][0]['name'])\n";
    let output = Command::new("python3").args(["-c", script]).arg(&served.socket).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "host\n", "{output:?}");
}

#[test]
fn varlinkctl_introspects_it() {
    const NAME: &str = "varlinkctl_introspects_it";
    if Command::new("varlinkctl").arg("--version").output().is_err() {
        eprintln!("skipped: {NAME}: there is no varlinkctl");
        return;
    }
    let served = Served::new(&["--host", "16M"]);
    let run = |arguments: &[&str]| {
        let output = Command::new("varlinkctl").args(arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let socket = served.socket.to_str().unwrap();
    assert!(run(&["introspect", socket, "io.peervram.Broker"]).contains("method Borrow"));
    assert!(run(&["call", socket, "io.peervram.Broker.List", "{}"]).contains("host"));
}

/// What the page says of messages that make no sense.
#[test]
fn what_makes_no_sense_is_answered_or_ends_the_connection_and_nobody_else_is_disturbed() {
    let served = Served::new(&["--host", "16M"]);
    let mut good = Connection::new(&served);
    for (parameters, named) in [(json!({ "sise": 1 }), "sise"), (json!({ "size": "much" }), "much")] {
        good.say(&json!({ "method": "io.peervram.Broker.Borrow", "parameters": parameters }));
        let reply = good.hear();
        assert_eq!(reply["error"], "org.varlink.service.InvalidParameter");
        assert!(reply["parameters"]["parameter"].as_str().unwrap().contains(named), "{reply}");
    }
    for nonsense in [&b"{}\0"[..], b"[1]\0", b"hello\0", &[b'x'; 70_000]] {
        let mut socket = UnixStream::connect(&served.socket).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        // It may be closed before all of it is written.
        let _ = socket.write_all(nonsense);
        let mut rest = Vec::new();
        let _ = socket.read_to_end(&mut rest);
        assert!(!rest.windows(5).any(|part| part == b"lease"), "{rest:?}");
    }
    good.say(&json!({ "method": "io.peervram.Broker.List" }));
    assert_eq!(good.hear()["parameters"]["memories"][0]["name"], "host");
}
