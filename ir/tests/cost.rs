//! The plan's counts against what kernels do: the interpreter counts bytes loaded and operations.

use ir::cost::cost;
use ir::families::{Arg, GroupView, lower};
use ir::kernel::interp::{KBuffer, Options, Stats, run};
use ir::target::Target;
use ir::{Graph, parse, verify};

/// Rows of the step, and tokens in the cache before it.
const ROWS: i64 = 200;
const PAST: i64 = 70;

/// Attention of one head and one row a turn, so that nothing is loaded twice for several rows.
fn attention(causal: bool) -> Graph {
    let text = format!(
        "graph @g(T in 1..{ROWS}) {{
            %pos = input \"positions\" : i32[T]
            %q = input \"q\" : f32[T, 1, 16]
            %k = state \"k\" : f32[1, 512, 16] @ key_panels(1)
            %v = state \"v\" : f32[1, 512, 16] @ value_panels(1)
            group @a : attention, schedule \"mr 1, nr 1, keys 64\" {{
                %a = attention %q, %k, %v, %pos {{ causal = {causal}, scale = 0.25 }} : f32[T, 1, 16]
            }}
            output \"a\" = %a : f32[T, 1, 16]
        }}"
    );
    let graph = parse::graph(&text).unwrap();
    verify::verify(&graph).unwrap();
    graph
}

/// What the kernel of the graph's only group does for the largest step; and how many bytes of K and V it loads.
fn counted(graph: &Graph) -> (Stats, u64) {
    let target = Target::cpu("cpu:x86-64-v4", 32, 64);
    let view = &GroupView::all(graph)[0];
    let lowered = lower(view, &target).unwrap();
    let symbols = [ROWS, 0, 0, 0];
    let mut params: Vec<KBuffer> = lowered
        .kernel
        .params()
        .map(|(_, buffer)| {
            let elems: i64 = buffer.shape.iter().map(|dim| dim.eval(&symbols)).product();
            // Positions count from PAST; every number is small.
            let data: Vec<f64> = (0..elems).map(|i| (PAST + i) as f64 * 1.0).collect();
            KBuffer::from_data(buffer, &symbols, &data)
        })
        .collect();
    let stats = run(&lowered.kernel, &symbols, &mut params, Options { max_steps: u64::MAX }).unwrap();
    let caches = lowered.args.iter().enumerate().filter(|(_, arg)| match arg {
        Arg::Value(id) => matches!(graph[*id].name.as_str(), "k" | "v"),
        Arg::Pack(_) | Arg::Workspace { .. } => false,
    });
    let bytes = caches.map(|(number, _)| stats.load_bytes[number]).sum();
    (stats, bytes)
}

/// Tiles of 64 keys from the first on that a row at this position sees.
fn tiles(position: i64) -> u64 {
    position as u64 / 64 + 1
}

#[test]
fn masked_tiles_are_neither_counted_nor_loaded() {
    // K and V of a tile, and two products of 64 keys.
    let (tile_bytes, tile_flops) = (2 * 64 * 16 * 4, 4 * 64 * 16);
    let seen = |causal: bool| {
        let last = PAST + ROWS - 1;
        (PAST..=last).map(|position| tiles(if causal { position } else { last })).sum::<u64>()
    };
    let mut work = Vec::new();
    for causal in [true, false] {
        let graph = attention(causal);
        let (stats, loaded) = counted(&graph);
        let planned = cost(&GroupView::all(&graph)[0], &[ROWS, 0, 0, 0], PAST);
        // What is loaded and computed is whole tiles up to the last that a row sees, and that is what is planned.
        assert_eq!(loaded, seen(causal) * tile_bytes);
        assert_eq!(planned.flops, seen(causal) * tile_flops);
        assert!(stats.flops >= planned.flops, "softmax comes to the products");
        // From memory each tile comes once, and none beyond the last position; q, positions and the result besides.
        let others = (2 * ROWS * 16 * 4 + ROWS * 4) as u64;
        assert_eq!(planned.bytes, tiles(PAST + ROWS - 1) * tile_bytes + others);
        work.push((planned.flops, stats.flops));
    }
    let [(causal, causal_done), (whole, whole_done)] = work[..] else { unreachable!("two were pushed") };
    assert!(causal < whole && causal_done < whole_done);
}
