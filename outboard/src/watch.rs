//! `outboard ps`: which pods run. And which pods the operator means, for `top` too.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::layout::base_dir;
use crate::state::{self, PodState};

/// The pods that `names` name, which all have to run; without names, all that run.
///
/// # Errors
/// One of them does not run, or its state cannot be read.
pub fn find(names: &[PathBuf]) -> Result<Vec<PodState>> {
    if names.is_empty() {
        return PodState::all(&base_dir());
    }
    let mut pods = Vec::new();
    for name in names {
        // A bare name is one below the usual directory; `./name` is a path.
        let bare = name.components().count() == 1 && name.file_name() == Some(name.as_os_str());
        let dir = if bare { base_dir().join(name) } else { name.clone() };
        match PodState::read(&dir)? {
            Some(pod) => pods.push(pod),
            None => bail!("no pod runs at {}; `outboard ps` lists those that run", dir.display()),
        }
    }
    Ok(pods)
}

/// `outboard ps`.
///
/// # Errors
/// As [`find`]; or stdout is closed.
pub fn list(names: &[PathBuf], json: bool) -> Result<()> {
    let pods = find(names)?;
    let text =
        if json { serde_json::to_string_pretty(&pods)? + "\n" } else { table(&pods, state::now()) };
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .context("cannot write to stdout")
}

/// The pods as a table, at a time in seconds since 1970.
fn table(pods: &[PodState], now: u64) -> String {
    let mut rows =
        vec![["POD", "DEVICE", "KIND", "PID", "UP", "RESTARTS", "SOCKET"].map(str::to_owned)];
    for pod in pods {
        for device in &pod.devices {
            rows.push([
                pod.name.clone(),
                device.name.clone(),
                device.kind.word().to_owned(),
                device.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
                match device.pid {
                    Some(_) => age(now.saturating_sub(device.started)),
                    None => "down".to_owned(),
                },
                device.restarts.to_string(),
                device.socket.display().to_string(),
            ]);
        }
    }
    columns(&rows)
}

/// Seconds as people say them.
fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// Rows with columns of equal width, two blanks between them.
pub(crate) fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: [usize; N] = std::array::from_fn(|column| width(column).unwrap_or(0));
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::commands::Kind;
    use crate::state::DeviceState;

    #[test]
    fn a_table_shows_what_runs_and_what_is_down() {
        let device = |name: &str, pid| DeviceState {
            name: name.to_owned(),
            kind: Kind::Blk,
            pid,
            started: 1000,
            restarts: 2,
            last_exit: None,
            socket: format!("/r/{name}.sock").into(),
            metrics: "/m".into(),
            upgrades: 0,
            failed_upgrades: 0,
        };
        let pod = PodState {
            name: "web".into(),
            pid: 1,
            file: "/web.toml".into(),
            dir: "/r".into(),
            started: 0,
            devices: vec![device("root", Some(17)), device("database", None)],
        };
        assert_eq!(
            table(&[pod], 1065),
            "POD  DEVICE    KIND  PID  UP     RESTARTS  SOCKET\n\
             web  root      blk   17   1m05s  2         /r/root.sock\n\
             web  database  blk   -    down   2         /r/database.sock\n"
        );
    }

    #[test]
    fn ages_are_short() {
        for (seconds, text) in [(0, "0s"), (3599, "59m59s"), (3600, "1h00m"), (90_000, "1d01h")] {
            assert_eq!(age(seconds), text);
        }
    }
}
