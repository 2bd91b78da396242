//! `explain`: which route takes a URL and why, by a file or by a running process.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::Value as Json;

use super::text::printable;
use super::{EXIT_NO_ROUTE, Failed, Report, ask, print, print_json};
use crate::admin::escaped;
use crate::config;
use crate::explain::{self, Question};

pub(super) fn run(
    question: &Question,
    file: Option<&Path>,
    admin: Option<&str>,
    output: Report,
) -> Result<(), Failed> {
    let answer = match file {
        Some(file) => {
            let (_, config) =
                config::load(file).map_err(|errors| Failed::said(errors.to_string()))?;
            explain::from_config(&config, question, None).map_err(Failed::said)?
        }
        None => {
            let address = ask::address(admin, None)?;
            ask::get(&address, &page(question))?
        }
    };
    match output {
        Report::Json => print_json(&answer)?,
        Report::Text => print(&text(&answer))?,
    }
    if answer["route"].is_null() { Err(Failed::silent(EXIT_NO_ROUTE)) } else { Ok(()) }
}

/// Returns the admin page that answers the question.
fn page(question: &Question) -> String {
    let host = question.host.as_deref().unwrap_or_default();
    let mut page = "/explain?url=".to_owned();
    if !host.is_empty() {
        page.push_str(&escaped(&format!("{}://{host}{}", question.scheme, question.target)));
    }
    page.push_str(&format!("&protocol={}", escaped(&question.protocol_type)));
    if let Some(listener) = &question.listener {
        page.push_str(&format!("&listener={}", escaped(listener)));
    }
    page
}

/// Lines with a word before them; further lines of one word stand below it.
struct Lines {
    text: String,
    word: &'static str,
}

impl Lines {
    fn line(&mut self, word: &'static str, line: &str) {
        let shown = if self.word == word { "" } else { word };
        self.word = word;
        // Writing to a string does not fail.
        let _ = writeln!(self.text, "{shown:<10}{}", printable(line).trim_end());
    }
}

fn text(answer: &Json) -> String {
    let plain = |json: &Json| match json {
        Json::String(text) => text.clone(),
        Json::Null => String::new(),
        other => other.to_string(),
    };
    let items = |json: &'_ Json| json.as_array().cloned().unwrap_or_default();
    let mut lines = Lines { text: String::new(), word: "" };
    let asked = &answer["asked"];
    lines.line(
        "asked",
        &format!(
            "{}{}, protocol {}, listener {}",
            plain(&asked["host"]),
            if asked["host"].is_null() { "no host".to_owned() } else { plain(&asked["path"]) },
            plain(&asked["protocol_type"]),
            plain(&asked["listener"]),
        ),
    );
    if answer["assumed_base_domains"] == Json::Bool(true) {
        lines.line("", "there is no relay here, so any base domain is taken for its own");
    }
    for note in items(&answer["notes"]) {
        lines.line("", &plain(&note));
    }
    if answer["route"].is_null() {
        let held = items(&answer["not_in_force"]);
        let announced = held.first().map_or(String::new(), |held| {
            format!("; sidecar {} announces one that is not in force", plain(&held["sidecar"]))
        });
        lines.line("route", &format!("none: 404{announced}"));
        if let Some(hint) = answer["hint"].as_str() {
            lines.line("hint", hint);
        }
    } else {
        lines.line(
            "route",
            &format!("{} (from {})", plain(&answer["route"]), plain(&answer["from"])),
        );
        for line in items(&answer["because"]) {
            lines.line("because", &plain(&line));
        }
        let tunnels = items(&answer["tunnels"]);
        let is_split = tunnels.len() > 1;
        let is_down = |tunnel: &Json| {
            tunnel["served"] == Json::Bool(false) || tunnel["carries"] == Json::Bool(false)
        };
        let is_unavailable = !tunnels.is_empty() && tunnels.iter().all(is_down);
        for tunnel in tunnels {
            let mut line = plain(&tunnel["tunnel"]);
            if is_split {
                line.push_str(&format!(", weight {}", tunnel["weight"]));
            }
            if let Some(service) = tunnel["service"].as_str() {
                line.push_str(&format!(", service {service}"));
            }
            match tunnel["served"].as_bool() {
                Some(true) => line.push_str(", served"),
                Some(false) if items(&tunnel["unavailable"]).is_empty() => {
                    line.push_str(", not served by any sidecar");
                }
                _ => {}
            }
            for unavailable in items(&tunnel["unavailable"]) {
                let (sidecar, reason) =
                    (plain(&unavailable["sidecar"]), plain(&unavailable["reason"]));
                line.push_str(&format!(", unavailable at sidecar {sidecar}: {reason}"));
            }
            if tunnel["carries"] == Json::Bool(false) {
                line.push_str(", does not carry the protocol");
            }
            lines.line("tunnel", &line);
        }
        for policy in items(&answer["policies"]) {
            lines.line(
                "policies",
                &format!("{}: {}", plain(&policy["policy"]), plain(&policy["says"])),
            );
        }
        if !answer["options"].is_null() {
            lines.line("options", &plain(&answer["options"]));
        }
        if let Some(redirect) = answer["client_sees"].as_str() {
            lines.line("client", &format!("sees {redirect}"));
        }
        let sees = &answer["service_sees"];
        if is_unavailable {
            lines.line("client", "sees 503");
        } else if !sees["host"].is_null() {
            lines.line(
                "service",
                &format!("sees host {}, path {}", plain(&sees["host"]), plain(&sees["path"])),
            );
        }
    }
    for held in items(&answer["not_in_force"]) {
        let reasons: Vec<String> = items(&held["reasons"]).iter().map(plain).collect();
        lines.line(
            "not",
            &format!(
                "{}: sidecar {} announces it, and it is not in force: {}",
                plain(&held["route"]),
                plain(&held["sidecar"]),
                reasons.join("; ")
            ),
        );
    }
    for other in items(&answer["others"]) {
        lines.line("not", &format!("{}: {}", plain(&other["route"]), plain(&other["why"])));
    }
    if let Some(more) = answer["more_others"].as_u64().filter(|more| *more > 0) {
        lines.line("not", &format!("and {more} more"));
    }
    lines.text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Source, parse};

    const FILE: &str = "\
version: 1
relay: { base_domains: [localhost, example.org] }
tunnels:
  - { name: web, service: '127.0.0.1:3000' }
  - { name: canary, service: 'unix:/run/canary.sock' }
routes:
  - { subdomain: shop, tunnel: web, options: { HTTP: { a: 1 } } }
  - name: api
    subdomain: shop
    path_prefix: /api
    tunnels: [{ name: web, weight: 90 }, { name: canary, weight: 10 }]
    timeouts: { connect: 2s }
    rewrite: { host: app.internal, path_prefix: /v1 }
  - { name: rpc, subdomain: shop, protocol_type: GRPC, tunnel: web }
  - { subdomain: old, redirect: { status: 308, scheme: https, host: new.example.org } }
  - { name: all, wildcard: '*', listener: other, tunnel: web }
";

    fn ask(file: &str, url: &str) -> Json {
        let source = Source::from_text("c.yaml".as_ref(), file);
        let config = parse(&source, &|_| None).unwrap_or_else(|errors| panic!("{errors}"));
        explain::from_config(&config, &Question::parse(url, None, None).unwrap(), None).unwrap()
    }

    #[test]
    fn explanations_by_a_file() {
        let file = FILE.replace(
            "relay: {",
            "relay: { listeners: [{ name: web, address: '127.0.0.1:9080' }, { name: other, address: \
             '127.0.0.1:9090' }],",
        );
        let asked = [
            "http://shop.localhost:9080/api/x?y",
            "https://old.example.org/a",
            "shpo.localhost",
            "shop.example.com",
        ];
        let texts: Vec<String> = asked.iter().map(|url| text(&ask(&file, url))).collect();
        insta::assert_snapshot!(texts.join("\n"), @r#"
        asked     shop.localhost:9080/api/x?y, protocol HTTP, listener web
                  by the file alone: what sidecars announce to the relay is not in it
        route     api (from file)
        because   the host is its subdomain "shop" below the base domain localhost
                  the path begins with its path_prefix /api
        tunnel    web, weight 90, service 127.0.0.1:3000
                  canary, weight 10, service unix:/run/canary.sock
        policies  timeouts: connect 2s
                  rewrite: host app.internal; path_prefix /v1
        service   sees host app.internal, path /v1/x?y
        not       shop: it fits, but api has the path_prefix /api
                  all: it takes listener other only, this is web
                  rpc: it takes protocol_type GRPC only, this is HTTP

        asked     old.example.org/a, protocol HTTP, listener web
                  by the file alone: what sidecars announce to the relay is not in it
        route     old (from file)
        because   the host is its subdomain "old" below the base domain example.org
        policies  redirect: status 308; scheme https; host new.example.org
        client    sees 308 to https://new.example.org/a
        not       all: it takes listener other only, this is web

        asked     shpo.localhost/, protocol HTTP, listener web
                  by the file alone: what sidecars announce to the relay is not in it
        route     none: 404
        hint      did you mean "shop.localhost"?
        not       all: it takes listener other only, this is web
                  api: its subdomain is "shop"
                  rpc: its subdomain is "shop"
                  shop: its subdomain is "shop"

        asked     shop.example.com/, protocol HTTP, listener web
                  by the file alone: what sidecars announce to the relay is not in it
        route     none: 404
        hint      did you mean "shop.example.org"?
        not       api: its subdomain is "shop", but example.com is no base domain (those are localhost, example.org)
                  rpc: its subdomain is "shop", but example.com is no base domain (those are localhost, example.org)
                  shop: its subdomain is "shop", but example.com is no base domain (those are localhost, example.org)
        "#);
    }

    #[test]
    fn a_sidecars_file_takes_any_base_domain() {
        let file = "\
version: 1
sidecar: { relays: ['127.0.0.1:9081'] }
tunnels: [{ name: web, service: '127.0.0.1:3000' }]
routes: [{ subdomain: shop, tunnel: web }]
";
        let answer = ask(file, "Shop.any.example:80/x");
        assert_eq!(answer["route"], "shop");
        assert!(text(&answer).contains("any base domain is taken"), "{}", text(&answer));
        assert_eq!(ask(file, "web.any.example")["route"], Json::Null);
    }

    #[test]
    fn a_file_says_as_much_of_protocol_types_as_it_knows() {
        let ask = |library: &str, protocol_type: &str| {
            let file = format!(
                "version: 1\nrelay: {{}}\nplugins: {{ libraries: [{{ name: p, library: p.so{library} }}] }}\n"
            );
            let source = Source::from_text("c.yaml".as_ref(), file);
            let config = parse(&source, &|_| None).unwrap_or_else(|errors| panic!("{errors}"));
            let question = Question::parse("x:1", Some(protocol_type), None).unwrap();
            explain::from_config(&config, &question, None).map(|answer| text(&answer))
        };
        let told = ask("", "LINE").unwrap();
        assert!(told.contains("whether a plugin serves LINE is not known from the file"), "{told}");
        assert!(told.contains("no listener for HTTP has port 1 ("), "{told}");
        assert!(!ask("", "HTTP").unwrap().contains("not known"));
        let told = ask(", protocol_types: [HTTP]", "LINE").unwrap_err();
        assert_eq!(told, "no plugin serves protocol type \"LINE\" (served: HTTP)");
        let told = ask(", protocol_types: [LINE]", "LINE").unwrap();
        assert!(!told.contains("not known"), "{told}");
    }

    #[test]
    fn a_tunnel_that_cannot_take_it_is_told() {
        let file = "\
version: 1
relay: {}
tunnels: [{ name: web, service: '127.0.0.1:3000', protocols: [HTTP] }]
routes: [{ subdomain: shop, tunnel: web }]
";
        let told = text(&ask(file, "ws://shop.localhost/"));
        assert!(told.contains("does not carry the protocol\nclient    sees 503"), "{told}");
        assert!(!text(&ask(file, "shop.localhost")).contains("503"));
    }

    #[test]
    fn a_tunnel_that_is_unavailable_says_where_and_why() {
        let tunnel = |served: bool| {
            let unavailable = serde_json::json!([{ "sidecar": "shop", "reason": "waiting" }]);
            let tunnel =
                serde_json::json!({ "tunnel": "t", "served": served, "unavailable": unavailable });
            text(&serde_json::json!({ "route": "r", "tunnels": [tunnel] }))
        };
        let told = tunnel(false);
        let expected = "tunnel    t, unavailable at sidecar shop: waiting\nclient    sees 503\n";
        assert!(told.contains(expected), "{told}");
        let told = tunnel(true);
        assert!(told.contains("t, served, unavailable at sidecar shop: waiting\n"), "{told}");
        assert!(!told.contains("503"), "{told}");
    }

    #[test]
    fn a_route_that_is_not_in_force_is_told() {
        let mut answer = ask("version: 1\nrelay: {}\n", "shop.localhost");
        let held = explain::NotInForce {
            sidecar: "web".to_owned(),
            route: "shop".to_owned(),
            reasons: vec!["route shop: beyond the claims".to_owned()],
        };
        explain::tell_not_in_force(&mut answer, vec![held]);
        let told = text(&answer);
        let expected = "\
          by the file alone: what sidecars announce to the relay is not in it
route     none: 404; sidecar web announces one that is not in force
not       shop: sidecar web announces it, and it is not in force: route shop: beyond the claims
";
        assert!(told.ends_with(expected), "{told}");
    }

    #[test]
    fn a_question_comes_back_from_the_page_as_it_was() {
        let question = Question::parse("https://shop.localhost:9080/ä?x=1&y", None, Some("web"));
        let page = page(&question.unwrap());
        assert_eq!(
            page,
            "/explain?url=https://shop.localhost:9080/%25C3%25A4%3Fx%3D1%26y&protocol=HTTP&listener=web"
        );
        let bytes = Question::parse("", Some("LINE"), Some("lines")).unwrap();
        assert_eq!(super::page(&bytes), "/explain?url=&protocol=LINE&listener=lines");
    }

    #[test]
    fn an_answer_of_another_version_is_shown_as_far_as_it_goes() {
        for json in [serde_json::json!(null), serde_json::json!({ "route": 1, "others": [1] })] {
            text(&json);
        }
    }
}
