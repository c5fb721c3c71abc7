//! The program `cali-node`.

fn main() -> std::process::ExitCode {
    cali_node::program::main()
}
