//! The pieces of a chart: escaped text, scales, marks, and the one style sheet of page and picture.

use std::fmt::Write;

use super::clean;

/// Width of every chart in its own units.
pub(super) const WIDTH: f64 = 860.0;

/// Colours of the series, for light and for dark. Line styles and marks tell the series apart without them.
const COLOURS: [(&str, &str); 6] = [
    ("#1d5fbf", "#6cabff"),
    ("#c24e00", "#ff9d4d"),
    ("#23783a", "#5fcf7c"),
    ("#8a3ab9", "#d09bff"),
    ("#b3205f", "#ff8cbb"),
    ("#5d6470", "#b4bcc8"),
];

/// Dash patterns of the series, as long a list as the colours.
const DASHES: [&str; 6] = ["", "7 4", "2 3", "10 3 2 3", "14 5", "5 2 1 2 1 2"];

/// Text for SVG and HTML, in an element or in a quoted attribute.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::new();
    for c in clean(text).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            _ => out.push(c),
        }
    }
    out
}

/// The style of charts, light and dark.
pub(super) fn style() -> String {
    let mut light = String::from(
        ".chart text{font:12px system-ui,-apple-system,\"Segoe UI\",Roboto,sans-serif;fill:#1c2026;stroke:#fff;stroke-width:4px;stroke-linejoin:round;paint-order:stroke}\
         .chart .strong{font-weight:600}.chart .muted{fill:#59616c}.chart .bg{fill:#fff}\
         .chart .grid{stroke:#e1e5ea;fill:none}.chart .axis{stroke:#7d8691;fill:none}\n",
    );
    let mut dark = String::from(
        ".chart text{fill:#e8ebef;stroke:#15181d}.chart .muted{fill:#a3acb8}.chart .bg{fill:#15181d}\
         .chart .grid{stroke:#2c323a}.chart .axis{stroke:#8a94a1}\n",
    );
    for (i, (on_white, on_black)) in COLOURS.iter().enumerate() {
        let _ = writeln!(light, ".chart .s{i}{{stroke:{on_white}}}.chart .f{i}{{fill:{on_white}}}");
        let _ = writeln!(dark, ".chart .s{i}{{stroke:{on_black}}}.chart .f{i}{{fill:{on_black}}}");
    }
    format!("{light}@media (prefers-color-scheme:dark){{\n{dark}}}\n")
}

/// A chart: what is inside of an `<svg>` of [`WIDTH`] times `height`.
pub(super) struct Chart {
    pub title: &'static str,
    pub height: f64,
    body: String,
}

impl Chart {
    pub fn new(title: &'static str, height: f64) -> Self {
        Self { title, height, body: String::new() }
    }

    /// For a page that has [`style`] in its head.
    pub fn inline(&self) -> String {
        format!(
            "<svg class=\"chart\" role=\"img\" aria-label=\"{}\" viewBox=\"0 0 {WIDTH} {}\">\n{}</svg>\n",
            escape(self.title),
            self.height,
            self.body
        )
    }

    /// Only the inside.
    pub fn body(&self) -> &str {
        &self.body
    }

    /// Text; `class` and `anchor` are words of the style sheet and of SVG.
    pub fn text(&mut self, (x, y): (f64, f64), anchor: &str, class: &str, text: &str) {
        let text = escape(text);
        let _ = writeln!(
            self.body,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" class=\"{class}\">{text}</text>"
        );
    }

    /// A straight line.
    pub fn line(&mut self, (x0, y0): (f64, f64), (x1, y1): (f64, f64), class: &str, width: f64) {
        let _ = writeln!(
            self.body,
            "<path d=\"M{x0:.1} {y0:.1}L{x1:.1} {y1:.1}\" class=\"{class}\" stroke-width=\"{width}\"/>"
        );
    }

    /// A line of a series through the points, in the series' colour and dashes.
    pub fn curve(&mut self, series: usize, points: &[(f64, f64)], width: f64, opacity: f64) {
        let mut path = String::new();
        for (i, (x, y)) in points.iter().enumerate() {
            let _ = write!(path, "{}{x:.1} {y:.1}", if i == 0 { 'M' } else { 'L' });
        }
        let (colour, dashes) = (series % COLOURS.len(), DASHES[series % DASHES.len()]);
        let _ = writeln!(
            self.body,
            "<path d=\"{path}\" fill=\"none\" class=\"s{colour}\" stroke-width=\"{width}\" stroke-opacity=\"{opacity}\" \
             stroke-dasharray=\"{dashes}\" stroke-linejoin=\"round\"/>"
        );
    }

    /// A pale area of a series.
    pub fn band(&mut self, series: usize, outline: &[(f64, f64)]) {
        let points: String = outline.iter().map(|(x, y)| format!("{x:.1},{y:.1} ")).collect();
        let colour = series % COLOURS.len();
        let _ =
            writeln!(self.body, "<polygon points=\"{}\" class=\"f{colour}\" fill-opacity=\"0.2\"/>", points.trim_end());
    }

    /// A bar of a series.
    pub fn bar(&mut self, series: usize, (x0, y0): (f64, f64), (x1, y1): (f64, f64)) {
        let (colour, width, height) = (series % COLOURS.len(), (x1 - x0).max(1.0), y1 - y0);
        let _ = writeln!(
            self.body,
            "<rect x=\"{x0:.1}\" y=\"{y0:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" rx=\"3\" class=\"f{colour}\" \
             fill-opacity=\"0.16\"/>"
        );
    }

    /// A mark of a series, filled or a hollow one of the given size (1 is a filled one's), with a tooltip.
    pub fn mark(&mut self, series: usize, (x, y): (f64, f64), hollow: Option<f64>, tip: &str) {
        let size = hollow.unwrap_or(1.0);
        let shape = match series % 4 {
            0 => "M-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0z",
            1 => "M-3.1 -3.1h6.2v6.2h-6.2z",
            2 => "M0 -4.4l4 7.2h-8z",
            _ => "M0 -4.2l4.2 4.2l-4.2 4.2l-4.2 -4.2z",
        };
        let colour = series % COLOURS.len();
        let look = match hollow {
            None => format!("class=\"f{colour}\" fill-opacity=\"0.75\""),
            Some(_) => format!("class=\"s{colour}\" fill=\"none\" stroke-width=\"{:.2}\"", 1.6 / size),
        };
        let tip = if tip.is_empty() { String::new() } else { format!("<title>{}</title>", escape(tip)) };
        let _ = writeln!(
            self.body,
            "<path d=\"{shape}\" transform=\"translate({x:.1} {y:.1}) scale({size})\" {look}>{tip}</path>"
        );
    }

    /// Grid lines and numbers of a horizontal axis between two heights.
    pub fn x_axis(&mut self, scale: &Scale, top: f64, bottom: f64, title: &str) {
        for (value, text) in scale.ticks(8) {
            let x = scale.at(value);
            self.line((x, top), (x, bottom), "grid", 1.0);
            self.text((x, bottom + 17.0), "middle", "muted", &text);
        }
        self.line((scale.start, bottom), (scale.end, bottom), "axis", 1.0);
        self.text(((scale.start + scale.end) / 2.0, bottom + 35.0), "middle", "muted", title);
    }

    /// Grid lines and numbers of a vertical axis between two edges.
    pub fn y_axis(&mut self, scale: &Scale, left: f64, right: f64) {
        for (value, text) in scale.ticks(6) {
            let y = scale.at(value);
            self.line((left, y), (right, y), "grid", 1.0);
            self.text((left - 7.0, y + 4.0), "end", "muted", &text);
        }
    }
}

/// Charts below each other as one file.
pub(super) fn stack(charts: &[Chart]) -> String {
    let height: f64 = charts.iter().map(|chart| chart.height).sum();
    let titles: Vec<&str> = charts.iter().map(|chart| chart.title).collect();
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"chart\" role=\"img\" viewBox=\"0 0 {WIDTH} {height}\" \
         width=\"{WIDTH}\" height=\"{height}\">\n<title>{}</title>\n<style>\n{}</style>\n\
         <rect class=\"bg\" width=\"{WIDTH}\" height=\"{height}\"/>\n",
        escape(&titles.join(", ")),
        style().replace('>', "&gt;")
    );
    let mut y = 0.0;
    for chart in charts {
        let _ = write!(out, "<g transform=\"translate(0 {y})\">\n{}</g>\n", chart.body());
        y += chart.height;
    }
    out + "</svg>\n"
}

/// Values to places on the paper.
pub(super) struct Scale {
    from: f64,
    to: f64,
    /// Where `from` lies.
    pub start: f64,
    /// Where `to` lies.
    pub end: f64,
    log: bool,
}

impl Scale {
    pub fn linear((from, to): (f64, f64), (start, end): (f64, f64)) -> Self {
        let to = if to > from { to } else { from + 1.0 };
        Self { from, to, start, end, log: false }
    }

    /// Both ends above 0.
    pub fn log((from, to): (f64, f64), (start, end): (f64, f64)) -> Self {
        let to = if to > from { to } else { from * 10.0 };
        Self { from, to, start, end, log: true }
    }

    pub fn at(&self, value: f64) -> f64 {
        let part = if self.log {
            (value / self.from).ln() / (self.to / self.from).ln()
        } else {
            (value - self.from) / (self.to - self.from)
        };
        self.start + part * (self.end - self.start)
    }

    /// About `wanted` round values with their text.
    pub fn ticks(&self, wanted: usize) -> Vec<(f64, String)> {
        let inside = |value: &f64| {
            let slack = 1e-9 * (self.to - self.from);
            *value >= self.from - slack && *value <= self.to + slack
        };
        if self.log {
            let (low, high) = (self.from.log10().floor() as i32, self.to.log10().ceil() as i32);
            let every = 1 + (high - low) / wanted.max(1) as i32;
            let factors: &[f64] = if high - low <= 3 { &[1.0, 2.0, 5.0] } else { &[1.0] };
            let powers = (low..=high).filter(|power| (power - low) % every == 0);
            let values = powers.flat_map(|power| factors.iter().map(move |factor| factor * 10f64.powi(power)));
            return values.filter(inside).map(|value| (value, short(value))).collect();
        }
        let rough = (self.to - self.from) / wanted.max(1) as f64;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0].iter().map(|m| m * power).find(|step| *step >= rough).unwrap_or(10.0 * power);
        let decimals = (-step.log10().floor()).clamp(0.0, 9.0) as usize;
        let first = (self.from / step).ceil();
        let values = (0..=2 * wanted).map(|i| (first + i as f64) * step).filter(inside);
        values.map(|value| (value, format!("{:.decimals$}", value + 0.0))).collect()
    }
}

/// A value that is one digit and a power of ten.
fn short(value: f64) -> String {
    match value {
        v if !(1e-2..1e5).contains(&v) => format!("{v:.0e}"),
        v if v < 0.1 => format!("{v:.2}"),
        v if v < 1.0 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_leave_its_element() {
        assert_eq!(escape("<a b=\"c\">&'\u{1b}["), "&lt;a b=&quot;c&quot;&gt;&amp;&#39; [");
    }

    #[test]
    fn ticks_are_round() {
        let texts = |scale: Scale| scale.ticks(5).into_iter().map(|(_, text)| text).collect::<Vec<_>>();
        assert_eq!(texts(Scale::linear((0.0, 1.0), (0.0, 100.0))), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(texts(Scale::linear((683.0, 712.0), (0.0, 100.0))), ["690", "700", "710"]);
        assert_eq!(texts(Scale::log((1e-7, 1.0), (0.0, 100.0))), ["1e-7", "1e-5", "1e-3", "0.1"]);
        assert_eq!(texts(Scale::log((3.0, 60.0), (0.0, 100.0))), ["5", "10", "20", "50"]);
        assert_eq!(Scale::log((1.0, 100.0), (0.0, 10.0)).at(10.0), 5.0);
    }
}
