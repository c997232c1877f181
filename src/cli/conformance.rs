//! `check --conformance`: instructions one by one, on the PTX emulator or on a GPU, by what the PTX ISA says of them.

use super::device::DeviceOptions;
use super::error::CliError;
use super::screen::{Screen, grouped, print, print_json};
use clap::Args;
use clap::builder::ArgPredicate;
use models::date::date;
use runtime::conformance::record::{Recorded, Recording};
use runtime::conformance::{Form, Machine, forms, judge};
use runtime::cuda::Cuda;
use runtime::emulator::{Options as Emulated, Sm, Sums};
use runtime::whole_file;
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Wrong results that are shown; all are counted.
const SHOWN: usize = 10;

/// Options of `check` that need no compiler.
#[derive(Args)]
pub struct FormOptions {
    /// cpu: every level that this machine runs; one of them, as cpu:x86-64-v3; ptx-emulator (GPU kernels); interpreter; null.
    /// With --conformance ptx-emulator or cuda[:N]
    #[arg(
        long,
        default_value = "cpu",
        default_value_if("conformance", ArgPredicate::Equals("true".into()), "ptx-emulator"),
        value_name = "DEVICE"
    )]
    pub device: String,
    /// Only cases whose name has this in it
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub filter: String,
    /// Instructions in place of kernels: each form of one alone, judged by what the PTX ISA says
    #[arg(long)]
    pub conformance: bool,
    /// Write what the device gave, with its name, its driver and the day: tests hold the emulator against such a file
    #[arg(long, value_name = "FILE", requires = "conformance")]
    pub record: Option<PathBuf>,
}

/// What is written of the device.
struct Named {
    machine: Machine,
    device: String,
    driver: String,
}

fn named(options: &FormOptions) -> Result<Named, CliError> {
    let device = DeviceOptions { threads: None, device: options.device.clone() };
    if let Some(number) = device.cuda() {
        let cuda = Cuda::new(number)?;
        let (device, driver) = (cuda.gpu().to_string(), cuda.version().to_string());
        return Ok(Named { machine: Machine::Gpu(cuda.context()?), device, driver });
    }
    let known = "with --conformance: ptx-emulator, ptx-emulator:SM, cuda, cuda:N";
    let sm = device.emulated().ok_or_else(|| CliError::NoDevice { name: options.device.clone(), known })?;
    Ok(Named { machine: emulator(sm), device: format!("ptx-emulator:{}", sm.name()), driver: String::new() })
}

fn emulator(sm: Sm) -> Machine {
    Machine::Emulator(Emulated { sm, seed: 0, sums: Sums::default() })
}

/// Runs every form, judges it, and records what came out.
pub fn conformance(options: &FormOptions, screen: &Screen) -> Result<(), CliError> {
    let Named { machine, device, driver } = named(options)?;
    let fits = |form: &Form| machine.takes(form) && form.name.contains(&options.filter);
    let forms: Vec<Form> = forms().into_iter().filter(fits).collect();
    if forms.is_empty() {
        return Err(CliError::Usage(format!("no form has `{}` in its name", options.filter)));
    }
    let (mut wrong, mut wrong_forms, mut results, mut alike) = (Vec::new(), 0, 0, 0);
    let mut recorded = BTreeMap::new();
    for form in &forms {
        let found = match machine.run(form) {
            Ok(found) => found,
            Err(error) => {
                wrong.push(error.to_string());
                wrong_forms += 1;
                continue;
            }
        };
        let judged = judge(form, &found);
        wrong_forms += usize::from(!judged.is_empty());
        wrong.extend(judged.iter().map(ToString::to_string));
        results += found.len();
        // What the ISA leaves open, the emulator may do in another way: how often is worth knowing.
        let emulated = emulator(form.sm).run(form).unwrap_or_default();
        alike += emulated.iter().zip(&found).filter(|(emulated, found)| emulated == found).count();
        recorded.insert(form.name.clone(), Recorded::new(form, &found));
    }
    let recording = Recording { device, driver, date: date(SystemTime::now()), forms: recorded };
    if let Some(file) = &options.record {
        write(file, &recording)?;
        screen.note(format!("{}: recorded", file.display()));
    }
    if screen.json {
        print_json(&json!({
            "verdict": if wrong.is_empty() { "pass" } else { "fail" }, "device": recording.device,
            "forms": forms.len(), "wrong_forms": wrong_forms, "results": results, "wrong": wrong,
            "as_emulated": alike,
        }))?;
    } else {
        let mut text: String = wrong.iter().take(SHOWN).map(|wrong| format!("wrong: {wrong}\n")).collect();
        text += &format!(
            "{}: {} forms, {} results, {} wrong in {wrong_forms} forms; {} bit for bit as the emulator has them\n",
            recording.device,
            forms.len(),
            grouped(results as u64),
            grouped(wrong.len() as u64),
            grouped(alike as u64)
        );
        print(&text)?;
    }
    match wrong_forms {
        0 => Ok(()),
        wrong => Err(CliError::NonConforming { wrong }),
    }
}

fn write(file: &Path, recording: &Recording) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(recording).expect("a recording is plain data") + "\n";
    Ok(whole_file::write(file, text.len() as u64, |path| fs::write(path, text))?)
}
