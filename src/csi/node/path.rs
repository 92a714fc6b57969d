//! Paths that a caller gives.
//!
//! Invariants: absolute, without `..`, and canonical except for the last component, which may not exist yet; so it can be
//! compared with what the kernel says is mounted.

use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

/// Why a path is refused.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// Not absolute.
    #[error("path {0:?} is not absolute")]
    Relative(String),
    /// `..`, a NUL, or nothing but `/`.
    #[error("path {0:?} is not allowed: it has .., a NUL byte, or is the root directory")]
    Forbidden(String),
    /// The directory that should hold it is not there.
    #[error("the parent directory of {0} does not exist")]
    NoParent(PathBuf),
    /// The kernel does not accept it.
    #[error("path {path}: {source}")]
    Unusable {
        /// As given.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// Checks a path of a request.
pub fn resolve(text: &str) -> Result<PathBuf, PathError> {
    let path = Path::new(text);
    let shown = || text.chars().take(200).collect::<String>();
    if !path.is_absolute() {
        return Err(PathError::Relative(shown()));
    }
    if text.contains('\0') || path.components().any(|part| part == Component::ParentDir) {
        return Err(PathError::Forbidden(shown()));
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(PathError::Forbidden(shown()));
    };
    match std::fs::canonicalize(parent) {
        Ok(parent) => Ok(parent.join(name)),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(PathError::NoParent(path.into())),
        Err(source) => Err(PathError::Unusable { path: path.into(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_lead_elsewhere_is_refused() {
        assert!(matches!(resolve("some/path"), Err(PathError::Relative(_))));
        assert!(matches!(resolve("/tmp/../etc"), Err(PathError::Forbidden(_))));
        assert!(matches!(resolve("/tmp/a\0b"), Err(PathError::Forbidden(_))));
        assert!(matches!(resolve("/"), Err(PathError::Forbidden(_))));
        assert!(matches!(resolve("/nonexistent/tandem/x"), Err(PathError::NoParent(_))));
        assert!(matches!(resolve(&format!("/tmp/{}/x", "a".repeat(5000))), Err(PathError::Unusable { .. })));
    }

    #[test]
    fn the_parent_is_made_canonical_and_the_rest_is_kept() {
        let directory = tempfile::Builder::new().prefix("tandem-path-").tempdir().expect("temporary directory");
        let real = directory.path().canonicalize().expect("canonical");
        std::fs::create_dir(real.join("é b")).expect("directory");
        std::os::unix::fs::symlink("é b", real.join("link")).expect("symlink");
        let text = format!("{}/./link//target\n/", real.display());
        assert_eq!(resolve(&text).expect("allowed"), real.join("é b").join("target\n"));
    }
}
