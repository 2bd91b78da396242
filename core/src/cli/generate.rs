//! `schema`, `completions` and `man`: what is generated from the types and the command line.

use std::path::Path;

use clap::CommandFactory as _;

use super::{Cli, Failed, print, print_json};

pub(super) fn schema() -> Result<(), Failed> {
    print_json(&crate::config::schema())
}

pub(super) fn completions(shell: clap_complete::Shell) -> Result<(), Failed> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "sidelane", &mut script);
    print(&String::from_utf8_lossy(&script))
}

/// Writes the pages of all commands to a directory, or prints that of the program.
pub(super) fn man(dir: Option<&Path>) -> Result<(), Failed> {
    let Some(dir) = dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(Cli::command())
            .render(&mut page)
            .map_err(|error| Failed::said(format!("the page cannot be made: {error}")))?;
        return print(&String::from_utf8_lossy(&page));
    };
    std::fs::create_dir_all(dir)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), dir))
        .map_err(|error| Failed::said(format!("cannot write to {}: {error}", dir.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("man1");
        man(Some(&dir)).unwrap();
        for sub in Cli::command().get_subcommands() {
            let page = dir.join(format!("sidelane-{}.1", sub.get_name()));
            let page = std::fs::read_to_string(&page).unwrap();
            assert!(page.contains(".SH SYNOPSIS"), "{}", sub.get_name());
        }
        assert!(std::fs::read_to_string(dir.join("sidelane.1")).unwrap().contains("expose"));
    }
}
