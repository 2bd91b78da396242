//! Files that cases name: certificates, keys, sets of keys.

use std::fs;
use std::path::Path;

use rcgen::{CertificateParams, KeyPair};
use tempfile::TempDir;

/// A key that verifies signatures (RFC 8037, appendix A.2).
pub(super) const KEYS: &str = r#"{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"a","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;

/// Returns a certificate and its key as PEM.
pub(super) fn certificate(
    names: &[&str],
    change: impl FnOnce(&mut CertificateParams),
) -> (String, String) {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let mut params = CertificateParams::new(names).unwrap();
    change(&mut params);
    let key = KeyPair::generate().unwrap();
    (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
}

/// Writes `NAME.crt` and `NAME.key`.
pub(super) fn write(directory: &Path, name: &str, (cert, key): &(String, String)) {
    fs::write(directory.join(format!("{name}.crt")), cert).unwrap();
    fs::write(directory.join(format!("{name}.key")), key).unwrap();
}

/// Returns a directory with all that the cases of `broken.txt` name.
pub(super) fn directory() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let good = certificate(&["shop.example.org"], |_| {});
    write(path, "good", &good);
    write(path, "nameless", &certificate(&[], |_| {}));
    fs::write(path.join("other.key"), certificate(&["a.example"], |_| {}).1).unwrap();
    fs::write(path.join("text.pem"), "hello\n").unwrap();
    fs::write(path.join("cut.pem"), "-----BEGIN CERTIFICATE-----\nMIIB\n").unwrap();
    fs::write(path.join("ca.pem"), &good.0).unwrap();
    fs::write(path.join("keys.json"), KEYS).unwrap();
    let shared = r#"{"keys":[{"kty":"oct","k":"c2VjcmV0"}]}"#;
    fs::write(path.join("shared.json"), shared).unwrap();
    fs::write(path.join("none.json"), r#"{"keys":[]}"#).unwrap();
    for (name, half) in [("empty", None), ("half", Some("a.key"))] {
        fs::create_dir(path.join(name)).unwrap();
        if let Some(half) = half {
            fs::write(path.join(name).join(half), &good.1).unwrap();
        }
    }
    directory
}
