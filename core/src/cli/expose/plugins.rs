//! Where `expose` finds plugins.

use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};

/// Plugins that come with the program, by name; the first one must be there.
const NAMES: [&str; 3] = ["http", "websocket", "grpc"];

/// Names a directory of plugins.
const VARIABLE: &str = "SIDELANE_PLUGIN_DIR";

/// Libraries that were found, by name.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found(Vec<(String, PathBuf)>);

impl Found {
    #[cfg(test)]
    pub(super) fn of(found: Vec<(String, PathBuf)>) -> Self {
        Self(found)
    }

    /// Returns them as a file lists them.
    pub(super) fn to_json(&self) -> Json {
        let library = |(name, path): &(String, PathBuf)| json!({ "name": name, "library": super::path(path) });
        self.0.iter().map(library).collect()
    }
}

/// Finds the plugins; the error says where it looked.
pub(super) fn find(directory: Option<&Path>) -> Result<Found, String> {
    let program = std::env::current_exe().ok();
    let beside = program.as_deref().and_then(Path::parent);
    let variable = std::env::var_os(VARIABLE).filter(|value| !value.is_empty());
    find_in(&places(directory, variable.as_deref().map(Path::new), beside))
}

/// Returns directories in the order in which they are looked into. One that a user names is the only one:
/// another's plugins in its stead would surprise.
fn places(named: Option<&Path>, variable: Option<&Path>, beside: Option<&Path>) -> Vec<PathBuf> {
    if let Some(named) = named.or(variable) {
        return vec![named.to_owned()];
    }
    let beside = beside.into_iter().flat_map(|directory| {
        let installed = directory.parent().map(|above| above.join("lib/sidelane/plugins"));
        std::iter::once(directory.to_owned()).chain(installed)
    });
    beside.chain([PathBuf::from("target/release")]).collect()
}

fn find_in(places: &[PathBuf]) -> Result<Found, String> {
    for place in places {
        let library = |name: &&str| {
            let path = place.join(format!("libsidelane_{name}.so"));
            path.is_file().then(|| ((*name).to_owned(), std::path::absolute(&path).unwrap_or(path)))
        };
        let found: Vec<_> = NAMES.iter().filter_map(library).collect();
        if found.first().is_some_and(|(name, _)| name == NAMES[0]) {
            return Ok(Found(found));
        }
    }
    let places: Vec<String> = places.iter().map(|place| place.display().to_string()).collect();
    Err(format!(
        "no libsidelane_http.so in {} (accepted: --plugin-dir DIR, or ${VARIABLE})",
        places.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_place_that_has_them_is_taken() {
        let root = tempfile::tempdir().unwrap();
        let (bin, lib) = (root.path().join("bin"), root.path().join("lib/sidelane/plugins"));
        for directory in [&bin, &lib] {
            std::fs::create_dir_all(directory).unwrap();
        }
        let places = places(None, None, Some(&bin));
        assert_eq!(places, [bin.clone(), lib.clone(), "target/release".into()]);
        let error = find_in(&places[..2]).unwrap_err();
        assert!(error.contains(&format!("{}, {}", bin.display(), lib.display())), "{error}");
        for name in ["libsidelane_http.so", "libsidelane_grpc.so"] {
            std::fs::write(lib.join(name), "").unwrap();
        }
        // One of the others alone is no installation.
        std::fs::write(bin.join("libsidelane_grpc.so"), "").unwrap();
        let found = find_in(&places).unwrap();
        let expected = ["http", "grpc"]
            .map(|name| (name.to_owned(), lib.join(format!("libsidelane_{name}.so"))));
        assert_eq!(found, Found(expected.into()));
    }

    #[test]
    fn a_place_that_is_named_is_the_only_one() {
        let [a, b, c] = ["a", "b", "c"].map(Path::new);
        assert_eq!(places(Some(a), Some(b), Some(c)), [a]);
        assert_eq!(places(None, Some(b), Some(c)), [b]);
    }
}
