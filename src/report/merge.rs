//! Several reports of one thing as one: `compare --devices` measures in rounds.

use super::{BenchReport, Energy, Mfu, median};

impl BenchReport {
    /// Reports of the same program, device and configuration, in the order of measurement, as one: all samples, the peaks that
    /// were seen, the mean energy; what describes the measurement is the first one's. `None` of none.
    pub fn merge(rounds: Vec<Self>) -> Option<Self> {
        let first = rounds.first()?.clone();
        let samples_ms: Vec<f64> = rounds.iter().flat_map(|round| round.samples_ms.iter().copied()).collect();
        let losses: Vec<f64> = rounds.iter().filter_map(|round| round.losses.as_ref()).flatten().copied().collect();
        let median_ms = median(&samples_ms);
        let tokens_per_s = first.config.tokens_per_iter() as f64 / median_ms * 1e3;
        // The same work an iteration: the fraction goes with the speed.
        let mfu = |pick: fn(&Self) -> &Option<Mfu>| {
            let measured = rounds.iter().find_map(|round| Some((pick(round).clone()?, round.tokens_per_s)))?;
            let (mfu, speed) = measured;
            Some(Mfu { fraction: mfu.fraction * tokens_per_s / speed, ..mfu })
        };
        let first_steps: Vec<f64> = rounds.iter().filter_map(|round| round.time_to_first_step_s).collect();
        Some(Self {
            min_ms: samples_ms.iter().copied().fold(f64::NAN, f64::min),
            max_ms: samples_ms.iter().copied().fold(f64::NAN, f64::max),
            median_ms,
            tokens_per_s,
            mfu_measured: mfu(|round| &round.mfu_measured),
            mfu_published: mfu(|round| &round.mfu_published),
            time_to_first_step_s: Some(median(&first_steps)).filter(|seconds| seconds.is_finite()),
            peak_memory_bytes: rounds.iter().filter_map(|round| round.peak_memory_bytes).max(),
            energy: energy(&rounds, first.config.tokens_per_iter()),
            losses: Some(losses).filter(|losses| losses.len() == samples_ms.len()),
            samples_ms,
            ..first
        })
    }
}

/// The mean over the iterations of all rounds; `None` unless every round has it.
fn energy(rounds: &[BenchReport], tokens: usize) -> Option<Energy> {
    let (mut joules, mut seconds, mut iters) = (0.0, 0.0, 0.0);
    for round in rounds {
        let energy = round.energy.as_ref()?;
        let count = round.samples_ms.len() as f64;
        joules += energy.joules_per_iter * count;
        seconds += energy.joules_per_iter * count / energy.watts;
        iters += count;
    }
    let source = rounds.first()?.energy.as_ref()?.source.clone();
    let joules_per_iter = joules / iters;
    Some(Energy { source, watts: joules / seconds, joules_per_iter, tokens_per_joule: tokens as f64 / joules_per_iter })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(samples: &[f64], joules: Option<f64>) -> BenchReport {
        let text = include_str!("../../tests/fixtures/minimal.json");
        let like = BenchReport::parse(text, "minimal.json").unwrap();
        let mut report = BenchReport::new(
            like.machine,
            like.device,
            like.dtype,
            like.config,
            like.warmup,
            samples.to_vec(),
            like.timer,
        );
        report.energy = joules.map(|joules| Energy {
            source: "nvml".into(),
            watts: 50.0,
            joules_per_iter: joules,
            tokens_per_joule: report.config.tokens_per_iter() as f64 / joules,
        });
        report.losses = Some(vec![1.0; samples.len()]);
        report
    }

    #[test]
    fn rounds_become_one_report_that_does_not_contradict_itself() {
        let mut first = round(&[4.0, 6.0], Some(2.0));
        first.mfu_measured = Some(Mfu { fraction: 0.3, peak_flops: 1e12, how: "measured".into() });
        first.peak_memory_bytes = Some(5);
        let mut second = round(&[10.0], Some(5.0));
        second.peak_memory_bytes = Some(7);
        let merged = BenchReport::merge(vec![first, second]).unwrap();
        assert_eq!((merged.median_ms, merged.min_ms, merged.max_ms), (6.0, 4.0, 10.0));
        assert_eq!((merged.samples_ms.len(), merged.peak_memory_bytes), (3, Some(7)));
        // 5 ms were 0.3 of the peak, so 6 ms are 0.25 of it.
        assert!((merged.mfu_measured.as_ref().unwrap().fraction - 0.25).abs() < 1e-12);
        let energy = merged.energy.as_ref().unwrap();
        assert!((energy.joules_per_iter - 3.0).abs() < 1e-12 && (energy.watts - 50.0).abs() < 1e-9);
        BenchReport::parse(&merged.to_json().unwrap(), "merged").unwrap();
    }

    #[test]
    fn energy_of_some_rounds_is_none() {
        let merged = BenchReport::merge(vec![round(&[4.0], Some(2.0)), round(&[4.0], None)]).unwrap();
        assert_eq!(merged.energy, None);
        assert_eq!(BenchReport::merge(Vec::new()), None);
    }
}
