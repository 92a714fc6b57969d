//! `proto/csi.proto` is the Container Storage Interface 1.13.0: compared, descriptor by descriptor, with the official
//! file, which the test fetches as a Go module and which is never committed.
//! Runs beside others.

use prost_reflect::{DescriptorPool, EnumDescriptor, FieldDescriptor, Kind, MessageDescriptor, ServiceDescriptor};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

const OFFICIAL: &str = "github.com/container-storage-interface/spec@v1.13.0";

/// Downloads the module (or finds it in Go's cache) and says where its files are.
fn official() -> PathBuf {
    let output = Command::new("go")
        .args(["mod", "download", "-json", OFFICIAL])
        .current_dir(std::env::temp_dir())
        .output()
        .expect("`go` runs: install Go 1.21 or newer and put it on PATH");
    let text = String::from_utf8_lossy(&output.stdout);
    let answer: serde_json::Value = serde_json::from_str(&text).expect("`go mod download -json` answers with JSON");
    let directory = answer["Dir"].as_str();
    directory.map(PathBuf::from).unwrap_or_else(|| panic!("{OFFICIAL} cannot be fetched: {}", answer["Error"]))
}

fn pool(directory: &Path) -> DescriptorPool {
    let mut compiler = protox::Compiler::new([directory]).expect("include path");
    compiler.include_imports(true);
    compiler.open_file(directory.join("csi.proto")).expect("csi.proto compiles");
    DescriptorPool::decode(compiler.encode_file_descriptor_set().as_slice()).expect("a descriptor set")
}

/// Every fact of a file that two ends of a connection must agree on: a path to it, and what it says.
fn facts(pool: &DescriptorPool) -> BTreeMap<String, String> {
    let mut facts = BTreeMap::new();
    for message in pool.all_messages().filter(|m| m.package_name() == "csi.v1") {
        message_facts(&message, &mut facts);
    }
    for descriptor in pool.all_enums().filter(|e| e.package_name() == "csi.v1") {
        enum_facts(&descriptor, &mut facts);
    }
    for service in pool.services().filter(|s| s.package_name() == "csi.v1") {
        service_facts(&service, &mut facts);
    }
    for extension in pool.all_extensions().filter(|e| e.parent_file().package_name() == "csi.v1") {
        let says = format!("{} {:?}", extension.number(), extension.kind());
        facts.insert(format!("{} of {}", extension.full_name(), extension.containing_message().full_name()), says);
    }
    facts
}

fn message_facts(message: &MessageDescriptor, facts: &mut BTreeMap<String, String>) {
    let name = message.full_name();
    let reserved: Vec<_> = message.reserved_ranges().collect();
    facts.insert(name.into(), format!("reserved {reserved:?}, {}", options(message.options())));
    for field in message.fields() {
        facts.insert(format!("{name}#{}", field.number()), field_says(&field));
    }
}

fn field_says(field: &FieldDescriptor) -> String {
    let kind = match field.kind() {
        Kind::Message(message) => message.full_name().to_owned(),
        Kind::Enum(descriptor) => descriptor.full_name().to_owned(),
        scalar => format!("{scalar:?}"),
    };
    let oneof = field.containing_oneof().map(|oneof| oneof.name().to_owned());
    format!(
        "{} {} {kind} {:?} map={} optional={} packed={} oneof={oneof:?} {}",
        field.name(),
        field.json_name(),
        field.cardinality(),
        field.is_map(),
        field.field_descriptor_proto().proto3_optional(),
        field.is_packed(),
        options(field.options()),
    )
}

fn enum_facts(descriptor: &EnumDescriptor, facts: &mut BTreeMap<String, String>) {
    let name = descriptor.full_name();
    let reserved: Vec<_> = descriptor.reserved_ranges().collect();
    facts.insert(name.into(), format!("reserved {reserved:?}, {}", options(descriptor.options())));
    for value in descriptor.values() {
        facts.insert(format!("{name}#{}", value.number()), format!("{} {}", value.name(), options(value.options())));
    }
}

fn service_facts(service: &ServiceDescriptor, facts: &mut BTreeMap<String, String>) {
    facts.insert(service.full_name().into(), options(service.options()));
    for method in service.methods() {
        let says = format!(
            "{} stream={} -> {} stream={} {}",
            method.input().full_name(),
            method.is_client_streaming(),
            method.output().full_name(),
            method.is_server_streaming(),
            options(method.options()),
        );
        facts.insert(format!("{}/{}", service.full_name(), method.name()), says);
    }
}

/// The options that are set, the custom ones included (csi_secret, alpha_*).
fn options(options: prost_reflect::DynamicMessage) -> String {
    let mut set: Vec<_> = options.extensions().map(|(e, value)| format!("{}={value}", e.full_name())).collect();
    set.extend(options.fields().map(|(f, value)| format!("{}={value}", f.name())));
    set.sort();
    format!("options {set:?}")
}

#[test]
fn our_csi_proto_says_what_the_official_one_says() {
    let ours = facts(&pool(&Path::new(env!("CARGO_MANIFEST_DIR")).join("proto")));
    let official = facts(&pool(&official()));
    let mut differences = Vec::new();
    for (what, says) in &official {
        match ours.get(what) {
            None => differences.push(format!("missing: {what}: {says}")),
            Some(our) if our != says => differences.push(format!("{what}:\n  official {says}\n  ours     {our}")),
            Some(_) => {}
        }
    }
    let extra = ours.keys().filter(|what| !official.contains_key(*what)).map(|what| format!("not official: {what}"));
    differences.extend(extra);
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    assert!(official.len() > 400, "only {} facts were compared", official.len());
}

#[test]
fn every_secret_is_marked() {
    let ours = pool(&Path::new(env!("CARGO_MANIFEST_DIR")).join("proto"));
    let mark = ours.get_extension_by_name("csi.v1.csi_secret").expect("the option is declared");
    let mut secrets = 0;
    for field in ours.all_messages().flat_map(|m| m.fields().collect::<Vec<_>>()).filter(|f| f.name() == "secrets") {
        assert!(field.options().has_extension(&mark), "{} is not marked", field.full_name());
        secrets += 1;
    }
    assert!(secrets > 15, "only {secrets} fields are called secrets");
}
