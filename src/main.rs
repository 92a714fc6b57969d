//! The `tandem` program: all of it is in the library.

fn main() -> std::process::ExitCode {
    tandem::cli::main()
}
