//! What a GPU gave for every form, in a file that stays.

use super::{Expected, Form, Wrong, judge};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Results of a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recording {
    /// The device, with its compute capability.
    pub device: String,
    /// The version of CUDA that its driver has; empty on the emulator.
    pub driver: String,
    /// The day, as 2026-01-31, in UTC.
    pub date: String,
    /// By the form's name.
    pub forms: BTreeMap<String, Recorded>,
}

/// Results of a form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// Of kernel and operands, so that results of others are not taken for this form's.
    digest: String,
    /// All results in hexadecimal; none where each is the only one that is right, bit for bit.
    results: Option<String>,
}

/// Why recorded results are none of a form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// It was not recorded.
    #[error("{form}: not recorded; `llamac check --conformance --device cuda:0 --record FILE` does so")]
    Missing {
        /// The form.
        form: String,
    },
    /// The form was another when it was recorded.
    #[error("{form}: recorded of kernel and operands {found}, now they are {expected}; record it again")]
    Other {
        /// The form.
        form: String,
        /// Digest in the file.
        found: String,
        /// Digest of the form.
        expected: String,
    },
    /// The results are no hexadecimal numbers, or not as many as the form gives.
    #[error("{form}: the file is damaged: {found} results, expected {expected}")]
    Damaged {
        /// The form.
        form: String,
        /// Results in the file.
        found: usize,
        /// Results of the form.
        expected: usize,
    },
}

impl Recorded {
    /// Keeps the results of a form.
    pub fn new(form: &Form, results: &[u64]) -> Recorded {
        let only = |(&found, &expected): (&u64, &Expected)| expected == Expected::Bits(found);
        let kept = !results.iter().zip(&form.expected).all(only) || results.len() != form.expected.len();
        let (numbers, widths) = (results.iter(), widths(form));
        let hex = numbers.zip(widths.iter().cycle()).map(|(result, digits)| format!("{result:0digits$x}"));
        Recorded { digest: digest(form), results: kept.then(|| hex.collect()) }
    }

    /// The results, if they are the form's.
    fn results(&self, form: &Form) -> Result<Vec<u64>, RecordError> {
        let (name, expected) = (form.name.clone(), digest(form));
        if self.digest != expected {
            return Err(RecordError::Other { form: name, found: self.digest.clone(), expected });
        }
        let damaged =
            |found| RecordError::Damaged { form: name.clone(), found, expected: form.expected.len() };
        let Some(hex) = &self.results else {
            let only = |expected: &Expected| match expected {
                Expected::Bits(bits) => Ok(*bits),
                Expected::Within(..) | Expected::Nan(_) => Err(damaged(0)),
            };
            return form.expected.iter().map(only).collect();
        };
        let (mut rest, mut results) = (hex.as_str(), Vec::new());
        for &digits in widths(form).iter().cycle().take(form.expected.len()) {
            let Some((number, after)) = rest.split_at_checked(digits) else { break };
            let Ok(number) = u64::from_str_radix(number, 16) else { break };
            results.push(number);
            rest = after;
        }
        if results.len() != form.expected.len() || !rest.is_empty() {
            return Err(damaged(results.len()));
        }
        Ok(results)
    }
}

impl Recording {
    /// The results of a form.
    ///
    /// # Errors
    ///
    /// [`RecordError`].
    pub fn results(&self, form: &Form) -> Result<Vec<u64>, RecordError> {
        let recorded = self.forms.get(&form.name);
        recorded.ok_or_else(|| RecordError::Missing { form: form.name.clone() })?.results(form)
    }

    /// The recorded results that the oracle does not allow.
    ///
    /// # Errors
    ///
    /// As [`Recording::results`].
    pub fn judge(&self, form: &Form) -> Result<Vec<Wrong>, RecordError> {
        Ok(judge(form, &self.results(form)?))
    }
}

/// Hexadecimal digits of a thread's results.
fn widths(form: &Form) -> Vec<usize> {
    let digits = |ty: &crate::ptx::Type| match Form::parts(*ty) {
        2 => vec![4, 4],
        _ => vec![ty.bits() as usize / 4],
    };
    form.gives.iter().flat_map(digits).collect()
}

fn digest(form: &Form) -> String {
    let mut hash = blake3::Hasher::new();
    hash.update(form.ptx().as_bytes());
    form.operands.iter().for_each(|operand| {
        hash.update(&operand.to_le_bytes());
    });
    hash.finalize().to_hex()[..16].to_string()
}
