//! tint's analysis of uniform control flow, where there is a tint: a barrier under a branch that threads may take
//! differently is an error. It knows no cooperative matrices and no 64-bit integers; naga and the runtime watch over those
//! kernels, of which the latter differ from others in one function without a branch.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::execute::parallel;

/// What tint says against a text; nothing: it is content.
fn tint(wgsl: &str, name: &str) -> Option<String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("metal");
    fs::create_dir_all(&folder).unwrap();
    let file = folder.join(format!("{name}.wgsl"));
    fs::write(&file, format!("enable subgroups;\n{wgsl}")).unwrap();
    let run = Command::new("tint")
        .arg(&file)
        .args(["--format", "wgsl", "-o"])
        .arg(file.with_extension("out"))
        .output()
        .unwrap();
    (!run.status.success()).then(|| String::from_utf8_lossy(&run.stderr).lines().take(4).collect::<Vec<_>>().join("\n"))
}

#[test]
fn tint_finds_every_barrier_in_uniform_control_flow() {
    if Command::new("tint").arg("--help").output().is_err() {
        eprintln!("SKIPPED: no tint on the PATH");
        return;
    }
    let parted = "var<workgroup> a: u32;
        @compute @workgroup_size(64) fn main(@builtin(local_invocation_index) thread: u32) {
            if (thread < 3u) { workgroupBarrier(); }
            a = thread;
        }";
    assert!(tint(parted, "parted").is_some_and(|error| error.contains("uniform control flow")));

    let shaders = crate::shaders();
    let (unknown, plain): (Vec<_>, Vec<_>) =
        shaders.values().partition(|s| s.wgsl.contains("wgpu_cooperative_matrix") || s.wgsl.contains("u64("));
    let errors =
        parallel(&plain, |shader| tint(&shader.wgsl, &shader.id).map(|error| format!("{}: {error}", shader.label)));
    let errors: Vec<_> = errors.into_iter().flatten().collect();
    assert!(errors.is_empty(), "{}", errors.join("\n"));
    eprintln!(
        "{} kernels pass tint; {} with cooperative matrices or 64-bit integers SKIPPED: tint has none",
        plain.len(),
        unknown.len()
    );
}
