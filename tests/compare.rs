//! `compare` over fixture reports and runs: what is refused, what the verdicts say, what a browser shows.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use gpt_wgpu::compare::{self, CompareError, Comparison, Loaded, Options, Render, RunComparison, Verdict};
use gpt_wgpu::report::{BenchConfig, BenchReport, Device, Dtype, Machine, Timer};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn load(names: &[&str]) -> Result<Loaded, CompareError> {
    compare::load(&names.iter().map(|name| fixture(name)).collect::<Vec<_>>())
}

fn try_reports(names: &[&str], options: &Options) -> Result<Comparison, CompareError> {
    match load(names)? {
        Loaded::Reports(reports) => compare::compare_reports(&reports, options),
        Loaded::Runs(_) => panic!("{names:?} were taken for runs"),
    }
}

fn reports(names: &[&str]) -> Comparison {
    try_reports(names, &Options::default()).unwrap()
}

fn try_runs(names: &[&str]) -> Result<RunComparison, CompareError> {
    match load(names)? {
        Loaded::Runs(runs) => compare::compare_runs(&runs, &Options::default()),
        Loaded::Reports(_) => panic!("{names:?} were taken for reports"),
    }
}

fn runs(names: &[&str]) -> RunComparison {
    try_runs(names).unwrap()
}

/// The error of comparing these files, as the user reads it, without the folder.
fn refusal(names: &[&str]) -> String {
    let paths: Vec<PathBuf> = names.iter().map(|name| fixture(name)).collect();
    let error = compare::compare(&paths, &Options::default()).err().expect("compared what does not compare");
    let folder = format!("{}/", fixture("").display()).replace("//", "/");
    error.to_string().replace(&folder, "")
}

fn sample_report() -> BenchReport {
    BenchReport::new(
        Machine { os: "OS".into(), arch: "aarch64".into(), cpu: "CPU".into(), threads: 8 },
        Device { backend: gpt_wgpu::report::Backend::Metal, name: "GPU".into(), driver: None, memory_bytes: None },
        Dtype::Fp16,
        BenchConfig {
            n_layer: 2,
            n_head: 2,
            n_embd: 64,
            block_size: 32,
            vocab_size: 65,
            dropout: 0.1,
            bias: true,
            gelu: "tanh".into(),
            batch_size: 4,
            gradient_accumulation_steps: 2,
        },
        3,
        vec![4.0, 2.0, 3.0, 5.0],
        Timer::Timestamps,
    )
}

#[test]
fn a_report_is_read_as_it_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("report.json");
    let report = sample_report();
    assert_eq!((report.median_ms, report.min_ms, report.max_ms), (3.5, 2.0, 5.0));
    assert_eq!(report.tokens_per_s, 2.0 * 4.0 * 32.0 / 3.5e-3);
    report.write(&path).unwrap();
    assert_eq!(BenchReport::read(&path).unwrap(), report);
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains("\"dtype\": \"fp16\"") && text.contains("\"timer\": \"timestamp queries\""), "{text}");
    assert!(text.contains("\"energy\": null"), "what was not measured is null, not absent: {text}");
}

#[test]
fn every_fixture_survives_a_round_trip() {
    for name in ["vulkan.json", "pytorch_faster.json", "metal_overlapping.json", "hostile.json", "minimal.json"] {
        let report = BenchReport::read(&fixture(name)).unwrap();
        assert_eq!(BenchReport::parse(&report.to_json().unwrap(), name).unwrap(), report, "{name}");
    }
}

/// The README's tables of peers are what `compare` prints, and nothing else.
#[test]
fn the_readmes_tables_are_made_from_the_reports_beside_it() {
    let tables: [(&str, &[&str]); 3] = [
        ("peers-2cores/", &["gpt-wgpu-cpu", "pytorch-cpu", "mlx-cpu", "gpt-wgpu-lavapipe"]),
        ("h200/char-", &["f16", "coop", "scalar", "pt-fp32", "pt-tf32", "pt-bf16", "pt-bf16-compile"]),
        ("h200/gpt2-", &["f16", "coop", "scalar", "pt-fp32", "pt-tf32", "pt-bf16", "pt-bf16-compile"]),
    ];
    for (beginning, names) in tables {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/measurements");
        let paths: Vec<PathBuf> = names.iter().map(|name| folder.join(format!("{beginning}{name}.json"))).collect();
        let options = Options { across_dtypes: beginning.starts_with("h200"), ..Options::default() };
        let markdown = compare::compare(&paths, &options).unwrap().markdown();
        assert!(include_str!("../README.md").contains(markdown.trim_end()), "{markdown}");
    }
}

#[test]
fn what_a_peer_leaves_out_has_a_default() {
    let report = BenchReport::read(&fixture("minimal.json")).unwrap();
    assert_eq!((report.config.gelu.as_str(), report.config.gradient_accumulation_steps), ("erf", 1));
    assert_eq!((report.dtype, report.ops, report.peak_memory_bytes), (Dtype::Fp32, None, None));
    reports(&["vulkan.json", "minimal.json"]);
}

#[test]
fn the_documented_example_is_a_report() {
    let text = include_str!("../docs/bench-schema.md");
    let example = text.split("```json").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    BenchReport::parse(example, "docs/bench-schema.md").unwrap();
}

#[test]
fn every_key_that_is_written_is_documented() {
    let documented = include_str!("../docs/bench-schema.md");
    let report = serde_json::to_value(BenchReport::read(&fixture("vulkan.json")).unwrap()).unwrap();
    let mut objects = vec![&report];
    let mut keys = 0;
    while let Some(value) = objects.pop() {
        objects.extend(value.as_array().into_iter().flatten());
        for (key, value) in value.as_object().into_iter().flatten() {
            let words = [format!("`{key}`"), format!("`{key}."), format!("machine.{key}`"), format!("device.{key}`")];
            assert!(words.iter().any(|word| documented.contains(word)), "{key}");
            objects.push(value);
            keys += 1;
        }
    }
    assert!(keys > 50, "only {keys} keys");
}

#[test]
fn a_report_without_samples_is_not_written() {
    let mut report = sample_report();
    report.samples_ms.clear();
    assert!(report.to_json().unwrap_err().to_string().contains("`samples_ms` is empty"));
}

#[test]
fn other_configurations_are_refused_key_by_key() {
    assert_eq!(
        refusal(&["vulkan.json", "other_config.json", "metal_overlapping.json"]),
        "these reports do not compare, because they measured different things:\n  \
         n_layer: 6 in vulkan.json, 12 in other_config.json\n  \
         batch_size: 64 in vulkan.json, 32 in other_config.json"
    );
}

#[test]
fn other_dtypes_are_refused_unless_they_are_asked_for() {
    let names = ["vulkan.json", "other_dtype.json"];
    let text = refusal(&names);
    assert!(text.contains("dtype: fp32 in vulkan.json, bf16 in other_dtype.json (--across-dtypes"), "{text}");
    let comparison = try_reports(&names, &Options { across_dtypes: true, ..Options::default() }).unwrap();
    assert_eq!(comparison.rows[1].label, "gpt-wgpu vulkan, bf16");
    assert!(comparison.text().contains("The dtypes differ"));
}

#[test]
fn other_schemas_and_versions_are_refused_with_what_is_expected() {
    let text = refusal(&["vulkan.json", "other_schema.json"]);
    assert!(text.starts_with("other_schema.json: ") && text.contains("\"hyperfine\""), "{text}");
    assert!(text.contains("expected \"schema\": \"gpt-wgpu-bench\", \"version\": 1"), "{text}");
    let text = refusal(&["vulkan.json", "version_2.json"]);
    assert!(text.starts_with("version_2.json: ") && text.contains("version is 2"), "{text}");
    assert!(text.contains("reads version 1 only"), "{text}");
}

#[test]
fn damaged_json_is_named_by_line_and_column() {
    for (name, start) in [
        ("damaged.json", "damaged.json:20:2: damaged JSON: expected `,` or `}`"),
        ("truncated.json", "truncated.json:"),
        ("missing_key.json", "missing_key.json:"),
        ("run_damaged.jsonl", "run_damaged.jsonl:7:"),
        ("no_such_file.json", "cannot read no_such_file.json: "),
        ("contradiction.json", "contradiction.json: the report contradicts itself: `median_ms` is 3.14, "),
    ] {
        let text = refusal(&["vulkan.json", name]);
        assert!(text.starts_with(start), "{name}: {text}");
    }
    assert!(refusal(&["truncated.json", "vulkan.json"]).contains("the file ends too early"));
    assert!(refusal(&["missing_key.json", "vulkan.json"]).contains("missing field `timer`"));
    let folder = tempfile::tempdir().unwrap();
    for (text, expected) in [("[1]", "expected a JSON object"), ("", "ends too early"), ("{}", "no key `schema`")] {
        let path = folder.path().join("x.json");
        fs::write(&path, text).unwrap();
        let error = compare::load(&[&path]).unwrap_err().to_string();
        assert!(error.contains(expected), "{text:?}: {error}");
    }
    fs::write(folder.path().join("x.json"), [0xff, 0xfe]).unwrap();
    assert!(compare::load(&[folder.path().join("x.json")]).unwrap_err().to_string().contains("not UTF-8"));
}

#[test]
fn reports_and_runs_do_not_mix() {
    let text = refusal(&["run_a.jsonl", "vulkan.json"]);
    assert!(text.starts_with("vulkan.json is a bench report and run_a.jsonl is a training run"), "{text}");
    assert!(refusal(&["vulkan.json"]).contains("at least two files"));
    assert!(refusal(&["run_a.jsonl"]).contains("at least two files"));
    assert!(refusal(&[]).contains("at least two files"));
}

#[test]
fn ranges_that_overlap_are_no_difference() {
    let comparison = reports(&["vulkan.json", "metal_overlapping.json"]);
    let row = &comparison.rows[1];
    assert_ne!(row.spread.median, comparison.rows[0].spread.median);
    assert_eq!(row.verdict, Verdict::NoDifference);
    let text = comparison.text();
    assert!(text.starts_with("B (gpt-wgpu metal) and A (gpt-wgpu vulkan) show no difference"), "{text}");
    assert!(!text.contains("faster") && !text.contains("slower"), "{text}");
}

#[test]
fn ranges_apart_are_a_difference_in_both_directions() {
    let comparison = reports(&["vulkan.json", "pytorch_faster.json"]);
    let Verdict::Faster(ratio) = comparison.rows[1].verdict else { panic!("{:?}", comparison.rows[1].verdict) };
    assert!((1.40..1.44).contains(&ratio) && comparison.rows[1].ratio == ratio);
    let text = comparison.text();
    assert!(text.starts_with("B (pytorch cuda) is 1.42x faster than A (gpt-wgpu vulkan): 22."), "{text}");
    let text = reports(&["pytorch_faster.json", "vulkan.json"]).text();
    assert!(text.starts_with("B (gpt-wgpu vulkan) is 1.42x slower than A (pytorch cuda): 31."), "{text}");
}

#[test]
fn three_samples_are_too_few_for_a_verdict() {
    let comparison = reports(&["vulkan.json", "few_samples.json"]);
    assert_eq!(comparison.rows[1].verdict, Verdict::TooFewSamples);
    assert!(comparison.text().contains("no verdict"));
}

#[test]
fn a_spread_ignores_a_single_hiccup_and_equal_medians_are_equal() {
    let spread = |samples: &[f64]| compare::Spread::of(samples).unwrap();
    let mut hiccup = vec![10.0; 39];
    hiccup.push(1000.0);
    assert_eq!(compare::judge(&spread(&[20.0; 8]), &spread(&hiccup)), Verdict::Faster(2.0));
    assert_eq!(compare::judge(&spread(&[10.0; 8]), &spread(&[10.001; 8])), Verdict::NoDifference);
}

#[test]
fn tables_fit_the_terminal_and_markdown_has_a_row_a_report() {
    let all = ["vulkan.json", "pytorch_faster.json", "metal_overlapping.json", "few_samples.json", "hostile.json"];
    let comparison = reports(&all);
    let text = comparison.text();
    assert!(text.lines().all(|line| line.chars().count() <= 110), "{text}");
    assert!(!text.contains('\u{1b}'), "a report must not be able to drive the terminal");
    assert!(text.contains("1.30 GiB") && text.contains("5.670"), "memory and J/iter: {text}");
    let markdown = comparison.markdown();
    let rows: Vec<&str> = markdown.lines().filter(|line| line.starts_with("| ")).collect();
    assert_eq!(rows.len(), 1 + all.len(), "{markdown}");
    let cells = |line: &str| line.replace("\\|", "").matches('|').count();
    assert!(rows.iter().all(|row| cells(row) == cells(rows[0])), "{markdown}");
    assert!(!markdown.contains("<script>"), "{markdown}");
    let markdown = runs(&["run_a.jsonl", "run_b.jsonl"]).markdown();
    let rows: Vec<&str> = markdown.lines().filter(|line| line.starts_with("| ")).collect();
    assert!(rows.len() == 3 && rows.iter().all(|row| cells(row) == cells(rows[0])), "{markdown}");
}

#[test]
fn a_divergence_starts_where_it_exceeds_the_tolerance() {
    let comparison = runs(&["run_a.jsonl", "run_b.jsonl"]);
    let [a, b] = comparison.rows.as_slice() else { panic!() };
    assert!(a.divergence.is_none());
    let divergence = b.divergence.as_ref().unwrap();
    assert_eq!((divergence.common, divergence.starts), (51, Some(240)));
    let by_hand = a.train.iter().map(|(step, loss)| ((loss - b.train[step]).abs(), *step));
    let (largest, step) = by_hand.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
    assert_eq!((divergence.largest, divergence.largest_step), (largest, step));
    assert_eq!(a.final_val().map(|(step, _)| step), Some(500));
    assert_eq!(a.best_val().map(|(step, _)| step), Some(400), "the fixture's val loss rises at the end");
    assert!((31.0..31.8).contains(&a.ms.unwrap().median));
    assert!(matches!(b.verdict, Some(Verdict::Faster(_))));
    assert!(comparison.text().contains("parts from A (run_a) at step 240"), "{}", comparison.text());
    assert!(comparison.text().lines().all(|line| line.chars().count() <= 110), "{}", comparison.text());

    let loose = Options { tolerance: 0.5, ..Options::default() };
    let Loaded::Runs(loaded) = load(&["run_a.jsonl", "run_b.jsonl"]).unwrap() else { panic!() };
    assert_eq!(compare::compare_runs(&loaded, &loose).unwrap().rows[1].divergence.as_ref().unwrap().starts, None);
}

#[test]
fn equal_runs_are_called_equal() {
    let comparison = runs(&["run_a.jsonl", "run_equal.jsonl"]);
    assert!(comparison.text().contains("are equal at all 51 steps in common"), "{}", comparison.text());
    assert!(comparison.html().contains("run_equal") && comparison.svg().contains("run_equal"));
}

#[test]
fn runs_without_a_common_step_are_refused() {
    let text = refusal(&["run_a.jsonl", "run_no_common_step.jsonl"]);
    assert!(text.contains("no step in common") && text.contains("51 steps from 0 to 500"), "{text}");
}

#[test]
fn a_loss_that_is_not_finite_is_told_and_an_unfinished_line_is_left_out() {
    let comparison = runs(&["run_a.jsonl", "run_not_finite.jsonl"]);
    assert_eq!(comparison.rows[1].not_finite, Some(70));
    assert!(comparison.text().contains("The loss of B (run_not_finite) was not finite at step 70"));
}

#[test]
fn a_run_is_found_in_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let mut folders = Vec::new();
    for (name, source) in [("out-metal", "run_a.jsonl"), ("out-vulkan", "run_b.jsonl")] {
        let out_dir = folder.path().join(name);
        fs::create_dir(&out_dir).unwrap();
        fs::copy(fixture(source), out_dir.join("metrics.jsonl")).unwrap();
        folders.push(out_dir);
    }
    let text = compare::compare(&folders, &Options::default()).unwrap().text();
    assert!(text.contains("The train loss of B (out-vulkan) parts from A (out-metal)"), "{text}");
}

#[test]
fn pages_are_self_contained_and_escaped() {
    for html in [
        reports(&["vulkan.json", "hostile.json"]).html(),
        runs(&["run_a.jsonl", "run_b.jsonl"]).html(),
        reports(&["vulkan.json", "hostile.json"]).svg(),
    ] {
        assert!(!html.contains("<script") && !html.contains('\u{1b}'));
        for outside in ["src=", "href=", "url(", "@import"] {
            assert!(!html.contains(outside), "{outside}");
        }
    }
    let html = reports(&["vulkan.json", "hostile.json"]).html();
    assert!(html.contains("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; | &amp; &quot;GPU&quot;"));
    assert!(html.contains("gpt-wgpu vulkan, Exemplary GPU"), "equal programs are told apart by their devices");
    assert!(html.contains("prefers-color-scheme:dark") && html.contains("linear forward"));
}

/// The page as headless Chromium sees it after loading: its DOM, and what it logged.
fn browse(html: &str) -> Option<(String, String)> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let find = |name: &str| std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file());
    let Some(browser) = ["chromium", "google-chrome"].into_iter().find_map(find) else {
        let required = std::env::var("GPT_WGPU_REQUIRE_BROWSER").is_ok_and(|value| value == "1");
        assert!(!required, "GPT_WGPU_REQUIRE_BROWSER=1, and there is no chromium on PATH");
        return None;
    };
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("page.html");
    fs::write(&page, html).unwrap();
    let (dom, log) = (folder.path().join("dom"), folder.path().join("log"));
    let mut child = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"])
        .args(["--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0", "--dump-dom"])
        .arg(format!("--user-data-dir={}", folder.path().join("profile").display()))
        .arg(format!("file://{}", page.display()))
        .stdin(Stdio::null())
        .stdout(fs::File::create(&dom).unwrap())
        .stderr(fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > Duration::from_secs(120) {
            child.kill().unwrap();
            panic!("chromium did not end: {}", fs::read_to_string(&log).unwrap());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Some((fs::read_to_string(&dom).unwrap(), String::from_utf8_lossy(&fs::read(&log).unwrap()).into()))
}

#[test]
fn a_browser_shows_both_series_without_an_error() {
    for (html, series) in [
        (
            reports(&["vulkan.json", "hostile.json"]).html(),
            ["A: gpt-wgpu vulkan, Exemplary GPU", "B: gpt-wgpu vulkan, &lt;script"],
        ),
        (runs(&["run_a.jsonl", "run_b.jsonl"]).html(), ["A: run_a", "B: run_b"]),
    ] {
        let Some((dom, log)) = browse(&html) else {
            println!("SKIPPED: there is no chromium on PATH");
            return;
        };
        for name in series {
            assert!(dom.contains(&format!(">{name}")), "{name} is missing in {dom}");
        }
        let errors: Vec<&str> = log.lines().filter(|line| line.contains("CONSOLE")).collect();
        assert!(errors.is_empty(), "{errors:?}");
    }
    // The check itself: a page with an error must be seen to have one.
    let (_, log) = browse("<!doctype html><script>console.error('seen'); missing()</script>").unwrap();
    assert!(log.contains("CONSOLE") && log.contains("missing is not defined"), "{log}");
}
