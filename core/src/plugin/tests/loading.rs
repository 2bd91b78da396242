//! What is refused, and in which words.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::DRAIN;
use super::lent::Metrics;
use super::libraries::{c_library, c_plugin, directory, file, probe_bytes};
use crate::plugin::{
    LIBRARY_BYTES_MAX, Limits, LoadError, LoadFault, PluginSpec, Plugins, inspect, loader,
};

pub(super) fn spec(name: &str, library: &Path) -> PluginSpec {
    PluginSpec {
        name: name.to_owned(),
        library: library.to_owned(),
        sha256: None,
        required: true,
        config: serde_json::Value::Null,
        types: None,
    }
}

fn plugins() -> Plugins {
    Plugins::new(Metrics::default().host(), Limits::default())
}

fn apply_one(spec: PluginSpec) -> LoadError {
    let mut errors = plugins().apply(&[spec], DRAIN).unwrap_err();
    assert_eq!(errors.len(), 1);
    errors.remove(0)
}

/// Asserts that the library is refused with these words, before anything of it is mapped.
#[track_caller]
fn refused(path: &Path, words: &str) {
    let text = inspect(path).unwrap_err().to_string();
    assert!(text.contains(words), "{text:?} does not say {words:?}");
    assert!(text.starts_with(&format!("plugin {}: ", path.display())), "{text}");
    assert!(!text.contains('\n'), "{text}");
    assert_eq!(apply_one(spec("bad", path)).to_string(), text);
}

/// Asserts that the library is refused with these words once it is mapped.
#[track_caller]
fn refused_loaded(path: &Path, words: &str) {
    inspect(path).unwrap();
    let text = apply_one(spec("bad", path)).to_string();
    assert!(text.contains(words), "{text:?} does not say {words:?}");
}

#[test]
fn a_plugin_is_inspected_without_loading() {
    let stamp = inspect(&c_plugin("good.so", &[])).unwrap();
    assert_eq!((&*stamp.name, &*stamp.version, &*stamp.toolchain), ("bare", "1.2.3", "cc"));
    let stamp = inspect(probe_bytes()).unwrap();
    assert_eq!(stamp.name, "sidelane-probe");
    assert!(stamp.toolchain.contains("rustc"), "{stamp:?}");
}

#[test]
fn what_is_no_library_is_refused() {
    refused(
        &file("text.so", b"hello, I am text\n"),
        "not an ELF shared library (it looks like text)",
    );
    refused(&file("script.so", b"#!/bin/sh\n"), "it is a script");
    refused(&file("empty.so", b""), "the file is empty");
    refused(&file("archive.so", b"!<arch>\n\0\0"), "it is a static library");
    refused(&directory().join("nowhere.so"), "no such file");
    refused(directory(), "not a regular file");
    let object = c_library("object.so", &["-c", "-fPIC"], &[]);
    refused(&object, "is an object file, not a shared library");
    let program = c_library("no-pie.so", &["-nostdlib", "-no-pie", "-static", "-Wl,-e,0"], &[]);
    refused(&program, "is an executable, not a shared library");
}

#[test]
fn a_library_that_is_too_large_is_refused() {
    let path = file("large.so", b"\x7fELF");
    let large = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    large.set_len(LIBRARY_BYTES_MAX + 1).unwrap();
    refused(&path, "has 268435457 bytes, more than the 268435456");
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn a_library_without_a_stamp_is_refused() {
    let path = c_plugin("no-stamp.so", &["NO_STAMP"]);
    refused(&path, "exports no `sidelane_plugin_stamp`: it is no Sidelane plugin");
}

#[test]
fn other_versions_are_refused() {
    let major = c_plugin("major.so", &["ABI_MAJOR=3"]);
    refused(&major, "speaks plugin ABI 3, this host speaks 0.5; rebuild it");
    let newer = c_plugin("newer.so", &["ABI_MINOR=6"]);
    refused(&newer, "speaks plugin ABI 0.6, newer than this host's 0.5");
    let older = c_plugin("older.so", &["ABI_MINOR=1"]);
    refused(&older, "speaks plugin ABI 0.1, this host speaks 0.2 to 0.5");
}

#[test]
fn a_plugin_of_the_oldest_minor_version_is_taken() {
    let older = c_plugin("oldest.so", &["ABI_MINOR=2"]);
    assert_eq!(inspect(&older).unwrap().abi, (0, 2));
    let plugins = plugins();
    plugins.apply(&[spec("older", &older)], DRAIN).unwrap();
    assert!(plugins.find("BARE").is_some());
}

#[test]
fn a_plugin_that_aborts_on_panic_is_refused() {
    let aborts = c_plugin("aborts.so", &["PANIC=2"]);
    refused(&aborts, "compiled with panic = \"abort\"");
    refused(&c_plugin("panics.so", &["PANIC=9"]), "says panic strategy 9");
}

#[test]
fn a_stamp_that_is_none_is_refused() {
    let magic = c_plugin("magic.so", &["MAGIC=\"sidelane-plugon\""]);
    refused(&magic, "that is no stamp: its magic");
    refused(&c_plugin("small.so", &["STAMP_SIZE=8"]), "its size is smaller");
    refused(&c_plugin("nameless.so", &["NAME=\"\""]), "its name is empty");
    refused(&c_plugin("latin.so", &["NAME=\"\\xff\""]), "its text is not UTF-8");
}

#[test]
fn another_machine_is_refused() {
    let mut bytes = std::fs::read(c_plugin("machine-base.so", &[])).unwrap();
    let (machine, name) = if bytes[18] == 62 { (183, "aarch64") } else { (62, "x86-64") };
    bytes[18] = machine;
    refused(&file("machine.so", &bytes), &format!("is built for {name}, this host is "));
    bytes[4] = 1;
    refused(&file("bits.so", &bytes), "(32-bit)");
    bytes[4] = 2;
    bytes[5] = 2;
    refused(&file("endian.so", &bytes), "this host is ");
}

#[test]
fn a_truncated_library_is_refused_wherever_it_is_cut() {
    let whole = std::fs::read(c_plugin("whole.so", &[])).unwrap();
    let probe = std::fs::read(probe_bytes()).unwrap();
    let cuts = (5..whole.len()).step_by(97).map(|at| &whole[..at]);
    let pages = (4096..probe.len()).step_by(4096).map(|at| &probe[..at]);
    let mut cases = 0;
    for cut in cuts.chain(pages).chain([&whole[..whole.len() - 1], &probe[..probe.len() - 1]]) {
        let fault = crate::plugin::stamp::read(cut).unwrap_err();
        assert!(matches!(fault, LoadFault::Truncated { .. }), "at {}: {fault}", cut.len());
        cases += 1;
    }
    assert!(cases > 100);
    refused(&file("truncated.so", &whole[..4096]), "is truncated: ");
}

#[test]
fn a_damaged_library_never_panics_the_reader() {
    let whole = std::fs::read(c_plugin("damaged-base.so", &[])).unwrap();
    let mut refusals = 0;
    for at in 0..whole.len().min(2048) {
        for value in [0x00, 0x7f, 0xff] {
            let mut damaged = whole.clone();
            damaged[at] = value;
            refusals += usize::from(crate::plugin::stamp::read(&damaged).is_err());
        }
    }
    assert!(refusals > 100);
}

#[test]
fn a_pinned_hash_must_match() {
    let path = c_plugin("pinned.so", &[]);
    let found = loader::read(&path, None).map_err(|fault| fault.to_string()).ok().unwrap().sha256;
    let error = apply_one(PluginSpec { sha256: Some([7; 32]), ..spec("bad", &path) });
    let pinned = "07".repeat(32);
    let words = format!("has sha256 {}, the configuration pins {pinned}", loader::hex(&found));
    assert!(error.to_string().contains(&words), "{error}");
    plugins().apply(&[PluginSpec { sha256: Some(found), ..spec("good", &path) }], DRAIN).unwrap();
}

#[test]
fn what_others_can_write_is_refused_unless_pinned() {
    let bytes = std::fs::read(c_plugin("writable-base.so", &[])).unwrap();
    let open = file("writable.so", &bytes);
    std::fs::set_permissions(&open, Permissions::from_mode(0o666)).unwrap();
    refused(&open, "the file can be written by anyone (mode 0666); tighten its permissions");

    let shared = tempfile::tempdir_in(directory()).unwrap();
    let inside = shared.path().join("plugin.so");
    std::fs::copy(directory().join("writable-base.so"), &inside).unwrap();
    std::fs::set_permissions(shared.path(), Permissions::from_mode(0o777)).unwrap();
    refused(&inside, "can be written by anyone (mode 0777)");
    let link = directory().join(format!("link-{}.so", std::process::id()));
    std::os::unix::fs::symlink(&inside, &link).unwrap();
    refused(&link, "can be written by anyone (mode 0777)");
    std::fs::remove_file(&link).unwrap();

    let pin = loader::read(&directory().join("writable-base.so"), None)
        .map_err(|fault| fault.to_string())
        .ok()
        .unwrap()
        .sha256;
    plugins().apply(&[PluginSpec { sha256: Some(pin), ..spec("good", &inside) }], DRAIN).unwrap();
}

#[test]
fn unusable_types_are_refused() {
    let lower = c_plugin("lower.so", &["TYPE=\"bare\""]);
    refused_loaded(&lower, "unusable protocol types: a name is not 1 to 32 of A-Z");
    refused_loaded(&c_plugin("none.so", &["TYPES_LEN=0"]), "0 of them, accepted are 1 to 8");
    refused_loaded(&c_plugin("twice.so", &["TYPES_LEN=2"]), "BARE stands twice");
    refused_loaded(&c_plugin("born.so", &["BORN=7"]), "BARE is born 7");
    refused_loaded(&c_plugin("slots.so", &["BORN=1"]), "BARE needs claims, which is null");
}

#[test]
fn an_unusable_vtable_is_refused() {
    refused_loaded(&c_plugin("vt-small.so", &["VT_SIZE=16"]), "vtable is smaller than this ABI's");
    refused_loaded(&c_plugin("vt-null.so", &["CREATE=NULL"]), "slot `create`");
}

#[test]
fn a_library_that_does_not_link_is_refused_with_the_linkers_words() {
    refused_loaded(&c_plugin("unlinked.so", &["CREATE=missing_symbol"]), "missing_symbol");
}

#[test]
fn a_refused_configuration_names_its_place() {
    let config = serde_json::json!({"refuse": true});
    let error = apply_one(PluginSpec { config, ..spec("probe", probe_bytes()) });
    let words = "refused its configuration at refuse: told to refuse";
    assert!(error.to_string().contains(words), "{error}");
    let silent = c_plugin("silent.so", &["REFUSES_SILENTLY"]);
    refused_loaded(&silent, "refused its configuration: without saying why");
}

#[test]
fn two_plugins_for_one_type_are_refused_by_name() {
    let (first, second) = (spec("first", probe_bytes()), spec("second", probe_bytes()));
    let errors = plugins().apply(&[first.clone(), second.clone()], DRAIN).unwrap_err();
    let text = errors[0].to_string();
    let words = "protocol type PROBE is served by plugin \"first\" already, \"second\" cannot";
    assert!(text.contains(words), "{text}");

    let restricted =
        |spec: PluginSpec, name: &str| PluginSpec { types: Some(vec![name.to_owned()]), ..spec };
    let plugins = plugins();
    plugins
        .apply(&[restricted(first.clone(), "PROBE"), restricted(second, "PROBE2")], DRAIN)
        .unwrap();
    assert_eq!(plugins.types().iter().map(AsRef::as_ref).collect::<Vec<_>>(), ["PROBE", "PROBE2"]);
    assert_eq!(&**plugins.find("PROBE2").unwrap().plugin_name(), "second");
    assert_eq!(plugins.libraries(), 1);

    let error = apply_one(restricted(first.clone(), "HTTP"));
    let words = "does not serve protocol type HTTP (serves: PROBE, PROBE2)";
    assert!(error.to_string().contains(words), "{error}");
    let errors = plugins.apply(&[first.clone(), first], DRAIN).unwrap_err();
    assert!(errors[0].to_string().contains("\"first\" is used twice"), "{}", errors[0]);
}

#[test]
fn only_so_many_distinct_libraries_are_loaded() {
    let limits = Limits { generations_max: 2, ..Limits::default() };
    let plugins = Plugins::new(Metrics::default().host(), limits);
    for name in ["one", "two"] {
        let library = c_plugin(&format!("{name}.so"), &[&format!("NAME=\"{name}\"")]);
        plugins.apply(&[spec("plugin", &library)], DRAIN).unwrap();
    }
    let third = c_plugin("three.so", &["NAME=\"three\""]);
    let errors = plugins.apply(&[spec("plugin", &third)], DRAIN).unwrap_err();
    assert!(errors[0].to_string().contains("restart to load more"), "{}", errors[0]);
    assert_eq!(plugins.find("BARE").unwrap().plugin_name().as_ref(), "plugin");
    // A library that is mapped already does not count again.
    plugins.apply(&[spec("plugin", &directory().join("one.so"))], DRAIN).unwrap();
}

#[test]
fn a_failing_set_changes_nothing_and_an_optional_plugin_is_left_out() {
    let plugins = plugins();
    let good = c_plugin("kept.so", &[]);
    plugins.apply(&[spec("good", &good)], DRAIN).unwrap();
    let text = file("not-kept.so", b"text");
    let errors =
        plugins.apply(&[spec("bad", &text), spec("probe", probe_bytes())], DRAIN).unwrap_err();
    assert_eq!(errors.len(), 1);
    assert_eq!(plugins.types().len(), 1);

    let optional = PluginSpec { required: false, ..spec("bad", &text) };
    let applied = plugins.apply(&[spec("good", &good), optional], DRAIN).unwrap();
    assert_eq!((applied.kept, applied.loaded.len()), (vec!["good".to_owned()], 0));
    assert_eq!(applied.failed.len(), 1);

    // An optional plugin whose new library is bad goes on with the one it has.
    let worse = PluginSpec { required: false, ..spec("good", &text) };
    let applied = plugins.apply(&[worse], DRAIN).unwrap();
    assert_eq!((applied.kept, applied.drained.len()), (vec!["good".to_owned()], 0));
}
