//! `node diags` and `cluster diags`: what one needs to find a fault from afar, in one archive, with secrets masked.
//!
//! Nothing is changed anywhere. Every piece is bounded in time and size, and one that cannot be had leaves its reason in
//! `contents.txt` instead of ending the collection.

pub(crate) mod cluster;
mod commands;
mod kubernetes;
mod mask;
pub(crate) mod node;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use cali_datastore::timestamp;
use flate2::Compression;
use flate2::write::GzEncoder;

use crate::output;
use crate::progress::Progress;

/// More of one piece is cut off, in octets; of a log, the beginning.
const PIECE_LIMIT: usize = 16 << 20;

/// An archive that is being filled: `NAME/piece`, and at its end the list of what it holds.
pub(super) struct Archive<W: Write> {
    tar: tar::Builder<GzEncoder<W>>,
    folder: String,
    at: SystemTime,
    contents: String,
    failures: usize,
    pieces: usize,
    progress: Progress,
}

impl<W: Write> Archive<W> {
    pub(super) fn new(into: W, folder: &str, at: SystemTime) -> Self {
        Self {
            tar: tar::Builder::new(GzEncoder::new(into, Compression::default())),
            folder: folder.to_owned(),
            at,
            contents: String::new(),
            failures: 0,
            pieces: 0,
            progress: Progress::open_ended("Collecting"),
        }
    }

    /// Text, with secrets masked.
    pub(super) fn text(&mut self, name: &str, text: &str) -> Result<()> {
        self.octets(name, mask::mask(text).as_bytes())
    }

    /// Octets as they are.
    pub(super) fn octets(&mut self, name: &str, octets: &[u8]) -> Result<()> {
        let kept = &octets[..octets.len().min(PIECE_LIMIT)];
        self.append(name, kept)?;
        let cut = if kept.len() < octets.len() {
            format!(", cut off at {PIECE_LIMIT} octets")
        } else {
            String::new()
        };
        self.contents
            .push_str(&format!("{name}: {} octets{cut}\n", kept.len()));
        Ok(())
    }

    /// A piece that could not be had.
    pub(super) fn lacks(&mut self, name: &str, reason: &str) {
        self.failures += 1;
        self.progress.now(format!("Collecting; no {name}"));
        self.contents
            .push_str(&format!("{name}: NOT COLLECTED: {}\n", mask::mask(reason)));
    }

    /// The text, or why there is none.
    pub(super) fn result(&mut self, name: &str, result: Result<String>) -> Result<()> {
        match result {
            Ok(text) => self.text(name, &text),
            Err(error) => {
                self.lacks(name, &format!("{error:#}"));
                Ok(())
            }
        }
    }

    fn append(&mut self, name: &str, octets: &[u8]) -> Result<()> {
        self.pieces += 1;
        let count = self.pieces;
        self.progress
            .now(format!("Collecting, {count} pieces so far: {name}"));
        let mut header = tar::Header::new_gnu();
        header.set_size(octets.len() as u64);
        header.set_mode(0o600);
        let at = self.at.duration_since(SystemTime::UNIX_EPOCH);
        header.set_mtime(at.map_or(0, |since| since.as_secs()));
        let path = format!("{}/{name}", self.folder);
        self.tar
            .append_data(&mut header, path, octets)
            .context("cannot write the archive")
    }

    /// Writes the list of contents and the archive's end. Returns how many pieces are missing.
    pub(super) fn finish(mut self) -> Result<(W, usize)> {
        let contents = std::mem::take(&mut self.contents);
        self.append("contents.txt", contents.as_bytes())?;
        let into = self
            .tar
            .into_inner()
            .and_then(GzEncoder::finish)
            .context("cannot write the archive")?;
        Ok((into, self.failures))
    }
}

/// Opens the archive of a collection, in the file or folder that was asked for.
fn begin(
    prefix: &str,
    asked: Option<&Path>,
    at: SystemTime,
) -> Result<(Archive<Box<dyn Write>>, Target)> {
    let name = stamped(prefix, at);
    let target = Target::of(asked, &name);
    Ok((Archive::new(target.open()?, &name, at), target))
}

/// Ends the archive and says where it is.
fn conclude(archive: Archive<Box<dyn Write>>, target: &Target) -> Result<()> {
    let name = archive.folder.clone();
    let (mut into, missing) = archive.finish()?;
    into.flush().context("cannot write the archive")?;
    if let Target::File(path) = target {
        output::line(format!("Diags saved to {}", path.display()));
        if missing > 0 {
            output::line(format!(
                "{missing} pieces could not be collected; {name}/contents.txt in it says why"
            ));
        }
        output::line(
            "Secrets are masked, names and addresses are not: look it over before you hand it on.",
        );
    }
    Ok(())
}

/// `PREFIX-20260131_235959`: the archive's name without its ending.
fn stamped(prefix: &str, at: SystemTime) -> String {
    let digits: String = timestamp::format(at)
        .chars()
        .filter(char::is_ascii_digit)
        .collect();
    let (day, time) = digits.split_at(8);
    format!("{prefix}-{day}_{time}")
}

/// Where the archive goes: a file, a file in a folder, or standard output.
enum Target {
    File(PathBuf),
    Output,
}

impl Target {
    fn of(asked: Option<&Path>, name: &str) -> Self {
        let file = format!("{name}.tar.gz");
        match asked {
            Some(path) if path == Path::new("-") => Self::Output,
            Some(path) if path.is_dir() => Self::File(path.join(file)),
            Some(path) => Self::File(path.to_owned()),
            None => Self::File(file.into()),
        }
    }

    /// The target opened for one archive; what stood there is left alone.
    fn open(&self) -> Result<Box<dyn Write>> {
        use std::os::unix::fs::OpenOptionsExt;
        Ok(match self {
            Self::Output => Box::new(std::io::stdout().lock()),
            // Masked or not: addresses, names and logs are nobody else's business.
            Self::File(path) => Box::new(
                std::fs::OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(path)
                    .with_context(|| {
                        format!(
                            "cannot create {} (--output names another file or folder)",
                            path.display()
                        )
                    })?,
            ),
        })
    }
}

/// `90s`, `30m`, `2h`, `3d`; a number alone is seconds.
fn duration(text: &str) -> Result<Duration> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let number: u64 = digits
        .parse()
        .with_context(|| format!("{text:?} is no duration: it is 90s, 30m, 2h or 3d"))?;
    let factor = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        unit => bail!("{unit:?} is no unit of time: it is s, m, h or d"),
    };
    number
        .checked_mul(factor)
        .map(Duration::from_secs)
        .with_context(|| format!("{text} is too long"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn an_archive_says_what_it_holds_and_what_is_missing() {
        let mut archive = Archive::new(Vec::new(), "d", SystemTime::UNIX_EPOCH);
        archive.text("env.txt", "PASSWORD=abc\n").expect("written");
        archive
            .octets("big", &vec![7; PIECE_LIMIT + 1])
            .expect("written");
        archive
            .result("nft.txt", Err(anyhow::anyhow!("nft is not installed")))
            .expect("noted");
        let (octets, failures) = archive.finish().expect("finished");
        assert_eq!(failures, 1);
        let mut found = Vec::new();
        let mut tar = tar::Archive::new(flate2::read::GzDecoder::new(&octets[..]));
        for entry in tar.entries().expect("entries") {
            let mut entry = entry.expect("an entry");
            let name = entry.path().expect("a path").display().to_string();
            let mut text = String::new();
            if name != "d/big" {
                entry.read_to_string(&mut text).expect("text");
            }
            found.push((name, text));
        }
        let contents = format!(
            "env.txt: 13 octets\nbig: {PIECE_LIMIT} octets, cut off at {PIECE_LIMIT} octets\n\
             nft.txt: NOT COLLECTED: nft is not installed\n"
        );
        let expected = [
            ("d/env.txt", "PASSWORD=***\n"),
            ("d/big", ""),
            ("d/contents.txt", &contents),
        ];
        assert_eq!(
            found,
            expected.map(|(name, text)| (name.to_owned(), text.to_owned()))
        );
    }

    #[test]
    fn names_carry_the_time_and_durations_a_unit() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        assert_eq!(stamped("diags", at), "diags-20270115_080000");
        for (text, seconds) in [("90", 90), ("90s", 90), ("30m", 1800), ("2h", 7200)] {
            assert_eq!(duration(text).expect(text), Duration::from_secs(seconds));
        }
        for text in ["", "h", "2w", "-1s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
