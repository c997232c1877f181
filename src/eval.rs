//! How well a model predicts, over any device's program: perplexity, divergence from another model, multiple choice.
//!
//! * A [`Window`] is tokens of which the last ones are scored, each by the logits of the position before it.
//!   [`Protocol::windows`] cuts a text into windows, [`Question::windows`] makes one a choice.
//! * [`score`] runs a window; logits are turned into probabilities in f64 on the host, a step at a time, and dropped.
//! * [`Estimate`] is a mean with its 95 % confidence interval, [`proportion`] a share with one.

use runtime::device::{DeviceError, Program, State, Step, Want, feed};
use serde::{Deserialize, Serialize};

/// Tokens of which those from `from` on are scored: `1 <= from && from < tokens.len()`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    tokens: Vec<i32>,
    from: usize,
}

impl Window {
    /// The tokens, run from position 0 on, are scored from `from` on, but for the very first, which nothing predicts.
    /// `None` if none is left to score.
    pub fn new(tokens: Vec<i32>, from: usize) -> Option<Window> {
        let from = from.max(1);
        (from < tokens.len()).then_some(Window { tokens, from })
    }

    /// Tokens that are scored.
    pub fn scored(&self) -> usize {
        self.tokens.len() - self.from
    }
}

/// How a text is cut into windows, each of which is run alone from position 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Protocol {
    /// Tokens of the text in a window.
    pub window: usize,
    /// Tokens of the text from the beginning of a window to that of the next.
    pub stride: usize,
    /// What stands in front of each window: what the tokenizer puts in front of texts, or nothing.
    pub in_front: Vec<i32>,
}

impl Protocol {
    /// Every whole window of a text; a text shorter than a window is one.
    ///
    /// A token is scored once, in the first window that has it; the first token of a window with nothing in front of it
    /// is not scored. So windows apart (`stride = window`) are scored from their second token on, and windows that
    /// overlap by their last `stride` tokens.
    pub fn windows(&self, tokens: &[i32]) -> Vec<Window> {
        let Protocol { window, stride, in_front } = self;
        let window = (*window).min(tokens.len());
        let begins = (0..).step_by(*stride).take_while(|begin| begin + window <= tokens.len());
        let cut = begins.map(|begin| {
            let seen = if begin == 0 { 0 } else { window.saturating_sub(*stride) };
            Window::new([in_front, &tokens[begin..begin + window]].concat(), in_front.len() + seen)
        });
        cut.flatten().collect()
    }
}

/// A program with what its cache holds: tokens that two windows begin with are run once.
pub struct Reader<'p> {
    program: &'p mut dyn Program,
    state: State,
    held: Vec<i32>,
}

impl<'p> Reader<'p> {
    /// Begins with an empty cache.
    ///
    /// # Errors
    ///
    /// [`DeviceError::OutOfMemory`] if the cache does not fit.
    pub fn new(program: &'p mut dyn Program) -> Result<Reader<'p>, DeviceError> {
        let state = program.state()?;
        Ok(Reader { program, state, held: Vec::new() })
    }

    /// Makes the cache hold these tokens and no others.
    fn hold(&mut self, tokens: &[i32]) -> Result<(), DeviceError> {
        let same = self.held.iter().zip(tokens).take_while(|(held, token)| held == token).count();
        self.held.truncate(same);
        self.state.truncate(same);
        if same < tokens.len() {
            feed(self.program, &tokens[same..], None, Want::Nothing, &mut self.state)?;
            self.held.extend(&tokens[same..]);
        }
        Ok(())
    }

    /// Logits of every position of a step.
    fn logits(&mut self, tokens: &[i32]) -> Result<Vec<f32>, DeviceError> {
        let step = Step { tokens, want: Want::AllLogits };
        let logits = self.program.run(&step, &mut self.state)?.logits;
        self.held.extend(tokens);
        Ok(logits)
    }

    /// Makes the cache hold what stands before the first position whose logits are wanted; gives the most tokens of a step
    /// from there on. What a step would find in the middle of the window is found here, before any work.
    fn begin(&mut self, window: &Window) -> Result<usize, DeviceError> {
        // The last token is scored and not run.
        let (tokens, context) = (window.tokens.len() - 1, self.program.context());
        if tokens > context {
            return Err(DeviceError::ContextFull { past: 0, tokens, context });
        }
        let vocab = self.program.vocab();
        if let Some(&token) = window.tokens.iter().find(|&&t| usize::try_from(t).map_or(true, |t| t >= vocab))
        {
            return Err(DeviceError::BadToken { token, vocab });
        }
        self.hold(&window.tokens[..window.from - 1])?;
        // A program without that entry point refuses the step.
        Ok(self.program.max_tokens(Want::AllLogits).max(1))
    }
}

/// How well the scored tokens of a window are predicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Score {
    /// Tokens that were scored.
    pub tokens: usize,
    /// Sum of `-ln p` over them, in nats.
    pub nll: f64,
    /// The model beside another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beside: Option<Beside>,
}

/// Sums over the scored tokens of a window, for a model with probabilities `p` and a base with `q`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Beside {
    /// Of the base's `-ln q`.
    pub base_nll: f64,
    /// Of `KL(q || p) = sum of q ln (q / p)` over the vocabulary: the nats lost by taking the model for the base.
    pub kld: f64,
    /// Of positions where both find the same token likeliest.
    pub same_top: usize,
}

/// Scores a window, if there is a `base` beside that. `done` hears after each step how many tokens it scored.
///
/// # Errors
///
/// As [`Program::run`]; a window that is too long and tokens that the model does not have are found before any work.
pub fn score(
    window: &Window,
    model: &mut Reader<'_>,
    mut base: Option<&mut Reader<'_>>,
    done: &mut dyn FnMut(usize),
) -> Result<Score, DeviceError> {
    let Window { tokens, from } = window;
    let mut most = model.begin(window)?;
    if let Some(base) = &mut base {
        most = most.min(base.begin(window)?);
    }
    let run = &tokens[from - 1..tokens.len() - 1];
    let vocab = model.program.vocab();
    let mut score = Score { beside: base.as_ref().map(|_| Beside::default()), ..Score::default() };
    for (inputs, targets) in run.chunks(most).zip(tokens[*from..].chunks(most)) {
        let logits = model.logits(inputs)?;
        let base_logits = base.as_mut().map(|base| base.logits(inputs)).transpose()?;
        for (at, &target) in targets.iter().enumerate() {
            let row = at * vocab..(at + 1) * vocab;
            let (target, model_row) = (target as usize, &logits[row.clone()]);
            let norm = log_sum_exp(model_row);
            score.nll += norm - f64::from(model_row[target]);
            if let (Some(base_logits), Some(beside)) = (&base_logits, &mut score.beside) {
                let base_row = &base_logits[row];
                let base_norm = log_sum_exp(base_row);
                beside.base_nll += base_norm - f64::from(base_row[target]);
                beside.kld += divergence((base_row, base_norm), (model_row, norm));
                beside.same_top += usize::from(top(base_row) == top(model_row));
            }
        }
        score.tokens += targets.len();
        done(targets.len());
    }
    Ok(score)
}

/// `ln sum of exp` of a row: what turns logits into log-probabilities.
fn log_sum_exp(row: &[f32]) -> f64 {
    let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = row.iter().map(|&x| (f64::from(x) - max).exp()).sum();
    max + sum.ln()
}

/// `KL(q || p)` of two rows of logits, each with its [`log_sum_exp`].
fn divergence((q, q_norm): (&[f32], f64), (p, p_norm): (&[f32], f64)) -> f64 {
    let term = |(&q, &p): (&f32, &f32)| {
        let (ln_q, ln_p) = (f64::from(q) - q_norm, f64::from(p) - p_norm);
        ln_q.exp() * (ln_q - ln_p)
    };
    q.iter().zip(p).map(term).sum()
}

/// The index of the largest value, the first of equals.
pub fn top<T: PartialOrd>(values: &[T]) -> usize {
    let best = |best: usize, at: usize| if values[at] > values[best] { at } else { best };
    (0..values.len()).fold(0, best)
}

/// A mean over tokens, with its confidence interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// Within this it lies with 95 % confidence; nothing can be said from one cluster alone.
    pub interval: Option<[f64; 2]>,
}

impl Estimate {
    /// The mean of sums over clusters, `sum of s / sum of n` for `(s, n)`.
    ///
    /// Tokens of one window are alike, so windows are the sample: the standard error is that of a ratio of two sums over
    /// clusters (Cochran 1977, *Sampling Techniques*, section 6.3), the quantile Student's with one degree of freedom less
    /// than there are clusters.
    pub fn of(clusters: &[(f64, usize)]) -> Estimate {
        let count = clusters.len() as f64;
        let tokens: f64 = clusters.iter().map(|c| c.1 as f64).sum();
        let mean = clusters.iter().map(|c| c.0).sum::<f64>() / tokens;
        let squares: f64 = clusters.iter().map(|c| (c.0 - mean * c.1 as f64).powi(2)).sum();
        let interval = (clusters.len() > 1).then(|| {
            let error = (squares * count / (count - 1.0)).sqrt() / tokens;
            let half = error * students_quantile(clusters.len() - 1);
            [mean - half, mean + half]
        });
        Estimate { mean, interval }
    }

    /// The same of a quantity that grows with this one, such as `exp` of it.
    pub fn map(self, f: impl Fn(f64) -> f64) -> Estimate {
        Estimate { mean: f(self.mean), interval: self.interval.map(|ends| ends.map(f)) }
    }
}

/// Student's t at 97.5 %: within as many standard errors on both sides lie 95 %.
fn students_quantile(degrees: usize) -> f64 {
    const TABLE: [f64; 10] = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228];
    let (z, v) = (NORMAL_QUANTILE, degrees as f64);
    match TABLE.get(degrees.saturating_sub(1)) {
        Some(&t) => t,
        // The first terms of the expansion in 1 / v (Abramowitz and Stegun 1964, 26.7.5): to three decimals from here on.
        None => {
            z + (z.powi(3) + z) / (4.0 * v) + (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / (96.0 * v * v)
        }
    }
}

/// Of the normal distribution at 97.5 %.
const NORMAL_QUANTILE: f64 = 1.959_963_984_540_054;

/// The share of `hits` in `of`, with Wilson's 95 % interval (1927), which stays within 0 and 1.
pub fn proportion(hits: usize, of: usize) -> Estimate {
    let (p, n, z) = (hits as f64 / of as f64, of as f64, NORMAL_QUANTILE);
    let middle = (p + z * z / (2.0 * n)) / (1.0 + z * z / n);
    let half = z / (1.0 + z * z / n) * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
    Estimate { mean: p, interval: Some([(middle - half).max(0.0), (middle + half).min(1.0)]) }
}

/// A question with its choices, as a line of JSON has it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Question {
    /// What stands before each choice.
    pub context: String,
    /// What may follow, each with the space that it begins with.
    pub choices: Vec<String>,
    /// Index of the right one.
    pub answer: usize,
}

/// A question that cannot be asked.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct QuestionError {
    /// Line, from 1 on.
    pub line: usize,
    /// What is wrong there.
    pub what: String,
}

/// Reads questions, one JSON object a line; empty lines are skipped and other keys are ignored.
///
/// # Errors
///
/// The first line that is no question.
pub fn questions(text: &str) -> Result<Vec<Question>, QuestionError> {
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    let question = |(line, text)| {
        let wrong = |what| QuestionError { line, what };
        let question: Question = serde_json::from_str(text).map_err(|e| {
            wrong(format!("{e}; expected {{\"context\": ..., \"choices\": [...], \"answer\": i}}"))
        })?;
        let Question { context, choices, answer } = &question;
        match choices.len() {
            _ if context.is_empty() => Err(wrong("the context is empty, expected a text".into())),
            0 | 1 => Err(wrong(format!("{} choices, expected two at least", choices.len()))),
            n if *answer >= n => Err(wrong(format!("answer {answer}, expected 0..{n}"))),
            _ if choices.iter().any(|c| c.trim().is_empty()) => Err(wrong("an empty choice".into())),
            _ => Ok(question),
        }
    };
    lines.map(question).collect()
}

/// What the likelihood of a choice is set against, so that short choices have no advantage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Normalise {
    /// The characters of the choice: `ln p / characters`.
    Characters,
    /// Its tokens: `ln p / tokens`.
    Tokens,
    /// Its likelihood after [`ANSWER`]: `ln p - ln p'`.
    Answer,
    /// Nothing: `ln p`.
    Nothing,
}

/// What stands before a choice that is seen without its question (Brown et al. 2020, section 2.4).
pub const ANSWER: &str = "Answer:";

impl Question {
    /// A window for each choice after `context`; `None` for one that has no token of its own. The tokens of both together
    /// are scored from where they part from those of the context alone: a token that spans both belongs to the choice.
    ///
    /// # Errors
    ///
    /// What `encode` says.
    pub fn windows<E>(
        &self,
        context: &str,
        encode: impl Fn(&str) -> Result<Vec<i32>, E>,
    ) -> Result<Vec<Option<Window>>, E> {
        let alone = encode(context)?;
        let window = |choice: &String| {
            let tokens = encode(&format!("{context}{choice}"))?;
            let same = alone.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
            let from = same.min(tokens.len().saturating_sub(1));
            Ok(Window::new(tokens, from))
        };
        self.choices.iter().map(window).collect()
    }

    /// The value by which choices are compared; the [`top`] one is picked.
    pub fn value(&self, choice: usize, by: Normalise, score: &Score, after_answer: Option<&Score>) -> f64 {
        let characters = self.choices[choice].trim().chars().count();
        match by {
            Normalise::Characters => -score.nll / characters as f64,
            Normalise::Tokens => -score.nll / score.tokens as f64,
            Normalise::Answer => after_answer.map_or(0.0, |after| after.nll) - score.nll,
            Normalise::Nothing => -score.nll,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(window: usize, stride: usize, in_front: &[i32], tokens: i32) -> Vec<(Vec<i32>, usize)> {
        let protocol = Protocol { window, stride, in_front: in_front.to_vec() };
        let windows = protocol.windows(&(0..tokens).collect::<Vec<_>>());
        windows.into_iter().map(|w| (w.tokens, w.from)).collect()
    }

    #[test]
    fn windows_apart_are_scored_from_their_second_token() {
        assert_eq!(cut(3, 3, &[], 8), [(vec![0, 1, 2], 1), (vec![3, 4, 5], 1)]);
        assert_eq!(cut(3, 3, &[9], 8), [(vec![9, 0, 1, 2], 1), (vec![9, 3, 4, 5], 1)]);
        assert_eq!(cut(9, 9, &[], 2), [(vec![0, 1], 1)]);
        assert_eq!(cut(9, 9, &[], 1), []);
    }

    #[test]
    fn windows_that_overlap_score_each_token_once() {
        let expected = [(vec![0, 1, 2, 3], 1), (vec![2, 3, 4, 5], 2), (vec![4, 5, 6, 7], 2)];
        assert_eq!(cut(4, 2, &[], 9), expected);
        let scored = |w: &(Vec<i32>, usize)| w.0[w.1..].to_vec();
        let scored: Vec<i32> = cut(4, 2, &[9], 9).iter().flat_map(scored).collect();
        assert_eq!(scored, [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn probabilities_by_hand() {
        // p = 1/4, 3/4 and q = 1/2, 1/2: KL(q || p) = ln(4 / 3) / 2.
        let (p, q) = ([0.0f32, 3f32.ln()], [7.0f32, 7.0]);
        let (p_norm, q_norm) = (log_sum_exp(&p), log_sum_exp(&q));
        assert!((p_norm - 4f64.ln()).abs() < 1e-7 && (q_norm - 7.0 - 2f64.ln()).abs() < 1e-12);
        let found = divergence((&q, q_norm), (&p, p_norm));
        assert!((found - (4.0f64 / 3.0).ln() / 2.0).abs() < 1e-7, "{found}");
        assert_eq!(divergence((&p, p_norm), (&p, p_norm)), 0.0);
        assert_eq!([top(&[1.0, 3.0, 3.0]), top(&[2.0, 1.0])], [1, 0]);
        // Logits that overflow exp.
        assert!((log_sum_exp(&[1000.0, 1000.0]) - 1000.0 - 2f64.ln()).abs() < 1e-9);
    }

    #[test]
    fn intervals_by_hand() {
        // Means 1, 2 and 3: deviation 1, standard error 1 / sqrt(3), Student's t with two degrees of freedom 4.303.
        let estimate = Estimate::of(&[(10.0, 10), (20.0, 10), (30.0, 10)]);
        let half = 4.303 / 3f64.sqrt();
        let [low, high] = estimate.interval.unwrap();
        assert!((estimate.mean - 2.0).abs() < 1e-12);
        assert!((low - 2.0 + half).abs() < 1e-9 && (high - 2.0 - half).abs() < 1e-9, "{low} {high}");
        assert_eq!(Estimate::of(&[(10.0, 10)]), Estimate { mean: 1.0, interval: None });
        // Published: t(15) = 2.131, t(30) = 2.042; Wilson's interval of 8 in 10 is 0.490 to 0.943.
        assert!((students_quantile(15) - 2.131).abs() < 1e-3 && (students_quantile(30) - 2.042).abs() < 1e-3);
        let [low, high] = proportion(8, 10).interval.unwrap();
        assert!((low - 0.490).abs() < 1e-3 && (high - 0.943).abs() < 1e-3, "{low} {high}");
        assert_eq!(proportion(3, 3).interval.unwrap()[1], 1.0);
    }

    #[test]
    fn bad_questions_name_their_line() {
        let good = r#"{"context": "a", "choices": [" b", " c"], "answer": 1, "id": 7}"#;
        assert_eq!(questions(&format!("{good}\n\n{good}\n")).unwrap().len(), 2);
        for bad in [
            "{",
            r#"{"context": "a", "choices": [" b", " c"]}"#,
            r#"{"context": "a", "choices": [" b", " c"], "answer": 2}"#,
            r#"{"context": "a", "choices": [" b"], "answer": 0}"#,
            r#"{"context": "a", "choices": [" b", " "], "answer": 0}"#,
            r#"{"context": "", "choices": [" b", " c"], "answer": 0}"#,
        ] {
            assert_eq!(questions(&format!("{good}\n{bad}")).unwrap_err().line, 2, "{bad}");
        }
    }

    #[test]
    fn a_choice_begins_where_its_tokens_part() {
        // A tokenizer that takes letters, and `ab` as one.
        let encode = |text: &str| -> Result<Vec<i32>, ()> {
            Ok(text.replace("ab", "Z").bytes().map(i32::from).collect())
        };
        let question = Question { context: "xa".into(), choices: vec!["c".into(), "b".into()], answer: 0 };
        let windows = question.windows("xa", encode).unwrap();
        let from: Vec<_> = windows.iter().map(|w| w.as_ref().map(|w| (w.from, w.scored()))).collect();
        assert_eq!(from, [Some((2, 1)), Some((1, 1))]);
        assert_eq!(question.windows("a", encode).unwrap()[1], None);
    }
}
