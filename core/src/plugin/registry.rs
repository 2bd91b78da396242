//! Which plugin serves which `protocol_type`, and how a new configuration takes the old one's place.
//!
//! Readers take an `Arc` of the current set without a lock; [`Plugins::apply`] builds the next set
//! beside it and swaps. What the configuration does not change keeps its generation.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use sidelane_abi as abi;

use super::error::{ConfigFault, LoadError, LoadFault};
use super::generation::{Anchor, Generation, GenerationState, Record, ServedType};
use super::host::{HostContext, HostObject};
use super::loader::{self, Library, TypeEntry};
use super::vtable::http::PreparedHead;
use super::vtable::instance::{Instance, Sniffed};
use super::{Born, Limits, PluginSpec, Protocol, born_of};

/// Destroyed generations that are still listed, newest first. Bounds the admin page.
const RETIRED_LISTED_MAX: usize = 64;

/// The plugins of a process.
pub struct Plugins {
    host: HostContext,
    limits: Limits,
    current: ArcSwap<Set>,
    loading: Mutex<Loading>,
}

/// What only [`Plugins::apply`] changes.
#[derive(Default)]
struct Loading {
    /// By content hash. Never removed: mapped for the process's life.
    libraries: HashMap<[u8; 32], Arc<Library>>,
    /// Generations that were replaced, while something holds them.
    draining: Vec<std::sync::Weak<Generation>>,
    /// All that were ever current, newest last.
    records: Vec<Arc<Record>>,
}

/// One configuration's plugins.
#[derive(Default)]
struct Set {
    members: Vec<Member>,
    /// Sorted by name.
    protocols: Vec<Protocol>,
}

#[derive(Clone)]
struct Member {
    generation: Arc<Generation>,
    sha256: [u8; 32],
    config: serde_json::Value,
    types: Option<Vec<String>>,
}

/// What [`Plugins::apply`] did. Names are those of the configuration.
#[derive(Debug, Default)]
pub struct Applied {
    /// New generations.
    pub loaded: Vec<String>,
    /// Untouched.
    pub kept: Vec<String>,
    /// Drained: replaced or no longer named.
    pub drained: Vec<String>,
    /// Not required and not loaded; where an earlier generation was there, it is kept.
    pub failed: Vec<LoadError>,
}

/// What the plugins say of a connection's first bytes.
#[derive(Debug)]
pub enum SniffResult {
    /// Nobody's.
    No,
    /// That protocol's.
    Yes {
        /// Whose.
        protocol: Protocol,
        /// The host name that the bytes hold.
        host: Option<String>,
        /// Other types that say so too.
        rivals: Vec<Arc<str>>,
    },
    /// Somebody cannot say yet.
    NeedMore,
}

/// A generation, for metrics and the admin page.
#[derive(Clone, Debug)]
pub struct GenerationInfo {
    /// Plugin's name in the configuration.
    pub name: Arc<str>,
    /// Plugin's version.
    pub version: String,
    /// Compiler that built it.
    pub toolchain: String,
    /// The library's content, in hexadecimal.
    pub sha256: String,
    /// Where it is in its life.
    pub state: GenerationState,
    /// Exchanges in flight.
    pub exchanges: usize,
    /// Panics so far.
    pub panics: u64,
    /// Whether its routes answer 503.
    pub quarantined: bool,
}

impl Plugins {
    /// Makes an empty registry.
    #[must_use]
    pub fn new(host: HostContext, limits: Limits) -> Self {
        let (current, loading) = (ArcSwap::default(), Mutex::default());
        Self { host, limits, current, loading }
    }

    /// Makes `specs` the plugins: all of them, or, where a required one fails, nothing changes. What a
    /// replaced one still runs after `drain` is ended (by [`Plugins::end_drained`]), and it is told so.
    /// Blocks: reads files, runs the plugins' constructors; not for a data-path thread.
    pub fn apply(&self, specs: &[PluginSpec], drain: Duration) -> Result<Applied, Vec<LoadError>> {
        let mut loading = self.loading();
        let old = self.current.load_full();
        let mut applied = Applied::default();
        let mut faults = Vec::new();
        let mut members: Vec<Member> = Vec::new();
        for spec in specs {
            match self.member(&mut loading, &old, &members, spec) {
                Ok(member) => members.push(member),
                Err(fault) => {
                    let library = spec.library.clone();
                    let error = LoadError { plugin: spec.name.clone(), library, fault };
                    if spec.required {
                        faults.push(error);
                        continue;
                    }
                    tracing::warn!(plugin = spec.name, %error, "optional plugin not loaded");
                    applied.failed.push(error);
                    let kept = old.named(&spec.name).filter(|member| {
                        no_conflict(&members, &member.generation.types, &spec.name).is_ok()
                    });
                    members.extend(kept.cloned());
                }
            }
        }
        if !faults.is_empty() {
            return Err(faults);
        }
        let new = Set::new(members);
        self.swap(&mut loading, &old, new, drain, &mut applied);
        Ok(applied)
    }

    fn swap(
        &self,
        loading: &mut Loading,
        old: &Set,
        new: Set,
        drain: Duration,
        applied: &mut Applied,
    ) {
        let is_in = |set: &Set, generation: &Arc<Generation>| {
            set.members.iter().any(|member| Arc::ptr_eq(&member.generation, generation))
        };
        for Member { generation, .. } in &new.members {
            if is_in(old, generation) {
                applied.kept.push(generation.name.to_string());
            } else {
                let record = &generation.record;
                tracing::info!(
                    plugin = &*record.name,
                    version = record.version,
                    toolchain = record.toolchain,
                    sha256 = loader::hex(&record.sha256),
                    "plugin loaded"
                );
                loading.records.push(Arc::clone(record));
                applied.loaded.push(generation.name.to_string());
            }
        }
        let replaced: Vec<Arc<Generation>> = old
            .members
            .iter()
            .filter(|member| !is_in(&new, &member.generation))
            .map(|member| Arc::clone(&member.generation))
            .collect();
        self.current.store(Arc::new(new));
        loading.draining.retain(|generation| generation.strong_count() > 0);
        for generation in replaced {
            generation.drain(Instant::now() + drain);
            applied.drained.push(generation.name.to_string());
            loading.draining.push(Arc::downgrade(&generation));
        }
        loading.forget_retired();
    }

    /// Finds or makes the generation that `spec` asks for.
    fn member(
        &self,
        loading: &mut Loading,
        old: &Set,
        earlier: &[Member],
        spec: &PluginSpec,
    ) -> Result<Member, LoadFault> {
        if earlier.iter().any(|member| *member.generation.name == *spec.name) {
            return Err(LoadFault::NameConflict(spec.name.clone()));
        }
        let image = loader::read(&spec.library, spec.sha256.as_ref())?;
        let same = old.named(&spec.name).filter(|member| {
            member.sha256 == image.sha256
                && member.config == spec.config
                && member.types == spec.types
        });
        if let Some(member) = same {
            return no_conflict(earlier, &member.generation.types, &spec.name)
                .map(|()| member.clone());
        }
        let library = match loading.libraries.get(&image.sha256) {
            Some(library) => Arc::clone(library),
            None if loading.libraries.len() >= self.limits.generations_max => {
                return Err(LoadFault::GenerationsFull { max: self.limits.generations_max });
            }
            None => {
                let library = Arc::new(loader::load(image)?);
                loading.libraries.insert(library.sha256, Arc::clone(&library));
                library
            }
        };
        let plugin = library.plugin.as_ref().map_err(Clone::clone)?;
        let types = served_types(&plugin.types, spec.types.as_deref())?;
        no_conflict(earlier, &types, &spec.name)?;
        let generation = self.generation(&library, plugin.vt, spec, types)?;
        let (config, types) = (spec.config.clone(), spec.types.clone());
        Ok(Member { generation, sha256: library.sha256, config, types })
    }

    fn generation(
        &self,
        library: &Library,
        vt: &'static abi::PluginVt,
        spec: &PluginSpec,
        types: Vec<ServedType>,
    ) -> Result<Arc<Generation>, LoadFault> {
        let name = Arc::from(&*spec.name);
        let limits = self.limits.clone();
        let record = Arc::new(Record::new(name, &library.stamp, library.sha256, limits));
        let anchor = Arc::new(Anchor::new(Arc::clone(&record)));
        let host = HostObject::leak(self.host.clone(), Arc::clone(&record), &anchor);
        let config = spec.config.to_string();
        match Instance::create(vt, host, &config) {
            Ok(instance) => anchor.install(instance),
            Err(fault) => {
                anchor.close_tasks();
                return Err(LoadFault::Refused(fault));
            }
        }
        Ok(Arc::new(Generation::new(record, anchor, types)))
    }

    /// Returns who serves `protocol_type`.
    #[must_use]
    pub fn find(&self, protocol_type: &str) -> Option<Protocol> {
        self.current.load().find(protocol_type).cloned()
    }

    /// Returns who takes the request: the highest claim; among equals the type first in name order.
    #[must_use]
    pub fn claim(&self, head: &PreparedHead) -> Option<Protocol> {
        let set = self.current.load();
        let mut best: Option<(u32, &Protocol)> = None;
        for protocol in set.protocols.iter().filter(|protocol| protocol.born() == Born::Http) {
            let index = protocol.served().index;
            let claim = protocol.generation.instance().claims(index, head);
            if claim > best.map_or(abi::claim::NO, |(highest, _)| highest) {
                best = Some((claim, protocol));
            }
            if claim == abi::claim::YES {
                break;
            }
        }
        best.map(|(_, protocol)| protocol.clone())
    }

    /// Asks the byte-born types named in `candidates` (all of them where it is empty) whose a
    /// connection is, in name order; the first that says yes gets it.
    #[must_use]
    pub fn sniff(&self, bytes: &[u8], candidates: &[impl AsRef<str>]) -> SniffResult {
        let set = self.current.load();
        let mut result = SniffResult::No;
        let mut taken: Option<(Protocol, Option<String>)> = None;
        let mut rivals = Vec::new();
        for protocol in &set.protocols {
            let named = |candidate: &dyn AsRef<str>| *candidate.as_ref() == **protocol.name();
            let asked = candidates.is_empty() || candidates.iter().any(|c| named(c));
            if protocol.born() != Born::Bytes || !asked {
                continue;
            }
            match protocol.generation.instance().sniff(protocol.served().index, bytes) {
                Sniffed::No => {}
                Sniffed::NeedMore => result = SniffResult::NeedMore,
                Sniffed::Yes { .. } if taken.is_some() => rivals.push(Arc::clone(protocol.name())),
                Sniffed::Yes { host } => taken = Some((protocol.clone(), host.map(str::to_owned))),
            }
        }
        match taken {
            Some((protocol, host)) => SniffResult::Yes { protocol, host, rivals },
            None => result,
        }
    }

    /// The types that are served, sorted.
    #[must_use]
    pub fn types(&self) -> Vec<Arc<str>> {
        self.current.load().protocols.iter().map(|protocol| Arc::clone(protocol.name())).collect()
    }

    /// The types that the plugin of this name serves, sorted.
    #[must_use]
    pub fn types_of(&self, name: &str) -> Vec<String> {
        let current = self.current.load();
        let member = current.named(name);
        let types = member.map(|member| &member.generation.types);
        let mut names: Vec<String> =
            types.into_iter().flatten().map(|entry| entry.name.to_string()).collect();
        names.sort();
        names
    }

    /// The generations: current, draining, and the last retired ones; oldest first.
    #[must_use]
    pub fn generations(&self) -> Vec<GenerationInfo> {
        let loading = self.loading();
        loading.records.iter().map(|record| GenerationInfo::of(record)).collect()
    }

    /// How many distinct libraries are mapped.
    #[must_use]
    pub fn libraries(&self) -> usize {
        self.loading().libraries.len()
    }

    /// Tells all plugins that the process ends, and that what runs at `deadline` is cut.
    pub fn take_leave(&self, deadline: Instant) {
        let draining: Vec<Arc<Generation>> = {
            let loading = self.loading();
            loading.draining.iter().filter_map(std::sync::Weak::upgrade).collect()
        };
        let current = self.current.load_full();
        let current = current.members.iter().map(|member| &member.generation);
        for generation in current.chain(&draining) {
            generation.take_leave(deadline);
        }
    }

    /// Ends what generations that have drained for `deadline` still run: their exchanges resolve with
    /// `DRAINING`, their tasks are aborted. Core calls this from time to time.
    pub fn end_drained(&self, deadline: Duration) {
        let overdue: Vec<Arc<Generation>> = {
            let mut loading = self.loading();
            loading.draining.retain(|generation| generation.strong_count() > 0);
            loading.forget_retired();
            let generations = loading.draining.iter().filter_map(std::sync::Weak::upgrade);
            generations.filter(|generation| generation.drained_for(deadline)).collect()
        };
        for generation in overdue {
            generation.end();
        }
    }

    /// Asks the plugin that serves `protocol_type` about a route's options, as JSON.
    pub fn validate_route(
        &self,
        protocol_type: &str,
        options_json: &str,
    ) -> Result<(), ConfigFault> {
        let Some(protocol) = self.find(protocol_type) else {
            let served = listed(self.types().iter().map(AsRef::as_ref));
            let message = format!("no plugin serves {protocol_type} (served: {served})");
            return Err(ConfigFault { message, path: String::new() });
        };
        let (instance, index) = (protocol.generation.instance(), protocol.served().index);
        instance.validate_route(index, options_json)
    }

    fn loading(&self) -> MutexGuard<'_, Loading> {
        self.loading.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Plugins {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plugins").field("types", &self.types()).finish_non_exhaustive()
    }
}

impl Drop for Plugins {
    fn drop(&mut self) {
        for member in &self.current.load().members {
            member.generation.drain(Instant::now());
        }
    }
}

impl Loading {
    fn forget_retired(&mut self) {
        let retired = |record: &Arc<Record>| record.state() == GenerationState::Retired;
        let count = self.records.iter().filter(|record| retired(record)).count();
        let mut excess = count.saturating_sub(RETIRED_LISTED_MAX);
        self.records.retain(|record| {
            let forget = excess > 0 && retired(record);
            excess -= usize::from(forget);
            !forget
        });
    }
}

impl Set {
    fn new(members: Vec<Member>) -> Self {
        let mut protocols: Vec<Protocol> = members
            .iter()
            .flat_map(|member| {
                let generation = &member.generation;
                (0..generation.types.len())
                    .map(|place| Protocol { generation: Arc::clone(generation), place })
            })
            .collect();
        protocols.sort_by(|a, b| a.name().cmp(b.name()));
        Self { members, protocols }
    }

    fn find(&self, protocol_type: &str) -> Option<&Protocol> {
        let at = self.protocols.binary_search_by(|protocol| (**protocol.name()).cmp(protocol_type));
        at.ok().map(|at| &self.protocols[at])
    }

    fn named(&self, plugin: &str) -> Option<&Member> {
        self.members.iter().find(|member| *member.generation.name == *plugin)
    }
}

impl Generation {
    fn drained_for(&self, deadline: Duration) -> bool {
        let now = Instant::now();
        let since = self.record.draining_since();
        since.is_some_and(|since| now.saturating_duration_since(since) >= deadline)
    }
}

impl GenerationInfo {
    fn of(record: &Record) -> Self {
        Self {
            name: Arc::clone(&record.name),
            version: record.version.clone(),
            toolchain: record.toolchain.clone(),
            sha256: loader::hex(&record.sha256),
            state: record.state(),
            exchanges: record.in_flight(),
            panics: record.panics(),
            quarantined: record.quarantined(),
        }
    }
}

fn served_types(
    offered: &[TypeEntry],
    wanted: Option<&[String]>,
) -> Result<Vec<ServedType>, LoadFault> {
    let missing = wanted
        .unwrap_or_default()
        .iter()
        .find(|wanted| !offered.iter().any(|entry| entry.name == **wanted));
    if let Some(missing) = missing {
        let served = listed(offered.iter().map(|entry| entry.name.as_str()));
        return Err(LoadFault::TypeMissing { missing: missing.clone(), served });
    }
    let served = (0u32..).zip(offered);
    let wanted = served
        .filter(|(_, entry)| wanted.is_none_or(|wanted| wanted.contains(&entry.name)))
        .map(|(index, entry)| ServedType {
            name: Arc::from(&*entry.name),
            born: born_of(entry.born),
            index,
        });
    Ok(wanted.collect())
}

fn no_conflict(earlier: &[Member], types: &[ServedType], plugin: &str) -> Result<(), LoadFault> {
    for member in earlier {
        for theirs in &member.generation.types {
            if types.iter().any(|ours| ours.name == theirs.name) {
                return Err(LoadFault::TypeConflict {
                    protocol_type: theirs.name.to_string(),
                    first: member.generation.name.to_string(),
                    second: plugin.to_owned(),
                });
            }
        }
    }
    Ok(())
}

fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}
