use super::*;
use clap::CommandFactory;

#[test]
fn the_command_line_is_well_formed() {
    Arguments::command().debug_assert();
}

#[test]
fn every_command_and_flag_has_help_and_every_flag_an_environment_variable() {
    let mut offenders = Vec::new();
    walk(&Arguments::command(), &mut offenders);
    assert!(offenders.is_empty(), "{offenders:#?}");
}

fn walk(command: &clap::Command, offenders: &mut Vec<String>) {
    let name = command.get_name();
    if command.get_about().is_none() {
        offenders.push(format!("{name} has no help"));
    }
    for argument in command.get_arguments().filter(|a| a.get_id() != "help" && a.get_id() != "version") {
        if argument.get_help().is_none() {
            offenders.push(format!("{name} {}: no help", argument.get_id()));
        }
        let variable = argument.get_env().map(|v| v.to_string_lossy().into_owned()).unwrap_or_default();
        let known = variable.starts_with("TANDEM_") || variable == "CSI_ENDPOINT" || variable == "RUST_LOG";
        if argument.get_long().is_some() && !known {
            offenders.push(format!("{name} --{}: variable `{variable}`", argument.get_id()));
        }
    }
    command.get_subcommands().for_each(|inner| walk(inner, offenders));
}
