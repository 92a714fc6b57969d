//! The Node service as root, with plain loop devices for volumes: what each call makes, refuses, repeats and undoes.

#[path = "csi_node/case.rs"]
mod case;
#[path = "csi_node/fake.rs"]
mod fake;
#[path = "csi_node/hung.rs"]
mod hung;
mod loopdev;
#[allow(dead_code, reason = "tests/full_pool.rs uses the rest")]
#[path = "support/small_pool.rs"]
mod small_pool;

use case::{Block, Case, Ext4, KINDS, MIB, SIZE, Xfs, capability, code, with_flags};
use fake::Node as Machine;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::Duration;
use tandem::csi::node::{NodeService, Steps};
use tandem::mount::{MountTable, may_grow_mounted_ext4};
use tandem::rpc::control::{Health, health::Kind};
use tandem::rpc::csi::node_server::Node;
use tandem::rpc::csi::volume_capability::access_mode::Mode;
use tandem::rpc::csi::volume_usage::Unit;
use tandem::rpc::csi::*;
use tandem::volume::VolumeId;
use tonic::{Code, Request, Status};

#[tokio::test(flavor = "multi_thread")]
async fn every_call_may_be_repeated_and_the_data_stays() {
    let machine = Machine::new();
    let service = machine.service();
    for kind in KINDS {
        let case = Case::new(&machine, machine.volume(SIZE), kind);
        for round in ["one ", "two "] {
            for _ in 0..3 {
                case.stage(&service).await.expect("stage");
            }
            for _ in 0..3 {
                case.publish(&service).await.expect("publish");
            }
            if round == "two " {
                assert_eq!(case.read(kind, 4), "one ", "{kind:?}");
            }
            case.write(kind, round).expect("write");
            for _ in 0..3 {
                case.unpublish(&service).await.expect("unpublish");
            }
            for _ in 0..3 {
                case.unstage(&service).await.expect("unstage");
            }
            case.assert_gone(&machine);
        }
    }
}

/// Runs `call` on services that are cut off after 1, 2, 3... effects, each time repeated whole by a new service; then ends.
async fn interrupt<F>(machine: &Machine, name: &str, call: impl Fn(NodeService) -> F) -> u32
where
    F: Future<Output = Result<(), Status>>,
{
    for effects in 1..=20 {
        match call(machine.interruptible(Steps::interrupt_after(effects))).await {
            Ok(()) => return effects,
            Err(status) => assert_eq!(status.code(), Code::Unavailable, "{name} after {effects} effects: {status}"),
        }
    }
    panic!("{name} has more effects than that");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_cut_off_at_any_step_is_finished_by_the_next() {
    let machine = Machine::new();
    for kind in KINDS {
        for readonly in [false, true] {
            for cut in 1..=8 {
                let mut case = Case::new(&machine, machine.volume(SIZE), kind);
                case.readonly = readonly;
                let off = || machine.interruptible(Steps::interrupt_after(cut));
                // Each call is cut off after `cut` effects (or ends before), then repeated whole.
                let _ = case.stage(&off()).await;
                case.stage(&machine.service()).await.expect("stage");
                let _ = case.publish(&off()).await;
                case.publish(&machine.service()).await.expect("publish");
                assert_eq!(case.write(kind, "word").is_err(), readonly, "{kind:?}");
                let _ = case.unpublish(&off()).await;
                case.unpublish(&machine.service()).await.expect("unpublish");
                let _ = case.unstage(&off()).await;
                case.unstage(&machine.service()).await.expect("unstage");
                case.assert_gone(&machine);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_cut_off_again_and_again_gets_further_each_time() {
    let machine = Machine::new();
    for kind in KINDS {
        let mut case = Case::new(&machine, machine.volume(SIZE), kind);
        case.readonly = true;
        let case = &case;
        interrupt(&machine, "stage", |service| async move { case.stage(&service).await }).await;
        interrupt(&machine, "publish", |service| async move { case.publish(&service).await }).await;
        case.write(kind, "word").expect_err("read-only");
        interrupt(&machine, "unpublish", |service| async move { case.unpublish(&service).await }).await;
        interrupt(&machine, "unstage", |service| async move { case.unstage(&service).await }).await;
        case.assert_gone(&machine);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn staging_again_is_compared_with_the_first_time() {
    let machine = Machine::new();
    let service = machine.service();
    for kind in KINDS {
        let case = Case::new(&machine, machine.volume(SIZE), kind);
        case.stage(&service).await.expect("stage");
        let mut other = case.clone();
        other.capability = capability(kind, Mode::SingleNodeMultiWriter);
        assert_eq!(code(other.stage(&service).await), Code::AlreadyExists);
        let mut other = case.clone();
        other.staging = machine.staging("elsewhere");
        assert_eq!(code(other.stage(&service).await), Code::AlreadyExists);
        other.unstage(&service).await.expect("it is not staged there, and that is fine");
        case.publish(&service).await.expect("publish");
        assert_eq!(code(case.unstage(&service).await), Code::FailedPrecondition);
        case.unpublish(&service).await.expect("unpublish");
        case.unstage(&service).await.expect("unstage");
        case.assert_gone(&machine);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_access_mode_decides_how_many_targets_there_are() {
    let machine = Machine::new();
    let service = machine.service();
    for (kind, mode, second) in [
        (Ext4, Mode::SingleNodeWriter, Code::FailedPrecondition),
        (Ext4, Mode::SingleNodeSingleWriter, Code::FailedPrecondition),
        (Block, Mode::SingleNodeSingleWriter, Code::FailedPrecondition),
        (Ext4, Mode::SingleNodeMultiWriter, Code::Ok),
        (Block, Mode::SingleNodeMultiWriter, Code::Ok),
        (Ext4, Mode::MultiNodeReaderOnly, Code::Ok),
        (Block, Mode::MultiNodeReaderOnly, Code::Ok),
    ] {
        let mut first = Case::new(&machine, machine.volume(64 * MIB), kind);
        first.capability = capability(kind, mode);
        let mut other = first.clone();
        other.target = machine.target(&format!("other-{}", first.id));
        first.stage(&service).await.expect("stage");
        first.publish(&service).await.expect("publish");
        let mut different = first.clone();
        different.readonly = true;
        assert_eq!(code(different.publish(&service).await), Code::AlreadyExists, "{mode:?}");
        assert_eq!(code(other.publish(&service).await), second, "{mode:?}");
        assert_eq!(first.write(kind, "word").is_err(), mode == Mode::MultiNodeReaderOnly, "{mode:?}");
        first.unpublish(&service).await.expect("unpublish");
        other.publish(&service).await.expect("the first is gone");
        other.unpublish(&service).await.expect("unpublish");
        other.unstage(&service).await.expect("unstage");
        first.assert_gone(&machine);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_target_is_read_only_while_another_writes() {
    let machine = Machine::new();
    let service = machine.service();
    for kind in KINDS {
        let mut writer = Case::new(&machine, machine.volume(SIZE), kind);
        writer.capability =
            with_flags(kind, Mode::SingleNodeMultiWriter, if kind == Block { &[] } else { &["nosuid"] });
        let mut reader = writer.clone();
        (reader.target, reader.readonly) = (machine.target(&format!("reader-{}", writer.id)), true);
        writer.stage(&service).await.expect("stage");
        writer.publish(&service).await.expect("publish");
        reader.publish(&service).await.expect("publish read-only");
        reader.publish(&service).await.expect("and again");
        writer.write(kind, "word").expect("write");
        reader.write(kind, "else").expect_err("read-only");
        assert_eq!(reader.read(kind, 4), "word", "{kind:?}");
        if kind != Block {
            let table = MountTable::read().expect("table");
            let mount = table.at(Path::new(&reader.target)).expect("mounted");
            assert!(mount.has("nosuid") && mount.is_read_only(), "{mount:?}");
        }
        reader.unpublish(&service).await.expect("unpublish");
        writer.write(kind, "more").expect("still writable");
        writer.unpublish(&service).await.expect("unpublish");
        writer.unstage(&service).await.expect("unstage");
        writer.assert_gone(&machine);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_of_any_script_work_and_paths_that_lead_elsewhere_do_not() {
    let machine = Machine::new();
    let service = machine.service();
    for kind in [Ext4, Block] {
        let mut case = Case::new(&machine, machine.volume(64 * MIB), kind);
        case.staging = machine.staging(&format!("стадия \\ \t\n{kind:?}"));
        case.target = machine.target(&format!("目標 \u{1f4be} \n{kind:?}"));
        case.stage(&service).await.expect("stage");
        case.publish(&service).await.expect("publish");
        case.write(kind, "word").expect("write");
        assert!(!case.stats(&service, &case.target).await.expect("stats").is_empty());
        case.unpublish(&service).await.expect("unpublish");
        for bad in ["relative/path".to_owned(), format!("{}/../x", case.staging), "/".into(), "/tmp/a\0b".into()] {
            let mut other = case.clone();
            other.target = bad.clone();
            assert_eq!(code(other.publish(&service).await), Code::InvalidArgument, "{bad:?}");
            assert_eq!(code(other.unpublish(&service).await), Code::InvalidArgument, "{bad:?}");
        }
        case.unstage(&service).await.expect("unstage");
        case.assert_gone(&machine);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_fields_come_first_and_unknown_ids_second() {
    let machine = Machine::new();
    let service = machine.service();
    let whole = Case::new(&machine, machine.volume(64 * MIB), Ext4);
    for id in ["fake-vol-id", "non-existing-volume-id", "../../etc", "é\0", &VolumeId::random().to_string()] {
        let case = Case { id: id.into(), ..whole.clone() };
        assert_eq!(code(case.stage(&service).await), Code::NotFound, "{id:?}");
        assert_eq!(code(case.publish(&service).await), Code::NotFound, "{id:?}");
        assert_eq!(code(case.unpublish(&service).await), Code::Ok, "{id:?}");
        assert_eq!(code(case.unstage(&service).await), Code::Ok, "{id:?}");
        assert_eq!(code(case.expand(&service, 1).await.map(drop)), Code::NotFound, "{id:?}");
        assert_eq!(code(case.stats(&service, "some/path").await.map(drop)), Code::NotFound, "{id:?}");
    }
    let no_id = Case { id: String::new(), ..whole.clone() };
    let no_path = Case { target: String::new(), staging: String::new(), ..whole.clone() };
    for case in [&no_id, &no_path] {
        assert_eq!(code(case.stage(&service).await), Code::InvalidArgument);
        assert_eq!(code(case.publish(&service).await), Code::InvalidArgument);
        assert_eq!(code(case.unpublish(&service).await), Code::InvalidArgument);
        assert_eq!(code(case.unstage(&service).await), Code::InvalidArgument);
        assert_eq!(code(case.expand(&service, 1).await.map(drop)), Code::InvalidArgument);
        assert_eq!(code(case.stats(&service, "").await.map(drop)), Code::InvalidArgument);
    }
    assert_eq!(code(whole.publish(&service).await), Code::FailedPrecondition, "not staged");
    let flags = Case { capability: with_flags(Ext4, Mode::SingleNodeWriter, &["remount"]), ..whole.clone() };
    assert_eq!(code(flags.stage(&service).await), Code::InvalidArgument);
    let many = Case { capability: capability(Ext4, Mode::MultiNodeMultiWriter), ..whole.clone() };
    assert_eq!(code(many.stage(&service).await), Code::InvalidArgument);
    assert_eq!(machine.leftovers(), Vec::<String>::new(), "a refused call leaves nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_an_empty_volume_is_formatted() {
    let machine = Machine::new();
    let service = machine.service();
    let restored = Case::new(&machine, machine.restored(64 * MIB), Ext4);
    let refused = restored.stage(&service).await.expect_err("a blank restore");
    assert!(refused.code() == Code::FailedPrecondition && refused.message().contains("not formatted"), "{refused}");
    let id = machine.volume(64 * MIB);
    fs::write(machine.file(id), vec![1; 64 << 20]).expect("somebody's data");
    let foreign = Case::new(&machine, id, Ext4);
    assert_eq!(code(foreign.stage(&service).await), Code::FailedPrecondition);
    assert!(fs::read(machine.file(id)).expect("read").iter().all(|byte| *byte == 1), "untouched");
    let small = Case::new(&machine, machine.volume(64 * MIB), Xfs);
    assert_eq!(code(small.stage(&service).await), Code::FailedPrecondition);
    for case in [restored, foreign, small] {
        // Kubelet does not unstage what was never staged.
        case.assert_gone(&machine);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_is_still_copied_is_not_staged() {
    let machine = Machine::new();
    let id = machine.volume(64 * MIB);
    machine.set_ready(id, false);
    let case = Case::new(&machine, id, Ext4);
    assert_eq!(code(case.stage(&machine.service()).await), Code::Unavailable);
    machine.set_ready(id, true);
    case.stage(&machine.service()).await.expect("copied");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_grows_online_or_says_why_not() {
    let machine = Machine::new();
    let service = machine.service();
    for kind in KINDS {
        let id = machine.volume(SIZE);
        let case = Case::new(&machine, id, kind);
        case.stage(&service).await.expect("stage");
        case.publish(&service).await.expect("publish");
        assert_eq!(code(case.expand(&service, 2 * SIZE).await.map(drop)), Code::OutOfRange);
        assert_eq!(case.expand(&service, SIZE).await.expect("nothing to do"), SIZE as i64);
        machine.grow(id, 2 * SIZE);
        let grown = case.expand(&service, 2 * SIZE).await;
        if kind == Ext4 && !may_grow_mounted_ext4() {
            let refused = grown.expect_err("no driver can do that here");
            assert!(refused.code() == Code::FailedPrecondition && refused.message().contains("CAP_SYS_RESOURCE"));
            case.unpublish(&service).await.expect("unpublish");
            case.unstage(&service).await.expect("unstage");
            case.stage(&service).await.expect("stage grows it");
            case.publish(&service).await.expect("publish");
        } else {
            assert_eq!(grown.expect("grown"), 2 * SIZE as i64);
        }
        assert_eq!(case.expand(&service, 2 * SIZE).await.expect("again"), 2 * SIZE as i64);
        let usage = case.stats(&service, &case.target).await.expect("stats");
        assert!(usage[0].total as u64 > SIZE * 3 / 2, "{kind:?}: {usage:?}");
        assert_eq!(usage[0].unit(), Unit::Bytes);
        assert_eq!(usage.len(), if kind == Block { 1 } else { 2 });
        assert_eq!(code(case.stats(&service, "some/path").await.map(drop)), Code::NotFound);
        assert_eq!(code(case.stats(&service, "/tmp").await.map(drop)), Code::NotFound);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_call_for_the_same_volume_is_told_to_wait() {
    let machine = Machine::new();
    let service = machine.service();
    let case = Case::new(&machine, machine.volume(64 * MIB), Block);
    machine.delay_attach(Duration::from_secs(3));
    let (first, second) = tokio::join!(case.stage(&service), case.stage(&service));
    let mut codes = [code(first), code(second)];
    codes.sort_by_key(|code| *code as i32);
    assert_eq!(codes, [Code::Ok, Code::Aborted]);
    // A caller that goes away does not stop the work, so the next one is told to wait too.
    let gone = tokio::time::timeout(Duration::from_secs(1), case.stage(&service)).await;
    assert!(gone.is_err());
    assert_eq!(code(case.stage(&service).await), Code::Aborted);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_of_the_machine_old_records_are_in_nobodys_way() {
    let machine = Machine::new();
    let service = machine.service();
    for kind in KINDS {
        let case = Case::new(&machine, machine.volume(SIZE), kind);
        case.stage(&service).await.expect("stage");
        case.publish(&service).await.expect("publish");
        case.write(kind, "word").expect("write");
        machine.reboot();
        let mut after = Case::new(&machine, case.id.parse().expect("id"), kind);
        after.staging = machine.staging(&format!("other staging {kind:?}"));
        after.target = machine.target(&format!("other target {kind:?}"));
        after.capability = capability(kind, Mode::SingleNodeSingleWriter);
        after.stage(&machine.service()).await.expect("stage");
        after.publish(&machine.service()).await.expect("publish");
        assert_eq!(after.read(kind, 4), "word", "{kind:?}");
        case.unpublish(&service).await.expect("the old target is removed");
        assert!(!Path::new(&case.target).exists());
        after.unpublish(&service).await.expect("unpublish");
        after.unstage(&service).await.expect("unstage");
        after.assert_gone(&machine);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_ours_is_left_alone() {
    let machine = Machine::new();
    let service = machine.service();
    let case = Case::new(&machine, machine.volume(64 * MIB), Ext4);
    // A directory with files in it, and a mount of somebody else.
    fs::create_dir(&case.target).expect("directory");
    fs::write(Path::new(&case.target).join("file"), "theirs").expect("file");
    assert_eq!(code(case.unpublish(&service).await), Code::FailedPrecondition);
    let mut other = case.clone();
    other.target = machine.staging("theirs");
    loopdev::run("mount", &["-t", "tmpfs", "tandem-theirs", &other.target]);
    assert_eq!(code(other.unpublish(&service).await), Code::FailedPrecondition);
    case.stage(&service).await.expect("stage");
    assert_eq!(code(other.publish(&service).await), Code::FailedPrecondition);
    assert!(MountTable::read().expect("table").at(Path::new(&other.target)).is_some());
    assert!(Path::new(&case.target).join("file").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_target_is_named_and_stays() {
    let machine = Machine::new();
    let service = machine.service();
    let case = Case::new(&machine, machine.volume(64 * MIB), Ext4);
    case.stage(&service).await.expect("stage");
    case.publish(&service).await.expect("publish");
    let open = fs::File::create(Path::new(&case.target).join("open")).expect("file");
    let busy = case.unpublish(&service).await.expect_err("busy");
    assert!(busy.code() == Code::FailedPrecondition && busy.message().contains(&case.target), "{busy}");
    drop(open);
    case.unpublish(&service).await.expect("unpublish");
    case.unstage(&service).await.expect("unstage");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_node_says_who_it_is_and_how_it_fares() {
    let machine = Machine::new();
    let service = machine.service();
    let info = service.node_get_info(Request::new(NodeGetInfoRequest {})).await.expect("info").into_inner();
    let segments = info.accessible_topology.expect("topology").segments;
    assert_eq!((info.node_id.as_str(), info.max_volumes_per_node), ("node-1", 7));
    assert_eq!(segments.get("topology.tandem.storage/node").map(String::as_str), Some("node-1"));
    let id = machine.volume(64 * MIB).to_string();
    machine.set_health(vec![Health {
        kind: Kind::DataLoss.into(),
        reason: "DamagedBlocks".into(),
        message: "…".into(),
    }]);
    let request = NodeGetVolumeHealthRequest { volume_id: id.clone(), ..Default::default() };
    let health = service.node_get_volume_health(Request::new(request)).await.expect("health").into_inner();
    let health = health.volume_health.expect("health");
    assert_eq!((health.volume_id, health.health_statuses[0].reason.as_str()), (id, "DamagedBlocks"));
    assert_eq!(health.health_statuses[0].status(), VolumeHealthErrorType::DataLoss);
    let request = NodeGetVolumeHealthRequest::default();
    assert_eq!(code(service.node_get_volume_health(Request::new(request)).await.map(drop)), Code::InvalidArgument);
    let storage =
        service.node_get_storage_health(Request::new(Default::default())).await.expect("storage").into_inner();
    assert_eq!(storage.backend_health.len(), 1, "only the pool with a problem");
}

/// The target is gone, and a record that still names it names nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_unpublished_where_nothing_can_be_written_down() {
    let machine = Machine::new();
    let records = machine.directory.path().join("staged");
    fs::create_dir(&records).expect("a directory");
    let _mounted = loopdev::MountPoint::new(records.clone());
    loopdev::run("mount", &["-t", "tmpfs", "-o", "size=64k", "tandem-records", records.to_str().expect("UTF-8")]);
    let service = machine.service();
    let case = Case::new(&machine, machine.volume(SIZE), Ext4);
    case.stage(&service).await.expect("stage");
    case.publish(&service).await.expect("publish");
    let filler = records.join("filler");
    let mut full = fs::File::create(&filler).expect("a name");
    while full.write_all(&[0; 4096]).is_ok() {}
    case.unpublish(&service).await.expect("unpublish");
    assert!(!Path::new(&case.target).exists());
    assert_eq!(code(case.publish(&service).await), Code::Internal, "what is made is written down before");
    // Whoever another test has just forked may still have it open, so a removal alone may free nothing yet.
    full.set_len(0).expect("it is ours");
    drop(full);
    fs::remove_file(&filler).expect("it is ours");
    case.publish(&service).await.expect("publish");
    case.unpublish(&service).await.expect("unpublish");
    case.unstage(&service).await.expect("unstage");
}
