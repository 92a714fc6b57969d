//! The authority of a cluster: makes itself and the certificates of nodes and controllers.
//!
//! Invariants: a certificate leaves here only after it was checked as a peer would check it; the subject of an authority's
//! certificate follows from its cluster alone, so that nothing but the names in it need be read again.

use super::files::{self, AUTHORITY, AUTHORITY_KEY, CERTIFICATE, File, FileError, KEY};
use super::identity::{Identity, Name, Role, authority_uri, parse_authority};
use super::verify::{Anchors, Refusal};
use crate::volume::ClusterId;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use time::{Duration, OffsetDateTime};

/// How long before its making a certificate is valid: the clocks of a cluster's machines may differ by so much.
const BACKDATED: Duration = Duration::hours(1);

/// From when until when a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// The first second.
    pub from: OffsetDateTime,
    /// The last second.
    pub until: OffsetDateTime,
}

impl Validity {
    /// From now on, and an hour before for clocks that are behind.
    pub fn days(days: u16) -> Self {
        let now = OffsetDateTime::now_utc();
        Self { from: now - BACKDATED, until: now + Duration::days(days.into()) }
    }
}

/// A host name or address at which the holder of a certificate listens: for clients that check it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// An IP address.
    Ip(IpAddr),
    /// A host name.
    Host(Name),
}

impl FromStr for Address {
    type Err = super::BadName;
    fn from_str(text: &str) -> Result<Self, super::BadName> {
        text.parse().map(Self::Ip).or_else(|_| text.parse().map(Self::Host))
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Host(name) => name.fmt(f),
        }
    }
}

/// Why a certificate was not made.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Not made by [`Authority::create`].
    #[error("{0} is no certificate of a Tandem authority: `tandem certificates init` makes one")]
    NoAuthority(PathBuf),
    /// Not a key.
    #[error("{path} is no private key in PEM: {source}")]
    BadKey {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: rcgen::Error,
    },
    /// What was issued is not valid: the key belongs to another certificate, or the dates are over.
    #[error("the new certificate would be refused ({0}): do {AUTHORITY} and {AUTHORITY_KEY} belong together?")]
    Refused(Refusal),
    /// Key generation or encoding failed.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
}

/// Whose certificate shall be made.
#[derive(Clone, Debug)]
pub struct Leaf {
    /// As what.
    pub role: Role,
    /// Called what.
    pub name: Name,
    /// Where it listens.
    pub addresses: Vec<Address>,
}

/// What was made, in PEM.
#[derive(Clone, Debug)]
pub struct Issued {
    /// Whose.
    pub identity: Identity,
    certificate: String,
    key: String,
    authority: String,
}

impl Issued {
    /// Writes the certificate, its key and the authority's certificate into a directory.
    pub fn write(&self, directory: &Path) -> Result<(), FileError> {
        let files = [
            File { name: KEY, text: &self.key, secret: true },
            File { name: CERTIFICATE, text: &self.certificate, secret: false },
            File { name: AUTHORITY, text: &self.authority, secret: false },
        ];
        files::write(directory, &files)
    }
}

/// Whoever signs the certificates of one cluster.
pub struct Authority {
    cluster: ClusterId,
    name: Name,
    certificate: String,
    key: KeyPair,
}

impl Authority {
    /// A new authority of a new cluster, kept in `directory`.
    pub fn create(directory: &Path, name: Name, validity: Validity) -> Result<Self, IssueError> {
        let cluster = ClusterId::random();
        let key = KeyPair::generate()?;
        let mut parameters = parameters(cluster, "authority", validity);
        parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        parameters.subject_alt_names = vec![SanType::URI(authority_uri(cluster, &name).try_into()?)];
        let certificate = parameters.self_signed(&key)?.pem();
        let secret = key.serialize_pem();
        let files = [
            File { name: AUTHORITY_KEY, text: &secret, secret: true },
            File { name: AUTHORITY, text: &certificate, secret: false },
        ];
        files::write(directory, &files)?;
        Ok(Self { cluster, name, certificate, key })
    }

    /// The authority that is kept in `directory`.
    pub fn open(directory: &Path) -> Result<Self, IssueError> {
        let certificate = files::read(directory, AUTHORITY)?;
        let uri = Anchors::parse(&certificate).ok().and_then(|anchors| anchors.first_uri());
        let (cluster, name) = uri
            .and_then(|uri| parse_authority(&uri))
            .ok_or_else(|| IssueError::NoAuthority(directory.join(AUTHORITY)))?;
        let key = KeyPair::from_pem(&files::read(directory, AUTHORITY_KEY)?)
            .map_err(|source| IssueError::BadKey { path: directory.join(AUTHORITY_KEY), source })?;
        Ok(Self { cluster, name, certificate, key })
    }

    /// Its cluster.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// What people call the cluster.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Makes a key and its certificate.
    pub fn issue(&self, leaf: &Leaf, validity: Validity) -> Result<Issued, IssueError> {
        let issued = self.sign(leaf, validity)?;
        let anchors = Anchors::parse(&self.certificate).map_err(IssueError::Refused)?;
        anchors.check_pem(&issued.certificate).map_err(IssueError::Refused)?;
        Ok(issued)
    }

    /// The same without the check.
    pub(crate) fn sign(&self, leaf: &Leaf, validity: Validity) -> Result<Issued, IssueError> {
        let identity = Identity { cluster: self.cluster, role: leaf.role, name: leaf.name.clone() };
        let mut wanted = parameters(self.cluster, &leaf.role.to_string(), validity);
        wanted.use_authority_key_identifier_extension = true;
        wanted.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // Replicas call each other: each is a server and a client.
        wanted.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        wanted.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
        for address in &leaf.addresses {
            wanted.subject_alt_names.push(match address {
                Address::Ip(address) => SanType::IpAddress(*address),
                Address::Host(name) => SanType::DnsName(name.to_string().try_into()?),
            });
        }
        let own = parameters(self.cluster, "authority", validity);
        let key = KeyPair::generate()?;
        let certificate = wanted.signed_by(&key, &Issuer::from_params(&own, &self.key))?;
        let (certificate, key) = (certificate.pem(), key.serialize_pem());
        Ok(Issued { identity, certificate, key, authority: self.certificate.clone() })
    }
}

fn parameters(cluster: ClusterId, role: &str, validity: Validity) -> CertificateParams {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationName, cluster.to_string());
    subject.push(DnType::CommonName, format!("tandem {role}"));
    let mut parameters = CertificateParams::default();
    parameters.not_before = validity.from;
    parameters.not_after = validity.until;
    parameters.distinguished_name = subject;
    parameters
}

#[cfg(test)]
mod tests;
