//! Measured values against their targets.

/// One line.
struct Line {
    what: String,
    measured: String,
    target: String,
    met: Option<bool>,
}

/// All lines, in the order measured.
#[derive(Default)]
pub(crate) struct Table(Vec<Line>);

/// What a value has to be.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    AtLeast(f64),
    AtMost(f64),
    /// Told for its own sake.
    None,
}

impl Table {
    /// Adds a value and says it at once.
    pub(crate) fn add(&mut self, what: impl Into<String>, value: f64, unit: &str, target: Target) {
        let (text, met) = match target {
            Target::AtLeast(least) => (format!("≥ {}", number(least)), Some(value >= least)),
            Target::AtMost(most) => (format!("≤ {}", number(most)), Some(value <= most)),
            Target::None => (String::new(), None),
        };
        let measured = format!("{} {unit}", number(value)).trim_end().to_owned();
        let line = Line { what: what.into(), measured, target: text, met };
        eprintln!("  {}: {} {}", line.what, line.measured, line.target);
        self.0.push(line);
    }

    /// The table as Markdown, ready for the document.
    pub(crate) fn render(&self) -> String {
        let mut out = "| what | measured | target | met |\n|---|---|---|---|\n".to_owned();
        for line in &self.0 {
            let met = match line.met {
                Some(true) => "yes",
                Some(false) => "**no**",
                None => "",
            };
            out.push_str(&format!("| {} | {} | {} | {met} |\n", line.what, line.measured, line.target));
        }
        out
    }
}

/// Three digits that count, thousands apart.
pub(crate) fn number(value: f64) -> String {
    if value.abs() >= 1000.0 {
        let digits = format!("{value:.0}");
        let mut out = String::new();
        for (place, digit) in digits.chars().enumerate() {
            if place > 0 && (digits.len() - place).is_multiple_of(3) {
                out.push(' ');
            }
            out.push(digit);
        }
        return out;
    }
    let text = match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    };
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}
