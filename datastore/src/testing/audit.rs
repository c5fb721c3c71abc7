//! What users of the API server have asked for, from its audit log; and what they have a right to, from the roles.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

/// The file that says what is written down. There is an audit log where there is this file.
const POLICY: &str = "audit-policy.json";
const LOG: &str = "audit.log";

/// Something that can be asked of the API server, and granted by a role.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Right {
    /// The API group, empty for the core.
    pub group: String,
    /// The resource, with its subresource: `nodes/status`.
    pub resource: String,
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`.
    pub verb: String,
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let group = Some(self.group.as_str()).filter(|group| !group.is_empty());
        write!(
            f,
            "{} {}.{}",
            self.verb,
            self.resource,
            group.unwrap_or("core")
        )
    }
}

impl Right {
    /// All that the rules of a role grant.
    #[must_use]
    pub fn of_role(role: &Value) -> BTreeSet<Self> {
        let mut rights = BTreeSet::new();
        for rule in role["rules"].as_array().into_iter().flatten() {
            let texts = |field: &str| {
                let all = rule[field].as_array().into_iter().flatten();
                all.filter_map(Value::as_str).map(str::to_owned)
            };
            for group in texts("apiGroups") {
                for resource in texts("resources") {
                    rights.extend(texts("verbs").map(|verb| Self {
                        group: group.clone(),
                        resource: resource.clone(),
                        verb,
                    }));
                }
            }
        }
        rights
    }
}

/// A request, and what came of it.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Who asked.
    pub user: String,
    /// The right that it takes; `None` for what is no resource, such as discovery.
    pub right: Option<Right>,
    /// The path.
    pub uri: String,
    /// The answer's code of HTTP.
    pub code: u64,
    /// Why it was refused, in the server's words.
    pub reason: String,
}

impl Asked {
    fn read(line: &str) -> Self {
        let entry: Value = serde_json::from_str(line).expect("a line of the audit log");
        let text = |pointer: &str| {
            let value = entry.pointer(pointer).and_then(Value::as_str);
            value.unwrap_or_default().to_owned()
        };
        let (resource, part) = (text("/objectRef/resource"), text("/objectRef/subresource"));
        let right = Right {
            group: text("/objectRef/apiGroup"),
            resource: [resource.as_str(), part.as_str()]
                .join("/")
                .trim_end_matches('/')
                .to_owned(),
            verb: text("/verb"),
        };
        Self {
            user: text("/user/username"),
            right: (!resource.is_empty()).then_some(right),
            uri: text("/requestURI"),
            code: entry["responseStatus"]["code"].as_u64().unwrap_or_default(),
            reason: text("/responseStatus/message")
                + &text("/annotations/authorization.k8s.io~1reason"),
        }
    }

    /// Whether somebody may not do this.
    #[must_use]
    pub fn is_denied(&self) -> bool {
        matches!(self.code, 401 | 403)
    }
}

/// Has what these users ask for written down when it is answered, by a server that keeps its files in this folder.
///
/// # Panics
/// If the folder cannot be written to.
pub fn begin(folder: &Path, users: &[&str]) {
    let policy = json!({
        "apiVersion": "audit.k8s.io/v1", "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [{"level": "Metadata", "users": users}, {"level": "None"}],
    });
    std::fs::write(folder.join(POLICY), policy.to_string()).expect("a file of the fixture");
}

/// Adds what the server is to be told.
pub fn arguments(folder: &Path, command: &mut Command) {
    if folder.join(POLICY).exists() {
        let file = |name: &str| folder.join(name).display().to_string();
        command
            .arg(format!("--audit-policy-file={}", file(POLICY)))
            .arg(format!("--audit-log-path={}", file(LOG)));
    }
}

/// Reads the log and begins a new one. Whole lines only: what is being written stays for the next time.
///
/// # Panics
/// If a line is no entry, or the folder cannot be written to.
pub fn take(folder: &Path) -> Vec<Asked> {
    let mark = folder.join("audit.read");
    let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
    let from: usize = read(&mark).parse().unwrap_or(0);
    let log = read(&folder.join(LOG));
    let fresh = &log[from..];
    let whole = fresh.rfind('\n').map_or("", |end| &fresh[..=end]);
    std::fs::write(&mark, (from + whole.len()).to_string()).expect("a file of the fixture");
    whole.lines().map(Asked::read).collect()
}
