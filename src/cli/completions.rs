//! `completions`: what shells need to complete a command line.

use super::error::CliError;
use super::screen::print;
use clap::Args;
use clap_complete::{Shell, generate};

#[derive(Args)]
#[command(after_help = "\
Example:
  llamac completions bash > ~/.local/share/bash-completion/completions/llamac")]
pub struct Options {
    /// Shell to complete in
    shell: Shell,
}

pub fn completions(options: &Options, command: &mut clap::Command) -> Result<(), CliError> {
    let mut text = Vec::new();
    generate(options.shell, command, "llamac", &mut text);
    print(&String::from_utf8_lossy(&text))
}
