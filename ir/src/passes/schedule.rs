//! Gives each group its schedule.
//!
//! * Takes: a graph with layouts. Gives: the same with a schedule's text on each group whose family has a choice.
//! * Never: replaces a schedule that is there (pinned by hand, or measured).
//! * Cost: O(groups * legal space). Tests: `tests/ir/schedule/`.

use crate::families::{GroupView, LowerError, schedules};
use crate::graph::Graph;
use crate::target::Target;

/// Gives groups the schedules that were found for them, and whether by measuring, before [`schedule`] chooses for the others.
pub fn pin(graph: &mut Graph, found: &dyn Fn(&GroupView<'_>) -> Option<(String, bool)>) {
    let found: Vec<_> = GroupView::all(graph).iter().map(|view| (view.id, found(view))).collect();
    for (id, found) in found {
        let group = &mut graph.groups[id.0 as usize];
        if let (Some((text, measured)), None) = (found, &group.schedule) {
            (group.schedule, group.measured) = (Some(text), measured);
        }
    }
}

/// Chooses a schedule for each group that has none, by the cost model.
///
/// # Errors
///
/// When no family covers a group.
pub fn schedule(graph: &mut Graph, target: &Target) -> Result<(), LowerError> {
    let mut chosen = Vec::new();
    for view in GroupView::all(graph) {
        let group = &graph.groups[view.id.0 as usize];
        if group.schedule.is_none() {
            let text = schedules(&view, target)?.swap_remove(0);
            chosen.push((view.id, (!text.is_empty()).then_some(text)));
        }
    }
    for (id, text) in chosen {
        graph.groups[id.0 as usize].schedule = text;
    }
    Ok(())
}
