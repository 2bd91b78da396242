//! Claims with placeholders, which one entry fills in for many accounts: whether what one account is
//! given could be another's.

use crate::config::credentials::{CertificatePattern, Claims, Pattern, Principal};
use crate::config::raw::Field;

/// Stand in a claim for what the credential says.
pub(super) const PLACEHOLDERS: [&str; 2] = ["{namespace}", "{service_account}"];

/// A piece of a pattern.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Piece<'a> {
    Text(&'a str),
    Star,
    /// Its place in [`PLACEHOLDERS`].
    Placeholder(usize),
}

/// Tells patterns under which one account fits names of another.
pub(super) fn ambiguous(place: &Field<'_>, principal: &Principal) {
    let Claims { subdomains, hosts, tunnels, .. } = &principal.claims;
    for (key, patterns) in [("subdomains", subdomains), ("hosts", hosts), ("tunnels", tunnels)] {
        let fields = place.child(key).and_then(|field| field.items()).unwrap_or_default();
        // A fault in the list leaves items out.
        if fields.len() != patterns.len() {
            continue;
        }
        for (pattern, field) in patterns.iter().zip(fields) {
            if is_ambiguous(pattern.as_str(), principal) {
                field.warn(format!(
                    "\"{pattern}\" may be another account's: with {} it fits names that are made for a \
                     longer one (accepted: what no name of an account holds, as '.', in between)",
                    PLACEHOLDERS.join(" or ")
                ));
            }
        }
    }
}

/// Whether two placeholders, or one and a `*`, meet with nothing in between that ends an account's name:
/// `{namespace}-*` of the namespace `a` fits what the namespace `a-b` is given.
fn is_ambiguous(pattern: &str, principal: &Principal) -> bool {
    let pieces = pieces(pattern);
    let varies = |piece: &Piece<'_>| match piece {
        Piece::Text(_) => false,
        Piece::Star => true,
        Piece::Placeholder(which) => does_vary(principal, *which),
    };
    let wild: Vec<usize> = (0..pieces.len()).filter(|at| varies(&pieces[*at])).collect();
    wild.windows(2).any(|pair| {
        let [first, second] = [pair[0], pair[1]];
        let are_stars = pieces[first] == Piece::Star && pieces[second] == Piece::Star;
        !are_stars
            && pieces[first + 1..second].iter().all(|piece| match piece {
                Piece::Text(text) => {
                    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
                }
                // It is the same in all, and a label.
                Piece::Star | Piece::Placeholder(_) => true,
            })
    })
}

fn pieces(pattern: &str) -> Vec<Piece<'_>> {
    let (mut pieces, mut rest) = (Vec::new(), pattern);
    while !rest.is_empty() {
        let special = |text: &str| {
            let which = PLACEHOLDERS.iter().position(|name| text.starts_with(name));
            match which {
                Some(which) => Some((Piece::Placeholder(which), PLACEHOLDERS[which].len())),
                None => text.starts_with('*').then_some((Piece::Star, 1)),
            }
        };
        let (piece, length) = special(rest).unwrap_or_else(|| {
            let end =
                rest.char_indices().map(|(at, _)| at).find(|at| special(&rest[*at..]).is_some());
            let length = end.unwrap_or(rest.len());
            (Piece::Text(&rest[..length]), length)
        });
        pieces.push(piece);
        rest = &rest[length..];
    }
    pieces
}

/// Whether the entry is for more than one namespace, or account.
fn does_vary(principal: &Principal, which: usize) -> bool {
    let by_jwt = principal.jwt.iter().any(|rule| {
        let pattern = [&rule.namespace, &rule.service_account][which];
        pattern.as_ref().is_none_or(|pattern| pattern.as_str().contains('*'))
    });
    // `spiffe://<trust domain>/ns/<namespace>/sa/<account>`
    let segment = [4, 6][which];
    let by_certificate = principal.certificates.iter().any(|pattern| {
        let CertificatePattern::Uri(pattern) = pattern else { return false };
        pattern.as_str().split('/').nth(segment).is_some_and(|segment| segment.contains('*'))
    });
    by_jwt || by_certificate
}

/// Tells principals that are called as an account of another one is: `cluster/shop/web`.
pub(super) fn called_alike(field: &Field<'_>, principals: &[(usize, Principal)]) {
    let has_placeholders = |principal: &Principal| {
        let Claims { subdomains, hosts, tunnels, .. } = &principal.claims;
        let mut all = [subdomains, hosts, tunnels].into_iter().flatten();
        all.any(|pattern: &Pattern| pattern.as_str().contains('{'))
    };
    for (_, of_many) in principals.iter().filter(|(_, principal)| has_placeholders(principal)) {
        for (index, other) in principals {
            let below = other.name.strip_prefix(&*of_many.name).and_then(|n| n.strip_prefix('/'));
            if below.is_some_and(|below| below.split('/').count() == 2)
                && let Some(place) = field.item(*index).and_then(|item| item.child("principal"))
            {
                place.fail(format!(
                    "\"{}\" is what an account of \"{}\" is called, whose claims hold placeholders \
                     (accepted: another name)",
                    other.name, of_many.name
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::credentials::JwtRule;

    fn rule(namespace: Option<&str>, account: Option<&str>) -> JwtRule {
        JwtRule {
            issuer: "cluster".into(),
            subject: None,
            namespace: namespace.map(Pattern::new),
            service_account: account.map(Pattern::new),
        }
    }

    fn principal(jwt: Vec<JwtRule>, certificates: &[&str]) -> Principal {
        let uri = |text: &&str| CertificatePattern::Uri(Pattern::new(text));
        Principal {
            name: "cluster".into(),
            tokens: Vec::new(),
            certificates: certificates.iter().map(uri).collect(),
            jwt,
            claims: Claims::default(),
        }
    }

    #[test]
    fn what_two_accounts_may_share_is_found() {
        let all = principal(vec![rule(Some("*"), Some("*"))], &[]);
        let any = principal(vec![rule(None, None)], &[]);
        let mesh = principal(Vec::new(), &["spiffe://example.org/ns/*/sa/*"]);
        let shop =
            principal(vec![rule(Some("shop"), None)], &["spiffe://example.org/ns/shop/sa/*"]);
        let table = [
            ("{namespace}-*", true, false),
            ("*-{namespace}", true, false),
            ("{namespace}*", true, false),
            ("{namespace}-{service_account}", true, false),
            ("{service_account}-{namespace}-*", true, true),
            ("{service_account}-*", true, true),
            ("{namespace}.*", false, false),
            ("{namespace}/*", false, false),
            ("*.{namespace}", false, false),
            ("{service_account}.{namespace}", false, false),
            ("{namespace}", false, false),
            ("a-{namespace}-b", false, false),
            ("a-*-b*", false, false),
        ];
        assert!(!table.is_empty());
        for (pattern, of_many, of_one) in table {
            for principal in [&all, &any, &mesh] {
                assert_eq!(is_ambiguous(pattern, principal), of_many, "{pattern}");
            }
            assert_eq!(is_ambiguous(pattern, &shop), of_one, "{pattern}");
        }
    }
}
