//! The README's tree names every source file.

use std::fs;
use std::path::Path;

/// The README's tree of src/.
fn tree(readme: &str) -> &str {
    let (_, from) = readme.split_once("\nsrc/\n").expect("no src/");
    let (tree, _) = from.split_once("\nwgsl/").expect("no wgsl/");
    tree
}

/// What the tree says of each file or folder right under src/ that has lines of its own.
fn entries(tree: &str) -> Vec<String> {
    let mut entries: Vec<String> = Vec::new();
    for line in tree.lines() {
        if line.starts_with("   ") {
            entries.last_mut().expect("a first entry").push_str(line);
        } else {
            entries.push(line.into());
        }
    }
    entries
}

/// The files of `folder`, whose path below src/ is `below`, that the tree does not name: by their names those right under src/, the
/// others by a word where their folder is told.
fn missing(tree: &str, folder: &Path, below: &str) -> Vec<String> {
    let mut missing = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            missing.extend(self::missing(tree, &path, &format!("{below}{name}/")));
            continue;
        }
        let stem = name.trim_end_matches(".rs");
        let is_told = |text: &str| text.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == stem);
        let named = match below.split_once('/') {
            None => tree.contains(&format!(" {name}")) || tree.contains(&format!("({name}")),
            Some((top, _)) => {
                let of_folder =
                    |text: &String| text.starts_with(&format!("  {top}.rs")) || text.contains(&format!("{top}/"));
                entries(tree).iter().filter(|text| of_folder(text)).any(|text| is_told(text))
            }
        };
        if !named {
            missing.push(format!("{below}{name}"));
        }
    }
    missing
}

/// The files that the tree of `readme` does not name.
fn unnamed(readme: &str) -> Vec<String> {
    missing(tree(readme), &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), "")
}

fn readme() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap()
}

#[test]
fn the_tree_names_every_source_file() {
    assert_eq!(unnamed(&readme()), Vec::<String>::new());
}

#[test]
fn a_file_that_the_tree_does_not_name_is_missed() {
    for (told, file) in [
        ("sample.rs", "sample.rs"),
        ("watchdog.rs", "watchdog.rs"),
        ("config/check.rs", "config/check.rs"),
        ("step/forward.rs", "memory/step/forward.rs"),
    ] {
        let found = unnamed(&readme().replace(told, "nothing.rs"));
        assert!(found.contains(&file.to_string()), "{file}: {found:?}");
    }
}
