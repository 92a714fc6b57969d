//! Calls that hang on a device, and those that take it away.

use crate::case::{Block, Case, Ext4, MIB, capability, code};
use crate::fake::Node as Machine;
use crate::small_pool::SmallPool;
use std::path::Path;
use std::time::{Duration, Instant};
use tandem::rpc::csi::volume_capability::access_mode::Mode;
use tokio::time::{sleep, timeout};
use tonic::Code;

/// When a test has failed.
const LONG: Duration = Duration::from_secs(120);
/// Before it a call may only be slow.
const PATIENCE: Duration = Duration::from_secs(4);

async fn eventually(what: &str, look: impl Fn() -> bool) {
    let began = Instant::now();
    while !look() {
        assert!(began.elapsed() < LONG, "{what} does not come");
        sleep(Duration::from_millis(10)).await;
    }
}

/// It was told to come back, for as long as the device had nobody.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_hangs_on_a_device_that_nobody_serves_ends_before_what_takes_that_away() {
    let machine = Machine::new();
    let service = machine.service();
    for kind in [Ext4, Block] {
        let case = Case::new(&machine, machine.volume(64 * MIB), kind);
        let [stages, expands] = [case.clone(), case.clone()];
        machine.suspend(Box::new(()));
        let staging = tokio::spawn({
            let service = service.clone();
            async move { stages.stage(&service).await }
        });
        eventually("a call that hangs", || machine.attaching() == 1).await;
        let began = Instant::now();
        timeout(LONG, case.unstage(&service)).await.expect("in time").expect("unstage");
        assert!(began.elapsed() >= PATIENCE, "it may have been slow");
        staging.await.expect("no panic").expect_err("its device was given up");
        case.assert_gone(&machine);

        case.stage(&service).await.expect("stage");
        case.publish(&service).await.expect("publish");
        machine.suspend(Box::new(()));
        let expanding = tokio::spawn({
            let service = service.clone();
            async move { expands.expand(&service, 64 * MIB).await }
        });
        eventually("a call that hangs", || machine.attaching() == 1).await;
        timeout(LONG, case.unpublish(&service)).await.expect("in time").expect("unpublish");
        expanding.await.expect("no panic").expect_err("its device was given up");
        case.unstage(&service).await.expect("unstage");
        case.assert_gone(&machine);
    }
    assert_eq!(machine.abandons(), 4);
}

/// A device that is served has somebody's writes: nobody gives it up because a call for it takes long.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_slow_on_a_device_that_is_served_is_not_ended() {
    let machine = Machine::new();
    let service = machine.service();
    let case = Case::new(&machine, machine.volume(64 * MIB), Block);
    machine.delay_attach(3 * PATIENCE);
    let slow = tokio::spawn({
        let (case, service) = (case.clone(), service.clone());
        async move { case.stage(&service).await }
    });
    eventually("a call that is slow", || machine.attaching() == 1).await;
    assert_eq!(code(case.unstage(&service).await), Code::Aborted, "it is told to come back");
    assert_eq!(machine.abandons(), 1);
    slow.await.expect("no panic").expect("staged");
    machine.delay_attach(Duration::ZERO);
    case.unstage(&service).await.expect("unstage");
    case.assert_gone(&machine);
}

/// A device that is silent for a moment was given up although somebody used it, for a call that did not even take it away.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_used_elsewhere_is_not_given_up() {
    let machine = Machine::new();
    let service = machine.service();
    let mut case = Case::new(&machine, machine.volume(64 * MIB), Ext4);
    case.capability = capability(Ext4, Mode::SingleNodeMultiWriter);
    let other = Case { target: machine.target("other"), ..case.clone() };
    case.stage(&service).await.expect("stage");
    case.publish(&service).await.expect("publish");
    other.publish(&service).await.expect("publish");
    machine.suspend(Box::new(()));
    let expanding = tokio::spawn({
        let (case, service) = (case.clone(), service.clone());
        async move { case.expand(&service, 64 * MIB).await }
    });
    eventually("a call that hangs", || machine.attaching() == 1).await;
    let elsewhere = Case { staging: machine.staging("elsewhere"), target: machine.target("missing"), ..case.clone() };
    let refused = tokio::join!(
        other.unpublish(&service),
        case.unstage(&service),
        elsewhere.unpublish(&service),
        elsewhere.unstage(&service)
    );
    for refused in [refused.0, refused.1, refused.2, refused.3] {
        assert_eq!(code(refused), Code::Aborted);
    }
    assert_eq!(machine.abandons(), 0);
    machine.resume();
    expanding.await.expect("no panic").expect_err("it is told so by the replica of this test");
    case.write(Ext4, "word").expect("its user goes on");
    other.unpublish(&service).await.expect("unpublish");
    machine.suspend(Box::new(()));
    let expanding = tokio::spawn({
        let (case, service) = (case.clone(), service.clone());
        async move { case.expand(&service, 64 * MIB).await }
    });
    eventually("a call that hangs", || machine.attaching() == 1).await;
    case.unpublish(&service).await.expect("it is the last one");
    expanding.await.expect("no panic").expect_err("its device was given up");
    assert_eq!(machine.abandons(), 1);
    case.unstage(&service).await.expect("unstage");
    case.assert_gone(&machine);
}

/// It was asked once whether the device is served, and then waited for ever.
#[tokio::test(flavor = "multi_thread")]
async fn an_unmount_that_is_slow_is_given_up_when_nobody_serves_its_device_any_more() {
    let pool = SmallPool::ext4(128);
    let machine = Machine::new();
    let service = machine.service();
    let case = Case::new(&machine, machine.volume_in(pool.path(), 64 * MIB, None), Ext4);
    case.stage(&service).await.expect("stage");
    std::fs::write(Path::new(&case.staging).join("file"), [7; 100_000]).expect("written, and not flushed");
    let hanging = pool.hang();
    let mut unstaging = tokio::spawn({
        let (case, service) = (case.clone(), service.clone());
        async move { case.unstage(&service).await }
    });
    eventually("the question whether it is served", || machine.abandons() == 1).await;
    assert!(!unstaging.is_finished(), "it is, and slow");
    machine.suspend(Box::new(hanging));
    // Kubelet repeats a call that is late.
    assert_eq!(code(case.unstage(&service).await), Code::Aborted);
    sleep(4 * PATIENCE).await;
    assert!(!unstaging.is_finished(), "a copy that is lost costs that much");
    assert_eq!(machine.abandons(), 1);
    let unstaged = timeout(LONG, &mut unstaging).await;
    machine.resume();
    unstaged.expect("in time").expect("no panic").expect("unstaged");
    case.assert_gone(&machine);
}
