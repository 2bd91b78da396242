use clap::CommandFactory as _;

use super::*;

#[test]
fn the_command_line_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn help_says_what_a_user_needs() {
    let mut command = Cli::command();
    command.build();
    let mut all = format!("{}\n", command.render_long_help());
    for sub in command.get_subcommands_mut().filter(|sub| sub.get_name() != "help") {
        let name = sub.get_name().to_owned();
        // Writing to a string does not fail.
        let _ = write!(all, "\n=== {name} ===\n\n{}\n", sub.render_long_help());
    }
    insta::assert_snapshot!("help", all);
}

#[test]
fn every_command_shows_an_example() {
    let command = Cli::command();
    let commands: Vec<_> = command.get_subcommands().collect();
    assert!(commands.len() > 10);
    for sub in commands {
        let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
        assert!(help.contains("Example"), "{}", sub.get_name());
    }
}
