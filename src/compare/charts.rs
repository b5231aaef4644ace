//! The charts: samples of reports, losses of runs, and how far the losses are apart.

use super::reports::Comparison;
use super::runs::{RunComparison, RunRow};
use super::stats::ms;
use super::svg::{Chart, Scale, WIDTH};
use super::table::cut;

pub(super) use super::svg::stack;

/// Left and right edge of the plotted area.
const LEFT: f64 = 64.0;
const RIGHT: f64 = WIDTH - 24.0;
/// Height of the plotted area of curves.
const PLOT: f64 = 300.0;
/// Height of a line of the legend.
const LEGEND: f64 = 22.0;

/// Every sample of every report along one axis of ms/iter.
pub(super) fn samples(comparison: &Comparison) -> Chart {
    const STRIP: f64 = 46.0;
    const BAND: f64 = STRIP + 44.0;
    let rows = &comparison.rows;
    let bottom = 16.0 + BAND * rows.len() as f64;
    let mut chart = Chart::new("Samples in ms/iter", bottom + 46.0);
    let low = rows.iter().map(|row| row.report.min_ms).fold(f64::INFINITY, f64::min);
    let high = rows.iter().map(|row| row.report.max_ms).fold(low, f64::max);
    let paper = (LEFT - 40.0, RIGHT);
    // From 0, so that lengths are times; but not where that would crowd all samples on one side.
    let (scale, title) = if high > 20.0 * low {
        (Scale::log((0.9 * low, 1.1 * high), paper), "ms/iter, logarithmic")
    } else if low < 0.6 * high {
        (Scale::linear((0.0, 1.03 * high), paper), "ms/iter")
    } else {
        let pad = 0.06 * (high - low).max(1e-3 * high);
        (Scale::linear((low - pad, high + pad), paper), "ms/iter (the axis does not start at 0)")
    };
    chart.x_axis(&scale, 8.0, bottom, title);
    for (i, row) in rows.iter().enumerate() {
        let top = 36.0 + BAND * i as f64;
        let label = format!("{}: {}", row.letter, cut(&row.label, 80));
        chart.text((paper.0 + 4.0, top - 10.0), "start", "strong", &label);
        chart.bar(i, (scale.at(row.spread.low), top), (scale.at(row.spread.high), top + STRIP));
        let samples = &row.report.samples_ms;
        let apart = (STRIP - 10.0) / samples.len().saturating_sub(1).max(1) as f64;
        for (n, &sample) in samples.iter().enumerate() {
            let tip = format!("{}, iteration {}: {} ms", row.letter, n + 1, ms(sample));
            chart.mark(i, (scale.at(sample), top + 5.0 + apart * n as f64), None, &tip);
        }
        let x = scale.at(row.spread.median);
        chart.line((x, top - 3.0), (x, top + STRIP + 3.0), &format!("s{}", i % 6), 2.0);
        let anchor = if x < LEFT {
            "start"
        } else if x > RIGHT - 40.0 {
            "end"
        } else {
            "middle"
        };
        chart.text((x, top + STRIP + 17.0), anchor, "", &format!("{} ms", ms(row.spread.median)));
    }
    chart
}

/// The losses of all runs over the steps: train as lines, val as hollow marks.
pub(super) fn losses(comparison: &RunComparison) -> Chart {
    let rows = &comparison.rows;
    let top = 12.0 + LEGEND * rows.len() as f64;
    let mut chart = Chart::new("Train and val loss over the steps", top + PLOT + 46.0);
    let all = || rows.iter().flat_map(|row| row.train.values().chain(row.val.values()).copied());
    let (low, high) = (all().fold(f64::INFINITY, f64::min), all().fold(f64::NEG_INFINITY, f64::max));
    let pad = 0.04 * (high - low).max(1e-6 * high.abs());
    let x = steps_scale(rows);
    let y = Scale::linear((low - pad, high + pad), (top + PLOT, top));
    chart.y_axis(&y, LEFT, RIGHT);
    chart.x_axis(&x, top, top + PLOT, "step");
    chart.text((LEFT, top - 8.0), "end", "muted", "nats");
    let hollow = |series: usize| Some(if series == 0 { 1.7 } else { 1.0 });
    let place = |(&step, &loss): (&u64, &f64)| (x.at(step as f64), y.at(loss));
    for (i, row) in rows.iter().enumerate() {
        // The first run lies broad and pale below the others, its marks around theirs: equal curves remain two to the eye.
        let (width, opacity) = if i == 0 { (4.0, 0.45) } else { (1.8, 1.0) };
        draw(&mut chart, i, &row.train.iter().map(place).collect::<Vec<_>>(), width, opacity);
        let line = 14.0 + LEGEND * i as f64;
        chart.curve(i, &[(LEFT + 8.0, line), (LEFT + 52.0, line)], width, opacity);
        chart.text((LEFT + 60.0, line + 4.0), "start", "", "train");
        chart.mark(i, (LEFT + 108.0, line), hollow(i), "");
        chart.text((LEFT + 118.0, line + 4.0), "start", "", "val");
        let label = format!("{}: {}", row.letter, cut(&row.label, 90));
        chart.text((LEFT + 152.0, line + 4.0), "start", "strong", &label);
    }
    for (i, row) in rows.iter().enumerate() {
        for (step, loss) in &row.val {
            let tip = format!("{}, step {step}: val loss {loss:.4}", row.letter);
            chart.mark(i, place((step, loss)), hollow(i), &tip);
        }
    }
    chart
}

/// |a-b| of the train losses by the larger one, for each run but the first; `None` where all of them are equal.
pub(super) fn differences(comparison: &RunComparison) -> Option<Chart> {
    let rows = &comparison.rows;
    let found = || rows.iter().enumerate().filter_map(|(i, row)| Some((i, row, row.divergence.as_ref()?)));
    let above_0 = found().flat_map(|(_, _, d)| &d.relative).map(|(_, value)| *value).filter(|value| *value > 0.0);
    let smallest = above_0.reduce(f64::min)?;
    let largest = found().flat_map(|(_, _, d)| &d.relative).map(|(_, value)| *value).fold(0.0, f64::max);
    let tolerance = comparison.tolerance.max(f64::MIN_POSITIVE);
    let round = |value: f64, up: f64| 10f64.powf((value.log10() + up).floor());
    let (low, high) = (round(smallest.min(tolerance), 0.0), round(largest.max(tolerance), 1.0));

    let top = 12.0 + LEGEND * rows.len().saturating_sub(1) as f64;
    let mut chart = Chart::new("Relative difference of the train losses over the steps", top + PLOT * 0.7 + 46.0);
    let bottom = top + PLOT * 0.7;
    let x = steps_scale(rows);
    let y = Scale::log((low, high), (bottom, top));
    chart.y_axis(&y, LEFT, RIGHT);
    chart.x_axis(&x, top, bottom, "step");
    chart.text((LEFT, top - 8.0), "end", "muted", "|a-b|/loss");
    chart.line((LEFT, y.at(tolerance)), (RIGHT, y.at(tolerance)), "axis", 1.5);
    let text = format!("tolerance {}", comparison.tolerance);
    chart.text((LEFT + 6.0, y.at(tolerance) - 6.0), "start", "muted", &text);
    for (i, row, divergence) in found() {
        let place = |&(step, value): &(u64, f64)| (x.at(step as f64), y.at(value.max(low)));
        draw(&mut chart, i, &divergence.relative.iter().map(place).collect::<Vec<_>>(), 1.8, 1.0);
        let line = 14.0 + LEGEND * (i - 1) as f64;
        chart.curve(i, &[(LEFT + 8.0, line), (LEFT + 52.0, line)], 1.8, 1.0);
        let mut label = format!("{}: {}", row.letter, cut(&row.label, 60));
        if let Some(step) = divergence.starts {
            label += &format!(", parts at step {step}");
            let value = divergence.relative.iter().find(|(at, _)| *at == step).map_or(low, |(_, value)| *value);
            chart.mark(i, (x.at(step as f64), y.at(value.max(low))), None, &label);
        }
        chart.text((LEFT + 60.0, line + 4.0), "start", "strong", &label);
    }
    Some(chart)
}

/// One axis for both charts of runs, so that a step stands at the same place in each.
fn steps_scale(rows: &[RunRow]) -> Scale {
    let steps = || rows.iter().flat_map(|row| row.train.keys().chain(row.val.keys()).copied());
    let (first, last) = (steps().min().unwrap_or_default(), steps().max().unwrap_or_default());
    Scale::linear((first as f64, last as f64), (LEFT, RIGHT))
}

/// A curve. A long one is drawn as the mean of each of 240 stretches over a pale band from the lowest to the highest point
/// of each: a spike stays visible, and noise does not bury the line.
fn draw(chart: &mut Chart, series: usize, points: &[(f64, f64)], width: f64, opacity: f64) {
    let (line, band) = thin(points);
    if !band.is_empty() {
        chart.band(series, &band);
    }
    chart.curve(series, &line, width, opacity);
}

/// Places on the paper.
type Path = Vec<(f64, f64)>;

/// The line, and the band's outline where the curve is long.
fn thin(points: &[(f64, f64)]) -> (Path, Path) {
    const STRETCHES: usize = 240;
    if points.len() <= 4 * STRETCHES {
        return (points.to_vec(), Vec::new());
    }
    let (mut line, mut lower, mut upper) = (Vec::new(), Vec::new(), Vec::new());
    for stretch in points.chunks(points.len().div_ceil(STRETCHES)) {
        let heights = || stretch.iter().map(|(_, y)| *y);
        let x = stretch.iter().map(|(x, _)| x).sum::<f64>() / stretch.len() as f64;
        line.push((x, heights().sum::<f64>() / stretch.len() as f64));
        lower.push((x, heights().fold(f64::INFINITY, f64::min)));
        upper.push((x, heights().fold(f64::NEG_INFINITY, f64::max)));
    }
    lower.extend(upper.into_iter().rev());
    (line, lower)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_curve_is_a_mean_line_in_a_band_that_keeps_a_spike() {
        let mut points: Vec<(f64, f64)> = (0..100_000).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        points[54_321].1 = 9.0;
        let (line, band) = thin(&points);
        assert!(line.len() <= 240 && line.iter().all(|(_, y)| (0.45..0.55).contains(y)));
        assert!(band.len() == 2 * line.len() && band.iter().any(|(_, y)| *y == 9.0));
        assert_eq!(thin(&points[..900]), (points[..900].to_vec(), vec![]));
    }
}
