//! `calictl bgp dump`: the daemon's table into an MRT file, piece by piece.

use super::ask;
use anyhow::{Context, Result, bail};
use cali_control::status::{BgpRequest, BgpResponse};
use std::io::{BufWriter, Write};
use std::path::Path;

pub(super) async fn write(file: &Path) -> Result<()> {
    let named = || format!("cannot write {}", file.display());
    let mut out: Box<dyn Write> = if file == Path::new("-") {
        Box::new(std::io::stdout().lock())
    } else {
        Box::new(BufWriter::new(
            std::fs::File::create(file).with_context(named)?,
        ))
    };
    let mut cursor = None;
    loop {
        let (records, next) = match ask(BgpRequest::Mrt { cursor }).await? {
            BgpResponse::Mrt { records, next } => (records, next),
            other => bail!("bgpd answered {other:?}"),
        };
        out.write_all(&octets(&records)?).with_context(named)?;
        if next.is_none() {
            break;
        }
        cursor = next;
    }
    out.flush().with_context(named)
}

fn octets(hexadecimal: &str) -> Result<Vec<u8>> {
    let pairs = hexadecimal.as_bytes().chunks(2);
    pairs
        .map(|pair| {
            let text = std::str::from_utf8(pair)?;
            Ok(u8::from_str_radix(text, 16)?)
        })
        .collect::<Result<_>>()
        .context("bgpd's dump is not hexadecimal")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octets_come_out_of_their_text() {
        assert_eq!(octets("00ff0d").unwrap(), [0, 255, 13]);
        assert!(octets("0g").is_err());
    }
}
