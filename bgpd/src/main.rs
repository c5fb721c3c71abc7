//! The program `bgpd`.

fn main() -> std::process::ExitCode {
    bgpd::program::main()
}
