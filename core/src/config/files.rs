//! Files that values and certificates come from. Keeps their names, and those of directories, since
//! their contents belong to the configuration.
//!
//! A certificate and its key are read through one handle of their directory, so that a swap of a mounted
//! Kubernetes secret never pairs a certificate with the key of another version. Knows nothing of what
//! the files say.

use std::collections::{BTreeSet, HashMap};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Source;
use super::source::{ATTEMPTS_MAX, Snapshot, is_inherited, open_regular};
use super::tls::PEM_BYTES_MAX;
use super::value::size_text;

/// Largest file that `${file:…}` reads. A Kubernetes secret holds 1 MiB at most; a value here is a
/// token or a number.
const SECRET_BYTES_MAX: u64 = 64 * 1024;

/// Most files and directories in a directory of certificates.
pub(crate) const ENTRIES_MAX: usize = 4096;

/// A certificate and its key, not yet looked at.
pub(crate) struct Pair {
    /// Where the certificate is.
    pub(crate) cert_path: PathBuf,
    /// Where the key is.
    pub(crate) key_path: PathBuf,
    pub(crate) cert: String,
    pub(crate) key: String,
}

/// Which of a pair cannot be read, and why.
pub(crate) enum PairFault {
    Cert(String),
    Key(String),
}

/// Reads files that values come from, and keeps their names.
pub(crate) struct Files<'a> {
    pub(crate) source: &'a Source,
    /// Those read so far, and those that could not be: their return is waited for.
    pub(crate) read: Vec<PathBuf>,
    /// Directories, each as it was at the first look.
    folders: HashMap<PathBuf, Arc<Snapshot>>,
}

impl<'a> Files<'a> {
    pub(crate) fn new(source: &'a Source) -> Self {
        Self { source, read: Vec::new(), folders: HashMap::new() }
    }

    /// Returns the whole path of a file that a value names.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.source.directory.join(path)
    }

    /// Reads a small file that holds one value; a final line break is dropped.
    pub(crate) fn read_secret(&mut self, path: &str) -> Result<String, String> {
        let mut text = self.read_file(path, SECRET_BYTES_MAX)?;
        while text.ends_with(['\n', '\r']) {
            text.pop();
        }
        Ok(text)
    }

    /// Reads a file of at most `max` bytes.
    pub(crate) fn read_file(&mut self, path: &str, max: u64) -> Result<String, String> {
        let full = self.path(path);
        self.read.push(full.clone());
        let file = self.source.open(Path::new(path));
        file.and_then(|file| text(file, max)).map_err(|error| cannot_read(&full, &error))
    }

    /// Reads a certificate and its key, of one version where both are in one directory.
    pub(crate) fn read_pair(&mut self, cert: &str, key: &str) -> Result<Pair, PairFault> {
        self.pair(self.path(cert), self.path(key))
    }

    fn pair(&mut self, cert_path: PathBuf, key_path: PathBuf) -> Result<Pair, PairFault> {
        self.read.extend([cert_path.clone(), key_path.clone()]);
        for attempt in 1.. {
            let cert = self.read_pem(&cert_path);
            let key = self.read_pem(&key_path);
            // The version that was looked at went away: both are read anew.
            if (cert.is_err() || key.is_err())
                && attempt < ATTEMPTS_MAX
                && (self.forget_parent(&cert_path) | self.forget_parent(&key_path))
            {
                continue;
            }
            let cert = cert.map_err(|error| PairFault::Cert(cannot_read(&cert_path, &error)))?;
            let key = key.map_err(|error| PairFault::Key(cannot_read(&key_path, &error)))?;
            return Ok(Pair { cert_path, key_path, cert, key });
        }
        unreachable!("the last attempt returns")
    }

    /// Forgets a directory that has changed. Returns whether it has.
    fn forget(&mut self, path: &Path) -> bool {
        let has_changed = self.folders.get(path).is_some_and(|folder| !folder.is_current());
        if has_changed {
            self.folders.remove(path);
        }
        has_changed
    }

    /// Forgets the directory of a file, where that has changed.
    fn forget_parent(&mut self, path: &Path) -> bool {
        path.parent().is_some_and(|parent| self.forget(parent))
    }

    fn read_pem(&mut self, path: &Path) -> io::Result<String> {
        let file = match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) if !is_inherited(path) => {
                self.folder(parent)?.open_regular(Path::new(name))?
            }
            _ => open_regular(path)?,
        };
        text(file, PEM_BYTES_MAX)
    }

    fn folder(&mut self, path: &Path) -> io::Result<Arc<Snapshot>> {
        if let Some(folder) = self.folders.get(path) {
            return Ok(folder.clone());
        }
        let folder = self.source.folder(path)?;
        self.folders.insert(path.to_owned(), folder.clone());
        Ok(folder)
    }

    /// Reads all certificates and keys of a directory: `tls.crt` and `tls.key` first, then pairs of one
    /// name, then those of directories in it.
    ///
    /// # Errors
    /// What cannot be read, or has no other half.
    pub(crate) fn read_directory(&mut self, path: &str) -> Result<Vec<Pair>, String> {
        let full = self.path(path);
        for attempt in 1.. {
            let pairs = self.directory(&full);
            // The version that was looked at went away.
            let is_doubtful = pairs.as_ref().is_ok_and(Vec::is_empty) || pairs.is_err();
            if !is_doubtful || attempt == ATTEMPTS_MAX || !self.forget(&full) {
                return pairs;
            }
        }
        unreachable!("the last attempt returns")
    }

    fn directory(&mut self, path: &Path) -> Result<Vec<Pair>, String> {
        let listed = self.listed(path)?;
        let mut found = listed.pairs;
        for directory in listed.directories {
            found.extend(self.listed(&path.join(directory))?.pairs);
        }
        let read = |(cert, key)| match self.pair(cert, key) {
            Err(PairFault::Cert(message) | PairFault::Key(message)) => Err(message),
            Ok(pair) => Ok(pair),
        };
        found.into_iter().map(read).collect()
    }

    fn listed(&mut self, path: &Path) -> Result<Listed, String> {
        self.read.push(path.to_owned());
        let fault = |error: io::Error| cannot_read(path, &error);
        let folder = self.folder(path).map_err(fault)?;
        let names = folder.entries(ENTRIES_MAX).map_err(fault)?;
        if names.len() > ENTRIES_MAX {
            return Err(format!(
                "{} holds more than {ENTRIES_MAX} files (accepted: at most as many)",
                path.display()
            ));
        }
        let mut directories = Vec::new();
        for name in &names {
            if let Ok(below) = folder.folder(name) {
                self.folders.insert(path.join(name), Arc::new(below));
                directories.push(name.clone());
            }
        }
        Ok(Listed { pairs: pairs(path, &names)?, directories })
    }
}

/// What is in a directory.
struct Listed {
    /// Certificates and keys.
    pairs: Vec<(PathBuf, PathBuf)>,
    directories: Vec<PathBuf>,
}

/// Names of the two halves, by what is the same in both; Let's Encrypt's last.
const HALVES: [(&str, &str); 4] =
    [(".crt", ".key"), (".pem", ".key"), (".pem", "-key.pem"), ("fullchain.pem", "privkey.pem")];

/// Returns the files that belong together; `tls.crt` first.
fn pairs(path: &Path, names: &BTreeSet<PathBuf>) -> Result<Vec<(PathBuf, PathBuf)>, String> {
    let texts: BTreeSet<&str> = names.iter().filter_map(|name| name.to_str()).collect();
    let mut pairs = Vec::new();
    let mut used = BTreeSet::new();
    for key in &texts {
        let cert = HALVES.iter().find_map(|(cert, end)| {
            let cert = format!("{}{cert}", key.strip_suffix(end)?);
            texts.get(cert.as_str()).copied()
        });
        if let Some(cert) = cert {
            used.extend([cert, *key]);
            pairs.push((path.join(cert), path.join(key)));
        }
    }
    let alone = texts.iter().find(|name| {
        let is_half = name.ends_with(".key") || (name.ends_with(".crt") && **name != "ca.crt");
        is_half && !used.contains(**name)
    });
    if let Some(name) = alone {
        return Err(format!(
            "{} has no other half (accepted: NAME.crt or NAME.pem, and NAME.key or NAME-key.pem \
             beside it)",
            path.join(name).display()
        ));
    }
    pairs.sort_by_key(|(cert, _)| !cert.ends_with("tls.crt"));
    Ok(pairs)
}

fn text(file: std::fs::File, max: u64) -> io::Result<String> {
    let mut text = String::new();
    file.take(max + 1).read_to_string(&mut text)?;
    if text.len() as u64 > max {
        return Err(io::Error::other(format!("larger than {}", size_text(max))));
    }
    Ok(text)
}

fn cannot_read(path: &Path, error: &io::Error) -> String {
    format!("cannot read {}: {error}", path.display())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// What the kubelet does: a new directory, a symlink to it renamed over `..data`, the old one removed.
    fn publish(directory: &Path, version: &str) {
        let old = fs::read_link(directory.join("..data")).ok();
        let new = directory.join(format!("..{version}"));
        fs::create_dir(&new).unwrap();
        for name in ["tls.crt", "tls.key"] {
            fs::write(new.join(name), version).unwrap();
        }
        symlink(format!("..{version}"), directory.join("..data_tmp")).unwrap();
        fs::rename(directory.join("..data_tmp"), directory.join("..data")).unwrap();
        if let Some(old) = old {
            fs::remove_dir_all(directory.join(old)).unwrap();
        }
    }

    #[test]
    fn a_version_that_goes_away_while_it_is_read_is_not_mixed_with_the_next() {
        let directory = tempfile::tempdir().unwrap();
        let secret = directory.path().join("secret");
        fs::create_dir(&secret).unwrap();
        publish(&secret, "1");
        for name in ["tls.crt", "tls.key"] {
            symlink(Path::new("..data").join(name), secret.join(name)).unwrap();
        }
        let source = Source::from_text(&directory.path().join("c.yaml"), "");
        let mut files = Files::new(&source);
        let mut read = |is_directory: bool| {
            let pair = if is_directory {
                files.read_directory("secret").ok().map(|mut pairs| pairs.remove(0))
            } else {
                files.read_pair("secret/tls.crt", "secret/tls.key").ok()
            };
            pair.map(|pair| (pair.cert, pair.key))
        };
        let both = |version: &str| Some((version.to_owned(), version.to_owned()));
        assert_eq!(read(false), both("1"));
        publish(&secret, "2");
        assert_eq!(read(false), both("2"));
        publish(&secret, "3");
        assert_eq!(read(true), both("3"));
        publish(&secret, "4");
        assert_eq!(read(true), both("4"));
    }
}
