//! What the program prints. `println!` and its like panic where nobody reads any more: a closed pipe (`| head`), a full disk.

use std::fmt::Display;
use std::io::{ErrorKind, Write, stderr, stdout};

use anyhow::{Context, Result};

/// Prints a line that accompanies the work: that nobody can read it stops nothing.
pub fn say(line: impl Display) {
    let _ = writeln!(stdout(), "{line}");
}

/// The same on standard error.
pub fn warn(line: impl Display) {
    let _ = writeln!(stderr(), "{line}");
}

/// Prints what a command was asked for, as it is. A reader who has had enough is no error.
///
/// # Errors
/// When it cannot be written.
pub fn print(text: impl Display) -> Result<()> {
    stream(text).map(|_| ())
}

/// As [`print`], at once, and says whether the reader is still there.
///
/// # Errors
/// When it cannot be written.
pub fn stream(text: impl Display) -> Result<bool> {
    let mut stdout = stdout();
    match write!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("cannot write to standard output"),
    }
}
