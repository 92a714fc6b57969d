//! Who is at the other end of a TLS connection, and why it was not let in.
//!
//! Invariants: a handshake ends well only with a certificate of the own cluster, in force, in the expected role and of the
//! expected name; what the address is called plays no part.

use super::identity::{Identity, Name, Role};
use super::verify::{self, Anchors, Refusal, Usage};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, CommonState, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};
use std::sync::Arc;

/// Who the other side has to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// As what; `None`: anybody of the cluster.
    pub role: Option<Role>,
    /// Called so; `None`: anybody in that role.
    pub name: Option<Name>,
}

/// Checks the certificates of one connection's other side.
#[derive(Debug)]
pub(super) struct Verifier {
    pub anchors: Arc<Anchors>,
    pub provider: Arc<CryptoProvider>,
    pub expected: Expected,
}

impl Verifier {
    fn check(
        &self,
        der: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: Usage,
    ) -> Result<(), rustls::Error> {
        let checked = self.anchors.check(der, intermediates, now, usage).and_then(|found| self.expect(found));
        checked.map_err(|refusal| CertificateError::Other(OtherError(Arc::new(refusal))).into())
    }

    fn expect(&self, found: Identity) -> Result<(), Refusal> {
        match &self.expected {
            Expected { role: Some(role), .. } if found.role != *role => Err(Refusal::Role { wanted: *role, found }),
            Expected { name: Some(name), .. } if found.name != *name => {
                Err(Refusal::Name { wanted: name.clone(), found })
            }
            Expected { .. } => Ok(()),
        }
    }

    fn signature(
        &self,
        message: &[u8],
        der: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, der, signed, &self.provider.signature_verification_algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// TLS 1.2 is not offered, so nobody signs for it.
fn no_tls12() -> Result<HandshakeSignatureValid, rustls::Error> {
    Err(rustls::PeerIncompatible::Tls12NotOffered.into())
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        der: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(der, intermediates, now, Usage::Server).map(|()| ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        der: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, der, signed)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }
    fn verify_client_cert(
        &self,
        der: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(der, intermediates, now, Usage::Client).map(|()| ClientCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        der: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, der, signed)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

/// Who is at the other end of a connection whose handshake is done; the certificate was checked then.
pub fn peer_identity(connection: &CommonState) -> Option<Identity> {
    verify::identity(connection.peer_certificates()?.first()?)
}

/// Why a handshake did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The other side's certificate.
    #[error("refused: {0}")]
    Refused(Refusal),
    /// It has shown none.
    #[error("refused: it shows no certificate; issue one with `tandem certificates issue`")]
    NoCertificate,
    /// The other side has refused the own certificate: its log says why.
    #[error("the other side refuses this one's certificate: its log says why ({0})")]
    RefusedHere(String),
    /// It does not speak TLS, or no version that is understood.
    #[error("it does not speak TLS 1.3 ({0}): is `encryption` the same on all nodes?")]
    Protocol(String),
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Connection(std::io::Error),
}

impl From<std::io::Error> for HandshakeError {
    fn from(error: std::io::Error) -> Self {
        let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
            return Self::Connection(error);
        };
        match tls {
            rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(inner))) => {
                match inner.downcast_ref::<Refusal>() {
                    Some(refusal) => Self::Refused(refusal.clone()),
                    None => Self::Protocol(tls.to_string()),
                }
            }
            rustls::Error::InvalidCertificate(other) => Self::Refused(Refusal::Unacceptable(other.to_string())),
            rustls::Error::NoCertificatesPresented => Self::NoCertificate,
            rustls::Error::AlertReceived(alert) => Self::RefusedHere(format!("{alert:?}")),
            other => Self::Protocol(other.to_string()),
        }
    }
}
