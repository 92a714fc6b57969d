//! A volume's configuration: read and changed in the catalogue itself, never in a cache.
//!
//! # Invariants
//! * A proposal replaces exactly the configuration that it follows: the stamp is compared, then the object's version.
//! * "Committed" and "lost" are said only of what was read or answered; whatever else happened is ambiguous, and the core
//!   then asks again.

use super::{BadConfiguration, Catalog, CatalogError, UpdateError, VolumeConfiguration};
use crate::protocol::{Configuration, Outcome, Stamp};
use crate::volume::VolumeId;

/// How often a proposal meets somebody else's change before its fate is left open: proposals are one per change of a
/// volume's copies, and there are few copies.
const ATTEMPTS: usize = 4;

/// Why a configuration was not read.
#[derive(Debug, thiserror::Error)]
pub enum ConfigurationError {
    /// The catalogue does not work.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// What is there is none.
    #[error("{0}: somebody else than Tandem has written it; restore the catalogue, or use `tandem recover`")]
    Bad(#[from] BadConfiguration),
}

impl Catalog {
    /// The committed configuration of the volume; `None` if it has none (any more).
    pub async fn configuration(&self, volume: VolumeId) -> Result<Option<Configuration>, ConfigurationError> {
        let stored = self.get::<VolumeConfiguration>(&volume.to_string()).await?;
        Ok(stored.map(|stored| Configuration::try_from(&stored.object)).transpose()?)
    }

    /// Replaces the volume's configuration by `next` if its stamp still is `expected`. What is not known is read back.
    pub async fn propose(&self, volume: VolumeId, expected: Stamp, next: &Configuration) -> Outcome {
        for _ in 0..ATTEMPTS {
            match self.attempt(volume, expected, next).await {
                Ok(Some(outcome)) => return outcome,
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(%volume, %error, "it is not known whether a configuration was committed");
                    return Outcome::Ambiguous;
                }
            }
        }
        Outcome::Ambiguous
    }

    /// `None`: somebody has changed it, and what is there now decides; or it is not known, and reading back may tell.
    async fn attempt(
        &self,
        volume: VolumeId,
        expected: Stamp,
        next: &Configuration,
    ) -> Result<Option<Outcome>, ConfigurationError> {
        let Some(mut stored) = self.get::<VolumeConfiguration>(&volume.to_string()).await? else {
            tracing::warn!(%volume, "a configuration cannot be changed: the catalogue has none of this volume");
            return Ok(Some(Outcome::Ambiguous));
        };
        let current = Configuration::try_from(&stored.object)?;
        if current == *next {
            return Ok(Some(Outcome::Committed));
        }
        if current.stamp > expected {
            return Ok(Some(Outcome::Lost(Box::new(current))));
        }
        if current.stamp < expected {
            // An old catalogue was restored. A copy never goes back; people decide what is right.
            tracing::error!(%volume, found = ?current.stamp, here = ?expected, "the catalogue is older than this copy: use `tandem recover`");
            return Ok(Some(Outcome::Ambiguous));
        }
        stored.object = VolumeConfiguration::new(volume, next);
        match self.update(stored).await {
            Ok(_) => Ok(Some(Outcome::Committed)),
            Err(UpdateError::Conflict { .. }) => Ok(None),
            Err(UpdateError::Ambiguous { reason, .. }) => {
                tracing::info!(%volume, reason, "a proposal without an answer is read back");
                match self.configuration(volume).await? {
                    // Not executed yet; it may still arrive.
                    Some(found) if found.stamp == expected => Ok(Some(Outcome::Ambiguous)),
                    _ => Ok(None),
                }
            }
            Err(UpdateError::Failed(error)) => Err(error.into()),
        }
    }
}
