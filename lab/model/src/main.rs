//! `peervram-model`: serves a model GPU to QEMU, and tells a running one to go wrong.

#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use peervram_model::configuration::Identity;
use peervram_model::device::Device;
use peervram_model::server::{Server, listen};
use peervram_model::{control, misbehaviour::Misbehaviour};
use serde_json::{Value, json};

const EXAMPLES: &str = r#"Examples:
  A GPU with 256 MiB of VRAM, and a QEMU that has it (start the model first):
    peervram-model serve --socket /tmp/gpu.sock --control /tmp/gpu.ctl --vram-mib 256
    qemu-system-x86_64 -machine q35,kernel-irqchip=split,memory-backend=ram \
      -object memory-backend-memfd,id=ram,size=1G,share=on -m 1G \
      -device intel-iommu,intremap=on,caching-mode=on \
      -device pcie-root-port,id=rp1,chassis=1 \
      -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/tmp/gpu.sock"},"bus":"rp1"}' ...
    share=on lets the model reach the guest's memory as a file; without it, by messages, which is slow.

  Make its copies wrong, look, and make it behave again:
    peervram-model ctl /tmp/gpu.ctl misbehave all-ones
    peervram-model ctl /tmp/gpu.ctl status
    peervram-model ctl /tmp/gpu.ctl checksum 0 4096
    peervram-model ctl /tmp/gpu.ctl behave

  A GPU with a small BAR, and one that the kernel's nvgrace driver takes:
    peervram-model serve --socket s --vram-mib 1024 --bar-mib 256
    peervram-model serve --socket s --id 10de:2342 --bar4-mib 32 --vendor-word 1

  One whose VRAM is memory of the machine, as on Grace; QEMU is given the file as memory, too:
    truncate -s 512M coherent
    peervram-model serve --socket s --id 10de:2342 --coherent --vram-file coherent --vram-mib 512 \
      --bar-mib 32 --bar4-mib 32"#;

const MISBEHAVIOURS: &str = "Misbehaviours (they add up until `behave`):
  all-ones            whatever the engine loads is all ones: a fast, wrong copy
  zeros               the same with zeros
  mirror              the engine works on other memory than the BAR shows
  dead-reads          loads from DMA addresses bring nothing, without an error
  dead-writes         stores to DMA addresses are lost, without an error
  peers-only          ones, zeros and dead directions with memory of other devices only
  stuck-fence         work is done, and no fence, index or interrupt tells
  slow-reset [--ms N] a reset takes N milliseconds (1500)
  stuck-reset         a reset does not end until `behave`
  vram-lost           VRAM is zeros after a reset
  slow-ready [--ms N] after a reset the memory is said not to be ready for N milliseconds (1500)
  stuck-ready         the memory is said not to be ready";

/// A model GPU: a PCI device with VRAM, a copy engine and a draw engine, served over vfio-user.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a GPU until killed; clients may come and go.
    #[command(after_help = EXAMPLES)]
    Serve(Serve),
    /// Talk to a running model over its control socket and print its answer.
    #[command(after_help = MISBEHAVIOURS)]
    Ctl {
        /// The control socket, as given to `serve --control`.
        path: PathBuf,
        #[command(subcommand)]
        order: Order,
    },
}

#[derive(Debug, clap::Args)]
struct Serve {
    /// Where to listen for QEMU.
    #[arg(long)]
    socket: PathBuf,
    /// Where to listen for `ctl`.
    #[arg(long)]
    control: Option<PathBuf>,
    /// PCI vendor and device, in hexadecimal.
    #[arg(long, default_value = "1234:5047", value_parser = parse_id)]
    id: (u16, u16),
    /// Size of VRAM: a power of two, 16 to 8192; with --coherent, any size up to that.
    #[arg(long, default_value_t = 256)]
    vram_mib: u64,
    /// Size of BAR2: a power of two; less than VRAM makes a small BAR. Default: all of VRAM.
    #[arg(long)]
    bar_mib: Option<u64>,
    /// Keep VRAM in this file instead of fresh memory, so that others can map it, too.
    #[arg(long)]
    vram_file: Option<PathBuf>,
    /// Have a BAR4 of this size, which is plain memory.
    #[arg(long, default_value_t = 0)]
    bar4_mib: u64,
    /// VRAM is behind no BAR: others have --vram-file as memory of the machine. BAR2 is plain memory.
    #[arg(long, requires_all = ["vram_file", "bar_mib"])]
    coherent: bool,
    /// Tell in a CXL capability whether the memory is active, as GPUs after GB300 do.
    #[arg(long)]
    cxl: bool,
    /// The word in the vendor-specific capability. For vendor 10de, 1 says "no MIG bug".
    #[arg(long, default_value_t = 0)]
    vendor_word: u16,
    /// Go wrong from the start, as with `ctl misbehave`; may be repeated.
    #[arg(long, value_parser = parse_misbehaviour)]
    misbehave: Vec<Misbehaviour>,
}

#[derive(Debug, Subcommand)]
enum Order {
    /// Go wrong in one more way.
    #[command(after_help = MISBEHAVIOURS)]
    Misbehave {
        /// The name of the misbehaviour.
        what: String,
        /// How long, for `slow-reset` and `slow-ready`.
        #[arg(long)]
        ms: Option<u64>,
    },
    /// Take all misbehaviour back, and end a reset that is stuck.
    Behave,
    /// Surprise removal: everything reads all ones.
    Remove,
    /// End a removal.
    Insert,
    /// Latch an error and raise its interrupt.
    RaiseError,
    /// Tell how the device is.
    Status,
    /// Show bytes of VRAM as this process has them.
    Read(Range),
    /// The checksum of a range of VRAM as this process has it.
    Checksum(Range),
}

#[derive(Debug, clap::Args)]
struct Range {
    /// Offset in VRAM, in bytes.
    offset: u64,
    /// Length in bytes.
    length: u64,
}

fn parse_id(text: &str) -> Result<(u16, u16), String> {
    let parsed = text.split_once(':').and_then(|(vendor, device)| {
        Some((u16::from_str_radix(vendor, 16).ok()?, u16::from_str_radix(device, 16).ok()?))
    });
    parsed.ok_or_else(|| "expected VENDOR:DEVICE in hexadecimal, for example 10de:2342".into())
}

fn parse_misbehaviour(what: &str) -> Result<Misbehaviour, String> {
    serde_json::from_value(json!({ "what": what })).map_err(|error| error.to_string())
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let result = match Arguments::parse().command {
        Command::Serve(arguments) => serve(&arguments),
        Command::Ctl { path, order } => ctl(&path, &order),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // On one line, and without a backtrace: every error says what to do next.
        Err(error) => {
            peervram_programs::note!("peervram-model: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(arguments: &Serve) -> anyhow::Result<()> {
    let bytes = |what: &str, mib: u64| {
        mib.checked_mul(1 << 20)
            .with_context(|| format!("--{what} {mib} is beyond all addresses; choose less"))
    };
    let vram_bytes = bytes("vram-mib", arguments.vram_mib)?;
    let identity = Identity {
        vendor: arguments.id.0,
        device: arguments.id.1,
        vram_bytes,
        bar2_bytes: arguments.bar_mib.map_or(Ok(vram_bytes), |mib| bytes("bar-mib", mib))?,
        bar4_bytes: bytes("bar4-mib", arguments.bar4_mib)?,
        vendor_word: arguments.vendor_word,
        is_coherent: arguments.coherent,
        has_cxl: arguments.cxl,
    };
    raise_file_limit();
    let device = Arc::new(Device::new(identity, arguments.vram_file.as_deref())?);
    for misbehaviour in &arguments.misbehave {
        device.misbehave(*misbehaviour);
    }
    if let Some(path) = &arguments.control {
        let listener = listen(path).with_context(|| in_use(path, "--control"))?;
        let device = Arc::clone(&device);
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || {
                if let Err(error) = control::run(&listener, &device) {
                    tracing::error!(%error, "the control socket has ended; the device is served on");
                }
            })
            .context(
                "the thread of the control socket could not be started; look at the limits of processes",
            )?;
    }
    let path = &arguments.socket;
    let server = Server::bind(path).with_context(|| in_use(path, "--socket"))?;
    tracing::info!(socket = %path.display(), vram_mib = arguments.vram_mib, "a model GPU is ready");
    server.run(&*device).with_context(|| format!("accepting clients at {} failed", path.display()))
}

fn in_use(path: &Path, option: &str) -> String {
    format!(
        "cannot listen at {} ({option}); is another model running there? End it or choose another path",
        path.display()
    )
}

/// Every file of guest memory is a descriptor; the soft limit is low for historical reasons only.
fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(errno) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%errno, "the limit of open files could not be raised");
    }
}

fn ctl(path: &Path, order: &Order) -> anyhow::Result<()> {
    let line = match order {
        Order::Misbehave { what, ms: None } => json!({ "do": "misbehave", "what": what }),
        Order::Misbehave { what, ms: Some(ms) } => json!({ "do": "misbehave", "what": what, "ms": ms }),
        Order::Behave => json!({ "do": "behave" }),
        Order::Remove => json!({ "do": "remove" }),
        Order::Insert => json!({ "do": "insert" }),
        Order::RaiseError => json!({ "do": "raise-error" }),
        Order::Status => json!({ "do": "status" }),
        Order::Read(Range { offset, length }) => {
            json!({ "do": "read", "offset_bytes": offset, "length_bytes": length })
        }
        Order::Checksum(Range { offset, length }) => {
            json!({ "do": "checksum", "offset_bytes": offset, "length_bytes": length })
        }
    };
    let mut stream = UnixStream::connect(path).with_context(|| {
        format!(
            "no model answers at {}; give the path of `serve --control`, and see that it runs",
            path.display()
        )
    })?;
    writeln!(stream, "{line}").context("the model went away; look at what it printed")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).context("the model went away; look at what it printed")?;
    let answer: Value =
        serde_json::from_str(&answer).context("the answer is not JSON: is this a model's control socket?")?;
    if answer["ok"] != json!(true) {
        bail!("the model refuses: {}", answer["error"].as_str().unwrap_or("without a reason"));
    }
    let found = ["hex", "checksum"].into_iter().find_map(|name| answer.get(name));
    match found {
        Some(Value::String(hex)) => peervram_programs::say!("{hex}"),
        Some(number) => peervram_programs::say!("{number}"),
        None => peervram_programs::say!("{}", answer["status"]),
    }
    Ok(())
}
