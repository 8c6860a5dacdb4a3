//! The report: the tables between the markers of `performance.md`, and the chart `performance.svg`

use std::env;
use std::fmt::{self, Write};
use std::fs;
use std::path::Path;

use crate::figures::{BEST_FLOOR, Case, FLOOR, Figures, Metric, TARGETS};
use crate::rewrite::{OLD_LEN, SIDES};
use crate::{
    BUSY, C, COPIES, LAYOUTS, LOOP, MTU, NFQ, NO_QUEUE, ONE_QUEUE, Options, PACKETS, Placement,
    Program, QUEUE_SIDES, RECV_BUFFERS, Result, WAYS,
};

const PAGE: &str = "performance.md";
const CHART: &str = "performance.svg";
const BEGIN: &str = "<!-- begin: written by benches/compare/run --write -->\n";
const END: &str = "<!-- end -->\n";

/// Fails if the report could not be written after the runs
pub(crate) fn check(directory: &Path, options: &Options) -> Result<()> {
    let page = directory.join(PAGE);
    let text = fs::read_to_string(&page).map_err(|error| format!("{}: {error}", page.display()))?;
    around(&text)?;
    Origin::new(options)?;
    Ok(())
}

/// Returns the text before and after the tables, with the markers
fn around(page: &str) -> Result<(&str, &str)> {
    let begin = page
        .find(BEGIN)
        .ok_or("the page has no marker for a begin")?
        + BEGIN.len();
    let (before, rest) = page.split_at(begin);
    let end = rest.find(END).ok_or("the page has no marker for an end")?;
    Ok((before, rest.split_at(end).1))
}

/// Replaces the tables and the chart of a directory
pub(crate) fn write(
    directory: &Path,
    options: &Options,
    programs: &[Program],
    figures: &Figures,
) -> Result<()> {
    let page = directory.join(PAGE);
    let text = fs::read_to_string(&page)?;
    let (before, after) = around(&text)?;
    let origin = Origin::new(options)?;
    let tables = Tables {
        options,
        programs,
        figures,
        origin: &origin,
    };
    fs::write(&page, format!("{before}{tables}{after}"))?;
    fs::write(directory.join(CHART), chart(programs, figures, &origin)?)?;
    Ok(())
}

/// The place and time of the measurement
struct Origin {
    kernel: String,
    cpu: String,
    cpus: usize,
    commit: String,
    date: String,
    is_quick: bool,
}

impl Origin {
    fn new(options: &Options) -> Result<Self> {
        let info = fs::read_to_string("/proc/cpuinfo")?;
        let field = |name: &str| {
            info.lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(field, _)| field.trim_end() == name)
                .map_or("unknown", |(_, value)| value.trim())
        };
        let kind = if field("flags").split(' ').any(|flag| flag == "hypervisor") {
            "virtual machine"
        } else {
            "machine"
        };
        Ok(Self {
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
                .trim()
                .to_owned(),
            cpu: format!(
                "{} (family {}, model {}), {kind}",
                field("model name"),
                field("cpu family"),
                field("model"),
            ),
            cpus: options.cpus.len(),
            commit: env::var("COMPARE_COMMIT").map_err(|_| "start benches/compare/run")?,
            date: env::var("COMPARE_DATE").map_err(|_| "start benches/compare/run")?,
            is_quick: options.is_quick,
        })
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kernel,
            cpu,
            cpus,
            commit,
            date,
            ..
        } = self;
        write!(
            f,
            "Linux {kernel}; {cpus} CPUs: {cpu}; commit {commit}; {date}"
        )
    }
}

struct Tables<'a> {
    options: &'a Options,
    programs: &'a [Program],
    figures: &'a Figures,
    origin: &'a Origin,
}

impl fmt::Display for Tables<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            options, origin, ..
        } = self;
        if options.is_quick {
            writeln!(
                f,
                "\n**From a quick run, which only shows that the script works: no figure is valid.**"
            )?;
        }
        writeln!(f, "\n{origin}.")?;
        writeln!(
            f,
            "Runs: {}, each with {} rounds for each placement and kind of packets.",
            options.runs,
            options.amount().rounds
        )?;
        if options.runs > 1 {
            writeln!(
                f,
                "Between runs, the packets of the loop beside libnetfilter_queue vary by at most \
                 {:.0} %.",
                self.figures.spread() * 100.0
            )?;
        }
        writeln!(f, "\n![Packets per second, by library and style]({CHART})")?;
        self.targets(f)?;
        for placement in self.figures.placements() {
            self.throughput(f, placement)?;
        }
        self.copy(f)?;
        self.latency(f)?;
        self.queues(f)?;
        self.goodput(f)?;
        self.first_bytes(f)?;
        self.rewrite(f)?;
        writeln!(f)
    }
}

impl Tables<'_> {
    fn targets(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n### Targets\n\n| | target | worst | where | |")?;
        writeln!(f, "|---|---:|---:|---|---|")?;
        for target in TARGETS {
            let mut ratios = target.ratios(self.figures);
            // First those that miss the target, NaN among them.
            ratios.sort_by(|(.., a), (.., b)| target.bound.compare(*a, *b));
            let Some(&(placement, case, worst)) = ratios.first() else {
                continue;
            };
            let verdict = match target.bound.allows(worst) {
                _ if self.options.is_quick => "not judged",
                true => "met",
                false => "**missed**",
            };
            let (what, bound) = (target.what, target.bound.name());
            let (case, placement) = (case.name(), placement.name());
            writeln!(
                f,
                "| {what} | {bound} | {worst:.2} | {case}, {placement} | {verdict} |"
            )?;
        }
        Ok(())
    }

    fn throughput(&self, f: &mut fmt::Formatter<'_>, placement: Placement) -> fmt::Result {
        let figures = self.figures;
        writeln!(f, "\n### Throughput, {}", placement.name())?;

        let head = |f: &mut fmt::Formatter<'_>, what: &str| {
            write!(f, "\n| {what} |")?;
            Case::throughput().try_for_each(|case| write!(f, " {} |", case.name()))?;
            writeln!(f, "\n|---|{}", "---:|".repeat(Case::throughput().count()))
        };
        head(f, "packets, libnetfilter_queue = 1")?;
        for Program { name, .. } in self.programs {
            write!(f, "| {name} |")?;
            for case in Case::throughput() {
                write!(f, " {:.2} |", figures.packets(placement, case, name, C))?;
            }
            writeln!(f)?;
        }
        for (side, base, name) in [
            (
                "nfqnl run_once",
                BEST_FLOOR,
                "nfqnl run_once, the best floor = 1",
            ),
            (LOOP, BEST_FLOOR, "nfqnl loop, the best floor = 1"),
            (LOOP, NFQ, "nfqnl loop, nfq = 1"),
        ] {
            write!(f, "| {name} |")?;
            for case in Case::throughput() {
                write!(f, " {:.2} |", figures.packets(placement, case, side, base))?;
            }
            writeln!(f)?;
        }

        head(f, "ns per packet, CPU time in brackets")?;
        for Program { name, .. } in self.programs {
            write!(f, "| {name} |")?;
            for case in Case::throughput() {
                let wall = figures.median(placement, case, name, Metric::Wall);
                let cpu = figures.median(placement, case, name, Metric::Cpu);
                write!(f, " {wall:.0} ({cpu:.0}) |")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }

    fn copy(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let placements = self.figures.placements();
        let [_, (len, _)] = PACKETS;
        writeln!(f, "\n### Copies of {len}-byte packets, nfqnl loop")?;
        write!(f, "\n| ns per packet, CPU time in brackets |")?;
        for placement in &placements {
            write!(f, " {} |", placement.name())?;
        }
        writeln!(f, "\n|---|{}", "---:|".repeat(placements.len()))?;
        for (name, ..) in COPIES {
            write!(f, "| {name} |")?;
            for &placement in &placements {
                let figure = |metric| self.figures.median(placement, Case::Copy, name, metric);
                let (wall, cpu) = (figure(Metric::Wall), figure(Metric::Cpu));
                write!(f, " {wall:.0} ({cpu:.0}) |")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }

    fn latency(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let placements = self.figures.placements();
        writeln!(
            f,
            "\n### Latency of one 64-byte UDP packet through the queue"
        )?;
        write!(f, "\n| µs |")?;
        for placement in &placements {
            let placement = placement.name();
            write!(f, " p50, {placement} | p99, {placement} | CPU time |")?;
        }
        writeln!(f, "\n|---|{}", "---:|---:|---:|".repeat(placements.len()))?;
        let names = self.programs.iter().map(|program| program.name);
        for name in names.chain([BUSY]) {
            write!(f, "| {name} |")?;
            for &placement in &placements {
                for metric in [Metric::P50, Metric::P99, Metric::Cpu] {
                    let value = self.figures.median(placement, Case::Latency, name, metric);
                    write!(f, " {value:.1} |")?;
                }
            }
            writeln!(f)?;
        }
        Ok(())
    }

    fn queues(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let placement = Placement::Apart;
        let wall = |side, layout| {
            let case = Case::Queues(layout);
            self.figures.median(placement, case, side, Metric::Wall)
        };
        if wall(LOOP, ONE_QUEUE).is_nan() {
            return Ok(());
        }
        writeln!(
            f,
            "\n### One and two queues, each with a process of its own"
        )?;
        write!(
            f,
            "\n| ns per packet, packets with {ONE_QUEUE} = 1 in brackets |"
        )?;
        LAYOUTS
            .iter()
            .try_for_each(|layout| write!(f, " {layout} |"))?;
        writeln!(f, "\n|---|{}", "---:|".repeat(LAYOUTS.len()))?;
        for side in QUEUE_SIDES {
            write!(f, "| {side} |")?;
            for layout in LAYOUTS {
                let ratio = wall(side, ONE_QUEUE) / wall(side, layout);
                write!(f, " {:.0} ({ratio:.2}) |", wall(side, layout))?;
            }
            writeln!(f)?;
        }
        Ok(())
    }

    fn goodput(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n### TCP goodput over loopback, MTU {MTU}, every segment through the queue"
        )?;
        writeln!(
            f,
            "\n| Gbit/s | receive buffer | without GSO | with GSO | ratio |"
        )?;
        writeln!(f, "|---|---|---:|---:|---:|")?;
        for placement in self.figures.placements() {
            for side in [C, LOOP] {
                for (_, buffer) in RECV_BUFFERS {
                    let rate = |metric| {
                        let case = Case::Goodput(buffer);
                        self.figures.median(placement, case, side, metric)
                    };
                    let (without, with) = (rate(Metric::Mtu), rate(Metric::Gso));
                    writeln!(
                        f,
                        "| {side}, {} | {buffer} | {without:.2} | {with:.2} | {:.1} |",
                        placement.name(),
                        with / without
                    )?;
                }
            }
        }
        Ok(())
    }

    fn first_bytes(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n### TCP goodput with the first bytes queued, MTU {MTU}, GSO"
        )?;
        writeln!(f, "\n| | Gbit/s | {NO_QUEUE} = 1 | packets queued |")?;
        writeln!(f, "|---|---:|---:|---:|")?;
        for placement in self.figures.placements() {
            for (way, _) in WAYS {
                let case = Case::FirstBytes;
                let rate = |way| self.figures.median(placement, case, way, Metric::Gso);
                let queued = self.figures.median(placement, case, way, Metric::Queued);
                writeln!(
                    f,
                    "| {way}, {} | {:.2} | {:.2} | {queued:.0} |",
                    placement.name(),
                    rate(way),
                    rate(way) / rate(NO_QUEUE)
                )?;
            }
        }
        Ok(())
    }

    fn rewrite(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Only the first placement has this.
        let Some(&placement) = self.figures.placements().first() else {
            return Ok(());
        };
        writeln!(
            f,
            "\n### Rewriting of UDP packets, {OLD_LEN} bytes replaced"
        )?;
        write!(f, "\n| ns per packet, packets with {C} = 1 in brackets |")?;
        Case::rewrite().try_for_each(|case| write!(f, " {} |", case.name()))?;
        writeln!(f, "\n|---|{}", "---:|".repeat(Case::rewrite().count()))?;
        for side in SIDES {
            write!(f, "| {side} |")?;
            for case in Case::rewrite() {
                let wall = self.figures.median(placement, case, side, Metric::Wall);
                let packets = self.figures.packets(placement, case, side, C);
                write!(f, " {wall:.0} ({packets:.2}) |")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

/// The kinds of verdicts in the chart, and their names in it
const KINDS: [(&str, &str); 2] = [("accept", "all accepted"), ("mixed", "mixed verdicts")];
const LEN: usize = 64;
/// Sizes in the chart, in pixels
const WIDTH: usize = 760;
const LEFT: usize = 190;
const BARS: usize = WIDTH - LEFT - 60;
const TOP: usize = 92;
const ROW: usize = 40;
const BAR: usize = 14;

/// Draws packets per second, with a background of its own to be readable on any page
fn chart(
    programs: &[Program],
    figures: &Figures,
    origin: &Origin,
) -> std::result::Result<String, fmt::Error> {
    // The fastest program of bare system calls stands for all of them, below the others.
    let rate = |side: &str, kind| {
        let case = Case::Throughput(kind, LEN);
        1e9 / figures.median(Placement::Same, case, side, Metric::Wall)
    };
    let is_floor = |program: &&Program| program.name.starts_with(FLOOR);
    let floor = programs
        .iter()
        .filter(is_floor)
        .max_by(|a, b| rate(a.name, "accept").total_cmp(&rate(b.name, "accept")));
    let rows: Vec<&str> = programs
        .iter()
        .filter(|program| !is_floor(program))
        .chain(floor)
        .map(|program| program.name)
        .collect();
    let most = rows
        .iter()
        .flat_map(|side| KINDS.map(|(kind, _)| rate(side, kind)))
        .fold(0.0, f64::max);
    let x = |rate: f64| rate / most * BARS as f64;
    let note = if origin.is_quick {
        "; a quick run: no figure is valid"
    } else {
        ""
    };
    let height = TOP + rows.len() * ROW + 44;
    let bottom = TOP + rows.len() * ROW;

    let mut svg = String::new();
    writeln!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="t" font-family="system-ui, sans-serif" font-size="13">
<title id="t">Packets per second through one queue, by library and style</title>
<style>
.page {{ fill: #fff }} text {{ fill: #1f2328 }} .small {{ fill: #59636e; font-size: 11px }}
.other {{ fill: #8c959f }} .floor {{ fill: #c0a36e }} .own {{ fill: #0969da }} .mixed {{ opacity: .55 }}
.grid {{ stroke: #d1d9e0 }}
@media (prefers-color-scheme: dark) {{
.page {{ fill: #0d1117 }} text {{ fill: #f0f6fc }} .small {{ fill: #9198a1 }}
.other {{ fill: #7d8590 }} .floor {{ fill: #a08650 }} .own {{ fill: #4493f8 }} .grid {{ stroke: #3d444d }}
}}
</style>
<rect class="page" width="{WIDTH}" height="{height}" rx="6"/>
<text x="16" y="26" font-size="16" font-weight="600">Thousand packets per second through one queue</text>
<text class="small" x="16" y="44">{LEN}-byte packets, sender and program on one CPU{note}</text>"##
    )?;
    for (index, (kind, name)) in KINDS.into_iter().enumerate() {
        let x = LEFT + index * 130;
        writeln!(
            svg,
            r#"<rect class="other {kind}" x="{x}" y="58" width="14" height="12"/><text class="small" x="{}" y="68">{name}</text>"#,
            x + 20
        )?;
    }
    let step = step(most);
    let mut mark = 0.0;
    while mark <= most {
        let x = LEFT as f64 + x(mark);
        writeln!(
            svg,
            r#"<path class="grid" d="M{x:.1} {}V{bottom}"/><text class="small" x="{x:.1}" y="{}" text-anchor="middle">{:.0}</text>"#,
            TOP - 8,
            bottom + 14,
            mark / 1000.0
        )?;
        mark += step;
    }
    for (index, side) in rows.iter().enumerate() {
        let y = TOP + index * ROW;
        let (class, label) = if side.starts_with(FLOOR) {
            ("floor", "bare system calls in C")
        } else if side.starts_with("nfqnl") {
            ("own", *side)
        } else {
            ("other", *side)
        };
        let label = escape(label);
        writeln!(
            svg,
            r#"<text x="{}" y="{}" text-anchor="end">{label}</text>"#,
            LEFT - 10,
            y + BAR + 5
        )?;
        for (index, (kind, _)) in KINDS.into_iter().enumerate() {
            let (y, width) = (y + index * (BAR + 1), x(rate(side, kind)));
            writeln!(
                svg,
                r#"<rect class="{class} {kind}" x="{LEFT}" y="{y}" width="{width:.1}" height="{BAR}"/><text class="small" x="{:.1}" y="{}">{:.0}</text>"#,
                LEFT as f64 + width + 5.0,
                y + BAR - 3,
                rate(side, kind) / 1000.0
            )?;
        }
    }
    writeln!(
        svg,
        "<text class=\"small\" x=\"16\" y=\"{}\">{}</text>\n</svg>",
        height - 12,
        escape(&origin.to_string())
    )?;
    Ok(svg)
}

/// Returns the distance of the grid's lines: 1, 2 or 5 times a power of ten, for at most six lines
fn step(most: f64) -> f64 {
    let power = 10f64.powf((most / 6.0).log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .map(|factor| factor * power)
        .into_iter()
        .find(|step| most / step <= 6.0)
        .unwrap_or(most)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_text_between_the_markers_is_replaced() {
        let page = format!("before\n{BEGIN}old\n{END}after\n");
        let (before, after) = around(&page).unwrap();
        assert_eq!(before, format!("before\n{BEGIN}"));
        assert_eq!(after, format!("{END}after\n"));
        around("no marker").unwrap_err();
        around(BEGIN).unwrap_err();
    }

    #[test]
    fn a_chart_has_six_lines_at_most() {
        assert_eq!(step(843_000.0), 200_000.0);
        assert_eq!(step(600_000.0), 100_000.0);
        assert_eq!(step(50.0), 10.0);
    }
}
