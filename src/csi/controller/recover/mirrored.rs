//! Volumes with copies on several nodes, put back.
//!
//! # Invariants
//! * The object before the configuration: what nobody may act under harms nobody.
//! * Nothing is lowered: a configuration in the catalogue that is as new as what the copies know stays.
//! * What was read of the copies is older than what is read of the catalogue, so a volume of a sound catalogue is never
//!   taken for one of an old one.
//! * The copy that is in use stays wished: its application goes on. Otherwise the last primary is, or another member: somebody
//!   has to bring up to date whoever comes back. Nobody is wished of a volume that waits for copies that were not read.
//! * The size is never less than it was: it is one that each member holds.

use super::choice::{self, Choice, Copies};
use super::inventory::{self, Inventory};
use super::{ATTEMPTS, Raise, Report, Row, State, put, wanted};
use crate::catalog::{
    Catalog, CopySpec, MirrorSpec, NodeName, Replication, Stored, Volume, VolumeConfiguration, VolumePhase,
};
use crate::csi::errors::Transient;
use crate::protocol::{Configuration, Stamp};
use crate::rpc::control;
use crate::volume::{InstanceId, VolumeId, VolumeSize};
use std::collections::{BTreeMap, BTreeSet};

/// Everything about one volume.
struct Case<'a> {
    id: VolumeId,
    found: Copies,
    /// The copy whose name counts.
    best: &'a control::Volume,
    /// Of the copies that can be opened.
    sizes: BTreeMap<InstanceId, VolumeSize>,
    /// A copy has something, or a device.
    used: bool,
    inventory: &'a Inventory,
}

/// Puts one volume back, or leaves it alone, and says which.
pub(super) async fn put_back(
    inventory: &Inventory,
    id: VolumeId,
    copies: &[(NodeName, control::Volume)],
    raise: &mut Raise<'_>,
    report: &mut Report,
) -> Result<Row, Transient> {
    let (mut found, mut twice) = (Copies::new(), false);
    for (node, copy) in copies {
        match inventory::copy(id, node, copy) {
            Ok((instance, copy)) => twice |= found.insert(instance, copy).is_some(),
            Err(problem) => report.problems.push(problem),
        }
    }
    if twice {
        report.problems.push(format!("volume {id} is not put back: two nodes have the same copy of it"));
        return Ok(Row::left(id));
    }
    // One without a size could not be opened.
    let opened = copies.iter().filter(|(_, copy)| VolumeSize::try_from(copy.size_bytes).is_ok());
    let known =
        |node: &NodeName| found.values().filter(|copy| copy.node == *node).find_map(|c| c.configuration.as_ref());
    let best = opened.clone().max_by_key(|(node, _)| known(node).map(|known| known.stamp));
    let Some((_, best)) = best.filter(|_| !found.is_empty()) else {
        report
            .problems
            .push(format!("volume {id} is not put back: no copy of it can be used; its nodes' logs say why"));
        return Ok(Row::left(id));
    };
    let size_on = |node: &NodeName| {
        let (_, copy) = copies.iter().find(|(of, _)| of == node)?;
        VolumeSize::try_from(copy.size_bytes).ok()
    };
    let sizes = found.iter().filter_map(|(copy, of)| Some((*copy, size_on(&of.node)?))).collect();
    let used = copies.iter().any(|(_, copy)| copy.written || !copy.device.is_empty());
    let case = Case { id, found, best, sizes, used, inventory };
    let mut changed = String::new();
    for _ in 0..ATTEMPTS {
        match case.attempt(raise, report).await {
            Err(error @ Transient::Conflict(_)) => changed = error.to_string(),
            done => return done,
        }
    }
    // Others are put back nevertheless.
    report.problems.push(format!("volume {id} is left as it is: {changed}"));
    Ok(Row::left(id))
}

impl Row {
    fn left(volume: VolumeId) -> Self {
        let (name, nodes, missing) = Default::default();
        Self { volume, name, state: State::Left, configuration: None, nodes, missing }
    }
}

impl Case<'_> {
    async fn attempt(&self, raise: &mut Raise<'_>, report: &mut Report) -> Result<Row, Transient> {
        let catalog = raise.catalog;
        let there = catalog.get::<VolumeConfiguration>(&self.id.to_string()).await?;
        let now = there.as_ref().map(|stored| Configuration::try_from(&stored.object)).transpose();
        let now = now.map_err(|error| Transient::Conflict(error.to_string()))?;
        let choice = choice::choose(&self.found);
        if let Some(now) = now.filter(|now| choice::newest(&self.found).is_none_or(|newest| newest.stamp <= now.stamp))
        {
            // As new as anything that was found. Only the object may be lost.
            let (stored, state) = self.object(catalog, &now, self.wish(&now), report).await?;
            let state = if self.raise(catalog, stored, &now).await? { State::Raised } else { state };
            return self.row(catalog, state, Some(now.stamp), Vec::new()).await;
        }
        match choice {
            Choice::Complete(base) => {
                let (stored, state) = self.object(catalog, &base, self.wish(&base), report).await?;
                if state == State::Kept {
                    self.follow(catalog, stored, &base).await?;
                }
                let next = choice::raised(&base, raise.generation().await?);
                write(catalog, there, &next, self.id).await?;
                let state = if state == State::Kept { State::Raised } else { state };
                self.row(catalog, state, Some(next.stamp), Vec::new()).await
            }
            Choice::Missing { newest, missing } => {
                let missing: Vec<_> = missing.iter().map(|copy| self.place(copy)).collect();
                if let Some(newest) = newest {
                    self.object(catalog, &newest, None, report).await?;
                }
                report.problems.push(self.advice(&missing));
                self.row(catalog, State::Waits, there.map(|stored| stored.object.stamp()), missing).await
            }
            Choice::Split(stamp) => {
                let (generation, version) = (stamp.generation.0, stamp.version.0);
                report.problems.push(format!(
                    "volume {} has two histories of version {generation}.{version}: look at both copies, then give one up \
                     with `tandem promote {} NODE --force`",
                    self.id, self.id
                ));
                if let Some(newest) = choice::newest(&self.found) {
                    self.object(catalog, newest, None, report).await?;
                }
                self.row(catalog, State::Waits, there.map(|stored| stored.object.stamp()), Vec::new()).await
            }
            Choice::Going => {
                let missing = self.unread();
                report.problems.push(self.going(&missing));
                Ok(Row { missing, ..Row::left(self.id) })
            }
            Choice::Unused => {
                report.problems.push(format!(
                    "volume {} was being made and has never been used: what was made of it stays on its nodes",
                    self.id
                ));
                Ok(Row::left(self.id))
            }
        }
    }

    /// The object in the catalogue, made if it was not there.
    async fn object(
        &self,
        catalog: &Catalog,
        configuration: &Configuration,
        wish: Option<InstanceId>,
        report: &mut Report,
    ) -> Result<(Stored<Volume>, State), Transient> {
        let key = self.id.to_string();
        let missing = || Transient::Conflict(format!("volume {key}"));
        if let Some(stored) = catalog.get::<Volume>(&key).await? {
            report.kept += 1;
            return Ok((stored, State::Kept));
        }
        let copies = self.copies(configuration);
        let replicas = u8::try_from(copies.len()).unwrap_or(u8::MAX);
        let volume = wanted(self.id, self.best, Replication::Sync { replicas }, report);
        let mut volume = volume.ok_or_else(missing)?;
        volume.status.size = self.least(configuration).unwrap_or(volume.status.size);
        volume.spec.size = volume.status.size;
        volume.spec.mirror = Some(MirrorSpec { primary: wish, ..MirrorSpec::new(copies) });
        volume.status.copies = configuration.copies().collect();
        volume.status.phase = VolumePhase::Ready;
        report.volumes += u64::from(put(catalog, volume, |volume, name| volume.request.name = name, report).await?);
        let stored = catalog.get::<Volume>(&key).await?.ok_or_else(missing)?;
        Ok((stored, State::PutBack))
    }

    /// An object of an old catalogue: where the copies are now, and who is in use.
    async fn follow(
        &self,
        catalog: &Catalog,
        mut stored: Stored<Volume>,
        configuration: &Configuration,
    ) -> Result<(), Transient> {
        let before = stored.object.clone();
        let Volume { spec, status, .. } = &mut stored.object;
        let in_use = choice::in_use(&self.found, configuration);
        let copies = self.copies(configuration);
        // Where it is not in use any more nobody would ever unpublish it; and a node without a copy has another publication, or
        // its device ends with the old configuration: it is published there again, which then is a new one.
        let mut published = std::mem::take(&mut spec.publications);
        if let Some(node) = in_use.and_then(|copy| copies.get(&copy)).map(|spec| spec.node.clone()) {
            let known = published.remove(&node).or_else(|| published.pop_first().map(|(_, was)| was));
            spec.publications.extend(known.map(|known| (node, known)));
        }
        // Others were given up since, and nobody would ever take them out.
        status.copies = configuration.copies().collect();
        // The backup may be from before its callers knew it; they do now.
        status.phase = VolumePhase::Ready;
        // A deletion of what was used since is of a half made volume, or was taken back. If not, it is repeated.
        spec.deleted &= !self.used;
        self.grow(&mut stored.object, configuration);
        let Volume { spec, .. } = &mut stored.object;
        let wished = spec.mirror.as_ref().and_then(|mirror| mirror.primary).filter(|copy| copies.contains_key(copy));
        let primary = in_use.or(wished).or_else(|| self.wish(configuration));
        spec.mirror = Some(MirrorSpec { primary, ..MirrorSpec::new(copies) });
        if stored.object != before {
            catalog.update(stored).await?;
        }
        Ok(())
    }

    /// The volume was made, or has grown since the backup, which changes no configuration. Whether it was made.
    async fn raise(
        &self,
        catalog: &Catalog,
        mut stored: Stored<Volume>,
        configuration: &Configuration,
    ) -> Result<bool, Transient> {
        let was_made = self.finish(&mut stored.object);
        if self.grow(&mut stored.object, configuration) || was_made {
            catalog.update(stored).await?;
        }
        Ok(was_made)
    }

    /// A volume that the catalogue calls half made is ready if all of it is there, or if it was used. Whether it is another now.
    fn finish(&self, volume: &mut Volume) -> bool {
        let Volume { spec, status, .. } = volume;
        let is_there =
            spec.mirror.iter().flat_map(|mirror| mirror.copies.keys()).all(|copy| self.found.contains_key(copy));
        if status.phase != VolumePhase::Creating || !(self.used || (is_there && !spec.deleted)) {
            return false;
        }
        status.phase = VolumePhase::Ready;
        spec.deleted = false;
        if let Some(mirror) = &spec.mirror {
            status.copies.extend(mirror.copies.keys().filter(|copy| self.found.contains_key(copy)));
        }
        true
    }

    fn grow(&self, volume: &mut Volume, configuration: &Configuration) -> bool {
        let Some(least) = self.least(configuration).filter(|least| *least > volume.status.size) else { return false };
        volume.status.size = least;
        volume.spec.size = volume.spec.size.max(least);
        true
    }

    /// What each member that was read can hold: each has confirmed a size before it became the volume's.
    fn least(&self, configuration: &Configuration) -> Option<VolumeSize> {
        configuration.members().filter_map(|copy| self.sizes.get(&copy)).min().copied()
    }

    /// Who shall be primary.
    fn wish(&self, configuration: &Configuration) -> Option<InstanceId> {
        let stays = |copy: &InstanceId| self.found.get(copy).is_some_and(|found| !found.removing);
        let last = configuration.primary.filter(stays);
        choice::in_use(&self.found, configuration).or(last).or_else(|| configuration.members().find(stays))
    }

    /// Where the copies shall be: those that the configuration names and that do not go.
    fn copies(&self, configuration: &Configuration) -> BTreeMap<InstanceId, CopySpec> {
        let spec = |copy: InstanceId| match self.found.get(&copy) {
            Some(found) if found.removing => None,
            Some(found) => Some((copy, CopySpec { node: found.node.clone(), pool: found.pool.clone() })),
            // Its pool matters only where it is made, and it is not made again.
            None => Some((copy, CopySpec { node: self.node_of(&copy)?, pool: self.best.pool.clone() })),
        };
        configuration.copies().filter_map(spec).collect()
    }

    fn node_of(&self, copy: &InstanceId) -> Option<NodeName> {
        self.found.values().find_map(|found| found.peers.get(copy).cloned())
    }

    /// Where a copy is that was not read, for people.
    fn place(&self, copy: &InstanceId) -> String {
        match self.node_of(copy) {
            Some(node) if self.inventory.read.contains(&node) => match self.inventory.closed(&node) {
                Some(closed) => format!("{node} (it answers, and not everything is open there: {closed})"),
                None => format!("{node} (it answers and does not have the copy: is its pool missing?)"),
            },
            Some(node) => node.0,
            None => format!("an unknown node (copy {copy})"),
        }
    }

    /// Where copies are that the ones that were read know of, and whose nodes were not read, or have more than was read.
    fn unread(&self) -> Vec<String> {
        let named = choice::newest(&self.found).into_iter().flat_map(Configuration::copies);
        let peers = self.found.values().flat_map(|found| found.peers.keys().copied());
        let all_read = |node: &NodeName| self.inventory.read.contains(node) && self.inventory.closed(node).is_none();
        let was_read = |copy: &InstanceId| self.node_of(copy).is_some_and(|node| all_read(&node));
        let unread: BTreeSet<_> =
            named.chain(peers).filter(|copy| !self.found.contains_key(copy) && !was_read(copy)).collect();
        unread.iter().map(|copy| self.place(copy)).collect()
    }

    fn going(&self, missing: &[String]) -> String {
        if missing.is_empty() {
            return format!("volume {} was being deleted: what is left of it stays on its nodes", self.id);
        }
        format!(
            "volume {} is not put back: each copy of it that was read was being removed, and those on {} may be kept: bring them \
             back and repeat this",
            self.id,
            missing.join(", ")
        )
    }

    fn advice(&self, missing: &[String]) -> String {
        format!(
            "volume {} waits: copies were not read that may have newer writes, on {}; bring them back and repeat this, or give \
             them up with `tandem promote {} NODE --force`",
            self.id,
            missing.join(", "),
            self.id
        )
    }

    async fn row(
        &self,
        catalog: &Catalog,
        state: State,
        configuration: Option<Stamp>,
        missing: Vec<String>,
    ) -> Result<Row, Transient> {
        let stored = catalog.get::<Volume>(&self.id.to_string()).await?;
        let name = stored.map(|stored| stored.object.request.name).unwrap_or_default();
        let nodes: BTreeSet<_> = self.found.values().map(|copy| copy.node.clone()).collect();
        Ok(Row { volume: self.id, name, state, configuration, nodes: nodes.into_iter().collect(), missing })
    }
}

/// In place of the one that was read, and of no other.
pub(super) async fn write(
    catalog: &Catalog,
    there: Option<Stored<VolumeConfiguration>>,
    next: &Configuration,
    id: VolumeId,
) -> Result<(), Transient> {
    let object = VolumeConfiguration::new(id, next);
    match there {
        // A configuration is never lowered.
        Some(stored) if stored.object.stamp() >= next.stamp => {
            return Err(Transient::Conflict(format!("configuration of volume {id}")));
        }
        Some(stored) => drop(catalog.update(Stored { object, ..stored }).await?),
        None => drop(catalog.create(object).await?),
    }
    Ok(())
}
