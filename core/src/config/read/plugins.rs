//! The `plugins` section.

use std::path::Path;
use std::time::Duration;

use super::{LIBRARY_KEYS, PLUGINS_KEYS, Reader, block, items, protocol_types, timeout, unique};
use crate::config::raw::Field;
use crate::config::{Library, Plugins, value};

impl Reader<'_> {
    pub(super) fn plugins(&self, field: &Field<'_>) -> Plugins {
        let mut plugins = Plugins::default();
        let Some(section) = field.section(PLUGINS_KEYS) else { return plugins };
        let mut directory = self.files.source.directory.to_owned();
        section.set("directory", &mut directory, |f| {
            Some(self.files.source.directory.join(f.text()?))
        });
        if let Some(field) = section.field("libraries") {
            let libraries = items(&field, |item| library(item, &directory));
            unique(&field, "plugin", &libraries, |library| &library.name);
            plugins.libraries = libraries.into_iter().map(|(_, library)| library).collect();
        }
        section.set("generations", &mut plugins.generations, |f| f.integer(1, 256));
        section.set("panics", &mut plugins.panics, |f| f.integer(1, 1_000_000));
        let positive = |f: &Field<'_>| timeout(f, Duration::from_millis(1));
        section.set("panics_within", &mut plugins.panics_within, positive);
        section.set("slow_poll", &mut plugins.slow_poll, positive);
        plugins
    }
}

fn library(field: &Field<'_>, directory: &Path) -> Option<Library> {
    let section = field.section(LIBRARY_KEYS)?;
    let name = section.require("name", "text").and_then(|f| f.parse(value::name));
    let path = section.require("library", "the path of a shared library").and_then(|f| {
        f.parse(|text| {
            if text.is_empty() {
                Err("is empty (accepted: the path of a shared library)".into())
            } else {
                Ok(directory.join(text))
            }
        })
    });
    let mut sha256 = None;
    section.set("sha256", &mut sha256, |f| f.parse(value::sha256).map(Some));
    let mut required = true;
    section.set("required", &mut required, Field::boolean);
    let mut types = None;
    section.set("protocol_types", &mut types, |f| protocol_types(f).map(Some));
    let config = section.field("config").map(|field| block(&field)).unwrap_or_default();
    Some(Library { name: name?, path: path?, sha256, required, protocol_types: types, config })
}
