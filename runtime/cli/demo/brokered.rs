//! `peervram demo --broker`: two processes of two users, and memory that the one lends the other.
//!
//! ```text
//! this process, root            peervram serve, root          the client, nobody
//!  starts both          ------>  lends               <-----    borrows, draws
//!  peervram status      ------>  who has what
//!  peervram operate     ------>  draining            ----->    its gate shuts; it stops, and answers
//!                                restored            ----->    imports anew, draws again
//!  compares every byte  <----------------------------------    what its device reads
//! ```
//! With a screen this process is the broker, since nobody else could paint a device's memory.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use peervram::{Error, Kind, Result};
use peervram_programs::{Table, columns, note, say};
use serde::Serialize;
use serde_json::Value;

use super::other_user::OtherUser;
use super::owner::{self, PaintingOwner};
use super::process::{ClientProcess, Meeting, Served, ask};
use super::told::{Row, Told};
use super::{Arguments, Check, card_of, painted_of, pause, size_in_memory};
use crate::broker::users;
use crate::ending::print_json;
use crate::picture::{Picture, layout_of, of_bytes, save};

const TRIED: &str = "lend to another process";
/// How long the client has to stop: an emulated CPU may be compiling its shader.
const REVOKE_LIMIT_MS: &str = "60000";

/// How long a broker that does not answer any more may take to be over.
const ENDING_LIMIT: Duration = Duration::from_secs(1);
/// How words of the client's begin.
const OF_CLIENT: &str = "the client, process";

/// What came of it.
#[derive(Serialize)]
struct Report {
    broker: ProcessReport,
    client: ProcessReport,
    /// Why both are of one user, if they are.
    one_user_because: Option<String>,
    /// What `peervram status --json` has said before and after the memory was taken back.
    status: Vec<Value>,
    steps: Vec<Row>,
    refused: Vec<String>,
    picture: PathBuf,
    passed: bool,
}

#[derive(Serialize)]
struct ProcessReport {
    process: u32,
    user: String,
}

/// Who lends.
enum Lends {
    Program(Served),
    /// This process, whose owner paints.
    Own(Box<PaintingOwner>),
}

pub fn run(arguments: &Arguments, json: bool) -> anyhow::Result<ExitCode> {
    let mut demo = Demo::begin(arguments, json)?;
    let played = demo.play();
    if let Err(error) = played {
        let error = demo.why_it_failed(error);
        if !json {
            demo.print_table()?;
        }
        return Err(error.into());
    }
    let passed = demo.rows.iter().all(|row| row.check.passed);
    if json {
        print_json(&demo.into_report(passed))?;
    } else {
        demo.print_table()?;
        say!("\nPicture: {}", arguments.output.display());
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A demo that runs.
struct Demo<'a> {
    arguments: &'a Arguments,
    json: bool,
    card: Picture,
    painted: Picture,
    user: OtherUser,
    own_name: String,
    // Fields drop in this order: the client, the broker, the folder with its socket.
    client: ClientProcess,
    lends: Lends,
    meeting: Meeting,
    status: Vec<Value>,
    rows: Vec<Row>,
    refused: Vec<String>,
}

impl<'a> Demo<'a> {
    /// Starts a broker and a client.
    fn begin(arguments: &'a Arguments, json: bool) -> Result<Self> {
        let meeting = Meeting::new()?;
        let user = OtherUser::find();
        let card = card_of(arguments);
        let painted = painted_of(&card)?;
        let lends = lend(arguments, &meeting, &user, &card)?;
        let own_name = users::user_in_words(rustix::process::geteuid().as_raw());
        let (broker, device) = match &lends {
            Lends::Program(served) => {
                (format!("peervram serve, process {}", served.id()), served.device.clone())
            }
            Lends::Own(_) => {
                let device = arguments.lender.map_or_else(String::new, |address| address.to_string());
                (format!("this process, {}", std::process::id()), device)
            }
        };
        let client = ClientProcess::start(&user, &words_for_client(arguments, &meeting))?;
        if !json {
            say!("Broker: {broker}, of {own_name}; lends {device}");
            say!("Client: process {}, of {}\n", client.id(), user.in_words());
        }
        if let Some(why) = user.is_own_because() {
            note!("peervram: both processes are of one user, {own_name}: {why}");
        }
        let (status, rows, refused) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self {
            arguments,
            json,
            card,
            painted,
            user,
            own_name,
            client,
            lends,
            meeting,
            status,
            rows,
            refused,
        })
    }

    fn play(&mut self) -> Result<()> {
        self.progress("the client borrows memory and imports it");
        self.hear_until(|told| matches!(told, Told::Attached))?;
        if let Lends::Own(owner) = &self.lends {
            owner.paint()?;
            owner.set_next(&self.painted);
        }
        self.client.go_on()?;
        self.look(0)?;
        if let Some(path) = &self.arguments.card {
            save(&self.card, path)?;
        }
        self.pause("the test card")?;
        self.show_status()?;

        self.progress("the operator takes the memory back, and gives it back");
        self.revoke()?;
        let seen = self.look(1)?;
        self.pause("the painted picture")?;
        self.show_status()?;

        self.progress("the client gives the memory back");
        self.client.go_on()?;
        self.hear_until(|told| matches!(told, Told::Finished))?;
        self.end_broker()?;
        save(&seen, &self.arguments.output)
    }

    /// Takes the memory back, as an operator does.
    fn revoke(&mut self) -> Result<()> {
        let begun = Instant::now();
        let memory = match &self.lends {
            Lends::Program(served) => served.memory.clone(),
            Lends::Own(_) => owner::MEMORY.to_owned(),
        };
        let words = ["operate", "revoke", &memory, "--timeout-ms", REVOKE_LIMIT_MS];
        let generation = match self.json {
            true => self.ask(&words)?["generation"].as_u64(),
            false => self.show(&words).map(|()| None)?,
        };
        let what = "the client has answered".to_owned();
        let row = Row::new(&self.own_name, "takes it back", begun, Check { passed: true, what });
        self.rows.push(Row { generation, ..row });
        Ok(())
    }

    /// The picture that the client has in use, as its device reads it; where it only shows, as the owner does.
    fn look(&mut self, wanted: u64) -> Result<Picture> {
        let told = self.hear_until(|told| matches!(told, Told::Drawn { .. }))?;
        let (Told::Drawn { generation, .. }, bytes) = told else {
            return Err(not_a_picture("something else"));
        };
        if generation != wanted {
            return Err(not_a_picture(&format!("one of generation {generation} in the place of {wanted}")));
        }
        let begun = Instant::now();
        let expected = if generation == 0 { &self.card } else { &self.painted };
        let (seen, what) = match &self.lends {
            Lends::Program(_) => (of_bytes(layout_of(expected), bytes)?, "compares the picture"),
            Lends::Own(owner) => (owner.seen()?, "looks at its memory"),
        };
        let check = Check::of_bytes(seen.bytes(), expected.bytes());
        let row = Row::new(&self.own_name, what, begun, check);
        self.rows.push(Row { generation: Some(generation), ..row });
        Ok(seen)
    }

    /// Who has what, as operators can ask for it.
    fn show_status(&mut self) -> Result<()> {
        if !self.json {
            self.show(&["status"])?;
        }
        let begun = Instant::now();
        let status = self.ask(&["status"])?;
        let lease = &status["leases"][0];
        let is_so = lease["user"] == self.user.number && lease["process"] == self.client.id();
        let what = format!("user {}, process {}", lease["user"], lease["process"]);
        let row = Row::new(&self.own_name, "asks who has it", begun, Check { passed: is_so, what });
        self.rows.push(Row { generation: lease["generation"].as_u64(), ..row });
        self.status.push(status);
        Ok(())
    }

    /// What a command of this program says for programs.
    fn ask(&self, words: &[&str]) -> Result<Value> {
        let text = ask(&self.meeting.socket(), words, true)?;
        let why =
            |error: serde_json::Error| Error::new(Kind::Os, TRIED, format!("{}: {error}", words.join(" ")));
        serde_json::from_str(&text).map_err(why)
    }

    /// Runs a command of this program, and shows it as it would be typed, with what it prints.
    fn show(&self, words: &[&str]) -> Result<()> {
        say!("$ peervram {}\n{}", words.join(" "), ask(&self.meeting.socket(), words, false)?);
        Ok(())
    }

    fn end_broker(&mut self) -> Result<()> {
        let Lends::Program(served) = &mut self.lends else { return Ok(()) };
        let begun = Instant::now();
        let is_well = served.stop()?;
        let what = if is_well { "exit code 0" } else { "not as it was told to" };
        let row =
            Row::new(&self.own_name, "ends the broker", begun, Check { passed: is_well, what: what.into() });
        self.rows.push(row);
        Ok(())
    }

    /// Keeps what the client tells until it tells what is wanted.
    fn hear_until(&mut self, is_wanted: impl Fn(&Told) -> bool) -> Result<(Told, Vec<u8>)> {
        loop {
            let (told, bytes) = self.client.hear()?;
            match told {
                told if is_wanted(&told) => return Ok((told, bytes)),
                Told::Did(row) => self.rows.push(Row { who: self.user.in_words(), ..row }),
                Told::Refused(why) => self.refused.push(why),
                Told::Failed { code, why, next } => {
                    let why = format!("{OF_CLIENT} {}: {why}", self.client.id());
                    let error = Error::new(Kind::from_code(&code).unwrap_or(Kind::Os), TRIED, why);
                    return Err(match next {
                        Some(next) => error.next(next),
                        None => error,
                    });
                }
                told => return Err(not_a_picture(&format!("{told:?}"))),
            }
        }
    }

    /// Looks once more at who is still there: what went wrong may be that the broker is gone, which its client hears.
    fn why_it_failed(&mut self, error: Error) -> Error {
        let Lends::Program(served) = &mut self.lends else { return error };
        let Some(how) = served.ended_within(ENDING_LIMIT) else { return error };
        let (id, last) = (served.id(), served.last_words());
        let client = match self.hear_until(|_| false) {
            _ if error.why().starts_with(OF_CLIENT) => error.why().to_owned(),
            Err(told) if told.kind() == Kind::Gone => told.why().to_owned(),
            _ => "the client has not heard of it".to_owned(),
        };
        let why = format!("peervram serve, process {id}, ended in the middle ({how}); {client}");
        Error::new(Kind::Gone, TRIED, why)
            .next(format!("run the demo again; if the broker ends by itself, its last words are: {last}"))
    }

    /// For whoever waits.
    fn progress(&self, what: &str) {
        if !self.json {
            note!("{what}");
        }
    }

    fn pause(&self, what: &str) -> Result<()> {
        let where_it_is =
            if self.arguments.show.is_some() { "on the screen" } else { "in the borrowed memory" };
        pause(self.arguments, &format!("{what} is {where_it_is}"))
    }

    fn print_table(&self) -> anyhow::Result<()> {
        let mut output = peervram_programs::output();
        let mut table =
            Table::new(&["step", "user", "path", "generation", "time", "check"]).with_figures_in([3, 4]);
        for row in &self.rows {
            let verdict = if row.check.passed { "ok" } else { "WRONG" };
            table.row([
                row.what.clone(),
                row.who.clone(),
                row.path.clone().unwrap_or_else(|| "-".into()),
                row.generation.map_or_else(|| "-".into(), |generation| generation.to_string()),
                format!("{:.2} ms", row.time_us / 1e3),
                format!("{verdict}: {}", row.check.what),
            ]);
        }
        table.print(&mut output, columns())?;
        for refused in &self.refused {
            writeln!(output, "\nRefused: {refused}")?;
        }
        Ok(())
    }

    fn into_report(self, passed: bool) -> Report {
        let broker = match &self.lends {
            Lends::Program(served) => served.id(),
            Lends::Own(_) => std::process::id(),
        };
        Report {
            broker: ProcessReport { process: broker, user: self.own_name },
            client: ProcessReport { process: self.client.id(), user: self.user.in_words() },
            one_user_because: self.user.is_own_because().map(str::to_owned),
            status: self.status,
            steps: self.rows,
            refused: self.refused,
            picture: self.arguments.output.clone(),
            passed,
        }
    }
}

/// Starts who lends: this process where it is to paint, else `peervram serve`.
fn lend(arguments: &Arguments, meeting: &Meeting, user: &OtherUser, card: &Picture) -> Result<Lends> {
    let size_bytes = size_in_memory(arguments);
    if let (Some(address), Some(_)) = (arguments.lender, &arguments.show) {
        let owner = PaintingOwner::serve(address, size_bytes, card, user.number, &meeting.socket())?;
        return Ok(Lends::Own(Box::new(owner)));
    }
    let mut words = match arguments.lender {
        Some(address) => vec![address.to_string(), "--range".into(), format!("0+{size_bytes}")],
        None => vec!["--host".into(), size_bytes.to_string()],
    };
    words.extend(["--allow".to_owned(), format!("user:{},leases=1", user.number)]);
    Ok(Lends::Program(Served::start(meeting, &words)?))
}

fn words_for_client(arguments: &Arguments, meeting: &Meeting) -> Vec<String> {
    let mut words = vec![
        "--client".to_owned(),
        meeting.socket().display().to_string(),
        "--vulkan".to_owned(),
        arguments.vulkan.clone(),
        "--size".to_owned(),
        format!("{}x{}", arguments.size.width, arguments.size.height),
    ];
    if let (Some(lender), Some(node)) = (arguments.lender, &arguments.show) {
        words.extend(["--lender".to_owned(), lender.to_string()]);
        words.extend(["--show".to_owned(), node.display().to_string()]);
    }
    words
}

fn not_a_picture(what: &str) -> Error {
    Error::new(Kind::Os, TRIED, format!("the client was to tell of a picture, and tells of {what}"))
}
