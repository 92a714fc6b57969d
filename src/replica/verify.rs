//! Verification of a volume: every sealed layer below it against its checksums, with progress for a person who waits.

use super::manager::{Manager, VolumeFailure};
use crate::rpc::control::VerifyVolumeResponse;
use crate::store::Directory;
use crate::store::verify::{Finding, VerifyPlan, verify};
use crate::volume::{BLOCK_SIZE, VolumeId};
use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tonic::Status;

/// Time between two progress messages.
const INTERVAL: Duration = Duration::from_millis(200);

/// A verification that is ready to run without the volume's owner.
pub struct VerifyJob {
    volume: VolumeId,
    path: PathBuf,
    plan: VerifyPlan,
}

/// Takes the plan from the owner of the volume.
pub async fn prepare(manager: &Manager, volume: VolumeId) -> Result<VerifyJob, VolumeFailure> {
    let (path, plan) = manager.verify_plan(volume).await?;
    Ok(VerifyJob { volume, path, plan })
}

impl VerifyJob {
    /// Reads and compares, sending progress; the last message has the findings. Blocking.
    pub fn run(self, send: &mpsc::Sender<Result<VerifyVolumeResponse, Status>>) {
        let result = self.walk(send);
        let last = match result {
            Ok(found) => Ok(found),
            Err(error) => Err(Status::unavailable(format!("volume {}: verification stopped: {error}", self.volume))),
        };
        // A person who pressed Ctrl-C reads no result.
        let _ = send.blocking_send(last);
    }

    fn walk(&self, send: &mpsc::Sender<Result<VerifyVolumeResponse, Status>>) -> io::Result<VerifyVolumeResponse> {
        let files = Directory::new(&self.path);
        let mut answer = VerifyVolumeResponse {
            total_bytes: self.plan.blocks() * BLOCK_SIZE,
            unchecked_bytes: self.plan.unchecked_blocks * BLOCK_SIZE,
            ..Default::default()
        };
        let mut told = Instant::now();
        let report = verify(&self.plan, &files, &mut |blocks| {
            if told.elapsed() < INTERVAL {
                return ControlFlow::Continue(());
            }
            told = Instant::now();
            let so_far = VerifyVolumeResponse { checked_bytes: blocks * BLOCK_SIZE, ..answer.clone() };
            if send.blocking_send(Ok(so_far)).is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        answer.checked_bytes = report.blocks * BLOCK_SIZE;
        answer.problem_count = report.wrong;
        answer.problems = report.findings.iter().map(|f| self.sentence(f)).collect();
        Ok(answer)
    }

    fn sentence(&self, found: &Finding) -> String {
        let Finding { layer, block, physical, problem } = found;
        let (volume, at) = (self.volume, self.path.join("data"));
        format!("volume {volume}, block {block} (layer {layer}, block {physical} of {}): {problem}", at.display())
    }
}
