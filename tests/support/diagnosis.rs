//! What a failed test leaves for whoever reads its log: who holds the installation's devices and mounts, and who waits for
//! what. Short, so that CI's extract of a log shows it, and taken from /proc and /sys: nothing here asks the engine.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Lines per subject; more say nothing new.
const MOST: usize = 24;
/// Functions of a kernel stack, from where it waits.
const FRAMES: usize = 5;
/// Programs whose threads are told of although they do not hang.
const PROGRAMS: [&str; 9] =
    ["tandem", "tandem-holder", "fio", "umount", "mount", "postgres", "losetup", "e2fsck", "fsfreeze"];

/// Prints it, for the installation in `dir`.
pub fn print(dir: &Path) {
    let dir = dir.display().to_string();
    let loops = loops();
    eprintln!("--- diagnosis of {dir}");
    tell("devices", loops.iter().map(|(name, backing)| device(name, backing)));
    tell("connections that wait", connections());
    let numbers: Vec<_> = loops.iter().filter_map(|(name, _)| Some(format!(" {} ", number(name)?))).collect();
    tell("mounts by namespace", mounts(&dir, &numbers));
    tell("open files", open_files(&dir, &loops));
    tell("threads", threads());
    eprintln!("--- end of the diagnosis");
}

fn tell(subject: &str, lines: impl IntoIterator<Item = String>) {
    let lines: Vec<_> = lines.into_iter().collect();
    eprintln!("{subject}: {}", lines.len());
    lines.iter().take(MOST).for_each(|line| eprintln!("  {}", line.chars().take(300).collect::<String>()));
}

fn text(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn names(dir: impl AsRef<Path>) -> Vec<String> {
    let names = fs::read_dir(dir).into_iter().flatten().flatten();
    names.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// Loop devices of any installation of this machine, with what is behind them.
fn loops() -> Vec<(String, String)> {
    let backed = |name: String| (text(format!("/sys/block/{name}/loop/backing_file")), name);
    let all = names("/sys/block").into_iter().filter(|name| name.starts_with("loop")).map(backed);
    all.filter(|(backing, _)| backing.contains("tandem-")).map(|(backing, name)| (name, backing)).collect()
}

fn number(name: &str) -> Option<String> {
    Some(text(format!("/sys/block/{name}/dev"))).filter(|number| !number.is_empty())
}

fn device(name: &str, backing: &str) -> String {
    let block = PathBuf::from("/sys/block").join(name);
    let (inflight, holders) = (text(block.join("inflight")), names(block.join("holders")));
    let clears = text(block.join("loop/autoclear"));
    format!("{name} {backing} in flight {inflight}, held by {holders:?}, goes at its last close: {clears}")
}

fn connections() -> Vec<String> {
    let path = Path::new("/sys/fs/fuse/connections");
    let waiting = names(path).into_iter().map(|name| (text(path.join(&name).join("waiting")), name));
    waiting.filter(|(count, _)| count != "0").map(|(count, name)| format!("{name}: {count} requests")).collect()
}

/// Every thread of the machine: (process, thread).
fn all_threads() -> impl Iterator<Item = (String, String)> {
    let processes = names("/proc").into_iter().filter(|name| name.bytes().all(|b| b.is_ascii_digit()));
    processes.flat_map(|process| {
        names(format!("/proc/{process}/task")).into_iter().map(move |thread| (process.clone(), thread))
    })
}

/// A mount that another namespace has a copy of keeps its device in use after the umount.
fn mounts(dir: &str, numbers: &[String]) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let mut lines = vec![];
    for (process, thread) in all_threads() {
        let task = format!("/proc/{process}/task/{thread}");
        let Ok(namespace) = fs::read_link(format!("{task}/ns/mnt")) else { continue };
        if !seen.insert(namespace.clone()) {
            continue;
        }
        let who = format!("{} {process}/{thread} {}", namespace.display(), text(format!("{task}/comm")));
        let table = text(format!("{task}/mountinfo"));
        let ours =
            table.lines().filter(|l| l.contains(dir) || numbers.iter().any(|number| l.contains(number.as_str())));
        lines.extend(ours.map(|line| format!("{who}: {line}")));
    }
    lines
}

fn open_files(dir: &str, loops: &[(String, String)]) -> Vec<String> {
    let devices: Vec<_> = loops.iter().map(|(name, _)| format!("/dev/{name}")).collect();
    let mut lines = vec![];
    for process in names("/proc").into_iter().filter(|name| name.bytes().all(|b| b.is_ascii_digit())) {
        for fd in names(format!("/proc/{process}/fd")) {
            let Ok(file) = fs::read_link(format!("/proc/{process}/fd/{fd}")) else { continue };
            let file = file.display().to_string();
            let is_data = file.contains("/targets/") || file.contains("/staging/") || file.ends_with(".lock");
            if devices.contains(&file) || (file.starts_with(dir) && is_data) {
                lines.push(format!("{process} {}: {fd} -> {file}", text(format!("/proc/{process}/comm"))));
            }
        }
    }
    lines
}

/// Who waits for a disk, and every thread of the programs that take part; where in the kernel.
fn threads() -> Vec<String> {
    let mut lines = vec![];
    for (process, thread) in all_threads() {
        let task = format!("/proc/{process}/task/{thread}");
        let status = text(format!("{task}/stat"));
        // The name may contain blanks and brackets.
        let Some(state) = status.rsplit(')').next().and_then(|rest| rest.trim().chars().next()) else { continue };
        let program = text(format!("/proc/{process}/comm"));
        let takes_part = PROGRAMS.contains(&program.as_str()) && thread == process;
        if state != 'D' && !takes_part {
            continue;
        }
        let stack = text(format!("{task}/stack"));
        let frames: Vec<_> =
            stack.lines().filter_map(|l| l.split(' ').nth(1)?.split('+').next()).take(FRAMES).collect();
        let command = text(format!("/proc/{process}/cmdline")).replace('\0', " ");
        let command: String = command.chars().take(100).collect();
        let name = text(format!("{task}/comm"));
        lines.push(format!("{process}/{thread} {name} {state} [{}] {command}", frames.join(" < ")));
    }
    // Those that hang first.
    lines.sort_by_key(|line| !line.contains(" D ["));
    lines
}
