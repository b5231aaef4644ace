//! What a start takes: the time from the program's start to the end of the first trained step, taken apart.
//!
//! Told with `GPT_WGPU_LOG=gpt_wgpu=debug` alone, since it costs time itself: every kernel is compiled while the device has
//! nothing else to do, and naga reads its text once more.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cubecl::client::Client;
use cubecl::prelude::{KernelId, KernelMetadata};

use crate::kernel::Kernel;

static ON: AtomicBool = AtomicBool::new(false);
static START: Mutex<Option<Start>> = Mutex::new(None);

/// What is known of a start that has not ended.
struct Start {
    began: Instant,
    /// The end of the last part.
    last: Instant,
    parts: Vec<(&'static str, Duration)>,
    /// The kernels that were compiled.
    kernels: HashSet<KernelId>,
    compiling: Duration,
    /// What naga took to read and check the texts.
    naga: Duration,
}

/// Looks at the start of a program that was begun at `began`, where the log's filter lets the outcome through.
pub fn begin(began: Instant) {
    if tracing::enabled!(tracing::Level::DEBUG) {
        let (parts, kernels) = (Vec::new(), HashSet::new());
        let start = Start { began, last: began, parts, kernels, compiling: Duration::ZERO, naga: Duration::ZERO };
        *START.lock().unwrap_or_else(PoisonError::into_inner) = Some(start);
        ON.store(true, Ordering::Relaxed);
    }
}

/// Whether a start is looked at.
pub fn is_on() -> bool {
    ON.load(Ordering::Relaxed)
}

/// What `change` makes of the start, where one is looked at.
fn with<T>(change: impl FnOnce(&mut Start) -> T) -> Option<T> {
    if !is_on() {
        return None;
    }
    START.lock().unwrap_or_else(PoisonError::into_inner).as_mut().map(change)
}

/// Says that what was done since the part before was `name`.
pub fn part(name: &'static str) {
    with(|start| {
        let now = Instant::now();
        start.parts.push((name, now - start.last));
        start.last = now;
    });
}

/// Whether this is the first launch of `kernel` in a start that is looked at: CubeCL compiles it now.
pub fn is_first(kernel: &Kernel) -> bool {
    with(|start| start.kernels.insert(kernel.id())).unwrap_or(false)
}

/// Queues the first launch of `kernel` and waits until it is compiled, not until it has run.
pub fn compile(client: &Client, kernel: &Kernel, launch: impl FnOnce()) {
    let reading = Instant::now();
    // A text that naga refuses is reported by the launch.
    let _ = kernel.module();
    let naga = reading.elapsed();
    // What fails in a flush fails at the next read or wait too.
    let _ = client.flush();
    let began = Instant::now();
    launch();
    let _ = client.flush();
    let took = began.elapsed();
    with(|start| {
        start.compiling += took;
        start.naga += naga;
    });
    tracing::debug!("compiled {} in {:.0} ms", kernel.name(), took.as_secs_f64() * 1e3);
}

/// Ends the look at the start and tells what it saw.
pub fn end() {
    ON.store(false, Ordering::Relaxed);
    let start = START.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(Start { began, parts, kernels, compiling, naga, .. }) = start else {
        return;
    };
    let seconds = |time: Duration| format!("{:.2} s", time.as_secs_f64());
    let parts: Vec<String> = parts.into_iter().map(|(name, time)| format!("{name} {}", seconds(time))).collect();
    tracing::debug!("start to first step {}: {}", seconds(began.elapsed()), parts.join(", "));
    if !kernels.is_empty() {
        tracing::debug!(
            "of it {} for compiling {} kernels of ours, whose texts naga reads and checks in {} (and did once more here)",
            seconds(compiling),
            kernels.len(),
            seconds(naga)
        );
    }
}
