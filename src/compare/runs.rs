//! Training runs side by side: where their losses part, and what they cost.

use std::collections::BTreeMap;
use std::path::Path;

use super::stats::{Spread, Verdict, judge, ms, times};
use super::table::{Column, NONE, Table, markdown, wrap};
use super::{CompareError, Named, Options, Render, Run, charts, clean, html, labels, letter};

/// Runs with the first of which the others were compared.
#[derive(Clone, Debug)]
pub struct RunComparison {
    /// One a run, in the order given.
    pub rows: Vec<RunRow>,
    /// The tolerance of [`Options`].
    pub tolerance: f64,
}

/// One run.
#[derive(Clone, Debug)]
pub struct RunRow {
    /// A, B, C, ...
    pub letter: String,
    /// What tells it from the others: the folder's name.
    pub label: String,
    /// The file.
    pub name: String,
    /// Loss of the logged iterations, nats, by step; of the evaluations where no iteration was logged.
    pub train: BTreeMap<u64, f64>,
    /// Loss of the evaluations on val, nats, by step.
    pub val: BTreeMap<u64, f64>,
    /// ms an iteration.
    pub ms: Option<Spread>,
    /// The first step whose loss was not finite.
    pub not_finite: Option<u64>,
    /// How the train loss differs from the first run's; `None` for the first run.
    pub divergence: Option<Divergence>,
    /// The time of an iteration, compared with the first run's.
    pub verdict: Option<Verdict>,
}

/// How the train losses of two runs differ at the steps that both logged.
#[derive(Clone, Debug, PartialEq)]
pub struct Divergence {
    /// Steps that both logged.
    pub common: usize,
    /// The largest |a-b|, nats.
    pub largest: f64,
    /// Its first step.
    pub largest_step: u64,
    /// The first step where |a-b| exceeds the tolerance times the larger loss.
    pub starts: Option<u64>,
    /// |a-b| by the larger of the two, by step.
    pub relative: Vec<(u64, f64)>,
}

impl RunRow {
    /// Step and value of the last evaluation.
    pub fn final_val(&self) -> Option<(u64, f64)> {
        self.val.last_key_value().map(|(&step, &loss)| (step, loss))
    }

    /// Step and value of the best evaluation, the first one of equals.
    pub fn best_val(&self) -> Option<(u64, f64)> {
        self.val.iter().map(|(&step, &loss)| (step, loss)).min_by(|a, b| a.1.total_cmp(&b.1))
    }
}

/// Compares the first run with each of the others.
///
/// # Errors
/// When there are fewer than two, and when one shares no step with the first.
pub fn compare_runs(runs: &[Named<Run>], options: &Options) -> Result<RunComparison, CompareError> {
    let [first, rest @ ..] = runs else { return Err(CompareError::TooFew(0)) };
    if rest.is_empty() {
        return Err(CompareError::TooFew(1));
    }
    // `loss` is of every logged iteration. A run that only evaluates has `train_loss` alone, and then that is compared.
    let logged = runs.iter().all(|run| run.content.records.iter().any(|record| record.loss.is_some()));
    let train = |run: &Run| run.series(|record| if logged { record.loss } else { record.train_loss });
    let spread = |run: &Run| Spread::of(&run.records.iter().filter_map(|record| record.ms).collect::<Vec<_>>());
    let base = train(&first.content);
    let base_ms = spread(&first.content);
    let mut rows = Vec::new();
    for (i, (run, label)) in runs.iter().zip(labels(&name_parts(runs))).enumerate() {
        let train = train(&run.content);
        let mut divergence = None;
        if i > 0 {
            divergence = diverge(&base, &train, options.tolerance);
            if divergence.is_none() {
                return Err(CompareError::NoCommonStep {
                    a: first.name.clone(),
                    a_steps: steps(&base),
                    b: run.name.clone(),
                    b_steps: steps(&train),
                });
            }
        }
        let ms = spread(&run.content);
        let verdict = match (&base_ms, &ms) {
            (Some(_), Some(_)) if i == 0 => Some(Verdict::First),
            (Some(base), Some(ms)) => Some(judge(base, ms)),
            _ => None,
        };
        rows.push(RunRow {
            letter: letter(i),
            label,
            name: clean(&run.name),
            train,
            val: run.content.series(|record| record.val_loss),
            ms,
            not_finite: run.content.not_finite,
            divergence,
            verdict,
        });
    }
    Ok(RunComparison { rows, tolerance: options.tolerance })
}

/// A run is called by its file; metrics.jsonl, as all of them are called, by its folder.
fn name_parts(runs: &[Named<Run>]) -> Vec<Vec<String>> {
    let text = |part: Option<&std::ffi::OsStr>| clean(&part.unwrap_or_default().to_string_lossy());
    let parts = |run: &Named<Run>| {
        let path = Path::new(&run.name);
        let folder = text(path.parent().and_then(Path::file_name));
        match text(path.file_stem()) {
            stem if stem == "metrics" && !folder.is_empty() => vec![folder, clean(&run.name)],
            stem => vec![stem, clean(&run.name)],
        }
    };
    runs.iter().map(parts).collect()
}

fn steps(losses: &BTreeMap<u64, f64>) -> String {
    match (losses.first_key_value(), losses.last_key_value()) {
        (Some((first, _)), Some((last, _))) => format!("{} steps from {first} to {last}", losses.len()),
        _ => "no steps".into(),
    }
}

fn diverge(a: &BTreeMap<u64, f64>, b: &BTreeMap<u64, f64>, tolerance: f64) -> Option<Divergence> {
    let common = a.iter().filter_map(|(&step, &a)| Some((step, a, *b.get(&step)?)));
    let relative = |a: f64, b: f64| if a == b { 0.0 } else { (a - b).abs() / a.abs().max(b.abs()) };
    let mut found: Option<Divergence> = None;
    for (step, a, b) in common {
        let difference = (a - b).abs();
        let so_far = found.get_or_insert(Divergence {
            common: 0,
            largest: difference,
            largest_step: step,
            starts: None,
            relative: Vec::new(),
        });
        so_far.common += 1;
        so_far.relative.push((step, relative(a, b)));
        if difference > so_far.largest {
            (so_far.largest, so_far.largest_step) = (difference, step);
        }
        if so_far.starts.is_none() && relative(a, b) > tolerance {
            so_far.starts = Some(step);
        }
    }
    found
}

impl RunComparison {
    /// A sentence or two for each run but the first.
    pub fn verdicts(&self) -> Vec<String> {
        let Some((first, rest)) = self.rows.split_first() else { return Vec::new() };
        let name = |row: &RunRow| format!("{} ({})", row.letter, row.label);
        let mut verdicts: Vec<String> = Vec::new();
        for row in rest {
            let (Some(divergence), a, b) = (&row.divergence, name(first), name(row)) else { continue };
            let Divergence { common, largest, largest_step, starts, .. } = divergence;
            let at = if *common == 1 { "the one step".into() } else { format!("all {common} steps") };
            let mut text = match starts {
                _ if *largest == 0.0 => format!("The train losses of {b} and {a} are equal at {at} in common."),
                None => format!(
                    "The train losses of {b} and {a} agree to {} at {at} in common; they differ most at step \
                     {largest_step}, by {}.",
                    self.tolerance,
                    small(*largest)
                ),
                Some(step) => format!(
                    "The train loss of {b} parts from {a} at step {step} (tolerance {}) and differs most at step \
                     {largest_step}, by {}.",
                    self.tolerance,
                    small(*largest)
                ),
            };
            match row.verdict {
                Some(Verdict::NoDifference) => text += " In ms/iter there is no difference.",
                Some(Verdict::Faster(ratio)) => text += &format!(" An iteration is {} faster.", times(ratio)),
                Some(Verdict::Slower(ratio)) => text += &format!(" An iteration is {} slower.", times(ratio)),
                _ => {}
            }
            verdicts.push(text);
        }
        for row in &self.rows {
            if let Some(step) = row.not_finite {
                verdicts.push(format!("The loss of {} was not finite at step {step}.", name(row)));
            }
        }
        verdicts
    }

    fn table(&self) -> Table {
        let columns = vec![
            Column::left(""),
            Column::shrinking("run", 12),
            Column::right("last step"),
            Column::right("final val"),
            Column::right("best val"),
            Column::right("ms/iter"),
            Column::left("ms/iter vs A"),
            Column::right("largest |a-b|"),
            Column::left("parts at"),
        ];
        let or_none = |text: Option<String>| text.unwrap_or_else(|| NONE.into());
        let row = |row: &RunRow| {
            vec![
                row.letter.clone(),
                row.label.clone(),
                or_none(row.train.last_key_value().map(|(step, _)| step.to_string())),
                or_none(row.final_val().map(|(_, loss)| format!("{loss:.4}"))),
                or_none(row.best_val().map(|(step, loss)| format!("{loss:.4} @ {step}"))),
                or_none(row.ms.map(|spread| ms(spread.median))),
                or_none(row.verdict.map(Verdict::short)),
                or_none(row.divergence.as_ref().map(|d| format!("{} @ {}", small(d.largest), d.largest_step))),
                or_none(
                    row.divergence.as_ref().map(|d| d.starts.map_or("nowhere".into(), |step| format!("step {step}"))),
                ),
            ]
        };
        Table::new(columns, self.rows.iter().map(row).collect())
    }

    fn explanation(&self) -> String {
        format!(
            "Losses in nats. Two losses part where |a-b| exceeds {} of the larger one; only steps that both runs logged \
             count. ms/iter are medians, and their ranges from the 5th to the 95th percentile decide whether they differ.",
            self.tolerance
        )
    }
}

/// A difference of losses.
fn small(value: f64) -> String {
    match value {
        0.0 => "0".into(),
        v if v < 1e-3 => format!("{v:.1e}"),
        v => format!("{v:.4}"),
    }
}

impl Render for RunComparison {
    fn text(&self) -> String {
        let mut text: String = self.verdicts().iter().map(|verdict| wrap(verdict, 110, 2)).collect();
        text = text + "\n" + &self.table().text(110) + "\n" + &wrap(&self.explanation(), 110, 0);
        for row in &self.rows {
            text += &format!("{}  {}\n", row.letter, row.name);
        }
        text
    }

    fn markdown(&self) -> String {
        let verdicts: String = self.verdicts().iter().map(|text| format!("**{}**\n\n", markdown(text))).collect();
        format!("{verdicts}{}\n{}\n", self.table().markdown(), markdown(&self.explanation()))
    }

    fn html(&self) -> String {
        let mut page = html::Page::new("Training runs compared", &self.verdicts());
        page.table(&self.table());
        page.note(&self.explanation());
        let caption = "Lines: train loss of the logged iterations; in a long run their means, with their range as a pale \
                       band. Marks: val loss of the evaluations.";
        page.figure("Loss", &charts::losses(self), caption);
        if let Some(chart) = charts::differences(self) {
            let caption = "|a-b| of the train losses by the larger of the two, at the steps that both runs logged. Equal \
                           losses lie on the bottom line.";
            page.figure("Difference to A", &chart, caption);
        }
        let rows = self.rows.iter().map(|row| vec![row.letter.clone(), row.label.clone(), row.name.clone()]).collect();
        let columns = vec![Column::left(""), Column::left("run"), Column::left("file")];
        page.section("Files", &Table::new(columns, rows).html());
        page.finish()
    }

    fn svg(&self) -> String {
        let mut parts = vec![charts::losses(self)];
        parts.extend(charts::differences(self));
        charts::stack(&parts)
    }
}
