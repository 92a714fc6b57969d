//! House rules that a program can check: sizes, unfinished work, reasons, links. Prints every offender, then fails.

#[path = "tidy/source.rs"]
mod source;

use std::path::{Path, PathBuf};
use std::process::Command;

/// Longest function; what is longer hides a second one.
const FUNCTION_LINES: usize = 70;
/// Longest file; what is longer has two subjects.
const FILE_LINES: usize = 500;

struct File {
    path: String,
    text: String,
}

impl File {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }
    fn is_script(&self) -> bool {
        self.text.starts_with("#!/")
    }
    /// Only this check may name what it looks for.
    fn is_checker(&self) -> bool {
        self.path.starts_with("tests/tidy")
    }
}

/// Every text file of the repository that is tracked or would be.
fn files() -> Vec<File> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let listed = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(&root)
        .output()
        .expect("git is installed");
    assert!(listed.status.success(), "git ls-files: {}", String::from_utf8_lossy(&listed.stderr));
    let names = String::from_utf8(listed.stdout).expect("file names are UTF-8");
    let read = |path: &str| std::fs::read_to_string(root.join(path)).ok();
    names.lines().filter_map(|path| read(path).map(|text| File { path: path.into(), text })).collect()
}

fn check(rule: &str, offenders: &[String]) {
    for offender in offenders {
        println!("{offender}");
    }
    assert!(offenders.is_empty(), "{rule}: {} offenders", offenders.len());
}

fn is_word(line: &str, at: usize, word: &str) -> bool {
    let letter = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    !letter(line[..at].chars().next_back()) && !letter(line[at + word.len()..].chars().next())
}

fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| is_word(line, at, word))
}

#[test]
fn functions_have_at_most_70_lines() {
    let mut offenders = Vec::new();
    for file in files() {
        let found = match &file {
            rust if rust.is_rust() => source::functions(&source::blank(&rust.text)),
            script if script.is_script() => script_functions(&script.text),
            _ => Vec::new(),
        };
        let long = found.into_iter().filter(|f| f.lines > FUNCTION_LINES);
        offenders.extend(long.map(|f| format!("{}:{}: fn {} has {} lines", file.path, f.line, f.name, f.lines)));
    }
    check("functions", &offenders);
}

/// Functions of a shell or Python script: from the header to the next line that is not indented.
fn script_functions(text: &str) -> Vec<source::Function> {
    let lines: Vec<&str> = text.lines().collect();
    let header = |line: &str| {
        let python =
            line.trim_start().strip_prefix("def ").map(|rest| rest.split('(').next().unwrap_or("").to_string());
        let shell = line.split_once("() {").filter(|(name, _)| !name.contains(' ')).map(|(name, _)| name.to_string());
        python.or(shell)
    };
    let indent = |line: &str| line.len() - line.trim_start().len();
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let Some(name) = header(line) else { continue };
        let inside = |l: &&&str| l.trim().is_empty() || indent(l) > indent(line);
        found.push(source::Function {
            name,
            line: at + 1,
            lines: 2 + lines[at + 1..].iter().take_while(inside).count(),
        });
    }
    found
}

#[test]
fn files_have_at_most_500_lines() {
    let counted =
        |f: &File| f.is_rust() || f.is_script() || f.path.ends_with(".proto") && !f.path.ends_with("csi.proto");
    let long = |f: &File| f.text.lines().count() > FILE_LINES;
    let offenders: Vec<String> = files()
        .iter()
        .filter(|f| counted(f) && long(f))
        .map(|f| format!("{} has {} lines", f.path, f.text.lines().count()))
        .collect();
    check("file sizes", &offenders);
}

#[test]
fn nothing_is_left_unfinished() {
    let words = ["TODO", "FIXME", "XXX", "todo!", "unimplemented!"];
    let mut offenders = Vec::new();
    for file in files().iter().filter(|f| !f.is_checker() && f.path != "Cargo.toml") {
        for (at, line) in file.text.lines().enumerate() {
            let found = words.iter().filter(|w| has_word(line, w.trim_end_matches('!')) && line.contains(**w));
            offenders.extend(found.map(|w| format!("{}:{}: {w}", file.path, at + 1)));
        }
    }
    check("unfinished work", &offenders);
}

#[test]
fn no_path_of_one_machine_is_named() {
    // Where this very checkout is, and its user's home: whoever builds on a machine writes its paths, not another's.
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR"));
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let places = [Some(checkout), home.as_deref()];
    let places = places.into_iter().flatten().filter(|place| place.parent().is_some());
    let paths: Vec<String> = places.map(|place| format!("{}/", place.display())).collect();
    let mut offenders = Vec::new();
    for file in files().iter().filter(|f| !f.is_checker()) {
        for (at, line) in file.text.lines().enumerate() {
            let found = paths.iter().filter(|p| {
                line.match_indices(p.as_str())
                    .any(|(i, _)| !line[..i].ends_with(|c: char| c.is_alphanumeric() || "._-}*".contains(c)))
            });
            offenders.extend(found.map(|p| format!("{}:{}: {p}", file.path, at + 1)));
        }
    }
    check("machine paths", &offenders);
}

#[test]
fn every_source_file_says_what_it_is_for() {
    // Unit tests are of the module beside them, which has said it.
    let exempt = |f: &File| f.path.ends_with("/tests.rs") || f.path.contains("fuzz_targets/");
    let missing = |f: &&File| f.is_rust() && !exempt(f) && !f.text.starts_with("//!");
    let mut offenders: Vec<String> =
        files().iter().filter(missing).map(|f| format!("{} does not begin with //!", f.path)).collect();
    let silent = |f: &&File| {
        f.is_script() && !f.text.lines().nth(1).is_some_and(|l| l.starts_with("# ") || l.starts_with("\"\"\""))
    };
    offenders.extend(files().iter().filter(silent).map(|f| format!("{}: the second line says what it does", f.path)));
    check("headers", &offenders);
}

#[test]
fn unsafe_is_used_only_where_it_is_allowed_with_a_reason() {
    let all = files();
    let allows = |path: &str| all.iter().any(|f| f.path == path && f.text.contains("allow(unsafe_code, reason = "));
    let mut offenders = Vec::new();
    for file in all.iter().filter(|f| f.is_rust() && !f.is_checker()) {
        let used = source::blank(&file.text).lines().any(|l| has_word(l, "unsafe"));
        // A module of a directory may be covered by the file that the directory belongs to.
        let parent = Path::new(&file.path).parent().map(|p| format!("{}.rs", p.display())).unwrap_or_default();
        if used && !allows(&file.path) && !allows(&parent) {
            offenders.push(format!("{} uses unsafe without `allow(unsafe_code, reason = ...)`", file.path));
        }
    }
    check("unsafe", &offenders);
}

#[test]
fn every_dependency_has_its_reason() {
    let manifest = files().into_iter().find(|f| f.path == "Cargo.toml").expect("Cargo.toml");
    let (mut section, mut previous, mut offenders) = (String::new(), "", Vec::new());
    for line in manifest.text.lines() {
        if line.starts_with('[') {
            section = line.to_string();
        } else if section.ends_with("dependencies]") && line.contains('=') && !previous.starts_with('#') {
            offenders.push(format!("Cargo.toml: no reason above `{line}`"));
        }
        previous = line;
    }
    check("dependencies", &offenders);
}

#[test]
fn links_and_paths_in_documents_exist() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let mut offenders = Vec::new();
    for file in files().iter().filter(|f| f.path.ends_with(".md")) {
        let here = Path::new(&file.path).parent().expect("a file has a parent");
        let links = file.text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
        let broken = links.filter(|l| !l.is_empty() && !l.contains("://") && !root.join(here).join(l).exists());
        offenders.extend(broken.map(|l| format!("{}: the link {l} leads nowhere", file.path)));
        let named = file.text.split('`').skip(1).step_by(2).filter(|code| is_repository_path(code));
        let gone = named.filter(|path| !root.join(path.trim_end_matches('/')).exists());
        offenders.extend(gone.map(|path| format!("{}: there is no {path}", file.path)));
    }
    check("links", &offenders);
}

fn is_repository_path(code: &str) -> bool {
    let top = ["src/", "tests/", "hack/", "docs/", "deploy/", "proto/"];
    top.iter().any(|t| code.starts_with(t)) && !code.contains([' ', '*', '{', '<', ':', '\n'])
}

#[test]
fn the_reader_of_rust_counts_what_it_should() {
    let sample = "// fn no() {\nfn a<T: Into<u8>>(x: [u8; 4]) -> Vec<u8> where T: Copy, {\n    let s = \"}\";\n    let c = '}';\n\
                  \x20   let r = r#\"\"}\"#;\n}\ntrait T { fn declared(&self); }\nfn b() { fn inner() {\n} }\n";
    let found: Vec<(String, usize, usize)> =
        source::functions(&source::blank(sample)).into_iter().map(|f| (f.name, f.line, f.lines)).collect();
    assert_eq!(found, [("a".into(), 2, 5), ("b".into(), 8, 2), ("inner".into(), 8, 2)]);
    assert_eq!(script_functions("x() {\n  a\n}\ny\n")[0].lines, 3);
    assert!(has_word("a TODO b", "TODO") && !has_word("mktemp XXXXXX", "XXX"));
}
