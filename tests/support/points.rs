//! Where processes may die on purpose (`src/crash.rs`).

use std::collections::BTreeSet;
use std::path::Path;

/// The names of all points in the source.
pub fn in_the_source() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    collect(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    found
}

/// Points of mirrored volumes, which a machine alone does not pass.
pub fn is_of_a_mirror(name: &str) -> bool {
    name.starts_with("mirror.") || name.starts_with("catalogue.")
}

fn collect(directory: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(directory).expect("source").flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, found);
        } else if let Ok(text) = std::fs::read_to_string(&path) {
            let named = text.split("crash_point(\"").skip(1).filter_map(|rest| rest.split('"').next());
            found.extend(named.map(str::to_owned));
        }
    }
}
