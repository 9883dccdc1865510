//! Small register reads per second through the server, against a bare ping-pong of messages of the
//! same sizes over the same kind of socket, taken in turns in one run.
//!
//! `cargo bench -p peervram-model --bench registers [-- ROUNDS]`. The ratio should be at least [`LIMIT`]:
//! what is left is the price of decoding, dispatching, locking and a second read for the payload. The last line is the
//! ratio as JSON, for `cargo xtask bench`.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use peervram_model::configuration::Identity;
use peervram_model::device::Device;
use peervram_model::protocol::{Header, command};
use peervram_model::registers as map;
use peervram_model::server::serve;
use peervram_programs::Samples;
use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};

const REQUEST_BYTES: usize = 32;
const REPLY_BYTES: usize = 36;
const TRIPS: u32 = 500;
/// What the ratio should be at least.
const LIMIT: f64 = 0.8;

fn main() {
    pin();
    // Cargo's own `--bench` is not a number.
    let rounds = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(301).max(1);
    let mut bare = bare();
    let mut served = served();
    let mut rates = [Vec::new(), Vec::new()];
    for round in 0..=rounds {
        for (stream, rates) in [&mut bare, &mut served].into_iter().zip(&mut rates) {
            let rate = trips(stream);
            // The first round warms up.
            if round > 0 {
                rates.push(rate);
            }
        }
    }
    // Neighbours in time share the machine's mood: the ratio is taken round by round.
    let ratios = rates[1].iter().zip(&rates[0]).map(|(served, bare)| served / bare).collect();
    peervram_programs::say!(
        "{rounds} rounds of {TRIPS} trips, {REQUEST_BYTES} bytes there and {REPLY_BYTES} back"
    );
    let [bare, served] = rates.map(spread);
    for (name, (median, low, high)) in [("bare socket", bare), ("model", served)] {
        peervram_programs::say!("{name:12} median {median:9.0} reads/s  (p10 {low:.0}, p90 {high:.0})");
    }
    let (median, low, high) = spread(ratios);
    peervram_programs::say!("ratio        median {median:9.3}          (p10 {low:.3}, p90 {high:.3})");
    peervram_programs::say!(
        r#"{{"what":"register reads per second of the model","against":"a bare socket","ratio":{median:.4},"ratio_least":{low:.4},"ratio_most":{high:.4},"limit":{LIMIT},"more_is_better":true}}"#
    );
}

/// Keeps this thread, and those that it starts, on one CPU. Whether both ends of a socket share one makes a factor of
/// five, and the scheduler's mood would decide the ratio.
fn pin() {
    let mut this = CpuSet::new();
    this.set(sched_getcpu());
    sched_setaffinity(None, &this).expect("a process may stay where it is");
}

/// Median, tenth and ninetieth percentile.
fn spread(values: Vec<f64>) -> (f64, f64, f64) {
    let values: Samples = values.into_iter().collect();
    (values.median(), values.percentile(10.0), values.percentile(90.0))
}

/// Reads of four bytes, one after another; per second.
fn trips(stream: &mut UnixStream) -> f64 {
    let mut request = bytemuck::bytes_of(&Header::command(1, command::REGION_READ, 32)).to_vec();
    request.extend_from_slice(&u64::from(map::IDENTITY).to_ne_bytes());
    request.extend_from_slice(&[0u32, 4].map(u32::to_ne_bytes).concat());
    assert_eq!(request.len(), REQUEST_BYTES);
    let mut reply = [0; REPLY_BYTES];
    let start = Instant::now();
    for _ in 0..TRIPS {
        stream.write_all(&request).expect("the other side reads");
        stream.read_exact(&mut reply).expect("the other side answers");
    }
    f64::from(TRIPS) / start.elapsed().as_secs_f64()
}

fn bare() -> UnixStream {
    let (ours, mut theirs) = UnixStream::pair().expect("a pair of sockets");
    std::thread::spawn(move || {
        let (mut request, reply) = ([0; REQUEST_BYTES], [0; REPLY_BYTES]);
        while theirs.read_exact(&mut request).is_ok() && theirs.write_all(&reply).is_ok() {}
    });
    ours
}

fn served() -> UnixStream {
    let identity = Identity {
        vendor: 0x1234,
        device: 0x5678,
        bar2_bytes: 16 << 20,
        vram_bytes: 16 << 20,
        bar4_bytes: 0,
        vendor_word: 0,
        is_coherent: false,
        has_cxl: false,
    };
    let device = Arc::new(Device::new(identity, None).expect("16 MiB"));
    let (mut ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    std::thread::spawn(move || serve(&*device, &theirs));
    let header = Header::command(0, command::VERSION, 20);
    ours.write_all(bytemuck::bytes_of(&header)).expect("the model reads");
    ours.write_all(&[0; 4]).expect("the model reads");
    let mut head = [0; 16];
    ours.read_exact(&mut head).expect("the model answers");
    let mut rest = vec![0; Header::read(&head).payload_bytes().expect("a payload")];
    ours.read_exact(&mut rest).expect("the model answers");
    ours
}
