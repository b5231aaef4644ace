//! Bench reports side by side: a table with ratios and a verdict that respects noise.

use std::path::Path;

use super::stats::{Spread, Verdict, bytes, judge, ms, times, whole};
use super::table::{Column, NONE, Table, markdown, wrap};
use super::{CompareError, Difference, MIN_SAMPLES, Named, Options, Render, charts, clean, html, labels, letter};
use crate::report::{BenchReport, Op, ReportError, Timer};

/// Reports with the first of which the others were compared.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// One a report, in the order given.
    pub rows: Vec<ReportRow>,
}

/// One report.
#[derive(Clone, Debug)]
pub struct ReportRow {
    /// A, B, C, ...
    pub letter: String,
    /// What tells it from the others: program and backend, and more where that is not enough.
    pub label: String,
    /// The file.
    pub name: String,
    /// What it holds.
    pub report: BenchReport,
    /// What its samples cover, ms.
    pub spread: Spread,
    /// Speed relative to the first report, by the medians: above 1 is faster.
    pub ratio: f64,
    /// Whether that ratio is more than noise.
    pub verdict: Verdict,
}

/// Compares the first report with each of the others.
///
/// # Errors
/// When there are fewer than two, and when their configurations or (unless [`Options::across_dtypes`]) their dtypes
/// differ: every key that does is listed.
pub fn compare_reports(reports: &[Named<BenchReport>], options: &Options) -> Result<Comparison, CompareError> {
    if reports.len() < 2 {
        return Err(CompareError::TooFew(reports.len()));
    }
    let differences = differences(reports, options);
    if !differences.is_empty() {
        return Err(CompareError::Differ(differences));
    }
    let mut rows: Vec<ReportRow> = Vec::new();
    for (i, (named, label)) in reports.iter().zip(labels(&label_parts(reports))).enumerate() {
        let spread = Spread::of(&named.content.samples_ms).ok_or_else(|| ReportError::Content {
            file: clean(&named.name),
            message: "`samples_ms` is empty: there is nothing to compare".into(),
        })?;
        let (ratio, verdict) = match rows.first() {
            Some(first) => (first.spread.median / spread.median, judge(&first.spread, &spread)),
            None => (1.0, Verdict::First),
        };
        let (letter, name, report) = (letter(i), clean(&named.name), named.content.clone());
        rows.push(ReportRow { letter, label, name, report, spread, ratio, verdict });
    }
    Ok(Comparison { rows })
}

/// What must be equal and is not.
fn differences(reports: &[Named<BenchReport>], options: &Options) -> Vec<Difference> {
    let keys = |report: &BenchReport| {
        let mut keys = report.config.entries().to_vec();
        if !options.across_dtypes {
            keys.push(("dtype", report.dtype.name().into()));
        }
        keys
    };
    let Some((first, rest)) = reports.split_first() else { return Vec::new() };
    let mut differences = Vec::new();
    for (i, (key, value)) in keys(&first.content).into_iter().enumerate() {
        let mut values = vec![(clean(&first.name), clean(&value))];
        for other in rest {
            let (_, theirs) = keys(&other.content).swap_remove(i);
            if theirs != value {
                values.push((clean(&other.name), clean(&theirs)));
            }
        }
        if values.len() > 1 {
            let remedy = (key == "dtype").then_some("--across-dtypes compares them all the same");
            differences.push(Difference { key: key.into(), values, remedy });
        }
    }
    differences
}

fn label_parts(reports: &[Named<BenchReport>]) -> Vec<Vec<String>> {
    let parts = |named: &Named<BenchReport>| {
        let report = &named.content;
        let stem = Path::new(&named.name).file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let parts = [
            format!("{} {}", report.program.name(), report.device.backend.name()),
            report.dtype.name().into(),
            report.compiled.map(|compiled| if compiled { "compiled" } else { "eager" }).unwrap_or_default().into(),
            report.device.name.clone(),
            report.kernels.clone().unwrap_or_default(),
            report.recompute.as_ref().map(|what| format!("recompute {what}")).unwrap_or_default(),
            report.program_version.clone(),
            stem,
        ];
        parts.iter().map(|part| clean(part)).collect()
    };
    reports.iter().map(parts).collect()
}

fn or_none(text: Option<String>) -> String {
    text.unwrap_or_else(|| NONE.into())
}

impl ReportRow {
    /// The program and what of it ran.
    fn program(&self) -> String {
        let compiled = if self.report.compiled == Some(true) { " compiled" } else { "" };
        format!("{}{compiled}", self.report.program.name())
    }

    /// `key: value` of everything that a reader may want to know about a report and that the table has no room for.
    fn details(&self) -> Vec<(&'static str, Option<String>)> {
        let report = &self.report;
        let mfu = |mfu: &crate::report::Mfu| {
            format!("{:.1} % of {:.1} TFLOP/s ({})", 100.0 * mfu.fraction, mfu.peak_flops / 1e12, mfu.how)
        };
        let energy = report.energy.as_ref().map(|energy| {
            let (joules, tokens) = (ms(energy.joules_per_iter), ms(energy.tokens_per_joule));
            format!("{:.1} W, {joules} J/iter, {tokens} tokens/J ({})", energy.watts, energy.source)
        });
        let reason = || report.energy_reason.as_ref().map(|reason| format!("not available: {reason}"));
        vec![
            ("program", Some(format!("{} {}", self.program(), report.program_version))),
            ("commit", report.commit.as_ref().map(|commit| commit.chars().take(12).collect())),
            ("kernels", report.kernels.clone()),
            ("recompute", report.recompute.clone()),
            ("dtype", Some(report.dtype.name().into())),
            ("products", report.products.clone()),
            ("device", Some(report.device.name.clone())),
            ("backend", Some(report.device.backend.name().into())),
            ("driver", report.device.driver.clone()),
            ("device memory", report.device.memory_bytes.map(bytes)),
            ("system", Some(format!("{} {}", report.machine.os, report.machine.arch))),
            ("cpu", Some(format!("{}, threads: {}", report.machine.cpu, report.machine.threads))),
            ("data", report.data.clone()),
            ("timed", Some(format!("{} iterations after {} of warm-up", self.spread.count, report.warmup))),
            ("5th to 95th percentile", Some(format!("{} to {} ms", ms(self.spread.low), ms(self.spread.high)))),
            ("timer", Some(report.timer.name().into())),
            ("first step after", report.time_to_first_step_s.map(|s| format!("{s:.1} s"))),
            ("MFU, measured peak", report.mfu_measured.as_ref().map(mfu)),
            ("MFU, published peak", report.mfu_published.as_ref().map(mfu)),
            ("energy", energy.or_else(reason)),
            ("date", Some(report.date.clone())),
        ]
    }
}

impl Comparison {
    /// A sentence for each report but the first.
    pub fn verdicts(&self) -> Vec<String> {
        let Some((first, rest)) = self.rows.split_first() else { return Vec::new() };
        let sentence = |(i, row): (usize, &ReportRow)| {
            let name = |row: &ReportRow| format!("{} ({})", row.letter, row.label);
            // What the first one is, the first sentence tells.
            let (b, a) = (name(row), if i == 0 { name(first) } else { first.letter.clone() });
            let (ours, theirs) = (ms(row.spread.median), ms(first.spread.median));
            let range = |spread: &Spread| format!("{} to {}", ms(spread.low), ms(spread.high));
            match row.verdict {
                Verdict::Faster(ratio) => {
                    format!("{b} is {} faster than {a}: {ours} against {theirs} ms/iter.", times(ratio))
                }
                Verdict::Slower(ratio) => {
                    format!("{b} is {} slower than {a}: {ours} against {theirs} ms/iter.", times(ratio))
                }
                Verdict::TooFewSamples => format!(
                    "Between {b} and {a} no verdict: {ours} and {theirs} ms/iter, but {} and {} samples, and it takes \
                     {MIN_SAMPLES} of each to know the noise.",
                    row.spread.count, first.spread.count
                ),
                Verdict::First | Verdict::NoDifference => format!(
                    "{b} and {a} show no difference: {ours} and {theirs} ms/iter, with samples from {} and from {}.",
                    range(&row.spread),
                    range(&first.spread)
                ),
            }
        };
        rest.iter().enumerate().map(sentence).collect()
    }

    /// What a reader should know before believing the ratios.
    pub fn notes(&self) -> Vec<String> {
        let letters = |wanted: &dyn Fn(&ReportRow) -> bool| {
            let letters: Vec<&str> =
                self.rows.iter().filter(|row| wanted(row)).map(|row| row.letter.as_str()).collect();
            letters.join(", ")
        };
        let mut notes = Vec::new();
        let by_device = letters(&|row| row.report.timer == Timer::Timestamps);
        let by_host = letters(&|row| row.report.timer == Timer::Host);
        if !by_device.is_empty() && !by_host.is_empty() {
            notes.push(format!(
                "{by_device} timed with the device's own clock, {by_host} with the host's: the first leaves out what the \
                 host adds."
            ));
        }
        if self.rows.windows(2).any(|rows| rows[0].report.dtype != rows[1].report.dtype) {
            notes.push("The dtypes differ: part of a ratio is the price of precision.".into());
        }
        let noisy = letters(&|row| row.spread.high > 1.5 * row.spread.low);
        if !noisy.is_empty() {
            notes.push(format!(
                "The samples of {noisy} scatter by more than half, which hides differences: measure again on an idle machine."
            ));
        }
        let cold = letters(&|row| row.report.warmup == 0);
        if !cold.is_empty() {
            notes.push(format!("{cold} had no warm-up: the samples include compilation and the first allocations."));
        }
        notes
    }

    fn config(&self) -> String {
        let entries = self.rows.first().map(|row| row.report.config.entries());
        let words: Vec<String> =
            entries.iter().flatten().map(|(key, value)| format!("{key} {}", clean(value))).collect();
        words.join(", ")
    }

    /// `brief` leaves out of the verdict the ratio that stands beside it: a terminal is narrow.
    fn table(&self, brief: bool) -> Table {
        let columns = vec![
            Column::left(""),
            Column::shrinking("program", 10),
            Column::shrinking("device", 10),
            Column::left("dtype"),
            Column::right("ms/iter (min..max)"),
            Column::right("tokens/s"),
            Column::right("speed"),
            Column::right("memory"),
            Column::right("J/iter"),
            Column::left("verdict"),
        ];
        let row = |row: &ReportRow| {
            let ReportRow { report, spread, .. } = row;
            vec![
                row.letter.clone(),
                row.program(),
                format!("{} {}", report.device.backend.name(), report.device.name),
                report.dtype.name().into(),
                format!("{} ({}..{})", ms(spread.median), ms(report.min_ms), ms(report.max_ms)),
                whole(report.tokens_per_s),
                times(row.ratio),
                or_none(report.peak_memory_bytes.map(bytes)),
                or_none(report.energy.as_ref().map(|energy| ms(energy.joules_per_iter))),
                if brief { row.verdict.brief().into() } else { row.verdict.short() },
            ]
        };
        Table::new(columns, self.rows.iter().map(row).collect())
    }

    fn explanation(&self) -> &'static str {
        "ms/iter are medians; speed is the first report's median by this one's. The verdict respects noise: reports whose \
         samples overlap between the 5th and the 95th percentile show no difference, whatever their medians."
    }
}

fn ops_table(ops: &[Op]) -> Table {
    let columns = vec![
        Column::left("operation"),
        Column::right("launches"),
        Column::right("ms"),
        Column::right("%"),
        Column::right("GFLOP/s"),
        Column::right("GB/s"),
    ];
    let row = |op: &Op| {
        vec![
            op.name.clone(),
            op.count.to_string(),
            ms(op.ms),
            format!("{:.1}", op.percent),
            or_none(op.flops_per_s.map(|flops| whole(flops / 1e9))),
            or_none(op.bytes_per_s.map(|bytes| whole(bytes / 1e9))),
        ]
    };
    Table::new(columns, ops.iter().map(row).collect())
}

impl Render for Comparison {
    fn text(&self) -> String {
        let mut text: String = self.verdicts().iter().map(|verdict| wrap(verdict, 110, 2)).collect();
        text = text + "\n" + &self.table(true).text(110) + "\n" + &wrap(self.explanation(), 110, 0);
        for note in self.notes() {
            text += &wrap(&format!("Note: {note}"), 110, 2);
        }
        text += &wrap(&format!("Config: {}", self.config()), 110, 2);
        for row in &self.rows {
            let shown =
                ["program", "commit", "kernels", "recompute", "device", "driver", "system", "cpu", "timed", "timer"];
            let details = row.details();
            let values =
                details.iter().filter(|(key, _)| shown.contains(key)).filter_map(|(_, value)| value.as_deref());
            let values: Vec<String> = values.map(clean).collect();
            text += &wrap(&format!("{} {}: {}", row.letter, row.name, values.join("; ")), 110, 2);
        }
        text
    }

    fn markdown(&self) -> String {
        let mut text: String = self.verdicts().iter().map(|text| format!("**{}**\n\n", markdown(text))).collect();
        text = text + &self.table(false).markdown() + "\n" + self.explanation() + "\n";
        for note in self.notes() {
            text += &format!("\nNote: {}\n", markdown(&note));
        }
        text + "\nConfig: " + &markdown(&self.config()) + "\n"
    }

    fn html(&self) -> String {
        let mut page = html::Page::new("Benchmarks compared", &self.verdicts());
        page.table(&self.table(false));
        page.note(self.explanation());
        for note in self.notes() {
            page.note(&format!("Note: {note}"));
        }
        let caption = "Each mark is one iteration, the first at the top and the last at the bottom. The bar covers the 5th \
                       to the 95th percentile, the line is the median.";
        page.figure("Samples", &charts::samples(self), caption);
        let mut lines: Vec<Vec<String>> = Vec::new();
        for (i, row) in self.rows.iter().enumerate() {
            for (line, (key, value)) in row.details().into_iter().enumerate() {
                if i == 0 {
                    lines.push(vec![key.into()]);
                }
                lines[line].push(or_none(value));
            }
        }
        lines.retain(|line| line[1..].iter().any(|cell| cell != NONE));
        let names = self.rows.iter().map(|row| format!("{}: {}", row.letter, row.name)).collect::<Vec<_>>();
        page.section("Programs and machines", &html::transposed(&names, &lines));
        page.section("Configuration", "");
        page.note(&self.config());
        for row in &self.rows {
            if let Some(ops) = row.report.ops.as_deref().filter(|ops| !ops.is_empty()) {
                page.folded(&format!("Operations of {} ({})", row.letter, row.label), &ops_table(ops).html());
            }
        }
        page.finish()
    }

    fn svg(&self) -> String {
        charts::stack(&[charts::samples(self)])
    }
}
