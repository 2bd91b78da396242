//! `token`: tokens by which sidecars are known, and their hashes.
//!
//! The token alone goes to standard output, so that it can be a file; what is for the relay's file goes
//! beside it, to standard error. No token is ever an argument: arguments are seen by every user of a
//! machine, and stay in a shell's history.

use std::io::{self, IsTerminal as _, Read};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use clap::Subcommand;

use super::{Failed, print};
use crate::config::credentials::TokenHash;
use crate::config::{TOKEN_BYTES_MAX, check_token};
use crate::random;

/// Tells people, and scanners for secrets, what it is.
const PREFIX: &str = "sl_";

/// Most random bytes of a token.
const BYTES_MAX: usize = 64;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Print a new token, and beside it, on standard error, the line for the relay's file.
    #[command(after_help = "\
Examples:
  sidelane token new > shop.token        the token goes to the file, its hash to the terminal
  sidelane token new --bytes 16")]
    New {
        /// Random bytes in it, 16 to 64.
        #[arg(long, value_name = "N", default_value_t = 32,
            value_parser = clap::value_parser!(u8).range(16..=64))]
        bytes: u8,
    },
    /// Read a token from standard input and print its hash, as the relay's file has it.
    #[command(after_help = "\
Examples:
  sidelane token hash < shop.token
  kubectl get secret shop -o jsonpath={.data.token} | base64 -d | sidelane token hash")]
    Hash,
}

pub(super) fn run(command: &Command) -> Result<(), Failed> {
    match command {
        Command::New { bytes } => {
            let token = new((*bytes).into());
            print(&format!("{token}\n"))?;
            eprintln!("tokens: [\"{}\"]", TokenHash::of(&token).to_text());
            Ok(())
        }
        Command::Hash => {
            if io::stdin().is_terminal() {
                eprintln!("the token, then Ctrl-D:");
            }
            let hash = hash(io::stdin().lock()).map_err(Failed::said)?;
            print(&format!("{hash}\n"))
        }
    }
}

/// Returns a token of so many random bytes.
fn new(bytes: usize) -> String {
    let random = random::bytes::<BYTES_MAX>();
    format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(&random[..bytes.min(BYTES_MAX)]))
}

/// Returns the hash of a token, whose final line break is none of it, as that of `token_file`.
fn hash(input: impl Read) -> Result<String, String> {
    let mut text = String::new();
    // A byte more than is accepted, and its line break.
    let most = TOKEN_BYTES_MAX as u64 + 3;
    input
        .take(most)
        .read_to_string(&mut text)
        .map_err(|error| format!("cannot read standard input: {error}"))?;
    if text.len() as u64 == most {
        return Err(format!(
            "standard input is no token (accepted: at most {TOKEN_BYTES_MAX} bytes)"
        ));
    }
    let token = text.trim_end_matches(['\n', '\r']);
    check_token(token).map_err(|message| format!("standard input {message}"))?;
    Ok(TokenHash::of(token).to_text())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_token_is_one_that_files_take() {
        for bytes in [16, 32, 64] {
            let token = new(bytes);
            let random = token.strip_prefix(PREFIX).unwrap();
            assert_eq!(URL_SAFE_NO_PAD.decode(random).unwrap().len(), bytes);
            assert_eq!(check_token(&token), Ok(()));
        }
        assert_ne!(new(32), new(32));
    }

    #[test]
    fn a_hash_is_that_of_the_token_without_its_line_break() {
        // As `printf 0123456789abcdef | sha256sum` prints it.
        let expected = "sha256:9f9f5111f7b27a781f1f1ddde5ebc2dd2b796bfc7365c9c28b548e564176929f";
        for text in ["0123456789abcdef", "0123456789abcdef\n", "0123456789abcdef\r\n"] {
            assert_eq!(hash(text.as_bytes()).as_deref(), Ok(expected));
        }
    }

    #[test]
    fn what_is_no_token_is_told_without_it() {
        let table: [(&[u8], &str); 5] = [
            (b"", "standard input is a token of 0 bytes (accepted: 16 to 4096)"),
            (b"s3cret\n", "standard input is a token of 6 bytes (accepted: 16 to 4096)"),
            (
                b"0123456789abcdef\ntokens: [x]\n",
                "standard input is a token with white space or control characters in it (accepted: none)",
            ),
            (&[b'a'; 5000], "standard input is no token (accepted: at most 4096 bytes)"),
            (&[0xff; 20], "cannot read standard input: stream did not contain valid UTF-8"),
        ];
        for (text, expected) in table {
            assert_eq!(hash(text), Err(expected.to_owned()));
        }
    }
}
