//! Measurements side by side: bench reports, or the metrics.jsonl of training runs.
//!
//! `compare` does all of it for the command line; `load`, `compare_reports` and `compare_runs` are its parts.
//! Everything is compared with the first one named. Reports that do not measure the same thing are refused, and a
//! difference that the noise could make is not called one.

mod charts;
mod html;
mod reports;
mod run;
mod runs;
mod stats;
mod svg;
mod table;

use std::fs;
use std::path::{Path, PathBuf};

use thiserror::Error;

pub use reports::{Comparison, ReportRow, compare_reports};
pub use run::Run;
pub use runs::{Divergence, RunComparison, RunRow, compare_runs};
pub use stats::{MIN_SAMPLES, Spread, Verdict, judge};

use crate::report::{self, BenchReport, ReportError};

/// What may be compared, and how.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Compare reports although their dtypes differ.
    pub across_dtypes: bool,
    /// Two losses a and b differ where |a-b| exceeds this fraction of the larger one.
    pub tolerance: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self { across_dtypes: false, tolerance: 1e-3 }
    }
}

/// Something to compare, and what to call it in errors and tables: the file's path, or a device.
#[derive(Clone, Debug, PartialEq)]
pub struct Named<T> {
    /// What to call it.
    pub name: String,
    /// The thing.
    pub content: T,
}

/// What the files hold.
#[derive(Clone, Debug, PartialEq)]
pub enum Loaded {
    /// Bench reports.
    Reports(Vec<Named<BenchReport>>),
    /// Training runs.
    Runs(Vec<Named<Run>>),
}

/// Why there is no comparison.
#[derive(Debug, Error)]
pub enum CompareError {
    /// A file is no report and no run.
    #[error(transparent)]
    File(#[from] ReportError),
    /// Fewer than two.
    #[error("a comparison needs at least two files, and got {0}")]
    TooFew(usize),
    /// Reports and runs together.
    #[error("{report} is a bench report and {run} is a training run: compare reports with reports and runs with runs")]
    Mixed {
        /// A report.
        report: String,
        /// A run.
        run: String,
    },
    /// The reports measured different things.
    #[error("these reports do not compare, because they measured different things:{}", list(.0))]
    Differ(Vec<Difference>),
    /// Two runs without a step at which both have a train loss.
    #[error("{a} ({a_steps}) and {b} ({b_steps}) have no step in common at which both logged a train loss")]
    NoCommonStep {
        /// The first run.
        a: String,
        /// Its steps.
        a_steps: String,
        /// The other run.
        b: String,
        /// Its steps.
        b_steps: String,
    },
}

/// One key in which reports differ that must not.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// `n_layer`, `dtype`, ...
    pub key: String,
    /// Each report's name and value, the first report first; the others where they differ from it.
    pub values: Vec<(String, String)>,
    /// What to do about it.
    pub remedy: Option<&'static str>,
}

fn list(differences: &[Difference]) -> String {
    differences
        .iter()
        .map(|difference| {
            let values: Vec<String> =
                difference.values.iter().map(|(name, value)| format!("{value} in {name}")).collect();
            let remedy = difference.remedy.map(|remedy| format!(" ({remedy})")).unwrap_or_default();
            format!("\n  {}: {}{remedy}", difference.key, values.join(", "))
        })
        .collect()
}

/// A comparison in the forms that people read.
pub trait Render {
    /// For a terminal, at most 110 columns wide; ends with a newline.
    fn text(&self) -> String;
    /// For a README or the summary of a CI job; ends with a newline.
    fn markdown(&self) -> String;
    /// One self-contained page, light or dark as the reader's system is.
    fn html(&self) -> String;
    /// The charts alone, as one SVG file.
    fn svg(&self) -> String;
}

/// Reads the files and compares them, the first with each of the others.
///
/// # Errors
/// When a file cannot be read or is neither report nor run, and when the contents do not compare.
pub fn compare(paths: &[impl AsRef<Path>], options: &Options) -> Result<Box<dyn Render>, CompareError> {
    Ok(match load(paths)? {
        Loaded::Reports(reports) => Box::new(compare_reports(&reports, options)?),
        Loaded::Runs(runs) => Box::new(compare_runs(&runs, options)?),
    })
}

/// Reads bench reports, or the metrics.jsonl of training runs (or the out_dir that has one). What a file is, its content
/// says and not its name.
///
/// # Errors
/// When a file cannot be read, is damaged (with line and column) or has another schema, and when reports and runs are
/// mixed.
pub fn load(paths: &[impl AsRef<Path>]) -> Result<Loaded, CompareError> {
    let (mut reports, mut runs) = (Vec::new(), Vec::new());
    for path in paths {
        let mut path: PathBuf = path.as_ref().into();
        if path.is_dir() {
            path.push("metrics.jsonl");
        }
        let bytes = fs::read(&path).map_err(|error| ReportError::Read { path: path.clone(), error })?;
        let name = path.display().to_string();
        let text = report::decode(bytes, &name)?;
        if Run::looks_like(&text) {
            runs.push(Named { content: Run::parse(&text, &name)?, name });
        } else {
            reports.push(Named { content: BenchReport::parse(&text, &name)?, name });
        }
    }
    match (reports.first(), runs.first()) {
        (Some(report), Some(run)) => Err(CompareError::Mixed { report: report.name.clone(), run: run.name.clone() }),
        (None, Some(_)) => Ok(Loaded::Runs(runs)),
        _ => Ok(Loaded::Reports(reports)),
    }
}

/// A, B, C, ...; after Z, numbers.
fn letter(index: usize) -> String {
    match u8::try_from(index) {
        Ok(index) if index < 26 => char::from(b'A' + index).to_string(),
        _ => format!("#{}", index + 1),
    }
}

/// What tells each of them apart: the first of its parts, and of the further ones as many as are needed.
fn labels(parts: &[Vec<String>]) -> Vec<String> {
    let depth = parts.iter().map(Vec::len).min().unwrap_or_default();
    let mut labels: Vec<String> = vec![String::new(); parts.len()];
    for part in 0..depth {
        let column: Vec<&String> = parts.iter().map(|parts| &parts[part]).collect();
        // A part that is the same everywhere tells nothing apart.
        if part > 0 && column.iter().all(|text| *text == column[0]) {
            continue;
        }
        for (label, text) in labels.iter_mut().zip(column) {
            if !label.split(", ").any(|said| said == text) {
                let comma = if label.is_empty() || text.is_empty() { "" } else { ", " };
                *label = format!("{label}{comma}{text}");
            }
        }
        let unique: std::collections::HashSet<&String> = labels.iter().collect();
        if unique.len() == labels.len() {
            break;
        }
    }
    labels
}

/// Text from a file, fit for a terminal: control characters and those that reorder a line become spaces.
fn clean(text: &str) -> String {
    let hostile = |c: char| c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.chars().map(|c| if hostile(c) { ' ' } else { c }).collect::<String>().trim().to_string()
}
