//! What is wrong with a configuration, told at once: the file's own faults and what plugins say.
//! `check`, a start and a reload share it.

use std::path::Path;
use std::sync::Arc;

use super::{Asked, RunError, limits, refused, spec};
use crate::config::{self, Config, ConfigError, ConfigErrors, Draft, Fault, PluginCheck, Source};
use crate::error::chain;
use crate::metrics::Metrics;
use crate::plugin::{HostContext, PluginSpec, Plugins};

/// A configuration that holds.
#[derive(Debug)]
pub struct Checked {
    /// What it has, in one line.
    pub summary: String,
    /// What runs and is yet likely a mistake.
    pub warnings: Vec<ConfigError>,
}

/// Validates a file or directory as a start would, plugins included.
///
/// # Errors
/// All that is wrong with it.
pub fn check(file: &Path) -> Result<Checked, RunError> {
    let (_, config) = load(file)?;
    let plugins = plugins_to_ask(&config);
    ask(&plugins, &config)?;
    Ok(Checked {
        summary: format!(
            "{}: valid: {}, {}, protocol types {}",
            file.display(),
            counted(config.routes.len(), "route"),
            counted(config.tunnels.len(), "tunnel"),
            plugins.types().join(", "),
        ),
        warnings: config.warnings,
    })
}

fn counted(count: usize, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

/// Reads and parses a file or directory. A faulty one is asked about as well, so that the error says
/// what plugins refuse beside the file's own faults; a good one is not.
pub(super) fn load(file: &Path) -> Result<(Source, Config), ConfigErrors> {
    let source = Source::read(file)?;
    let draft = config::draft(&source, &environment)?;
    let config = finish(draft, |config| refusals(&plugins_to_ask(config), config).1)?;
    Ok((source, config))
}

/// Parses what a reload read. Of a faulty one the plugins that run are asked, where the file names the
/// same; none is loaded for it, since none is ever unloaded.
pub(super) fn reread(
    source: &Source,
    plugins: &Plugins,
    in_force: &Config,
) -> Result<Config, ConfigErrors> {
    let draft = config::draft(source, &environment)?;
    finish(draft, |config| {
        if config.plugins == in_force.plugins {
            config.refused_by(&Asked(plugins))
        } else {
            Vec::new()
        }
    })
}

/// Loads what the file names and asks it about its blocks and options. Returns the names of plugins
/// that were not running before. After an error nothing runs that did not before, or too little: it
/// is for a start and `check`.
pub(super) fn ask(plugins: &Plugins, config: &Config) -> Result<Vec<String>, ConfigErrors> {
    let (loaded, refused) = refusals(plugins, config);
    ConfigErrors::join(None, refused).map_or(Ok(loaded), Err)
}

/// Logs what is likely a mistake.
pub(super) fn warn(config: &Config) {
    for warning in &config.warnings {
        tracing::warn!(
            place = warning.place(),
            path = warning.path,
            problem = warning.message,
            "the configuration holds, but is likely not what is meant",
        );
    }
}

fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn finish(
    draft: Draft,
    ask: impl FnOnce(&Config) -> Vec<ConfigError>,
) -> Result<Config, ConfigErrors> {
    let refused = match draft.to_ask() {
        Some(config) if !draft.is_good() => ask(config),
        _ => Vec::new(),
    };
    draft.finish(refused)
}

fn plugins_to_ask(config: &Config) -> Plugins {
    let metrics = Arc::new(Metrics::new());
    Plugins::new(HostContext::new(metrics.sink()), limits(&config.plugins))
}

fn refusals(plugins: &Plugins, config: &Config) -> (Vec<String>, Vec<ConfigError>) {
    let specs: Vec<PluginSpec> = config.plugins.libraries.iter().map(spec).collect();
    let faults = match plugins.apply(&specs, config.drain_timeout) {
        Ok(applied) => {
            for error in &applied.failed {
                tracing::error!(error = chain(error), "a plugin that is not required is left out");
            }
            return (applied.loaded, config.refused_by(&Asked(plugins)));
        }
        Err(faults) => faults,
    };
    let mut errors = refused(config, &faults);
    // The others are asked all the same; which types the missing ones serve nobody knows.
    let others: Vec<PluginSpec> = specs
        .into_iter()
        .filter(|spec| faults.iter().all(|fault| fault.plugin != spec.name))
        .collect();
    if plugins.apply(&others, config.drain_timeout).is_ok() {
        errors.extend(config.refused_by(&Incomplete(plugins)));
    }
    (Vec::new(), errors)
}

/// Plugins of which some could not be loaded.
struct Incomplete<'a>(&'a Plugins);

impl PluginCheck for Incomplete<'_> {
    fn types(&self) -> Vec<Arc<str>> {
        Asked(self.0).types()
    }

    fn are_all(&self) -> bool {
        false
    }

    fn validate_route(&self, protocol_type: &str, options_json: &str) -> Result<(), Fault> {
        Asked(self.0).validate_route(protocol_type, options_json)
    }
}
