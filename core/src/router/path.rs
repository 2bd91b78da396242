//! What a path may mean to whoever reads it next: services resolve dots, undo escapes, join slashes and
//! drop parameters, each in its own way (RFC 3986 §6.2.2 leaves them to). Pure.
//!
//! Routes take paths as they are written. Where another reading would be another route's, a client
//! could choose the policies that it meets; [`is_read_alike`] finds that out.

/// Longest path that is read in other ways than as it is written; one beyond with anything in it that
/// readers differ about is taken for unlike. What a client can make us spend on a request is bounded so,
/// and few paths that people make are as long.
const READ_BYTES_MAX: usize = 4 * 1024;

/// Which escapes a reader undoes before it looks at segments.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Escapes {
    Kept,
    /// Those of letters, digits, `-`, `.`, `_` and `~`, which stand for the same (RFC 3986 §2.3).
    Unreserved,
    All,
}

/// One way to read a path whose escapes are undone.
#[derive(Clone, Copy)]
struct Reader {
    /// Several slashes are one.
    joins: bool,
    /// What follows a `;` in a segment is no part of its name.
    drops_parameters: bool,
    /// A `\` is a `/`.
    takes_backslashes: bool,
}

/// Returns whether `holds` is true for whatever a service may take `path` for. It is asked of nothing
/// where the path can only be read as it is written, which most can.
pub(super) fn is_read_alike(path: &str, mut holds: impl FnMut(&str) -> bool) -> bool {
    if !is_suspect(path.as_bytes()) {
        return true;
    }
    if path.len() > READ_BYTES_MAX {
        return false;
    }
    let mut plain = Vec::with_capacity(path.len());
    let mut reading = Vec::with_capacity(path.len() + 1);
    let mut last = path.as_bytes().to_vec();
    for escapes in [Escapes::All, Escapes::Unreserved, Escapes::Kept] {
        escapes.undo(path.as_bytes(), &mut plain);
        let readers = if plain.contains(&b'\\') { 8 } else { 4 };
        for bits in 0..readers {
            let reader = Reader {
                joins: bits & 1 == 0,
                drops_parameters: bits & 2 == 0,
                takes_backslashes: bits & 4 == 0,
            };
            reader.read(&plain, &mut reading);
            if reading == last || reading == path.as_bytes() {
                continue;
            }
            // A prefix is text; what is not cannot be one.
            if !holds(&String::from_utf8_lossy(&reading)) {
                return false;
            }
            std::mem::swap(&mut last, &mut reading);
        }
    }
    true
}

/// Whether there is anything in a path that readers differ about.
fn is_suspect(path: &[u8]) -> bool {
    let mut before = 0;
    for (at, byte) in path.iter().enumerate() {
        let is_suspect = match byte {
            b'.' | b'/' => before == b'/',
            b'\\' | b';' => true,
            b'%' => escaped(&path[at..])
                .is_some_and(|byte| is_unreserved(byte) || matches!(byte, b'/' | b'\\' | b';')),
            _ => false,
        };
        if is_suspect {
            return true;
        }
        before = *byte;
    }
    false
}

impl Escapes {
    /// Undoes them, once.
    fn undo(self, path: &[u8], out: &mut Vec<u8>) {
        out.clear();
        let mut rest = path;
        while let Some((&first, tail)) = rest.split_first() {
            let undone = match self {
                Self::Kept => None,
                Self::Unreserved => escaped(rest).filter(|byte| is_unreserved(*byte)),
                Self::All => escaped(rest),
            };
            let (byte, tail) = undone.map_or((first, tail), |byte| (byte, &rest[3..]));
            out.push(byte);
            rest = tail;
        }
    }
}

impl Reader {
    fn read(self, plain: &[u8], out: &mut Vec<u8>) {
        out.clear();
        let path = plain.strip_prefix(b"/").unwrap_or(plain);
        let ends = |byte: &u8| *byte == b'/' || (*byte == b'\\' && self.takes_backslashes);
        let mut segments = path.split(ends).peekable();
        while let Some(segment) = segments.next() {
            let name = match segment.iter().position(|byte| *byte == b';') {
                Some(end) if self.drops_parameters => &segment[..end],
                _ => segment,
            };
            let is_last = segments.peek().is_none();
            match name {
                b"." => {}
                b".." => out.truncate(memchr::memrchr(b'/', out).unwrap_or(0)),
                b"" if self.joins && !is_last => {}
                name => {
                    out.push(b'/');
                    out.extend_from_slice(name);
                    continue;
                }
            }
            if is_last {
                out.push(b'/');
            }
        }
    }
}

/// Returns the byte that an escape at the beginning stands for.
fn escaped(text: &[u8]) -> Option<u8> {
    let [b'%', high, low, ..] = text else { return None };
    let digit =
        |byte: &u8| char::from(*byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    Some(digit(high)? << 4 | digit(low)?)
}

const fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All readings of a path, without those that are told twice.
    fn readings(path: &str) -> Vec<String> {
        let mut readings = Vec::new();
        assert!(is_read_alike(path, |reading| {
            readings.push(reading.to_owned());
            true
        }));
        readings.sort();
        readings.dedup();
        readings
    }

    #[test]
    fn most_paths_have_one_reading() {
        for path in [
            "",
            "/",
            "*",
            "/a",
            "/a/",
            "/a.b/c..",
            "/a%20b",
            "/%C3%A4",
            "/ä",
            "/a%",
            "/a%4",
            "/a%zz",
            "/a=b&c,d:e@f",
            "/a%3Fb",
        ] {
            assert_eq!(readings(path), Vec::<String>::new(), "{path}");
        }
    }

    #[test]
    fn a_long_path_is_not_read_in_every_way() {
        for (path, expected) in [
            (format!("/{}", "a".repeat(READ_BYTES_MAX)), true),
            (format!("/{}/../b", "a".repeat(READ_BYTES_MAX - 6)), true),
            (format!("/{}/../b", "a".repeat(READ_BYTES_MAX)), false),
        ] {
            assert_eq!(is_read_alike(&path, |_| true), expected, "{} bytes", path.len());
        }
    }

    #[test]
    fn a_path_is_read_as_services_do() {
        for (path, reading) in [
            ("/x/../admin", "/admin"),
            ("/x/%2e%2E/admin", "/admin"),
            ("/x/.%2e/admin", "/admin"),
            ("/./admin", "/admin"),
            ("/../../admin/", "/admin/"),
            ("//admin", "/admin"),
            ("/x//../admin", "/admin"),
            ("/x//../../admin", "/admin"),
            ("/%61dmin", "/admin"),
            ("/admin%2fx", "/admin/x"),
            ("/admin%5Cx", "/admin/x"),
            ("/\\admin", "/admin"),
            ("/x\\y/../admin", "/admin"),
            ("/x%5cy/../admin", "/admin"),
            ("/admin;v=1/x", "/admin/x"),
            ("/x/..;/admin", "/admin"),
            ("/admin%3bx", "/admin"),
            ("/a/b%2fc/../../admin", "/admin"),
            ("/admin/..", "/"),
            ("/admin/.", "/admin/"),
            ("/a/%ff/../../admin", "/admin"),
        ] {
            let readings = readings(path);
            assert!(readings.iter().any(|text| text == reading), "{path}: {readings:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn every_reading_is_a_path_without_dots(path in "/[a./%2eEfF5cC;\\\\]{0,40}") {
            is_read_alike(&path, |reading| {
                assert!(reading.starts_with('/'), "{path}: {reading}");
                assert!(reading.split('/').all(|name| name != "." && name != ".."), "{path}: {reading}");
                true
            });
        }
    }
}
