//! Schedules as data: named numbers with a text form, `mr 6, nr 4, prefetch 0`.
//!
//! A family declares its fields once, as a list of [`Field`]s; printing, parsing, the numeric class and the tuner's
//! space read that list.

/// One choice of a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Name in text.
    pub name: &'static str,
    /// What was chosen.
    pub value: usize,
    /// Does it change the order of a sum, and so the bits?
    pub numeric: bool,
}

/// The text of a schedule.
pub fn print(fields: &[Field]) -> String {
    let parts: Vec<String> = fields.iter().map(|f| format!("{} {}", f.name, f.value)).collect();
    parts.join(", ")
}

/// The part of a schedule that decides the bits of the result.
pub fn numeric_class(fields: &[Field]) -> String {
    print(&fields.iter().copied().filter(|f| f.numeric).collect::<Vec<_>>())
}

/// Reads values for `fields` from text; each must be there once.
///
/// # Errors
///
/// What does not fit, in words.
pub fn parse(text: &str, fields: &mut [Field]) -> Result<(), String> {
    let mut seen = vec![false; fields.len()];
    for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let (name, value) =
            part.split_once(' ').ok_or_else(|| format!("`{part}` is not a name and a number"))?;
        let at = fields
            .iter()
            .position(|f| f.name == name)
            .ok_or_else(|| format!("there is no field `{name}`"))?;
        if std::mem::replace(&mut seen[at], true) {
            return Err(format!("`{name}` stands there twice"));
        }
        fields[at].value = value.trim().parse().map_err(|_| format!("`{value}` is no number"))?;
    }
    match seen.iter().position(|s| !s) {
        Some(missing) => Err(format!("`{}` is missing", fields[missing].name)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips() {
        let field = |name, value, numeric| Field { name, value, numeric };
        let fields = [field("mr", 6, false), field("keys", 64, true)];
        assert_eq!(print(&fields), "mr 6, keys 64");
        assert_eq!(numeric_class(&fields), "keys 64");
        let mut read = [field("mr", 0, false), field("keys", 0, true)];
        assert_eq!(parse("keys 64, mr 6", &mut read), Ok(()));
        assert_eq!(read, fields);
        assert_eq!(parse("mr 6", &mut read), Err("`keys` is missing".to_string()));
        assert!(parse("mr x, keys 1", &mut read).is_err());
    }
}
