//! One table as text, Markdown and HTML.

use std::fmt::Write;

use super::clean;
use super::svg::escape;

/// What stands in a cell without a value.
pub(super) const NONE: &str = "-";

/// A column.
pub(super) struct Column {
    head: &'static str,
    right: bool,
    /// The text form may cut it down to this many characters, where the line is too long.
    shrink: Option<usize>,
}

impl Column {
    /// Text, aligned to the left.
    pub fn left(head: &'static str) -> Self {
        Self { head, right: false, shrink: None }
    }

    /// Numbers, aligned to the right.
    pub fn right(head: &'static str) -> Self {
        Self { head, right: true, shrink: None }
    }

    /// Text that may be cut down to `width` characters.
    pub fn shrinking(head: &'static str, width: usize) -> Self {
        Self { head, right: false, shrink: Some(width) }
    }
}

/// A table of text cells.
pub(super) struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Columns in which no row has a value are left out; a row has a cell for every column.
    pub fn new(columns: Vec<Column>, rows: Vec<Vec<String>>) -> Self {
        let kept: Vec<bool> =
            (0..columns.len()).map(|i| rows.iter().any(|row| row.get(i).is_some_and(|cell| cell != NONE))).collect();
        let columns = columns.into_iter().zip(&kept).filter_map(|(column, kept)| kept.then_some(column)).collect();
        let keep =
            |row: Vec<String>| row.iter().zip(&kept).filter(|(_, kept)| **kept).map(|(cell, _)| clean(cell)).collect();
        Self { columns, rows: rows.into_iter().map(keep).collect() }
    }

    /// Aligned with spaces; no line is longer than `width` as long as the shrinking columns can give way.
    pub fn text(&self, width: usize) -> String {
        let length = |text: &str| text.chars().count();
        let widest = |i: usize| {
            let cells = self.rows.iter().map(|row| length(&row[i])).max().unwrap_or_default();
            cells.max(length(self.columns[i].head))
        };
        let mut widths: Vec<usize> = (0..self.columns.len()).map(widest).collect();
        let gaps = 2 * widths.len().saturating_sub(1);
        while widths.iter().sum::<usize>() + gaps > width {
            let can = |i: &usize| self.columns[*i].shrink.is_some_and(|least| widths[*i] > least);
            let Some(i) = (0..widths.len()).filter(can).max_by_key(|i| widths[*i]) else { break };
            widths[i] -= 1;
        }
        let line = |cells: &mut dyn Iterator<Item = &str>| {
            let mut line = String::new();
            for ((cell, column), &width) in cells.zip(&self.columns).zip(&widths) {
                let cell = cut(cell, width);
                let pad = " ".repeat(width.saturating_sub(length(&cell)));
                let (before, after) = if column.right { (pad.as_str(), "") } else { ("", pad.as_str()) };
                let _ = write!(line, "{before}{cell}{after}  ");
            }
            format!("{}\n", line.trim_end())
        };
        let mut text = line(&mut self.columns.iter().map(|column| column.head));
        for row in &self.rows {
            text += &line(&mut row.iter().map(String::as_str));
        }
        text
    }

    /// GitHub's form.
    pub fn markdown(&self) -> String {
        let mut text = String::from("|");
        for column in &self.columns {
            let _ = write!(text, " {} |", markdown(column.head));
        }
        text.push_str("\n|");
        for column in &self.columns {
            text.push_str(if column.right { "---:|" } else { "---|" });
        }
        text.push('\n');
        for row in &self.rows {
            let cells: Vec<String> = row.iter().map(|cell| markdown(cell)).collect();
            let _ = writeln!(text, "| {} |", cells.join(" | "));
        }
        text
    }

    /// A `<table>` in a box that scrolls where the window is narrow.
    pub fn html(&self) -> String {
        let cell = |tag: &str, column: &Column, text: &str| {
            let class = match column {
                Column { right: true, .. } => " class=\"n\"",
                Column { shrink: Some(_), .. } => " class=\"w\"",
                _ => "",
            };
            format!("<{tag}{class}>{}</{tag}>", escape(text))
        };
        let heads: String = self.columns.iter().map(|column| cell("th", column, column.head)).collect();
        let mut text = format!("<div class=\"scroll\"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n");
        for row in &self.rows {
            let cells: String = row.iter().zip(&self.columns).map(|(text, column)| cell("td", column, text)).collect();
            let _ = writeln!(text, "<tr>{cells}</tr>");
        }
        text + "</tbody></table></div>\n"
    }
}

/// At most `width` characters, the last one an ellipsis where some were cut.
pub(super) fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.into();
    }
    text.chars().take(width.saturating_sub(1)).collect::<String>().trim_end().to_string() + "…"
}

/// Text that Markdown takes for text.
pub(super) fn markdown(text: &str) -> String {
    let mut out = String::new();
    for c in clean(text).chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '|' | '\\' | '`' | '*' | '_' | '[' | ']' | '~' => out.extend(['\\', c]),
            _ => out.push(c),
        }
    }
    out
}

/// Text in lines of at most `width` characters, all but the first indented by `indent`.
pub(super) fn wrap(text: &str, width: usize, indent: usize) -> String {
    let (mut out, mut line) = (String::new(), 0);
    for word in text.split_whitespace() {
        let length = word.chars().count();
        if line > 0 && line + 1 + length > width {
            let _ = write!(out, "\n{}", " ".repeat(indent));
            line = indent;
        } else if line > 0 {
            out.push(' ');
            line += 1;
        }
        out.push_str(word);
        line += length;
    }
    out + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_cells_give_way_and_empty_columns_vanish() {
        let columns = vec![Column::shrinking("device", 6), Column::right("ms"), Column::right("J")];
        let rows = vec![vec!["a very long name".into(), "1.0".into(), NONE.into()]];
        let text = Table::new(columns, rows).text(14);
        assert_eq!(text, "device     ms\na very l…  1.0\n".replace("device     ms", "device      ms"));
    }

    #[test]
    fn markdown_keeps_cells_apart() {
        let table = Table::new(vec![Column::left("a")], vec![vec!["x | <b> `y`".into()]]);
        assert_eq!(table.markdown(), "| a |\n|---|\n| x \\| &lt;b&gt; \\`y\\` |\n");
    }

    #[test]
    fn wrapped_lines_are_indented() {
        assert_eq!(wrap("aa bb cc", 5, 1), "aa bb\n cc\n");
    }
}
