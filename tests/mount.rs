//! Filesystems on plain loop devices, as root: what is made, kept, refused, grown, bound and unmounted.

mod loopdev;

use loopdev::{LoopDevice, MountPoint, directory, run};
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use sys_mount::MountFlags;
use tandem::mount::{
    self, Content, Filesystem, MountOptions, MountTable, Origin, PrepareError, Signature, UnmountError, grow_mounted,
    mount_device, prepare, probe, unmount, usage,
};

const MIB: u64 = 1 << 20;

fn size(filesystem: Filesystem) -> u64 {
    match filesystem {
        Filesystem::Ext4 => 64 * MIB,
        Filesystem::Xfs => 300 * MIB,
    }
}

fn signature(filesystem: Filesystem) -> Content {
    Content::Known(match filesystem {
        Filesystem::Ext4 => Signature::Ext4,
        Filesystem::Xfs => Signature::Xfs,
    })
}

fn no_options(filesystem: Filesystem) -> MountOptions {
    MountOptions::parse(filesystem, &[]).expect("no options")
}

#[test]
fn a_blank_device_is_formatted_once_and_keeps_its_files() {
    for filesystem in Filesystem::ALL {
        let directory = directory();
        let device = LoopDevice::new(directory.path(), "disk", size(filesystem));
        let mark = directory.path().join("mark");
        let target = MountPoint::new(directory.path().join("a b\n\\é"));
        prepare(&device.path, filesystem, Origin::Empty, &mark).expect("format");
        assert!(!mark.exists());
        assert_eq!(probe(&device.path).expect("probe"), signature(filesystem));
        mount_device(&device.path, &target.0, filesystem, &no_options(filesystem)).expect("mount");
        fs::write(target.0.join("file"), "kept").expect("write");
        let table = MountTable::read().expect("table");
        let mount = table.at(&target.0).expect("found by its own name");
        assert_eq!(mount.device, mount::device_number(&device.path).expect("number"));
        assert!(matches!(prepare(&device.path, filesystem, Origin::Empty, &mark), Err(PrepareError::Busy(_))));
        unmount(&target.0).expect("unmount");
        unmount(&target.0).expect("unmount of nothing");
        prepare(&device.path, filesystem, Origin::Source, &mark).expect("second stage");
        mount_device(&device.path, &target.0, filesystem, &no_options(filesystem)).expect("mount again");
        assert_eq!(fs::read(target.0.join("file")).expect("read"), b"kept");
        unmount(&target.0).expect("unmount");
    }
}

#[test]
fn what_is_not_blank_is_never_formatted() {
    let directory = directory();
    let mark = directory.path().join("mark");
    let device = LoopDevice::new(directory.path(), "disk", 300 * MIB);
    let refused = |wanted, origin| match prepare(&device.path, wanted, origin, &mark) {
        Err(PrepareError::Foreign { found, .. }) => found,
        other => panic!("{other:?}"),
    };
    device.write(300 * MIB - 4096, &[7; 4096]);
    assert_eq!(refused(Filesystem::Ext4, Origin::Empty), Content::Data { offset: 300 * MIB - 4096 });
    device.write(300 * MIB - 4096, &[0; 4096]);
    run("mkfs.xfs", &["-q", &device.text()]);
    assert_eq!(refused(Filesystem::Ext4, Origin::Empty), Content::Known(Signature::Xfs));
    assert_eq!(refused(Filesystem::Ext4, Origin::Source), Content::Known(Signature::Xfs));
    run("mkfs.ext2", &["-q", "-F", &device.text()]);
    assert_eq!(refused(Filesystem::Ext4, Origin::Empty), Content::Known(Signature::Ext2));
    run("mkswap", &["--force", &device.text()]);
    assert_eq!(probe(&device.path).expect("probe"), Content::Known(Signature::Swap));
    assert!(!mark.exists());
}

#[test]
fn a_restore_that_reads_blank_is_an_error() {
    let directory = directory();
    let device = LoopDevice::new(directory.path(), "disk", 64 * MIB);
    let refused = prepare(&device.path, Filesystem::Ext4, Origin::Source, &directory.path().join("mark"));
    assert!(matches!(refused, Err(PrepareError::BlankRestore)), "{refused:?}");
    assert_eq!(probe(&device.path).expect("probe"), Content::Blank);
}

#[test]
fn formatting_that_was_cut_short_is_begun_again() {
    for filesystem in Filesystem::ALL {
        let directory = directory();
        let device = LoopDevice::new(directory.path(), "disk", size(filesystem));
        let mark = directory.path().join("mark");
        // What a killed mkfs may leave: the mark, and some of the metadata but no superblock, or all of it.
        fs::write(&mark, "").expect("mark");
        device.write(200 * 4096, &[9; 4096]);
        prepare(&device.path, filesystem, Origin::Empty, &mark).expect("formatted again");
        fs::write(&mark, "").expect("mark");
        prepare(&device.path, filesystem, Origin::Empty, &mark).expect("and again");
        assert_eq!(probe(&device.path).expect("probe"), signature(filesystem));
        assert!(!mark.exists());
    }
}

#[test]
fn a_whole_filesystem_is_kept_whatever_an_old_mark_says() {
    for filesystem in Filesystem::ALL {
        let directory = directory();
        let device = LoopDevice::new(directory.path(), "disk", size(filesystem));
        let (here, elsewhere) = (directory.path().join("here"), directory.path().join("elsewhere"));
        let target = MountPoint::new(directory.path().join("target"));
        // This node died while it formatted; another one has formatted the volume and used it since.
        fs::write(&here, "").expect("mark");
        prepare(&device.path, filesystem, Origin::Empty, &elsewhere).expect("formatted elsewhere");
        mount_device(&device.path, &target.0, filesystem, &no_options(filesystem)).expect("mount");
        fs::write(target.0.join("file"), "kept").expect("write");
        unmount(&target.0).expect("unmount");
        prepare(&device.path, filesystem, Origin::Empty, &here).expect("back here");
        assert!(!here.exists(), "the mark has done its work");
        mount_device(&device.path, &target.0, filesystem, &no_options(filesystem)).expect("mount again");
        assert_eq!(fs::read(target.0.join("file")).expect("read"), b"kept");
        unmount(&target.0).expect("unmount");
    }
}

#[test]
fn an_xfs_that_was_never_finished_is_formatted_again() {
    let directory = directory();
    let device = LoopDevice::new(directory.path(), "disk", 300 * MIB);
    let mark = directory.path().join("mark");
    prepare(&device.path, Filesystem::Xfs, Origin::Empty, &mark).expect("format");
    device.write(126, &[1]);
    fs::write(&mark, "").expect("mark");
    prepare(&device.path, Filesystem::Xfs, Origin::Empty, &mark).expect("formatted again");
    let target = MountPoint::new(directory.path().join("target"));
    mount_device(&device.path, &target.0, Filesystem::Xfs, &no_options(Filesystem::Xfs)).expect("mount");
    unmount(&target.0).expect("unmount");
}

#[test]
fn an_xfs_that_does_not_fit_is_refused_before_anything_is_written() {
    let directory = directory();
    let device = LoopDevice::new(directory.path(), "disk", 64 * MIB);
    let refused = prepare(&device.path, Filesystem::Xfs, Origin::Empty, &directory.path().join("mark"));
    assert!(matches!(refused, Err(PrepareError::TooSmall { .. })), "{refused:?}");
    assert_eq!(probe(&device.path).expect("probe"), Content::Blank);
}

#[test]
fn a_damaged_ext4_is_repaired_or_reported_but_not_mounted() {
    let directory = directory();
    let device = LoopDevice::new(directory.path(), "disk", 64 * MIB);
    let mark = directory.path().join("mark");
    prepare(&device.path, Filesystem::Ext4, Origin::Empty, &mark).expect("format");
    run("debugfs", &["-w", "-R", "clri <2>", &device.text()]);
    run("debugfs", &["-w", "-R", "ssv state 2", &device.text()]);
    let refused = prepare(&device.path, Filesystem::Ext4, Origin::Empty, &mark);
    assert!(matches!(refused, Err(PrepareError::Damaged(..))), "{refused:?}");
}

#[test]
fn the_filesystem_grows_with_its_device() {
    for filesystem in Filesystem::ALL {
        let directory = directory();
        let device = LoopDevice::new(directory.path(), "disk", size(filesystem));
        let mark = directory.path().join("mark");
        let target = MountPoint::new(directory.path().join("m"));
        let mounted = |options: &MountOptions| {
            prepare(&device.path, filesystem, Origin::Empty, &mark).expect("prepare");
            mount_device(&device.path, &target.0, filesystem, options).expect("mount");
        };
        mounted(&no_options(filesystem));
        assert!(!grow_mounted(filesystem, &device.path, &target.0).expect("nothing to do"));
        fs::write(target.0.join("file"), "kept").expect("write");
        device.grow(2 * size(filesystem));
        let before = usage(&target.0).expect("usage").total_bytes;
        match grow_mounted(filesystem, &device.path, &target.0) {
            Ok(grown) => assert!(grown),
            Err(mount::GrowError::Capability) => {
                assert!(filesystem == Filesystem::Ext4 && !mount::may_grow_mounted_ext4());
                unmount(&target.0).expect("unmount");
                mounted(&no_options(filesystem));
            }
            Err(error) => panic!("{error}"),
        }
        let after = usage(&target.0).expect("usage").total_bytes;
        assert!(after > before + size(filesystem) * 8 / 10, "{filesystem}: {before} -> {after}");
        assert!(!grow_mounted(filesystem, &device.path, &target.0).expect("nothing left to do"));
        assert_eq!(fs::read(target.0.join("file")).expect("read"), b"kept");
    }
}

#[test]
fn sizes_that_leave_a_useless_rest_are_not_grown_for_ever() {
    // 129 MiB: the last group of 1 MiB is too small to be made; 136 MiB: large enough.
    for megabytes in [17, 129, 130, 136, 300] {
        let directory = directory();
        let device = LoopDevice::new(directory.path(), "disk", megabytes * MIB);
        let target = MountPoint::new(directory.path().join("m"));
        prepare(&device.path, Filesystem::Ext4, Origin::Empty, &directory.path().join("mark")).expect("format");
        mount_device(&device.path, &target.0, Filesystem::Ext4, &no_options(Filesystem::Ext4)).expect("mount");
        let grown = grow_mounted(Filesystem::Ext4, &device.path, &target.0);
        assert!(matches!(grown, Ok(false)), "{megabytes} MiB: {grown:?}");
    }
}

#[test]
fn a_clone_of_an_xfs_mounts_beside_its_source() {
    let directory = directory();
    let source = LoopDevice::new(directory.path(), "disk", size(Filesystem::Xfs));
    let mark = directory.path().join("mark");
    prepare(&source.path, Filesystem::Xfs, Origin::Empty, &mark).expect("format");
    fs::copy(&source.file, directory.path().join("copy")).expect("copy");
    let copy = LoopDevice::over(&directory.path().join("copy"));
    let points = ["a", "b"].map(|name| MountPoint::new(directory.path().join(name)));
    for (device, point) in [(&source, &points[0]), (&copy, &points[1])] {
        mount_device(&device.path, &point.0, Filesystem::Xfs, &no_options(Filesystem::Xfs)).expect("same UUID twice");
    }
}

#[test]
fn a_bind_is_read_only_without_touching_the_filesystem_and_keeps_other_restrictions() {
    let directory = directory();
    let device = LoopDevice::new(directory.path(), "disk", 64 * MIB);
    prepare(&device.path, Filesystem::Ext4, Origin::Empty, &directory.path().join("mark")).expect("format");
    let staging = MountPoint::new(directory.path().join("staging"));
    let target = MountPoint::new(directory.path().join("target"));
    let options = MountOptions::parse(Filesystem::Ext4, &["nosuid".into(), "noexec".into()]).expect("options");
    mount_device(&device.path, &staging.0, Filesystem::Ext4, &options).expect("mount");
    mount::bind(&staging.0, &target.0).expect("bind");
    mount::restrict_bind(&target.0, MountFlags::RDONLY).expect("read-only");
    mount::restrict_bind(&target.0, MountFlags::RDONLY).expect("again");
    let table = MountTable::read().expect("table");
    let mount = table.at(&target.0).expect("mounted");
    assert!(mount.is_read_only() && mount.has("nosuid") && mount.has("noexec"), "{mount:?}");
    fs::write(staging.0.join("file"), "x").expect("the staged mount stays writable");
    let refused = fs::write(target.0.join("file"), "y").expect_err("read-only");
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    unmount(&target.0).expect("unmount");
}

#[test]
fn a_device_node_binds_onto_a_file() {
    let directory = directory();
    let device = LoopDevice::new(directory.path(), "disk", 64 * MIB);
    let target = directory.path().join("block device");
    fs::write(&target, "").expect("file");
    let _guard = Unbind(&target);
    mount::bind(&device.path, &target).expect("bind");
    assert!(fs::metadata(&target).expect("metadata").file_type().is_block_device());
    assert_eq!(mount::device_number(&target).expect("number"), mount::device_number(&device.path).expect("number"));
    assert_eq!(mount::device_size(&target).expect("size"), 64 * MIB);
    unmount(&target).expect("unmount");
    assert!(fs::metadata(&target).expect("metadata").is_file());
}

struct Unbind<'a>(&'a Path);
impl Drop for Unbind<'_> {
    fn drop(&mut self) {
        let _ = unmount(self.0);
    }
}

#[test]
fn a_busy_mount_says_so_and_stacked_mounts_all_go() {
    let directory = directory();
    let device = LoopDevice::new(directory.path(), "disk", 64 * MIB);
    prepare(&device.path, Filesystem::Ext4, Origin::Empty, &directory.path().join("mark")).expect("format");
    let target = MountPoint::new(directory.path().join("m"));
    mount_device(&device.path, &target.0, Filesystem::Ext4, &no_options(Filesystem::Ext4)).expect("mount");
    for _ in 0..2 {
        mount::bind(&target.0, &target.0).expect("bind");
    }
    let open = fs::File::create(target.0.join("open")).expect("file");
    let busy = unmount(&target.0);
    assert!(matches!(busy, Err(UnmountError::Busy(_))), "{busy:?}");
    drop(open);
    unmount(&target.0).expect("all three");
    assert!(MountTable::read().expect("table").at(&target.0).is_none());
}
