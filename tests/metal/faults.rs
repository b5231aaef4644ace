//! Seeded faults: one wrong line in a real kernel each, and which check must find it. A fault that passes is a hole.

mod attention;
mod operations;

use std::fmt;

use gpt_wgpu::kernel::Kernel;

use crate::cases::{self, Case};
use crate::clang::{BUILDS, Clang};
use crate::execute::{Failure, execute, parallel};
use crate::limits;
use crate::lower::{self, Shader};

/// What found a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Layer {
    /// naga's validation.
    Naga,
    /// The table of limits and rules.
    Limits,
    /// The runtime: two threads, one place, no barrier.
    Race,
    /// The runtime: an access outside of its buffer, variable or array.
    Bounds,
    /// The runtime: threads wait at different barriers, or lanes in different functions.
    Parting,
    /// The result differs from the twin.
    Values,
}

/// One fault. `kernel` and `constants` choose whose text is changed: `constants` are lines of its header.
struct Fault {
    what: &'static str,
    kernel: &'static str,
    constants: &'static [&'static str],
    /// What the text has exactly once, and what takes its place.
    from: &'static str,
    to: &'static str,
    found_by: Layer,
}

/// Every fault.
fn all() -> impl Iterator<Item = &'static Fault> {
    attention::FAULTS.iter().chain(operations::FAULTS)
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: {}", self.kernel, self.what)
    }
}

impl Fault {
    /// The cases of the kernel that is to be changed, all of one kernel.
    fn cases<'a>(&self, all: &'a [Case]) -> Vec<&'a Case> {
        let meant =
            |k: &Kernel| k.name() == self.kernel && self.constants.iter().all(|c| k.header().lines().any(|l| l == *c));
        let has = |c: &&Case| meant(&c.kernel) && c.kernel.text().contains(self.from);
        let first = all.iter().find(has).unwrap_or_else(|| panic!("{self}: no case has this kernel and text"));
        all.iter().filter(|c| lower::label(&c.kernel) == lower::label(&first.kernel)).collect()
    }

    /// Changes the kernel and looks who notices; none: the fault passed.
    fn find(&self, number: usize, cases: &[Case], clang: &Clang) -> Option<(Layer, String)> {
        let cases = self.cases(cases);
        let kernel = &cases[0].kernel;
        let text = kernel.text();
        assert_eq!(text.matches(self.from).count(), 1, "{self}: {:?} must stand in the kernel exactly once", self.from);
        let shader = match Shader::new(kernel, text.replace(self.from, self.to)) {
            Ok(shader) => shader,
            Err(error) => return Some((Layer::Naga, error)),
        };
        if let Some((rule, how)) = limits::broken(&shader).into_iter().next() {
            return Some((Layer::Limits, format!("{rule}: {how}")));
        }
        for build in BUILDS {
            let name = format!("fault{number}");
            let object = clang.compile(&shader, &name, build).unwrap_or_else(|e| panic!("{self}: {e}"));
            let program = clang.link(&[object], &format!("{name}.{build:?}"), build).unwrap();
            for (i, case) in cases.iter().enumerate() {
                match execute(&program, &shader, case, clang.folder(), &format!("{name}.{build:?}.{i}")) {
                    Ok(()) => {}
                    Err(Failure::Wrong(text)) => return Some((Layer::Values, text)),
                    Err(Failure::Stopped(text)) => {
                        let layers =
                            [("race: ", Layer::Race), ("out of bounds: ", Layer::Bounds), ("part: ", Layer::Parting)];
                        let layer = layers.iter().find(|(word, _)| text.contains(word));
                        return Some((layer.unwrap_or_else(|| panic!("{self}: {text}")).1, text));
                    }
                }
            }
        }
        None
    }
}

#[test]
fn every_seeded_fault_is_found() {
    let Some(clang) = crate::clang() else { return };
    let cases = cases::all();
    let numbered: Vec<_> = all().enumerate().collect();
    let wrong: Vec<String> = parallel(&numbered, |(number, fault)| match fault.find(*number, &cases, &clang) {
        None => Some(format!("{fault}: PASSED, should be found by {:?}", fault.found_by)),
        Some((layer, _)) if layer == fault.found_by => None,
        Some((layer, text)) => Some(format!("{fault}: found by {layer:?}, not by {:?}: {text}", fault.found_by)),
    })
    .into_iter()
    .flatten()
    .collect();
    assert!(wrong.is_empty(), "{} of {} seeded faults\n{}", wrong.len(), numbered.len(), wrong.join("\n"));
    eprintln!("{} seeded faults, all found", numbered.len());
}
