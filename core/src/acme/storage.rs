//! What is kept from one start to the next: the account and the certificates of one authority.
//!
//! `<storage>/<authority>/account.json` and `<storage>/<authority>/<name>.pem` (the key, then the chain:
//! one file, so that the two never differ). Directories are made with mode 0700, files with 0600; a file
//! is written beside the old one and renamed over it. Whoever writes holds a lock, so that relays that
//! share a storage do not order the same name at once; where locks do not reach (some network file
//! systems), the last writer wins and both have whole files.

use std::fmt::Write as _;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use thiserror::Error;

use crate::config::tls::{Acme, Certificate, PEM_BYTES_MAX, PemFault};

/// Why something is not kept, or not found again.
#[derive(Debug, Error)]
pub(super) enum StorageError {
    #[error("cannot {what} {}", .path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} {why}", .path.display())]
    Damaged { path: PathBuf, why: String },
}

/// The storage of one authority.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Storage {
    directory: PathBuf,
}

/// Held by whoever orders or writes; let go by dropping it.
#[derive(Debug)]
pub(super) struct Lock(#[expect(dead_code, reason = "the lock ends with the file")] File);

impl Storage {
    /// Returns the storage of the authority that the configuration names.
    pub(super) fn of(acme: &Acme) -> Self {
        Self { directory: acme.storage.join(authority(&acme.directory)) }
    }

    /// Makes the directories where they are missing.
    pub(super) fn prepare(&self) -> Result<(), StorageError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)
            .map_err(self.io("make the directory", &self.directory))
    }

    /// Takes the lock of `what`; `None`: somebody else has it.
    pub(super) fn lock(&self, what: &str) -> Result<Option<Lock>, StorageError> {
        let path = self.directory.join(format!(".{}.lock", file_name(what)));
        let open = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
        let file = open.map_err(self.io("open", &path))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Lock(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(source)) => Err(self.io("lock", &path)(source)),
        }
    }

    /// Returns the certificate of a name; `None`: there is none yet.
    pub(super) fn certificate(&self, name: &str) -> Result<Option<Certificate>, StorageError> {
        let path = self.certificate_path(name);
        let Some(text) = self.read(&path)? else { return Ok(None) };
        // The two are told apart by their labels.
        let certificate = Certificate::from_pem(&path.to_string_lossy(), &text, &text);
        let damaged = |why| StorageError::Damaged { path: path.clone(), why };
        let certificate = certificate.map_err(|fault| match fault {
            PemFault::Chain(why) | PemFault::Key(why) => damaged(why),
        })?;
        if certificate.names.iter().any(|own| **own == *name) {
            Ok(Some(certificate))
        } else {
            Err(damaged(format!("is a certificate for other names than {name}")))
        }
    }

    /// Keeps the certificate of a name. Whoever calls holds the name's lock.
    pub(super) fn keep_certificate(
        &self,
        name: &str,
        chain: &str,
        key: &str,
    ) -> Result<(), StorageError> {
        self.write(&self.certificate_path(name), format!("{}\n{chain}", key.trim_end()).as_bytes())
    }

    /// Returns what was kept of the account; `None`: there is none yet.
    pub(super) fn account<T: serde::de::DeserializeOwned>(
        &self,
    ) -> Result<Option<T>, StorageError> {
        let path = self.account_path();
        let Some(text) = self.read(&path)? else { return Ok(None) };
        // The parser's own words could repeat a part of the key.
        let damaged = |_| StorageError::Damaged { path, why: "holds no account".to_owned() };
        serde_json::from_str(&text).map(Some).map_err(damaged)
    }

    /// Keeps the account. Whoever calls holds the account's lock.
    pub(super) fn keep_account(&self, account: &impl serde::Serialize) -> Result<(), StorageError> {
        let path = self.account_path();
        let text = serde_json::to_vec_pretty(account).map_err(|error| StorageError::Io {
            what: "write",
            path: path.clone(),
            source: error.into(),
        })?;
        self.write(&path, &text)
    }

    /// Puts an account that cannot be used aside: its key may be wanted by people yet.
    pub(super) fn set_account_aside(&self) -> Result<(), StorageError> {
        let path = self.account_path();
        match fs::rename(&path, path.with_extension("json.unusable")) {
            // It is aside already.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            renamed => renamed.map_err(self.io("rename", &path)),
        }
    }

    fn account_path(&self) -> PathBuf {
        self.directory.join("account.json")
    }

    fn certificate_path(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{}.pem", file_name(name)))
    }

    fn read(&self, path: &Path) -> Result<Option<String>, StorageError> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.io("open", path)(error)),
        };
        let mut bytes = Vec::new();
        file.take(PEM_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(self.io("read", path))?;
        let damaged = |why: &str| StorageError::Damaged { path: path.into(), why: why.to_owned() };
        if bytes.len() as u64 > PEM_BYTES_MAX {
            return Err(damaged("is larger than 1 MiB"));
        }
        String::from_utf8(bytes).map(Some).map_err(|_| damaged("is no text"))
    }

    /// Writes a file whole, or leaves what was there.
    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), StorageError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let beside = self.directory.join(format!(".{name}.new"));
        let written = (|| {
            match fs::remove_file(&beside) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file =
                OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&beside, path)?;
            File::open(&self.directory)?.sync_all()
        })();
        written.map_err(self.io("write", path))
    }

    #[expect(clippy::unused_self, reason = "reads as a part of each call")]
    fn io(
        &self,
        what: &'static str,
        path: &Path,
    ) -> impl FnOnce(io::Error) -> StorageError + use<> {
        let path = path.to_owned();
        move |source| StorageError::Io { what, path, source }
    }
}

/// Returns a directory's name for an authority: readable, and its own by a part of the URL's hash.
fn authority(directory: &str) -> String {
    let readable = directory.trim_start_matches("https://").trim_end_matches('/').replace('/', "-");
    let mut name: String = file_name(&readable).chars().take(100).collect();
    name.push('-');
    for byte in &Sha256::digest(directory.as_bytes())[..4] {
        // Writing to a string does not fail.
        let _ = write!(name, "{byte:02x}");
    }
    name
}

/// Returns a file's name for a name: as it is but for what a path, or a hidden file, would be made of.
fn file_name(name: &str) -> String {
    let mut safe = String::with_capacity(name.len());
    for (place, c) in name.char_indices() {
        let is_plain = c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        if is_plain || (c == '.' && place > 0) {
            safe.push(c);
        } else {
            // Writing to a string does not fail.
            let _ = write!(safe, "%{:x}", u32::from(c));
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::config::tls::Trust;

    fn storage() -> (tempfile::TempDir, Storage) {
        let directory = tempfile::tempdir().unwrap();
        let acme = Acme {
            directory: "https://acme.example.org/directory".into(),
            contacts: Vec::new(),
            storage: directory.path().join("acme"),
            trust: Trust::System,
            external_account: None,
        };
        let storage = Storage::of(&acme);
        storage.prepare().unwrap();
        (directory, storage)
    }

    fn certificate(name: &str) -> (String, String) {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
    }

    #[test]
    fn a_certificate_is_found_again() {
        let (_directory, storage) = storage();
        assert!(storage.certificate("shop.example.org").unwrap().is_none());
        let (chain, key) = certificate("shop.example.org");
        storage.keep_certificate("shop.example.org", &chain, &key).unwrap();
        let found = storage.certificate("shop.example.org").unwrap().unwrap();
        assert_eq!(&*found.names, ["shop.example.org".into()]);
        // Over what is there.
        let (chain, key) = certificate("shop.example.org");
        storage.keep_certificate("shop.example.org", &chain, &key).unwrap();
        assert_ne!(storage.certificate("shop.example.org").unwrap().unwrap().chain, found.chain);
    }

    #[test]
    fn nobody_else_reads_what_is_kept() {
        let (_directory, storage) = storage();
        let (chain, key) = certificate("a.example");
        storage.keep_certificate("a.example", &chain, &key).unwrap();
        storage.keep_account(&"an account").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&storage.directory), 0o700);
        assert_eq!(mode(storage.directory.parent().unwrap()), 0o700);
        let names: Vec<_> =
            fs::read_dir(&storage.directory).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(names.len(), 2, "nothing is left beside: {names:?}");
        for path in names {
            assert_eq!(mode(&path), 0o600, "{}", path.display());
        }
    }

    #[test]
    fn what_is_damaged_is_told_and_says_nothing_of_the_key() {
        let (_directory, storage) = storage();
        let (chain, key) = certificate("a.example");
        let (_, other_key) = certificate("a.example");
        let cases = [
            (String::new(), "holds no certificate"),
            (chain.clone(), "holds no private key"),
            (format!("{}{}", key, &chain[..chain.len() / 2]), "PEM"),
            (format!("{other_key}{chain}"), "is not the key of"),
            (format!("{key}{}", certificate("b.example").0), "is not the key of"),
            ("x".repeat(usize::try_from(PEM_BYTES_MAX).unwrap() + 1), "is larger than 1 MiB"),
        ];
        for (text, expected) in cases {
            fs::write(storage.certificate_path("a.example"), &text).unwrap();
            let error = storage.certificate("a.example").unwrap_err().to_string();
            assert!(error.contains(expected), "{error} ({expected})");
            assert!(!error.contains("PRIVATE KEY-----\nM"), "{error}");
        }
        storage.keep_certificate("a.example", &chain, &key).unwrap();
        fs::rename(storage.certificate_path("a.example"), storage.certificate_path("c.example"))
            .unwrap();
        let error = storage.certificate("c.example").unwrap_err().to_string();
        assert!(error.contains("is a certificate for other names than c.example"), "{error}");
    }

    #[test]
    fn a_damaged_account_is_told_and_set_aside() {
        let (_directory, storage) = storage();
        assert!(storage.account::<String>().unwrap().is_none());
        fs::write(storage.account_path(), "{\"key_pkcs8\": \"secret").unwrap();
        let error = storage.account::<serde_json::Value>().unwrap_err().to_string();
        assert!(error.ends_with("account.json holds no account"), "{error}");
        storage.set_account_aside().unwrap();
        storage.set_account_aside().unwrap();
        assert!(storage.account::<serde_json::Value>().unwrap().is_none());
        assert!(storage.directory.join("account.json.unusable").exists());
    }

    #[test]
    fn a_write_that_was_cut_off_is_no_hindrance() {
        let (_directory, storage) = storage();
        fs::write(storage.directory.join(".account.json.new"), "half").unwrap();
        storage.keep_account(&"whole").unwrap();
        assert_eq!(storage.account::<String>().unwrap().unwrap(), "whole");
    }

    #[test]
    fn one_at_a_time_holds_a_lock() {
        let (_directory, storage) = storage();
        let held = storage.lock("a.example").unwrap();
        assert!(held.is_some());
        assert!(storage.lock("a.example").unwrap().is_none());
        assert!(storage.lock("b.example").unwrap().is_some());
        drop(held);
        assert!(storage.lock("a.example").unwrap().is_some());
    }

    #[test]
    fn names_of_files_stay_in_their_directory() {
        let cases = [
            ("shop.example.org", "shop.example.org"),
            ("../../etc/passwd", "%2e.%2f..%2fetc%2fpasswd"),
            (".hidden", "%2ehidden"),
            ("*.example.org", "%2a.example.org"),
        ];
        for (name, expected) in cases {
            assert_eq!(file_name(name), expected);
        }
    }

    #[test]
    fn authorities_have_directories_of_their_own() {
        let production = authority("https://acme-v02.api.letsencrypt.org/directory");
        assert!(production.starts_with("acme-v02.api.letsencrypt.org-directory-"), "{production}");
        assert_ne!(authority("https://a.example/b/c"), authority("https://a.example/b-c"));
    }
}
