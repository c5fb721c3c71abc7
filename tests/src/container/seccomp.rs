//! A runtime's default profile, as its file says it, for one container: which rules hold depends on its capabilities.

use serde_json::{Value, json};

/// The name that the profile has for this machine's architecture, of those that it is kept for.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The name of the same in rules of libseccomp.
fn kernel_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "aarch64" => "SCMP_ARCH_AARCH64",
        _ => "SCMP_ARCH_X86_64",
    }
}

/// `linux.seccomp` of a container with these capabilities (`CAP_NET_ADMIN`). `profile` is in the format of
/// <https://github.com/containers/common/tree/main/pkg/seccomp>.
///
/// # Errors
/// The profile cannot be understood.
pub fn of(profile: &Value, capabilities: &[String]) -> Result<Value, String> {
    let all = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let architectures = all(&profile["archMap"])
        .into_iter()
        .find(|one| one["architecture"] == kernel_architecture())
        .ok_or("the profile does not know this architecture")?;
    let mut architectures_and_subs = vec![architectures["architecture"].clone()];
    architectures_and_subs.extend(all(&architectures["subArchitectures"]));
    let has = |name: &Value| capabilities.iter().any(|one| name == one.as_str());
    let holds = |rule: &Value| {
        let (with, without) = (&rule["includes"], &rule["excludes"]);
        let on = |value: &Value| {
            value
                .as_array()
                .is_none_or(|all| all.iter().any(|one| one == architecture()))
        };
        let off = |value: &Value| all(value).iter().any(|one| one == architecture());
        on(&with["arches"])
            && !off(&without["arches"])
            && all(&with["caps"]).iter().all(has)
            && !all(&without["caps"]).iter().any(has)
    };
    let mut rules = Vec::new();
    for rule in all(&profile["syscalls"]).iter().filter(|rule| holds(rule)) {
        let mut kept = json!({"names": rule["names"], "action": rule["action"]});
        for key in ["errnoRet", "args"] {
            if !rule[key].is_null() {
                kept[key] = rule[key].clone();
            }
        }
        rules.push(kept);
    }
    if rules.is_empty() {
        return Err("the profile allows nothing".to_owned());
    }
    Ok(json!({
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": architectures_and_subs,
        "syscalls": rules,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_follow_the_capabilities() {
        let profile = json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
            "archMap": [{"architecture": kernel_architecture(), "subArchitectures": []}],
            "syscalls": [
                {"names": ["read"], "action": "SCMP_ACT_ALLOW", "includes": {}, "excludes": {}},
                {"names": ["setns"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
                {"names": ["setns"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
                {"names": ["elsewhere"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["none"]}}]});
        let names = |capabilities: &[String]| {
            let made = of(&profile, capabilities).expect("a profile");
            let rules = made["syscalls"].as_array().cloned().unwrap_or_default();
            let words = rules
                .iter()
                .map(|rule| format!("{} {}", rule["names"][0], rule["action"]));
            words.collect::<Vec<_>>().join(", ")
        };
        assert_eq!(
            names(&["CAP_SYS_ADMIN".to_owned()]),
            "\"read\" \"SCMP_ACT_ALLOW\", \"setns\" \"SCMP_ACT_ALLOW\""
        );
        assert_eq!(
            names(&[]),
            "\"read\" \"SCMP_ACT_ALLOW\", \"setns\" \"SCMP_ACT_ERRNO\""
        );
    }
}
