//! The command line: arguments to calls, errors to exit codes.
//!
//! Each command's module says what it prints; what there is to say it asks of the library, or of the
//! admin address of a running process.

use std::fmt::Write as _;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::error::{chain, visible};
use crate::process;

mod ask;
mod check;
mod drain;
mod explain;
mod expose;
mod generate;
mod page;
mod text;
mod token;
mod yaml;

/// The program failed, or the file does not hold.
const EXIT_FAILED: u8 = 1;

/// The process that was asked cannot be reached.
const EXIT_UNREACHABLE: u8 = 3;

/// No route takes what was asked.
const EXIT_NO_ROUTE: u8 = 4;

/// What was waited for has not ended.
const EXIT_LEFT: u8 = 5;

const EXIT_CODES: &str = "\
Exit codes:
  0  ended as asked, or the file is valid
  1  failed, or the file is not valid
  2  the command line is not understood
  3  the process that was asked cannot be reached
  4  no route takes what was asked (explain)
  5  something still runs (drain)";

const ENVIRONMENT: &str = "\
Environment:
  SIDELANE_PLUGIN_DIR  where `expose`, and sidecar.yaml as it comes, look for plugins
  NO_COLOR             no colours, even on a terminal
  Whatever a configuration names by ${NAME}";

/// A tunnel sidecar and relay with protocol plugins.
///
/// A relay takes clients' requests and routes them; a sidecar beside a service dials the relay and
/// delivers them. Which of the two a process is, its file says; it may be both.
#[derive(Debug, Parser)]
#[command(
    name = "sidelane",
    version,
    max_term_width = 100,
    after_help = format!("\
Begin with one of:
  sidelane expose 3000           a service on port 3000, at an address of its own, without a file
  sidelane run sidecar.yaml      what a file says
  sidelane check sidecar.yaml    what is wrong with a file

{EXIT_CODES}

{ENVIRONMENT}"),
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the roles that the file's `relay` and `sidecar` sections give this process.
    ///
    /// Edits of the file take effect while it runs; a bad one is logged and changes nothing. SIGHUP
    /// reads it at once; SIGTERM and SIGINT have others send nothing new, let running exchanges end within
    /// `drain_timeout` and exit 0; a second one exits at once.
    #[command(after_help = "\
Examples:
  sidelane run                            sidecar.yaml of this directory
  sidelane run /etc/sidelane              all files of a directory, as one
  HTTP_PORT=8080 sidelane run demo.yaml   ${HTTP_PORT} in the file is 8080")]
    Run {
        /// Configuration file, or a directory of them.
        #[arg(default_value = "sidecar.yaml")]
        file: PathBuf,
        /// Write the addresses that were bound, as JSON, once all are: for ports given as 0.
        #[arg(long, value_name = "PATH")]
        ports_file: Option<PathBuf>,
    },
    /// Say what is wrong with a file, as a start or a reload would: plugins are loaded and asked.
    ///
    /// Every fault is told at once, with line, column, what is accepted, and what may have been meant.
    #[command(after_help = "\
Examples:
  sidelane check                          sidecar.yaml of this directory
  sidelane check --strict relay.yaml      warnings are faults too: for a pipeline
  sidelane check --output json | jq -r '.errors[].message'

Exit codes:
  0  valid
  1  not valid; with --strict also where there are warnings")]
    Check {
        /// Configuration file, or a directory of them.
        #[arg(default_value = "sidecar.yaml")]
        file: PathBuf,
        /// Warnings are faults.
        #[arg(long)]
        strict: bool,
        /// Form of what is printed.
        #[arg(long, value_enum, default_value_t = Report::Text)]
        output: Report,
    },
    /// Say which route takes a URL and why, what its policies do, and why the others do not take it.
    ///
    /// By a file alone, or by a running process, which knows the routes that sidecars announced too, and
    /// whether anybody serves them.
    #[command(after_help = "\
Examples:
  sidelane explain http://shop.example.org/api/x     asks the running process
  sidelane explain shop.example.org --file relay.yaml
  sidelane explain wss://chat.example.org/ws         the scheme says the protocol (ws, grpc)
  sidelane explain --listener lines --protocol LINE  a byte-born protocol: no host

Exit codes:
  0  a route takes it
  1  failed
  3  the process cannot be reached
  4  no route takes it")]
    Explain {
        /// URL, or a host with or without port and path.
        #[arg(default_value = "", hide_default_value = true, required_unless_present = "listener")]
        url: String,
        /// Protocol type; without it HTTP, or what the URL's scheme says.
        #[arg(long, value_name = "TYPE")]
        protocol: Option<String>,
        /// Listener that the client comes in by; without it the one of the URL's port, or the first.
        #[arg(long, value_name = "NAME")]
        listener: Option<String>,
        /// Explain by this file, not by a running process.
        #[arg(long, value_name = "FILE", conflicts_with = "admin")]
        file: Option<PathBuf>,
        /// Admin address of the process to ask; without it that of sidecar.yaml, or 127.0.0.1:9083.
        #[arg(long, value_name = "ADDRESS")]
        admin: Option<String>,
        /// Form of what is printed.
        #[arg(long, value_enum, default_value_t = Report::Text)]
        output: Report,
    },
    /// Print the JSON Schema of configuration files, for editors.
    #[command(after_help = "\
Example:
  sidelane schema > sidelane.schema.json
  and as the first line of a file:
  # yaml-language-server: $schema=sidelane.schema.json")]
    Schema,
    /// Show the configuration that a running process has in force, with defaults, secrets masked.
    #[command(after_help = page_help("config"))]
    Config(Asked),
    /// Show the routes that a running process knows: what they take, where it goes, and their state.
    #[command(after_help = page_help("routes"))]
    Routes(Asked),
    /// Show tunnels, and the sessions of relay or sidecar that carry them.
    #[command(after_help = page_help("tunnels"))]
    Tunnels(Asked),
    /// Show the plugins of a running process: protocols, versions, generations.
    #[command(after_help = page_help("plugins"))]
    Plugins(Asked),
    /// Take a running process out of service, and wait until nothing runs there any more.
    ///
    /// First others are told to send nothing new: relays, where it is a sidecar; clients and balancers, by
    /// /ready, `Connection: close` and GOAWAY, where it is a relay. What comes all the same is served. Then the
    /// process ends as by SIGTERM; not so with --withdraw, which is for a preStop hook: SIGTERM follows.
    #[command(after_help = "\
Examples:
  sidelane drain --withdraw --wait 20s    in a preStop hook: nothing new from here on
  sidelane drain --admin 127.0.0.1:9183   ends that process
  sidelane drain --file /etc/relay.yaml   ends the process whose file this is

Exit codes:
  0  nothing runs there any more; without --withdraw: it has ended
  1  failed
  3  the process cannot be reached: is `admin` in its file?
  5  --wait is over: something still runs, or a relay has not acknowledged")]
    Drain(drain::Arguments),
    /// Give one service an address, without a file.
    ///
    /// With --relay it dials that relay, by TLS but on loopback, and the address is below the relay's base
    /// domain; without, a relay runs in this process, for this machine. The address is printed once the relay has accepted
    /// it, then a line for each request. Ctrl-C lets running requests
    /// end for 5s and exits 0.
    #[command(after_help = "\
Examples:
  sidelane expose 3000
  sidelane expose 3000 --subdomain shop --relay tunnel.example.org:9081 --token-file ~/.sidelane-token
  sidelane expose 3000 --relay 10.0.0.5:9081 --ca ca.pem --server-name relay.internal --token-file t
  sidelane expose https://localhost:8443
  sidelane expose 127.0.0.1:50051 --protocol GRPC

Plugins are looked for in --plugin-dir, else $SIDELANE_PLUGIN_DIR, else beside the program, in
../lib/sidelane/plugins from there, and in target/release.")]
    Expose(expose::Arguments),
    /// Make tokens by which sidecars are known, and their hashes, which relays know.
    ///
    /// A sidecar's file has the token (best in a file of its own, `token_file`); the relay's file has its
    /// hash alone, in `relay.credentials`, so that whoever reads it can be nobody.
    #[command(after_help = "\
Examples:
  sidelane token new > shop.token        the token goes to the file, its hash to the terminal
  sidelane token new                     both to the terminal
  sidelane token hash < shop.token       the hash of a token that is there already

In the relay's file:
  relay:
    credentials:
      - principal: shop
        tokens: [\"sha256:…\"]              two while sidecars change from one to the other
        subdomains: [shop, \"shop-*\"]
        tunnels: [shop]")]
    Token {
        #[command(subcommand)]
        command: token::Command,
    },
    /// Print a script that completes commands and options in a shell.
    #[command(after_help = "\
Examples:
  sidelane completions bash > /etc/bash_completion.d/sidelane
  sidelane completions zsh > ~/.zfunc/_sidelane
  sidelane completions fish > ~/.config/fish/completions/sidelane.fish")]
    Completions {
        /// Shell.
        shell: clap_complete::Shell,
    },
    /// Print the man page, or write those of all commands to a directory.
    #[command(after_help = "\
Examples:
  sidelane man | man -l -
  sidelane man --dir /usr/local/share/man/man1")]
    Man {
        /// Where the pages of all commands go.
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
}

fn page_help(name: &str) -> String {
    format!(
        "\
Examples:
  sidelane {name}                          asks 127.0.0.1:9083, or what sidecar.yaml says
  sidelane {name} --admin 127.0.0.1:9183
  sidelane {name} --file /etc/relay.yaml   asks the process whose file this is
  sidelane {name} --output json            for scripts; docs/operations.md tells the fields

The admin address is of this machine alone. In a pod: kubectl exec POD -- sidelane {name}.

Exit codes:
  0  answered
  1  failed
  3  the process cannot be reached: is `admin` in its file?"
    )
}

/// Which running process is asked.
#[derive(Debug, Args)]
struct Asked {
    /// Admin address of the process; without it that of sidecar.yaml, or 127.0.0.1:9083.
    #[arg(long, value_name = "ADDRESS")]
    admin: Option<String>,
    /// File whose `admin` section says the address.
    #[arg(long, value_name = "FILE", conflicts_with = "admin")]
    file: Option<PathBuf>,
    /// Form of what is printed.
    #[arg(long, value_enum, default_value_t = Form::Table)]
    output: Form,
}

/// Form of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Report {
    /// For people.
    Text,
    /// For scripts.
    Json,
}

/// Form of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Form {
    /// For people.
    Table,
    /// For scripts.
    Json,
}

/// Why a command failed; its exit code.
#[derive(Debug)]
struct Failed {
    code: u8,
    /// Empty: what there is to say was said.
    message: String,
}

impl Failed {
    fn new(error: &dyn std::error::Error) -> Self {
        Self::said(chain(error))
    }

    fn said(message: impl Into<String>) -> Self {
        Self { code: EXIT_FAILED, message: message.into() }
    }

    fn silent(code: u8) -> Self {
        Self { code, message: String::new() }
    }
}

/// Parses the arguments and runs the command.
#[must_use]
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run { file, ports_file } => {
            process::run(&file, ports_file.as_deref()).map_err(|error| Failed::new(&error))
        }
        Command::Check { file, strict, output } => check::run(&file, strict, output),
        Command::Explain { url, protocol, listener, file, admin, output } => {
            let question =
                crate::explain::Question::parse(&url, protocol.as_deref(), listener.as_deref());
            question.map_err(Failed::said).and_then(|question| {
                explain::run(&question, file.as_deref(), admin.as_deref(), output)
            })
        }
        Command::Schema => generate::schema(),
        Command::Config(asked) => page::run(page::Page::Config, &asked),
        Command::Routes(asked) => page::run(page::Page::Routes, &asked),
        Command::Tunnels(asked) => page::run(page::Page::Tunnels, &asked),
        Command::Plugins(asked) => page::run(page::Page::Plugins, &asked),
        Command::Drain(arguments) => drain::run(&arguments),
        Command::Expose(arguments) => expose::run(&arguments),
        Command::Token { command } => token::run(&command),
        Command::Completions { shell } => generate::completions(shell),
        Command::Man { dir } => generate::man(dir.as_deref()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failed { code, message }) => {
            if !message.is_empty() {
                // A message has lines; what others wrote into it commands no terminal.
                let lines: Vec<_> = message.split('\n').map(visible).collect();
                eprintln!("{}", lines.join("\n"));
            }
            ExitCode::from(code)
        }
    }
}

/// Writes to standard output. Whoever closed it has seen enough.
fn print(text: &str) -> Result<(), Failed> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failed::said(format!("cannot write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// Writes JSON, indented, to standard output.
fn print_json(value: &serde_json::Value) -> Result<(), Failed> {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(text, "{value:#}");
    print(&text)
}

/// Colours of one output; none where it is no terminal, or `NO_COLOR` is set.
#[derive(Clone, Copy, Debug, Default)]
struct Paint {
    is_on: bool,
}

impl Paint {
    fn of(stream: &impl io::IsTerminal) -> Self {
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { is_on: stream.is_terminal() && !no_color }
    }

    fn stdout() -> Self {
        Self::of(&io::stdout())
    }

    /// Returns the text in this colour of ECMA-48 (`31` red, `32` green, `33` yellow, `1` bold).
    fn paint(self, color: &str, text: &str) -> String {
        if self.is_on { format!("\x1b[{color}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// Returns the width of the terminal that standard output is, in columns; `None`: it is none.
fn terminal_width() -> Option<usize> {
    let out = io::stdout();
    if !out.is_terminal() {
        return None;
    }
    let size = rustix::termios::tcgetwinsize(&out).ok()?;
    // Some terminals do not know.
    (size.ws_col > 0).then(|| size.ws_col.into())
}

#[cfg(test)]
mod tests;
