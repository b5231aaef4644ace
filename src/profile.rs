//! What a step is made of: every launch of ours with its time on the device, summed by kernel into a table.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use burn::tensor::{ProfileDuration, TimingMethod};
use cubecl::client::Client;

use crate::kernel::Work;

static ON: AtomicBool = AtomicBool::new(false);
static LAUNCHES: Mutex<Vec<Launch>> = Mutex::new(Vec::new());

struct Launch {
    kernel: &'static str,
    work: Work,
    bytes: usize,
    time: Option<ProfileDuration>,
}

/// Whether launches are recorded.
pub fn is_on() -> bool {
    ON.load(Ordering::Relaxed)
}

/// Queues `launch` between two timestamps. `bytes` are those of its tensors, each counted once.
pub fn record(client: &Client, kernel: &'static str, work: Work, bytes: usize, launch: impl FnOnce()) {
    let window = client.profile_start().ok();
    launch();
    let time = window.and_then(|window| client.profile_end(window).ok());
    LAUNCHES.lock().unwrap_or_else(PoisonError::into_inner).push(Launch { kernel, work, bytes, time });
}

/// The launches of one kernel, or of one shape of a product.
#[derive(Clone, Debug)]
pub struct Row {
    /// The kernel's name, and a product's rows x columns x depth.
    pub name: String,
    /// Launches.
    pub count: usize,
    /// Milliseconds on the device in all.
    pub ms: f64,
    /// Floating-point operations in all.
    pub flops: f64,
    /// Bytes of the tensors in all.
    pub bytes: f64,
}

/// One step, taken apart.
#[derive(Clone, Debug)]
pub struct Profile {
    /// Longest first.
    pub rows: Vec<Row>,
    /// Milliseconds of an undisturbed step, by the host's clock.
    pub step_ms: f64,
    /// Whether the device's own clock timed the launches.
    pub device_clock: bool,
    /// The device's measured peaks: FLOP/s of products and bytes/s, where they are known.
    pub peaks: Option<(f64, f64)>,
}

/// Runs `step` with every launch timed. `step_ms` is what a step takes undisturbed: timestamps between launches slow it down.
pub fn of<T>(step_ms: f64, peaks: Option<(f64, f64)>, step: impl FnOnce() -> T) -> (T, Profile) {
    ON.store(true, Ordering::Relaxed);
    let result = step();
    ON.store(false, Ordering::Relaxed);
    let launches = std::mem::take(&mut *LAUNCHES.lock().unwrap_or_else(PoisonError::into_inner));
    let mut device_clock = true;
    let mut rows = BTreeMap::<String, Row>::new();
    for Launch { kernel, work, bytes, time } in launches {
        let name = match work.sizes {
            Some([m, n, k]) => format!("{kernel} {m}x{n}x{k} {}", work.epilogue).trim_end().to_string(),
            None => kernel.to_string(),
        };
        let ms = time.map_or(0.0, |time| {
            device_clock &= time.timing_method() == TimingMethod::Device;
            pollster::block_on(time.resolve()).map_or(0.0, |ticks| ticks.duration().as_secs_f64() * 1e3)
        });
        let row = rows.entry(name.clone()).or_insert(Row { name, count: 0, ms: 0.0, flops: 0.0, bytes: 0.0 });
        row.count += 1;
        row.ms += ms;
        row.flops += work.flops;
        row.bytes += bytes as f64;
    }
    let mut rows: Vec<Row> = rows.into_values().collect();
    rows.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    (result, Profile { rows, step_ms, device_clock, peaks })
}

impl fmt::Display for Profile {
    /// A table in Markdown, which a terminal shows as well as a README.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let share = |ms: f64| 100.0 * ms / self.step_ms;
        let (matrix, bandwidth) = self.peaks.unzip();
        let of_peak = |rate: f64, peak: Option<f64>| {
            peak.map_or(String::new(), |peak| format!(", {:.0} % of the peak", 100.0 * rate / peak))
        };
        writeln!(f, "| kernel | launches | ms | % of step | rate |\n|---|---:|---:|---:|---|")?;
        for row in &self.rows {
            let seconds = row.ms / 1e3;
            let rate = match row.flops > 0.0 {
                _ if seconds == 0.0 => "not timed".into(),
                true => format!("{:.1} TFLOP/s{}", row.flops / seconds / 1e12, of_peak(row.flops / seconds, matrix)),
                false => format!("{:.0} GB/s{}", row.bytes / seconds / 1e9, of_peak(row.bytes / seconds, bandwidth)),
            };
            writeln!(f, "| {} | {} | {:.3} | {:.1} | {rate} |", row.name, row.count, row.ms, share(row.ms))?;
        }
        let launches: usize = self.rows.iter().map(|row| row.count).sum();
        let ms: f64 = self.rows.iter().map(|row| row.ms).sum();
        writeln!(f, "| all of ours | {launches} | {ms:.3} | {:.1} | |", share(ms))?;
        let rest = self.step_ms - ms;
        writeln!(f, "| the rest of {:.3} ms: Burn's own, gaps | | {rest:.3} | {:.1} | |", self.step_ms, share(rest))?;
        let clock = if self.device_clock { "the device's timestamps" } else { "the host's clock" };
        write!(f, "Launches timed one by one with {clock}; bytes are those of the bound tensors, each counted once.")
    }
}
