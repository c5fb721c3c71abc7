//! What the CNI specification fixes: versions, error codes, the environment of a call. Pure.

use std::collections::BTreeMap;

use cali_control::cni::{Command, Failure};
use serde_json::{Value, json};

/// Versions of the specification that are spoken, oldest first.
pub const VERSIONS: [&str; 7] = [
    "0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0",
];
/// What a configuration without `cniVersion` means.
pub const DEFAULT_VERSION: &str = "0.1.0";

/// Error codes (CNI specification 1.1, "Error"). 100 and above are ours.
pub mod code {
    /// The version of the configuration is not spoken.
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    /// The configuration has a field of this meaning that is not supported.
    pub const UNSUPPORTED_FIELD: u32 = 2;
    /// A variable of the environment is missing or wrong.
    pub const ENVIRONMENT: u32 = 4;
    /// Input or output failed.
    pub const IO: u32 = 5;
    /// Standard input is not what it should be.
    pub const DECODING: u32 = 6;
    /// The network configuration is wrong.
    pub const CONFIGURATION: u32 = 7;
    /// A passing condition: try again.
    pub const TRY_AGAIN: u32 = 11;
    /// `STATUS`: no `ADD` can be served.
    pub const NOT_AVAILABLE: u32 = 50;
    /// The kernel refused.
    pub const KERNEL: u32 = 100;
    /// No address could be given.
    pub const NO_ADDRESS: u32 = 101;
    /// The pod does not fit the call.
    pub const POD: u32 = 102;
    /// `CHECK` found something missing or changed.
    pub const CHECK: u32 = 103;
}

/// An error object, without details.
pub fn failure(code: u32, msg: impl Into<String>) -> Failure {
    Failure {
        code,
        msg: msg.into(),
        details: String::new(),
    }
}

/// An error object whose details are the error and its causes.
pub fn failure_of(code: u32, msg: impl Into<String>, error: &dyn std::error::Error) -> Failure {
    let mut details = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        details.push_str(": ");
        details.push_str(&error.to_string());
        cause = error.source();
    }
    Failure {
        code,
        msg: msg.into(),
        details,
    }
}

/// The error object as printed.
pub fn error_object(version: &str, failure: &Failure) -> Value {
    let mut object = json!({"cniVersion": version, "code": failure.code, "msg": failure.msg});
    if !failure.details.is_empty() {
        object["details"] = json!(failure.details);
    }
    object
}

/// Whether a version of the specification is at least another one of [`VERSIONS`].
pub fn at_least(version: &str, other: &str) -> bool {
    let place = |v: &str| VERSIONS.iter().position(|known| *known == v);
    place(version) >= place(other)
}

/// A call, as its environment tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// `CNI_COMMAND`.
    pub command: Command,
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_NETNS`; may be empty for `DEL`.
    pub netns: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
    /// `CNI_ARGS`.
    pub args: BTreeMap<String, String>,
}

/// What a program was called for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// `VERSION`: answered without configuration.
    Version,
    /// Everything else.
    Call(Call),
}

/// Reads the environment of a call (CNI specification 1.1, "Parameters").
pub fn asked(variable: impl Fn(&str) -> Option<String>) -> Result<Asked, Failure> {
    let get = |name: &str| variable(name).filter(|value| !value.is_empty());
    let wrong = |name: &str, why: &str| {
        failure(
            code::ENVIRONMENT,
            format!("environment variable {name} {why}"),
        )
    };
    let need = |name: &str| get(name).ok_or_else(|| wrong(name, "is missing"));
    let command = match need("CNI_COMMAND")?.as_str() {
        "VERSION" => return Ok(Asked::Version),
        "ADD" => Command::Add,
        "DEL" => Command::Del,
        "CHECK" => Command::Check,
        "GC" => Command::Gc,
        "STATUS" => Command::Status,
        other => {
            return Err(wrong(
                "CNI_COMMAND",
                &format!("is {other:?}, which is no CNI operation"),
            ));
        }
    };
    let about_container = matches!(command, Command::Add | Command::Del | Command::Check);
    let (mut container_id, mut ifname) = (String::new(), String::new());
    if about_container {
        container_id = need("CNI_CONTAINERID")?;
        if !is_container_id(&container_id) {
            return Err(wrong(
                "CNI_CONTAINERID",
                "may only hold letters, digits, '_', '.' and '-', and begins with a letter or digit",
            ));
        }
        ifname = need("CNI_IFNAME")?;
        if !is_interface_name(&ifname) {
            return Err(wrong("CNI_IFNAME", "is not a valid interface name"));
        }
    }
    let netns = match command {
        Command::Add | Command::Check => need("CNI_NETNS")?,
        _ => get("CNI_NETNS").unwrap_or_default(),
    };
    Ok(Asked::Call(Call {
        command,
        container_id,
        netns,
        ifname,
        args: args(&get("CNI_ARGS").unwrap_or_default())?,
    }))
}

/// `A=1;B=2` as a map.
fn args(text: &str) -> Result<BTreeMap<String, String>, Failure> {
    let mut args = BTreeMap::new();
    for pair in text.split(';').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').ok_or_else(|| {
            failure(
                code::ENVIRONMENT,
                format!("environment variable CNI_ARGS: {pair:?} is not name=value"),
            )
        })?;
        args.insert(name.to_owned(), value.to_owned());
    }
    Ok(args)
}

/// A container id, as the specification limits it; it becomes part of file names.
pub fn is_container_id(text: &str) -> bool {
    text.len() <= 200
        && text
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_alphanumeric())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

/// An interface name that the kernel takes (`dev_valid_name`), without characters that mean something in paths.
pub fn is_interface_name(text: &str) -> bool {
    (1..=15).contains(&text.len())
        && text != "."
        && text != ".."
        && !text.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(pairs: &[(&str, &str)]) -> Result<Asked, Failure> {
        let map: BTreeMap<_, _> = pairs.iter().copied().collect();
        asked(|name| map.get(name).map(|v| (*v).to_owned()))
    }

    const ADD: [(&str, &str); 4] = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "abc"),
        ("CNI_NETNS", "/run/netns/x"),
        ("CNI_IFNAME", "eth0"),
    ];

    #[test]
    fn a_missing_variable_is_named_with_code_4() {
        for missing in 0..ADD.len() {
            let mut pairs = ADD.to_vec();
            let (name, _) = pairs.remove(missing);
            let failure = ask(&pairs).unwrap_err();
            assert_eq!(failure.code, 4);
            assert!(failure.msg.contains(name), "{}", failure.msg);
        }
    }

    #[test]
    fn delete_needs_no_namespace_and_status_needs_nothing() {
        assert!(ask(&[("CNI_COMMAND", "DEL"), ADD[1], ADD[3]]).is_ok());
        assert!(ask(&[("CNI_COMMAND", "STATUS")]).is_ok());
        assert_eq!(ask(&[("CNI_COMMAND", "VERSION")]), Ok(Asked::Version));
    }

    #[test]
    fn names_that_could_leave_a_folder_are_refused() {
        for bad in ["../x", ".x", "", "a/b", "a b"] {
            assert!(
                ask(&[ADD[0], ("CNI_CONTAINERID", bad), ADD[2], ADD[3]]).is_err(),
                "{bad:?}"
            );
            assert!(
                ask(&[ADD[0], ADD[1], ADD[2], ("CNI_IFNAME", bad)]).is_err() || bad == ".x",
                "{bad:?}"
            );
        }
    }

    #[test]
    fn args_are_split() {
        let Ok(Asked::Call(call)) = ask(&[
            ADD[0],
            ADD[1],
            ADD[2],
            ADD[3],
            ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAME=a=b;"),
        ]) else {
            panic!("not a call")
        };
        assert_eq!(
            call.args.get("K8S_POD_NAME").map(String::as_str),
            Some("a=b")
        );
        assert_eq!(call.args.len(), 2);
    }

    #[test]
    fn versions_compare_by_their_order() {
        assert!(at_least("1.1.0", "0.4.0"));
        assert!(!at_least("0.3.1", "0.4.0"));
    }
}
