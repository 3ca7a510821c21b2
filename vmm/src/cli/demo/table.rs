//! The demo's table.

use std::fmt::Write as _;

use super::guest::IommuCounters;
use super::jobs::Outcome;

/// A line of the table.
pub(super) struct Row {
    pub(super) title: String,
    pub(super) outcome: Outcome,
    /// VM exits while the job ran.
    pub(super) exits: u64,
    /// The device's interrupts while the job ran.
    pub(super) interrupts: u64,
    /// What the IOMMU did while the job ran.
    pub(super) iommu: IommuCounters,
}

const HEAD: [&str; 10] = [
    "job", "IOPS", "p50 us", "p99 us", "MB/s", "exits/IO", "irqs/IO", "xlat/IO", "hit%", "inv/IO",
];

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of a few minutes are far below 2^53"
)]
fn per(count: u64, operations: u64) -> String {
    if operations == 0 {
        return "-".into();
    }
    format!("{:.2}", count as f64 / operations as f64)
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".into(), |value| format!("{value:.digits$}"))
}

/// Renders rows under the head; the first column is left-aligned, the others right.
pub(super) fn render(rows: &[Row]) -> String {
    let mut cells = vec![HEAD.map(str::to_owned)];
    for row in rows {
        let (outcome, iommu) = (&row.outcome, &row.iommu);
        let translations = iommu.hits.saturating_add(iommu.misses);
        cells.push([
            row.title.clone(),
            number(outcome.iops, 0),
            number(outcome.latency_us.map(|(median, _)| median), 0),
            number(outcome.latency_us.map(|(_, tail)| tail), 0),
            number(outcome.bytes_per_second.map(|bytes| bytes / 1e6), 2),
            per(row.exits, outcome.operations),
            per(row.interrupts, outcome.operations),
            per(translations, outcome.operations),
            per(iommu.hits.saturating_mul(100), translations),
            per(iommu.invalidations, outcome.operations),
        ]);
    }
    let mut text = String::new();
    for line in &cells {
        for (column, cell) in line.iter().enumerate() {
            let widths = cells.iter().filter_map(|line| line.get(column));
            let width = widths.map(String::len).max().unwrap_or(0);
            // Writing to a string does not fail.
            let _ = match column {
                0 => write!(text, "{cell:<width$}"),
                _ => write!(text, "  {cell:>width$}"),
            };
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let row = |title: &str, operations, iops| Row {
            title: title.into(),
            outcome: Outcome {
                operations,
                iops,
                bytes_per_second: Some(2.5e6),
                latency_us: Some((10.4, 99.6)),
            },
            exits: 30,
            interrupts: 10,
            iommu: IommuCounters {
                hits: 60,
                misses: 20,
                invalidations: 5,
                ..IommuCounters::default()
            },
        };
        let text = render(&[row("read", 20, Some(1234.0)), row("a ping", 0, None)]);
        assert_eq!(
            text,
            "job     IOPS  p50 us  p99 us  MB/s  exits/IO  irqs/IO  xlat/IO   hit%  inv/IO\n\
             read    1234      10     100  2.50      1.50     0.50     4.00  75.00    0.25\n\
             a ping     -      10     100  2.50         -        -        -  75.00       -\n"
        );
    }
}
