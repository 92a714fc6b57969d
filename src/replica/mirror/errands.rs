//! What is done for volumes, each in a task of its own: whoever follows the catalogue waits for one for a moment only.
//!
//! # Invariants
//! * There is one errand at a time for a subject; its steps are in the order in which they are written.
//! * An errand that takes long is not given up, and whatever comes for its subject meanwhile waits for its end.
//! * All of them end with their owner.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

/// How long others wait for one errand: if no disk holds it up, it has ended by then.
pub(super) const SOON: Duration = Duration::from_secs(1);

/// See the module. `S` is what an errand is for, `R` what it brings back.
pub(super) struct Errands<S, R> {
    tasks: JoinSet<(S, R)>,
    /// Those that are under way, and whether something has come for them since.
    under_way: BTreeMap<S, bool>,
}

/// One that has ended.
pub(super) struct Ended<S, R> {
    pub subject: S,
    pub result: R,
    /// Something has come for it while it was under way.
    pub again: bool,
}

impl<S: Copy + Ord + Send + 'static, R: Send + 'static> Errands<S, R> {
    pub fn new() -> Self {
        Self { tasks: JoinSet::new(), under_way: BTreeMap::new() }
    }

    /// Something has come for this subject: whether an errand for it is under way, which is told so at its end.
    pub fn note(&mut self, subject: S) -> bool {
        let known = self.under_way.get_mut(&subject);
        known.map(|again| *again = true).is_some()
    }

    /// Begins one. There is none for this subject.
    pub fn begin(&mut self, subject: S, errand: impl Future<Output = R> + Send + 'static) {
        assert!(self.under_way.insert(subject, false).is_none(), "one errand at a time for a subject");
        self.tasks.spawn(async move { (subject, errand.await) });
    }

    /// The next one that ends. Without any, this waits for ever. A call that is dropped loses none.
    pub async fn next(&mut self) -> Ended<S, R> {
        let (subject, result) = match self.tasks.join_next().await {
            Some(Ok(ended)) => ended,
            Some(Err(error)) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime ends, and this with it.
                Err(_) => std::future::pending().await,
            },
            None => std::future::pending().await,
        };
        let again = self.under_way.remove(&subject).unwrap_or_default();
        Ended { subject, result, again }
    }

    /// The same, if that is before `until`.
    pub async fn next_before(&mut self, until: Instant) -> Option<Ended<S, R>> {
        timeout_at(until, self.next()).await.ok()
    }

    /// Those that are under way.
    pub fn subjects(&self) -> impl Iterator<Item = S> + '_ {
        self.under_way.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::oneshot;

    fn shortly() -> Instant {
        Instant::now() + Duration::from_millis(50)
    }

    #[tokio::test]
    async fn one_that_hangs_holds_nobody_up_and_what_comes_for_it_meanwhile_waits_for_its_end() {
        let mut errands = Errands::<u8, Result<&str, oneshot::error::RecvError>>::new();
        let (go_on, hangs) = oneshot::channel();
        errands.begin(1, hangs);
        assert!(errands.next_before(shortly()).await.is_none(), "it hangs");
        errands.begin(2, async { Ok("well") });
        let ended = errands.next_before(Instant::now() + SOON).await.expect("it does not");
        assert_eq!((ended.subject, ended.result, ended.again), (2, Ok("well"), false));
        assert!(errands.note(1) && !errands.note(2), "only the first is under way");
        assert_eq!(errands.subjects().collect::<Vec<_>>(), [1]);
        go_on.send("late").expect("it waits");
        let ended = errands.next().await;
        assert_eq!((ended.subject, ended.result, ended.again), (1, Ok("late"), true));
        assert!(!errands.note(1) && errands.next_before(shortly()).await.is_none());
    }

    /// As all of them are when the runtime ends.
    #[tokio::test]
    async fn one_that_is_cancelled_never_ends() {
        let mut errands = Errands::<u8, ()>::new();
        errands.begin(1, std::future::pending());
        errands.tasks.abort_all();
        assert!(errands.next_before(shortly()).await.is_none());
    }
}
