//! Making, checking, reading and writing reports.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::Value;
use thiserror::Error;

use super::{BenchConfig, BenchReport, Device, Dtype, Machine, Program, SCHEMA, Timer, VERSION};

/// By how much a derived number (the median, tokens/s) may differ from what the samples say, relative: it allows for
/// rounding to four digits and nothing else.
const ROUNDING: f64 = 1e-3;

/// Why a report was refused.
#[derive(Debug, Error)]
pub enum ReportError {
    /// The file could not be read.
    #[error("cannot read {path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The file could not be written.
    #[error("cannot write {path}: {error}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The text is damaged JSON, or a value is missing or of the wrong type.
    #[error("{file}:{line}:{column}: {message}")]
    Json {
        /// The file.
        file: String,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What is wrong there.
        message: String,
    },
    /// The JSON is sound, what it says is not: another schema or version, or numbers that contradict each other.
    #[error("{file}: {message}")]
    Content {
        /// The file.
        file: String,
        /// What is wrong, and what was expected.
        message: String,
    },
}

/// The keys that say what the rest is.
#[derive(Deserialize)]
#[serde(expecting = "a JSON object")]
struct Envelope {
    schema: Option<Value>,
    version: Option<Value>,
}

impl BenchReport {
    /// A report of this program from its samples (ms, at least one), with the derived numbers and today's date; what is
    /// optional is `None` and can be set.
    pub fn new(
        machine: Machine,
        device: Device,
        dtype: Dtype,
        config: BenchConfig,
        warmup: usize,
        samples_ms: Vec<f64>,
        timer: Timer,
    ) -> Self {
        let median_ms = median(&samples_ms);
        Self {
            schema: SCHEMA.into(),
            version: VERSION,
            program: Program::GptWgpu,
            program_version: env!("CARGO_PKG_VERSION").into(),
            commit: None,
            machine,
            device,
            date: utc_now(),
            dtype,
            products: None,
            kernels: None,
            recompute: None,
            compiled: None,
            data: None,
            warmup,
            median_ms,
            min_ms: samples_ms.iter().copied().fold(f64::NAN, f64::min),
            max_ms: samples_ms.iter().copied().fold(f64::NAN, f64::max),
            tokens_per_s: config.tokens_per_iter() as f64 / median_ms * 1e3,
            config,
            samples_ms,
            mfu_measured: None,
            mfu_published: None,
            time_to_first_step_s: None,
            peak_memory_bytes: None,
            energy: None,
            energy_reason: None,
            ops: None,
            timer,
            losses: None,
        }
    }

    /// Reads and checks a file.
    ///
    /// # Errors
    /// When it cannot be read, is damaged (with line and column), has another schema or version, or contradicts itself.
    pub fn read(path: &Path) -> Result<Self, ReportError> {
        let bytes = fs::read(path).map_err(|error| ReportError::Read { path: path.into(), error })?;
        let name = path.display().to_string();
        Self::parse(&decode(bytes, &name)?, &name)
    }

    /// Parses and checks a report's text; `name` stands for the file in errors.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn parse(text: &str, name: &str) -> Result<Self, ReportError> {
        let content = |message| ReportError::Content { file: name.into(), message };
        let expected = format!("expected \"schema\": \"{SCHEMA}\", \"version\": {VERSION}");
        // First of all the schema: what else is wrong with a file of another kind is of no interest.
        let envelope: Envelope = serde_json::from_str(text).map_err(|error| json_error(&error, name, 1))?;
        match (envelope.schema, envelope.version) {
            (None, _) => return Err(content(format!("this is no bench report, it has no key `schema`; {expected}"))),
            (Some(schema), _) if schema != SCHEMA => {
                return Err(content(format!("this is no bench report, its schema is {schema}; {expected}")));
            }
            (_, None) => return Err(content(format!("the report has no key `version`; {expected}"))),
            (_, Some(version)) if version != VERSION => {
                return Err(content(format!(
                    "the report's version is {version}, and this program (gpt-wgpu {}) reads version {VERSION} only; \
                     use the program that wrote it or measure again",
                    env!("CARGO_PKG_VERSION")
                )));
            }
            _ => {}
        }
        let report: Self = serde_json::from_str(text).map_err(|error| json_error(&error, name, 1))?;
        report.check().map_err(content)?;
        Ok(report)
    }

    /// The report as indented JSON that ends with a newline.
    ///
    /// # Errors
    /// When the report is one that [`Self::parse`] would refuse.
    pub fn to_json(&self) -> Result<String, ReportError> {
        let content = |message| ReportError::Content { file: "the new report".into(), message };
        self.check().map_err(content)?;
        Ok(serde_json::to_string_pretty(self).map_err(|error| content(error.to_string()))? + "\n")
    }

    /// Checks the report and writes it.
    ///
    /// # Errors
    /// When the report is one that [`Self::read`] would refuse, or the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), ReportError> {
        fs::write(path, self.to_json()?).map_err(|error| ReportError::Write { path: path.into(), error })
    }

    /// What is wrong with the numbers, if anything.
    fn check(&self) -> Result<(), String> {
        let samples = &self.samples_ms;
        if samples.is_empty() {
            return Err("`samples_ms` is empty: there is nothing to compare".into());
        }
        if let Some(bad) = samples.iter().find(|ms| !ms.is_finite() || **ms <= 0.0) {
            return Err(format!("`samples_ms` has {bad}: a time must be a finite number above 0"));
        }
        let Machine { threads, .. } = self.machine;
        let BenchConfig { n_layer, n_head, n_embd, block_size, vocab_size, batch_size, .. } = self.config;
        for (key, value) in [
            ("machine.threads", threads),
            ("config.n_layer", n_layer),
            ("config.n_head", n_head),
            ("config.n_embd", n_embd),
            ("config.block_size", block_size),
            ("config.vocab_size", vocab_size),
            ("config.batch_size", batch_size),
            ("config.gradient_accumulation_steps", self.config.gradient_accumulation_steps),
        ] {
            if value == 0 {
                return Err(format!("`{key}` is 0: it must be at least 1"));
            }
        }
        let derived = median(samples);
        let tokens = self.config.tokens_per_iter() as f64;
        for (key, value, expected) in [
            ("median_ms", self.median_ms, derived),
            ("min_ms", self.min_ms, samples.iter().copied().fold(f64::INFINITY, f64::min)),
            ("max_ms", self.max_ms, samples.iter().copied().fold(0.0, f64::max)),
            ("tokens_per_s", self.tokens_per_s, tokens / derived * 1e3),
        ] {
            let off = (value - expected).abs() / expected;
            if off.is_nan() || off > ROUNDING {
                return Err(format!(
                    "the report contradicts itself: `{key}` is {value}, its samples make it {expected}"
                ));
            }
        }
        Ok(())
    }
}

/// The median, in the samples' unit: the middle one, or the mean of the two in the middle; NaN of nothing.
pub fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[upper],
        _ => (sorted[upper - 1] + sorted[upper]) / 2.0,
    }
}

/// Now, as ISO 8601 in UTC: `2026-11-21T11:59:30Z`.
pub fn utc_now() -> String {
    utc(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
}

fn utc(seconds: u64) -> String {
    let (mut days, time) = (seconds / 86400, seconds % 86400);
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let mut month = 1;
    for length in [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    format!("{year}-{month:02}-{:02}T{:02}:{:02}:{:02}Z", days + 1, time / 3600, time / 60 % 60, time % 60)
}

/// A file's bytes as text.
pub(crate) fn decode(bytes: Vec<u8>, name: &str) -> Result<String, ReportError> {
    String::from_utf8(bytes).map_err(|error| ReportError::Content {
        file: name.into(),
        message: format!("this is not text: byte {} is not UTF-8", error.utf8_error().valid_up_to()),
    })
}

/// serde's error with its place in front; `line` is the number of the line where its text began.
pub(crate) fn json_error(error: &serde_json::Error, name: &str, line: usize) -> ReportError {
    let text = error.to_string();
    let what = text.rsplit_once(" at line ").map_or(text.as_str(), |(what, _)| what);
    let message = match error.classify() {
        serde_json::error::Category::Data => format!("{what}; docs/bench-schema.md describes every key"),
        serde_json::error::Category::Eof => format!("damaged JSON, the file ends too early: {what}"),
        _ => format!("damaged JSON: {what}"),
    };
    ReportError::Json { file: name.into(), line: line - 1 + error.line(), column: error.column(), message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right_around_leap_days() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(utc(951_868_799), "2000-02-29T23:59:59Z");
        assert_eq!(utc(1_735_689_599), "2024-12-31T23:59:59Z");
        assert_eq!(utc(4_107_542_400), "2100-03-01T00:00:00Z");
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        assert_eq!(median(&[3.0, 1.0, 10.0, 2.0]), 2.5);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert!(median(&[]).is_nan());
    }
}
