//! The program `calictl`.

fn main() -> std::process::ExitCode {
    calictl::main()
}
