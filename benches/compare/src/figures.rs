//! The measured figures, and the targets for them

use std::cmp::Ordering;

use crate::rewrite::{CHANGES, NFQNL, OLD_LEN};
use crate::{
    BUSY, C, COPY, FIRST_4_KIB, FIRST_BYTES, GOODPUT, KINDS, LATENCY, LOOP, NFQ, NO_QUEUE,
    ONE_QUEUE, PACKETS, Placement, REWRITE, TWO_CPUS,
};

/// A measured case
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Case {
    /// Verdicts of one of [`KINDS`] on packets of this many bytes
    Throughput(&'static str, usize),
    /// Long packets, each copied in part or whole
    Copy,
    Latency,
    /// The same, with the sender and the busy side on two CPUs
    BusyLatency,
    /// Waiting packets in this layout of [`LAYOUTS`](crate::LAYOUTS)
    Queues(&'static str),
    /// TCP goodput with a receive buffer of this name
    Goodput(&'static str),
    /// TCP goodput with the first bytes, or all, in the queue
    FirstBytes,
    /// Packets of this many bytes, and this many new bytes for [`OLD_LEN`] others
    Rewrite(usize, usize),
}

impl Case {
    /// Returns all cases of throughput
    pub(crate) fn throughput() -> impl Iterator<Item = Self> {
        PACKETS
            .into_iter()
            .flat_map(|(len, _)| KINDS.map(|kind| Self::Throughput(kind, len)))
    }

    /// Returns all cases of rewriting
    pub(crate) fn rewrite() -> impl Iterator<Item = Self> {
        CHANGES
            .into_iter()
            .map(|(len, new_len)| Self::Rewrite(len, new_len))
    }

    pub(crate) fn name(self) -> String {
        match self {
            Self::Throughput(kind, len) => format!("{kind}, {len} bytes"),
            Self::Copy => COPY.to_owned(),
            Self::Latency | Self::BusyLatency => LATENCY.to_owned(),
            Self::Queues(layout) => layout.to_owned(),
            Self::Goodput(recv_buffer) => format!("{GOODPUT}, receive buffer {recv_buffer}"),
            Self::FirstBytes => FIRST_BYTES.to_owned(),
            Self::Rewrite(len, new_len) => {
                format!("{REWRITE}, {len} bytes, {OLD_LEN} by {new_len}")
            }
        }
    }
}

/// The unit of a figure
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Metric {
    /// Nanoseconds per packet
    Wall,
    /// Nanoseconds of user and system time per packet
    Cpu,
    /// Median of the round trips, in microseconds
    P50,
    /// 99th percentile of the round trips, in microseconds
    P99,
    /// Gbit/s, each segment of one MTU
    Mtu,
    /// Gbit/s with GSO
    Gso,
    /// Packets in the queue during a measurement
    Queued,
}

struct Figure {
    run: usize,
    placement: Placement,
    case: Case,
    side: &'static str,
    metric: Metric,
    value: f64,
}

/// The figures of one or more runs, each of which has a figure of each kind
#[derive(Default)]
pub(crate) struct Figures(Vec<Figure>);

impl Figures {
    pub(crate) fn push(
        &mut self,
        (run, placement): (usize, Placement),
        case: Case,
        side: &'static str,
        metric: Metric,
        value: f64,
    ) {
        self.0.push(Figure {
            run,
            placement,
            case,
            side,
            metric,
            value,
        });
    }

    /// Returns the median of the runs, NaN without any
    pub(crate) fn median(
        &self,
        placement: Placement,
        case: Case,
        side: &str,
        metric: Metric,
    ) -> f64 {
        median(&mut self.values(placement, case, side, metric))
    }

    /// Returns the figure of each run, in the order of the runs
    fn values(&self, placement: Placement, case: Case, side: &str, metric: Metric) -> Vec<f64> {
        let mut found: Vec<&Figure> = self
            .0
            .iter()
            .filter(|figure| {
                (figure.placement, figure.case) == (placement, case)
                    && (figure.side, figure.metric) == (side, metric)
            })
            .collect();
        found.sort_by_key(|figure| figure.run);
        found.iter().map(|figure| figure.value).collect()
    }

    /// Returns the placements with figures, in the order of their first run
    pub(crate) fn placements(&self) -> Vec<Placement> {
        let mut placements = Vec::new();
        for figure in &self.0 {
            if !placements.contains(&figure.placement) {
                placements.push(figure.placement);
            }
        }
        placements
    }

    /// Returns how many times the packets of `base` a side has; `base` may be [`BEST_FLOOR`]
    pub(crate) fn packets(&self, placement: Placement, case: Case, side: &str, base: &str) -> f64 {
        let wall = |side: &str| self.median(placement, case, side, Metric::Wall);
        let base = if base == BEST_FLOOR {
            self.0
                .iter()
                .filter(|figure| figure.side.starts_with(FLOOR))
                .map(|figure| wall(figure.side))
                .fold(f64::INFINITY, f64::min)
        } else {
            wall(base)
        };
        base / wall(side)
    }

    /// Returns by which part the loop's ratio to libnetfilter_queue differs most between runs
    pub(crate) fn spread(&self) -> f64 {
        let mut most: f64 = 0.0;
        for placement in self.placements() {
            for case in Case::throughput() {
                let walls = |side| self.values(placement, case, side, Metric::Wall);
                let ratios = walls(C)
                    .into_iter()
                    .zip(walls(LOOP))
                    .map(|(c, own)| c / own);
                let (least, greatest) = ratios
                    .fold((f64::INFINITY, 0.0), |(least, greatest), ratio| {
                        (ratio.min(least), ratio.max(greatest))
                    });
                most = most.max(greatest / least - 1.0);
            }
        }
        most
    }
}

/// The beginning of the names of the programs of bare system calls
pub(crate) const FLOOR: &str = "floor";
pub(crate) const BEST_FLOOR: &str = "the best floor";

pub(crate) fn median(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A ratio that each placement must reach; a run resolves 2 % of the latency
pub(crate) struct Target {
    pub(crate) what: &'static str,
    pub(crate) bound: Bound,
    cases: &'static [Case],
    ratio: fn(&Figures, Placement, Case) -> f64,
}

#[derive(Clone, Copy)]
pub(crate) enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Bound {
    /// Returns whether a ratio keeps the bound, which NaN does not
    pub(crate) fn allows(self, ratio: f64) -> bool {
        match self {
            Self::AtLeast(least) => ratio >= least,
            Self::AtMost(most) => ratio <= most,
        }
    }

    /// Orders ratios, the worst first; NaN is worse than any number
    pub(crate) fn compare(self, a: f64, b: f64) -> Ordering {
        let (a, b) = match self {
            Self::AtLeast(_) => (a, b),
            Self::AtMost(_) => (-a, -b),
        };
        b.is_nan().cmp(&a.is_nan()).then(a.total_cmp(&b))
    }

    pub(crate) fn name(self) -> String {
        match self {
            Self::AtLeast(least) => format!("at least {least}"),
            Self::AtMost(most) => format!("at most {most}"),
        }
    }
}

const ACCEPT: &[Case] = &[
    Case::Throughput("accept", 64),
    Case::Throughput("accept", 1400),
];
const MIXED: &[Case] = &[
    Case::Throughput("mixed", 64),
    Case::Throughput("mixed", 1400),
];
const REWRITES: &[Case] = &[
    Case::Rewrite(64, 8),
    Case::Rewrite(64, 12),
    Case::Rewrite(1400, 8),
    Case::Rewrite(1400, 12),
];
const DEFAULT_BUFFER: &[Case] = &[Case::Goodput("default")];

/// Floors for any machine, and so lower than the figures of most
pub(crate) const TARGETS: &[Target] = &[
    Target {
        what: "accept: packets of the loop, libnetfilter_queue = 1",
        bound: Bound::AtLeast(1.7),
        cases: ACCEPT,
        ratio: |figures, placement, case| figures.packets(placement, case, LOOP, C),
    },
    Target {
        what: "accept: packets of the loop, nfq = 1",
        bound: Bound::AtLeast(1.45),
        cases: ACCEPT,
        ratio: |figures, placement, case| figures.packets(placement, case, LOOP, NFQ),
    },
    Target {
        what: "accept: packets of the loop, the best floor = 1",
        bound: Bound::AtLeast(0.95),
        cases: ACCEPT,
        ratio: |figures, placement, case| figures.packets(placement, case, LOOP, BEST_FLOOR),
    },
    Target {
        what: "accept: packets of `run_once`, libnetfilter_queue = 1",
        bound: Bound::AtLeast(1.6),
        cases: ACCEPT,
        ratio: |figures, placement, case| figures.packets(placement, case, "nfqnl run_once", C),
    },
    Target {
        what: "accept: packets of `handle_packet`, libnetfilter_queue = 1",
        bound: Bound::AtLeast(0.98),
        cases: ACCEPT,
        ratio: |figures, placement, case| {
            figures.packets(placement, case, "nfqnl handle_packet", C)
        },
    },
    Target {
        what: "mixed: packets of the loop, libnetfilter_queue = 1",
        bound: Bound::AtLeast(1.5),
        cases: MIXED,
        ratio: |figures, placement, case| figures.packets(placement, case, LOOP, C),
    },
    Target {
        what: "median latency of the loop, libnetfilter_queue = 1",
        bound: Bound::AtMost(1.02),
        cases: &[Case::Latency],
        ratio: |figures, placement, case| {
            let p50 = |side| figures.median(placement, case, side, Metric::P50);
            p50(LOOP) / p50(C)
        },
    },
    Target {
        what: "median latency of the busy loop, libnetfilter_queue = 1",
        bound: Bound::AtMost(0.8),
        cases: &[Case::BusyLatency],
        ratio: |figures, placement, case| {
            let p50 = |side| figures.median(placement, case, side, Metric::P50);
            p50(BUSY) / p50(C)
        },
    },
    Target {
        what: "packets of the loop with two queues on two CPUs, one queue = 1",
        bound: Bound::AtLeast(1.3),
        cases: &[Case::Queues(TWO_CPUS)],
        ratio: |figures, placement, case| {
            let wall = |case| figures.median(placement, case, LOOP, Metric::Wall);
            wall(Case::Queues(ONE_QUEUE)) / wall(case)
        },
    },
    Target {
        what: "TCP goodput of the loop without GSO, libnetfilter_queue = 1",
        bound: Bound::AtLeast(2.0),
        cases: DEFAULT_BUFFER,
        ratio: |figures, placement, case| {
            let rate = |side| figures.median(placement, case, side, Metric::Mtu);
            rate(LOOP) / rate(C)
        },
    },
    Target {
        what: "TCP goodput of the loop with GSO, without = 1",
        bound: Bound::AtLeast(3.0),
        cases: DEFAULT_BUFFER,
        ratio: |figures, placement, case| {
            let rate = |metric| figures.median(placement, case, LOOP, metric);
            rate(Metric::Gso) / rate(Metric::Mtu)
        },
    },
    Target {
        what: "TCP goodput with the first 4 KiB queued, without the queue = 1",
        bound: Bound::AtLeast(0.9),
        cases: &[Case::FirstBytes],
        ratio: |figures, placement, case| {
            let rate = |way| figures.median(placement, case, way, Metric::Gso);
            rate(FIRST_4_KIB) / rate(NO_QUEUE)
        },
    },
    Target {
        what: "rewritten packets of `Rewrite`, libnetfilter_queue = 1",
        bound: Bound::AtLeast(1.5),
        cases: REWRITES,
        ratio: |figures, placement, case| figures.packets(placement, case, NFQNL, C),
    },
];

impl Target {
    /// Returns the ratios of the cases that were measured
    pub(crate) fn ratios(&self, figures: &Figures) -> Vec<(Placement, Case, f64)> {
        let mut ratios = Vec::new();
        for placement in figures.placements() {
            for &case in self.cases {
                let is_measured = figures
                    .0
                    .iter()
                    .any(|figure| (figure.placement, figure.case) == (placement, case));
                if is_measured {
                    ratios.push((placement, case, (self.ratio)(figures, placement, case)));
                }
            }
        }
        ratios
    }

    /// Returns a line for each case that misses the target
    pub(crate) fn missed(&self, figures: &Figures) -> Vec<String> {
        let missed = |&(.., ratio): &(Placement, Case, f64)| !self.bound.allows(ratio);
        self.ratios(figures)
            .into_iter()
            .filter(missed)
            .map(|(placement, case, ratio)| {
                let (what, bound) = (self.what, self.bound.name());
                let (case, placement) = (case.name(), placement.name());
                format!("{what}: {ratio:.2} instead of {bound} ({case}; {placement})")
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CASE: Case = Case::Throughput("accept", 64);

    /// The misses of a run in which each side needs 1 µs, except libnetfilter_queue and the loop
    fn missed(c: f64, own: f64) -> Vec<String> {
        let mut figures = Figures::default();
        let mut push = |side, value| {
            figures.push((0, Placement::Same), CASE, side, Metric::Wall, value);
        };
        push(C, c);
        push(LOOP, own);
        [
            NFQ,
            "floor: 64, runs",
            "nfqnl run_once",
            "nfqnl handle_packet",
        ]
        .into_iter()
        .for_each(|side| push(side, 1000.0));
        TARGETS
            .iter()
            .flat_map(|target| target.missed(&figures))
            .collect()
    }

    #[test]
    fn a_missed_target_is_reported() {
        assert_eq!(missed(1700.0, 600.0), [""; 0]);
        let missed_by_the_loop = missed(1700.0, 1010.0);
        assert_eq!(missed_by_the_loop.len(), 2, "{missed_by_the_loop:?}");
        assert_eq!(
            missed_by_the_loop.first().map(String::as_str),
            Some(
                "accept: packets of the loop, libnetfilter_queue = 1: 1.68 instead of at least 1.7 \
                 (accept, 64 bytes; on one CPU)"
            )
        );
    }

    #[test]
    fn a_figure_that_is_no_number_misses_its_target() {
        assert_eq!(missed(1700.0, f64::NAN).len(), 3);
    }

    #[test]
    fn a_figure_is_the_median_of_its_runs() {
        let mut figures = Figures::default();
        for (run, value) in [3.0, 1.0, 2.0].into_iter().enumerate() {
            let run = (run, Placement::Apart);
            figures.push(run, CASE, C, Metric::Wall, 6.0);
            figures.push(run, CASE, LOOP, Metric::Wall, value);
        }
        let packets = figures.packets(Placement::Apart, CASE, LOOP, C);
        assert_eq!(packets, 3.0);
        assert_eq!(figures.spread(), 2.0);
    }
}
