use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::Map;

use super::*;
use crate::config::read::SECTIONS;

fn file(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Each key of the language by its path, `routes[].limits.rate.count`, with its schema.
struct Keys {
    definitions: Json,
    by_path: BTreeMap<String, Json>,
    /// In the order of the types.
    order: Vec<String>,
    /// Keys of each section by its path.
    sections: BTreeMap<String, Vec<String>>,
}

impl Keys {
    fn of(schema: &Json) -> Self {
        let mut keys = Self {
            definitions: schema["$defs"].clone(),
            by_path: BTreeMap::new(),
            order: Vec::new(),
            sections: BTreeMap::new(),
        };
        keys.walk(schema, "");
        keys
    }

    fn walk(&mut self, object: &Json, path: &str) {
        let properties = object["properties"].as_object().unwrap();
        self.sections.insert(path.to_owned(), properties.keys().cloned().collect());
        let mut below = Vec::new();
        // In the reader's order: the type's is lost where a map is sorted.
        let order = SECTIONS.iter().find(|(section, _)| *section == path).map_or(&[][..], |s| s.1);
        for (key, property) in order.iter().filter_map(|key| properties.get_key_value(*key)) {
            let mut path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            self.order.push(path.clone());
            self.by_path.insert(path.clone(), property.clone());
            let target = match property.get("items") {
                Some(items) => {
                    path += "[]";
                    items.get("$ref").or_else(|| items.get("anyOf")?.get(1)?.get("$ref"))
                }
                None => property.get("$ref"),
            };
            if let Some(name) = target.and_then(Json::as_str) {
                let name = name.rsplit('/').next().unwrap();
                below.push((path, self.definitions[name].clone()));
            }
        }
        for (path, definition) in below {
            self.walk(&definition, &path);
        }
    }
}

#[test]
fn the_schemas_keys_are_the_readers() {
    let keys = Keys::of(&annotated());
    for (section, expected) in SECTIONS {
        let mut found = keys.sections.get(*section).cloned().unwrap_or_default();
        let mut expected: Vec<String> = expected.iter().map(ToString::to_string).collect();
        found.sort();
        expected.sort();
        assert_eq!(found, expected, "section \"{section}\"");
    }
    assert_eq!(keys.sections.len(), SECTIONS.len());
}

#[test]
fn every_key_says_what_it_means_and_takes() {
    let keys = Keys::of(&annotated());
    for (path, schema) in &keys.by_path {
        assert!(schema["description"].is_string(), "{path} has no description");
    }
    let text = schema().to_string();
    assert!(!text.contains("\"x-"), "no extension is printed");
    assert_eq!(schema()["title"], "Sidelane configuration");
}

/// YAML as JSON, variables filled in as text.
fn json(yaml: &str) -> Json {
    serde_saphyr::from_str(yaml).unwrap_or_else(|error| panic!("{error}:\n{yaml}"))
}

/// Returns a configuration that an example is a part of; `None`: it is a part of something else.
fn whole(example: &str) -> Option<String> {
    // Indented ones stand in a list of prose.
    let json = serde_saphyr::from_str::<Json>(example).ok()?;
    let keys = json.as_object()?;
    let known = |key: &String| SECTIONS[0].1.contains(&key.as_str());
    if !keys.keys().all(known) {
        return None;
    }
    let mut text = example.to_owned();
    for (key, line) in [("version", "version: 1\n"), ("relay", "relay: {}\n")] {
        if !keys.contains_key(key) && (key != "relay" || !keys.contains_key("sidecar")) {
            text.insert_str(0, line);
        }
    }
    Some(text)
}

fn examples() -> Vec<(String, String)> {
    let mut examples = vec![("sidecar.yaml".to_owned(), file("sidecar.yaml"))];
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for directory in ["examples/config", "docs", "."] {
        let Ok(entries) = std::fs::read_dir(root.join(directory)) else { continue };
        for entry in entries {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let path = format!("{directory}/{name}");
            if directory == "examples/config" && name.ends_with(".yaml") {
                examples.push((path.clone(), file(&path)));
            } else if name.ends_with(".md") {
                let text = file(&path);
                for (index, block) in text.split("```yaml\n").skip(1).enumerate() {
                    let block = block.split("```").next().unwrap();
                    examples
                        .extend(whole(block).map(|text| (format!("{path}, block {index}"), text)));
                }
            }
        }
    }
    examples
}

#[test]
fn examples_are_valid_by_the_schema_and_the_reader() {
    let validator = jsonschema::validator_for(&schema()).unwrap();
    let examples = examples();
    assert!(examples.len() > 1, "examples are found");
    for (name, text) in examples {
        let faults: Vec<String> = validator
            .iter_errors(&json(&text))
            .map(|error| format!("{}: {error}", error.instance_path()))
            .collect();
        assert!(faults.is_empty(), "{name}: {}", faults.join("\n"));
        // What files and variables hold is not there.
        let mut lines: Vec<String> = Vec::new();
        if let Err(errors) =
            super::super::parse(&Source::from_text(Path::new(&name), text), &|name| {
                let hash = || format!("sha256:{:064}", 0);
                match name {
                    name if name.ends_with("TOKEN_HASH") => Some(hash()),
                    name => name.contains("TOKEN").then(|| "0123456789abcdef".to_owned()),
                }
            })
        {
            lines.extend(errors.errors().iter().map(ToString::to_string));
            lines.retain(|line| !line.contains("cannot read"));
        }
        assert!(lines.is_empty(), "{name}: {}", lines.join("\n"));
    }
}

#[test]
fn the_schema_refuses_what_an_editor_should_mark() {
    let validator = jsonschema::validator_for(&schema()).unwrap();
    let check = |yaml: &str, good: bool| {
        assert_eq!(validator.is_valid(&json(yaml)), good, "{yaml}");
    };
    check("{version: 1, relay: {}}", true);
    check("{version: 1, relay: }", true);
    check("{version: 1, relay: {threads: '${THREADS:-4}'}}", true);
    check("{version: 1, drain_timeout: '${file:x}'}", true);
    check("{version: 2}", false);
    check("{relay: {}}", false);
    check("{version: 1, realy: {}}", false);
    check("{version: 1, relay: {threads: 1000}}", false);
    check("{version: 1, relay: {listeners: [{name: web}]}}", false);
    check("{version: 1, relay: {listeners: [{name: web, address: 'a:1', balance: fair}]}}", false);
    check("{version: 1, drain_timeout: 5}", false);
    check("{version: 1, routes: [{subdomain: a, limits: {body: 5MB}}]}", false);
    check("{version: 1, routes: [{subdomain: a, request_headers: {set: {x: [a, b]}}}]}", true);
}

/// A configuration in which every key has a place.
fn skeleton() -> Json {
    json!({
        "version": 1,
        "relay": { "listeners": [{ "name": "web", "address": "127.0.0.1:1" }] },
        "sidecar": {},
        "tunnels": [{ "name": "t", "service": "https://localhost:1", "health_check": { "type": "http" } }],
        "routes": [{ "subdomain": "a", "tunnel": "t", "limits": {
            "rate": { "count": 1 }, "rate_per_client": { "count": 1 } } }],
        "plugins": { "libraries": [{ "name": "p", "library": "p" }] },
    })
}

/// Returns the faults that the reader finds at the key with this value.
fn faults_at(path: &str, value: &Json) -> Vec<String> {
    let mut root = skeleton();
    // These two do not stand together.
    if path.starts_with("routes[].tunnels")
        && let Some(route) = root["routes"][0].as_object_mut()
    {
        route.remove("tunnel");
    }
    let mut node = &mut root;
    for step in path.split('.') {
        let key = step.trim_end_matches("[]");
        if !node.is_object() {
            *node = Json::Object(Map::new());
        }
        node = &mut node[key];
        if step.ends_with("[]") {
            if !node.is_array() {
                *node = json!([{}]);
            }
            node = &mut node[0];
        }
    }
    *node = value.clone();
    let source = Source::from_text(Path::new("c.yaml"), root.to_string());
    let Err(errors) = super::super::parse(&source, &|_| None) else { return Vec::new() };
    let place = path.replace("[]", "[0]");
    errors.errors().iter().filter(|e| e.path == place).map(ToString::to_string).collect()
}

#[test]
fn the_schemas_bounds_are_the_readers() {
    let keys = Keys::of(&annotated());
    let mut checked = 0;
    let mut check = |path: &str, value: Json, good: bool| {
        let faults = faults_at(path, &value);
        assert_eq!(faults.is_empty(), good, "{path}: {value}: {faults:?}");
        checked += 1;
    };
    for (path, schema) in &keys.by_path {
        if let (Some(min), Some(max)) = (schema["minimum"].as_u64(), schema["maximum"].as_u64()) {
            check(path, json!(min), true);
            check(path, json!(max), true);
            check(path, json!(max + 1), false);
            if min > 0 {
                check(path, json!(min - 1), false);
            }
            continue;
        }
        let accepted = schema[ACCEPTED].as_str().unwrap_or_default();
        if let Some((min, max)) =
            accepted.strip_prefix('`').and_then(|rest| rest.strip_suffix('`')?.split_once("` to `"))
        {
            check(path, json!(min), true);
            check(path, json!(max), true);
            if let Ok(max) = crate::config::value::duration(max) {
                check(path, json!(duration_text(max + std::time::Duration::from_millis(1))), false);
            } else if let Ok(max) = crate::config::value::size(max) {
                check(path, json!(size_text(max + 1)), false);
            }
            if let Ok(min) = crate::config::value::duration(min)
                && !min.is_zero()
            {
                check(path, json!("0s"), false);
            }
        }
        for name in schema["anyOf"][0]["enum"].as_array().into_iter().flatten() {
            check(path, name.clone(), true);
        }
    }
    assert!(checked > 200, "{checked}");
}

/// `docs/config.md` with its tables as the schema has them. A table stands between
/// `<!-- keys: PATH -->` and `<!-- end -->`, and has the keys below PATH that no other table has.
fn with_tables(text: &str) -> String {
    const BEGIN: &str = "<!-- keys: ";
    let schema = annotated();
    let keys = Keys::of(&schema);
    let tables: Vec<&str> =
        text.split(BEGIN).skip(1).map(|rest| rest.split_once(" -->").unwrap().0).collect();
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(BEGIN) {
        let (table, after) = after.split_once(" -->\n").unwrap();
        let (_, after) = after.split_once("<!-- end -->").expect("a table has an end");
        writeln!(out, "{before}{BEGIN}{table} -->").unwrap();
        out += "| key | default | accepted | meaning |\n|---|---|---|---|\n";
        let below = |path: &str, table: &str| {
            table == "." && !path.contains('.')
                || path.strip_prefix(table).is_some_and(|rest| rest.starts_with(['.', '[']))
        };
        for path in &keys.order {
            // The nearest table has it.
            let nearest = tables
                .iter()
                .filter(|other| below(path, other))
                .max_by_key(|other| if **other == "." { 0 } else { other.len() });
            if nearest == Some(&table) {
                out += &row(path, &keys.by_path[path]);
            }
        }
        out += "<!-- end -->";
        rest = after;
    }
    out + rest
}

fn row(path: &str, schema: &Json) -> String {
    let code = |value: &Json| match value {
        Json::String(text) if text.is_empty() => "empty".to_owned(),
        Json::String(text) => format!("`{text}`"),
        Json::Array(items) if items.is_empty() => "none".to_owned(),
        Json::Array(items) => {
            let items: Vec<&str> = items.iter().filter_map(Json::as_str).collect();
            format!("`[{}]`", items.join(", "))
        }
        other => format!("`{other}`"),
    };
    let section = schema.get("$ref").is_some();
    let default = match (schema.get(REQUIRED), schema.get(DEFAULT), schema.get("default")) {
        (Some(_), ..) => "required".to_owned(),
        (_, Some(text), _) => text.as_str().unwrap().to_owned(),
        (.., Some(value)) => code(value),
        _ if section && (path == "plugins" || path == "log") => "as below".to_owned(),
        _ if section && path.contains('.') && !path.contains('[') => "as below".to_owned(),
        _ => "none".to_owned(),
    };
    let accepted = match (schema.get("items"), schema[ACCEPTED].as_str()) {
        (Some(items), _) => match items[ACCEPTED].as_str() {
            Some(accepted) => format!("a list: {accepted}"),
            None => "a list of sections".to_owned(),
        },
        (None, Some(accepted)) => accepted.to_owned(),
        (None, None) if section => "a section".to_owned(),
        (None, None) => String::new(),
    };
    let meaning = schema["description"].as_str().unwrap().trim_end_matches('.');
    format!("| `{path}` | {default} | {accepted} | {meaning} |\n")
}

/// `SIDELANE_BLESS=1` writes the tables anew.
#[test]
fn the_references_tables_are_the_schemas() {
    let text = file("docs/config.md");
    let expected = with_tables(&text);
    for path in Keys::of(&annotated()).order {
        assert!(expected.contains(&format!("\n| `{path}` |")), "no table has {path}");
    }
    if std::env::var_os("SIDELANE_BLESS").is_some() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/config.md");
        std::fs::write(path, expected).unwrap();
    } else {
        assert!(
            text == expected,
            "the tables of docs/config.md are stale: SIDELANE_BLESS=1 cargo test -p sidelane --lib \
             references_tables"
        );
    }
}
