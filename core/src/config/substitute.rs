//! `${NAME}`, `${NAME:-default}` and `${file:path}` in scalar values; `$${` stands for `${`.
//!
//! Works on the parsed tree, so that places stay right and a value cannot bring in keys of its own.

use super::error::Sink;
use super::files::Files;
use super::raw::{Node, Value};

/// Where values come from.
pub(crate) struct Context<'a, 'b> {
    pub(crate) env: &'a dyn Fn(&str) -> Option<String>,
    /// Where files are read from.
    pub(crate) files: &'a mut Files<'b>,
}

/// Substitutes in every scalar below `node`; faulty ones are told and marked.
pub(crate) fn substitute(
    node: &mut Node,
    path: &str,
    context: &mut Context<'_, '_>,
    sink: &mut Sink,
) {
    match &mut node.value {
        Value::Scalar(scalar) if scalar.text.contains("${") => {
            match expand(&scalar.text, context) {
                Ok((text, hidden)) => scalar.substitute(text, hidden),
                Err(message) => {
                    sink.push(node.position, path, message);
                    node.value = Value::Faulty;
                }
            }
        }
        Value::List(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                substitute(item, &format!("{path}[{index}]"), context, sink);
            }
        }
        Value::Map(entries) => {
            for entry in entries {
                let path = if path.is_empty() {
                    entry.key.clone()
                } else {
                    format!("{path}.{}", entry.key)
                };
                substitute(&mut entry.node, &path, context, sink);
            }
        }
        Value::Null | Value::Faulty | Value::Scalar(_) => {}
    }
}

/// Returns the text and whether a part of it came from a file.
fn expand(text: &str, context: &mut Context<'_, '_>) -> Result<(String, bool), String> {
    let mut out = String::with_capacity(text.len());
    let mut hidden = false;
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        if rest[..start].ends_with('$') {
            out.push_str(&rest[..start]);
            out.push('{');
            rest = &rest[start + 2..];
            continue;
        }
        out.push_str(&rest[..start]);
        let Some(end) = rest[start..].find('}') else {
            return Err(format!(
                "\"{}\" has no closing brace (accepted: ${{NAME}}, ${{NAME:-default}}, \
                 ${{file:path}}; $${{ for the two characters themselves)",
                &rest[start..]
            ));
        };
        let inner = &rest[start + 2..start + end];
        rest = &rest[start + end + 1..];
        if let Some(path) = inner.strip_prefix("file:") {
            out.push_str(&read(path, context)?);
            hidden = true;
        } else {
            out.push_str(&variable(inner, context)?);
        }
    }
    out.push_str(rest);
    Ok((out, hidden))
}

fn variable(inner: &str, context: &Context<'_, '_>) -> Result<String, String> {
    let (name, default) = match inner.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (inner, None),
    };
    let good = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if !good {
        return Err(format!(
            "\"${{{inner}}}\" is not accepted (accepted: ${{NAME}}, ${{NAME:-default}}, ${{file:path}})"
        ));
    }
    // As in a shell: `:-` takes the default for an empty variable too.
    match ((context.env)(name), default) {
        (Some(value), None) => Ok(value),
        (Some(value), Some(_)) if !value.is_empty() => Ok(value),
        (_, Some(default)) => Ok(default.to_owned()),
        (None, None) => Err(format!(
            "environment variable {name} is not set (accepted: set it, or ${{{name}:-default}})"
        )),
    }
}

fn read(path: &str, context: &mut Context<'_, '_>) -> Result<String, String> {
    context.files.read_secret(path)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Source;

    fn check(text: &str, expected: Result<&str, &str>) {
        let env = |name: &str| match name {
            "HOST" => Some("example.org".to_owned()),
            "EMPTY" => Some(String::new()),
            _ => None,
        };
        let source = Source::from_text(Path::new("/nowhere/c.yaml"), "");
        let mut files = Files::new(&source);
        let mut context = Context { env: &env, files: &mut files };
        let result = expand(text, &mut context).map(|(text, _)| text);
        match expected {
            Ok(expected) => assert_eq!(result.as_deref(), Ok(expected), "{text}"),
            Err(part) => assert!(result.clone().unwrap_err().contains(part), "{text}: {result:?}"),
        }
    }

    #[test]
    fn variables_defaults_and_escapes_expand() {
        check("${HOST}", Ok("example.org"));
        check("a.${HOST}:${PORT:-80}/", Ok("a.example.org:80/"));
        check("${EMPTY}", Ok(""));
        check("${EMPTY:-x}", Ok("x"));
        check("${NONE:-}", Ok(""));
        check("$${HOST} $HOST $", Ok("${HOST} $HOST $"));
        check("${NONE}", Err("NONE is not set"));
        check("${HOST", Err("no closing brace"));
        check("${}", Err("is not accepted"));
        check("${A B}", Err("is not accepted"));
        check("${file:token}", Err("cannot read /nowhere/token"));
    }

    #[test]
    fn what_is_expanded_is_not_expanded_again() {
        let env = |_: &str| Some("${OTHER}".to_owned());
        let source = Source::from_text(Path::new("c.yaml"), "");
        let mut files = Files::new(&source);
        let mut context = Context { env: &env, files: &mut files };
        assert_eq!(expand("${X}", &mut context), Ok(("${OTHER}".to_owned(), false)));
    }
}
