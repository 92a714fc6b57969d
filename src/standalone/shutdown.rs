//! The end of a server: says what waits for its return, then stops the processes in order.

use super::child::Child;
use crate::cli::volumes_in_use;
use std::path::Path;
use std::time::Duration;

/// How long calls under way may take: a mkfs or a snapshot, not a copy.
const CSI_PATIENCE: Duration = Duration::from_secs(10);
/// How long the engine may take to finish what it has on the disk.
const REPLICA_PATIENCE: Duration = Duration::from_secs(10);
/// The engine may be dead at this moment: the server ends all the same.
const ASK_PATIENCE: Duration = Duration::from_secs(2);

/// Stops CSI, so that nothing new begins, then the engine. The holder ends by itself when it holds nothing.
pub async fn run(dir: &Path, replica: Child, csi: Child) {
    csi.stop(CSI_PATIENCE).await;
    match tokio::time::timeout(ASK_PATIENCE, volumes_in_use(dir)).await {
        Ok(Ok(waiting)) if waiting.is_empty() => {}
        Ok(Ok(waiting)) => {
            println!(
                "{} volumes are still in use: {}. Their devices stand still, without an error, until tandem is started \
                 again (`tandem standalone --dir {}`); the holder process keeps them",
                waiting.len(),
                waiting.join(", "),
                dir.display()
            );
        }
        Ok(Err(error)) => tracing::warn!("cannot say which volumes are in use: {error}"),
        Err(_) => tracing::warn!("cannot say which volumes are in use: the engine does not answer"),
    }
    replica.stop(REPLICA_PATIENCE).await;
    println!("tandem has ended");
}
