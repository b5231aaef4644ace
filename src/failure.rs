//! A device that fails in the middle of a run: what it did, as one error that a user can act on.
//!
//! wgpu reports in three ways: in a call's own result, which CubeCL hands on at the next read or wait; to a callback when the
//! device is lost; and everything else (a refused allocation above all) to the device's handler for uncaptured errors. CubeCL's
//! handler panics on its own thread, where nobody sees it, and a read that follows may return bytes that nothing wrote. So
//! callback and handler are ours: they keep what they are told, and every read and wait asks.

use std::fmt::Debug;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, RwLock};
use std::time::Duration;

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
                "The system's log may say why; `gpt-wgpu doctor` tells whether the device can be trusted, and a smaller \
                 batch_size makes shorter work for it"
            }
            Self::Other(_) => "`gpt-wgpu doctor` tells whether the device can be trusted",
        }
    }

    fn of_wgpu(error: &wgpu::Error) -> Self {
        match error {
            wgpu::Error::OutOfMemory { .. } => Self::OutOfMemory("an allocation was refused".into()),
            _ => Self::Other(first_lines(&error.to_string())),
        }
    }

    /// wgpu also gives a device up that has no memory for what it needs itself.
    fn of_loss(reason: wgpu::DeviceLostReason, message: &str) -> Self {
        match message {
            _ if message.to_lowercase().contains("memory") => Self::OutOfMemory("wgpu gave the device up".into()),
            "" => Self::Lost(format!("{reason:?}")),
            _ => Self::Lost(first_lines(message)),
        }
    }

    /// An error of Burn or CubeCL, whose text goes on with a backtrace.
    fn of_burn(error: &impl Debug) -> Self {
        let text = first_lines(&format!("{error:?}"));
        if text.contains("allocate buffer of size") {
            Self::OutOfMemory("a buffer is larger than the device allows".into())
        } else {
            Self::Other(text)
        }
    }
}

/// An error's text up to its backtrace, in one line.
pub(crate) fn first_lines(text: &str) -> String {
    let text = text.split("Backtrace").next().unwrap_or_default();
    let text = text.split("backtrace:").next().unwrap_or_default();
    text.split_whitespace().collect::<Vec<_>>().join(" ").trim_end_matches([',', ' ']).to_string()
}

/// A device whose errors are kept.
#[derive(Clone)]
struct Watched {
    cube: CubeDevice,
    device: wgpu::Device,
    told: Arc<Told>,
}

/// What wgpu told of a device, the first of each kind.
#[derive(Default)]
struct Told {
    lost: Mutex<Option<DeviceError>>,
    loss: Condvar,
    error: OnceLock<DeviceError>,
}

impl Told {
    fn lose(&self, error: DeviceError) {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.loss.notify_all();
    }

    /// That the device is lost, told within `patience`, else the first error.
    fn within(&self, patience: Duration) -> Option<DeviceError> {
        let lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.loss.wait_timeout_while(lost, patience, |lost| lost.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.clone().or_else(|| self.error.get().cloned())
    }
}

/// How long a failure waits for work in flight: wgpu tells of a loss only then.
const WORK_ENDS: Duration = Duration::from_secs(5);

/// How long it then waits for another thread that polled and is about to tell.
const LOSS_IS_TOLD: Duration = Duration::from_millis(200);

static WATCHED: RwLock<Vec<Watched>> = RwLock::new(Vec::new());

/// Keeps the first error of a device that Burn has been given.
pub fn watch(cube: CubeDevice, device: wgpu::Device) {
    let told = Arc::new(Told::default());
    let kept = told.clone();
    device.on_uncaptured_error(Arc::new(move |error| {
        tracing::debug!("wgpu: {error}");
        let _ = kept.error.set(DeviceError::of_wgpu(&error));
    }));
    let kept = told.clone();
    device.set_device_lost_callback(move |reason, message| {
        tracing::debug!("wgpu lost the device: {reason:?} {message}");
        kept.lose(DeviceError::of_loss(reason, &message));
    });
    WATCHED.write().unwrap_or_else(PoisonError::into_inner).push(Watched { cube, device, told });
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

/// What wgpu told of this device outside of any result: that it is lost, else the first error.
pub fn told(device: &Device) -> Option<DeviceError> {
    let told = watched(device, |watched| watched.told.clone())?;
    told.within(Duration::ZERO).and_then(|_| cause(device))
}

/// The same after something failed on the device. A loss is told after what it causes: to the thread that polls when all work
/// has ended, and there behind the callbacks of buffers that could not be mapped.
pub fn cause(device: &Device) -> Option<DeviceError> {
    let Watched { device, told, .. } = watched(device, Clone::clone)?;
    let _ = device.poll(wgpu::PollType::Wait { submission_index: None, timeout: Some(WORK_ENDS) });
    told.within(LOSS_IS_TOLD)
}

/// `result` of a read or a wait, unless the device failed before: then nothing that it says counts.
///
/// # Errors
/// The first thing that went wrong.
pub fn checked<T, E: Debug>(device: &Device, result: Result<T, E>) -> Result<T, DeviceError> {
    if let Some(error) = told(device) {
        return Err(error);
    }
    result.map_err(|error| cause(device).unwrap_or_else(|| DeviceError::of_burn(&error)))
}

/// The iteration that is worked on or comes first, and how many were begun: errors name the one, the watchdog looks at the other.
static ITERATION: AtomicU64 = AtomicU64::new(0);
static BEGUN: AtomicU64 = AtomicU64::new(0);

/// Notes that a run starts at iteration `iter`, which has not begun: an error on the way there is to name it too.
pub fn start(iter: u64) {
    ITERATION.store(iter, Ordering::Relaxed);
}

/// Notes that the run begins iteration `iter`.
pub fn begin(iter: u64) {
    ITERATION.store(iter, Ordering::Relaxed);
    BEGUN.fetch_add(1, Ordering::Relaxed);
}

/// The iteration that was begun last, before it the one that comes first.
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
    if checkpoint::exists(&last) {
        format!("the last good checkpoint is {}", last.display())
    } else {
        "no checkpoint was saved before".to_string()
    }
}

/// The whole story: what happened, when, what is left and what to do.
pub fn story(what: &str, out_dir: &Path, advice: &str) -> String {
    let go_on = if checkpoint::exists(&checkpoint::path(out_dir, "last")) {
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

    /// The other thread stands for one that polls: it tells of a loss after the read that failed for it has returned.
    #[test]
    fn a_loss_is_waited_for() {
        let told = Arc::new(Told::default());
        told.error.set(DeviceError::Other("a buffer could not be mapped".into())).unwrap();
        assert!(matches!(told.within(Duration::ZERO), Some(DeviceError::Other(_))));
        let late = told.clone();
        let polling = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            late.lose(DeviceError::Lost("Destroyed".into()));
            late.lose(DeviceError::Lost("again".into()));
        });
        let first = told.within(Duration::from_secs(60)).unwrap().to_string();
        polling.join().unwrap();
        assert_eq!(first, "the device was lost (Destroyed)");
        assert_eq!(told.within(Duration::ZERO).unwrap().to_string(), first);
    }

    #[test]
    fn errors_are_told_apart() {
        let of = |text: &str| DeviceError::of_burn(&text);
        assert!(matches!(of("can't allocate buffer of size: 1"), DeviceError::OutOfMemory(_)));
        assert!(matches!(of("NotFound"), DeviceError::Other(_)));
        let lost = |message| DeviceError::of_loss(wgpu::DeviceLostReason::Unknown, message);
        assert!(matches!(lost("Out of memory"), DeviceError::OutOfMemory(_)));
        assert_eq!(lost("Parent device is lost").to_string(), "the device was lost (Parent device is lost)");
        assert_eq!(lost("").to_string(), "the device was lost (Unknown)");
    }
}
