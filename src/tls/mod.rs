//! Who may talk to whom between machines: a cluster's certificates.
//!
//! # Invariants
//! * A peer is who its certificate says, as a URI in the subject alternative names: `tandem://<cluster>/<role>/<name>`.
//!   Host names and addresses prove nothing.
//! * A key is readable by its owner only, and nothing overwrites one.
//! * There is no revocation: a certificate is worth something until it expires. Who has lost a key makes a new authority.

mod authority;
mod credentials;
mod dial;
mod files;
mod identity;
mod listener;
mod peer;
mod verify;

pub use authority::{Address, Authority, IssueError, Issued, Leaf, Validity};
pub use credentials::{Credentials, CredentialsError, Loaded};
pub use dial::dial;
pub use files::{AUTHORITY, AUTHORITY_KEY, CERTIFICATE, FileError, KEY};
pub use identity::{BadIdentity, BadName, Identity, Name, Role};
pub use listener::{Caller, Connection, Port};
pub use peer::{Expected, HandshakeError, peer_identity};
pub use verify::Refusal;
