//! The names in certificates: of which cluster, in which role, called what.
//!
//! Invariants: text and value map one to one; a [`Name`] is safe in a path, a URI and a log line.

use crate::volume::ClusterId;
use std::fmt;
use std::str::FromStr;

/// Characters of a name: as many as Kubernetes allows for a node's.
const MAX_NAME: usize = 253;
/// Characters between two dots of a name.
const MAX_LABEL: usize = 63;
const SCHEME: &str = "tandem://";
const AUTHORITY: &str = "authority";

/// What a process is in its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum)]
pub enum Role {
    /// A machine that holds copies.
    Node,
    /// The one that keeps the catalogue.
    Controller,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Node => "node",
            Self::Controller => "controller",
        })
    }
}

/// Name of a machine or a cluster: labels of lower-case letters, digits and hyphens, with dots between them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

/// The text is no [`Name`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no name: use lower-case letters, digits, `-` and `.`, begin and end each part with a letter or a digit, \
     at most {MAX_LABEL} characters between dots and {MAX_NAME} in all"
)]
pub struct BadName(String);

impl Name {
    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = BadName;
    fn from_str(text: &str) -> Result<Self, BadName> {
        let letter = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let label = |part: &str| {
            part.len() <= MAX_LABEL
                && part.starts_with(letter)
                && part.ends_with(letter)
                && part.chars().all(|c| letter(c) || c == '-')
        };
        let good = text.len() <= MAX_NAME && text.split('.').all(label);
        // Whoever sent a long text need not fill the log with it.
        if good { Ok(Self(text.into())) } else { Err(BadName(text.chars().take(MAX_NAME).collect())) }
    }
}

/// Who holds a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Whose authority signed it.
    pub cluster: ClusterId,
    /// As what.
    pub role: Role,
    /// Unique for its role in its cluster.
    pub name: Name,
}

/// The text is not the URI of an [`Identity`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not of the form {SCHEME}<cluster id>/<role>/<name>")]
pub struct BadIdentity;

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cluster, role, name } = self;
        write!(f, "{SCHEME}{cluster}/{role}/{name}")
    }
}

impl FromStr for Identity {
    type Err = BadIdentity;
    fn from_str(text: &str) -> Result<Self, BadIdentity> {
        let (cluster, role, name) = parts(text).ok_or(BadIdentity)?;
        let role = [Role::Node, Role::Controller].into_iter().find(|known| known.to_string() == role);
        Ok(Self { cluster, role: role.ok_or(BadIdentity)?, name })
    }
}

/// The URI in an authority's own certificate.
pub(super) fn authority_uri(cluster: ClusterId, name: &Name) -> String {
    format!("{SCHEME}{cluster}/{AUTHORITY}/{name}")
}

/// The cluster and its name from the URI of an authority.
pub(super) fn parse_authority(uri: &str) -> Option<(ClusterId, Name)> {
    parts(uri).filter(|(_, role, _)| *role == AUTHORITY).map(|(cluster, _, name)| (cluster, name))
}

fn parts(uri: &str) -> Option<(ClusterId, &str, Name)> {
    let (cluster, rest) = uri.strip_prefix(SCHEME)?.split_once('/')?;
    let (role, name) = rest.split_once('/')?;
    Some((cluster.parse().ok()?, role, name.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_in_paths_and_logs() {
        for good in ["node-1", "a", "0", "ip-10-0-0-1.eu.internal", &"a".repeat(63)] {
            assert_eq!(good.parse::<Name>().map(|name| name.to_string()).as_deref(), Ok(good));
        }
        for bad in ["", "-a", "a-", "A", "a/b", "..", "a..b", "a b", "ä", "a\n", &"a".repeat(64), &"a.".repeat(200)] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_identity_is_its_uri() {
        let cluster = ClusterId::from_bytes([7; 16]);
        for role in [Role::Node, Role::Controller] {
            let identity = Identity { cluster, role, name: "node-1".parse().expect("a name") };
            assert_eq!(identity.to_string().parse(), Ok(identity));
        }
        let authority = authority_uri(cluster, &"lab".parse().expect("a name"));
        assert_eq!(authority.parse::<Identity>(), Err(BadIdentity));
        assert_eq!(
            parse_authority(&authority).map(|(cluster, name)| (cluster, name.to_string())),
            Some((cluster, "lab".into()))
        );
        for bad in ["", "tandem://", "tandem://x/node/a", "https://a/node/b", &format!("tandem://{cluster}/node/a/b")] {
            assert_eq!(bad.parse::<Identity>(), Err(BadIdentity), "{bad}");
        }
    }
}
