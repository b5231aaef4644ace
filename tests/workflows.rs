//! The workflows of .github: actionlint finds nothing in them, and every action is pinned to a commit.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn workflows() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(".github/workflows");
    let files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() >= 2, "{files:?}");
    files
}

/// actionlint over `files`; `None` where it is not installed.
///
/// # Panics
/// When it is not installed and `GPT_WGPU_REQUIRE_ACTIONLINT=1`.
fn lint(files: &[PathBuf]) -> Option<Output> {
    match Command::new("actionlint").args(files).output() {
        Ok(output) => Some(output),
        Err(error) => {
            let required = std::env::var("GPT_WGPU_REQUIRE_ACTIONLINT").is_ok_and(|value| value == "1");
            assert!(!required, "GPT_WGPU_REQUIRE_ACTIONLINT=1, and actionlint cannot be run: {error}");
            eprintln!("SKIPPED: there is no actionlint on PATH (scripts/test installs it)");
            None
        }
    }
}

#[test]
fn actionlint_finds_nothing_in_the_workflows() {
    let Some(output) = lint(&workflows()) else { return };
    let found = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && output.stdout.is_empty(), "{found}");
}

#[test]
fn actionlint_finds_a_mistake() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("wrong.yml");
    let text = fs::read_to_string(&workflows()[0]).unwrap();
    fs::write(&file, text.replacen("runs-on:", "run-on:", 1)).unwrap();
    let Some(output) = lint(&[file]) else { return };
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("run-on"), "{output:?}");
}

#[test]
fn every_action_is_pinned_to_a_commit_with_its_version_beside_it() {
    let mut seen = 0;
    for file in workflows() {
        for line in fs::read_to_string(&file).unwrap().lines().filter(|line| line.contains("uses:")) {
            let (_, pin) = line.split_once('@').unwrap_or_else(|| panic!("{line}"));
            let (commit, version) = pin.split_once(" # v").unwrap_or_else(|| panic!("no version: {line}"));
            assert!(commit.len() == 40 && commit.chars().all(|c| c.is_ascii_hexdigit()), "{line}");
            assert_eq!(version.split('.').count(), 3, "{line}");
            seen += 1;
        }
    }
    assert!(seen >= 8, "only {seen} actions");
}
