//! The files of a directory as one document: named lists join, mappings merge key by key, and what
//! is given twice is an error that names both places.

use std::cell::RefCell;
use std::sync::Arc;

use super::error::{Position, Sink};
use super::raw::{Entry, Node, Value};

/// Lists of named things, which join. All others are values that one file gives whole.
const NAMED_LISTS: [&str; 6] = [
    "tunnels",
    "routes",
    "relay.listeners",
    "relay.credentials",
    "relay.token_issuers",
    "plugins.libraries",
];

/// Merges the documents, in order; where a fault is told, the first value stays.
pub(super) fn merge(documents: Vec<Node>, sink: &RefCell<Sink>) -> Node {
    let mut documents = documents.into_iter();
    let Some(mut root) = documents.next() else {
        return Node { position: Position::default(), value: Value::Null };
    };
    let several = documents.len() > 0;
    for document in documents {
        into(&mut root, document, "", sink);
    }
    if several {
        // What the document as a whole lacks, no single file lacks.
        root.position = Position::default();
        root.position.file = sink.borrow().whole();
    }
    root
}

fn into(to: &mut Node, from: Node, path: &str, sink: &RefCell<Sink>) {
    let named_list = NAMED_LISTS.contains(&path);
    match (&mut to.value, from.value) {
        (_, Value::Null) if named_list || path.is_empty() => {}
        (Value::Null, value) if named_list || path.is_empty() => {
            *to = Node { position: from.position, value };
        }
        // Nothing behind a section's key is an empty section.
        (Value::Map(_), Value::Null) => {}
        (Value::Null, value @ Value::Map(_)) => *to = Node { position: from.position, value },
        (Value::List(items), Value::List(more)) if named_list => items.extend(more),
        (Value::Map(entries), Value::Map(more)) => {
            for entry in more {
                join(entries, entry, path, sink);
            }
        }
        (Value::Scalar(one), Value::Scalar(other))
            if path == "version" && one.text == other.text => {}
        (Value::Faulty, _) | (_, Value::Faulty) => {}
        _ => {
            let place = sink.borrow().place(to.position);
            let message = format!("is given already, at {place} (accepted: in one file)");
            sink.borrow_mut().push(from.position, path, message);
        }
    }
}

fn join(entries: &mut Vec<Entry>, entry: Entry, path: &str, sink: &RefCell<Sink>) {
    match entries.iter_mut().find(|known| known.key == entry.key) {
        None => entries.push(entry),
        Some(known) => {
            let path = if path.is_empty() { entry.key } else { format!("{path}.{}", entry.key) };
            into(&mut known.node, entry.node, &path, sink);
        }
    }
}

/// Names of the files that positions speak of: each file, then what they make together.
pub(super) fn names(source: &super::Source) -> Vec<Arc<str>> {
    let files = source.files.iter().map(|file| &file.path);
    files.chain([&source.path]).map(|path| path.display().to_string().into()).collect()
}
