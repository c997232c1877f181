//! `y[i] = f(x[i], ...)`: independent elements; rows picked by index (`gather`) are a case of it.
//!
//! Rows are split over the workers, on a GPU over warps; a row is done in vectors where every access is one.

use super::access::{Lowering, Piece, Scope, pieces, stored_value};
use super::{LowerError, Lowered};
use crate::graph::ValueId;
use crate::kernel::Expr;

/// The kernel of an element-wise or gather group.
///
/// # Errors
///
/// Where an index is not affine or an op has no element-wise meaning.
pub fn lower(mut l: Lowering<'_, '_>) -> Result<Lowered, LowerError> {
    let view = l.view;
    // Roots that are cut alike share their loops.
    let mut cuts: Vec<(Vec<Piece>, Vec<ValueId>)> = Vec::new();
    for &root in &view.roots {
        let source = stored_value(view, root);
        let cut = pieces(view, source, &|_| false)
            .ok_or_else(|| view.unsupported("an index that is not affine"))?;
        match cuts.iter_mut().find(|c| c.0 == cut) {
            Some((_, roots)) => roots.push(root),
            None => cuts.push((cut, vec![root])),
        }
    }
    for (pieces, roots) in cuts {
        for piece in pieces {
            l.vector_or_scalar(&|l, lanes| {
                let mut result = Ok(());
                let rows = match view.graph[stored_value(view, roots[0])].ty.shape.first() {
                    Some(&rows) => piece.extent[0].map_or(Expr::from(rows), Expr::from),
                    None => Expr::Int(1),
                };
                l.each_row(rows, |l, t| {
                    result = element(l, &piece, &roots, vec![t], lanes);
                });
                result
            })?;
        }
    }
    Ok(l.finish())
}

/// Opens the loops that are left, outermost first, and computes an element of each root in the innermost.
fn element(
    l: &mut Lowering<'_, '_>,
    piece: &Piece,
    roots: &[ValueId],
    opened: Vec<Expr>,
    lanes: u16,
) -> Result<(), LowerError> {
    let rank = piece.extent.len();
    if opened.len() + 1 < rank {
        let extent =
            piece.extent[opened.len()].ok_or_else(|| l.view.unsupported("a symbolic inner extent"))?;
        let mut result = Ok(());
        l.looped("i", extent.into(), |l, i| {
            let opened = opened.iter().cloned().chain([i]).collect();
            result = element(l, piece, roots, opened, lanes);
        });
        return result;
    }
    let mut vars = super::access::Vars::default();
    let outer = opened.iter().zip(piece.extent.iter().zip(&piece.start));
    let index: Vec<_> = outer
        .map(|(i, (&extent, &start))| vars.add(i.clone(), extent).offset(crate::Dim::of(start)))
        .collect();
    if rank < 2 {
        let mut result = Ok(());
        l.once(|l| result = store(l, &mut Scope::new(vars), roots, &index));
        return result;
    }
    let extent = piece.extent[rank - 1].ok_or_else(|| l.view.unsupported("a symbolic last extent"))?;
    l.along(&vars, extent, lanes, &mut |l, vars, last| {
        let mut index = index.clone();
        index.push(last.offset(crate::Dim::of(piece.start[rank - 1])));
        store(l, &mut Scope::new(vars), roots, &index)
    })
}

fn store(
    l: &mut Lowering<'_, '_>,
    scope: &mut Scope,
    roots: &[ValueId],
    index: &[super::access::Affine],
) -> Result<(), LowerError> {
    for &root in roots {
        let index = &index[..l.view.graph[stored_value(l.view, root)].ty.shape.len()];
        let value = l.value_at(scope, stored_value(l.view, root), index, &|_, _| None)?;
        l.store_at(scope, root, index, value, &|_, _| None)?;
    }
    Ok(())
}
