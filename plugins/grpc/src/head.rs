//! What a head says about being gRPC.

use sidelane_http_born::fields::{self, Kind, Nominated};
use sidelane_http_born::wire::{Field, FieldsSize};

/// Whether a content type is gRPC's (PROTOCOL-HTTP2.md, "Content-Type"): `application/grpc`, alone or
/// followed by `+` or `;`. Not `application/grpc-web`.
pub(crate) fn is_grpc(content_type: &[u8]) -> bool {
    const NAME: &[u8] = b"application/grpc";
    let content_type = content_type.trim_ascii();
    let Some((name, rest)) = content_type.split_at_checked(NAME.len()) else { return false };
    name.eq_ignore_ascii_case(NAME) && matches!(rest.trim_ascii_start(), [] | [b'+' | b';', ..])
}

/// Whether an answer is gRPC's: then its body is messages.
pub(crate) fn answers_grpc<'a>(status: u32, mut fields: impl Iterator<Item = Field<'a>>) -> bool {
    status == 200
        && fields
            .find(|(name, _)| *name == b"content-type")
            .is_some_and(|(_, value)| is_grpc(value))
}

/// Metadata that passes, and its size.
pub(crate) fn metadata<'a, I: Iterator<Item = Field<'a>> + Clone + 'a>(
    fields: I,
) -> (impl Iterator<Item = Field<'a>> + 'a, FieldsSize) {
    let mut size = FieldsSize::default();
    for (name, value) in fields.clone() {
        size.add(name.len(), value.len());
    }
    let nominated = Nominated::scan(fields.clone());
    let passing = fields.filter_map(move |(name, value)| match fields::kind(name) {
        Kind::EndToEnd | Kind::Forwarded => (!nominated.contains(name)).then_some((name, value)),
        Kind::Te if fields::te_trailers(value) => Some((name, &b"trailers"[..])),
        Kind::HopByHop | Kind::Te | Kind::ContentLength | Kind::Host | Kind::Expect => None,
    });
    (passing, size)
}

/// The service and the method that a path names, and the path where they say something else.
pub(crate) fn split_path(path: &str) -> (&str, &str, &str) {
    let named = path
        .strip_prefix('/')
        .and_then(|path| path.rsplit_once('/'))
        .filter(|(service, method)| !service.is_empty() && !method.is_empty());
    match named {
        Some((service, method)) if !path.contains('?') => (service, method, ""),
        _ => ("", "", path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_web_is_not_grpc() {
        for (content_type, expected) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc;charset=utf-8", true),
            ("Application/GRPC ; x", true),
            (" application/grpc", true),
            ("application/grpc-web", false),
            ("application/grpc-web+proto", false),
            ("application/grpcx", false),
            ("application/grp", false),
            ("text/plain", false),
            ("", false),
        ] {
            assert_eq!(is_grpc(content_type.as_bytes()), expected, "{content_type:?}");
        }
    }

    #[test]
    fn paths_come_apart_where_they_can() {
        for (path, expected) in [
            ("/a.B/C", ("a.B", "C", "")),
            ("/x/a.B/C", ("x/a.B", "C", "")),
            ("/a.B/C?q", ("", "", "/a.B/C?q")),
            ("/a.B/", ("", "", "/a.B/")),
            ("//C", ("", "", "//C")),
            ("/C", ("", "", "/C")),
            ("*", ("", "", "*")),
        ] {
            assert_eq!(split_path(path), expected, "{path}");
        }
    }
}
