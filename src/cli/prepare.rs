//! `gpt-wgpu prepare`.

use std::path::PathBuf;

use anyhow::{Result, anyhow};
use clap::Args;

use crate::prepare::{self, Source};
use crate::terminal;
use crate::tokenizer::TokenizerKind;

#[derive(Args)]
pub struct PrepareArgs {
    /// shakespeare_char, shakespeare, builtin, or a UTF-8 text file
    source: String,
    /// How text becomes tokens; without it, what the source calls for (char for a file)
    #[arg(long, value_enum)]
    tokenizer: Option<TokenizerKind>,
    /// Folder that holds the datasets
    #[arg(long, default_value = "data")]
    data_dir: PathBuf,
    /// Folder to write; without it, one in data_dir named after the source
    #[arg(long)]
    out_dir: Option<PathBuf>,
    /// Print nothing but errors
    #[arg(long, short)]
    quiet: bool,
}

pub fn run(args: &PrepareArgs) -> Result<()> {
    let source = Source::named(&args.source).unwrap_or_else(|| Source::File(args.source.clone().into()));
    let name = match &source {
        Source::File(path) => {
            path.file_stem().map(PathBuf::from).ok_or_else(|| anyhow!("{} is not a file", path.display()))?
        }
        _ => PathBuf::from(&args.source),
    };
    let dir = args.out_dir.clone().unwrap_or_else(|| args.data_dir.join(name));
    let summary = prepare::prepare(&source, &dir, args.tokenizer, !args.quiet)?;
    if !args.quiet {
        terminal::say(summary);
    }
    Ok(())
}
