//! A certificate authority for one test, and the PEM files that it writes.

use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tempfile::TempDir;

/// An authority, with a directory of its own.
#[derive(Debug)]
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: TempDir,
}

/// A certificate's files.
#[derive(Debug)]
pub struct Files {
    /// The certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl Authority {
    /// Makes an authority of that name.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("a certificate");
        let directory = tempfile::tempdir().expect("a directory");
        let authority = Self { issuer, directory };
        std::fs::write(authority.ca(), authority.issuer.pem()).expect("the directory is ours");
        authority
    }

    /// The file with the authority's certificate.
    #[must_use]
    pub fn ca(&self) -> PathBuf {
        self.path("ca.pem")
    }

    /// Signs a certificate for these DNS names and addresses, whose common name is the first.
    #[must_use]
    pub fn sign(&self, names: &[&str]) -> Files {
        self.sign_with(names, |_| {})
    }

    /// As [`Self::sign`], with something changed.
    #[must_use]
    pub fn sign_with(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Files {
        let all: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(all).expect("names");
        params.distinguished_name.push(DnType::CommonName, names[0]);
        change(&mut params);
        let key = KeyPair::generate().expect("a key");
        let signed = params.signed_by(&key, &self.issuer).expect("a certificate");
        let files = Files {
            cert: self.path(&format!("{}.pem", names[0])),
            key: self.path(&format!("{}-key.pem", names[0])),
        };
        let write = |path: &Path, text: String| std::fs::write(path, text);
        write(&files.cert, signed.pem()).expect("the directory is ours");
        write(&files.key, key.serialize_pem()).expect("the directory is ours");
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}
