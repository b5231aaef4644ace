//! `gpt-wgpu compare`: reports or training runs side by side.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use crate::compare::{self, Options, Render};

#[derive(Args)]
pub struct CompareArgs {
    /// Two or more reports (JSON), or runs (an out_dir or its metrics.jsonl); the first is what the others are compared with
    #[arg(required = true, num_args = 2..)]
    files: Vec<PathBuf>,
    /// Write one self-contained page
    #[arg(long)]
    html: Option<PathBuf>,
    /// Write the chart alone
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Print Markdown
    #[arg(long)]
    markdown: bool,
    /// Compare reports of different element types too
    #[arg(long)]
    across_dtypes: bool,
    /// Runs: relative difference of the train loss from which on they count as diverged
    #[arg(long, default_value_t = Options::default().tolerance)]
    tolerance: f64,
}

pub fn run(args: &CompareArgs) -> Result<()> {
    let options = Options { across_dtypes: args.across_dtypes, tolerance: args.tolerance };
    let comparison = compare::compare(&args.files, &options)?;
    show(&*comparison, args)
}

fn show(comparison: &dyn Render, args: &CompareArgs) -> Result<()> {
    let text = if args.markdown { comparison.markdown() } else { comparison.text() };
    // A closed pipe (`| head`) is no error.
    let _ = write!(std::io::stdout(), "{text}");
    for (path, content) in [(&args.html, comparison.html()), (&args.svg, comparison.svg())] {
        if let Some(path) = path {
            std::fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    Ok(())
}
