//! Volumes that are there change: they grow, are modified, and become one copy of several.
//!
//! Invariants: space is promised before a tree grows; a device is as large as its volume, and that of a mirrored one as what
//! the catalogue says that every copy can hold, however large the copy here is.

use super::errors::VolumeFailure as Failure;
use super::mirror::{MirrorPlace, copy_record};
use super::{Manager, VolumePlace, growth};
use crate::crash::crash_point;
use crate::replica::records::Record;
use crate::store::{Control, VolumeInfo};
use crate::volume::{InstanceId, VolumeId, VolumeSize};
use std::path::{Path, PathBuf};

/// Bytes of a sector as sysfs counts them, whatever the device's own are.
const SYSFS_SECTOR: u64 = 512;

impl Manager {
    /// Grows the volume. A size that is not larger changes nothing.
    pub async fn expand_volume(&self, volume: VolumeId, size: VolumeSize) -> Result<(), Failure> {
        let place = self.place(volume).ok_or(Failure::NoVolume(volume))?;
        let _guard = self.begin(volume, &[volume.to_bytes(), place.tree.to_bytes()]).await?;
        if self.copy_here(volume).is_some() {
            return Err(Failure::Mirrored(volume));
        }
        self.grow(volume, &place, size).await?;
        if place.device.is_some() {
            crash_point("resize.device");
            // Also after a call that was cut off between the two: the device may still have the old size.
            self.engine().resized(volume).await.map_err(|error| Failure::Engine { volume, error })?;
        }
        Ok(())
    }

    /// Needs the operations of the volume and of its tree.
    async fn grow(&self, volume: VolumeId, place: &VolumePlace, size: VolumeSize) -> Result<(), Failure> {
        if place.copy.is_some() {
            return Err(Failure::NotReady(volume));
        }
        let info = self.volume_info(place.tree, volume).await.ok_or(Failure::NoVolume(volume))?;
        if info.size < size {
            let pool = self.pool(&place.pool).ok_or_else(|| Failure::NoPool(place.pool.clone()))?;
            let promise = self.promise(&place.pool, &pool, growth(size.bytes() - info.size.bytes())).await?;
            self.control(volume, place.tree, Control::Resize { volume, size }).await?;
            promise.settle(place.tree, self.promised_bytes(place.tree).await);
        }
        Ok(())
    }

    /// Changes what is given, online.
    pub async fn modify_volume(
        &self,
        volume: VolumeId,
        verify_reads: Option<bool>,
        descriptor: Option<String>,
    ) -> Result<(), Failure> {
        let place = self.place(volume).ok_or(Failure::NoVolume(volume))?;
        let _guard = self.begin(volume, &[volume.to_bytes()]).await?;
        if place.copy.is_some() {
            return Err(Failure::NotReady(volume));
        }
        if let Some(descriptor) = descriptor {
            let pool = self.pool(&place.pool).ok_or_else(|| Failure::NoPool(place.pool.clone()))?;
            let record = Record::new(descriptor.clone(), None);
            self.write_record(&pool, place.tree, volume, &volume.to_string(), record).await?;
            if let Some(place) = self.index().volumes.get_mut(&volume) {
                place.descriptor = descriptor;
            }
        }
        if let Some(verify_reads) = verify_reads {
            self.control(volume, place.tree, Control::Modify { volume, verify_reads }).await?;
        }
        Ok(())
    }

    /// The copy can hold so much, if its pool can promise it; its device does not change before [`Self::resize_device`].
    pub async fn grow_copy(&self, volume: VolumeId, size: VolumeSize) -> Result<(), Failure> {
        let place = self.place(volume).ok_or(Failure::NoVolume(volume))?;
        let _guard = self.begin(volume, &[volume.to_bytes(), place.tree.to_bytes()]).await?;
        self.grow(volume, &place, size).await
    }

    /// What the volume's tree says of it.
    pub async fn copy_info(&self, volume: VolumeId) -> Result<VolumeInfo, Failure> {
        let place = self.place(volume).ok_or(Failure::NoVolume(volume))?;
        self.volume_info(place.tree, volume).await.ok_or(Failure::NoVolume(volume))
    }

    /// The device of a mirrored volume, with a copy here or without one, becomes as large as its core says. It waits with the
    /// requests that are under way, which may wait for other nodes: no operation is held meanwhile, so that the device can be given up.
    pub async fn resize_device(&self, volume: VolumeId) -> Result<(), Failure> {
        let engine = |error| Failure::Engine { volume, error };
        let found = if let Some(place) = self.place(volume) {
            let status = self.engine().mirror_status(volume).await.map_err(engine)?;
            place.device.zip(status.map(|status| status.size))
        } else {
            let status = self.engine().client_status(volume).await.map_err(engine)?;
            status.and_then(|status| Some((status.device?, status.size)))
        };
        let Some((device, size)) = found else { return Ok(()) };
        // Also after an attempt that failed between the two.
        if device_size(device).await != Some(size.bytes()) {
            crash_point("resize.device");
            self.engine().resized(volume).await.map_err(engine)?;
        }
        Ok(())
    }

    /// The tree of a volume that has one copy, which is here.
    pub fn sole_tree(&self, volume: VolumeId) -> Option<InstanceId> {
        self.place(volume).filter(|place| place.mirror.is_none()).map(|place| place.tree)
    }

    /// The volume's only copy becomes one of several, in use or not.
    pub async fn join_mirror(&self, volume: VolumeId, record: String) -> Result<(), Failure> {
        let _guard = self.begin(volume, &[volume.to_bytes()]).await?;
        let place = self.place(volume).ok_or(Failure::NoVolume(volume))?;
        if place.copy.is_some() {
            return Err(Failure::NotReady(volume));
        }
        let pool = self.pool(&place.pool).ok_or_else(|| Failure::NoPool(place.pool.clone()))?;
        let written = Record::new(record.clone(), None);
        self.write_record(&pool, place.tree, volume, &copy_record(volume), written).await?;
        if let Some(place) = self.index().volumes.get_mut(&volume) {
            place.mirror = Some(MirrorPlace::closed(record));
        }
        Ok(())
    }
}

/// As the kernel has it now; the device is not opened, since nobody may serve it.
async fn device_size(device: PathBuf) -> Option<u64> {
    let read = move || {
        let name = Path::new(&device).file_name()?.to_owned();
        let text = std::fs::read_to_string(Path::new("/sys/class/block").join(name).join("size")).ok()?;
        text.trim().parse::<u64>().ok().map(|sectors| sectors * SYSFS_SECTOR)
    };
    tokio::task::spawn_blocking(read).await.ok().flatten()
}
