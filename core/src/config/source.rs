//! A configuration's files as they are at one moment: one file, or those of a directory.
//!
//! Kubernetes swaps a ConfigMap by renaming over the symlink `..data`, which the files point
//! through. All of a snapshot is read by one handle of what `..data` points at, so that no swap
//! mixes two versions. Knows nothing of what the files say.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{File, Metadata};
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Dir, Mode, OFlags, openat, readlinkat};

use super::error::{ConfigError, ConfigErrors, Position};
use super::value::size_text;

/// Largest configuration, all files together. A ConfigMap holds 1 MiB at most.
pub const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Most files of a directory: one for each team, not one for each route.
pub const FILES_MAX: usize = 64;

/// How often a directory is opened anew whose version went away while it was read; the kubelet
/// swaps once a minute.
pub(super) const ATTEMPTS_MAX: usize = 5;

/// What Kubernetes' files point through.
const DATA: &str = "..data";

/// A configuration's contents.
#[derive(Clone)]
pub struct Source {
    /// What was asked for: a file or a directory.
    pub path: PathBuf,
    /// Sorted by name; never empty.
    pub files: Vec<SourceFile>,
    /// Where relative paths start.
    pub(crate) directory: PathBuf,
    /// The version that the files are of; `None`: read by path.
    snapshot: Option<Arc<Snapshot>>,
}

/// One file.
#[derive(Clone, PartialEq, Eq)]
pub struct SourceFile {
    /// For people, and where a watch looks.
    pub path: PathBuf,
    /// YAML.
    pub text: String,
}

impl PartialEq for Source {
    fn eq(&self, other: &Self) -> bool {
        self.path == other.path && self.files == other.files
    }
}

impl Eq for Source {}

/// The texts may hold secrets.
impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source").field("path", &self.path).finish_non_exhaustive()
    }
}

impl fmt::Debug for SourceFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SourceFile").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Source {
    /// Returns a configuration of one file with this text, which need not exist.
    #[must_use]
    pub fn from_text(path: &Path, text: impl Into<String>) -> Self {
        Self {
            path: path.to_owned(),
            files: vec![SourceFile { path: path.to_owned(), text: text.into() }],
            directory: parent(path).to_owned(),
            snapshot: None,
        }
    }

    /// Reads the file, or the `*.yaml` and `*.yml` files of the directory.
    ///
    /// # Errors
    /// What cannot be read, or is too much.
    pub fn read(path: &Path) -> Result<Self, ConfigErrors> {
        Ok(Self::read_with(path, Pipes::Taken)?.0)
    }

    /// Reads as [`Self::read`] does, but for a pipe, which was read when it was read once. Returns as
    /// well whether anything was written to meanwhile.
    pub(crate) fn read_watched(path: &Path) -> Result<(Self, bool), ConfigErrors> {
        Self::read_with(path, Pipes::Refused)
    }

    fn read_with(path: &Path, pipes: Pipes) -> Result<(Self, bool), ConfigErrors> {
        // Errors of opening are told by the read that follows.
        if path.is_dir() { Self::read_directory(path) } else { Self::read_one(path, pipes) }
    }

    fn read_one(path: &Path, pipes: Pipes) -> Result<(Self, bool), ConfigErrors> {
        let directory = parent(path);
        let cannot = |error: io::Error| fault(path, format!("cannot be read: {error}"));
        // Without its directory the file is opened by path, which tells what is wrong with it.
        let snapshot = Snapshot::open(directory).ok();
        let file = match (&snapshot, path.file_name(), pipes) {
            (Some(snapshot), Some(name), Pipes::Taken) => {
                snapshot.open_with(Path::new(name), OFlags::empty())
            }
            (Some(snapshot), Some(name), Pipes::Refused) => snapshot.open_file(Path::new(name)),
            (_, _, Pipes::Taken) => File::open(path),
            (_, _, Pipes::Refused) => open_regular(path),
        };
        let (text, torn) = read(path, file.map_err(cannot)?, FILE_BYTES_MAX)?;
        let mut source = Self::from_text(path, text);
        source.snapshot = snapshot.map(Arc::new);
        Ok((source, torn))
    }

    fn read_directory(path: &Path) -> Result<(Self, bool), ConfigErrors> {
        for attempt in 1..=ATTEMPTS_MAX {
            if let Some(read) = Self::try_read_directory(path, attempt == ATTEMPTS_MAX)? {
                return Ok(read);
            }
        }
        Err(fault(path, "cannot be read: its version went away".to_owned()))
    }

    /// Reads the directory; `None`: a file that was listed is gone, and this was not the last attempt.
    fn try_read_directory(
        path: &Path,
        is_last: bool,
    ) -> Result<Option<(Self, bool)>, ConfigErrors> {
        let cannot = |error: io::Error| fault(path, format!("cannot be read: {error}"));
        let snapshot = Snapshot::open(path).map_err(cannot)?;
        let names = snapshot.names().map_err(cannot)?;
        if names.is_empty() {
            let message =
                "holds no configuration (accepted: *.yaml and *.yml files directly in it)";
            return Err(fault(path, message.to_owned()));
        }
        if names.len() > FILES_MAX {
            let message = format!("holds {} files (accepted: at most {FILES_MAX})", names.len());
            return Err(fault(path, message));
        }
        let mut files = Vec::new();
        let (mut left, mut torn) = (FILE_BYTES_MAX, false);
        for name in names {
            let file_path = path.join(&name);
            let file = match snapshot.open_regular(&name) {
                // Listed a moment ago: its version goes away, or it is a link to nowhere.
                Err(error) if error.kind() == io::ErrorKind::NotFound && !is_last => {
                    return Ok(None);
                }
                file => {
                    file.map_err(|error| fault(&file_path, format!("cannot be read: {error}")))?
                }
            };
            let (text, changed) = read(&file_path, file, left)?;
            left = left.saturating_sub(text.len() as u64);
            torn |= changed;
            files.push(SourceFile { path: file_path, text });
        }
        torn |= !snapshot.is_current();
        let source = Self {
            path: path.to_owned(),
            files,
            directory: path.to_owned(),
            snapshot: Some(Arc::new(snapshot)),
        };
        Ok(Some((source, torn)))
    }

    /// Returns a directory that certificates are in, as it is now; the configuration's own is as it was when
    /// that was read.
    pub(crate) fn folder(&self, path: &Path) -> io::Result<Arc<Snapshot>> {
        match &self.snapshot {
            Some(snapshot) if path == self.directory => Ok(snapshot.clone()),
            _ => Ok(Arc::new(Snapshot::open(path)?)),
        }
    }

    /// Opens a file that a value names; a relative path starts at the configuration's directory
    /// and is of the same version as the configuration. Anything else than a file is an error, but for a
    /// pipe that this process was started with.
    pub(crate) fn open(&self, path: &Path) -> io::Result<File> {
        match &self.snapshot {
            Some(snapshot) if path.is_relative() => snapshot.open_file(path),
            _ => open_regular(&self.directory.join(path)),
        }
    }
}

/// Whether the configuration itself may be a pipe, `/dev/stdin` say.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pipes {
    Taken,
    Refused,
}

/// Where a process finds what it was started with: `--token-file <(command)` of a shell.
const INHERITED: [&str; 3] = ["/dev/fd", "/dev/stdin", "/proc/self/fd"];

/// Returns whether it is one of those.
pub(super) fn is_inherited(path: &Path) -> bool {
    INHERITED.iter().any(|directory| path.starts_with(directory))
}

/// Opens a file without waiting for a pipe's other end, which a reload must not do; anything else than a
/// file is an error, but for what the process was started with.
pub(super) fn open_regular(path: &Path) -> io::Result<File> {
    if is_inherited(path) {
        return File::open(path);
    }
    let flags = FLAGS | OFlags::NONBLOCK;
    regular(rustix::fs::open(path, flags, Mode::empty())?.into())
}

/// Returns what is in a directory, as [`Snapshot::entries`] does.
pub(super) fn list_directory(path: &Path, max: usize) -> io::Result<BTreeSet<PathBuf>> {
    Snapshot::open(path)?.entries(max)
}

/// Returns the file, where it is one.
fn regular(file: File) -> io::Result<File> {
    let metadata = file.metadata()?;
    if metadata.is_file() {
        Ok(file)
    } else if metadata.is_dir() {
        Err(io::Error::from(io::ErrorKind::IsADirectory))
    } else {
        Err(io::Error::other("not a regular file"))
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or_else(|| Path::new(""))
}

/// Reads at most `left` bytes. Returns as well whether the file was written to meanwhile.
fn read(path: &Path, mut file: File, left: u64) -> Result<(String, bool), ConfigErrors> {
    let cannot = |error: io::Error| fault(path, format!("cannot be read: {error}"));
    let before = file.metadata().map_err(cannot)?;
    let mut bytes = Vec::new();
    file.by_ref().take(left + 1).read_to_end(&mut bytes).map_err(cannot)?;
    if bytes.len() as u64 > left {
        let all = if left < FILE_BYTES_MAX { ", with the files before it" } else { "" };
        return Err(fault(path, format!("is larger than {}{all}", size_text(FILE_BYTES_MAX))));
    }
    let after = file.metadata().map_err(cannot)?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let line = error.as_bytes()[..error.utf8_error().valid_up_to()]
            .iter()
            .filter(|byte| **byte == b'\n')
            .count();
        fault(path, format!("is not UTF-8 text (line {})", line + 1))
    })?;
    Ok((text, state(&before) != state(&after)))
}

fn state(metadata: &Metadata) -> (u64, i64, i64) {
    (metadata.len(), metadata.mtime(), metadata.mtime_nsec())
}

fn fault(path: &Path, message: String) -> ConfigErrors {
    ConfigErrors::from(ConfigError {
        file: path.display().to_string().into(),
        position: Position::default(),
        path: String::new(),
        message,
        snippet: None,
    })
}

/// A directory, and the version of it that Kubernetes published, as one moment had them.
pub(crate) struct Snapshot {
    directory: OwnedFd,
    /// What `..data` pointed at.
    data: Option<OwnedFd>,
    /// The directory's state when it was opened.
    opened: Option<(u64, i64, i64)>,
    path: PathBuf,
}

impl Snapshot {
    fn open(path: &Path) -> io::Result<Self> {
        let path = if path == Path::new("") { Path::new(".") } else { path };
        // A search permission is enough, as for a file that is opened by its path.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty())?;
        let opened = std::fs::metadata(path).ok().as_ref().map(state);
        let data = match readlinkat(&directory, DATA, Vec::new()) {
            Ok(_) => Some(openat(&directory, DATA, flags, Mode::empty())?),
            Err(_) => None,
        };
        Ok(Self { directory, data, opened, path: path.to_owned() })
    }

    /// Returns a directory in it, of the same version.
    pub(super) fn folder(&self, name: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = self.open_below(name, flags)?;
        let data = match readlinkat(&directory, DATA, Vec::new()) {
            Ok(_) => Some(openat(&directory, DATA, flags, Mode::empty())?),
            Err(_) => None,
        };
        let path = self.path.join(name);
        let opened = std::fs::metadata(&path).ok().as_ref().map(state);
        Ok(Self { directory, data, opened, path })
    }

    /// Returns the names in it of files and directories, or of links to them, but for hidden ones; sorted. At
    /// most `max` are read, and one more.
    pub(super) fn entries(&self, max: usize) -> io::Result<BTreeSet<PathBuf>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut names = BTreeSet::new();
        for directory in std::iter::once(&self.directory).chain(&self.data) {
            for entry in Dir::new(openat(directory, ".", flags, Mode::empty())?)? {
                let entry = entry?;
                let name = entry.file_name().to_bytes();
                if !name.starts_with(b".") {
                    names.insert(PathBuf::from(std::ffi::OsStr::from_bytes(name)));
                }
                if names.len() > max {
                    return Ok(names);
                }
            }
        }
        // A link into a version that does not have it follows a swap.
        names.retain(|name| {
            self.in_data(name).is_none_or(|_| self.open_below(name, OFlags::PATH).is_ok())
        });
        Ok(names)
    }

    /// Returns whether nothing was added, removed or renamed since it was opened.
    pub(super) fn is_current(&self) -> bool {
        let is_same_version = self.data.as_ref().is_none_or(|data| {
            // Times are coarse; a directory that is held keeps its number for itself.
            let now = std::fs::metadata(self.path.join(DATA)).map(|now| (now.dev(), now.ino()));
            let held = rustix::fs::fstat(data).map(|held| (held.st_dev, held.st_ino));
            now.is_ok_and(|now| held == Ok(now))
        });
        is_same_version && std::fs::metadata(&self.path).ok().as_ref().map(state) == self.opened
    }

    /// Returns the names of configuration files, sorted.
    fn names(&self) -> io::Result<BTreeSet<PathBuf>> {
        let mut names = BTreeSet::new();
        for name in list(&self.directory)? {
            // A version's own files count, not the links to them, which follow the swap.
            if self.data.is_none() || self.in_data(&name).is_none() {
                names.insert(name);
            }
        }
        if let Some(data) = &self.data {
            names.extend(list(data)?);
        }
        Ok(names)
    }

    /// Returns the path below `..data` that a name is a link to.
    fn in_data(&self, name: &Path) -> Option<PathBuf> {
        let target = readlinkat(&self.directory, name, Vec::new()).ok()?;
        let target = Path::new(std::ffi::OsStr::from_bytes(target.as_bytes()));
        target.strip_prefix(DATA).ok().map(Path::to_owned)
    }

    /// Opens a file, and nothing else, without waiting for a pipe's other end.
    fn open_file(&self, path: &Path) -> io::Result<File> {
        regular(self.open_with(path, OFlags::NONBLOCK)?)
    }

    /// Opens a file of a directory that somebody else may fill.
    pub(super) fn open_regular(&self, name: &Path) -> io::Result<File> {
        let file = match self.open_with(name, OFlags::NONBLOCK) {
            // Not yet linked: the version has it all the same.
            Err(error) if error.kind() == io::ErrorKind::NotFound => match &self.data {
                Some(data) => openat(data, name, FLAGS | OFlags::NONBLOCK, Mode::empty())?.into(),
                None => return Err(error),
            },
            file => file?,
        };
        regular(file)
    }

    fn open_with(&self, path: &Path, flags: OFlags) -> io::Result<File> {
        Ok(self.open_below(path, FLAGS | flags)?.into())
    }

    fn open_below(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        Ok(match (&self.data, self.in_data(path)) {
            (Some(data), Some(below)) => openat(data, &below, flags, Mode::empty())?,
            _ => openat(&self.directory, path, flags, Mode::empty())?,
        })
    }
}

const FLAGS: OFlags = OFlags::RDONLY.union(OFlags::CLOEXEC);

/// Returns the configuration files' names in a directory; hidden ones are none.
fn list(directory: &OwnedFd) -> io::Result<Vec<PathBuf>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut names = Vec::new();
    for entry in Dir::new(openat(directory, ".", flags, Mode::empty())?)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if !name.starts_with(b".") && (name.ends_with(b".yaml") || name.ends_with(b".yml")) {
            names.push(PathBuf::from(std::ffi::OsStr::from_bytes(name)));
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn names(source: &Source) -> Vec<String> {
        source
            .files
            .iter()
            .map(|file| file.path.file_name().unwrap().to_string_lossy().into_owned())
            .collect()
    }

    #[test]
    fn a_directory_is_its_yaml_files_by_name() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["b.yml", "a.yaml", ".hidden.yaml", "notes.txt", "a.yaml~"] {
            fs::write(directory.path().join(name), name).unwrap();
        }
        let source = Source::read(directory.path()).unwrap();
        assert_eq!(names(&source), ["a.yaml", "b.yml"]);
        assert_eq!(source.files[1].text, "b.yml");
    }

    #[test]
    fn a_directory_without_files_or_with_too_many_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let error = Source::read(directory.path()).unwrap_err().to_string();
        assert!(error.contains("holds no configuration"), "{error}");
        for index in 0..=FILES_MAX {
            fs::write(directory.path().join(format!("{index}.yaml")), "").unwrap();
        }
        let error = Source::read(directory.path()).unwrap_err().to_string();
        assert!(error.ends_with("holds 65 files (accepted: at most 64)"), "{error}");
    }

    #[test]
    fn all_files_together_are_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let half = vec![b' '; usize::try_from(FILE_BYTES_MAX / 2 + 1).unwrap()];
        fs::write(directory.path().join("a.yaml"), &half).unwrap();
        fs::write(directory.path().join("b.yaml"), &half).unwrap();
        let error = Source::read(directory.path()).unwrap_err().to_string();
        assert!(
            error.ends_with("b.yaml: is larger than 4MiB, with the files before it"),
            "{error}"
        );
    }

    #[test]
    fn a_pipe_in_a_directory_is_told_and_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.yaml");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::RWXU).unwrap();
        let error = Source::read(directory.path()).unwrap_err().to_string();
        assert!(error.ends_with("a.yaml: cannot be read: not a regular file"), "{error}");
    }

    #[test]
    fn a_pipe_that_a_value_names_is_told_and_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join("c.yaml");
        fs::write(&config, "").unwrap();
        let pipe = directory.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, Mode::RWXU).unwrap();
        let source = Source::read(&config).unwrap();
        for path in [Path::new("pipe"), &pipe, Path::new("/dev/zero")] {
            let error = source.open(path).unwrap_err().to_string();
            assert_eq!(error, "not a regular file", "{}", path.display());
        }
    }

    #[test]
    fn a_link_to_nowhere_in_a_directory_is_named() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("a.yaml"), "").unwrap();
        symlink("nowhere", directory.path().join("b.yaml")).unwrap();
        let error = Source::read(directory.path()).unwrap_err().to_string();
        assert!(error.contains("b.yaml: cannot be read: No such file"), "{error}");
    }

    /// What the kubelet does: a new timestamped directory, a symlink to it, renamed over `..data`.
    fn publish(directory: &Path, version: &str, files: &[(&str, &str)]) {
        let new = directory.join(format!("..{version}"));
        fs::create_dir(&new).unwrap();
        for (name, text) in files {
            fs::write(new.join(name), text).unwrap();
        }
        symlink(format!("..{version}"), directory.join("..data_tmp")).unwrap();
        fs::rename(directory.join("..data_tmp"), directory.join(DATA)).unwrap();
    }

    #[test]
    fn what_is_read_after_a_swap_is_of_the_version_before() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        publish(path, "1", &[("a.yaml", "one"), ("token", "one")]);
        symlink("..data/a.yaml", path.join("a.yaml")).unwrap();
        symlink("..data/token", path.join("token")).unwrap();
        for asked in [path.to_owned(), path.join("a.yaml")] {
            let source = Source::read(&asked).unwrap();
            publish(
                path,
                &format!("2{}", asked.components().count()),
                &[("a.yaml", "two"), ("token", "two")],
            );
            assert_eq!(source.files[0].text, "one");
            let mut token = String::new();
            source.open(Path::new("token")).unwrap().read_to_string(&mut token).unwrap();
            assert_eq!(token, "one");
            fs::remove_file(path.join(DATA)).unwrap();
            symlink("..1", path.join(DATA)).unwrap();
        }
    }

    #[test]
    fn a_version_is_whole_before_its_links_are() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        publish(path, "1", &[("a.yaml", "a"), ("new.yaml", "new")]);
        symlink("..data/a.yaml", path.join("a.yaml")).unwrap();
        symlink("..data/gone.yaml", path.join("gone.yaml")).unwrap();
        let source = Source::read(path).unwrap();
        assert_eq!(names(&source), ["a.yaml", "new.yaml"]);
    }
}
