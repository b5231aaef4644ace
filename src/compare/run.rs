//! A training run as its metrics.jsonl tells it.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::metrics::Record;
use crate::report::{ReportError, json_error};

/// The records of one run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Run {
    /// In the order of the file.
    pub records: Vec<Record>,
    /// The first step whose loss was infinite or not a number. JSON has neither: they are written as `null`, and a
    /// [`Record`] cannot tell that from a loss that was not measured.
    pub not_finite: Option<u64>,
}

impl Run {
    /// Whether a file's text is a run: its first line is an object with a step.
    pub fn looks_like(text: &str) -> bool {
        let first = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
        serde_json::from_str::<Value>(first).is_ok_and(|value| value.get("step").is_some())
    }

    /// Parses the text of a metrics.jsonl; `name` stands for the file in errors. An unfinished last line is left out: the
    /// run is still writing, or was killed.
    ///
    /// # Errors
    /// With line and column, when a line is no record.
    pub fn parse(text: &str, name: &str) -> Result<Self, ReportError> {
        let mut run = Self::default();
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let value: Value = match serde_json::from_str(line) {
                Ok(value) => value,
                Err(error) if error.is_eof() && i + 1 == lines.len() && !text.ends_with('\n') => break,
                Err(error) => return Err(json_error(&error, name, i + 1)),
            };
            let refused = |message| ReportError::Content { file: format!("{name}:{}", i + 1), message };
            let record = Record::deserialize(&value)
                .map_err(|error| refused(format!("not a line of metrics.jsonl: {error}")))?;
            if let Some(ms) = record.ms.filter(|ms| *ms <= 0.0) {
                return Err(refused(format!("`ms` is {ms}: a time must be above 0")));
            }
            let infinite = ["loss", "train_loss", "val_loss"].iter().any(|key| value.get(key) == Some(&Value::Null));
            if infinite && run.not_finite.is_none() {
                run.not_finite = Some(record.step);
            }
            run.records.push(record);
        }
        Ok(run)
    }

    /// One field by step. The evaluation and the iteration of a step are two records; where a step has two values of one
    /// field, the later one counts.
    pub fn series(&self, field: impl Fn(&Record) -> Option<f64>) -> BTreeMap<u64, f64> {
        self.records.iter().filter_map(|record| Some((record.step, field(record)?))).collect()
    }
}
