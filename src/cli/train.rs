//! `gpt-wgpu train`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail, ensure};
use burn::module::Module;
use clap::{ArgMatches, Args, parser::ValueSource};

use super::{
    Interrupted, end_at_ctrl_c, explained, refuse_evaluation_that_cannot_fit, refuse_what_cannot_fit, stop_flag,
};
use crate::checkpoint::{self, Checkpoint};
use crate::config::{Config, QUICKSTART};
use crate::corpus;
use crate::data::{Dataset, Split};
use crate::device::{self, Chosen};
use crate::failure;
use crate::kernel;
use crate::memory::plan::{Budget, Plan};
use crate::model::{Gpt, GptConfig};
use crate::prepare::{self, Source};
use crate::sample::{Sampling, generate};
use crate::startup;
use crate::terminal;
use crate::tokenizer::{Meta, Tokenizer};
use crate::train::{self, Ended, Run, Start};
use crate::watchdog::Watchdog;

#[derive(Args)]
pub struct TrainArgs {
    /// A configuration file; without one, configs/quickstart.toml's settings
    config: Option<PathBuf>,
    /// Continue from the last checkpoint in out_dir (the same as --init-from=resume)
    #[arg(long)]
    resume: bool,
    /// Print the resolved configuration and stop
    #[arg(long)]
    print_config: bool,
    /// Print what memory the run takes and whether it fits the device, and stop; exit code 1 where it does not
    #[arg(long)]
    dry_run: bool,
    /// Print nothing but errors
    #[arg(long, short)]
    quiet: bool,
    /// Take iteration 10 apart: launches, time and rate of every kernel (`bench --ops` gives the device's peaks beside it)
    #[arg(long)]
    profile: bool,
    #[command(flatten)]
    flags: Config,
}

pub fn run(args: &TrainArgs, matches: &ArgMatches) -> Result<()> {
    let _ = &args.flags; // read through `matches`, which know what was given
    let (mut config, resumed) = resolve(args, matches)?;
    config.validate()?;
    if args.print_config {
        return terminal::print(config.to_toml());
    }
    let say = |text: String| {
        if !args.quiet {
            terminal::say(text);
        }
    };

    let chosen = device::choose(config.train.device.parse()?)?;
    ensure!(
        !args.profile || chosen.adapter.is_some(),
        "--profile takes the kernels of a GPU apart; the CPU has none of ours. --device chooses one"
    );
    say(chosen.to_string());
    startup::part("Burn's runtime");
    kernel::choose(config.train.kernels);
    let precision = config.train.dtype.resolve(&chosen, config.train.kernels)?;
    if chosen.adapter.is_some() {
        say(format!("kernels: {}", kernel::describe(&chosen.capabilities, precision.f16)));
    }
    say(precision.to_string());
    let bare = args.config.is_none() && !given(matches, "dataset") && resumed.is_none();
    let first_iter = resumed.as_ref().map_or(0, |checkpoint| checkpoint.state.step);
    let origin = Origin::of(&config, resumed)?;
    let known = origin.shape();
    let vocab_size = match (known, config.model.vocab_size) {
        (Some(gpt), _) => Some(gpt.vocab_size),
        (None, 0) => None,
        (None, given) => Some(given),
    };
    if args.dry_run {
        return dry_run(config, known, vocab_size, &chosen, precision.f16);
    }
    let dir = dataset(&mut config, bare, args.quiet)?;
    let block_size = known.map_or(config.model.block_size, |gpt| gpt.block_size);
    let data = Dataset::open(&dir, vocab_size, block_size)?;
    let gpt = known.unwrap_or_else(|| config.gpt(data.vocab_size()));
    adopt(&mut config, &gpt);
    let plan = Plan::new(&config, &gpt, Budget::of(&chosen, precision.f16), known.is_some());
    if config.train.eval_only {
        refuse_evaluation_that_cannot_fit(&plan)?;
    } else {
        refuse_what_cannot_fit(&plan)?;
        checkpoint::make_room(&config.train.out_dir)?;
    }
    write_config(&config)?;
    startup::part("data");
    let stop = if config.train.eval_only {
        end_at_ctrl_c()?;
        &NEVER
    } else {
        stop_flag()?
    };
    say(format!(
        "dataset: {}: {} train and {} val tokens, vocabulary {}",
        dir.display(),
        data.len(Split::Train),
        data.len(Split::Val),
        gpt.vocab_size
    ));
    say(format!("number of parameters: {:.2}M", gpt.parameters() as f64 / 1e6));
    say(format!("tokens per iteration will be: {}", config.tokens_per_iter()));

    failure::start(first_iter);
    let watchdog = Watchdog::start(failure::wgpu_device(&chosen.device), config.train.out_dir.clone())?;
    let (model, ended) = explained(&chosen.device, &config.train.out_dir, || {
        let run = Run {
            device: &chosen.device,
            data: &data,
            tokenizer: Some(dir.join(checkpoint::META)),
            start: origin.start(gpt, &chosen)?,
            f16: precision.f16,
            quiet: args.quiet,
            profile: args.profile,
            stop,
        };
        train::run(&config, run)
    })?;
    drop(watchdog);
    if ended == Ended::Interrupted {
        let out_dir = config.train.out_dir;
        return Err(Interrupted(checkpoint::path(&out_dir, "last"), out_dir).into());
    }
    if let Some(meta) = data.meta()
        && config.train.sample_tokens > 0
        && !args.quiet
    {
        print_sample(&model.valid(), meta, &config, &chosen, stop)?;
    }
    Ok(())
}

/// A run that nobody stops.
static NEVER: AtomicBool = AtomicBool::new(false);

fn given(matches: &ArgMatches, key: &str) -> bool {
    matches.value_source(key) == Some(ValueSource::CommandLine)
}

/// Defaults, then the file (or the resumed run's own configuration), then flags.
fn resolve(args: &TrainArgs, matches: &ArgMatches) -> Result<(Config, Option<Checkpoint>)> {
    let base = match &args.config {
        Some(path) => Config::load(path)?,
        None => Config::parse(QUICKSTART, "quickstart.toml")?,
    };
    let config = base.with_flags(matches)?;
    if !args.resume && config.train.init_from != "resume" {
        return Ok((config, None));
    }
    let checkpoint = checkpoint::open(&checkpoint::path(&config.train.out_dir, "last"))?;
    let mut config = match &args.config {
        Some(_) => config,
        None => checkpoint.state.config.clone().with_flags(matches)?,
    };
    config.train.init_from = "resume".into();
    refuse_contradictions(args, matches, &config, &checkpoint.state.model)?;
    Ok((config, Some(checkpoint)))
}

/// The model's shape is the checkpoint's; a file or a flag that says otherwise is a mistake.
fn refuse_contradictions(args: &TrainArgs, matches: &ArgMatches, config: &Config, model: &GptConfig) -> Result<()> {
    let asked = config.gpt(config.model.vocab_size);
    let pairs = [
        ("n_layer", asked.n_layer.to_string(), model.n_layer.to_string()),
        ("n_head", asked.n_head.to_string(), model.n_head.to_string()),
        ("n_embd", asked.n_embd.to_string(), model.n_embd.to_string()),
        ("block_size", asked.block_size.to_string(), model.block_size.to_string()),
        ("bias", asked.bias.to_string(), model.bias.to_string()),
        ("gelu", format!("{:?}", asked.gelu), format!("{:?}", model.gelu)),
    ];
    for (key, asked, has) in pairs {
        if asked != has && (args.config.is_some() || given(matches, key)) {
            bail!(
                "{key} = {asked} contradicts the checkpoint, which has {key} = {has}; leave it out or start from scratch"
            );
        }
    }
    let vocab = config.model.vocab_size;
    if vocab != 0 && vocab != model.vocab_size {
        bail!("vocab_size = {vocab} contradicts the checkpoint, which has vocab_size = {}", model.vocab_size);
    }
    Ok(())
}

/// Makes the configuration say what the model is.
fn adopt(config: &mut Config, gpt: &GptConfig) {
    let model = &mut config.model;
    model.n_layer = gpt.n_layer;
    model.n_head = gpt.n_head;
    model.n_embd = gpt.n_embd;
    model.block_size = gpt.block_size;
    model.vocab_size = gpt.vocab_size;
    model.bias = gpt.bias;
    model.gelu = gpt.gelu;
}

/// The folder of the configured dataset, prepared where it is missing and can be.
///
/// `bare`: nobody named a dataset, so the built-in corpus is as good where there is no network.
fn dataset(config: &mut Config, bare: bool, quiet: bool) -> Result<PathBuf> {
    let name = config.data.dataset.clone();
    let named = Path::new(&name);
    if named.join("train.bin").exists() {
        return Ok(named.into());
    }
    let dir = config.data.data_dir.join(named);
    if dir.join("train.bin").exists() {
        return Ok(dir);
    }
    let Some(source) = Source::named(&name) else {
        bail!(
            "there is no dataset {name}: neither {} nor {} holds a train.bin. Make one with `gpt-wgpu prepare FILE`, or \
             use shakespeare_char, shakespeare or builtin",
            named.display(),
            dir.display()
        );
    };
    if !quiet {
        terminal::say(format!("preparing {name} in {}", dir.display()));
    }
    match prepare::prepare(&source, &dir, None, !quiet) {
        Ok(_) => Ok(dir),
        Err(error) if bare => {
            let why = error.root_cause();
            terminal::warn(format!("no {name}: {why}; training on the built-in corpus instead"));
            config.data.dataset = "builtin".into();
            dataset(config, false, quiet)
        }
        Err(error) => {
            Err(error.context(format!("cannot prepare the dataset {name}; without a network, --dataset=builtin works")))
        }
    }
}

/// What a run starts from, before any of it is on the device.
enum Origin {
    /// New weights.
    Scratch,
    /// A run that was stopped.
    Resumed(Box<Checkpoint>),
    /// The weights in a folder, and the shape of their model.
    Weights(PathBuf, GptConfig),
}

impl Origin {
    fn of(config: &Config, resumed: Option<Checkpoint>) -> Result<Self> {
        if let Some(checkpoint) = resumed {
            return Ok(Self::Resumed(Box::new(checkpoint)));
        }
        if config.train.init_from == "scratch" {
            return Ok(Self::Scratch);
        }
        let dir = Path::new(&config.train.init_from);
        ensure!(
            dir.is_dir(),
            "init_from = {}: expected scratch, resume, or the folder of a checkpoint or of a GPT-2 (config.json and \
             model.safetensors)",
            dir.display()
        );
        let gpt = if dir.join("state.json").exists() {
            checkpoint::open(dir)?.state.model
        } else {
            checkpoint::hf_model_config(dir)?
        };
        Ok(Self::Weights(dir.into(), gpt))
    }

    /// The model's shape, where it is given.
    fn shape(&self) -> Option<GptConfig> {
        match self {
            Self::Scratch => None,
            Self::Resumed(checkpoint) => Some(checkpoint.state.model),
            Self::Weights(_, gpt) => Some(*gpt),
        }
    }

    /// What [`train::run`] starts from; weights are loaded now.
    fn start(self, gpt: GptConfig, chosen: &Chosen) -> Result<Start> {
        Ok(match self {
            Self::Scratch => Start::Scratch(gpt),
            Self::Resumed(checkpoint) => Start::Resume(checkpoint),
            Self::Weights(dir, gpt) => {
                let device = chosen.device.clone().autodiff();
                let model = checkpoint::load_model(&dir.join("model.safetensors"), &gpt, &device)?;
                Start::Weights(Box::new(model))
            }
        })
    }
}

/// Prints what the run takes. A dataset that is not there yet is not prepared for it.
fn dry_run(
    mut config: Config,
    known: Option<GptConfig>,
    vocab_size: Option<usize>,
    chosen: &Chosen,
    f16: bool,
) -> Result<()> {
    let gpt = match (known, vocab_size, config.data.folder()) {
        (Some(gpt), ..) => gpt,
        (None, Some(vocab_size), _) => config.gpt(vocab_size),
        (None, None, dir) if dir.join("train.bin").exists() => {
            config.gpt(Dataset::open(&dir, None, config.model.block_size)?.vocab_size())
        }
        (None, None, dir) => {
            let vocab_size = expected_vocab(&config.data.dataset);
            let dir = dir.display();
            terminal::say(format!("{dir} is not prepared: its vocabulary is taken to be {vocab_size}"));
            config.gpt(vocab_size)
        }
    };
    adopt(&mut config, &gpt);
    terminal::say(format!("number of parameters: {:.2}M", gpt.parameters() as f64 / 1e6));
    let plan = Plan::new(&config, &gpt, Budget::of(chosen, f16), known.is_some());
    terminal::print(format!("{plan}\n"))?;
    if config.train.eval_only { refuse_evaluation_that_cannot_fit(&plan) } else { refuse_what_cannot_fit(&plan) }
}

/// The vocabulary that a dataset by this name has when it is prepared: one of characters for two of ours, else GPT-2's 50257
/// tokens, padded as nanoGPT does.
fn expected_vocab(dataset: &str) -> usize {
    match Source::named(dataset) {
        Some(Source::ShakespeareChar) => 65,
        Some(Source::Builtin) => corpus::builtin().chars().collect::<BTreeSet<_>>().len(),
        _ => 50304,
    }
}

/// The resolved configuration, beside what it made.
fn write_config(config: &Config) -> Result<()> {
    let out_dir = &config.train.out_dir;
    std::fs::create_dir_all(out_dir).with_context(|| format!("cannot create out_dir {}", out_dir.display()))?;
    let path = out_dir.join("config.toml");
    std::fs::write(&path, config.to_toml()).with_context(|| format!("cannot write {}", path.display()))
}

/// A sample, until `stop`, and for the built-in corpus how many of its sums are right.
fn print_sample(model: &Gpt, meta: &Meta, config: &Config, chosen: &Chosen, stop: &AtomicBool) -> Result<()> {
    let tokenizer = Tokenizer::from_meta(meta)?;
    let mut decoder = tokenizer.decoder();
    let mut text = String::new();
    terminal::say("---------------");
    let sampling = Sampling { temperature: 0.8, top_k: 200, seed: config.train.seed };
    let prompt = tokenizer.encode("\n")?;
    generate(model, &prompt, config.train.sample_tokens, sampling, &chosen.device, |token| {
        let piece = decoder.push(token);
        text.push_str(&piece);
        matches!(terminal::stream(piece), Ok(true)) && !stop.load(Ordering::Relaxed)
    })?;
    terminal::say(format!("{}\n---------------", decoder.finish()));
    let (right, total) = corpus::check_answers(&text);
    if total > 0 {
        terminal::say(format!("{right} of {total} answers right"));
    }
    terminal::say(format!("more: gpt-wgpu sample --out-dir {}", config.train.out_dir.display()));
    Ok(())
}
