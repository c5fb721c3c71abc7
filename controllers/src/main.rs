//! The program `cali-controllers`.

fn main() -> anyhow::Result<()> {
    cali_controllers::program::main()
}
