//! The page: one file, no scripts, nothing loaded from elsewhere.

use std::fmt::Write;

use super::svg::{Chart, escape, style};
use super::table::Table;

const STYLE: &str = "
:root{color-scheme:light dark}
body{margin:0 auto;padding:2rem 1.25rem 3rem;max-width:66rem;font:15px/1.5 system-ui,-apple-system,\"Segoe UI\",Roboto,sans-serif;
 background:#fff;color:#1c2026}
h1{font-size:1rem;font-weight:600;margin:0 0 .4rem;color:#59616c}
h2{font-size:1.05rem;margin:2rem 0 .6rem}
.verdict{font-size:1.3rem;line-height:1.35;font-weight:600;margin:0 0 .5rem}
.verdict.one-of-many{font-size:1.05rem}
.note,figcaption{font-size:.85rem;color:#59616c;margin:.5rem 0}
figure{margin:0;overflow-x:auto}
figure svg{display:block;width:100%;height:auto;min-width:38rem}
.scroll{overflow-x:auto;margin:1.2rem 0 .6rem}
h2+.scroll{margin-top:0}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .7rem;text-align:left;vertical-align:top;border-bottom:1px solid #e1e5ea}
th{font-weight:600;color:#59616c;white-space:nowrap}
th.w{white-space:normal;overflow-wrap:anywhere;min-width:8rem}
th:first-child,td:first-child{padding-left:0}
td{white-space:nowrap}
td.w{white-space:normal;overflow-wrap:anywhere;min-width:6rem}
.n{text-align:right}
details{margin:1rem 0}
summary{cursor:pointer;font-weight:600}
footer{margin-top:2.5rem;font-size:.8rem;color:#59616c}
@media (prefers-color-scheme:dark){
body{background:#15181d;color:#e8ebef}
h1,.note,figcaption,th,footer{color:#a3acb8}
th,td{border-color:#2c323a}
}
";

/// A page in the making.
pub(super) struct Page {
    out: String,
}

impl Page {
    /// The verdicts are the first thing that a reader sees.
    pub fn new(title: &str, verdicts: &[String]) -> Self {
        let title = escape(title);
        // The policy makes the promise binding: even text that escaped its element could load and run nothing.
        let mut out = format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
             <title>{title}</title>\n<style>{STYLE}{}</style>\n</head>\n<body>\n<h1>{title}</h1>\n",
            style()
        );
        let class = if verdicts.len() > 1 { "verdict one-of-many" } else { "verdict" };
        for verdict in verdicts {
            let _ = writeln!(out, "<p class=\"{class}\">{}</p>", escape(verdict));
        }
        Self { out }
    }

    pub fn table(&mut self, table: &Table) {
        self.out.push_str(&table.html());
    }

    pub fn note(&mut self, text: &str) {
        let _ = writeln!(self.out, "<p class=\"note\">{}</p>", escape(text));
    }

    pub fn figure(&mut self, title: &str, chart: &Chart, caption: &str) {
        let _ = writeln!(
            self.out,
            "<h2>{}</h2>\n<figure>\n{}<figcaption>{}</figcaption>\n</figure>",
            escape(title),
            chart.inline(),
            escape(caption)
        );
    }

    /// A heading over finished HTML.
    pub fn section(&mut self, title: &str, html: &str) {
        let _ = writeln!(self.out, "<h2>{}</h2>\n{html}", escape(title));
    }

    /// Finished HTML that the reader opens.
    pub fn folded(&mut self, title: &str, html: &str) {
        let _ = writeln!(self.out, "<details><summary>{}</summary>\n{html}</details>", escape(title));
    }

    pub fn finish(self) -> String {
        let version = env!("CARGO_PKG_VERSION");
        self.out + "<footer>Written by gpt-wgpu " + version + " compare.</footer>\n</body>\n</html>\n"
    }
}

/// A table with a column for each name; the first cell of a line is what the line tells.
pub(super) fn transposed(names: &[String], lines: &[Vec<String>]) -> String {
    let heads: String = names.iter().map(|name| format!("<th class=\"w\">{}</th>", escape(name))).collect();
    let mut out = format!("<div class=\"scroll\"><table>\n<thead><tr><th></th>{heads}</tr></thead>\n<tbody>\n");
    for line in lines {
        let cells: String = line.iter().skip(1).map(|cell| format!("<td class=\"w\">{}</td>", escape(cell))).collect();
        let head = line.first().map(|head| escape(head)).unwrap_or_default();
        let _ = writeln!(out, "<tr><th>{head}</th>{cells}</tr>");
    }
    out + "</tbody></table></div>\n"
}
