//! Metal without a Mac: the MSL of every kernel that an Apple GPU can be given is checked against Apple's limits, compiled
//! and executed. What that proves, and what it cannot, is in the README.
//!
//! A new kernel needs two things: its place in `gpt_wgpu::ops::kernels`, and a `Case` in its operation's file in cases/.

mod cases;
mod clang;
#[path = "../common/mod.rs"]
mod common;
mod execute;
mod faults;
mod limits;
mod lower;
mod through_wgpu;
mod uniformity;

use std::collections::{BTreeMap, BTreeSet};

use clang::{BUILDS, Clang};
use execute::{Failure, execute, parallel};
use gpt_wgpu::kernel::{Capabilities, Kernel};
use gpt_wgpu::ops;
use lower::Shader;

/// What wgpu reports of every Apple GPU since the M1 (wgpu-hal's metal/adapter.rs); others can do less.
pub fn apple() -> Capabilities {
    Capabilities {
        subgroup_size: Some(32),
        matrices: vec![(8, true), (8, false)],
        f16: true,
        int64: true,
        few_registers: true,
        largest_buffer: 0,
    }
}

/// Every kernel that an Apple GPU can be given, by label.
fn shaders() -> BTreeMap<String, Shader> {
    let kernels = ops::kernels(&apple());
    let count = kernels.len();
    let shader = |kernel: &Kernel| {
        Shader::new(kernel, kernel.text()).unwrap_or_else(|error| panic!("{}: {error}", lower::label(kernel)))
    };
    let shaders: BTreeMap<_, _> = kernels.iter().map(|k| (lower::label(k), shader(k))).collect();
    let ids: BTreeSet<_> = shaders.values().map(|s| &s.id).collect();
    assert!(shaders.len() == count && ids.len() == count, "two of the kernels have the same name and constants");
    shaders
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

fn assert_none(what: &str, failures: Vec<Option<String>>) {
    const SHOWN: usize = 20;
    let count = failures.len();
    let failures: Vec<_> = failures.into_iter().flatten().collect();
    let shown = failures[..failures.len().min(SHOWN)].join("\n");
    assert!(failures.is_empty(), "{} of {count} {what} fail; the first:\n{shown}", failures.len());
}

/// What of a kernel must be executed: the kernel as it is. Of the matrix products, which come in every combination of
/// constants, it is each constant in each layout and type of product; of the random generator's second form, its use.
fn features(kernel: &Kernel) -> BTreeSet<String> {
    let products = kernel.header().lines().find(|line| line.starts_with("alias mat_elem"));
    let family = format!("{} {}", kernel.name(), products.unwrap_or_default());
    if lower::has_int64(kernel) {
        BTreeSet::from([format!("{family} int64")])
    } else if kernel.name().starts_with("linear_") {
        let lines = kernel.header().lines();
        let layout = lines.clone().filter(|line| line.contains("_BY_")).collect::<Vec<_>>().join(" ");
        lines.flat_map(|line| line.split(", ")).map(|part| format!("{family} {layout} {part}")).collect()
    } else {
        BTreeSet::from([lower::label(kernel)])
    }
}

/// Nothing that can be launched is left out of what follows.
#[test]
fn every_kernel_is_listed_and_every_listed_kernel_is_executed() {
    let (kernels, cases) = (ops::kernels(&apple()), cases::all());
    let listed: BTreeSet<String> = kernels.iter().flat_map(features).collect();
    let executed: BTreeSet<String> = cases.iter().flat_map(|case| features(&case.kernel)).collect();
    let missing: Vec<_> = listed.difference(&executed).collect();
    assert!(missing.is_empty(), "kernels of ops::kernels without a case in tests/metal/cases: {missing:#?}");
    let labels: BTreeSet<String> = kernels.iter().map(lower::label).collect();
    let unlisted: Vec<_> =
        cases.iter().map(|case| lower::label(&case.kernel)).filter(|l| !labels.contains(l)).collect();
    assert!(unlisted.is_empty(), "cases of kernels that ops::kernels does not list: {unlisted:#?}");

    // Some files serve the matrices of other GPUs alone.
    let everything = Capabilities { matrices: vec![(16, true), (8, true), (8, false)], ..apple() };
    let texts: Vec<String> = ops::kernels(&everything).iter().map(Kernel::text).collect();
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("wgsl");
    for file in std::fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let file = std::fs::read_to_string(&path).unwrap();
        let used = texts.iter().any(|text| text.contains(&file));
        assert!(used, "{} is in no kernel that ops::kernels lists", path.display());
    }
}

#[test]
fn every_kernel_keeps_its_address_spaces_apart() {
    let Some(clang) = clang() else { return };
    let shaders: Vec<_> = shaders().into_values().collect();
    let check = |shader: &Shader| {
        let msl = shader.msl()?;
        clang.check_address_spaces(&msl, &shader.id)
    };
    assert_none("kernels", parallel(&shaders, |s| check(s).err().map(|error| format!("{}: {error}", s.label))));

    // A text that hands threadgroup memory to a function of device memory must not pass.
    let delta = shaders.iter().find(|s| s.id.starts_with("attention_coop_forward")).unwrap();
    let msl = delta.msl().unwrap();
    let mixed = msl.replacen("threadgroup type_5& stream_a", "device type_5& stream_a", 1);
    assert_ne!(msl, mixed);
    let error = clang.check_address_spaces(&mixed, "mixed").unwrap_err();
    assert!(error.contains("address space") || error.contains("no matching function"), "{error}");
}

#[test]
fn every_kernel_computes_the_right_thing_in_bounds_and_without_races() {
    let Some(clang) = clang() else { return };
    let shaders = shaders();
    let cases = cases::all();
    let executed: BTreeSet<String> = cases.iter().map(|case| lower::label(&case.kernel)).collect();
    let all: Vec<&Shader> = shaders.values().filter(|shader| executed.contains(&shader.label)).collect();
    for build in BUILDS {
        let objects = parallel(&all, |s| clang.compile(s, &s.id, build).map_err(|e| format!("{}: {e}", s.label)));
        let objects: Result<Vec<_>, _> = objects.into_iter().collect();
        let objects = objects.unwrap_or_else(|error| panic!("{error}"));
        let program = clang.link(&objects, &format!("all.{build:?}"), build).unwrap_or_else(|error| panic!("{error}"));
        let numbered: Vec<_> = cases.iter().enumerate().collect();
        let results = parallel(&numbered, |(i, case)| {
            let label = lower::label(&case.kernel);
            let result = execute(&program, &shaders[&label], case, clang.folder(), &format!("{i}.{build:?}"));
            let (Failure::Stopped(how) | Failure::Wrong(how)) = result.err()?;
            Some(format!("{build:?} build, {label}, {}: {how}", case.what))
        });
        assert_none(&format!("cases of the {build:?} build"), results);
    }
    eprintln!(
        "{} of {} kernels right in {} cases, {} builds and {} orders",
        all.len(),
        shaders.len(),
        cases.len(),
        BUILDS.len(),
        execute::SCHEDULES.len()
    );
}
