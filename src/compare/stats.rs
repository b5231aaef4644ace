//! Noise: what a set of samples covers, and when two sets differ.

use crate::report::median;

/// With fewer samples no verdict is given: their range says too little about the noise.
pub const MIN_SAMPLES: usize = 5;

/// What samples cover, without the tails that one hiccup of the machine makes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// 5th percentile.
    pub low: f64,
    /// 50th percentile.
    pub median: f64,
    /// 95th percentile.
    pub high: f64,
    /// Number of samples.
    pub count: usize,
}

impl Spread {
    /// Of samples; `None` of none.
    pub fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        Some(Self {
            low: percentile(&sorted, 0.05)?,
            median: median(samples),
            high: percentile(&sorted, 0.95)?,
            count: samples.len(),
        })
    }
}

/// The value below which `fraction` of the sorted samples lie, linear between neighbours.
fn percentile(sorted: &[f64], fraction: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let place = fraction * last as f64;
    let below = place.floor();
    let (low, high) = (sorted[below as usize], sorted[(below as usize + 1).min(last)]);
    Some(low + (place - below) * (high - low))
}

/// How a measured time compares with the first one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// It is the first one.
    First,
    /// One of the two has fewer than [`MIN_SAMPLES`] samples.
    TooFewSamples,
    /// The ranges overlap, or the medians are equal to 0.1 %.
    NoDifference,
    /// The ranges are apart; so many times the first one's speed, by the medians.
    Faster(f64),
    /// The ranges are apart; so many times the first one's time, by the medians.
    Slower(f64),
}

/// Compares times by their 5th to 95th percentiles.
pub fn judge(first: &Spread, other: &Spread) -> Verdict {
    let ratio = first.median / other.median;
    if first.count.min(other.count) < MIN_SAMPLES {
        Verdict::TooFewSamples
    } else if other.low <= first.high && first.low <= other.high || (ratio - 1.0).abs() < 1e-3 {
        Verdict::NoDifference
    } else if ratio > 1.0 {
        Verdict::Faster(ratio)
    } else {
        Verdict::Slower(ratio.recip())
    }
}

impl Verdict {
    /// Without its ratio.
    pub(super) fn brief(self) -> &'static str {
        match self {
            Self::First => "baseline",
            Self::TooFewSamples => "too few",
            Self::NoDifference => "no difference",
            Self::Faster(_) => "faster",
            Self::Slower(_) => "slower",
        }
    }

    /// In a table's cell.
    pub fn short(self) -> String {
        match self {
            Self::First => "baseline".into(),
            Self::TooFewSamples => "too few samples".into(),
            Self::NoDifference => "no difference".into(),
            Self::Faster(ratio) => format!("{} faster", times(ratio)),
            Self::Slower(ratio) => format!("{} slower", times(ratio)),
        }
    }
}

/// `1.42x`, with a third decimal where two would say 1.00 or little more than 0.
pub(super) fn times(ratio: f64) -> String {
    if ratio < 0.1 || (ratio - 1.0).abs() < 0.01 && ratio != 1.0 {
        format!("{ratio:.3}x")
    } else if ratio < 10.0 {
        format!("{ratio:.2}x")
    } else {
        format!("{ratio:.1}x")
    }
}

/// Milliseconds with about four digits.
pub(super) fn ms(value: f64) -> String {
    match value {
        v if v < 10.0 => format!("{v:.3}"),
        v if v < 100.0 => format!("{v:.2}"),
        v if v < 1000.0 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

/// A whole number with commas.
pub(super) fn whole(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) && !text.ends_with('-') {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes in the binary unit that leaves one to four digits.
pub(super) fn bytes(value: u64) -> String {
    let value = value as f64;
    match value {
        v if v < 1024.0 * 1024.0 => format!("{:.0} KiB", v / 1024.0),
        v if v < 1024f64.powi(3) => format!("{:.0} MiB", v / 1024f64.powi(2)),
        v => format!("{:.2} GiB", v / 1024f64.powi(3)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_leave_out_a_hiccup() {
        let mut samples = vec![10.0; 40];
        samples.push(500.0);
        let spread = Spread::of(&samples).unwrap();
        assert_eq!((spread.low, spread.median, spread.high), (10.0, 10.0, 10.0));
        assert!(Spread::of(&[]).is_none());
    }

    #[test]
    fn percentiles_lie_between_neighbours() {
        let spread = Spread::of(&(0..=10).map(f64::from).collect::<Vec<_>>()).unwrap();
        assert_eq!((spread.low, spread.median, spread.high), (0.5, 5.0, 9.5));
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(whole(1_234_567.4), "1,234,567");
        assert_eq!((whole(999.0), whole(-1000.0)), ("999".into(), "-1,000".into()));
        assert_eq!((times(1.0), times(1.004), times(1.42)), ("1.00x".into(), "1.004x".into(), "1.42x".into()));
        assert_eq!(bytes(3 << 30), "3.00 GiB");
    }
}
