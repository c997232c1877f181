//! Any text as graphs, kernels and a plan: what verifies comes back from its own text.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(graphs) = ir::parse::graphs(text) {
        for graph in graphs.iter().filter(|graph| ir::verify::verify(graph).is_ok()) {
            let printed = graph.to_string();
            assert_eq!(ir::parse::graph(&printed).expect("its own text").to_string(), printed);
        }
    }
    if let Ok(kernels) = ir::kernel::parse::parse(text) {
        for kernel in kernels.iter().filter(|kernel| ir::kernel::verify::verify(kernel).is_ok()) {
            let printed = kernel.to_string();
            assert_eq!(ir::kernel::parse::parse(&printed).expect("its own text")[0].to_string(), printed);
        }
    }
    if let Ok(plan) = ir::plan::parse::parse(text)
        && ir::plan::verify::verify(&plan).is_ok()
    {
        assert_eq!(ir::plan::parse::parse(&plan.to_string()).as_ref(), Ok(&plan));
    }
});
