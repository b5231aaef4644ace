//! A minute of checks that tell whether a device can be trusted to train: its limits, every kernel that it would run against
//! the f64 twins, causality, its clock, its speed, and twenty steps beside the CPU.

mod operations;
mod training;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use burn::tensor::{Tensor, TensorData, TimingMethod};
use serde::Serialize;

use crate::bench;
use crate::checkpoint::read;
use crate::device::{Chosen, wait};
use crate::kernel::{self, Capabilities, Kernels, Variant};
use crate::ops;
use crate::ops::linear::linear;
use crate::twins::distance;

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// As it should be.
    Good,
    /// Training is right, but something that a user may want is not there.
    Note,
    /// Not as it should be.
    Bad,
}

/// One check.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What was checked.
    pub name: String,
    /// How it went.
    pub outcome: Outcome,
    /// What was seen.
    pub detail: String,
    /// What to do about it, unless it is good.
    pub remedy: Option<&'static str>,
}

/// What a check saw.
struct Seen {
    outcome: Outcome,
    detail: String,
}

impl Seen {
    fn good(detail: String) -> Self {
        Self { outcome: Outcome::Good, detail }
    }
}

/// One kind of kernels on the device, and how far their results may be from the twins'.
#[derive(Clone, Copy)]
struct Bed<'a> {
    chosen: &'a Chosen,
    tolerance: f64,
    /// Whether to spoil what the device computed: the seam for the test that sees a check fail.
    spoil: bool,
}

impl Bed<'_> {
    /// [`distance`] of what the device computed from what it should have.
    fn distance<const D: usize>(&self, got: Tensor<D>, want: &[f64]) -> Result<f64> {
        let mut got: Vec<f64> = read(got)?.into_iter().map(f64::from).collect();
        if self.spoil {
            got.iter_mut().for_each(|value| *value = 1.5 * *value + 0.5);
        }
        Ok(distance(&got, want))
    }

    /// The verdict over a check's worst distance.
    fn within(&self, worst: f64) -> Seen {
        let good = worst <= self.tolerance; // false for NaN
        let detail = format!("worst error {worst:.1e}, allowed {:.0e}", self.tolerance);
        Seen { outcome: if good { Outcome::Good } else { Outcome::Bad }, detail }
    }
}

/// Runs every check of `chosen` in order and hands each to `tell` as soon as it is done. `spoil` names a check, or all, whose
/// results are made wrong before they are compared, so that a test can see it fail.
///
/// Changes the process's choice of kernels, and leaves it at auto.
pub fn examine(chosen: &Chosen, spoil: Option<&str>, mut tell: impl FnMut(&Check)) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut check = |name: String, remedy: &'static str, tolerance: f64, body: &dyn Fn(&Bed) -> Result<Seen>| {
        let bed = Bed { chosen, tolerance, spoil: spoil.is_some_and(|it| it == "all" || it == name) };
        // A lost device panics in a library; the other checks may still tell why.
        let seen = catch_unwind(AssertUnwindSafe(|| body(&bed)))
            .unwrap_or_else(|_| Err(anyhow!("the device or a library failed")))
            .unwrap_or_else(|error| Seen { outcome: Outcome::Bad, detail: format!("{error:#}") });
        let remedy = (seen.outcome != Outcome::Good).then_some(remedy);
        let done = Check { name, outcome: seen.outcome, detail: seen.detail, remedy };
        tell(&done);
        checks.push(done);
    };

    check(
        "adapter".into(),
        "take another adapter: `gpt-wgpu info` lists them; --device cpu always works",
        0.0,
        &adapter,
    );
    for (kernels, name, tolerance, remedy) in beds(chosen) {
        kernel::choose(kernels);
        for (operation, body) in operations::ALL {
            // f32 attention sums over the head and over all keys: an order of magnitude more than the others.
            let tolerance = if operation == "attention" { tolerance.max(2e-4) } else { tolerance };
            check(format!("{operation}, {name}"), remedy, tolerance, &body);
        }
        check(format!("causality, {name}"), remedy, 0.0, &operations::causality);
        if kernels != Kernels::Composed {
            let steps = |bed: &Bed| training::twenty_steps(bed, false);
            check(format!("20 steps, {name}"), remedy, (10.0 * tolerance).min(1e-2), &steps);
        }
    }
    kernel::choose(Kernels::Auto);
    if chosen.adapter.is_some() && chosen.capabilities.f16 {
        let remedy = "train with --dtype f32 here, and report it with this output";
        check("20 steps, f16".into(), remedy, 1e-2, &|bed| training::twenty_steps(bed, true));
    }
    let clock = "nothing needs it to train; operations are timed with the host's clock, which adds the host's time";
    check("timestamps".into(), clock, 0.0, &timestamps);
    let slow = "close other programs that use the device, and look whether it is hot or saves power";
    check("bandwidth".into(), slow, 0.0, &|_| speed(bench::bandwidth(chosen)?, 1e9, "GB/s"));
    check("matrix peak".into(), slow, 0.0, &|_| speed(bench::matrix(chosen, false)?, 1e12, "TFLOP/s"));
    checks
}

/// The kinds of kernels that the device can run: the choice, its name, its tolerance, and what to do where it is wrong.
fn beds(chosen: &Chosen) -> Vec<(Kernels, &'static str, f64, &'static str)> {
    const REPORT: &str = "update the driver, train with --device cpu until then, and report it with this output";
    if chosen.adapter.is_none() {
        return vec![(
            Kernels::Auto,
            "cpu",
            2e-5,
            "build again with the newest compiler, and report it with this output",
        )];
    }
    let scalar = "train with --kernels composed or --device cpu, update the driver, and report it with this output";
    let coop = "train with --dtype f32 --kernels scalar here, and report it with this output";
    let mut beds = vec![(Kernels::Composed, "composed", 2e-5, REPORT), (Kernels::Scalar, "scalar", 2e-5, scalar)];
    let supported = kernel::supported(&chosen.capabilities, false);
    if let Some(Variant::Coop { f16, .. }) = supported.iter().find(|variant| matches!(variant, Variant::Coop { .. })) {
        // f16 inputs carry 11 bits, and the sums have up to a few hundred terms.
        beds.push((Kernels::Coop, "coop", if *f16 { 3e-2 } else { 2e-5 }, coop));
    }
    beds
}

/// What the kernels need of an adapter.
fn adapter(bed: &Bed) -> Result<Seen> {
    let Some(adapter) = &bed.chosen.adapter else {
        return Ok(Seen::good(bed.chosen.name.clone()));
    };
    // Those without cooperative matrices: what every adapter must be able to run.
    let (mut memory, mut threads) = (0, 0);
    for kernel in ops::kernels(&Capabilities::default()) {
        memory = memory.max(kernel.workgroup_memory().map_err(|error| anyhow!("a kernel is no WGSL: {error}"))?);
        let (x, y, z) = kernel.workgroup();
        threads = threads.max(x * y * z);
    }
    let limits = &adapter.limits;
    let told = format!(
        "{}, {}, driver {}; workgroup memory {} KiB, workgroups of {}, largest binding {} MiB",
        adapter.name,
        adapter.kind,
        adapter.driver,
        limits.workgroup_memory >> 10,
        limits.workgroup_invocations,
        limits.max_binding >> 20
    );
    let lacking = [
        ("workgroup memory", u64::from(limits.workgroup_memory), u64::from(memory)),
        ("workgroup size", u64::from(limits.workgroup_invocations), u64::from(threads)),
        ("largest binding", limits.max_binding, 128 << 20),
    ];
    for (what, has, needs) in lacking {
        if bed.spoil || has < needs {
            bail!("{told}: the kernels need a {what} of {needs}, and it has {has}");
        }
    }
    Ok(Seen::good(told))
}

/// Whether the device's clock agrees with the host's and tells more work from less.
fn timestamps(bed: &Bed) -> Result<Seen> {
    const EDGE: usize = 256;
    let device = &bed.chosen.device;
    if bed.chosen.adapter.is_none() {
        return Ok(Seen::good("the CPU has no clock of its own".into()));
    }
    let ones = |_| Tensor::<2>::from_data(TensorData::new(vec![0.5f32; EDGE * EDGE], [EDGE, EDGE]), device);
    let [x, w] = [0, 1].map(ones);
    drop(linear(x.clone(), w.clone(), None)); // compiles
    wait(device)?;
    // Seconds by the device's clock and by the host's, fastest of three.
    let time = |calls: usize| -> Result<(f64, f64, bool)> {
        let (mut by_device, mut by_host, mut own) = (f64::INFINITY, f64::INFINITY, true);
        for _ in 0..3 {
            let started = Instant::now();
            let work = || (0..calls).for_each(|_| drop(linear(x.clone(), w.clone(), None)));
            let ((), profile) = device.profile(work).map_err(|error| anyhow!("{error:?}"))?;
            own &= profile.timing_method() == TimingMethod::Device;
            wait(device)?;
            by_host = by_host.min(started.elapsed().as_secs_f64());
            let ticks = pollster::block_on(profile.resolve()).context("the device answered no timestamps")?;
            by_device = by_device.min(ticks.duration().as_secs_f64());
        }
        Ok((by_device, by_host, own))
    };
    let ((one, _, own), (eight, host, _)) = (time(1)?, time(8)?);
    let note = |detail: &str| Ok(Seen { outcome: Outcome::Note, detail: detail.into() });
    if !own {
        return note("this adapter has no timestamp queries");
    }
    if bed.spoil || one == 0.0 || eight == 0.0 {
        return note("the timestamps are zero");
    }
    let detail = format!("8 products take {:.3} ms, one {:.3} ms", eight * 1e3, one * 1e3);
    if eight <= one || eight > 1.1 * host + 1e-3 {
        return note(&format!("{detail}, and {:.3} ms by the host's clock: they contradict each other", host * 1e3));
    }
    Ok(Seen::good(detail))
}

fn speed(peak: bench::Peak, unit: f64, name: &str) -> Result<Seen> {
    let detail = format!("{:.4} {name} ({})", peak.per_second / unit, peak.how);
    let good = peak.per_second.is_finite() && peak.per_second > 0.0;
    Ok(Seen { outcome: if good { Outcome::Good } else { Outcome::Bad }, detail })
}
