//! The program `felix`.

fn main() -> anyhow::Result<()> {
    felix::program::main()
}
