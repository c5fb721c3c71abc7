//! Takes secrets out of text that others will read: values of fields that are named like secrets, private keys, passwords in
//! addresses, and tokens. Pure. It errs on the side of taking too much; names of secrets (`secretKeyRef`) stay.

use std::borrow::Cow;
use std::sync::LazyLock;

use regex::{Captures, Regex};

const MASK: &str = "***";

/// A field's name, its separator, its value: quoted, or up to where it can end.
static FIELD: LazyLock<Regex> = LazyLock::new(|| {
    regex(
        r#"(?i)(?P<name>[a-z0-9_.-]*(?:passw(?:or)?d|passphrase|secret|token|api_?key|private_?key|key-data|credential|authorization)[a-z0-9_-]*)(?P<between>["']?[ \t]*[:=][ \t]*)(?P<value>"(?:[^"\\]|\\.)*"|'[^']*'|[^\s,}\]&"']+(?: [A-Za-z0-9+/=._-]{16,})?)"#,
    )
});
/// A line that is a field: the value goes on to its end.
static LINE: LazyLock<Regex> = LazyLock::new(|| {
    regex(
        r"(?im)^(?P<before>[ \t]*(?:- )?)(?P<name>[a-z0-9_.-]*(?:passw(?:or)?d|passphrase|secret|token|api_?key|private_?key|key-data|credential|authorization)[a-z0-9_-]*)(?P<between>: +|=)(?P<value>[^\s].*)$",
    )
});
/// A variable of a container: its name on one line, its value on the next.
static VARIABLE: LazyLock<Regex> = LazyLock::new(|| {
    regex(
        r#"(?im)^(?P<before>[ \t]*(?:- )?name: +["']?(?P<name>[a-z0-9_.-]*(?:passw(?:or)?d|passphrase|secret|token|api_?key|private_?key|credential)[a-z0-9_.-]*)["']?[ \t]*\n[ \t]*value: +)(?P<value>\S.*)$"#,
    )
});
static PRIVATE_KEY: LazyLock<Regex> = LazyLock::new(|| {
    regex(r"(?s)(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(-----END [A-Z ]*PRIVATE KEY-----|\z)")
});
static USER: LazyLock<Regex> =
    LazyLock::new(|| regex(r"(?P<scheme>://[^/\s:@]+:)[^/\s@]+(?P<at>@)"));
/// A JSON web token, wherever it stands.
static JWT: LazyLock<Regex> =
    LazyLock::new(|| regex(r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+"));

fn regex(pattern: &str) -> Regex {
    Regex::new(pattern).unwrap_or_else(|error| unreachable!("a constant pattern: {error}"))
}

/// The text without secrets.
pub(super) fn mask(text: &str) -> String {
    let text = PRIVATE_KEY.replace_all(text, format!("$1{MASK}$2"));
    let text = USER.replace_all(&text, format!("${{scheme}}{MASK}$at"));
    let text = JWT.replace_all(&text, MASK);
    let text = VARIABLE.replace_all(&text, variable);
    let text = LINE.replace_all(&text, line);
    let text = FIELD.replace_all(&text, field);
    blocks(&text)
}

/// Names of where a secret lies, and switches, are no secrets.
fn is_harmless(name: &str, value: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let ends = ["ref", "name", "namespace", "file", "path", "dir", "folder"];
    let bare = value.trim_matches(['"', '\'']);
    ends.iter().any(|end| name.ends_with(end))
        || matches!(bare, "" | "true" | "false" | "null" | "{" | "[" | "|" | ">")
        || bare.starts_with('{')
        || bare.starts_with("|")
        || bare.starts_with(">")
}

fn variable(found: &Captures<'_>) -> String {
    if is_harmless(&found["name"], &found["value"]) {
        return found[0].to_owned();
    }
    format!("{}{MASK}", &found["before"])
}

fn line(found: &Captures<'_>) -> String {
    let (name, value) = (&found["name"], &found["value"]);
    if is_harmless(name, value) || value.starts_with(['"', '\'', '[']) {
        return found[0].to_owned();
    }
    format!("{}{name}{}{MASK}", &found["before"], &found["between"])
}

fn field(found: &Captures<'_>) -> String {
    let (name, between, value) = (&found["name"], &found["between"], &found["value"]);
    if is_harmless(name, value) {
        return found[0].to_owned();
    }
    let masked = match value.chars().next() {
        Some(quote @ ('"' | '\'')) => format!("{quote}{MASK}{quote}"),
        _ => MASK.to_owned(),
    };
    format!("{name}{between}{masked}")
}

/// The lines under `token: |` and its like.
fn blocks(text: &str) -> String {
    static OPENS: LazyLock<Regex> = LazyLock::new(|| {
        regex(
            r"(?i)^(\s*)(?:- )?[a-z0-9_.-]*(?:passw(?:or)?d|secret|token|key-data|credential)[a-z0-9_-]*:\s*[|>][+-]?\d?\s*$",
        )
    });
    if !text.contains(['|', '>']) {
        return text.to_owned();
    }
    let mut kept = String::with_capacity(text.len());
    let mut inside: Option<usize> = None;
    for line in text.split_inclusive('\n') {
        let indent = line.len() - line.trim_start_matches([' ', '\t']).len();
        if let Some(outer) = inside {
            if line.trim().is_empty() || indent > outer {
                continue;
            }
            inside = None;
        }
        kept.push_str(line);
        if let Some(opens) = OPENS.captures(line.trim_end_matches(['\n', '\r'])) {
            inside = Some(opens[1].len());
            kept.push_str(&format!("{}  {MASK}\n", &opens[1]));
        }
    }
    kept
}

/// A process' environment, `NAME=value` each ended by a zero octet, as lines without secrets.
pub(super) fn environment(octets: &[u8]) -> String {
    let mut lines: Vec<Cow<'_, str>> = octets
        .split(|octet| *octet == 0)
        .filter(|variable| !variable.is_empty())
        .map(String::from_utf8_lossy)
        .collect();
    lines.sort();
    mask(&(lines.join("\n") + "\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_go_wherever_they_stand() {
        for (text, masked) in [
            ("with password=hunter2 next", "with password=*** next"),
            ("password: correct horse", "password: ***"),
            ("password: \"a b\\\" c\"", "password: \"***\""),
            (
                r#"{"etcdPassword":"x,y","port":1}"#,
                r#"{"etcdPassword":"***","port":1}"#,
            ),
            ("client-key-data: QUJD", "client-key-data: ***"),
            (
                "authorization: Bearer abcdefghijklmnopqrst",
                "authorization: ***",
            ),
            (
                "https://root:pw@10.0.0.1:2379/x",
                "https://root:***@10.0.0.1:2379/x",
            ),
            (
                "said eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJrdWJlIn0.c2ln here",
                "said *** here",
            ),
            (
                "-----BEGIN EC PRIVATE KEY-----\nAAAA\n-----END EC PRIVATE KEY-----\nafter",
                "-----BEGIN EC PRIVATE KEY-----***-----END EC PRIVATE KEY-----\nafter",
            ),
            (
                "-----BEGIN PRIVATE KEY-----\ncut off",
                "-----BEGIN PRIVATE KEY-----***",
            ),
            (
                "  token: |\n    one\n\n    two\n  after: 1\n",
                "  token: |\n    ***\n  after: 1\n",
            ),
            (
                "env:\n- name: ETCD_PASSWORD\n  value: hunter2\n- name: A\n  value: b\n",
                "env:\n- name: ETCD_PASSWORD\n  value: ***\n- name: A\n  value: b\n",
            ),
        ] {
            assert_eq!(mask(text), masked, "{text}");
        }
    }

    #[test]
    fn what_only_names_a_secret_stays() {
        for text in [
            "password: {secretKeyRef: {name: bgp, key: tor}}",
            "secretKeyRef:\n  name: bgp\n",
            "ETCD_KEY_FILE=/etc/etcd/key.pem",
            "- name: TOKEN_FILE\n  value: /var/run/token\n",
            "tokenFile: /var/run/token",
            "automountServiceAccountToken: true",
            "selector: has(app) && tier == 'db'",
            "wireguardPublicKey: abc=",
            "routes: 10.0.1.0/26 via 10.0.0.2",
        ] {
            assert_eq!(mask(text), text);
        }
    }

    #[test]
    fn an_environment_is_sorted_and_masked() {
        let text = environment(b"Z=1\0ETCD_PASSWORD=x y\0A=2\0");
        assert_eq!(text, "A=2\nETCD_PASSWORD=***\nZ=1\n");
    }
}
