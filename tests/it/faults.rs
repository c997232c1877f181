//! The judge is judged: faults planted one at a time, each of which must be caught, and named where it is.
//!
//! * [`kernels`]: in the kernels of a few cases, run in the kernel interpreter; a sample of them as native code.
//! * [`weights`]: in a model's weights, and in how they are packed.
//! * [`plans`]: in which kernels run in which order on which bytes.
//! * [`model`]: the small model that weights and plans are of.
//!
//! Each file has its kinds of faults as one list, with the places that each has; the lists grow with each real bug. What
//! changes no bit of a result is no fault there and is not counted.

mod kernels;
mod model;
mod plans;
mod weights;

use libtest_mimic::Trial;

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("faults in kernels", || Ok(kernels::kernels()?)),
        Trial::test("faults in weights", || Ok(weights::weights()?)),
        Trial::test("faults in plans", || Ok(plans::plans()?)),
    ]
}
