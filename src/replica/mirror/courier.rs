//! Between one copy and the catalogue: carries proposals there, and answers, configurations and wishes back.
//!
//! Invariants: everything that is told was read from the catalogue after it was asked for; while the catalogue is out of
//! reach it is tried again, more and more seldom, and nothing else of the copy waits for it. A catalogue that has no
//! configuration of the volume, or an older one than the copy, says nothing at all: it was lost, or restored from a backup.

use super::{FIRST_PAUSE, LAST_PAUSE, OlderCatalogue};
use crate::catalog::{Catalog, ConfigurationError, Volume};
use crate::crash::crash_point;
use crate::protocol::Outcome;
use crate::replica::engine::{CatalogueRequest, EngineError, EngineHandle, MirrorInput};
use crate::replica::peer::Session;
use crate::volume::{InstanceId, VolumeId};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;

/// Asks for a look at the catalogue. The answer, when the engine was told: whether this copy is wished to be primary, or
/// why the catalogue could not be read.
pub type Refresh = Option<oneshot::Sender<Result<bool, String>>>;
/// Where that is asked.
pub type Refresher = mpsc::Sender<Refresh>;

/// Why the engine was not told what the catalogue says.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Catalogue(#[from] ConfigurationError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Older(#[from] OlderCatalogue),
}

/// See the module.
pub(super) struct Courier {
    pub catalog: Catalog,
    pub engine: EngineHandle,
    pub session: Arc<Session>,
    pub volume: VolumeId,
    pub copy: InstanceId,
}

impl Courier {
    /// Until nobody asks any more.
    pub async fn run(self, mut requests: mpsc::Receiver<CatalogueRequest>, mut refreshes: mpsc::Receiver<Refresh>) {
        let (mut look, mut pause) = (true, FIRST_PAUSE);
        loop {
            if look {
                match self.tell_what_is_there().await {
                    Ok(_) => (look, pause) = (false, FIRST_PAUSE),
                    Err(error) => tracing::debug!(volume = %self.volume, %error, "the catalogue is asked again"),
                }
            }
            tokio::select! {
                request = requests.recv() => match request {
                    Some(CatalogueRequest::Read) => look = true,
                    Some(CatalogueRequest::Propose { expected, next }) => {
                        let stamp = next.stamp;
                        crash_point("mirror.propose");
                        let outcome = self.catalog.propose(self.volume, expected, &next).await;
                        crash_point("mirror.proposed");
                        if outcome == Outcome::Ambiguous {
                            sleep(pause).await;
                            pause = longer(pause);
                        }
                        self.tell(MirrorInput::Proposed { stamp, outcome }).await;
                    }
                    None => return,
                },
                refresh = refreshes.recv() => match refresh {
                    Some(None) => look = true,
                    Some(Some(answer)) => {
                        let told = self.tell_what_is_there().await.map_err(|error| error.to_string());
                        look = told.is_err();
                        // Whoever asked may have given up.
                        let _ = answer.send(told);
                    }
                    None => return,
                },
                () = sleep(pause), if look => pause = longer(pause),
            }
        }
    }

    /// Reads the size, the wish and the configuration, and tells the engine. Whether this copy shall be primary.
    async fn tell_what_is_there(&self) -> Result<bool, Trouble> {
        // Before the catalogue is read: what the copy learns meanwhile may be newer than what was read.
        let status = self.engine.mirror_status(self.volume).await?;
        let (here, term) = status.map_or((None, None), |status| (Some(status.configuration.stamp), status.term));
        let stored = self.catalog.get::<Volume>(&self.volume.to_string()).await.map_err(ConfigurationError::from)?;
        let Some(configuration) = self.catalog.configuration(self.volume).await? else { return Ok(false) };
        OlderCatalogue::check(configuration.stamp, here)?;
        let volume = stored.map(|stored| stored.object).filter(|volume| !volume.spec.deleted);
        if let Some(volume) = &volume {
            self.engine.tell_mirror(self.volume, MirrorInput::Size(volume.status.size)).await?;
        }
        let wish = volume.and_then(|volume| volume.spec.mirror);
        // While a node without a copy uses the volume, no node with one does.
        let wished = wish.as_ref().is_some_and(|mirror| mirror.primary == Some(self.copy) && mirror.client.is_none());
        // Of a volume that is gone or shall go nothing is wished: its copies stay as they are until they are removed.
        if let Some(mirror) = wish {
            let client = mirror.client.as_ref().map(|client| client.publication);
            self.engine.tell_mirror(self.volume, MirrorInput::Client { client, term }).await?;
            self.engine.tell_mirror(self.volume, MirrorInput::Wish(mirror.wish())).await?;
        }
        self.session.set_generation(configuration.stamp.generation);
        self.engine.tell_mirror(self.volume, MirrorInput::Configuration(Box::new(configuration))).await?;
        Ok(wished)
    }

    async fn tell(&self, input: MirrorInput) {
        if let Err(error) = self.engine.tell_mirror(self.volume, input).await {
            tracing::warn!(volume = %self.volume, %error, "an answer of the catalogue was not heard");
        }
    }
}

fn longer(pause: Duration) -> Duration {
    (pause * 2).min(LAST_PAUSE)
}
