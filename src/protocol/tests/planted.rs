//! Planted mistakes of the core: a checker counts when it has found them.

/// Mistakes in the core that the oracle must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::protocol) enum Planted {
    /// The range is released at `Complete` instead of `Replied`.
    ReleaseAtComplete,
    /// Overlapping requests run side by side.
    StartOverlapping,
    /// A write is answered when this copy has it.
    AnswerBeforePeers,
    /// A flush is answered when this copy is flushed.
    FlushHereOnly,
    /// A silent member is not awaited from the moment that its removal is proposed.
    DropBeforeCommit,
    /// A primary proposes to go on alone with acknowledged writes that only its cache has.
    DropUnflushed,
    /// A candidate's acks are awaited only when it is a member.
    CandidateNotAwaited,
    /// A candidate that fails is let go while its admission may be committed.
    AwaitOnlyMembers,
    /// No answer to a compare-and-swap is taken for a refusal.
    AmbiguousIsLost,
    /// A candidate is admitted before anything was copied to it.
    AdmitUnsynced,
    /// A resync does not look at the candidate's own hot extents.
    ForgetCandidatesMarks,
    /// A resync does not look at what was under way when the copy left.
    ForgetUnanswered,
    /// A copy that has lost its caches is taken for one that has kept what it had answered.
    TrustLostCopy,
    /// A copy that is no member may promote itself.
    PromoteOutdated,
    /// A wished copy promotes itself while the old primary may hold a lease.
    PromoteUnderLease,
    /// Frames of an older configuration are executed.
    AcceptOlderVersion,
    /// Frames for a former life of this copy are executed.
    AcceptOlderIncarnation,
    /// A write does not wait for its mark.
    WriteBeforeMark,
    /// A new primary does not make the hot extents equal.
    SkipReconcile,
    /// Copied ranges are not ordered against the application's writes.
    ResyncBesideWrites,
    /// The last flush of a resync begins while ranges are under way.
    FlushBesidePieces,
    /// Blocks are taken for equal whatever the comparison says.
    TakeForEqual,
    /// Reads are served without a lease.
    ReadWithoutLease,
    /// A compare-and-swap that came second is taken for a committed one.
    LostIsCommitted,
    /// What another primary has overtaken is executed when this copy is primary again.
    ForgetFence,
    /// What is answered but for the writing of its reply counts as not answered when the term ends.
    RequeueCompleted,
    /// A mark goes when every copy has answered, without a flush.
    ClearAtAnswer,
    /// Marks go because they are many, whatever the flush covers.
    ClearBeyondFlush,
    /// A copy that joins while a flush is under way clears the marks that it covers on others.
    ClearWhoJoins,
    /// A flush covers what the other copies execute while it waits for its mark here.
    CoverMarking,
    /// Marks go although this copy's disk has failed a write that the peers have executed.
    ClearAfterFailure,
    /// A member that comes back while its removal may be committed counts again.
    TakeBackDropped,
    /// A copy whose disk has failed a flush counts as intact when it is asked again, and when its engine is started again.
    ForgetFailedFlush,
    /// What this copy's flush before a drop does not cover is acknowledged although the drop may be committed.
    OpenGuardEarly,
    /// The store takes a candidate's layers for what others lack since they left.
    CandidateKeepsBase,
}
