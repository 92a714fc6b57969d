//! TLS configurations from a directory of certificates, read again when its files change.
//!
//! # Invariants
//! * TLS 1.3 with mutual authentication, and no resumption: every connection shows its certificate anew, so a replaced
//!   authority or an expired certificate ends at the next connection. Connections that are open go on.
//! * Files that cannot be used, because they are half replaced or wrong, change nothing: what was loaded before stays in
//!   use, and each such state of the files is logged once.

use super::files::{self, AUTHORITY, CERTIFICATE, FileError, KEY};
use super::identity::{Identity, Role};
use super::peer::{Expected, Verifier};
use super::verify::{Anchors, Refusal};
use rustls::CipherSuite;
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::NoServerSessionStorage;
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Why a directory of certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// The authority's certificate.
    #[error("{path}: {refusal}")]
    Authority {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        refusal: Refusal,
    },
    /// The own certificate: peers would refuse it.
    #[error("{path}: {refusal}")]
    Own {
        /// Which file.
        path: PathBuf,
        /// What they would say.
        refusal: Refusal,
    },
    /// Not a key, or another certificate's.
    #[error("{path} is not the private key of {CERTIFICATE} beside it: {reason}")]
    Key {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// Certificates as they were in the files at one moment.
#[derive(Debug)]
pub struct Loaded {
    own: Identity,
    anchors: Arc<Anchors>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    provider: Arc<CryptoProvider>,
}

/// AES-128 first, where both sides have it as all versions do: it takes a quarter less of the processor than AES-256, and no one
/// breaks either.
fn provider() -> CryptoProvider {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider
}

impl Loaded {
    fn read(directory: &Path) -> Result<Self, CredentialsError> {
        let authority = |refusal| CredentialsError::Authority { path: directory.join(AUTHORITY), refusal };
        let own = |refusal| CredentialsError::Own { path: directory.join(CERTIFICATE), refusal };
        let wrong = |reason: String| CredentialsError::Key { path: directory.join(KEY), reason };
        let anchors = Anchors::parse(&files::read(directory, AUTHORITY)?).map_err(authority)?;
        let certificate = files::read(directory, CERTIFICATE)?;
        let identity = anchors.check_pem(&certificate).map_err(own)?;
        let chain = CertificateDer::pem_slice_iter(certificate.as_bytes()).collect::<Result<Vec<_>, _>>();
        let chain = chain.map_err(|error| own(Refusal::Malformed(error.to_string())))?;
        let key = PrivateKeyDer::from_pem_slice(files::read(directory, KEY)?.as_bytes());
        let key = key.map_err(|error| wrong(error.to_string()))?;
        let provider = Arc::new(provider());
        let loaded = Self { own: identity, anchors: Arc::new(anchors), chain, key, provider };
        // A key of another certificate is found here, not at the first connection.
        loaded.server(None).map_err(|error| wrong(error.to_string()))?;
        Ok(loaded)
    }

    /// Trusts whom `trusted` trusts and shows what is in `own`, whatever peers will say of it.
    #[cfg(test)]
    pub(crate) fn unchecked(trusted: &Path, own: &Path) -> Self {
        let certificate = files::read(own, CERTIFICATE).expect("read");
        let chain = CertificateDer::pem_slice_iter(certificate.as_bytes()).map(|der| der.expect("a certificate"));
        let key = files::read(own, KEY).expect("read");
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("a key");
        Self { chain: chain.collect(), key, ..Self::read(trusted).expect("good certificates") }
    }

    /// Who this process is.
    pub fn own(&self) -> &Identity {
        &self.own
    }

    /// For a server that takes clients of this role, or anybody of the cluster.
    ///
    /// # Errors
    /// The key does not fit the certificate; [`Credentials::open`] and [`Credentials::current`] never return such a pair.
    pub fn server(&self, role: Option<Role>) -> Result<Arc<ServerConfig>, rustls::Error> {
        let verifier = Arc::new(self.verifier(Expected { role, name: None }));
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain.clone(), self.key.clone_key())?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    /// For a client that calls the one of this role and name.
    ///
    /// # Errors
    /// As [`Loaded::server`].
    pub fn client(&self, expected: Expected) -> Result<Arc<ClientConfig>, rustls::Error> {
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(self.verifier(expected)))
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())?;
        config.resumption = Resumption::disabled();
        // The address is no name: who answers is checked by the URI in the certificate.
        config.enable_sni = false;
        Ok(Arc::new(config))
    }

    fn verifier(&self, expected: Expected) -> Verifier {
        Verifier { anchors: Arc::clone(&self.anchors), provider: Arc::clone(&self.provider), expected }
    }
}

/// Certificates that are read again when their files change.
#[derive(Debug)]
pub struct Credentials {
    directory: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    loaded: Arc<Loaded>,
    /// The state of the files that was looked at last, good or not.
    seen: Fingerprint,
}

impl Credentials {
    /// Reads [`AUTHORITY`], [`CERTIFICATE`] and [`KEY`] in this directory.
    pub fn open(directory: &Path) -> Result<Self, CredentialsError> {
        let seen = fingerprint(directory);
        let loaded = Arc::new(Loaded::read(directory)?);
        Ok(Self { directory: directory.into(), state: Mutex::new(State { loaded, seen }) })
    }

    /// These, which are in no files.
    #[cfg(test)]
    pub(crate) fn fixed(loaded: Loaded) -> Self {
        let state = State { loaded: Arc::new(loaded), seen: [None; 3] };
        Self { directory: "no files".into(), state: Mutex::new(state) }
    }

    /// What the files hold now: asked for at each new connection. Costs three `stat` when nothing has changed.
    pub fn current(&self) -> Arc<Loaded> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // Before the files are read: a change in between is seen the next time.
        let now = fingerprint(&self.directory);
        if now != state.seen {
            state.seen = now;
            match Loaded::read(&self.directory) {
                Ok(loaded) => {
                    tracing::info!(identity = %loaded.own, "certificates were replaced and are in use");
                    state.loaded = Arc::new(loaded);
                }
                Err(error) => tracing::warn!(%error, "new certificates cannot be used: the ones before stay in use"),
            }
        }
        Arc::clone(&state.loaded)
    }
}

/// Enough of each file's metadata to see that it was written or replaced; `None` if it is not there.
type Fingerprint = [Option<[i64; 6]>; 3];

fn fingerprint(directory: &Path) -> Fingerprint {
    [AUTHORITY, CERTIFICATE, KEY].map(|name| {
        let file = std::fs::metadata(directory.join(name)).ok()?;
        let id = [file.dev().cast_signed(), file.ino().cast_signed(), file.size().cast_signed()];
        Some([id[0], id[1], id[2], file.mtime_nsec(), file.ctime(), file.ctime_nsec()])
    })
}

#[cfg(test)]
mod tests;
