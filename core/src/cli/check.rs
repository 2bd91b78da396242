//! `check`: what is wrong with a file, with carets.

use std::io;
use std::path::Path;

use serde_json::{Value as Json, json};

use super::{EXIT_FAILED, Failed, Paint, Report, print, print_json};
use crate::config::ConfigError;
use crate::error::{chain, visible};
use crate::process::{self, RunError};

pub(super) fn run(file: &Path, strict: bool, output: Report) -> Result<(), Failed> {
    let (summary, warnings, errors, more) = match process::check(file) {
        Ok(checked) => (checked.summary, checked.warnings, Vec::new(), 0),
        Err(RunError::Config(errors)) => {
            (String::new(), Vec::new(), errors.errors().to_vec(), errors.more())
        }
        Err(error) => {
            // What no place of a file is to blame for.
            if output == Report::Json {
                let message = json!({ "message": chain(&error) });
                print_json(&report(false, vec![message], Vec::new(), 0))?;
                return Err(Failed::silent(EXIT_FAILED));
            }
            return Err(Failed::new(&error));
        }
    };
    let is_valid = errors.is_empty() && (warnings.is_empty() || !strict);
    if output == Report::Json {
        let json = |faults: &[ConfigError]| faults.iter().map(fault).collect();
        print_json(&report(is_valid, json(&errors), json(&warnings), more))?;
    } else {
        let paint = Paint::of(&io::stderr());
        for warning in &warnings {
            eprint!("{}", text(warning, Some("warning"), paint));
        }
        for error in &errors {
            eprint!("{}", text(error, None, paint));
        }
        if more > 0 {
            eprintln!("and {more} more");
        }
        if is_valid {
            print(&format!("{summary}\n"))?;
        } else if errors.is_empty() {
            eprintln!("not valid: --strict takes warnings for errors");
        }
    }
    if is_valid { Ok(()) } else { Err(Failed::silent(EXIT_FAILED)) }
}

fn report(is_valid: bool, errors: Vec<Json>, warnings: Vec<Json>, more: usize) -> Json {
    json!({ "valid": is_valid, "errors": errors, "more_errors": more, "warnings": warnings })
}

fn fault(error: &ConfigError) -> Json {
    let place = |number: u32| (number > 0).then_some(number);
    json!({
        "file": &*error.file,
        "line": place(error.position.line),
        "column": place(error.position.column),
        "path": error.path,
        "message": error.message,
    })
}

/// Returns a fault with its line and caret, the place bold and the caret red.
fn text(error: &ConfigError, word: Option<&str>, paint: Paint) -> String {
    let place = paint.paint("1", &format!("{}: ", error.place_and_path()));
    let word = word.map(|word| paint.paint("33", &format!("{word}: "))).unwrap_or_default();
    let mut text = format!("{place}{word}{}\n", visible(&error.message));
    for line in error.snippet.iter().flat_map(|snippet| snippet.lines()) {
        let caret = line.find('^').filter(|at| line[*at..].bytes().all(|byte| byte == b'^'));
        match caret {
            Some(at) => {
                text.push_str(&format!("{}{}\n", &line[..at], paint.paint("31", &line[at..])))
            }
            None => text.push_str(&format!("{line}\n")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, Source};

    fn errors() -> Vec<ConfigError> {
        let source = Source::from_text("c.yaml".as_ref(), "version: 1\nrelay:\n  thread: 3\n");
        config::parse(&source, &|_| None).unwrap_err().errors().to_vec()
    }

    #[test]
    fn faults_have_their_line_and_a_caret() {
        let texts: Vec<_> =
            errors().iter().map(|error| text(error, None, Paint::default())).collect();
        insta::assert_snapshot!(texts.concat(), @r#"
        c.yaml:3:3: relay.thread: unknown key "thread" (accepted: listeners, base_domains, trusted_proxies, max_connection_age, tunnel, credentials, token_issuers, acme, warmup, threads, limits, timeouts); did you mean "threads"?
           |
         3 |   thread: 3
           |   ^^^^^^
        "#);
        let painted = text(&errors()[0], Some("warning"), Paint { is_on: true });
        assert!(painted.contains("\x1b[31m^^^^^^\x1b[0m"), "{painted:?}");
        assert!(painted.contains("\x1b[33mwarning: \x1b[0m"), "{painted:?}");
    }

    #[test]
    fn what_a_file_says_commands_no_terminal() {
        let text_of = |yaml: &str| {
            let source = Source::from_text("c\u{1b}[2J.yaml".as_ref(), yaml);
            let errors = config::parse(&source, &|_| None).unwrap_err();
            let text: String =
                errors.errors().iter().map(|e| text(e, None, Paint::default())).collect();
            assert!(!text.contains(|c| c != '\n' && crate::error::is_obeyed(c)), "{text:?}");
            assert!(!errors.to_string().contains('\u{1b}') && !errors.report().contains('\u{1b}'));
            text
        };
        let escaped = "version: 1\nrelay: {}\n\"\\e]0;x\\a\": 1\nlog: { level: \"\\e[31m\" }\n";
        let text = text_of(escaped);
        assert!(text.contains("unknown key \"\\u{1b}]0;x\\u{7}\""), "{text}");
        // Turned letters are YAML as they are.
        let text = text_of("version: 1\nrelay: { threads: x\u{202e}y }\n");
        assert!(text.contains("x\\u{202e}y") && text.contains("x?y"), "{text}");
        text_of("version: 1\nrelay: { threads: x\u{1b}y }\n");
    }

    #[test]
    fn a_report_for_scripts_has_places() {
        let json = fault(&errors()[0]);
        assert_eq!((&json["file"], &json["line"]), (&json!("c.yaml"), &json!(3)));
        assert!(json["message"].as_str().unwrap().contains("threads"), "{json}");
    }
}
