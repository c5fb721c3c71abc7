//! The program `typha`.

fn main() -> anyhow::Result<()> {
    typha::program::main()
}
