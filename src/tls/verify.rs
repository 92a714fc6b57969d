//! Whether a certificate is good: signed by the cluster's authority, in force, and naming who its holder is.
//!
//! Invariants: no bytes make it panic; exactly one URI names the holder; the cluster in it is the authority's.

use super::identity::{Identity, Name, Role, parse_authority};
use crate::volume::ClusterId;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

/// Why a certificate is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The authority's file holds none, or something else.
    #[error("no certificate of a Tandem authority in PEM")]
    Authority,
    /// Bytes that are none.
    #[error("its certificate cannot be read ({0})")]
    Malformed(String),
    /// Another cluster's, or forged.
    #[error("its certificate is not signed by this cluster's authority: issue it with `tandem certificates issue`")]
    Stranger,
    /// Too old.
    #[error("its certificate has expired: issue a new one with `tandem certificates issue`")]
    Expired,
    /// Too new.
    #[error("its certificate is not valid yet: check the clocks of both machines")]
    NotYet,
    /// It names nobody of this cluster.
    #[error("its certificate names nobody in cluster {0}: issue it with `tandem certificates issue`")]
    Nameless(ClusterId),
    /// It is good for something else.
    #[error("its certificate is that of {found}, and a {wanted} is expected here")]
    Role {
        /// Who may be here.
        wanted: Role,
        /// Who is.
        found: Identity,
    },
    /// It is another's.
    #[error("its certificate is that of {found}, and {wanted} is expected there: is the address right?")]
    Name {
        /// Who was called.
        wanted: Name,
        /// Who has answered.
        found: Identity,
    },
    /// Anything else that makes it unusable.
    #[error("its certificate is not acceptable ({0})")]
    Unacceptable(String),
}

/// As what a certificate is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Usage {
    /// By the one that was called.
    Server,
    /// By the caller.
    Client,
}

/// The authorities of a cluster: those in its file, usually one.
#[derive(Clone, Debug)]
pub(super) struct Anchors {
    certificates: Vec<CertificateDer<'static>>,
    anchors: Vec<TrustAnchor<'static>>,
    cluster: ClusterId,
}

impl Anchors {
    /// From PEM. All must be of one cluster.
    pub fn parse(pem: &str) -> Result<Self, Refusal> {
        let read = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>();
        let certificates = read.map_err(|_| Refusal::Authority)?;
        let anchors = certificates.iter().map(|der| webpki::anchor_from_trusted_cert(der).map(|a| a.to_owned()));
        let anchors = anchors.collect::<Result<Vec<_>, _>>().map_err(|_| Refusal::Authority)?;
        let mut clusters = certificates.iter().map(|der| uri(der).and_then(|uri| parse_authority(&uri)));
        let (cluster, _) = clusters.next().flatten().ok_or(Refusal::Authority)?;
        if clusters.any(|other| other.is_none_or(|(other, _)| other != cluster)) {
            return Err(Refusal::Authority);
        }
        Ok(Self { certificates, anchors, cluster })
    }

    /// The URI of the first one.
    pub fn first_uri(&self) -> Option<String> {
        self.certificates.first().and_then(uri)
    }

    /// Checks a certificate in PEM as a server's and a client's, at this moment.
    pub fn check_pem(&self, pem: &str) -> Result<Identity, Refusal> {
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| Refusal::Malformed(e.to_string()))?;
        self.check(&der, &[], UnixTime::now(), Usage::Server)?;
        self.check(&der, &[], UnixTime::now(), Usage::Client)
    }

    /// Checks a certificate and says whose it is.
    pub fn check(
        &self,
        der: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: Usage,
    ) -> Result<Identity, Refusal> {
        let malformed = |error: webpki::Error| Refusal::Malformed(error.to_string());
        let certificate = EndEntityCert::try_from(der).map_err(malformed)?;
        let usage = match usage {
            Usage::Server => KeyUsage::server_auth(),
            Usage::Client => KeyUsage::client_auth(),
        };
        let algorithms = webpki::ALL_VERIFICATION_ALGS;
        certificate
            .verify_for_usage(algorithms, &self.anchors, intermediates, now, usage, None, None)
            .map_err(refusal)?;
        identity(der).filter(|identity| identity.cluster == self.cluster).ok_or(Refusal::Nameless(self.cluster))
    }
}

/// Whom a certificate names.
pub(super) fn identity(der: &CertificateDer<'_>) -> Option<Identity> {
    uri(der)?.parse().ok()
}

/// The only URI of a certificate; two would leave open who it is.
fn uri(der: &CertificateDer<'_>) -> Option<String> {
    let certificate = EndEntityCert::try_from(der).ok()?;
    let mut uris = certificate.valid_uri_names();
    let uri = uris.next()?.to_string();
    uris.next().is_none().then_some(uri)
}

fn refusal(error: webpki::Error) -> Refusal {
    match error {
        webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => Refusal::Stranger,
        webpki::Error::CertExpired { .. } => Refusal::Expired,
        webpki::Error::CertNotValidYet { .. } => Refusal::NotYet,
        other => Refusal::Unacceptable(other.to_string()),
    }
}
