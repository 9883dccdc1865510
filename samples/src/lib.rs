//! What all samples do in the same way.
#![expect(clippy::print_stdout, reason = "a sample prints as a program of its reader's would")]

use std::io;

/// Lets whoever watches look at a screen: a person, who presses Enter, or `cargo xtask sample`, which takes
/// a picture of that name.
///
/// # Errors
/// Standard input cannot be read. Its end is no error: then nobody watches.
pub fn screendump(name: &str) -> io::Result<()> {
    println!("screendump {name}");
    io::stdin().read_line(&mut String::new()).map(drop)
}
