//! A configuration as TOML, and as flags put over it.

use std::path::Path;

use clap::{CommandFactory, FromArgMatches, parser::ValueSource};

use super::{Config, ConfigError};

impl Config {
    /// Parses a configuration's TOML text; `name` stands for the file in errors.
    pub fn parse(text: &str, name: &str) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| schema_error(&error, text, name))
    }

    /// Reads a configuration file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Read { path: path.into(), error })?;
        Self::parse(&text, &path.display().to_string())
    }

    /// This configuration with the flags that were given on the command line put over it.
    ///
    /// `matches` are of a command that has [`Config`]'s flags.
    pub fn with_flags(self, matches: &clap::ArgMatches) -> Result<Self, ConfigError> {
        let internal = |error: &dyn std::fmt::Display| ConfigError::Schema {
            place: "command line".into(),
            message: error.to_string(),
        };
        let flags = Self::from_arg_matches(matches).map_err(|error| internal(&error))?;
        let mut merged = toml::Table::try_from(&self).map_err(|error| internal(&error))?;
        let given = toml::Table::try_from(&flags).map_err(|error| internal(&error))?;
        for (table, keys) in given {
            let (Some(target), toml::Value::Table(keys)) = (merged.get_mut(&table), keys) else {
                continue;
            };
            for (key, value) in keys {
                if matches.value_source(&key) == Some(ValueSource::CommandLine)
                    && let Some(target) = target.as_table_mut()
                {
                    target.insert(key, value);
                }
            }
        }
        merged.try_into().map_err(|error: toml::de::Error| internal(&error))
    }

    /// The configuration as commented TOML, every key with its help text.
    pub fn to_toml(&self) -> String {
        let table = toml::Table::try_from(self).unwrap_or_default();
        let help = Help::augment();
        let mut text = String::new();
        for (name, keys) in &table {
            text.push_str(&format!("[{name}]\n"));
            for (key, value) in keys.as_table().into_iter().flatten() {
                if let Some(line) = help.of(key) {
                    text.push_str(&format!("# {line}\n"));
                }
                text.push_str(&format!("{key} = {value}\n"));
            }
            text.push('\n');
        }
        text
    }
}

/// The help texts of the flags, by key.
struct Help(clap::Command);

#[derive(clap::Parser)]
struct HelpOnly {
    #[command(flatten)]
    _config: Config,
}

impl Help {
    fn augment() -> Self {
        Self(HelpOnly::command())
    }

    fn of(&self, key: &str) -> Option<String> {
        let argument = self.0.get_arguments().find(|a| a.get_id() == key)?;
        argument.get_help().map(ToString::to_string)
    }
}

/// Turns toml's error into one line: file, line, what is wrong, the nearest valid key.
fn schema_error(error: &toml::de::Error, text: &str, name: &str) -> ConfigError {
    let line = error.span().map_or(1, |span| text.bytes().take(span.start).filter(|&byte| byte == b'\n').count() + 1);
    let mut message = error.message().replace('\n', " ");
    let mut quoted = message.split('`').skip(1).step_by(2).map(str::to_string);
    if message.starts_with("unknown field")
        && let Some(key) = quoted.next()
    {
        if let Some(table) = table_of(&key) {
            return ConfigError::Schema {
                place: format!("{name}:{line}"),
                message: format!("unknown key `{key}`: its place is the table [{table}]"),
            };
        }
        let nearest = quoted.max_by(|a, b| strsim::jaro_winkler(a, &key).total_cmp(&strsim::jaro_winkler(b, &key)));
        message = match nearest {
            Some(nearest) => format!("unknown key `{key}`; the nearest valid key is `{nearest}`"),
            None => format!("unknown key `{key}`"),
        };
    }
    ConfigError::Schema { place: format!("{name}:{line}"), message }
}

/// The table that has `key`.
fn table_of(key: &str) -> Option<String> {
    let tables = toml::Table::try_from(Config::default()).unwrap_or_default();
    let has_key = |keys: &toml::Value| keys.as_table().is_some_and(|keys| keys.contains_key(key));
    tables.into_iter().find(|(_, keys)| has_key(keys)).map(|(table, _)| table)
}
