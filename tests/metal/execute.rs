//! Runs cases in the programs that clang made, one process a case, and compares what they leave behind.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::cases::Case;
use crate::lower::Shader;

/// The order in which the runtime takes threads: each case runs under all of them.
pub const SCHEDULES: [&str; 4] = ["ascending", "descending", "random 1", "random 2"];

/// A case that went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The runtime stopped it: a race, an access out of bounds, threads that part.
    Stopped(String),
    /// It came to an end with a wrong result.
    Wrong(String),
}

/// Runs `case` in `program`, whose kernel is `shader`; files go to `folder` under `name`.
///
/// # Errors
/// What went wrong, with schedule, buffer and element.
///
/// # Panics
/// Where a process or a file cannot be had.
pub fn execute(program: &Path, shader: &Shader, case: &Case, folder: &Path, name: &str) -> Result<(), Failure> {
    let mut contents: Vec<Vec<u8>> = case.buffers.iter().map(|b| b.bytes()).collect();
    // CubeCL pads the uniform to 16 bytes.
    let mut params = case.params.clone();
    params.resize(params.len().next_multiple_of(4), 0);
    contents.push(words(&params));
    contents.push(words(&shader.sizes(&contents.iter().map(Vec::len).collect::<Vec<_>>())));

    let (x, y, z) = case.grid;
    let (wx, wy, wz) = case.kernel.workgroup();
    let mut head = vec![x, y, z, wx, wy, wz, contents.len() as u32];
    head.extend(contents.iter().map(|c| c.len() as u32));
    let mut file = words(&head);
    for content in &contents {
        file.extend(content);
        file.resize(file.len().next_multiple_of(4), 0);
    }
    let (input, output) = (folder.join(format!("{name}.case")), folder.join(format!("{name}.results")));
    fs::write(&input, file).unwrap();
    let run = Command::new(program).arg(&shader.id).arg(&input).arg(&output).output().unwrap();
    if !run.status.success() {
        let text = String::from_utf8_lossy(&run.stderr).trim().to_string();
        let text = if text.is_empty() { format!("ended with {}", run.status) } else { text };
        return Err(Failure::Stopped(text));
    }
    let results = fs::read(&output).unwrap();
    fs::remove_file(&input).unwrap();
    fs::remove_file(&output).unwrap();
    let mut rest = &results[..];
    for schedule in SCHEDULES {
        for (i, content) in contents.iter().enumerate() {
            let (after, behind) = rest.split_at(content.len());
            rest = &behind[content.len().next_multiple_of(4) - content.len()..];
            let difference = match case.buffers.get(i) {
                Some(buffer) => buffer.difference(after),
                None => (after != content).then(|| "the uniform was written".into()),
            };
            if let Some(difference) = difference {
                return Err(Failure::Wrong(format!("{schedule} order: {difference}")));
            }
        }
    }
    Ok(())
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// `work` of every item, on as many threads as the machine has.
pub fn parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut done: Vec<(usize, R)> = std::thread::scope(|scope| {
        let worker = || {
            let mut mine = Vec::new();
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                let Some(item) = items.get(i) else { return mine };
                mine.push((i, work(item)));
            }
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().flat_map(|w| w.join().unwrap()).collect()
    });
    done.sort_by_key(|(i, _)| *i);
    done.into_iter().map(|(_, result)| result).collect()
}
