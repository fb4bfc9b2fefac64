//! `enroot list`: containers by name, and what runs in them.

use std::process::ExitCode;

use super::known::{Known, Listed};
use super::{Context, Error, say};

/// List container root filesystems.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// Also what runs in them
    #[arg(short, long)]
    fancy: bool,
}

const HEADER: [&str; 9] = ["NAME", "PID", "COMM", "STATE", "STARTED", "TIME", "MNTNS", "USERNS", "COMMAND"];

/// Runs the command.
pub fn run(args: &ListArgs, context: &Context) -> Result<ExitCode, Error> {
    let known = Known::new(context);
    if args.fancy {
        for line in columns(&rows(&known.list()?)) {
            say::line(line)?;
        }
    } else {
        for name in known.names()? {
            say::line(name.display())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn rows(containers: &[Listed]) -> Vec<Vec<String>> {
    let mut rows = vec![HEADER.map(str::to_owned).to_vec()];
    for Listed { name, processes } in containers {
        let name = name.to_string_lossy().into_owned();
        if processes.is_empty() {
            rows.push(vec![name.clone()]);
        }
        for process in processes {
            rows.push(vec![
                name.clone(),
                process.pid.to_string(),
                process.command_name.clone(),
                process.state.to_string(),
                process.started(),
                process.time(),
                process.mount_namespace.to_string(),
                process.user_namespace.to_string(),
                process.command.clone(),
            ]);
        }
    }
    rows
}

/// Each column as wide as its widest text, two blanks between them.
fn columns(rows: &[Vec<String>]) -> Vec<String> {
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|text| text.chars().count()).max();
    let widths: Vec<usize> = (0..HEADER.len()).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(text, &width)| format!("{text:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = vec![vec!["NAME".into(), "PID".into()], vec!["a".into()], vec!["longer".into(), "1".into()]];
        assert_eq!(columns(&rows), ["NAME    PID", "a", "longer  1"]);
    }
}
