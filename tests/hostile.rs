//! What the built binary says to values, files and places that no honest run has. Nothing may panic, hang, be taken as it is, or
//! cost a user what was there.

#[path = "common/sandbox.rs"]
mod sandbox;

use std::fs;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use sandbox::{Sandbox, TINY, refused, text, tokens};

/// Its output, unless it does not end.
#[track_caller]
fn ends(mut command: Command) -> Output {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > Duration::from_secs(120) {
            child.kill().unwrap();
            panic!("it did not end: {}", text(&child.wait_with_output().unwrap()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.wait_with_output().unwrap()
}

fn train(sandbox: &Sandbox, more: &[&str]) -> Command {
    sandbox.command(&[&["train"], TINY, more].concat())
}

#[test]
fn sizes_that_nobody_can_count_with_are_refused_by_their_name() {
    let sandbox = Sandbox::new();
    let keys = [
        "n_layer",
        "n_head",
        "n_embd",
        "block_size",
        "vocab_size",
        "batch_size",
        "gradient_accumulation_steps",
        "eval_iters",
    ];
    for key in keys {
        for value in ["10000000000", "9000000000000000000"] {
            for mode in ["--dry-run", "--eval-only"] {
                let output = ends(train(&sandbox, &[&format!("--{key}={value}"), mode]));
                refused(&output, 2, &[&format!("{key} = {value}"), "at most"]);
            }
        }
        let output = sandbox.train(&[&format!("--{key}=18446744073709551615")]);
        refused(&output, 2, &[&key.replace('_', "-"), "expected a whole number"]);
    }
    refused(&sandbox.train(&["--seed=18446744073709551615"]), 2, &["--seed", "expected a whole number"]);
    refused(&sandbox.train(&["--dropout=0.99999999999"]), 2, &["dropout = 0.99999999999", "less than 1"]);
    assert!(!sandbox.path("out").exists(), "a refused run began");
    sandbox.trained();
    let output = sandbox.run(&["eval", "--out-dir=out", "--device=cpu", "--eval-iters=10000000000"]);
    refused(&output, 2, &["eval_iters = 10000000000", "at most"]);
}

#[test]
fn an_evaluation_that_cannot_fit_is_refused() {
    let sandbox = Sandbox::new();
    let large = ["--eval-only", "--batch-size=268435456", "--n-embd=512"];
    let words = ["an evaluation needs about", "the device has", "batch_size"];
    refused(&sandbox.train(&large), 1, &words);
    refused(&sandbox.train(&[&large[..], &["--dry-run"]].concat()), 1, &words);
    assert!(sandbox.train(&["--eval-only"]).status.success());
}

#[test]
fn a_checkpoint_whose_state_is_no_models_is_damaged() {
    let sandbox = Sandbox::new();
    sandbox.trained();
    let path = sandbox.path("out/checkpoints/last/state.json");
    let good: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let max = u64::MAX;
    let cases = [
        ("n_layer", vec![0, 10_000_000_000, max]),
        ("n_head", vec![0, 3, max]),
        ("n_embd", vec![0, 10_000_000_000, max]),
        ("block_size", vec![0, 10_000_000_000, max]),
        ("vocab_size", vec![0, 10_000_000_000, max]),
    ];
    for (key, values) in cases {
        for value in values {
            let mut bad = good.clone();
            bad["model"][key] = value.into();
            fs::write(&path, bad.to_string()).unwrap();
            for args in [
                &["sample", "--out-dir=out", "--checkpoint=last", "--device=cpu"][..],
                &["train", "--resume", "--out-dir=out", "--max-iters=6"],
            ] {
                refused(&ends(sandbox.command(args)), 1, &["state.json is damaged", " = "]);
            }
        }
    }
    let mut bad = good.clone();
    bad["config"]["data"]["batch_size"] = 1_000_000_000_000_000_000u64.into();
    fs::write(&path, bad.to_string()).unwrap();
    refused(&sandbox.run(&["eval", "--out-dir=out", "--checkpoint=last", "--device=cpu"]), 2, &["batch_size = "]);
}

#[test]
fn weights_without_a_place_are_not_left_out() {
    let sandbox = Sandbox::new();
    assert!(sandbox.train(&["--n-layer=2", "--bias=true"]).status.success());
    let path = sandbox.path("out/checkpoints/last/state.json");
    let good: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let resumed = |key: &str, value: serde_json::Value| {
        let mut bad = good.clone();
        bad["model"][key] = value;
        fs::write(&path, bad.to_string()).unwrap();
        sandbox.run(&["train", "--resume", "--out-dir=out", "--max-iters=6"])
    };
    refused(&resumed("n_layer", 1.into()), 1, &["model.safetensors: tensor h.1.", "no place", "n_layer = 1"]);
    refused(&resumed("bias", false.into()), 1, &[".bias has no place", "bias = false"]);
    // Before its size is asked of the memory
    refused(&resumed("n_layer", 1000.into()), 1, &["model.safetensors: tensor h.2.ln_1.weight is missing"]);
    assert!(resumed("n_layer", 2.into()).status.success());
}

#[test]
fn a_foreign_model_with_impossible_sizes_is_refused() {
    let sandbox = Sandbox::new();
    sandbox.trained();
    fs::create_dir(sandbox.path("hf")).unwrap();
    fs::copy(sandbox.path("out/checkpoints/last/model.safetensors"), sandbox.path("hf/model.safetensors")).unwrap();
    for (key, value) in [("n_head", 0), ("n_head", 3), ("n_layer", 10_000_000_000u64), ("vocab_size", u64::MAX)] {
        let mut config = serde_json::json!(
            { "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 8, "vocab_size": 60, "activation_function": "gelu" }
        );
        config[key] = value.into();
        sandbox.write("hf/config.json", config.to_string().as_bytes());
        refused(&ends(train(&sandbox, &["--init-from=hf"])), 1, &["hf/config.json: ", " = "]);
    }
}

/// `| true`: what is printed has no reader from the beginning.
#[track_caller]
fn unread(mut command: Command) -> Output {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    child.wait_with_output().unwrap()
}

#[test]
fn a_reader_who_is_gone_stops_nothing() {
    let sandbox = Sandbox::new();
    let output = unread(train(&sandbox, &["--sample-tokens=5"]));
    assert!(output.status.success(), "{}", text(&output));
    assert!(sandbox.path("out/checkpoints/last/model.safetensors").exists());
    let commands: &[&[&str]] = &[
        &["eval", "--out-dir=out", "--device=cpu"],
        &["eval", "--out-dir=out", "--device=cpu", "--json"],
        &["sample", "--out-dir=out", "--device=cpu", "--max-new-tokens=3"],
        &["prepare", "builtin", "--out-dir=data2"],
        &["compare", "out", "out"],
        &["completions", "bash"],
        &["man"],
        &["info"],
        &["info", "--json"],
        &["train", "--print-config"],
        &["train", "--dry-run", "--device=cpu", "--dataset=builtin"],
        &["doctor", "--device=cpu", "--json"],
    ];
    for args in commands {
        let output = unread(sandbox.command(args));
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", text(&output));
    }
}

#[test]
fn an_error_that_nobody_reads_keeps_its_exit_code() {
    let sandbox = Sandbox::new();
    let mut child = train(&sandbox, &["--n-head=0"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    assert_eq!(child.wait().unwrap().code(), Some(2));
}

#[cfg(target_os = "linux")]
#[test]
fn what_cannot_be_printed_is_an_error_and_stops_no_training() {
    let sandbox = Sandbox::new();
    let full = |args: &[&str]| {
        let device = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        sandbox.command(args).stdout(device).output().unwrap()
    };
    let output = full(&[&["train"], TINY].concat());
    assert!(output.status.success(), "{}", text(&output));
    let commands: &[&[&str]] = &[
        &["eval", "--out-dir=out", "--device=cpu"],
        &["sample", "--out-dir=out", "--device=cpu", "--max-new-tokens=3"],
        &["compare", "out", "out"],
        &["completions", "bash"],
        &["man"],
        &["info"],
        &["train", "--print-config"],
    ];
    for args in commands {
        refused(&full(args), 1, &["cannot write to standard output", "No space left"]);
    }
}

#[test]
fn a_torn_byte_costs_no_record_of_a_resumed_run() {
    let sandbox = Sandbox::new();
    sandbox.trained();
    let metrics = sandbox.path("out/metrics.jsonl");
    let before = fs::read(&metrics).unwrap();
    fs::write(&metrics, [&before[..], b"\xff\n"].concat()).unwrap();
    let output = sandbox.run(&["train", "--resume", "--out-dir=out", "--max-iters=5"]);
    assert!(output.status.success(), "{}", text(&output));
    let after = fs::read(&metrics).unwrap();
    assert!(after.starts_with(&before) && after.len() > before.len(), "{}", String::from_utf8_lossy(&after));
}

#[test]
fn a_run_that_could_save_nothing_does_not_begin() {
    for (place, words) in [
        ("out/checkpoints", "no checkpoint could be saved"),
        ("out/checkpoints/last", "is a file, where checkpoints go"),
    ] {
        let sandbox = Sandbox::new();
        sandbox.write(place, b"");
        let output = sandbox.train(&[]);
        refused(&output, 1, &["out", words]);
        assert!(!text(&output).contains("step 0"), "it trained: {}", text(&output));
        assert!(sandbox.train(&["--eval-only"]).status.success(), "an evaluation saves nothing");
    }
    let sandbox = Sandbox::new();
    sandbox.write("out/checkpoints/.last.tmp", b"left by somebody");
    sandbox.trained();
}

#[test]
fn the_best_checkpoint_survives_a_kill_between_the_renames() {
    let sandbox = Sandbox::new();
    sandbox.trained();
    let checkpoints = sandbox.path("out/checkpoints");
    fs::rename(checkpoints.join("best"), checkpoints.join(".best.old")).unwrap();
    let output = sandbox.run(&["eval", "--out-dir=out", "--device=cpu"]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(checkpoints.join("best").exists(), "last was taken for the best");
}

#[test]
fn weights_that_are_no_numbers_make_no_text() {
    let sandbox = Sandbox::new();
    sandbox.trained();
    let path = sandbox.path("out/checkpoints/last/model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[header..].chunks_exact_mut(4).for_each(|word| word.copy_from_slice(&f32::NAN.to_le_bytes()));
    fs::write(&path, bytes).unwrap();
    let output = sandbox.run(&["sample", "--out-dir=out", "--checkpoint=last", "--device=cpu"]);
    refused(&output, 1, &["logits are no numbers"]);
}

#[test]
fn bench_and_compare_look_at_their_flags_before_they_work() {
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.path("folder")).unwrap();
    let bench = |more: &[&str]| {
        let shape = ["--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=8", "--batch-size=2"];
        let rest = ["--gradient-accumulation-steps=1", "--dataset=builtin", "--device=cpu", "--no-peak"];
        sandbox.run(&[&["bench"], &shape[..], &rest[..], more].concat())
    };
    for flag in ["--iters", "--warmup"] {
        refused(&bench(&[&format!("{flag}=18446744073709551615")]), 2, &[flag, "at most 1000000000"]);
    }
    let output = bench(&["--iters=1", "--warmup=0", "--json=folder"]);
    refused(&output, 1, &["--json: cannot write folder"]);
    assert!(!text(&output).contains("ms/iter"), "it measured before: {}", text(&output));
    assert!(bench(&["--iters=1", "--warmup=0", "--json=new.json"]).status.success());

    sandbox.trained();
    for tolerance in ["nan", "inf", "-1"] {
        let output = sandbox.run(&["compare", "out", "out", &format!("--tolerance={tolerance}")]);
        refused(&output, 1, &["--tolerance", "finite number"]);
    }
    let devices = ["compare", "--devices=cpu,cpu", "--rounds=1", "--iters=1"];
    let output = sandbox.run(&[&devices[..], &["--html=folder"]].concat());
    refused(&output, 1, &["--html: cannot write folder"]);
    assert!(!text(&output).contains("round 1"), "it measured before: {}", text(&output));
    refused(&sandbox.run(&[&devices[..], &["--save=new.json"]].concat()), 1, &["--save: cannot create new.json"]);
    let output = sandbox.run(&["compare", "none.json", "out"]);
    refused(&output, 1, &["cannot read none.json"]);
    assert_eq!(text(&output).matches("os error").count(), 1, "the reason twice: {}", text(&output));
    let output = sandbox.run(&["train", "none.toml"]);
    assert_eq!(text(&output).matches("os error").count(), 1, "the reason twice: {}", text(&output));
}

#[test]
fn a_run_whose_iterations_took_no_time_is_refused() {
    let sandbox = Sandbox::new();
    sandbox.write("a.jsonl", "{\"step\":0,\"loss\":1.0,\"ms\":2.0}\n".repeat(9).as_bytes());
    for ms in ["0.0", "-1.0"] {
        sandbox.write("b.jsonl", format!("{{\"step\":0,\"loss\":1.0,\"ms\":{ms}}}\n").repeat(9).as_bytes());
        refused(&sandbox.run(&["compare", "a.jsonl", "b.jsonl"]), 1, &["b.jsonl:1: `ms` is", "above 0"]);
    }
}

#[test]
fn a_vocabulary_beyond_all_vocabularies_is_refused() {
    let sandbox = Sandbox::new();
    for name in ["d/train.bin", "d/val.bin"] {
        sandbox.write(name, &tokens(&[1; 100]));
    }
    sandbox.write("d/meta.json", br#"{"vocab_size": 1000000000000000000, "tokenizer": "gpt2"}"#);
    for mode in ["--eval-only=true", "--eval-only=false"] {
        refused(&ends(train(&sandbox, &["--dataset=d", mode])), 1, &["d/meta.json is broken", "vocab_size is 1000"]);
    }
}

#[cfg(unix)]
#[test]
fn a_pipe_is_no_token_file() {
    let sandbox = Sandbox::new();
    sandbox.write("d/val.bin", &tokens(&[1; 100]));
    assert!(Command::new("mkfifo").arg(sandbox.path("d/train.bin")).status().unwrap().success());
    refused(&ends(train(&sandbox, &["--dataset=d", "--vocab-size=10"])), 1, &["cannot read d/train.bin", "no file"]);
}

#[test]
fn a_prepare_that_fails_leaves_no_half_files() {
    let sandbox = Sandbox::new();
    sandbox.write("t.txt", "hello world\n".repeat(50).as_bytes());
    sandbox.write("d/val.bin/x", b"");
    refused(&sandbox.run(&["prepare", "t.txt", "--out-dir=d"]), 1, &["cannot write d/val.bin"]);
    let left = fs::read_dir(sandbox.path("d")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let left: Vec<_> = left.filter(|name| name.ends_with(".tmp")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_key_in_no_table_is_told_where_it_belongs() {
    let sandbox = Sandbox::new();
    sandbox.write("flat.toml", b"n_layer = 3\n");
    refused(&sandbox.run(&["train", "flat.toml"]), 2, &["flat.toml:1", "`n_layer`", "[model]"]);
    sandbox.write("wrong.toml", b"[train]\nbatch_size = 3\n");
    refused(&sandbox.run(&["train", "wrong.toml"]), 2, &["wrong.toml:2", "`batch_size`", "[data]"]);
}

#[test]
fn a_log_filter_that_is_none_is_refused() {
    let sandbox = Sandbox::new();
    let output = train(&sandbox, &[]).env("GPT_WGPU_LOG", "gpt_wgpu=lots").output().unwrap();
    refused(&output, 1, &["GPT_WGPU_LOG=gpt_wgpu=lots", "gpt_wgpu=debug"]);
}

/// Sends Ctrl-C once `ready` is in what it prints, and returns what became of it.
#[cfg(unix)]
fn interrupted(sandbox: &Sandbox, more: &[&str], ready: &str) -> (Output, bool) {
    let mut child = train(sandbox, more).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut printed = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains(ready) {
        line.clear();
        assert!(std::io::BufRead::read_line(&mut printed, &mut line).unwrap() > 0, "{ready} was not printed");
    }
    // The line comes before what it announces.
    std::thread::sleep(Duration::from_millis(200));
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let drain = std::thread::spawn(move || std::io::copy(&mut printed, &mut std::io::sink()));
    let started = Instant::now();
    let mut ended = true;
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            ended = false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    drain.join().unwrap().unwrap();
    (child.wait_with_output().unwrap(), ended)
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_what_has_nothing_to_save() {
    let sandbox = Sandbox::new();
    let (output, ended) = interrupted(&sandbox, &["--sample-tokens=1000000000"], "---------------");
    assert!(ended, "the sample went on");
    assert_eq!(output.status.code(), Some(0), "the training before the sample is done and saved");
    let (output, ended) =
        interrupted(&sandbox, &["--eval-only", "--eval-iters=1000000", "--batch-size=64"], "tokens per iteration");
    assert!(ended, "the evaluation went on");
    assert_eq!(output.status.code(), Some(130));
}
