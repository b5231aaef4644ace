//! The built binary: configuration, files it writes, and what it says to bad input. No panic may reach a user.

#[path = "common/sandbox.rs"]
mod sandbox;

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use sandbox::{Sandbox, TINY, refused, text, tokens};

#[test]
fn the_start_is_taken_apart_when_the_log_asks_for_it() {
    let sandbox = Sandbox::new();
    let args = [&["train"], TINY].concat();
    let output = sandbox.command(&args).env("GPT_WGPU_LOG", "gpt_wgpu=debug").output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    let line = told.lines().find(|line| line.contains("start to first step")).unwrap_or_else(|| panic!("{told}"));
    let parts = ["data ", "weights ", "evaluation ", "first step "];
    let places: Vec<_> = parts.iter().map(|part| line.rfind(part)).collect();
    assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{line}");
    assert!(!text(&sandbox.train(&[])).contains("start to first step"), "told unasked");
}

#[test]
fn training_writes_nanogpts_lines_metrics_config_and_both_checkpoints() {
    let sandbox = Sandbox::new();
    let output = sandbox.train(&[]);
    let printed = text(&output);
    assert!(output.status.success(), "{printed}");
    for line in ["device: CPU", "tokens per iteration will be: 16", "number of parameters:", "step 0: train loss 4."] {
        assert!(printed.contains(line), "no {line:?} in {printed}");
    }
    let iter = printed.lines().find(|line| line.starts_with("iter 3: loss ")).expect("iter 3");
    for part in ["time ", "ms, mfu ", "%, ", " tok/s"] {
        assert!(iter.contains(part), "{iter}");
    }
    assert!(!printed.contains('\u{1b}'), "escape codes in a pipe");
    let metrics = std::fs::read_to_string(sandbox.path("out/metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().count(), 3 + 5, "evaluations at 0, 2, 4 and five iterations: {metrics}");
    for key in ["\"loss\":", "\"val_loss\":", "\"lr\":", "\"grad_norm\":", "\"ms\":", "\"tokens_per_s\":", "\"mfu\":"] {
        assert!(metrics.contains(key), "{key}");
    }
    for file in ["model.safetensors", "optimizer.safetensors", "state.json", "config.json", "meta.json"] {
        for name in ["last", "best"] {
            assert!(sandbox.path("out/checkpoints").join(name).join(file).exists(), "{name}/{file}");
        }
    }
    assert!(std::fs::read_to_string(sandbox.path("out/config.toml")).unwrap().contains("n_embd = 16"));
}

#[test]
fn quiet_prints_nothing() {
    let sandbox = Sandbox::new();
    let output = sandbox.train(&["--quiet"]);
    assert!(output.status.success());
    assert_eq!(text(&output), "");
}

#[test]
fn flags_win_over_the_file_and_the_file_over_defaults() {
    let sandbox = Sandbox::new();
    sandbox.write("c.toml", b"[model]\nn_layer = 3\nn_embd = 96\n");
    let output = sandbox.run(&["train", "c.toml", "--n_embd=48", "--bias=True", "--print-config"]);
    let printed = text(&output);
    assert!(output.status.success(), "{printed}");
    for line in ["n_layer = 3", "n_embd = 48", "n_head = 12", "bias = true", "# Number of blocks"] {
        assert!(printed.contains(line), "no {line:?} in {printed}");
    }
}

#[test]
fn bad_configurations_name_file_line_and_remedy() {
    let sandbox = Sandbox::new();
    sandbox.write("typo.toml", b"[model]\n\nn_layers = 3\n");
    refused(&sandbox.run(&["train", "typo.toml"]), 2, &["typo.toml:3", "unknown key `n_layers`", "`n_layer`"]);
    sandbox.write("type.toml", b"[optim]\nbeta1 = \"high\"\n");
    refused(&sandbox.run(&["train", "type.toml"]), 2, &["type.toml:2", "invalid type"]);
    sandbox.write("broken.toml", b"[optim\n");
    refused(&sandbox.run(&["train", "broken.toml"]), 2, &["broken.toml:1"]);
    refused(&sandbox.run(&["train", "none.toml"]), 2, &["cannot read the configuration none.toml"]);
    refused(&sandbox.run(&["train", "--n-layers=3"]), 2, &["--n-layers", "--n-layer"]);
    refused(&sandbox.run(&["train", "--n_layer=x"]), 2, &["n-layer", "x"]);
    refused(&sandbox.train(&["--n-embd=15"]), 2, &["n_embd = 15", "multiple of n_head = 2"]);
    refused(&sandbox.train(&["--n-head=0"]), 2, &["n_head = 0", "at least 1"]);
    refused(&sandbox.train(&["--batch-size=0"]), 2, &["batch_size = 0"]);
    refused(&sandbox.train(&["--dropout=1.0"]), 2, &["dropout = 1", "less than 1"]);
    refused(&sandbox.train(&["--learning-rate=-1"]), 2, &["learning_rate = -1"]);
}

#[test]
fn devices_that_do_not_exist_are_refused_with_a_hint() {
    let sandbox = Sandbox::new();
    refused(&sandbox.train(&["--device=cuda"]), 1, &["--device cuda", "metal, vulkan, dx12"]);
    refused(&sandbox.train(&["--device=vulkan:99"]), 1, &["vulkan"]);
    if !cfg!(windows) {
        refused(&sandbox.train(&["--device=dx12"]), 1, &["no dx12 adapter", "Windows", "gpt-wgpu info"]);
    }
}

#[test]
fn bad_data_is_refused() {
    let sandbox = Sandbox::new();
    let good = tokens(&[1; 100]);
    let case = |train: &[u8], val: &[u8], more: &[&str], parts: &[&str]| {
        sandbox.write("d/train.bin", train);
        sandbox.write("d/val.bin", val);
        refused(&sandbox.train(&[&["--dataset=d", "--vocab-size=10"], more].concat()), 1, parts);
    };
    case(&[], &good, &[], &["train.bin", "empty"]);
    case(&[1, 0, 1], &good, &[], &["train.bin", "odd"]);
    case(&good, &tokens(&[1, 2, 3]), &[], &["val.bin", "block_size"]);
    case(&tokens(&[&[1; 50][..], &[10]].concat()), &good, &[], &["train.bin", "10"]);
    case(&good, &good, &["--block-size=200"], &["train.bin", "200"]);
    std::fs::remove_file(sandbox.path("d/val.bin")).unwrap();
    refused(&sandbox.train(&["--dataset=d"]), 1, &["val.bin"]);
    refused(&sandbox.train(&["--dataset=nowhere"]), 1, &["no dataset nowhere", "gpt-wgpu prepare"]);
    refused(&sandbox.train(&["--dataset=shakespeare_char"]), 1, &["shakespeare_char", "--dataset=builtin"]);
}

#[test]
fn without_a_network_bare_train_says_so_and_uses_the_builtin_corpus() {
    let sandbox = Sandbox::new();
    let flags: Vec<_> = TINY.iter().copied().filter(|flag| *flag != "--dataset=builtin").collect();
    let output = sandbox.run(&[&["train"], &flags[..]].concat());
    assert!(output.status.success(), "{}", text(&output));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("no shakespeare_char") && stderr.contains("built-in corpus"), "{stderr}");
    assert!(sandbox.path("data/builtin/train.bin").exists());
}

#[test]
fn nanogpts_bin_files_train_as_they_are() {
    let sandbox = Sandbox::new();
    sandbox.write("data/mine/train.bin", &tokens(&[3; 200]));
    sandbox.write("data/mine/val.bin", &tokens(&[3; 50]));
    let output = sandbox.train(&["--dataset=mine", "--vocab_size=7"]);
    assert!(output.status.success(), "{}", text(&output));
    refused(&sandbox.run(&["sample", "--out-dir=out", "--device=cpu"]), 1, &["meta.json", "tokenizer"]);
}

#[test]
fn prepare_takes_text_and_refuses_what_is_none() {
    let sandbox = Sandbox::new();
    sandbox.write(
        "poem.txt",
        "Über allen Gipfeln ist Ruh, in allen Wipfeln spürest du kaum einen Hauch. ".repeat(20).as_bytes(),
    );
    let output = sandbox.run(&["prepare", "poem.txt"]);
    assert!(output.status.success(), "{}", text(&output));
    let meta = std::fs::read_to_string(sandbox.path("data/poem/meta.json")).unwrap();
    assert!(meta.contains("\"tokenizer\": \"char\"") && meta.contains('Ü'), "{meta}");
    sandbox.write("latin1.txt", b"abc\xfcdef");
    refused(&sandbox.run(&["prepare", "latin1.txt"]), 1, &["latin1.txt", "UTF-8"]);
    sandbox.write("empty.txt", b"");
    refused(&sandbox.run(&["prepare", "empty.txt"]), 1, &["empty"]);
    refused(&sandbox.run(&["prepare", "none.txt"]), 1, &["none.txt"]);
}

#[test]
fn an_unwritable_out_dir_is_refused() {
    let sandbox = Sandbox::new();
    sandbox.write("file", b"");
    refused(&sandbox.train(&["--out-dir=file/out"]), 1, &["out_dir", "file/out"]);
}

#[test]
fn a_resumed_run_goes_on_computing_again_and_ends_with_the_same_weights() {
    let weights = |sandbox: &Sandbox| std::fs::read(sandbox.path("out/checkpoints/last/model.safetensors")).unwrap();
    let flags = ["--max-iters=6", "--gradient-accumulation-steps=2", "--dropout=0.1"];
    let (kept, again) = (Sandbox::new(), Sandbox::new());
    assert!(kept.train(&flags).status.success());
    let output = again.train(&[&flags[1..], &["--recompute=block"]].concat());
    assert!(output.status.success(), "{}", text(&output));
    assert!(weights(&kept) != weights(&again), "four of six iterations");
    std::fs::remove_file(again.path("out/config.toml")).unwrap();
    let output = again.run(&["train", "--resume", "--out-dir=out", "--max-iters=6"]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(std::fs::read_to_string(again.path("out/config.toml")).unwrap().contains("recompute = \"block\""));
    assert!(weights(&kept) == weights(&again));
    refused(&again.train(&["--recompute=all"]), 2, &["--recompute", "none, attention_mlp, block"]);
}

#[test]
fn resume_goes_on_and_refuses_contradictions() {
    let sandbox = Sandbox::new();
    refused(&sandbox.run(&["train", "--resume", "--out-dir=none"]), 1, &["no checkpoint", "none"]);
    sandbox.trained();
    let output = sandbox.run(&["train", "--resume", "--out-dir=out", "--max-iters=6"]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("iter 6: ") && !text(&output).contains("iter 4: "), "{}", text(&output));
    refused(&sandbox.run(&["train", "--resume", "--out-dir=out"]), 1, &["max_iters"]);
    let contradiction = sandbox.run(&["train", "--resume", "--out-dir=out", "--n-embd=32", "--max-iters=9"]);
    refused(&contradiction, 1, &["n_embd = 32 contradicts", "n_embd = 16"]);
    sandbox.write("c.toml", b"[model]\nn_layer = 5\n[train]\nout_dir = \"out\"\n");
    refused(&sandbox.run(&["train", "c.toml", "--resume"]), 1, &["contradicts the checkpoint"]);
}

#[test]
fn damaged_checkpoints_are_refused() {
    let sandbox = Sandbox::new();
    sandbox.trained();
    let resume = || sandbox.run(&["train", "--resume", "--out-dir=out", "--max-iters=6"]);
    let last = "out/checkpoints/last/";
    let damage = |name: &str, change: &dyn Fn(&mut Vec<u8>), parts: &[&str]| {
        let path = sandbox.path(&format!("{last}{name}"));
        let good = std::fs::read(&path).unwrap();
        let mut bad = good.clone();
        change(&mut bad);
        std::fs::write(&path, bad).unwrap();
        refused(&resume(), 1, parts);
        std::fs::write(&path, good).unwrap();
    };
    damage("model.safetensors", &|b| b.truncate(b.len() / 2), &["model.safetensors", "damaged"]);
    damage("model.safetensors", &|b| b.clear(), &["model.safetensors"]);
    damage("optimizer.safetensors", &|b| b.truncate(30), &["optimizer.safetensors", "damaged"]);
    damage("state.json", &|b| b.truncate(20), &["state.json", "damaged"]);
    damage("state.json", &|b| *b = b"{}".to_vec(), &["state.json"]);
    let foreign = safetensors::serialize(
        [("x", safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1], &[0; 4]).unwrap())],
        None,
    )
    .unwrap();
    damage("model.safetensors", &|b| *b = foreign.clone(), &["wte.weight is missing"]);
    std::fs::remove_file(sandbox.path(&format!("{last}model.safetensors"))).unwrap();
    refused(&resume(), 1, &["model.safetensors"]);
}

#[test]
fn a_kill_between_the_renames_leaves_a_checkpoint() {
    let sandbox = Sandbox::new();
    sandbox.trained();
    let checkpoints = sandbox.path("out/checkpoints");
    std::fs::rename(checkpoints.join("last"), checkpoints.join(".last.old")).unwrap();
    let output = sandbox.run(&["train", "--resume", "--out-dir=out", "--max-iters=6"]);
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn a_kill_at_any_moment_leaves_a_loadable_checkpoint() {
    let args = [&["train"], TINY, &["--max-iters=100000", "--eval-interval=1"]].concat();
    for wait in [1, 37, 111, 190] {
        let sandbox = Sandbox::new(); // counted from its first checkpoint
        let mut child = sandbox.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let saved = sandbox.path("out/checkpoints/last");
        let started = Instant::now();
        while !saved.exists() && started.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(wait));
        child.kill().unwrap();
        child.wait().unwrap();
        let output = sandbox.run(&["eval", "--out-dir=out", "--checkpoint=last", "--device=cpu"]);
        assert!(output.status.success(), "after {wait} ms: {}", text(&output));
    }
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_and_names_the_checkpoint() {
    let sandbox = Sandbox::new();
    let output = sandbox.train(&["--learning-rate=1e30", "--warmup-iters=0", "--grad-clip=0", "--max-iters=50"]);
    refused(&output, 1, &["at iteration", "is NaN", "checkpoint"]);
}

#[cfg(unix)]
#[test]
fn ctrl_c_finishes_the_step_saves_and_exits_130() {
    let sandbox = Sandbox::new();
    let args = [&["train"], TINY, &["--max-iters=100000", "--eval-interval=1000000"]].concat();
    let child = sandbox.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let metrics = sandbox.path("out/metrics.jsonl");
    let started = Instant::now();
    let trains = || std::fs::read_to_string(&metrics).is_ok_and(|text| text.contains("grad_norm"));
    while !trains() && started.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(20));
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    refused(&output, 130, &["interrupted; saved to", "--resume"]);
    assert!(Path::new(&sandbox.path("out/checkpoints/last/state.json")).exists());
}

/// RLIMIT_FSIZE makes writes fail as a full disk does, with another errno.
#[cfg(unix)]
#[test]
fn a_full_disk_while_saving_keeps_the_previous_checkpoint() {
    let sandbox = Sandbox::new();
    sandbox.trained();
    let before = std::fs::read(sandbox.path("out/checkpoints/last/model.safetensors")).unwrap();
    let output = sandbox::program::limited("trap '' XFSZ; ulimit -f 8", env!("CARGO_BIN_EXE_gpt-wgpu"))
        .args(["train", "--resume", "--out-dir=out", "--max-iters=8"])
        .current_dir(sandbox.0.path())
        .output()
        .unwrap();
    refused(&output, 1, &["was not saved", "previous checkpoint", "model.safetensors"]);
    assert!(before == std::fs::read(sandbox.path("out/checkpoints/last/model.safetensors")).unwrap());
    let output = sandbox.run(&["train", "--resume", "--out-dir=out", "--max-iters=8"]);
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn sample_is_reproducible_streams_text_and_checks_its_prompt() {
    let sandbox = Sandbox::new();
    sandbox.trained();
    let sample = |more: &[&str]| {
        let fixed = ["sample", "--out-dir=out", "--device=cpu", "--num_samples=2", "--max_new_tokens=30"];
        sandbox.run(&[&fixed[..], more].concat())
    };
    let first = sample(&["--start=Anna"]);
    assert!(first.status.success(), "{}", text(&first));
    assert!(text(&first).starts_with("Anna") && text(&first).matches("---------------").count() == 2);
    assert_eq!(first.stdout, sample(&["--start=Anna"]).stdout);
    assert_ne!(first.stdout, sample(&["--start=Anna", "--seed=2"]).stdout);
    sandbox.write("prompt.txt", b"Anna");
    assert_eq!(first.stdout, sample(&["--start=FILE:prompt.txt"]).stdout);
    refused(&sample(&["--start=FILE:none.txt"]), 1, &["cannot read the prompt none.txt"]);
    refused(&sample(&["--start="]), 1, &["prompt is empty"]);
    refused(&sample(&["--start=\u{4e16}"]), 1, &["\u{4e16}"]);
    refused(&sample(&["--temperature=-1"]), 1, &["--temperature -1"]);
    refused(&sandbox.run(&["sample", "--out-dir=nothing"]), 1, &["no checkpoint"]);
}

#[test]
fn eval_reports_the_losses_of_a_checkpoint() {
    let sandbox = Sandbox::new();
    sandbox.trained();
    let output = sandbox.run(&["eval", "--out-dir=out", "--device=cpu", "--eval_iters=3", "--json"]);
    assert!(output.status.success(), "{}", text(&output));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(json["val_loss"].as_f64().unwrap() > 1.0, "{json}");
}

#[test]
fn weights_of_a_checkpoint_start_a_new_run() {
    let sandbox = Sandbox::new();
    sandbox.trained();
    let output = sandbox.train(&["--init-from=out/checkpoints/best", "--out-dir=out2", "--n-embd=16"]);
    assert!(output.status.success(), "{}", text(&output));
    refused(&sandbox.train(&["--init-from=nowhere"]), 1, &["init_from = nowhere", "scratch, resume"]);
}

#[test]
fn info_prints_a_table_and_json() {
    let sandbox = Sandbox::new();
    let output = sandbox.run(&["info"]);
    assert!(output.status.success() && text(&output).contains("--device auto takes"), "{}", text(&output));
    let output = sandbox.run(&["info", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(json["adapters"].is_array() && json["cpu_threads"].as_u64().unwrap() > 0);
}

#[test]
fn completions_and_the_manual_name_every_command() {
    let sandbox = Sandbox::new();
    for args in [&["completions", "bash"][..], &["completions", "zsh"], &["man"]] {
        let output = sandbox.run(args);
        assert!(output.status.success(), "{}", text(&output));
        for command in ["train", "sample", "eval", "prepare", "bench", "compare", "doctor", "info"] {
            assert!(text(&output).contains(command), "{args:?}: {command}");
        }
    }
}

/// Lines such as `  total   12.3 MiB` by their names.
fn amounts(printed: &str) -> std::collections::BTreeMap<String, f64> {
    let amount = |line: &str| {
        let (name, bytes) = line.strip_suffix(" MiB")?.rsplit_once(' ')?;
        Some((name.trim().to_string(), bytes.parse().ok()?))
    };
    printed.lines().filter_map(amount).collect()
}

#[test]
fn a_dry_run_prints_what_the_run_takes_and_begins_nothing() {
    let sandbox = Sandbox::new();
    let output = sandbox.train(&["--dry-run", "--vocab-size=65"]);
    let printed = text(&output);
    assert!(output.status.success(), "{printed}");
    let amounts = amounts(&printed);
    let parts = ["parameters", "gradients", "optimizer", "activations", "workspace", "rests of pages"];
    let sum: f64 =
        parts.iter().map(|part| amounts.get(*part).unwrap_or_else(|| panic!("no {part} in {printed}"))).sum();
    assert!((sum - amounts["total"]).abs() < 0.5, "{printed}");
    assert!(printed.contains("largest batch_size that fits: ") && printed.contains("all memory of this computer"));
    assert!(!sandbox.path("out").exists() && !sandbox.path("data").exists(), "it wrote something");
    for (dataset, vocab) in [("openwebtext", "50304"), ("shakespeare_char", "65")] {
        let output = sandbox.train(&["--dry-run", "--dataset", dataset]);
        let printed = text(&output);
        assert!(output.status.success() && printed.contains(&format!("taken to be {vocab}")), "{printed}");
    }
    let expected = sandbox.train(&["--dry-run"]);
    sandbox.trained();
    let known = sandbox.train(&["--dry-run"]);
    let last = |output: &Output| text(output).lines().rev().take(9).map(String::from).collect::<Vec<_>>();
    assert_eq!(last(&expected), last(&known), "the built-in corpus's vocabulary");
}

#[test]
fn a_run_that_cannot_fit_is_refused_with_settings_that_fit() {
    let sandbox = Sandbox::new();
    let large = ["--batch-size=1048576", "--block-size=2048", "--n-embd=64", "--vocab-size=65"];
    for more in [&["--dry-run"][..], &[]] {
        let output = sandbox.train(&[&large[..], more].concat());
        refused(
            &output,
            1,
            &["this run needs about", "the device has", "batch_size = ", "gradient_accumulation_steps = "],
        );
        assert!(!sandbox.path("out").exists(), "a refused run began");
    }
}
