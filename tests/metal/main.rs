//! Metal without a Mac: the MSL of every kernel that an Apple GPU can be given is checked against Apple's limits, compiled
//! and executed. What that proves and what it cannot is in the README.

mod cases;
mod clang;
#[path = "../common/mod.rs"]
mod common;
mod execute;
mod faults;
mod limits;
mod lower;

use std::collections::BTreeMap;

use clang::{BUILDS, Build, Clang};
use execute::{Failure, execute, parallel};
use gpt_wgpu::kernel::{Capabilities, Kernel};
use gpt_wgpu::ops;
use lower::Shader;

/// What wgpu reports of every Apple GPU since the M1 (wgpu-hal's metal/adapter.rs).
pub fn apple() -> Capabilities {
    Capabilities { subgroup_size: Some(32), matrices: vec![(8, true), (8, false)], f16: true }
}

fn shaders() -> BTreeMap<String, Shader> {
    let shader = |kernel: Kernel| {
        let shader = Shader::new(&kernel, kernel.text()).unwrap_or_else(|e| panic!("{}: {e}", lower::label(&kernel)));
        (shader.label.clone(), shader)
    };
    ops::kernels(&apple()).into_iter().map(shader).collect()
}

/// clang; none, and a line that says so, where it is missing.
///
/// # Panics
/// When it is missing and `GPT_WGPU_REQUIRE_METAL_CHECK=1`.
fn clang() -> Option<Clang> {
    match Clang::find() {
        Ok(clang) => Some(clang),
        Err(why) => {
            let required = std::env::var("GPT_WGPU_REQUIRE_METAL_CHECK").is_ok_and(|v| v == "1");
            assert!(!required, "GPT_WGPU_REQUIRE_METAL_CHECK=1 and {why}");
            eprintln!("SKIPPED: {why}");
            None
        }
    }
}

#[test]
fn every_kernel_computes_the_right_thing_in_bounds_and_without_races() {
    let Some(clang) = clang() else { return };
    let shaders = shaders();
    let all: Vec<&Shader> = shaders.values().collect();
    let cases = cases::all();
    let mut failures = Vec::new();
    for build in BUILDS {
        let start = std::time::Instant::now();
        let objects = parallel(&all, |shader| {
            clang.compile(shader, &shader.id, build).map_err(|e| format!("{}: {e}", shader.label))
        });
        let objects: Result<Vec<_>, _> = objects.into_iter().collect();
        let program = clang.link(&objects.unwrap(), &format!("all.{build:?}"), build).unwrap();
        eprintln!("{build:?} compiled {:?}", start.elapsed());
        let start = std::time::Instant::now();
        let numbered: Vec<_> = cases.iter().enumerate().collect();
        failures.extend(parallel(&numbered, |(i, case)| {
            let label = lower::label(&case.kernel);
            let t0 = std::time::Instant::now();
            let result = execute(&program, &shaders[&label], case, clang.folder(), &format!("{build:?}{i}"));
            eprintln!("TIME {build:?} {:?} {label}", t0.elapsed().as_millis());
            result.err().map(|failure| format!("{build:?} {label} {}: {failure:?}", case.what))
        }));
        eprintln!("{build:?} executed {:?}", start.elapsed());
    }
    let failures: Vec<_> = failures.into_iter().flatten().collect();
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures[..failures.len().min(25)].join("\n"));
}
