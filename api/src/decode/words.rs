//! Serde's messages in the words of those who write manifests: they know texts, numbers and lists, not `u8` and structs.

/// Longer values are cut when they are shown.
const MAX_SHOWN: usize = 60;

/// What a value is, from serde's name of it, such as ``string "x"``, ``integer `5` `` or `map`.
fn found(unexpected: &str) -> String {
    let (kind, value) = unexpected.split_once(' ').unwrap_or((unexpected, ""));
    let value = value.trim_matches('`');
    let shown = match value.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{}...", &value[..end]),
        None => value.to_owned(),
    };
    match kind {
        "string" => format!("the text {shown}"),
        "integer" => format!("the number {shown}"),
        "floating" => format!("the number {}", shown.trim_start_matches("point `")),
        "boolean" => shown,
        "sequence" => "a list".to_owned(),
        "map" => "a mapping (fields with values)".to_owned(),
        "unit" | "null" => "nothing".to_owned(),
        _ => unexpected.replace('`', "\""),
    }
}

/// What is expected, from serde's or a type's own words for it.
fn expected(words: &str) -> String {
    let number = match words {
        "u8" => Some((0, u64::from(u8::MAX))),
        "u16" => Some((0, u64::from(u16::MAX))),
        "u32" => Some((0, u64::from(u32::MAX))),
        "i32" => return "a whole number".to_owned(),
        "u64" | "usize" => return "a whole number that is not negative".to_owned(),
        "i64" | "isize" => return "a whole number".to_owned(),
        _ => None,
    };
    if let Some((from, to)) = number {
        return format!("a whole number from {from} to {to}");
    }
    match words {
        "f32" | "f64" => "a number".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a string" => "a text".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a map" => "a mapping (fields with values)".to_owned(),
        // Derived types call themselves `struct Name`, those of Kubernetes only `Name`.
        name if name.starts_with("struct ") || is_type_name(name) => {
            "a mapping (fields with values)".to_owned()
        }
        other => other.replace('`', "\""),
    }
}

fn is_type_name(words: &str) -> bool {
    words.starts_with(|first: char| first.is_ascii_uppercase())
        && words.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

/// A number or a truth value where a text stands is a text as soon as it is quoted.
fn quoting(unexpected: &str, words: &str) -> &'static str {
    let kind = unexpected.split(' ').next().unwrap_or_default();
    if words == "a string" && ["integer", "floating", "boolean"].contains(&kind) {
        ", put it in quotes"
    } else {
        ""
    }
}

/// The message of a serde error, without its place.
pub(super) fn plain(message: &str) -> String {
    let two = |rest: &str| {
        // The value may hold the separator itself; what is expected does not.
        rest.rsplit_once(", expected ")
            .map(|(found, expected)| (found.to_owned(), expected.to_owned()))
    };
    if let Some((value, words)) = message.strip_prefix("invalid type: ").and_then(two) {
        return format!(
            "is {}, expected {}{}",
            found(&value),
            expected(&words),
            quoting(&value, &words)
        );
    }
    if let Some((value, words)) = message.strip_prefix("invalid value: ").and_then(two) {
        return format!(
            "{} cannot be used, expected {}",
            found(&value),
            expected(&words)
        );
    }
    if let Some(field) = message.strip_prefix("missing field ") {
        return format!("the field {} is missing", field.replace('`', "\""));
    }
    message.replace('`', "\"")
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn messages_speak_of_texts_numbers_and_lists() {
        for (serde, words) in [
            (
                "invalid type: string \"10.0.0.0/8\", expected a sequence",
                "is the text \"10.0.0.0/8\", expected a list",
            ),
            (
                "invalid type: string \"big, expected x\", expected u8",
                "is the text \"big, expected x\", expected a whole number from 0 to 255",
            ),
            (
                "invalid value: integer `300`, expected u8",
                "the number 300 cannot be used, expected a whole number from 0 to 255",
            ),
            (
                "invalid type: floating point `1.5`, expected u16",
                "is the number 1.5, expected a whole number from 0 to 65535",
            ),
            (
                "invalid type: sequence, expected an AS number",
                "is a list, expected an AS number",
            ),
            (
                "invalid type: string \"hallo\", expected struct BGPPeerSpec",
                "is the text \"hallo\", expected a mapping (fields with values)",
            ),
            (
                "invalid type: string \"hallo\", expected LabelSelector",
                "is the text \"hallo\", expected a mapping (fields with values)",
            ),
            (
                "invalid type: integer `1`, expected a string",
                "is the number 1, expected a text, put it in quotes",
            ),
            (
                "invalid type: boolean `true`, expected a string",
                "is true, expected a text, put it in quotes",
            ),
            ("missing field `cidr`", "the field \"cidr\" is missing"),
            (
                "\"Alow\" is not one of Allow",
                "\"Alow\" is not one of Allow",
            ),
        ] {
            assert_eq!(plain(serde), words, "{serde}");
        }
    }

    /// The messages are serde's, not a specification: what it says today is what is read.
    #[test]
    fn serde_still_speaks_that_way() {
        let said = |error: serde_json::Error| plain(&error.to_string());
        assert_eq!(
            said(serde_json::from_value::<u8>(1.5.into()).unwrap_err()),
            "is the number 1.5, expected a whole number from 0 to 255"
        );
        assert_eq!(
            said(serde_json::from_value::<bool>("yes".into()).unwrap_err()),
            "is the text \"yes\", expected true or false"
        );
        let long = "x".repeat(1000);
        let message = said(serde_json::from_value::<Vec<u8>>(long.into()).unwrap_err());
        assert!(message.len() < 120, "{message}");
        assert!(message.ends_with("expected a list"), "{message}");
    }
}
