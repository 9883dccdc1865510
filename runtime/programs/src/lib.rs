//! What this project's programs share: printing, endings, figures.
//!
//! [`output()`] is standard output. A reader that goes away (`head`, `less`, a script that has read enough) changes
//! nothing but what is read: the program goes on, writes the files that it was asked for, and ends with the exit code
//! that it would have had. [`end`] gives that code; where something could not be written for another reason, a full
//! disk, a success becomes a failure, and standard error says why.
//!
//! [`say!`] and [`note!`] stand for `println!` and `eprintln!`, which panic where nobody reads; clippy refuses those two
//! (`print_stdout`, `print_stderr`) in the whole workspace. [`Table`], [`lines`] and [`labelled`] lay text out for
//! [`columns`]. [`Ending`] is an error with an exit code, [`Samples`] what was measured, [`bytes`] a size in words,
//! [`replace`] writes a file as a whole.

#![forbid(unsafe_code)]

pub mod bytes;
mod ending;
mod file;
mod output;
#[cfg(feature = "picture")]
pub mod picture;
mod samples;
mod table;
mod text;

pub use ending::{CANNOT_RUN_HERE, Ending, FAILED, USAGE, cannot, usage};
pub use file::replace;
pub use output::{Output, end, is_terminal, output, output_failed};
pub use samples::Samples;
pub use table::{Table, UNBROKEN};
pub use text::{behind, labelled, lines, lines_within};

/// What a line has at most where nothing is known of the terminal, and on wider ones: longer lines are not read well.
pub const MOST_COLUMNS: usize = 100;
/// Narrower than this nothing is laid out; terminals break the lines then.
const LEAST_COLUMNS: usize = 40;

/// How many columns text is laid out for: the terminal's, as far as it has between 40 and [`MOST_COLUMNS`].
pub fn columns() -> usize {
    let columns = rustix::termios::tcgetwinsize(std::io::stdout()).map_or(0, |size| usize::from(size.ws_col));
    if columns == 0 { MOST_COLUMNS } else { columns.clamp(LEAST_COLUMNS, MOST_COLUMNS) }
}

/// Prints a line to standard output, as `println!` does, and never panics.
#[macro_export]
macro_rules! say {
    ($($part:tt)*) => {
        ::std::io::Write::write_fmt(&mut $crate::output(), ::std::format_args!("{}\n", ::std::format_args!($($part)*)))
            .unwrap_or_else($crate::output_failed)
    };
}

/// Prints a line to standard error, as `eprintln!` does, and never panics: where that cannot be written, nobody can
/// be told.
#[macro_export]
macro_rules! note {
    ($($part:tt)*) => {{
        let _ = ::std::io::Write::write_fmt(
            &mut ::std::io::stderr(),
            ::std::format_args!("{}\n", ::std::format_args!($($part)*)),
        );
    }};
}
