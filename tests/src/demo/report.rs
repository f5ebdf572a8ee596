//! What the demo found, as one table.

use std::fmt::Write as _;

/// How a row ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Works,
    Failed,
    Skipped,
}

impl Outcome {
    fn word(self) -> &'static str {
        match self {
            Self::Works => "works",
            Self::Failed => "FAILED",
            Self::Skipped => "skipped",
        }
    }
}

/// One thing that was done with one device; the columns of the table.
#[derive(Debug)]
struct Row {
    device: &'static str,
    done: String,
    outcome: Outcome,
    /// A measured value, or why it was skipped.
    figure: String,
}

/// Everything there is to say in the end.
#[derive(Debug, Default)]
pub(super) struct Report {
    rows: Vec<Row>,
    notes: Vec<String>,
}

impl Report {
    pub(super) fn row(&mut self, device: &'static str, done: &str, outcome: Outcome, figure: &str) {
        let (done, figure) = (done.to_owned(), figure.to_owned());
        self.rows.push(Row { device, done, outcome, figure });
    }

    /// Adds a paragraph below the table.
    pub(super) fn note(&mut self, text: String) {
        self.notes.push(text);
    }

    /// Whether nothing failed; what this machine cannot show is no failure.
    pub(super) fn is_good(&self) -> bool {
        self.rows.iter().all(|row| row.outcome != Outcome::Failed)
            && self.rows.iter().any(|row| row.outcome == Outcome::Works)
    }

    /// The table, the rows of a device together and in the order they came.
    pub(super) fn table(&self) -> String {
        let mut devices: Vec<&str> = Vec::new();
        for row in &self.rows {
            if !devices.contains(&row.device) {
                devices.push(row.device);
            }
        }
        let mut lines = vec![["device", "what was done", "result", "figure"]];
        for device in devices {
            let rows = self.rows.iter().filter(|row| row.device == device);
            for (number, row) in rows.enumerate() {
                let name = if number == 0 { device } else { "" };
                lines.push([name, &row.done, row.outcome.word(), &row.figure]);
            }
        }
        aligned(&lines)
    }

    /// The paragraphs below the table.
    pub(super) fn notes(&self) -> String {
        self.notes.iter().fold(String::new(), |text, note| text + note.trim_end() + "\n\n")
    }

    /// One line of sums.
    pub(super) fn summary(&self) -> String {
        let count = |outcome| self.rows.iter().filter(|row| row.outcome == outcome).count();
        format!(
            "{} shown, {} failed, {} skipped",
            count(Outcome::Works),
            count(Outcome::Failed),
            count(Outcome::Skipped)
        )
    }
}

/// Lays out the columns; the first line is the heading, and a line with a device's name starts a
/// block.
fn aligned(lines: &[[&str; 4]]) -> String {
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max();
    let [device, done, result] = [0, 1, 2].map(|column| width(column).unwrap_or(0));
    let rule = "-".repeat(device + done + result + width(3).unwrap_or(0) + 6);
    let mut text = String::from("\n");
    for line in lines {
        if !line[0].is_empty() && text.len() > 1 {
            let _ = writeln!(text, "{rule}");
        }
        let row =
            format!("{:device$}  {:done$}  {:result$}  {}", line[0], line[1], line[2], line[3]);
        let _ = writeln!(text, "{}", row.trim_end());
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_device_stand_together() {
        let mut report = Report::default();
        report.row("disk", "starts", Outcome::Works, "3 ms");
        report.row("network", "starts", Outcome::Skipped, "no root");
        report.row("disk", "is read", Outcome::Failed, "");
        let table = "
device   what was done  result   figure
----------------------------------------
disk     starts         works    3 ms
         is read        FAILED
----------------------------------------
network  starts         skipped  no root

";
        assert_eq!(report.table(), table);
        assert_eq!(report.summary(), "1 shown, 1 failed, 1 skipped");
        assert!(!report.is_good());
    }

    #[test]
    fn a_demo_that_showed_nothing_is_not_good() {
        let mut report = Report::default();
        report.row("disk", "starts", Outcome::Skipped, "not built");
        assert!(!report.is_good());
    }
}
