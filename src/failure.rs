//! A device that fails in the middle of a run: what it did, as one error that a user can act on.
//!
//! wgpu reports in three ways. A call's own result: CubeCL hands it on at the next read or wait. A device that is lost: CubeCL's
//! callback, which makes every later read and wait an error. And everything else (a refused allocation above all) through the
//! device's handler for uncaptured errors. CubeCL's handler panics on its own thread, where nobody sees it, and a read that
//! follows may return bytes that nothing wrote. So the handler is ours: it keeps the first error, and every read and wait asks.

use std::fmt::Debug;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use burn::backend::DispatchDevice;
use burn::tensor::Device;
use burn_cubecl::CubeDevice;
use thiserror::Error;

use crate::checkpoint;

/// What a device did.
#[derive(Clone, Debug, Error)]
pub enum DeviceError {
    /// It has no memory left.
    #[error("the device's memory is full ({0})")]
    OutOfMemory(String),
    /// It is gone: the driver was reset, stopped work that took too long, or the device was unplugged.
    #[error("the device was lost ({0})")]
    Lost(String),
    /// Anything else.
    #[error("the device failed ({0})")]
    Other(String),
}

impl DeviceError {
    /// What the user can do.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::OutOfMemory(_) => {
                "`gpt-wgpu train --dry-run` shows what the run needs; a smaller batch_size needs less, and other programs \
                 on the device may hold the rest"
            }
            Self::Lost(_) => {
                "the system's log may say why; `gpt-wgpu doctor` tells whether the device can be trusted, and a smaller \
                 batch_size makes shorter work for it"
            }
            Self::Other(_) => "`gpt-wgpu doctor` tells whether the device can be trusted",
        }
    }

    fn of_wgpu(error: &wgpu::Error) -> Self {
        let text = first_lines(&error.to_string());
        match error {
            wgpu::Error::OutOfMemory { .. } => Self::OutOfMemory("an allocation was refused".into()),
            _ if text.contains("lost") => Self::Lost(text),
            _ => Self::Other(text),
        }
    }

    /// An error of Burn or CubeCL, whose variants name the fault and whose text goes on with a backtrace.
    fn of_burn(error: &impl Debug) -> Self {
        let text = format!("{error:?}");
        let short = first_lines(&text);
        match () {
            () if text.contains("Poison") => Self::Lost(short),
            () if text.contains("BufferTooBig") => {
                Self::OutOfMemory("a buffer is larger than the device allows".into())
            }
            () => Self::Other(short),
        }
    }
}

/// An error's text up to its backtrace, in one line.
fn first_lines(text: &str) -> String {
    let text = text.split("Backtrace").next().unwrap_or_default();
    let text = text.split("backtrace:").next().unwrap_or_default();
    text.split_whitespace().collect::<Vec<_>>().join(" ").trim_end_matches([',', ' ']).to_string()
}

/// A device whose errors are kept.
struct Watched {
    cube: CubeDevice,
    device: wgpu::Device,
    first: Arc<OnceLock<DeviceError>>,
}

static WATCHED: RwLock<Vec<Watched>> = RwLock::new(Vec::new());

/// Keeps the first error of a device that Burn has been given.
pub fn watch(cube: CubeDevice, device: wgpu::Device) {
    let first = Arc::new(OnceLock::new());
    let kept = first.clone();
    device.on_uncaptured_error(Arc::new(move |error| {
        tracing::debug!("wgpu: {error}");
        let _ = kept.set(DeviceError::of_wgpu(&error));
    }));
    WATCHED.write().unwrap_or_else(PoisonError::into_inner).push(Watched { cube, device, first });
}

fn watched<T>(device: &Device, look: impl FnOnce(&Watched) -> T) -> Option<T> {
    let plain = device.clone().without_autodiff();
    let DispatchDevice::Cube(cube) = plain.as_dispatch() else {
        return None;
    };
    let all = WATCHED.read().unwrap_or_else(PoisonError::into_inner);
    all.iter().find(|watched| watched.cube == *cube).map(look)
}

/// wgpu's device below Burn's, where it is one of ours: for the watchdog, and for tests that break it.
pub fn wgpu_device(device: &Device) -> Option<wgpu::Device> {
    watched(device, |watched| watched.device.clone())
}

/// Every device that was opened. For tests that break one.
pub fn devices() -> Vec<wgpu::Device> {
    WATCHED.read().unwrap_or_else(PoisonError::into_inner).iter().map(|watched| watched.device.clone()).collect()
}

/// The first error that wgpu reported of this device outside of any result.
pub fn first(device: &Device) -> Option<DeviceError> {
    watched(device, |watched| watched.first.get().cloned()).flatten()
}

/// `result` of a read or a wait, unless the device failed before: then nothing that it says counts.
///
/// # Errors
/// The first thing that went wrong.
pub fn checked<T, E: Debug>(device: &Device, result: Result<T, E>) -> Result<T, DeviceError> {
    let result = result.map_err(|error| DeviceError::of_burn(&error));
    match (first(device), result) {
        // What comes after a loss complains of this and that.
        (Some(DeviceError::Other(_)), Err(lost @ DeviceError::Lost(_))) => Err(lost),
        (Some(error), _) => Err(error),
        (None, result) => result,
    }
}

/// The iteration that is worked on, and how many were begun: errors name the one, the watchdog looks at the other.
static ITERATION: AtomicU64 = AtomicU64::new(0);
static BEGUN: AtomicU64 = AtomicU64::new(0);

/// Notes that the run begins iteration `iter`.
pub fn begin(iter: u64) {
    ITERATION.store(iter, Ordering::Relaxed);
    BEGUN.fetch_add(1, Ordering::Relaxed);
}

/// The iteration that was begun last.
pub fn iteration() -> u64 {
    ITERATION.load(Ordering::Relaxed)
}

/// How many iterations were begun.
pub fn begun() -> u64 {
    BEGUN.load(Ordering::Relaxed)
}

/// Which checkpoint is left, in words.
pub fn kept(out_dir: &Path) -> String {
    let last = checkpoint::path(out_dir, "last");
    if last.exists() {
        format!("the last good checkpoint is {}", last.display())
    } else {
        "no checkpoint was saved before".to_string()
    }
}

/// The whole story: what happened, when, what is left and what to do.
pub fn story(what: &str, out_dir: &Path, advice: &str) -> String {
    let go_on = if checkpoint::path(out_dir, "last").exists() {
        format!("; go on from it with: gpt-wgpu train --resume --out-dir {}", out_dir.display())
    } else {
        String::new()
    };
    format!("{what}, at iteration {}; {}{go_on}. {advice}", iteration(), kept(out_dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_end_before_their_backtrace() {
        assert_eq!(first_lines("An error\nCaused by:\n  this\nBacktrace:\n 0: x"), "An error Caused by: this");
        assert_eq!(first_lines("Io(NotFound { reason: \"r\", backtrace: BackTrace"), "Io(NotFound { reason: \"r\"");
    }

    #[test]
    fn errors_are_told_apart() {
        let of = |text: &str| DeviceError::of_burn(&text);
        assert!(matches!(of("DevicePoisoned(reason)"), DeviceError::Lost(_)));
        assert!(matches!(of("BufferTooBig { size: 1 }"), DeviceError::OutOfMemory(_)));
        assert!(matches!(of("NotFound"), DeviceError::Other(_)));
    }
}
