//! The machine code of a GPU's kernels (SASS), read from what `nvdisasm -c` writes.
//!
//! * [`flow`]: basic blocks, loops, and the steady loop of a kernel of tensor cores.
//! * [`units`]: what an instruction occupies of an SM.
//! * [`rules`]: what must, and must not, stand in a steady loop.
//!
//! NVIDIA documents the names of the instructions (*CUDA Binary Utilities*, "Instruction Set Reference"), and nothing else of
//! them. Read is what control flow and counting ask: guard, name, operands as they stand, and where a branch may go.

pub mod flow;
pub mod rules;
pub mod units;

use std::collections::BTreeMap;
use std::fmt;

/// The code of one kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Code {
    /// Its name, as in PTX.
    pub symbol: String,
    /// Instructions in the order of their addresses.
    pub instructions: Vec<Instruction>,
}

/// One instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// The predicate under which it runs, such as `!P0`.
    pub guard: Option<String>,
    /// Its name with all that follows after dots, such as `HMMA.16816.F32.BF16`.
    pub opcode: String,
    /// The operands' text.
    pub operands: String,
    /// Labels among the operands, by the instruction behind them.
    pub targets: Vec<usize>,
}

/// Text that is no machine code as it is known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "line {line} of machine code: found `{found}`, expected {expected}: llamac was tried with nvdisasm 13.5"
)]
pub struct SassError {
    /// Counted from 1.
    pub line: usize,
    /// What stands there.
    pub found: String,
    /// What was to stand there.
    pub expected: &'static str,
}

impl Instruction {
    /// The name alone: `HMMA`.
    pub fn name(&self) -> &str {
        self.modifiers().next().unwrap_or_default()
    }

    /// Is this among the parts of the name, such as `EX2` in `MUFU.EX2`?
    pub fn has(&self, modifier: &str) -> bool {
        self.modifiers().skip(1).any(|found| found == modifier)
    }

    /// The name, then what stands behind its dots.
    pub fn modifiers(&self) -> impl Iterator<Item = &str> {
        self.opcode.split('.')
    }

    /// Operands without blanks around them.
    pub fn operands(&self) -> impl Iterator<Item = &str> {
        self.operands.split(',').map(str::trim)
    }
}

impl fmt::Display for Instruction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(guard) = &self.guard {
            write!(f, "@{guard} ")?;
        }
        write!(f, "{} {}", self.opcode, self.operands)
    }
}

/// Reads the kernels of a module, in the order of the text.
///
/// # Errors
///
/// A line that is neither directive, label nor instruction, or a branch to nowhere.
pub fn parse(text: &str) -> Result<Vec<Code>, SassError> {
    let mut codes: Vec<Code> = Vec::new();
    let mut labels: BTreeMap<&str, usize> = BTreeMap::new();
    // Labels of the kernel that is being read, each with its line.
    let mut named: Vec<(usize, usize, &str)> = Vec::new();
    for (number, whole) in text.lines().enumerate() {
        let error = |expected| SassError { line: number + 1, found: whole.trim().to_string(), expected };
        let line = whole.trim();
        if let Some(section) = line.strip_prefix(".section") {
            link(codes.last_mut(), &labels, &named)?;
            (labels, named) = (BTreeMap::new(), Vec::new());
            let name = section.trim_start().strip_prefix(".text.").and_then(|rest| rest.split(',').next());
            let code = |name: &str| Code { symbol: name.to_string(), instructions: Vec::new() };
            codes.extend(name.map(code));
        } else if let Some(rest) = line.strip_prefix("/*") {
            let code = codes.last_mut().ok_or_else(|| error("a section before the first instruction"))?;
            let instruction = rest.split_once("*/").and_then(|(_, text)| text.trim().strip_suffix(';'));
            let (instruction, found) =
                instruction.and_then(read).ok_or_else(|| error("an instruction that ends with `;`"))?;
            let at = code.instructions.len();
            named.extend(found.map(|label| (number + 1, at, label)));
            code.instructions.push(instruction);
        } else if let (Some(label), Some(code)) = (line.strip_suffix(':'), codes.last()) {
            labels.insert(label, code.instructions.len());
        } else if !(line.is_empty() || line.starts_with('.') || line.starts_with("//")) {
            return Err(error("a directive, a label or an instruction"));
        }
    }
    link(codes.last_mut(), &labels, &named)?;
    Ok(codes)
}

/// An instruction, and the labels among its operands: `` `(.L_x_1) ``.
fn read(text: &str) -> Option<(Instruction, impl Iterator<Item = &str>)> {
    let text = text.trim();
    let (guard, text) = match text.strip_prefix('@') {
        Some(guarded) => {
            guarded.split_once(' ').map(|(guard, text)| (Some(guard.to_string()), text.trim()))?
        }
        None => (None, text),
    };
    let (opcode, operands) = text.split_once(' ').unwrap_or((text, ""));
    let named = opcode.starts_with(|c: char| c.is_ascii_uppercase());
    let labels = operands.split("`(").skip(1).filter_map(|rest| rest.split(')').next());
    let (opcode, operands) = (opcode.to_string(), operands.trim().to_string());
    named.then_some((Instruction { guard, opcode, operands, targets: Vec::new() }, labels))
}

/// Sets where the branches of a kernel go. A label that it lacks is a function's, which returns, or a fault.
fn link(
    code: Option<&mut Code>,
    labels: &BTreeMap<&str, usize>,
    named: &[(usize, usize, &str)],
) -> Result<(), SassError> {
    let Some(code) = code else { return Ok(()) };
    for &(line, at, label) in named {
        let instruction = &mut code.instructions[at];
        match labels.get(label) {
            Some(&target) => instruction.targets.push(target),
            None if instruction.name() == "BRA" => {
                return Err(SassError { line, found: label.to_string(), expected: "a label of this kernel" });
            }
            None => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::flow::Flow;
    use super::rules::{Breach, hides_exponentials, specialised};
    use super::*;

    /// A small kernel in the form of a warp-specialised attention: a producer, a masked and an unmasked loop of consumers, each
    /// with a wait that is repeated outside of it, and a sleep that is seldom taken.
    const SPECIALISED: &str = include_str!("../tests/sass/specialised.sass");

    fn read_one(text: &str) -> Code {
        parse(text).unwrap().swap_remove(0)
    }

    #[test]
    fn instructions_are_taken_apart() {
        let code = read_one(SPECIALISED);
        assert_eq!((&*code.symbol, code.instructions.len()), ("k_a", 47));
        let branch = &code.instructions[2];
        assert_eq!((branch.to_string().as_str(), &*branch.targets), ("@!P0 BRA `(.L_x_2)", &[13][..]));
        let product = code.instructions.iter().find(|i| i.name() == "HGMMA").unwrap();
        assert!(product.has("BF16") && !product.has("HGMMA"));
        assert_eq!(product.operands().collect::<Vec<_>>(), ["R24", "gdesc[UR16]", "RZ", "!UPT", "gsb0"]);
    }

    #[test]
    fn other_text_is_refused() {
        let error = |text: &str| parse(text).unwrap_err().to_string();
        assert!(
            error("/*0000*/ NOP ;")
                .contains("line 1 of machine code: found `/*0000*/ NOP ;`, expected a section")
        );
        let section = "\t.section\t.text.k,\"ax\",@progbits\n";
        assert!(error(&format!("{section}/*0000*/ NOP")).contains("line 2"));
        assert!(
            error(&format!("{section}NOP ;")).contains("expected a directive, a label or an instruction")
        );
        assert!(
            error(&format!("{section}/*0000*/ BRA `(.L_x_7) ;")).contains("found `.L_x_7`, expected a label")
        );
        // Functions are called by names that the kernel need not have.
        assert!(parse(&format!("{section}/*0000*/ CALL.REL.NOINC `($div) ;")).is_ok());
    }

    #[test]
    fn the_steady_loop_is_the_unmasked_one_without_its_wait() {
        let code = read_one(SPECIALISED);
        let trip = Flow::of(&code).steady().unwrap();
        assert!(trip.iter().all(|i| i.name() != "FSEL"), "the masked loop was taken");
        let count = |name: &str| trip.iter().filter(|i| i.name() == name).count();
        assert_eq!((trip.len(), count("HGMMA"), count("SYNCS"), count("NANOSLEEP")), (12, 2, 1, 1));
        let producer = Flow::of(&code).producer().unwrap();
        assert_eq!(producer.iter().filter(|i| i.name() == "UTMALDG").count(), 1);
        // With less in it for the same work, the masked loop is taken.
        let sleep = "NANOSLEEP RZ ;\n";
        let longer = SPECIALISED.replace(sleep, &format!("{sleep}{}", "/*0000*/ NOP ;\n".repeat(3)));
        assert!(Flow::of(&read_one(&longer)).steady().unwrap().iter().any(|i| i.name() == "FSEL"));
    }

    #[test]
    fn kernels_without_such_a_loop_have_none() {
        let straight =
            "\t.section\t.text.k,\"ax\"\n/*0000*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;\n/*0010*/ EXIT ;\n";
        let code = read_one(straight);
        assert!(Flow::of(&code).steady().is_none() && Flow::of(&code).producer().is_none());
        assert!(Flow::of(&read_one("\t.section\t.text.k,\"ax\"\n")).steady().is_none());
        let endless = ".L_x_0:\n/*0000*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;\n/*0010*/ BRA `(.L_x_0) ;\n";
        let code = read_one(&format!("\t.section\t.text.k,\"ax\"\n{endless}"));
        assert_eq!(Flow::of(&code).steady().unwrap().len(), 2);
    }

    /// Each rule holds of the kernel, and is broken by a fault.
    #[test]
    fn rules_are_broken_by_faults() {
        let check = |text: &str| {
            let code = read_one(text);
            specialised(&code)?;
            hides_exponentials(&Flow::of(&code).steady().expect("it was found"))
        };
        assert_eq!(check(SPECIALISED), Ok(()));
        let faulty = |from: &str, to: &str| {
            assert!(SPECIALISED.contains(from), "{from}");
            check(&SPECIALISED.replace(from, to))
        };
        assert!(
            matches!(faulty("FADD R40, R40, R30", "LDS R40, [R30]"), Err(Breach::Has { found }) if found == "LDS R40, [R30]")
        );
        assert!(matches!(
            faulty("FADD R40, R40, R30", "IMAD.MOV.U32 R40, RZ, RZ, R88"),
            Err(Breach::Moves { .. })
        ));
        assert!(matches!(faulty("gsb0, 0x1", "gsb0, 0x0"), Err(Breach::Exposed { .. })));
        assert!(matches!(faulty("UTMALDG.3D", "UTMASTG.3D"), Err(Breach::NoLoop { .. })));
        assert!(matches!(faulty("HGMMA", "IGMMA"), Err(Breach::Lacks { name: "HGMMA" })));
        assert!(matches!(faulty("HGMMA", "FGMMA").unwrap_err(), Breach::NoLoop { .. }));
    }
}
