//! Energy of the timed iterations, from counters that a user may read without being root.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nvml_wrapper::Nvml;

use crate::device::{AdapterReport, Chosen};
use crate::report::Energy;

/// Something that counts joules between two moments. Errors are the reason why there is no number.
trait Counter {
    /// What the report calls it.
    fn source(&self) -> &'static str;
    /// A measurement shorter than this says more about how often the counter is updated than about the energy.
    fn shortest(&self) -> Duration;
    fn start(&mut self) -> Result<(), String>;
    /// Joules since the start.
    fn stop(&mut self) -> Result<f64, String>;
}

/// The counter of one device, or the reason why it has none.
pub struct Meter {
    counter: Result<Box<dyn Counter>, String>,
    started: Instant,
}

impl Meter {
    /// The meter that covers `chosen`: the card's own on NVIDIA, the whole chip's on Apple, the processor package's for the
    /// CPU, software adapters and integrated GPUs on Linux.
    pub fn of(chosen: &Chosen) -> Self {
        Self { counter: counter(chosen), started: Instant::now() }
    }

    /// Begins to count.
    pub fn start(&mut self) {
        self.started = Instant::now();
        let started = match &mut self.counter {
            Ok(counter) => counter.start(),
            Err(_) => Ok(()),
        };
        if let Err(reason) = started {
            self.counter = Err(reason);
        }
    }

    /// Energy since [`Self::start`], of `iters` iterations of `tokens` tokens each.
    ///
    /// # Errors
    /// The reason why there is no number.
    pub fn stop(self, iters: usize, tokens: usize) -> Result<Energy, String> {
        let mut counter = self.counter?;
        let joules = counter.stop()?;
        let elapsed = self.started.elapsed();
        if elapsed < counter.shortest() {
            return Err(format!(
                "the timed iterations took {:.2} s, and {} needs {:.1} s; give more --iters",
                elapsed.as_secs_f64(),
                counter.source(),
                counter.shortest().as_secs_f64()
            ));
        }
        if joules <= 0.0 {
            return Err(format!("{} counted nothing", counter.source()));
        }
        Ok(Energy {
            source: counter.source().into(),
            watts: joules / elapsed.as_secs_f64(),
            joules_per_iter: joules / iters as f64,
            tokens_per_joule: (iters * tokens) as f64 / joules,
        })
    }
}

fn counter(chosen: &Chosen) -> Result<Box<dyn Counter>, String> {
    if let Some(adapter) = chosen.adapter.as_ref().filter(|adapter| adapter.id.starts_with("10de:")) {
        return Ok(Box::new(NvidiaCard::of(adapter)?));
    }
    #[cfg(target_os = "macos")]
    let apple: Option<Box<dyn Counter>> = Some(Box::new(apple::Chip::default()));
    #[cfg(not(target_os = "macos"))]
    let apple = None;
    if let Some(chip) = apple {
        return Ok(chip);
    }
    let shares_the_package = chosen.adapter.as_ref().is_none_or(|a| matches!(a.kind, "software" | "integrated"));
    if cfg!(target_os = "linux") && shares_the_package {
        return Ok(Box::new(Packages::of(Path::new("/sys/class/powercap"))?));
    }
    Err(format!("there is no counter for {} on {} that needs no root", chosen.name, std::env::consts::OS))
}

/// The energy counter of an NVIDIA card.
struct NvidiaCard {
    nvml: Nvml,
    index: u32,
    millijoules: u64,
}

impl NvidiaCard {
    /// The card that is `adapter`: by its place on the bus, or by its name where the API hides the place and the name is
    /// unique.
    fn of(adapter: &AdapterReport) -> Result<Self, String> {
        let nvml = Nvml::init().map_err(|error| format!("NVIDIA's management library: {error}"))?;
        let count = nvml.device_count().map_err(|error| format!("NVIDIA's management library: {error}"))?;
        let mut named = Vec::new();
        for index in 0..count {
            let Ok(card) = nvml.device_by_index(index) else { continue };
            let place = card.pci_info().ok().and_then(|info| bus_place(&info.bus_id));
            if place.is_some() && place == adapter.pci_bus.as_deref().and_then(bus_place) {
                return Ok(Self { nvml, index, millijoules: 0 });
            }
            if card.name().is_ok_and(|name| name == adapter.name) {
                named.push(index);
            }
        }
        match named[..] {
            [index] if adapter.pci_bus.is_none() => Ok(Self { nvml, index, millijoules: 0 }),
            _ => Err(format!("NVIDIA's management library does not show which of its cards is {}", adapter.name)),
        }
    }

    fn read(&self) -> Result<u64, String> {
        let card = self.nvml.device_by_index(self.index);
        card.and_then(|card| card.total_energy_consumption())
            .map_err(|error| format!("NVIDIA's management library: {error}"))
    }
}

/// `0000:01:00.0` as (domain, `01:00.0`): the management library writes the domain with eight digits.
fn bus_place(text: &str) -> Option<(u32, String)> {
    let (domain, rest) = text.split_once(':')?;
    Some((u32::from_str_radix(domain, 16).ok()?, rest.to_lowercase()))
}

impl Counter for NvidiaCard {
    fn source(&self) -> &'static str {
        "nvml"
    }

    fn shortest(&self) -> Duration {
        Duration::from_secs(1) // the counter moves every tenth of a second
    }

    fn start(&mut self) -> Result<(), String> {
        self.millijoules = self.read()?;
        Ok(())
    }

    fn stop(&mut self) -> Result<f64, String> {
        Ok(self.read()?.saturating_sub(self.millijoules) as f64 / 1e3)
    }
}

/// The packages of the powercap interface (RAPL: Intel, and AMD since Zen), each with what it counted at the start, µJ.
struct Packages(Vec<(PathBuf, u64)>);

impl Packages {
    fn of(folder: &Path) -> Result<Self, String> {
        let entries = fs::read_dir(folder).map_err(|_| "this system shows no RAPL counters".to_string())?;
        let is_package = |zone: &PathBuf| fs::read_to_string(zone.join("name")).is_ok_and(|n| n.starts_with("package"));
        let zones: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(is_package).collect();
        if zones.is_empty() {
            return Err("this system shows no RAPL counters".into());
        }
        let packages = Self(zones.into_iter().map(|zone| (zone, 0)).collect());
        for (zone, _) in &packages.0 {
            number(zone, "energy_uj")?;
        }
        Ok(packages)
    }
}

fn number(zone: &Path, file: &str) -> Result<u64, String> {
    let path = zone.join(file);
    let text = fs::read_to_string(&path).map_err(|error| match error.kind() {
        std::io::ErrorKind::PermissionDenied => format!("only root may read {}", path.display()),
        _ => format!("cannot read {}: {error}", path.display()),
    })?;
    text.trim().parse().map_err(|_| format!("{} holds no number", path.display()))
}

impl Counter for Packages {
    fn source(&self) -> &'static str {
        "rapl package"
    }

    fn shortest(&self) -> Duration {
        Duration::from_millis(100) // the counter moves every millisecond
    }

    fn start(&mut self) -> Result<(), String> {
        for (zone, before) in &mut self.0 {
            *before = number(zone, "energy_uj")?;
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<f64, String> {
        let mut sum = 0;
        for (zone, before) in &self.0 {
            let now = number(zone, "energy_uj")?;
            // The counter starts again at its range, after minutes to an hour.
            sum += if now >= *before { now - before } else { now + number(zone, "max_energy_range_uj")? - before };
        }
        Ok(sum as f64 / 1e6)
    }
}

/// Power of an Apple chip, sampled while the iterations run.
#[cfg(target_os = "macos")]
mod apple {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread::JoinHandle;
    use std::time::{Duration, Instant};

    /// Milliseconds that one sample of the power covers.
    const SAMPLE: u32 = 100;

    /// CPU, GPU, neural engine and memory together.
    #[derive(Default)]
    pub struct Chip {
        running: Option<(Arc<AtomicBool>, JoinHandle<Result<f64, String>>, Instant)>,
    }

    /// Mean watts until `stop` is set, over at least one sample.
    fn sample(stop: &AtomicBool) -> Result<f64, String> {
        let failed = |error: Box<dyn std::error::Error>| format!("macmon: {error}");
        let mut sampler = macmon::Sampler::new().map_err(failed)?;
        let (mut sum, mut count) = (0.0, 0);
        while count == 0 || !stop.load(Ordering::Relaxed) {
            let metrics = sampler.get_metrics(SAMPLE).map_err(failed)?;
            sum += f64::from(metrics.all_power + metrics.ram_power);
            count += 1;
        }
        Ok(sum / f64::from(count))
    }

    impl super::Counter for Chip {
        fn source(&self) -> &'static str {
            "macmon"
        }

        fn shortest(&self) -> Duration {
            Duration::from_secs(1)
        }

        fn start(&mut self) -> Result<(), String> {
            let stop = Arc::new(AtomicBool::new(false));
            let seen = stop.clone();
            self.running = Some((stop, std::thread::spawn(move || sample(&seen)), Instant::now()));
            Ok(())
        }

        fn stop(&mut self) -> Result<f64, String> {
            let (stop, thread, started) = self.running.take().ok_or("macmon was not started")?;
            let seconds = started.elapsed().as_secs_f64();
            stop.store(true, Ordering::Relaxed);
            let watts = thread.join().map_err(|_| "macmon failed".to_string())??;
            Ok(watts * seconds)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zone(folder: &Path, name: &str, kind: &str, microjoules: u64) -> PathBuf {
        let zone = folder.join(name);
        fs::create_dir_all(&zone).unwrap();
        fs::write(zone.join("name"), format!("{kind}\n")).unwrap();
        fs::write(zone.join("energy_uj"), format!("{microjoules}\n")).unwrap();
        fs::write(zone.join("max_energy_range_uj"), "1000000000\n").unwrap();
        zone
    }

    #[test]
    fn packages_are_summed_and_a_counter_that_starts_again_is_right() {
        let folder = tempfile::tempdir().unwrap();
        let first = zone(folder.path(), "intel-rapl:0", "package-0", 5_000_000);
        let second = zone(folder.path(), "intel-rapl:1", "package-1", 999_000_000);
        zone(folder.path(), "intel-rapl:0:0", "core", 1);
        let mut packages = Packages::of(folder.path()).unwrap();
        assert_eq!(packages.0.len(), 2);
        packages.start().unwrap();
        fs::write(first.join("energy_uj"), "7000000").unwrap();
        fs::write(second.join("energy_uj"), "3000000").unwrap();
        assert_eq!(packages.stop(), Ok(2.0 + 4.0));
    }

    #[test]
    fn what_cannot_be_read_is_a_reason() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Packages::of(&folder.path().join("none")).err().unwrap().contains("no RAPL counters"));
        let zone = zone(folder.path(), "intel-rapl:0", "package-0", 1);
        fs::write(zone.join("energy_uj"), "much").unwrap();
        assert!(Packages::of(folder.path()).err().unwrap().contains("holds no number"));
        fs::remove_file(zone.join("energy_uj")).unwrap();
        assert!(Packages::of(folder.path()).err().unwrap().contains("cannot read"));
    }

    #[test]
    fn both_spellings_of_a_place_on_the_bus_are_equal() {
        assert_eq!(bus_place("0000:4A:00.0"), bus_place("00000000:4a:00.0"));
        assert_ne!(bus_place("0000:4A:00.0"), bus_place("0001:4a:00.0"));
        assert_eq!(bus_place(""), None);
    }
}
