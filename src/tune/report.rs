//! What a tuning table says: choices with their gains, and how well the models of cost predict.

use super::table::{Key, Outcome, Record, Table, quantile};
use serde::Serialize;
use std::collections::BTreeMap;

/// A choice, for a table on a screen.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Choice {
    /// What it is compiled for.
    pub target: String,
    /// The kernel.
    pub kernel: String,
    /// Its family.
    pub family: String,
    /// Element type.
    pub dtype: String,
    /// Tokens of the step.
    pub tokens: usize,
    /// The schedule.
    pub schedule: String,
    /// How often as fast as the default, by the median of the turns.
    pub gain: f64,
    /// Share of the limit that it reaches.
    pub share_of_limit: f64,
    /// Median seconds of a launch.
    pub seconds: f64,
    /// Schedules that were tried, and that there are.
    pub tried: [usize; 2],
    /// Of those tried: wrong, crashed or too late.
    pub bad: usize,
    /// Where it was measured, or for which GPU it was argued.
    pub machine: String,
    /// Was it argued from machine code?
    pub predicted: bool,
}

/// The choices that hold here.
pub fn choices(table: &Table, holds: &dyn Fn(&Key) -> bool) -> Vec<Choice> {
    let of = |record: &Record| {
        let Outcome::Chosen { tried, legal, limit_s, times } = &record.outcome else { return None };
        let shares: Vec<f64> = limit_s.iter().zip(&times.seconds).map(|(limit, of)| limit / of).collect();
        let same = |r: &&Record| r.key == record.key;
        let is_bad = |r: &&Record| !matches!(r.outcome, Outcome::Timed { .. } | Outcome::Chosen { .. });
        Some(Choice {
            target: record.key.target.clone(),
            kernel: record.kernel.clone(),
            family: record.family.clone(),
            dtype: record.dtype.clone(),
            tokens: record.tokens,
            schedule: record.schedule.clone(),
            gain: 1.0 / times.ratio(),
            share_of_limit: quantile(&shares, 0.5),
            seconds: quantile(&times.seconds, 0.5),
            tried: [*tried, *legal],
            bad: table.records.iter().filter(same).filter(is_bad).count(),
            machine: record.key.machine.clone(),
            predicted: record.key.predicted,
        })
    };
    let mut rows: Vec<Choice> = table.choices(holds).records().filter_map(of).collect();
    let place = |c: &Choice| (c.target.clone(), c.dtype.clone(), c.tokens != 1, c.tokens, c.kernel.clone());
    rows.sort_by_key(place);
    rows
}

/// How well a model of cost predicts the times of one kernel's schedules.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// The kernel.
    pub kernel: String,
    /// Its family.
    pub family: String,
    /// Element type.
    pub dtype: String,
    /// Tokens of the step.
    pub tokens: usize,
    /// Schedules that were timed.
    pub timed: usize,
    /// Rank correlation of predicted and measured (Spearman): 1 is the same order.
    pub correlation: f64,
    /// How much longer the predicted best takes than what was chosen, in the last turns: 0.05 is 5 %.
    pub regret: f64,
    /// What was chosen.
    pub best: String,
    /// The predicted best.
    pub predicted: String,
}

/// Predictions of every kernel of which a schedule was chosen here among three or more by measuring.
pub fn predictions(table: &Table, holds: &dyn Fn(&Key) -> bool) -> Vec<Prediction> {
    let mut by_kernel: BTreeMap<&Key, Vec<(&Record, usize, f64)>> = BTreeMap::new();
    let measured = |key: &Key| holds(key) && !key.predicted;
    for record in table.records.iter().filter(|record| measured(&record.key)) {
        if let Outcome::Timed { rank, times, .. } = &record.outcome {
            by_kernel.entry(&record.key).or_default().push((record, *rank, times.best_ratio()));
        }
    }
    let chosen = table.choices(&measured);
    let of = |(key, timed): (&Key, Vec<(&Record, usize, f64)>)| {
        let predicted = timed.iter().min_by_key(|(_, rank, _)| *rank).filter(|_| timed.len() >= 3)?;
        let record = chosen.get(&key.target, &key.group)?;
        let Outcome::Chosen { times, .. } = &record.outcome else { return None };
        Some(Prediction {
            kernel: record.kernel.clone(),
            family: record.family.clone(),
            dtype: record.dtype.clone(),
            tokens: record.tokens,
            timed: timed.len(),
            correlation: spearman(
                &timed.iter().map(|(_, rank, ratio)| (*rank as f64, *ratio)).collect::<Vec<_>>(),
            ),
            regret: 1.0 / times.ratio() - 1.0,
            best: record.schedule.clone(),
            predicted: predicted.0.schedule.clone(),
        })
    };
    let mut rows: Vec<Prediction> = by_kernel.into_iter().filter_map(of).collect();
    rows.sort_by_key(|p| (p.dtype.clone(), p.tokens != 1, p.tokens, p.kernel.clone()));
    rows
}

/// Rank correlation of pairs; those that are equal share the middle of their ranks.
pub fn spearman(pairs: &[(f64, f64)]) -> f64 {
    let ranks = |of: &dyn Fn(&(f64, f64)) -> f64| -> Vec<f64> {
        let below = |x: f64| pairs.iter().filter(|p| of(p) < x).count() as f64;
        let equal = |x: f64| pairs.iter().filter(|p| of(p) == x).count() as f64;
        pairs.iter().map(|p| below(of(p)) + (equal(of(p)) - 1.0) / 2.0).collect()
    };
    let (a, b) = (ranks(&|p| p.0), ranks(&|p| p.1));
    let middle = (pairs.len() as f64 - 1.0) / 2.0;
    let product =
        |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| (x - middle) * (y - middle)).sum::<f64>();
    product(&a, &b) / (product(&a, &a) * product(&b, &b)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::spearman;

    #[test]
    fn ranks_correlate() {
        assert_eq!(spearman(&[(0.0, 1.0), (1.0, 5.0), (2.0, 50.0)]), 1.0);
        assert_eq!(spearman(&[(0.0, 9.0), (1.0, 5.0), (2.0, 1.0)]), -1.0);
        // By hand: ranks 0 1 2 3 against 1 0 2 3.
        assert!((spearman(&[(0.0, 2.0), (1.0, 1.0), (2.0, 3.0), (3.0, 4.0)]) - 0.8).abs() < 1e-12);
    }
}
