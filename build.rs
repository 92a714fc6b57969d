//! Compiles proto/*.proto with protox: no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for name in ["catalog", "control", "csi", "operator", "recovery"] {
        let file = format!("proto/{name}.proto");
        println!("cargo::rerun-if-changed={file}");
        let descriptors = protox::compile([&file], ["proto"])?;
        tonic_prost_build::configure().compile_fds(descriptors)?;
    }
    Ok(())
}
