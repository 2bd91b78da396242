//! YAML as a tree of scalars, lists and mappings that know where they stand. The only module that
//! knows the YAML crate.
//!
//! A tree rather than a serde mirror of the language, because a reader of a tree goes on after a
//! fault and so tells all of them at once, and because a plugin's block keeps its places. Readers
//! are [`Section`] and [`Field`]; they know nothing of the language's keys.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::options::DuplicateKeyPolicy;
use serde_saphyr::{Location, Spanned};

use super::error::{Position, Sink, did_you_mean, list, nearest};
use super::value::size_text;

/// Most nodes of a configuration: about 20,000 routes. Bounds what a hostile file can make us allocate.
pub(crate) const NODES_MAX: usize = 250_000;

/// Deepest nesting; the language itself needs 6, plugin blocks may go deeper.
const DEPTH_MAX: usize = 32;

/// Most bytes of text, those of an alias counted at each use: more than the largest files hold by themselves.
const SCALAR_BYTES_MAX: usize = 16 * 1024 * 1024;

/// A node of the document.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) position: Position,
    pub(crate) value: Value,
}

#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// `key:` with nothing behind it, `~`, `null`.
    Null,
    Scalar(Scalar),
    List(Vec<Node>),
    /// In the file's order; keys are unique.
    Map(Vec<Entry>),
    /// Its fault is told already; readers pass over it in silence.
    Faulty,
}

#[derive(Clone)]
pub(crate) struct Scalar {
    /// As written (plain) or unescaped (quoted), after substitution.
    pub(crate) text: String,
    /// Without quotes: may be a number or boolean.
    pub(crate) plain: bool,
    /// Came from the environment or a file: never printed.
    pub(crate) hidden: bool,
    /// The value as the YAML crate resolved it; `None` after substitution.
    resolved: Option<serde_json::Value>,
}

/// The text may be a secret.
impl fmt::Debug for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl Scalar {
    /// Replaces the text.
    pub(crate) fn substitute(&mut self, text: String, hidden: bool) {
        self.text = text;
        self.hidden |= hidden;
        self.resolved = None;
    }

    fn to_json(&self) -> serde_json::Value {
        use serde_json::Value as Json;
        match (&self.resolved, self.plain) {
            (Some(value), _) => value.clone(),
            (None, false) => Json::String(self.text.clone()),
            (None, true) => match self.text.as_str() {
                "" | "~" | "null" => Json::Null,
                "true" => Json::Bool(true),
                "false" => Json::Bool(false),
                text => serde_json::Number::from_str(text)
                    .map_or_else(|_| Json::String(text.to_owned()), Json::Number),
            },
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) key_position: Position,
    pub(crate) node: Node,
}

/// Words in a key whose value is a secret.
const SECRET_KEY_WORDS: [&str; 4] = ["token", "secret", "password", "credential"];

/// Returns whether the value of that key in a plugin's block is a secret.
fn is_secret(scalar: &Scalar, key: &str) -> bool {
    let key = key.to_ascii_lowercase();
    scalar.hidden || SECRET_KEY_WORDS.iter().any(|word| key.contains(word))
}

impl Node {
    /// Returns the value for a plugin.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        self.json(&|scalar, _| scalar.to_json(), "")
    }

    /// Returns the value for people: what came from files, and what a key calls a secret, is `***`.
    pub(crate) fn to_masked_json(&self) -> serde_json::Value {
        let mask = |scalar: &Scalar, key: &str| {
            if is_secret(scalar, key) { serde_json::Value::from("***") } else { scalar.to_json() }
        };
        self.json(&mask, "")
    }

    fn json(
        &self,
        scalar: &dyn Fn(&Scalar, &str) -> serde_json::Value,
        key: &str,
    ) -> serde_json::Value {
        match &self.value {
            Value::Null | Value::Faulty => serde_json::Value::Null,
            Value::Scalar(value) => scalar(value, key),
            Value::List(items) => items.iter().map(|item| item.json(scalar, key)).collect(),
            Value::Map(entries) => entries
                .iter()
                .map(|entry| (entry.key.clone(), entry.node.json(scalar, &entry.key)))
                .collect::<serde_json::Map<_, _>>()
                .into(),
        }
    }

    /// Returns the value of `key` where this is a mapping that has it.
    pub(crate) fn child(&self, key: &str) -> Option<&Self> {
        let Value::Map(entries) = &self.value else { return None };
        entries.iter().find(|entry| entry.key == key).map(|entry| &entry.node)
    }

    /// Returns the text of a scalar.
    pub(crate) fn text(&self) -> Option<&str> {
        let Value::Scalar(scalar) = &self.value else { return None };
        Some(&scalar.text)
    }

    /// Returns how many values there are, itself included.
    pub(crate) fn count(&self) -> usize {
        1 + match &self.value {
            Value::List(items) => items.iter().map(Self::count).sum(),
            Value::Map(entries) => entries.iter().map(|entry| entry.node.count()).sum(),
            _ => 0,
        }
    }

    /// Returns whether a part of it is faulty, so that it is not what the file means.
    pub(crate) fn is_faulty(&self) -> bool {
        match &self.value {
            Value::Faulty => true,
            Value::List(items) => items.iter().any(Self::is_faulty),
            Value::Map(entries) => entries.iter().any(|entry| entry.node.is_faulty()),
            Value::Null | Value::Scalar(_) => false,
        }
    }

    /// Returns the message of somebody who was given this value, or what is left of it where it quotes a
    /// secret: what came from a file, or what a key calls one.
    pub(crate) fn without_secrets(&self, message: String) -> String {
        if !self.is_quoted(&message, "") {
            return message;
        }
        let left = mask_all(message);
        // A secret that begins like what is accepted, or is a part of it.
        if self.is_quoted(&left, "") { "\"***\" is not accepted".to_owned() } else { left }
    }

    fn is_quoted(&self, message: &str, key: &str) -> bool {
        match &self.value {
            Value::Scalar(scalar) => {
                let json = scalar.to_json();
                let forms = [
                    scalar.text.trim().to_owned(),
                    scalar.text.escape_debug().to_string(),
                    json.as_str().map_or_else(|| json.to_string(), str::to_owned),
                ];
                is_secret(scalar, key)
                    && forms.iter().any(|form| !form.is_empty() && message.contains(form))
            }
            Value::List(items) => items.iter().any(|item| item.is_quoted(message, key)),
            Value::Map(entries) => {
                entries.iter().any(|entry| entry.node.is_quoted(message, &entry.key))
            }
            Value::Null | Value::Faulty => false,
        }
    }

    /// Returns the node of `path`.
    pub(crate) fn find(&self, path: &str) -> Option<&Self> {
        let (node, rest) = self.nearest(path);
        rest.is_empty().then_some(node)
    }

    /// Returns the place of `path`, or of its nearest ancestor that exists.
    pub(crate) fn locate(&self, path: &str) -> Position {
        self.nearest(path).0.position
    }

    /// Returns the node of `path`, or its nearest ancestor that exists and what is left of the path.
    ///
    /// Keys may hold dots, so each step takes the longest key that fits.
    fn nearest<'a>(&self, path: &'a str) -> (&Self, &'a str) {
        let path = path.trim_start_matches('.');
        match &self.value {
            Value::Map(entries) => entries
                .iter()
                .filter_map(|entry| {
                    let rest = path.strip_prefix(entry.key.as_str())?;
                    (rest.is_empty() || rest.starts_with(['.', '['])).then_some((entry, rest))
                })
                .max_by_key(|(entry, _)| entry.key.len())
                .map_or((self, path), |(entry, rest)| entry.node.nearest(rest)),
            Value::List(items) => path
                .strip_prefix('[')
                .and_then(|rest| rest.split_once(']'))
                .and_then(|(index, rest)| Some((items.get(index.parse::<usize>().ok()?)?, rest)))
                .map_or((self, path), |(item, rest)| item.nearest(rest)),
            _ => (self, path),
        }
    }
}

impl From<serde_json::Value> for Node {
    /// Returns the same value without places, as YAML would give it.
    fn from(json: serde_json::Value) -> Self {
        use serde_json::Value as Json;
        let scalar = |text: String, plain, json| {
            Value::Scalar(Scalar { text, plain, hidden: false, resolved: Some(json) })
        };
        let value = match json {
            Json::Null => Value::Null,
            Json::Bool(_) | Json::Number(_) => scalar(json.to_string(), true, json),
            Json::String(text) => scalar(text.clone(), false, Json::String(text)),
            Json::Array(items) => Value::List(items.into_iter().map(Self::from).collect()),
            Json::Object(map) => Value::Map(
                map.into_iter()
                    .map(|(key, value)| Entry {
                        key,
                        key_position: Position::default(),
                        node: value.into(),
                    })
                    .collect(),
            ),
        };
        Self { position: Position::default(), value }
    }
}

/// Parses one YAML document, the file of that index.
pub(crate) fn parse(text: &str, file: u16) -> Result<Node, (Position, String)> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_nodes: NODES_MAX,
            max_depth: DEPTH_MAX,
            max_documents: 1,
            max_total_scalar_bytes: SCALAR_BYTES_MAX,
        },
        // Told by `once`, which names both places and goes on.
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        strict_booleans: true,
        with_snippet: false,
    };
    // A file of nothing but comments holds no document at all, which is no error here.
    match serde_saphyr::from_str_with_options::<Option<Spanned<Yaml>>>(text, options) {
        Ok(Some(root)) => Ok(node(root, text, file)),
        Ok(None) => {
            Ok(Node { position: Position { file, ..Position::default() }, value: Value::Null })
        }
        Err(error) => {
            let error = error.without_snippet();
            let nowhere = Position { file, ..Position::default() };
            let position = error.location().map_or(nowhere, |at| position(&at, file));
            Err((position, message(error)))
        }
    }
}

/// Tells keys that stand twice in a mapping, and leaves the first.
pub(crate) fn once(node: &mut Node, path: &str, sink: &mut Sink) {
    match &mut node.value {
        Value::List(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                once(item, &format!("{path}[{index}]"), sink);
            }
        }
        Value::Map(entries) => {
            let mut first: HashMap<String, Position> = HashMap::new();
            entries.retain_mut(|entry| {
                let path = join(path, &entry.key);
                if let Some(first) = first.get(&entry.key) {
                    let message = format!(
                        "the key \"{}\" stands twice in one mapping, first at {} (accepted: once)",
                        entry.key,
                        sink.place(*first)
                    );
                    sink.push(entry.key_position, &path, message);
                    return false;
                }
                first.insert(entry.key.clone(), entry.key_position);
                once(&mut entry.node, &path, sink);
                true
            });
        }
        Value::Null | Value::Faulty | Value::Scalar(_) => {}
    }
}

/// Aliases count as often as they are used, so that a small file can be too large.
fn too_large() -> String {
    format!(
        "is too large from here on (accepted: {NODES_MAX} values, those of aliases counted at each use, \
         nested {DEPTH_MAX} deep, with {} of text)",
        size_text(SCALAR_BYTES_MAX as u64)
    )
}

/// Our words where the crate's speak to programmers; its own texts end in the place, which stands
/// in front of ours.
fn message(error: &serde_saphyr::Error) -> String {
    use serde_saphyr::budget::BudgetBreach;
    let text = error.to_string();
    let text = text.lines().next().unwrap_or_default();
    let text = text.rsplit_once(" at line ").map_or(text, |(text, _)| text);
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let text = match text.split_once(": ") {
        Some((place, rest)) if place.starts_with("line ") => rest,
        _ => text,
    };
    match error {
        serde_saphyr::Error::MultipleDocuments { .. }
        | serde_saphyr::Error::Budget { breach: BudgetBreach::Documents { .. }, .. } => {
            "a second document begins here (accepted: one)".to_owned()
        }
        serde_saphyr::Error::Budget { .. } => too_large(),
        // Through an alias, the breach is told as a text; the parser's own bound on depth as well.
        _ if text.starts_with("budget breached") || text.contains("recursion limit") => too_large(),
        _ => match text {
            "expected string scalar" => "a key that is no text (accepted: text)".to_owned(),
            _ if text.starts_with("cannot deserialize null into string") => {
                "a key without text (accepted: text; in quotes where it is null)".to_owned()
            }
            _ if text.starts_with("recursive references") => {
                "an alias of what it stands in (accepted: one of what stands before it)".to_owned()
            }
            _ => format!("not valid YAML: {text}"),
        },
    }
}

fn position(location: &Location, file: u16) -> Position {
    let number = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    Position {
        file,
        line: number(location.line()),
        column: number(location.column()),
        len: number(location.span().len()),
    }
}

fn node(yaml: Spanned<Yaml>, text: &str, file: u16) -> Node {
    let position = position(&yaml.referenced, file);
    let span = yaml.defined.span();
    // The text as written: `1.10` as a version is not the number 1.1.
    let written = span
        .byte_offset()
        .zip(span.byte_len())
        .and_then(|(start, len)| {
            let start = usize::try_from(start).ok()?;
            text.get(start..start.checked_add(usize::try_from(len).ok()?)?)
        })
        .unwrap_or_default();
    let number = |value: serde_json::Value| {
        let text = if written.is_empty() { value.to_string() } else { written.trim().to_owned() };
        Value::Scalar(Scalar { text, plain: true, hidden: false, resolved: Some(value) })
    };
    let value = match yaml.value {
        Yaml::Null => Value::Null,
        Yaml::Resolved(value) => number(value),
        Yaml::Text(text) => {
            let plain = !written.starts_with(['"', '\'', '|', '>', '!']);
            let resolved = Some(serde_json::Value::String(text.clone()));
            Value::Scalar(Scalar { text, plain, hidden: false, resolved })
        }
        Yaml::List(items) => {
            Value::List(items.into_iter().map(|item| node(item, text, file)).collect())
        }
        Yaml::Map(entries) => Value::Map(
            entries
                .into_iter()
                .map(|(key, value)| Entry {
                    key_position: self::position(&key.referenced, file),
                    key: key.value,
                    node: node(value, text, file),
                })
                .collect(),
        ),
    };
    Node { position, value }
}

/// What the YAML crate yields of a node.
enum Yaml {
    Null,
    /// A boolean or number.
    Resolved(serde_json::Value),
    Text(String),
    List(Vec<Spanned<Self>>),
    Map(Vec<(Spanned<String>, Spanned<Self>)>),
}

impl<'de> Deserialize<'de> for Yaml {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(YamlVisitor)
    }
}

struct YamlVisitor;

impl<'de> Visitor<'de> for YamlVisitor {
    type Value = Yaml;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a scalar, a list or a mapping")
    }

    fn visit_unit<E>(self) -> Result<Yaml, E> {
        Ok(Yaml::Null)
    }

    fn visit_none<E>(self) -> Result<Yaml, E> {
        Ok(Yaml::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Yaml, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Yaml, E> {
        Ok(Yaml::Resolved(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Yaml, E> {
        Ok(Yaml::Resolved(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Yaml, E> {
        Ok(Yaml::Resolved(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Yaml, E> {
        Ok(Yaml::Resolved(value.into()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Yaml, E> {
        Ok(Yaml::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Yaml, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Yaml::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Yaml, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Yaml::Map(entries))
    }
}

/// A mapping whose keys the language knows.
pub(crate) struct Section<'a> {
    entries: &'a [Entry],
    /// What each unknown key is near to, where it is near to any.
    unknown: Vec<Option<&'static str>>,
    position: Position,
    path: String,
    sink: &'a RefCell<Sink>,
}

impl<'a> Section<'a> {
    /// Returns the field, where the file has it.
    pub(crate) fn field(&self, key: &str) -> Option<Field<'a>> {
        let entry = self.entries.iter().find(|entry| entry.key == key)?;
        Some(Field { node: &entry.node, path: join(&self.path, key), sink: self.sink })
    }

    /// Returns the field; it is an error where the file lacks it.
    pub(crate) fn require(&self, key: &str, accepted: &str) -> Option<Field<'a>> {
        let field = self.field(key);
        if field.is_none() && !self.is_mistyped(key) {
            self.fail(&format!("`{key}` is missing (accepted: {accepted})"));
        }
        field
    }

    /// Sets `target` to what `read` makes of the field, where the file has it and it is good.
    pub(crate) fn set<T>(
        &self,
        key: &str,
        target: &mut T,
        read: impl FnOnce(&Field<'a>) -> Option<T>,
    ) {
        if let Some(value) = self.field(key).and_then(|field| read(&field)) {
            *target = value;
        }
    }

    /// Returns whether an unknown key was told that is near to this one, which then is not missing.
    pub(crate) fn is_mistyped(&self, key: &str) -> bool {
        self.unknown.contains(&Some(key))
    }

    /// Returns whether an unknown key was told: what seems to be missing may be meant by it.
    pub(crate) fn has_unknown(&self) -> bool {
        !self.unknown.is_empty()
    }

    /// Records a fault of the section as a whole.
    pub(crate) fn fail(&self, message: &str) {
        self.sink.borrow_mut().push(self.position, &self.path, message.to_owned());
    }
}

/// A value of the document and the path to it.
pub(crate) struct Field<'a> {
    node: &'a Node,
    path: String,
    sink: &'a RefCell<Sink>,
}

impl<'a> Field<'a> {
    pub(crate) fn new(node: &'a Node, path: &str, sink: &'a RefCell<Sink>) -> Self {
        Self { node, path: path.to_owned(), sink }
    }

    pub(crate) fn node(&self) -> &'a Node {
        self.node
    }

    /// Records a fault of this value.
    pub(crate) fn fail(&self, message: impl Into<String>) {
        self.sink.borrow_mut().push(self.node.position, &self.path, message.into());
    }

    /// Records a fault of a value that is a secret, whatever the message says of it.
    pub(crate) fn fail_hidden(&self, message: String) {
        if let Value::Scalar(scalar) = &self.node.value {
            self.fail(mask(&Scalar { hidden: true, ..scalar.clone() }, message));
        }
    }

    /// Returns whether the value came from a file.
    pub(crate) fn is_hidden(&self) -> bool {
        matches!(&self.node.value, Value::Scalar(scalar) if scalar.hidden)
    }

    /// Records a fault of the key that this value stands behind.
    pub(crate) fn fail_key(&self, entry: &Entry, message: impl Into<String>) {
        self.sink.borrow_mut().push(entry.key_position, &self.path, message.into());
    }

    /// Records what is accepted and yet likely a mistake.
    pub(crate) fn warn(&self, message: impl Into<String>) {
        self.sink.borrow_mut().warn(self.node.position, &self.path, message.into());
    }

    /// Returns whether further errors are counted only.
    pub(crate) fn is_full(&self) -> bool {
        self.sink.borrow().is_full()
    }

    /// Returns whether an error at `path`, or below it, was told.
    pub(crate) fn is_told(&self, path: &str) -> bool {
        self.sink.borrow().has_errors_at(path)
    }

    /// Returns its place for people: `sidecar.yaml:14:9`.
    pub(crate) fn place(&self) -> String {
        self.sink.borrow().place(self.node.position)
    }

    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// Returns the value of `key` where this is a mapping that has it; tells nothing.
    pub(crate) fn child(&self, key: &str) -> Option<Self> {
        let Value::Map(entries) = &self.node.value else { return None };
        let entry = entries.iter().find(|entry| entry.key == key)?;
        Some(Self { node: &entry.node, path: join(&self.path, key), sink: self.sink })
    }

    /// Returns the item of that index where this is a list that has it; tells nothing.
    pub(crate) fn item(&self, index: usize) -> Option<Self> {
        let Value::List(items) = &self.node.value else { return None };
        let path = format!("{}[{index}]", self.path);
        Some(Self { node: items.get(index)?, path, sink: self.sink })
    }

    /// Returns the text of each item's `name` as written; tells nothing.
    pub(crate) fn item_names(&self) -> Vec<&'a str> {
        let Value::List(items) = &self.node.value else { return Vec::new() };
        let name = |item: &'a Node| {
            let Value::Map(entries) = &item.value else { return None };
            let entry = entries.iter().find(|entry| entry.key == "name")?;
            let Value::Scalar(scalar) = &entry.node.value else { return None };
            Some(scalar.text.as_str())
        };
        items.iter().filter_map(name).collect()
    }

    /// Returns whether this is a list without items.
    pub(crate) fn is_empty(&self) -> bool {
        matches!(&self.node.value, Value::Null)
            || matches!(&self.node.value, Value::List(items) if items.is_empty())
    }

    /// Returns the mapping; each key that is not in `keys` is an error. Nothing behind the key
    /// counts as an empty mapping.
    pub(crate) fn section(&self, keys: &[&'static str]) -> Option<Section<'a>> {
        let entries = match &self.node.value {
            Value::Map(entries) => entries.as_slice(),
            Value::Null => &[],
            _ => return self.wrong_shape("a mapping of keys to values"),
        };
        let mut unknown = Vec::new();
        for entry in entries.iter().filter(|entry| !keys.contains(&entry.key.as_str())) {
            let key = entry.key.as_str();
            unknown.push(nearest(key, keys.iter().copied()));
            let message = format!(
                "unknown key \"{key}\" (accepted: {}){}",
                keys.join(", "),
                did_you_mean(key, keys.iter().copied())
            );
            self.sink.borrow_mut().push(entry.key_position, &join(&self.path, key), message);
        }
        Some(Section {
            entries,
            unknown,
            position: self.node.position,
            path: self.path.clone(),
            sink: self.sink,
        })
    }

    /// Returns the items of a list. Nothing behind the key counts as an empty list.
    pub(crate) fn items(&self) -> Option<Vec<Self>> {
        match &self.node.value {
            Value::List(items) => Some(
                items
                    .iter()
                    .enumerate()
                    .map(|(index, node)| Self {
                        node,
                        path: format!("{}[{index}]", self.path),
                        sink: self.sink,
                    })
                    .collect(),
            ),
            Value::Null => Some(Vec::new()),
            _ => self.wrong_shape("a list"),
        }
    }

    /// Returns the entries of a mapping whose keys are free.
    pub(crate) fn entries(&self) -> Option<Vec<(&'a Entry, Self)>> {
        match &self.node.value {
            Value::Map(entries) => Some(
                entries
                    .iter()
                    .map(|entry| {
                        let path = join(&self.path, &entry.key);
                        (entry, Self { node: &entry.node, path, sink: self.sink })
                    })
                    .collect(),
            ),
            Value::Null => Some(Vec::new()),
            _ => self.wrong_shape("a mapping of keys to values"),
        }
    }

    /// Returns the items of a list as `read` takes them, without the faulty ones.
    pub(crate) fn list_of<T>(&self, read: impl FnMut(&Self) -> Option<T>) -> Option<Vec<T>> {
        Some(self.items()?.iter().filter_map(read).collect())
    }

    /// Returns what `parse` makes of the scalar's text.
    pub(crate) fn parse<T>(&self, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        let scalar = self.scalar("a single value")?;
        match parse(&scalar.text) {
            Ok(value) => Some(value),
            Err(message) => {
                self.fail(mask(scalar, message));
                None
            }
        }
    }

    /// Returns the text of a secret; its faults are told without it.
    pub(crate) fn secret(&self) -> Option<&'a str> {
        Some(&self.scalar("a single value")?.text)
    }

    /// Returns the text.
    pub(crate) fn text(&self) -> Option<&'a str> {
        Some(&self.scalar("text")?.text)
    }

    /// Returns a whole number from `min` to `max`.
    pub(crate) fn integer<T>(&self, min: T, max: T) -> Option<T>
    where
        T: FromStr + PartialOrd + fmt::Display,
    {
        self.parse(|text| match text.parse::<T>() {
            Ok(value) if value >= min && value <= max => Ok(value),
            Ok(_) => Err(format!("{text} is out of bounds (accepted: {min} to {max})")),
            Err(_) => Err(format!(
                "\"{text}\" is not accepted (accepted: a whole number, {min} to {max})"
            )),
        })
    }

    /// Returns a boolean.
    pub(crate) fn boolean(&self) -> Option<bool> {
        self.parse(|text| match text {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => {
                let hint = match text.to_ascii_lowercase().as_str() {
                    "yes" | "on" | "y" | "1" | "true" => "; did you mean \"true\"?",
                    "no" | "off" | "n" | "0" | "false" => "; did you mean \"false\"?",
                    _ => "",
                };
                Err(format!("\"{text}\" is not accepted (accepted: true, false){hint}"))
            }
        })
    }

    /// Returns whether this is the text `true`; tells nothing.
    pub(crate) fn is_true(&self) -> bool {
        matches!(&self.node.value, Value::Scalar(scalar) if scalar.text == "true")
    }

    /// Returns the variant of that name.
    pub(crate) fn one_of<T: Copy>(&self, accepted: &[(&str, T)]) -> Option<T> {
        self.parse(|text| {
            accepted.iter().find(|(name, _)| *name == text).map(|(_, value)| *value).ok_or_else(
                || {
                    let names = || accepted.iter().map(|(name, _)| *name);
                    format!(
                        "\"{text}\" is not accepted (accepted: {}){}",
                        list(names()),
                        did_you_mean(text, names())
                    )
                },
            )
        })
    }

    fn scalar(&self, accepted: &str) -> Option<&'a Scalar> {
        match &self.node.value {
            Value::Scalar(scalar) => Some(scalar),
            _ => self.wrong_shape(accepted),
        }
    }

    fn wrong_shape<T>(&self, accepted: &str) -> Option<T> {
        let found = match &self.node.value {
            Value::Faulty => return None,
            Value::Null => {
                self.fail(format!(
                    "has no value (accepted: {accepted}); leave the key out for its default"
                ));
                return None;
            }
            Value::Scalar(scalar) if scalar.hidden => "***".to_owned(),
            Value::Scalar(scalar) => format!("\"{}\"", scalar.text),
            Value::List(_) => "a list".to_owned(),
            Value::Map(_) => "a mapping".to_owned(),
        };
        self.fail(format!("{found} is not accepted (accepted: {accepted})"));
        None
    }
}

/// Leaves of the message about a hidden value what is accepted: the rest may hold parts of it.
fn mask(scalar: &Scalar, message: String) -> String {
    if !scalar.hidden {
        return message;
    }
    let accepted =
        accepted(&message).filter(|text| scalar.text.is_empty() || !text.contains(&scalar.text));
    format!("\"***\" is not accepted{}", accepted.unwrap_or_default())
}

/// Leaves of the message nothing that its author may have quoted.
fn mask_all(message: String) -> String {
    // A plugin's words on what it accepts are its own, but for those that are serde's.
    let expected = message.rsplit_once(", expected ").map(|(_, text)| text);
    let accepted = match (accepted(&message), expected) {
        (Some(accepted), _) => accepted.to_owned(),
        (None, Some(expected)) => format!(" (accepted: {expected})"),
        (None, None) => String::new(),
    };
    format!("\"***\" is not accepted{accepted}")
}

/// Returns ` (accepted: …)` of a message.
fn accepted(message: &str) -> Option<&str> {
    [" (accepted: ", " (declared: "].iter().filter_map(|start| message.find(start)).min().and_then(
        |start| {
            let mut depth = 0_usize;
            let end = message[start..].char_indices().find_map(|(at, c)| {
                match c {
                    '(' => depth += 1,
                    ')' => depth = depth.saturating_sub(1),
                    _ => {}
                }
                (c == ')' && depth == 0).then_some(start + at + 1)
            })?;
            message.get(start..end)
        },
    )
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_much_is_told_in_our_words_wherever_it_is_noticed() {
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..8 {
            let aliases = vec![format!("*a{}", level - 1); 10].join(", ");
            bomb.push_str(&format!("a{level}: &a{level} [{aliases}]\n"));
        }
        let text = "x".repeat(3_000_000);
        let long = format!("a: &a {text}\nb:\n{}", "- *a\n".repeat(1000));
        for yaml in [
            bomb,
            long,
            "[".repeat(5000),
            "{a: ".repeat(5000),
            format!("a:\n  {}x", "- ".repeat(50)),
        ] {
            let (position, message) = parse(&yaml, 0).expect_err("too large");
            assert!(message.starts_with("is too large from here on (accepted: "), "{message}");
            assert!(position.line > 0);
        }
        for (yaml, line, expected) in [
            ("a: 1\nnull: 2\n", 2, "a key without text"),
            ("a: 1\n? [a]\n: 2\n", 2, "a key that is no text"),
            ("a: &a\n  b: *a\n", 2, "an alias of what it stands in"),
        ] {
            let (position, message) = parse(yaml, 0).expect_err("no configuration");
            assert!(message.starts_with(expected), "{message}");
            assert_eq!(position.line, line, "{message}");
        }
    }
}
