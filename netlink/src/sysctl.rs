//! Kernel settings below `/proc/sys/net`, of one namespace.
//!
//! Keys are paths below that folder (`ipv4/conf/vxlan.calico/rp_filter`), because device names may contain dots.
//!
//! Containers see `/proc/sys` read-only unless they are privileged. The host's folder, mounted in another place, shows the settings of
//! whichever namespace the reader is in, just as the container's own does ([`go_through`]).

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use nix::errno::Errno;

use crate::{
    error::{Cause, Error, Result},
    netns::NetNs,
};

/// Where the settings are.
const FOLDER: &str = "/proc/sys/net";

/// The place that was chosen instead.
static ELSEWHERE: OnceLock<PathBuf> = OnceLock::new();

/// Reads and writes through a host's `/proc/sys/net` that is mounted below `host_root`, from now on, if there is one; says whether. The
/// first place that is found stays. To be called before anything is read or written.
pub fn go_through(host_root: &Path) -> bool {
    let folder = host_root.join(FOLDER.trim_start_matches('/'));
    // The mount point alone is empty.
    folder.join("core").is_dir() && ELSEWHERE.get_or_init(|| folder.clone()) == &folder
}

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
    let fail = |error: &io::Error| refused(&format!("sysctl net/{key}={value}"), error);
    if fs::read_to_string(&path).is_ok_and(|now| same_value(&now, value)) {
        return Ok(false);
    }
    fs::write(&path, value).map_err(|error| fail(&error))?;
    Ok(true)
}

fn refused(object: &str, error: &io::Error) -> Error {
    if error.raw_os_error() != Some(libc::EROFS) {
        return Error::io("write", object, error);
    }
    let next = "where /proc/sys is read-only, as in a container, mount the host's /proc/sys/net at /host/proc/sys/net";
    let cause = Cause::Kernel {
        errno: Errno::EROFS,
        message: Some(next.into()),
    };
    Error::new("write", object, cause)
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
    let folder = ELSEWHERE.get().map_or(Path::new(FOLDER), PathBuf::as_path);
    Ok(folder.join(key))
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
    fn a_mount_point_without_the_hosts_settings_is_not_taken() {
        let root = tempfile::tempdir().expect("a folder");
        fs::create_dir_all(root.path().join("proc/sys/net")).expect("a folder");
        assert!(!go_through(root.path()));
    }

    #[test]
    fn what_is_read_only_is_said_with_the_next_step() {
        let error = refused(
            "sysctl net/ipv4/ip_forward=1",
            &io::Error::from_raw_os_error(libc::EROFS),
        );
        let said = error.to_string();
        assert!(
            said.contains("/host/proc/sys/net") && said.contains("ip_forward"),
            "{said}"
        );
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
