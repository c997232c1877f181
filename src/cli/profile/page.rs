//! A profile as one HTML page that needs nothing else: rooflines as SVG, and the tables.
//!
//! In a roofline (Williams, Waterman and Patterson 2009) a kernel stands at its FLOPs a byte and its FLOPs a second, both
//! logarithmic, under the lower of two roofs. Its number is its line in the table; the longer it takes the larger it is.

use super::{HEADS, account, roofs, rows, summary};
use crate::cli::screen::{bandwidth, big, flops};
use ir::graph::Family;
use llamac::profile::{KernelTime, Phase, Profile};
use std::fmt::Write;

const STYLE: &str = "
:root { color-scheme: light dark; --ink: light-dark(#1d2330, #dfe3ea); --paper: light-dark(#fff, #15181e);
  --line: light-dark(#dfe3ea, #2c323c); --faint: light-dark(#667085, #98a2b3); --bar: light-dark(#dbe7fb, #24385c); }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1080px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem; }
p { color: var(--faint); margin: .25rem 0; max-width: 52rem; } .wide { overflow-x: auto; }
svg { display: block; width: 100%; height: auto; margin: 1rem 0; } svg text { font: 12px system-ui, sans-serif; fill: var(--faint); }
svg .grid { stroke: var(--line); } svg .roof { stroke: var(--ink); stroke-width: 2; fill: none; }
svg circle { fill-opacity: .25; stroke-width: 1.5; } svg .lead { stroke: var(--faint); stroke-width: .7; } svg .name { fill: var(--ink); }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; } th { font-weight: 600; }
.right { text-align: right; } .bar { background: linear-gradient(var(--bar), var(--bar)) no-repeat 0 50% / var(--part) 70%; }
i { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .4em; }
";

/// The page.
pub fn page(title: &str, profile: &Profile) -> String {
    let title = escape(title);
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>llamac profile: {title}</title>\n\
         <style>{STYLE}</style>\n<h1>{title}</h1>\n\
         <p>Medians over steps. Ceilings were measured between the steps, by as many threads. A circle is a kernel: its \
         number is its line in the table, the larger the more of the time it takes. More than 100 % of the memory limit: operands \
         came from a cache. Busy is the part of a kernel's time in which its workers work; in the rest they wait.</p>\n"
    );
    for (name, phase) in [("Prefill", &profile.prefill), ("Decode", &profile.decode)] {
        let (summary, account) = (escape(&summary(name, phase)), escape(&account(phase)));
        let _ = write!(out, "<h2>{summary}</h2>\n<p>Ceilings: {}. {account}</p>\n", escape(&roofs(phase)));
        out += &roofline(phase);
        out += &table(phase);
    }
    out + "</html>\n"
}

fn table(phase: &Phase) -> String {
    let mut out = "<div class=\"wide\"><table>\n<tr>".to_string();
    let class = |head: &str| if head.ends_with('>') { " class=\"right\"" } else { "" };
    for head in HEADS {
        let _ = write!(out, "<th{}>{}</th>", class(head), head.trim_end_matches('>'));
    }
    out += "</tr>\n";
    for (row, kernel) in rows(phase).iter().zip(&phase.kernels) {
        let _ = write!(out, "<tr title=\"{}\">", escape(&kernel.schedule));
        for (cell, head) in row.iter().zip(HEADS) {
            let cell = escape(cell);
            let _ = match head {
                "family" => {
                    write!(out, "<td><i style=\"background:{}\"></i>{cell}</td>", colour(kernel.family))
                }
                "share>" | "of limit>" => {
                    let part = if head == "share>" { kernel.share } else { kernel.share_of_limit };
                    let part = 100.0 * part.min(1.0);
                    write!(out, "<td class=\"right bar\" style=\"--part:{part:.1}%\">{cell}</td>")
                }
                _ => write!(out, "<td{}>{cell}</td>", class(head)),
            };
        }
        out += "</tr>\n";
    }
    out + "</table></div>\n"
}

// The plot, in units of the SVG.
const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 460.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 30.0;
const BOTTOM: f64 = 50.0;

/// A logarithmic axis.
struct Axis {
    /// Values at its ends.
    range: [f64; 2],
    /// Places of its ends.
    places: [f64; 2],
}

impl Axis {
    fn at(&self, value: f64) -> f64 {
        let part = (value / self.range[0]).log10() / (self.range[1] / self.range[0]).log10();
        self.places[0] + part * (self.places[1] - self.places[0])
    }

    /// Powers of ten on it.
    fn decades(&self) -> impl Iterator<Item = f64> {
        let [from, to] = self.range.map(|value| value.log10());
        (from.ceil() as i32..=to.floor() as i32).map(|power| 10_f64.powi(power))
    }
}

fn roofline(phase: &Phase) -> String {
    let (read, dot) = (phase.ceilings.read_bytes_per_s, phase.ceilings.dot_flops);
    let place = |kernel: &KernelTime| {
        (kernel.flops as f64 / kernel.bytes as f64, kernel.flops as f64 / kernel.seconds)
    };
    let (shown, without): (Vec<_>, Vec<_>) =
        phase.kernels.iter().enumerate().partition(|(_, k)| k.flops > 0 && k.bytes > 0 && k.seconds > 0.0);
    let ridge = dot / read;
    let least = |values: &dyn Fn(&KernelTime) -> f64, from: f64| {
        shown.iter().map(|(_, k)| values(k)).fold(from, f64::min)
    };
    let most = |values: &dyn Fn(&KernelTime) -> f64, from: f64| {
        shown.iter().map(|(_, k)| values(k)).fold(from, f64::max)
    };
    let x = Axis {
        range: [least(&|k| place(k).0, ridge) / 2.5, most(&|k| place(k).0, ridge) * 4.0],
        places: [LEFT, WIDTH - RIGHT],
    };
    let y = Axis {
        range: [least(&|k| place(k).1, dot) / 3.0, most(&|k| place(k).1, dot) * 2.0],
        places: [HEIGHT - BOTTOM, TOP],
    };
    let mut out = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"roofline\">\n");
    let ([left, right], [bottom, top]) = (x.places, y.places);
    for value in x.decades() {
        let at = x.at(value);
        let _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{bottom}\" y2=\"{top}\"/>\
             <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{value}</text>",
            bottom + 18.0
        );
    }
    for value in y.decades() {
        let at = y.at(value);
        let _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{left}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            left - 8.0,
            at + 4.0,
            big(value).trim_end()
        );
    }
    let _ = writeln!(
        out,
        "<text x=\"{right}\" y=\"{}\" text-anchor=\"end\">FLOPs a byte</text><text x=\"8\" y=\"{}\">FLOP/s</text>",
        bottom + 36.0,
        top - 12.0
    );
    // The slope enters at the left or at the bottom, whichever is higher.
    let enter = x.range[0].max(y.range[0] / read);
    let _ = writeln!(
        out,
        "<polyline class=\"roof\" points=\"{:.1},{:.1} {:.1},{:.1} {right},{:.1}\"/>\
         <text x=\"{right}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
        x.at(enter),
        y.at(enter * read),
        x.at(ridge),
        y.at(dot),
        y.at(dot),
        y.at(dot) - 8.0,
        escape(&flops(dot)),
    );
    let slope = (y.at(dot) - y.at(enter * read)).atan2(x.at(ridge) - x.at(enter)).to_degrees();
    let _ = writeln!(
        out,
        "<text transform=\"translate({:.1} {:.1}) rotate({slope:.1})\" x=\"24\" y=\"-8\">{}</text>",
        x.at(enter),
        y.at(enter * read),
        escape(&bandwidth(read)),
    );
    // Large circles first: small ones lie on them. Labels of neighbours stand below each other.
    let mut labels: Vec<[f64; 2]> = Vec::new();
    for (number, kernel) in &shown {
        let (intensity, speed) = place(kernel);
        let (cx, cy, radius) = (x.at(intensity), y.at(speed), 5.0 + 20.0 * kernel.share.sqrt());
        let mut label = [cx + 34.0, cy + 4.0];
        while let Some(other) = labels
            .iter()
            .find(|other| (other[0] - label[0]).abs() < 90.0 && (other[1] - label[1]).abs() < 14.5)
        {
            label[1] = other[1] + 15.0;
        }
        labels.push(label);
        let _ = writeln!(
            out,
            "<g><circle cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"{radius:.1}\" fill=\"{colour}\" stroke=\"{colour}\"/>\
             <polyline class=\"lead\" points=\"{cx:.1},{cy:.1} {:.1},{:.1}\"/>\
             <text class=\"name\" x=\"{:.1}\" y=\"{:.1}\">{} {name}</text>\
             <title>{name}: {} FLOPs a byte, {}</title></g>",
            label[0] - 4.0,
            label[1] - 4.0,
            label[0],
            label[1],
            number + 1,
            big(intensity).trim_end(),
            escape(&flops(speed)),
            colour = colour(kernel.family),
            name = escape(&kernel.name),
        );
    }
    out += "</svg>\n";
    if !without.is_empty() {
        let numbers: Vec<String> = without.iter().map(|(number, _)| (number + 1).to_string()).collect();
        let _ = writeln!(out, "<p>Not in the plot, since they do no FLOPs: {}.</p>", numbers.join(", "));
    }
    out
}

fn colour(family: Family) -> &'static str {
    match family {
        Family::Dot => "#2f6fde",
        Family::Attention => "#d9480f",
        Family::Rowwise => "#2b8a3e",
        Family::Elementwise => "#9c36b5",
        Family::Gather => "#868e96",
        Family::Sample => "#c2255c",
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
