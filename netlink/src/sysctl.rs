//! Kernel settings below `/proc/sys/net`, of one namespace.
//!
//! Keys are paths below that folder (`ipv4/conf/vxlan.calico/rp_filter`), because device names may contain dots.

use std::{fs, io, path::PathBuf};

use crate::{
    error::{Error, Result},
    netns::NetNs,
};

/// Reads one setting, without the line end.
pub fn read(netns: &NetNs, key: &str) -> Result<String> {
    netns.run(|| read_here(key))?
}

/// [`read`] in the namespace of the calling thread: for work inside of [`NetNs::run`].
pub fn read_here(key: &str) -> Result<String> {
    fs::read_to_string(path("read", key)?)
        .map(|text| text.trim_end().to_owned())
        .map_err(|error| Error::io("read", format!("sysctl net/{key}"), &error))
}

/// Writes one setting unless it has the value already; says whether it wrote.
///
/// Comparing first keeps read-only `/proc/sys` (containers) usable when the values are right.
pub fn write_if_different(netns: &NetNs, key: &str, value: &str) -> Result<bool> {
    write_all(netns, &[(key, value)]).pop().unwrap_or(Ok(false))
}

/// Writes many settings with one visit to the namespace; one result each, whether it wrote.
pub fn write_all(netns: &NetNs, settings: &[(&str, &str)]) -> Vec<Result<bool>> {
    match netns.run(|| write_all_here(settings)) {
        Ok(results) => results,
        Err(error) => settings.iter().map(|_| Err(error.clone())).collect(),
    }
}

/// [`write_all`] in the namespace of the calling thread: for work inside of [`NetNs::run`].
pub fn write_all_here(settings: &[(&str, &str)]) -> Vec<Result<bool>> {
    settings
        .iter()
        .map(|(key, value)| write_here(key, value))
        .collect()
}

fn write_here(key: &str, value: &str) -> Result<bool> {
    let path = path("write", key)?;
    let fail = |error: &io::Error| Error::io("write", format!("sysctl net/{key}={value}"), error);
    if fs::read_to_string(&path).is_ok_and(|now| same_value(&now, value)) {
        return Ok(false);
    }
    fs::write(&path, value).map_err(|error| fail(&error))?;
    Ok(true)
}

/// Lists of numbers are shown with tabs where they are written with spaces.
fn same_value(seen: &str, wanted: &str) -> bool {
    seen.split_whitespace().eq(wanted.split_whitespace())
}

fn path(operation: &'static str, key: &str) -> Result<PathBuf> {
    let clean = !key.is_empty()
        && key
            .split('/')
            .all(|part| !part.is_empty() && part != "." && part != "..");
    if !clean {
        return Err(Error::invalid(
            operation,
            format!("sysctl net/{key}"),
            "not a valid key",
        ));
    }
    Ok(PathBuf::from("/proc/sys/net").join(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tabs_and_line_ends_do_not_matter() {
        assert!(same_value("32768\t60999\n", "32768 60999"));
        assert!(!same_value("1\n", "0"));
    }

    #[test]
    fn keys_cannot_leave_the_folder() {
        for bad in [
            "",
            "/etc/passwd",
            "../kernel/panic",
            "ipv4//x",
            "ipv4/../../kernel/panic",
        ] {
            assert!(path("read", bad).is_err(), "{bad:?}");
        }
    }
}
