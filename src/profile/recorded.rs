//! Figures that were measured on GPUs, to stand beside their predictions: `benches/gpu.csv`.
//!
//! A line has the date, the GPU (as in [`super::gpus`]), its driver, the target of the kernel, the stated problem, TFLOP/s, and the
//! range that was predicted on that day. The first line names these fields; text behind `#` is a remark. A figure is added, by
//! `benches/gpu/record`, and never taken away.

use serde::Serialize;

/// What stands in `benches/gpu.csv`.
pub const RECORDED: &str = include_str!("../../benches/gpu.csv");

/// A figure.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// Day of the measurement: `2026-11-25`.
    pub date: String,
    /// The GPU.
    pub gpu: String,
    /// Version of its driver.
    pub driver: String,
    /// What the kernel was compiled for: `cuda:sm_80`.
    pub target: String,
    /// The problem, as `profile --static` names it.
    pub problem: String,
    /// 10^12 FLOPs of the result a second.
    pub tflops: f64,
    /// The least and the most of them that were predicted when it was recorded.
    pub predicted: [f64; 2],
}

/// A line that is no figure.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line} of recorded figures: found `{found}`, expected {FIELDS}")]
pub struct FigureError {
    /// Counted from 1.
    pub line: usize,
    /// What stands there.
    pub found: String,
}

const FIELDS: &str = "date,gpu,driver,target,problem,tflops,least,most";

/// Reads figures.
///
/// # Errors
///
/// The first line that is none.
pub fn parse(text: &str) -> Result<Vec<Figure>, FigureError> {
    let mut figures = Vec::new();
    for (number, whole) in text.lines().enumerate() {
        let line = whole.split('#').next().unwrap_or_default().trim();
        if line.is_empty() || line == FIELDS {
            continue;
        }
        let error = || FigureError { line: number + 1, found: whole.to_string() };
        let fields: Vec<&str> = line.split(',').map(str::trim).collect();
        let &[date, gpu, driver, target, problem, ref numbers @ ..] = &fields[..] else {
            return Err(error());
        };
        let numbers: Vec<f64> = numbers.iter().map_while(|number| number.parse().ok()).collect();
        let &[tflops, least, most] = &numbers[..] else { return Err(error()) };
        if !numbers.iter().all(|number| number.is_finite() && *number > 0.0) {
            return Err(error());
        }
        let [date, gpu, driver, target, problem] = [date, gpu, driver, target, problem].map(str::to_string);
        figures.push(Figure { date, gpu, driver, target, problem, tflops, predicted: [least, most] });
    }
    Ok(figures)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::gpus::Gpu;

    #[test]
    fn what_is_recorded_can_be_read() {
        for figure in parse(RECORDED).unwrap() {
            assert!(Gpu::of(&figure.gpu).is_some(), "{figure:?}");
        }
    }

    #[test]
    fn lines_are_figures_or_errors() {
        let text = format!(
            "{FIELDS}\n# none of ours\n2026-11-25,h100,580.95,cuda:sm_80,product 8192,612.5,830.0,975 # warm\n"
        );
        let [figure] = &parse(&text).unwrap()[..] else { panic!("{text}") };
        assert_eq!((&*figure.problem, figure.tflops), ("product 8192", 612.5));
        assert_eq!(figure.predicted, [830.0, 975.0]);
        for wrong in [
            "2026-11-25,h100,580.95,cuda:sm_80,612.5,830,975",
            "2026-11-25,h100,580.95,cuda:sm_80,product 8192,612.5,830",
            "2026-11-25,h100,580.95,cuda:sm_80,product 8192,612.5,830,975,1",
            "2026-11-25,h100,580.95,cuda:sm_80,product 8192,fast,830,975",
        ] {
            let error = parse(&format!("{FIELDS}\n{wrong}")).unwrap_err().to_string();
            assert_eq!(error, format!("line 2 of recorded figures: found `{wrong}`, expected {FIELDS}"));
        }
    }
}
