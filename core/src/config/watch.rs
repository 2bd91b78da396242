//! Watches the configuration, a file or a directory, and yields its contents whenever they change,
//! or when asked.
//!
//! Events of the file's *parent directory* are hints only: a ConfigMap swaps the symlink `..data`, editors
//! rename over the file, and a watch on the file itself goes deaf after the first of these. What
//! counts is the contents' hash, which is polled too. Knows nothing of what the file says.

use std::io::Read;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use notify::{EventKind, RecursiveMode, Watcher as _};
use sha2::{Digest, Sha256};

use super::files::ENTRIES_MAX;
use super::source::{self, FILE_BYTES_MAX};
use super::{ConfigErrors, Source};

/// How long hints must be quiet before the file is read: an editor's truncate, write and rename
/// come within milliseconds.
const QUIET: Duration = Duration::from_millis(250);

/// The file is read at the latest this long after the first hint, however busy its directory is.
const LONGEST: Duration = Duration::from_secs(2);

/// How often contents are compared without any hint: network file systems and exhausted inotify
/// limits give none.
const POLL: Duration = Duration::from_secs(10);

/// New contents of the configuration.
#[derive(Debug)]
pub struct Reload {
    /// The contents, or why they cannot be read.
    pub source: Result<Source, ConfigErrors>,
    /// Why now.
    pub cause: Cause,
    /// The last [`Watcher::trigger`] that these contents are not older than; 0: none.
    pub asked: u64,
}

/// Why a [`Reload`] is yielded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The file, or one that its values come from, has changed.
    Changed,
    /// Somebody asked ([`Watcher::trigger`]).
    Requested,
}

enum Command {
    /// Something happened in the directory.
    Hint,
    /// Somebody asked, once or more often.
    Trigger,
    Files {
        files: Vec<PathBuf>,
        is_good: bool,
    },
    Stop,
}

/// Times of a watch; other than the constants in tests only.
#[derive(Clone, Copy)]
struct Times {
    quiet: Duration,
    longest: Duration,
    poll: Duration,
}

/// A watch on the configuration; ends when dropped.
pub struct Watcher {
    commands: mpsc::Sender<Command>,
    asked: Arc<Asked>,
}

/// What is asked of a watch, however often, is one command in its inbox.
#[derive(Default)]
struct Asked {
    /// How often so far.
    count: AtomicU64,
    /// The command is in the inbox.
    is_told: AtomicBool,
}

impl std::fmt::Debug for Watcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watcher").finish_non_exhaustive()
    }
}

impl Watcher {
    /// Starts to watch the file or directory of `current` on a thread of its own. `files` are those that its
    /// values come from ([`super::Config::files`]). The thread waits while `reloads` is full.
    pub fn start(
        current: &Source,
        files: &[PathBuf],
        reloads: tokio::sync::mpsc::Sender<Reload>,
    ) -> std::io::Result<Self> {
        let times = Times { quiet: QUIET, longest: LONGEST, poll: POLL };
        Self::start_with(current, files, reloads, times, true)
    }

    fn start_with(
        current: &Source,
        files: &[PathBuf],
        reloads: tokio::sync::mpsc::Sender<Reload>,
        times: Times,
        events: bool,
    ) -> std::io::Result<Self> {
        let (commands, inbox) = mpsc::channel();
        // One hint in the inbox is enough, however many events there are.
        let hinted = Arc::new(AtomicBool::new(false));
        let events = events.then(|| Events::new(&current.path, commands.clone(), hinted.clone()));
        let asked = Arc::new(Asked::default());
        let task = Task {
            path: current.path.clone(),
            seen: Seen { source: source_hash(current), files: files_hash(files) },
            files: files.to_owned(),
            inbox,
            events,
            hinted,
            asked: asked.clone(),
            reloads,
            times,
        };
        std::thread::Builder::new().name("config-watch".to_owned()).spawn(move || task.run())?;
        Ok(Self { commands, asked })
    }

    /// Yields the contents at once, changed or not; once for all who ask before they are read. Returns the
    /// number that [`Reload::asked`] reaches.
    pub fn trigger(&self) -> u64 {
        let number = self.asked.count.fetch_add(1, Ordering::AcqRel) + 1;
        if !self.asked.is_told.swap(true, Ordering::AcqRel) {
            // The thread ends only when nobody listens to it any more.
            let _ = self.commands.send(Command::Trigger);
        }
        number
    }

    /// Sets which other files belong to the configuration, which was taken or was not.
    pub fn set_files(&self, files: Vec<PathBuf>, is_good: bool) {
        let _ = self.commands.send(Command::Files { files, is_good });
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Stop);
    }
}

/// Returns whether the file is mounted by itself: a Kubernetes `subPath` mount, which never shows
/// an update of its ConfigMap.
#[must_use]
pub fn is_sub_path_mount(path: &Path) -> bool {
    let Ok(path) = std::path::absolute(path) else { return false };
    // A directory that is mounted is how it should be.
    if path.is_dir() {
        return false;
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    is_mount_point(&path, &mounts)
}

fn is_mount_point(path: &Path, mountinfo: &str) -> bool {
    mountinfo.lines().filter_map(|line| line.split(' ').nth(4)).any(|point| {
        // The kernel writes these four as octal numbers.
        let point = point.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n");
        Path::new(&point.replace("\\134", "\\")) == path
    })
}

/// Events of the directory.
struct Events {
    directory: PathBuf,
    commands: mpsc::Sender<Command>,
    hinted: Arc<AtomicBool>,
    /// Events end with it. `None`: polling alone.
    watcher: Option<notify::RecommendedWatcher>,
    /// The directory that is watched, or could not be: its device and number.
    watched: Option<(u64, u64)>,
}

impl Events {
    fn new(path: &Path, commands: mpsc::Sender<Command>, hinted: Arc<AtomicBool>) -> Self {
        let directory = match path.parent() {
            _ if path.is_dir() => path,
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let directory = directory.to_owned();
        let mut events = Self { directory, commands, hinted, watcher: None, watched: None };
        events.follow();
        events
    }

    /// Watches the directory anew where another one stands under its name: it was removed and made again,
    /// or a link in its path points elsewhere.
    fn follow(&mut self) {
        let Ok(metadata) = std::fs::metadata(&self.directory) else { return };
        let now = Some((metadata.dev(), metadata.ino()));
        if now == self.watched {
            return;
        }
        self.watched = now;
        let (commands, hinted) = (self.commands.clone(), self.hinted.clone());
        let handler = move |event: notify::Result<notify::Event>| {
            // To read the file is an event too; answering it would never end. An error is a hint: events
            // may have been lost.
            let hint = event.map_or(true, |event| !matches!(event.kind, EventKind::Access(_)));
            if hint && !hinted.swap(true, Ordering::AcqRel) {
                let _ = commands.send(Command::Hint);
            }
        };
        let watcher = notify::recommended_watcher(handler).and_then(|mut watcher| {
            watcher.watch(&self.directory, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        self.watcher = match watcher {
            Ok(watcher) => Some(watcher),
            Err(error) => {
                tracing::warn!(
                    directory = %self.directory.display(), %error,
                    "no events for the configuration's directory; its contents are polled",
                );
                None
            }
        };
    }
}

struct Task {
    path: PathBuf,
    files: Vec<PathBuf>,
    /// Contents that were yielded last.
    seen: Seen,
    inbox: mpsc::Receiver<Command>,
    /// `None`: polling alone.
    events: Option<Events>,
    hinted: Arc<AtomicBool>,
    asked: Arc<Asked>,
    reloads: tokio::sync::mpsc::Sender<Reload>,
    times: Times,
}

impl Task {
    fn run(mut self) {
        let mut debounce = Debounce::default();
        let mut next_poll = Instant::now() + self.times.poll;
        loop {
            let until = debounce.due(&self.times).map_or(next_poll, |due| due.min(next_poll));
            match self.inbox.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Command::Hint) => {
                    self.hinted.store(false, Ordering::Release);
                    debounce.hint(Instant::now());
                }
                Ok(Command::Files { files, is_good }) => {
                    // An unchanged list keeps its hash, so that a change since the last look shows.
                    if files != self.files {
                        self.seen.files = files_hash(&files);
                        self.files = files;
                        if !is_good {
                            // What was missed may have come before its hash was taken.
                            self.seen.files = [0; 32];
                            debounce.hint(Instant::now());
                        }
                    }
                }
                Ok(Command::Trigger) => {
                    // Before the contents are read: whoever asks from here on asks for another look.
                    self.asked.is_told.store(false, Ordering::Release);
                    if !self.reload(Cause::Requested, &mut debounce) {
                        return;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    next_poll = Instant::now() + self.times.poll;
                    debounce = Debounce::default();
                    if !self.reload(Cause::Changed, &mut debounce) {
                        return;
                    }
                }
                Ok(Command::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Yields the contents where they changed or are asked for. Returns whether anybody listens.
    fn reload(&mut self, cause: Cause, debounce: &mut Debounce) -> bool {
        // Before the contents are read, so that what comes between is told.
        if let Some(events) = &mut self.events {
            events.follow();
        }
        let asked = self.asked.count.load(Ordering::Acquire);
        let source = match read(&self.path) {
            Ok(Some(source)) => Ok(source),
            // Written to while it was read: look again when that is over.
            Ok(None) if cause == Cause::Changed => {
                debounce.hint(Instant::now());
                return true;
            }
            Ok(None) => Source::read_watched(&self.path).map(|(source, _)| source),
            Err(errors) => Err(errors),
        };
        let hash = match &source {
            Ok(source) => source_hash(source),
            Err(errors) => Sha256::digest(errors.to_string()).into(),
        };
        let seen = Seen { source: hash, files: files_hash(&self.files) };
        if cause == Cause::Changed && seen == self.seen {
            return true;
        }
        self.seen = seen;
        self.reloads.blocking_send(Reload { source, cause, asked }).is_ok()
    }
}

/// Waits for quiet.
#[derive(Debug, Default)]
struct Debounce {
    /// First and last hint.
    hints: Option<(Instant, Instant)>,
}

impl Debounce {
    fn hint(&mut self, now: Instant) {
        let first = self.hints.map_or(now, |(first, _)| first);
        self.hints = Some((first, now));
    }

    /// Returns when the file is to be read.
    fn due(&self, times: &Times) -> Option<Instant> {
        self.hints.map(|(first, last)| (last + times.quiet).min(first + times.longest))
    }
}

/// Reads the configuration; `None`: it changed meanwhile.
fn read(path: &Path) -> Result<Option<Source>, ConfigErrors> {
    let (source, torn) = Source::read_watched(path)?;
    Ok((!torn).then_some(source))
}

/// Hashes of contents. Those of the configuration and of the others are apart, since a change of the list of
/// the others must not hide a change of the file.
#[derive(PartialEq)]
struct Seen {
    source: [u8; 32],
    files: [u8; 32],
}

fn source_hash(source: &Source) -> [u8; 32] {
    let mut hash = Sha256::new();
    for file in &source.files {
        for bytes in [file.path.as_os_str().as_bytes(), file.text.as_bytes()] {
            hash.update(bytes.len().to_le_bytes());
            hash.update(bytes);
        }
    }
    hash.finalize().into()
}

fn files_hash(files: &[PathBuf]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for file in files {
        let mut bytes = Vec::new();
        // Of a directory it counts what is in it; each of its files stands in the list by itself.
        if let Ok(names) = source::list_directory(file, ENTRIES_MAX) {
            for name in names {
                hash.update(name.as_os_str().as_bytes());
                hash.update([0]);
            }
            continue;
        }
        // One that cannot be read is told when the configuration is parsed.
        let read = source::open_regular(file)
            .and_then(|file| file.take(FILE_BYTES_MAX).read_to_end(&mut bytes));
        hash.update([u8::from(read.is_ok())]);
        hash.update(bytes.len().to_le_bytes());
        hash.update(bytes);
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;
    use tokio::sync::mpsc::Receiver;

    use super::*;

    /// Times at which a test does not wait for long and a poll never helps.
    const EVENTS: Times = Times {
        quiet: Duration::from_millis(20),
        longest: Duration::from_secs(2),
        poll: Duration::from_secs(3600),
    };

    struct Watched {
        directory: TempDir,
        path: PathBuf,
        watcher: Watcher,
        reloads: Receiver<Reload>,
    }

    impl Watched {
        fn start(directory: TempDir, name: &str, times: Times, events: bool) -> Self {
            let path = directory.path().join(name);
            let (sender, reloads) = tokio::sync::mpsc::channel(1);
            let source = Source::read(&path).unwrap();
            let watcher = Watcher::start_with(&source, &[], sender, times, events).unwrap();
            Self { directory, path, watcher, reloads }
        }

        /// Waits until these contents are yielded; states in between may be yielded before.
        #[track_caller]
        fn expect(&mut self, text: &str) {
            let deadline = Instant::now() + Duration::from_secs(30);
            loop {
                let reload = self.next(deadline);
                if reload
                    .source
                    .is_ok_and(|source| source.files.iter().any(|file| file.text == text))
                {
                    return;
                }
            }
        }

        #[track_caller]
        fn next(&mut self, deadline: Instant) -> Reload {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let left = deadline.saturating_duration_since(Instant::now());
            runtime
                .block_on(async { tokio::time::timeout(left, self.reloads.recv()).await })
                .expect("a reload in time")
                .expect("the watch runs")
        }
    }

    fn file(text: &str) -> TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("c.yaml"), text).unwrap();
        directory
    }

    /// What the kubelet does: a new timestamped directory, a symlink to it, renamed over `..data`.
    fn publish(directory: &Path, version: &str, text: &str) {
        let new = directory.join(format!("..{version}"));
        fs::create_dir(&new).unwrap();
        fs::write(new.join("c.yaml"), text).unwrap();
        symlink(format!("..{version}"), directory.join("..data_tmp")).unwrap();
        let old = fs::read_link(directory.join("..data")).ok();
        fs::rename(directory.join("..data_tmp"), directory.join("..data")).unwrap();
        if let Some(old) = old {
            fs::remove_dir_all(directory.join(old)).unwrap();
        }
    }

    #[test]
    fn a_config_map_swap_is_seen_again_and_again() {
        let directory = tempfile::tempdir().unwrap();
        publish(directory.path(), "1", "one");
        symlink("..data/c.yaml", directory.path().join("c.yaml")).unwrap();
        let mut watched = Watched::start(directory, "c.yaml", EVENTS, true);
        for (version, text) in [("2", "two"), ("3", "three"), ("4", "four")] {
            publish(watched.directory.path(), version, text);
            watched.expect(text);
        }
    }

    #[test]
    fn a_directorys_files_are_watched_those_that_come_and_go_too() {
        let directory = tempfile::tempdir().unwrap();
        publish(directory.path(), "1", "one");
        symlink("..data/c.yaml", directory.path().join("c.yaml")).unwrap();
        let mut watched = Watched::start(directory, "", EVENTS, true);
        publish(watched.directory.path(), "2", "two");
        watched.expect("two");
        let extra = watched.directory.path().join("extra.yaml");
        fs::write(&extra, "extra").unwrap();
        watched.expect("extra");
        fs::remove_file(&extra).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while watched.next(deadline).source.is_ok_and(|source| source.files.len() > 1) {}
    }

    #[test]
    fn an_editors_rename_over_the_file_is_seen() {
        let mut watched = Watched::start(file("one"), "c.yaml", EVENTS, true);
        for text in ["two", "three"] {
            // vim: the old file becomes the backup, a new one is written and the backup removed.
            let backup = watched.directory.path().join("c.yaml~");
            fs::rename(&watched.path, &backup).unwrap();
            fs::write(&watched.path, text).unwrap();
            fs::remove_file(&backup).unwrap();
            watched.expect(text);
            // sed -i: a temporary file renamed over it.
            let text = format!("{text} by sed");
            let temporary = watched.directory.path().join("sedXXXX");
            fs::write(&temporary, &text).unwrap();
            fs::rename(&temporary, &watched.path).unwrap();
            watched.expect(&text);
        }
    }

    #[test]
    fn a_write_in_place_is_seen() {
        let mut watched = Watched::start(file("one"), "c.yaml", EVENTS, true);
        for text in ["two", "three"] {
            fs::write(&watched.path, text).unwrap();
            watched.expect(text);
        }
    }

    #[test]
    fn a_file_that_is_gone_is_told_and_its_return_too() {
        let mut watched = Watched::start(file("one"), "c.yaml", EVENTS, true);
        fs::remove_file(&watched.path).unwrap();
        let reload = watched.next(Instant::now() + Duration::from_secs(30));
        assert!(reload.source.unwrap_err().to_string().contains("cannot be read"));
        fs::write(&watched.path, "one").unwrap();
        watched.expect("one");
    }

    #[test]
    fn contents_are_polled_where_there_are_no_events() {
        let times = Times { poll: Duration::from_millis(10), ..EVENTS };
        let mut watched = Watched::start(file("one"), "c.yaml", times, false);
        fs::write(&watched.path, "two").unwrap();
        watched.expect("two");
    }

    #[test]
    fn a_file_that_values_come_from_is_polled() {
        let times = Times { poll: Duration::from_millis(10), ..EVENTS };
        let mut watched = Watched::start(file("one"), "c.yaml", times, false);
        let secret = watched.directory.path().join("token");
        fs::write(&secret, "old").unwrap();
        watched.watcher.set_files(vec![secret.clone()], true);
        // Commands come in order: when this is answered the file is known.
        watched.watcher.trigger();
        watched.expect("one");
        fs::write(&secret, "new").unwrap();
        watched.expect("one");
    }

    #[test]
    fn what_comes_to_a_directory_of_certificates_and_what_goes_is_polled() {
        let times = Times { poll: Duration::from_millis(10), ..EVENTS };
        let mut watched = Watched::start(file("one"), "c.yaml", times, false);
        let certificates = watched.directory.path().join("tls");
        fs::create_dir(&certificates).unwrap();
        watched.watcher.set_files(vec![certificates.clone()], true);
        watched.watcher.trigger();
        watched.expect("one");
        fs::write(certificates.join("a.crt"), "").unwrap();
        watched.expect("one");
        fs::remove_file(certificates.join("a.crt")).unwrap();
        watched.expect("one");
        fs::remove_dir(&certificates).unwrap();
        watched.expect("one");
    }

    #[test]
    fn a_trigger_yields_unchanged_contents() {
        let mut watched = Watched::start(file("one"), "c.yaml", EVENTS, true);
        watched.watcher.trigger();
        let reload = watched.next(Instant::now() + Duration::from_secs(30));
        assert_eq!(reload.cause, Cause::Requested);
        assert_eq!(reload.source.unwrap().files[0].text, "one");
    }

    #[test]
    fn all_who_ask_while_the_contents_are_not_taken_are_answered_by_one_look() {
        let mut watched = Watched::start(file("one"), "c.yaml", EVENTS, true);
        for number in 1..=1000 {
            assert_eq!(watched.watcher.trigger(), number);
        }
        let deadline = Instant::now() + Duration::from_secs(30);
        // One read may have begun, one may wait for its place; a third then covers all.
        let looks = (1..=4).find(|_| watched.next(deadline).asked == 1000);
        assert!(looks.is_some(), "at most four looks for a thousand requests");
    }

    #[test]
    fn contents_do_not_answer_who_asked_after_they_were_read() {
        let mut watched = Watched::start(file("one"), "c.yaml", EVENTS, true);
        let deadline = Instant::now() + Duration::from_secs(30);
        let first = watched.watcher.trigger();
        let reload = watched.next(deadline);
        assert_eq!(reload.asked, first);
        fs::write(&watched.path, "two").unwrap();
        let second = watched.watcher.trigger();
        let reload = watched.next(deadline);
        assert!(reload.asked < second || reload.source.unwrap().files[0].text == "two");
    }

    #[test]
    fn a_directory_that_was_made_again_is_watched_again() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("d");
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("c.yaml"), "one").unwrap();
        let mut watched = Watched::start(root, "d/c.yaml", EVENTS, true);
        fs::rename(&directory, watched.directory.path().join("old")).unwrap();
        fs::create_dir(&directory).unwrap();
        fs::write(&watched.path, "two").unwrap();
        // The look that finds it: an event of its parent there is none.
        watched.watcher.trigger();
        watched.expect("two");
        // And from then on by its events alone.
        for text in ["three", "four"] {
            fs::write(&watched.path, text).unwrap();
            watched.expect(text);
        }
    }

    #[test]
    fn a_pipe_in_place_of_a_file_does_not_stop_the_watch() {
        let times = Times { poll: Duration::from_millis(10), ..EVENTS };
        let mut watched = Watched::start(file("one"), "c.yaml", times, false);
        let pipe = watched.directory.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RWXU).unwrap();
        watched.watcher.set_files(vec![pipe.clone()], true);
        fs::write(&watched.path, "two").unwrap();
        watched.expect("two");
        fs::rename(&pipe, &watched.path).unwrap();
        let reload = watched.next(Instant::now() + Duration::from_secs(30));
        let error = reload.source.unwrap_err().to_string();
        assert!(error.ends_with("c.yaml: cannot be read: not a regular file"), "{error}");
        fs::write(watched.directory.path().join("new"), "three").unwrap();
        fs::rename(watched.directory.path().join("new"), &watched.path).unwrap();
        watched.expect("three");
    }

    #[test]
    fn what_changes_nothing_is_not_yielded() {
        let mut watched = Watched::start(file("one"), "c.yaml", EVENTS, true);
        fs::write(watched.directory.path().join("other"), "x").unwrap();
        fs::write(watched.directory.path().join("tmp"), "one").unwrap();
        fs::rename(watched.directory.path().join("tmp"), &watched.path).unwrap();
        // The next that comes is the real change.
        fs::write(watched.directory.path().join("tmp"), "two").unwrap();
        fs::rename(watched.directory.path().join("tmp"), &watched.path).unwrap();
        let reload = watched.next(Instant::now() + Duration::from_secs(30));
        assert_eq!(reload.source.unwrap().files[0].text, "two");
    }

    #[test]
    fn the_watch_ends_with_its_owner() {
        let Watched { watcher, mut reloads, directory, .. } =
            Watched::start(file("one"), "c.yaml", EVENTS, true);
        drop(watcher);
        assert!(reloads.blocking_recv().is_none());
        drop(directory);
    }

    #[test]
    fn hints_are_waited_for_but_not_for_ever() {
        let times = Times { quiet: QUIET, longest: LONGEST, poll: POLL };
        let start = Instant::now();
        let mut debounce = Debounce::default();
        assert_eq!(debounce.due(&times), None);
        debounce.hint(start);
        assert_eq!(debounce.due(&times), Some(start + QUIET));
        for step in 1..20 {
            debounce.hint(start + Duration::from_millis(100) * step);
        }
        assert_eq!(debounce.due(&times), Some(start + LONGEST));
    }

    #[test]
    fn a_mounted_file_is_recognised() {
        let mounts = "36 35 98:0 / /mnt rw - ext4 /dev/sda rw\n\
                      37 35 98:0 /x /etc/my\\040app/c.yaml rw - ext4 /dev/sda rw\n";
        assert!(is_mount_point(Path::new("/etc/my app/c.yaml"), mounts));
        assert!(!is_mount_point(Path::new("/etc/other/c.yaml"), mounts));
        assert!(!is_sub_path_mount(Path::new("Cargo.toml")));
    }
}
