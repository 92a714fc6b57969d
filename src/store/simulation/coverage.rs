//! What a simulation went through.

/// How often what happened, so that a simulation that tests nothing is noticed.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    pub steps: u64,
    pub kills: u64,
    pub power_cuts: u64,
    pub crashes_in_jobs: u64,
    pub crashes_in_open: u64,
    pub failures: u64,
    pub no_space: u64,
    pub full_opens: u64,
    pub owed_checkpoints: u64,
    pub seals: u64,
    pub clones: u64,
    pub fills: u64,
    pub deletions: u64,
    pub checkpoints: u64,
    pub merged: u64,
    pub checksummed: u64,
    pub flips_detected: u64,
    pub flips_harmless: u64,
    pub flips_in_data: u64,
    /// Of the mirrored volume, where there is one.
    pub leaves: u64,
    pub plans: u64,
}

const FULL_OPENS: &str = "opens without space";

impl Coverage {
    fn fields(&mut self) -> [(&'static str, &mut u64); 19] {
        [
            ("steps", &mut self.steps),
            ("kills", &mut self.kills),
            ("power cuts", &mut self.power_cuts),
            ("crashes in jobs", &mut self.crashes_in_jobs),
            ("crashes in open", &mut self.crashes_in_open),
            ("failures", &mut self.failures),
            ("no space", &mut self.no_space),
            (FULL_OPENS, &mut self.full_opens),
            ("checkpoints owed", &mut self.owed_checkpoints),
            ("seals", &mut self.seals),
            ("clones", &mut self.clones),
            ("fills", &mut self.fills),
            ("deletions", &mut self.deletions),
            ("checkpoints", &mut self.checkpoints),
            ("merged", &mut self.merged),
            ("checksummed", &mut self.checksummed),
            ("flips detected", &mut self.flips_detected),
            ("flips harmless", &mut self.flips_harmless),
            ("flips in data", &mut self.flips_in_data),
        ]
    }

    pub fn add(&mut self, other: &Self) {
        let mut other = other.clone();
        for ((_, sum), (_, more)) in self.fields().into_iter().zip(other.fields()) {
            *sum += *more;
        }
        self.leaves += other.leaves;
        self.plans += other.plans;
    }

    /// Every kind of event happened, if there were seeds enough for that. But for trees that did not open for lack of space: only
    /// logs that are full to their last block do that, and tests/full.rs fills them.
    pub fn assert_all_seen(&self, seeds: u64) {
        let mut this = self.clone();
        let fields =
            this.fields().into_iter().filter(|(name, count)| **count == 0 && seeds >= 1000 && *name != FULL_OPENS);
        let missing: Vec<_> = fields.map(|(name, _)| name).collect();
        assert!(missing.is_empty(), "never happened: {missing:?}");
    }
}
