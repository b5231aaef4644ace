//! Ends a run whose device hangs: no wait below us has a limit, so a driver that never finishes would hold it for good.
//!
//! A long time without a new iteration proves nothing: an evaluation, or all iterations between two log lines, may take minutes.
//! So the watchdog looks at the queue. When no iteration began for a while, what is submitted then has as long again to finish.
//! CubeCL submits at most some hundred launches ahead, which is seconds of work on any GPU.

use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow};

use crate::failure;
use crate::terminal;

/// Changes the limit: seconds; 0 switches the watchdog off.
pub const VARIABLE: &str = "GPT_WGPU_WATCHDOG_S";

/// How long what is submitted may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Watches until it is dropped.
pub struct Watchdog {
    _stop: Option<Sender<()>>,
}

impl Watchdog {
    /// Watches `device`, if there is one; `out_dir` is the run's, for the error's text.
    ///
    /// # Errors
    /// When [`VARIABLE`] is no number.
    pub fn start(device: Option<wgpu::Device>, out_dir: PathBuf) -> Result<Self> {
        let limit = limit(std::env::var(VARIABLE).ok().as_deref())?;
        let (Some(device), Some(limit)) = (device, limit) else {
            return Ok(Self { _stop: None });
        };
        let (stop, stopped) = mpsc::channel::<()>();
        thread::spawn(move || {
            let mut begun = failure::begun();
            while stopped.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                let now = failure::begun();
                let silent = now == begun;
                begun = now;
                if silent && !finishes(&device, limit) && failure::begun() == begun {
                    end(limit, &out_dir);
                }
            }
        });
        Ok(Self { _stop: Some(stop) })
    }
}

/// The limit that `setting` asks for; None: no watchdog.
fn limit(setting: Option<&str>) -> Result<Option<Duration>> {
    let Some(text) = setting else {
        return Ok(Some(LIMIT));
    };
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let seconds = seconds.ok_or_else(|| anyhow!("{VARIABLE}={text}: expected seconds, or 0 for no limit"))?;
    Ok((!seconds.is_zero()).then_some(seconds))
}

/// Whether the device finishes what is submitted now within `limit`. A device that fails is finished: its error comes by
/// another way.
fn finishes(device: &wgpu::Device, limit: Duration) -> bool {
    let (done, outcome) = mpsc::channel();
    let device = device.clone();
    // On a thread of its own: a driver that hangs may hold the locks that this call wants.
    thread::spawn(move || {
        let wait = wgpu::PollType::Wait { submission_index: None, timeout: Some(limit) };
        let timed_out = matches!(device.poll(wait), Err(wgpu::PollError::Timeout));
        let _ = done.send(!timed_out);
    });
    outcome.recv_timeout(limit.saturating_mul(2)).unwrap_or(false)
}

/// Ends the process. Nothing can be saved: the weights are on the device.
fn end(limit: Duration, out_dir: &std::path::Path) -> ! {
    let what = format!("the device hangs: it did not finish its work within {} s", limit.as_secs_f64());
    let advice = format!(
        "A restart of the computer may be needed; a slow device is given more time by {VARIABLE}=SECONDS, and less work at \
         a time by a smaller batch_size"
    );
    terminal::warn(format!("error: {}", failure::story(&what, out_dir, &advice)));
    // A hanging driver may also hang in what it does at exit; one that still works has been seen to take six seconds there.
    thread::spawn(|| {
        thread::sleep(Duration::from_secs(60));
        std::process::abort();
    });
    std::process::exit(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_seconds() {
        assert_eq!(limit(None).unwrap(), Some(LIMIT));
        assert_eq!(limit(Some("0.5")).unwrap(), Some(Duration::from_millis(500)));
        assert_eq!(limit(Some("0")).unwrap(), None);
        for bad in ["soon", "-1", "inf", ""] {
            let error = limit(Some(bad)).unwrap_err().to_string();
            assert!(error.contains(VARIABLE) && error.contains("seconds"), "{error}");
        }
    }
}
