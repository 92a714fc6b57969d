//! Bad input on the command line: one sentence that says what to do, the right exit code, nothing half made.
//! Runs beside others.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

fn tandem() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    for variable in ["TANDEM_DIR", "TANDEM_POOLS", "CSI_ENDPOINT", "RUST_LOG"] {
        command.env_remove(variable);
    }
    command
}

fn directory() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("tandem-cli-").tempdir().expect("a directory")
}

/// Runs it and expects a refusal: that exit code, one line that begins with the program's name, and those words in it.
fn refused(command: &mut Command, code: i32, words: &[&str]) -> String {
    let Output { status, stderr, stdout } = command.output().expect("started");
    let text = String::from_utf8(stderr).expect("UTF-8");
    assert_eq!(status.code(), Some(code), "{text}");
    assert!(stdout.is_empty(), "{}", String::from_utf8_lossy(&stdout));
    for word in words {
        assert!(text.contains(word), "`{word}` in: {text}");
    }
    if code == 1 {
        assert!(text.starts_with("tandem: ") && text.lines().count() == 1, "one line: {text}");
    }
    text
}

fn standalone(dir: &Path, more: &[&str]) -> Command {
    let mut command = tandem();
    command.args(["standalone", "--dir"]).arg(dir).args(more);
    command
}

fn entries(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).expect("readable").map(|entry| entry.expect("an entry").file_name());
    names.map(|name| name.to_string_lossy().into_owned()).collect()
}

#[test]
fn what_loses_writes_is_not_done_by_the_way() {
    let dir = directory();
    let promote = |more: &[&str]| {
        let mut command = tandem();
        command.args(["promote", "data", "node-2", "--dir"]).arg(dir.path()).args(more);
        command
    };
    refused(&mut promote(&[]), 1, &["csi.sock"]);
    refused(&mut promote(&["--yes"]), 2, &["--force"]);
    refused(&mut promote(&["--force"]), 1, &["csi.sock"]);
    // The directory of a controller: a pool there means the command was meant for one machine.
    std::fs::write(dir.path().join("controller.lock"), b"").expect("written");
    let mut recover = tandem();
    recover.args(["recover", "--dir"]).arg(dir.path());
    refused(&mut recover, 1, &["csi.sock"]);
    refused(recover.args(["--pool", "default=/nowhere"]), 1, &["--pool", "TANDEM_POOLS"]);
}

#[test]
fn without_a_server_commands_say_where_they_looked() {
    let dir = directory();
    let commands: [&[&str]; 6] = [
        &["status"],
        &["volume", "list"],
        &["snapshot", "list"],
        &["pool", "list"],
        &["verify", "v"],
        &["volume", "delete", "v"],
    ];
    for arguments in commands {
        let words = ["replica.sock", "is `tandem standalone` running", "TANDEM_DIR"];
        refused(tandem().args(arguments).arg("--dir").arg(dir.path()), 1, &words);
    }
    assert!(entries(dir.path()).is_empty());
}

#[test]
fn wrong_usage_is_exit_code_2() {
    let dir = directory();
    for arguments in [&["volume", "create", "x"][..], &["nonsense"], &[]] {
        refused(tandem().args(arguments), 2, &["Usage"]);
    }
    refused(tandem().args(["volume", "create", "x", "--size", "10X"]), 2, &["`10X` is no size: write bytes"]);
    let wrong = [
        ["--pool", "nopath"],
        ["--overcommit", "0"],
        ["--overcommit", "NaN"],
        ["--spin", "5"],
        ["--io", "magic"],
        ["--max-volumes-per-node", "0"],
        ["--metrics", "here"],
    ];
    for flags in wrong {
        refused(&mut standalone(dir.path(), &flags), 2, &[flags[0], flags[1]]);
    }
    assert!(entries(dir.path()).is_empty());
}

#[test]
fn completions_of_three_shells_name_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let answer = tandem().args(["completions", shell]).output().expect("started");
        let script = String::from_utf8(answer.stdout).expect("UTF-8");
        assert!(answer.status.success() && script.contains("standalone") && script.contains("snapshot"), "{shell}");
    }
}

#[test]
fn only_root_may_serve() {
    let dir = directory();
    // The build directory may be closed to others: a copy that is not.
    let program = dir.path().join("tandem");
    // By another process: while this one writes a file, another test's fork may keep it open, and it cannot be executed.
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_tandem")).arg(&program).status().expect("cp");
    assert!(copied.success());
    for path in [dir.path(), &program] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("opened to others");
    }
    let mut command = Command::new(&program);
    command.args(["standalone", "--dir"]).arg(dir.path().join("state")).uid(65534).gid(65534);
    refused(&mut command, 1, &["must run as root", "sudo"]);
    assert_eq!(entries(dir.path()), ["tandem"]);
}

#[test]
fn too_few_descriptors_name_the_limit_and_what_it_allows() {
    let dir = directory();
    let state = dir.path().join("state");
    let mut command = Command::new("sh");
    command
        .args(["-c", "ulimit -n 300 && exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_tandem"), "standalone", "--dir"])
        .arg(&state);
    if nix::unistd::geteuid().is_root() && has_sys_resource() {
        // Who may raise the limit is not refused.
        return;
    }
    refused(&mut command, 1, &["too few descriptors: 300", "--max-volumes-per-node to 4", "ulimit -n 10256"]);
    assert!(!state.exists());
}

/// Whether this process may raise its own limits (CAP_SYS_RESOURCE).
fn has_sys_resource() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").expect("readable");
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("a line");
    u64::from_str_radix(line.trim(), 16).expect("a number") & (1 << 24) != 0
}

#[test]
fn a_directory_that_is_served_or_cannot_be_written_is_refused() {
    let dir = directory();
    let _held =
        tandem::standalone::Lock::take(&dir.path().join("tandem.lock"), std::time::Duration::ZERO).expect("free");
    let pid = format!("(pid {})", std::process::id());
    refused(&mut standalone(dir.path(), &[]), 1, &["another tandem", &pid, "another --dir"]);
    assert_eq!(entries(dir.path()), ["tandem.lock"]);
    refused(&mut standalone(Path::new("/proc/tandem"), &[]), 1, &["cannot write in /proc/tandem", "--dir"]);
    let file = dir.path().join("file");
    std::fs::write(&file, "").expect("written");
    refused(&mut standalone(&file, &[]), 1, &["cannot write in"]);
}

#[test]
fn a_wrong_endpoint_or_pool_is_named() {
    let dir = directory();
    let file = dir.path().join("file.sock");
    std::fs::write(&file, "").expect("written");
    let occupied = format!("unix://{}", file.display());
    let long = format!("unix://{}/{}.sock", dir.path().display(), "x".repeat(120));
    let cases: [(&[&str], &str); 5] = [
        (&["--endpoint", "tcp://127.0.0.1:5000"], "is no endpoint: write unix://"),
        (&["--endpoint", "csi.sock"], "is no endpoint"),
        (&["--endpoint", &occupied], "is no socket: remove it"),
        (&["--endpoint", &long], "has more than 107 bytes"),
        (&["--pool", "a=/x", "--pool", "a=/y"], "the pool name `a` is given twice"),
    ];
    for (flags, words) in cases {
        refused(&mut standalone(dir.path(), flags), 1, &[words]);
    }
    assert_eq!(entries(dir.path()), ["file.sock"]);
}

fn certificates(arguments: &[&str], dir: &Path) -> Command {
    let mut command = tandem();
    command.arg("certificates").args(arguments).arg("--dir").arg(dir);
    command
}

/// What a command answered in JSON.
fn answer(command: &mut Command) -> serde_json::Value {
    let Output { status, stdout, stderr } = command.args(["-o", "json"]).output().expect("started");
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    serde_json::from_slice(&stdout).expect("JSON")
}

#[test]
fn certificates_are_made_once_and_name_their_holder() {
    let dir = directory();
    let (authority, node) = (dir.path().join("authority"), dir.path().join("node-1"));
    let issue = ["issue", "--role", "node", "--name", "node-1", "--address", "10.0.0.1,db.lab"];
    let out = ["--out", node.to_str().expect("UTF-8")];
    let words = ["there is no", "ca.crt", "tandem certificates"];
    refused(certificates(&issue, &authority).args(out), 1, &words);
    let made = answer(&mut certificates(&["init", "--cluster", "lab"], &authority));
    assert_eq!((made["name"].as_str(), made["role"].as_str()), (Some("lab"), Some("authority")));
    let issued = answer(certificates(&issue, &authority).args(out));
    assert_eq!((issued["name"].as_str(), &issued["cluster_id"]), (Some("node-1"), &made["cluster_id"]));
    assert_eq!(issued["addresses"], serde_json::json!(["10.0.0.1", "db.lab"]));
    let mut files = entries(&node);
    files.sort();
    assert_eq!(files, ["ca.crt", "tls.crt", "tls.key"]);
    let mode = std::fs::metadata(node.join("tls.key")).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    refused(certificates(&issue, &authority).args(out), 1, &["tls.key", "never overwritten"]);
    refused(&mut certificates(&["init"], &authority), 1, &["ca.key", "never overwritten"]);
}

#[test]
fn certificates_for_names_that_are_none_are_refused() {
    let dir = directory();
    for name in ["../etc", "Node", "", "a b"] {
        let arguments = ["issue", "--role", "node", "--name", name, "--out", "x"];
        refused(&mut certificates(&arguments, dir.path()), 2, &["is no name"]);
    }
    let arguments = ["issue", "--role", "authority", "--name", "a", "--out", "x"];
    refused(&mut certificates(&arguments, dir.path()), 2, &["node, controller"]);
    assert!(entries(dir.path()).is_empty());
}

#[test]
fn roles_of_a_cluster_want_flags_and_certificates_that_go_together() {
    let dir = directory();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let made = |arguments: &[&str]| assert!(tandem().args(arguments).output().expect("started").status.success());
    made(&["certificates", "init", "--dir", &path("authority")]);
    for (role, name) in [("node", "node-1"), ("controller", "control")] {
        let (authority, out) = (path("authority"), path(name));
        made(&["certificates", "issue", "--dir", &authority, "--role", role, "--name", name, "--out", &out]);
    }
    let state = path("state");
    let replica = |more: &[&str]| {
        let mut command = tandem();
        command.args(["replica", "--dir", &state]).args(more);
        command
    };
    let missing = ["--listen, --mirror-listen, --certificates is missing", "one that is alone takes none"];
    refused(&mut replica(&["--controller", "127.0.0.1:1"]), 1, &missing);
    refused(
        &mut replica(&["--encryption", "off"]),
        1,
        &["--controller, --listen, --mirror-listen, --certificates is missing"],
    );
    let all = |listen: &str, certificates: &str, more: &[&str]| {
        let mut command =
            replica(&["--controller", "127.0.0.1:1", "--listen", listen, "--mirror-listen", "127.0.0.1:3"]);
        command.args(["--certificates", certificates]).args(more);
        command
    };
    refused(&mut all("0.0.0.0:2", &path("node-1"), &[]), 1, &["--listen 0.0.0.0:2", "another machine can call"]);
    refused(&mut all("127.0.0.1:2", &path("nothing"), &[]), 1, &["there is no", "tandem certificates"]);
    refused(&mut all("127.0.0.1:2", &path("control"), &[]), 1, &["/controller/control", "--role node"]);
    let another = ["--node-id is node-7", "/node/node-1"];
    refused(&mut all("127.0.0.1:2", &path("node-1"), &["--node-id", "node-7"]), 1, &another);
    let mut controller = tandem();
    controller.args(["controller", "--dir", &state, "--listen", "127.0.0.1:0", "--certificates", &path("node-1")]);
    refused(&mut controller, 1, &["/node/node-1", "--role controller"]);
    refused(tandem().args(["controller", "--dir", &state]), 2, &["--listen", "--certificates", "Usage"]);
    let help = tandem().args(["controller", "--help"]).output().expect("started").stdout;
    assert!(String::from_utf8(help).expect("text").contains("tandem certificates --help"));
}
