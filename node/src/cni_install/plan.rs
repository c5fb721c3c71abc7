//! What is installed where. Pure.

use std::path::{Path, PathBuf};

use serde_json::json;
use typha::config::{ConfigError, Env};

/// The programs of the plugin; both are needed, as a configuration names each by its file.
pub const PROGRAMS: [&str; 2] = ["calico", "calico-ipam"];

/// Where containerd's configuration stands; k3s writes its own, and not the well-known one.
pub const RUNTIME_CONFIGURATIONS: [&str; 3] = [
    "/var/lib/rancher/k3s/agent/etc/containerd/config.toml",
    "/var/lib/rancher/rke2/agent/etc/containerd/config.toml",
    "/etc/containerd/config.toml",
];

const DEFAULT_PROGRAM_FOLDER: &str = "/opt/cni/bin";
const DEFAULT_LIST_FOLDER: &str = "/etc/cni/net.d";

/// A plan for one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Install {
    /// Folders that get the programs, as this process sees them.
    pub program_folders: Vec<PathBuf>,
    /// Folder of the configuration list.
    pub list_folder: PathBuf,
    /// File name of the list.
    pub list_name: String,
    /// File name of a list that this one replaces.
    pub replaces: Option<String>,
    /// The list itself.
    pub list: String,
    /// Replace programs that are there already.
    pub update_programs: bool,
}

/// What containerd's configuration says about CNI (`bin_dir` or `bin_dirs`, and `conf_dir`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuntimeFolders {
    /// Folders of programs; the runtime looks through them in this order.
    pub programs: Vec<String>,
    /// Folder of lists.
    pub lists: Option<String>,
}

impl RuntimeFolders {
    /// Reads a configuration of containerd, of version 1, 2 or 3: wherever a table `cni` stands below `plugins`.
    ///
    /// # Errors
    /// The text is not TOML; the reason names the place.
    pub fn read(text: &str) -> Result<Self, String> {
        let value: toml::Table = text.parse().map_err(|e: toml::de::Error| e.to_string())?;
        let mut found = Self::default();
        if let Some(plugins) = value.get("plugins").and_then(toml::Value::as_table) {
            for plugin in plugins.values().filter_map(toml::Value::as_table) {
                found.take(plugin);
            }
        }
        Ok(found)
    }

    fn take(&mut self, plugin: &toml::Table) {
        let Some(cni) = plugin.get("cni").and_then(toml::Value::as_table) else {
            return;
        };
        let text =
            |value: &toml::Value| value.as_str().filter(|t| !t.is_empty()).map(str::to_owned);
        let single = cni.get("bin_dir").and_then(text);
        let several = cni
            .get("bin_dirs")
            .and_then(toml::Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(text);
        self.programs.extend(single.into_iter().chain(several));
        if self.lists.is_none() {
            self.lists = cni.get("conf_dir").and_then(text);
        }
    }
}

/// Where the host's file system is seen: `CALI_HOST_ROOT`.
#[must_use]
pub fn host_root(env: &Env) -> &str {
    env.get("CALI_HOST_ROOT").unwrap_or("/host")
}

/// The plan, or `None` where nothing is to be installed: neither `CALI_CNI_INSTALL` nor a mounted folder asks for it.
///
/// | variable | meaning | default |
/// |---|---|---|
/// | `CALI_CNI_INSTALL` | `true`, `false` or `auto` (when the host's folders are mounted below the root) | `auto` |
/// | `CALI_HOST_ROOT` | where the host's file system is seen | `/host` |
/// | `CNI_BIN_DIR`, `CNI_NET_DIR` | host folders, instead of what the runtime's configuration says | |
/// | `CNI_CONF_NAME`, `CNI_OLD_CONF_NAME` | file names of the list, and of one that it replaces | `10-calico.conflist` |
/// | `CNI_NETWORK_CONFIG` | the whole list, instead of ours (`__CNI_MTU__` is filled in) | |
/// | `CNI_MTU` | MTU of pods' interfaces, 0: what the node derives | 0 |
/// | `UPDATE_CNI_BINARIES`, `SKIP_CNI_BINARIES` | as Calico's | `true`, |
///
/// # Errors
/// A variable cannot be used, or the runtime's configuration cannot be read.
pub fn plan_install(
    env: &Env,
    configurations: &[(PathBuf, String)],
    ipv6: bool,
    exists: impl Fn(&Path) -> bool,
) -> Result<Option<Install>, ConfigError> {
    let root = Path::new(host_root(env));
    let on_host = |path: &str| root.join(path.trim_start_matches('/'));
    let wanted = match env.get("CALI_CNI_INSTALL").unwrap_or("auto") {
        "true" => true,
        "false" => false,
        "auto" => exists(&on_host(DEFAULT_LIST_FOLDER)),
        other => {
            return Err(ConfigError {
                variable: "CALI_CNI_INSTALL",
                value: other.to_owned(),
                reason: "must be true, false or auto".to_owned(),
            });
        }
    };
    if !wanted {
        return Ok(None);
    }
    let mut runtime = RuntimeFolders::default();
    for (path, text) in configurations {
        let found = RuntimeFolders::read(text).map_err(|reason| ConfigError {
            variable: "CALI_HOST_ROOT",
            value: path.display().to_string(),
            reason: format!("this configuration of containerd cannot be read: {reason}"),
        })?;
        if runtime.programs.is_empty() {
            runtime.programs = found.programs;
        }
        runtime.lists = runtime.lists.or(found.lists);
    }
    let mut program_folders: Vec<PathBuf> = match env.get("CNI_BIN_DIR") {
        Some(folder) => vec![on_host(folder)],
        None => runtime.programs.iter().map(|path| on_host(path)).collect(),
    };
    if program_folders.is_empty() {
        program_folders.push(on_host(DEFAULT_PROGRAM_FOLDER));
    }
    if flag(env, "SKIP_CNI_BINARIES", false)? {
        program_folders.clear();
    }
    let list_folder = env
        .get("CNI_NET_DIR")
        .or(runtime.lists.as_deref())
        .unwrap_or(DEFAULT_LIST_FOLDER);
    let list_name = file_name(env, "CNI_CONF_NAME")?.unwrap_or_else(|| "10-calico.conflist".into());
    let replaces = file_name(env, "CNI_OLD_CONF_NAME")?.filter(|old| *old != list_name);
    let mtu: u32 = env.parse("CNI_MTU", 0)?;
    Ok(Some(Install {
        program_folders,
        list_folder: on_host(list_folder),
        list_name,
        replaces,
        list: match env.get("CNI_NETWORK_CONFIG") {
            Some(text) => given_list(text, mtu)?,
            None => render_list(mtu, ipv6),
        },
        update_programs: flag(env, "UPDATE_CNI_BINARIES", true)?,
    }))
}

/// The list that we write: one plugin, which serves host ports and bandwidth itself.
fn render_list(mtu: u32, ipv6: bool) -> String {
    let list = json!({
        "name": "k8s-pod-network",
        "cniVersion": "1.0.0",
        "plugins": [{
            "type": "calico",
            "mtu": mtu,
            "ipam": {
                "type": "calico-ipam",
                "assign_ipv4": "true",
                "assign_ipv6": if ipv6 { "true" } else { "false" },
            },
            "capabilities": { "portMappings": true, "bandwidth": true },
            // k3s' ServiceLB forwards packets inside its pods.
            "container_settings": { "allow_ip_forwarding": true },
        }],
    });
    format!("{list:#}\n")
}

fn given_list(text: &str, mtu: u32) -> Result<String, ConfigError> {
    let filled = text.replace("__CNI_MTU__", &mtu.to_string());
    let bad = |reason: String| ConfigError {
        variable: "CNI_NETWORK_CONFIG",
        value: text.to_owned(),
        reason,
    };
    let value: serde_json::Value =
        serde_json::from_str(&filled).map_err(|e| bad(format!("not JSON: {e}")))?;
    if value.get("plugins").is_none() {
        return Err(bad("has no list \"plugins\"".to_owned()));
    }
    Ok(format!("{value:#}\n"))
}

fn flag(env: &Env, variable: &'static str, default: bool) -> Result<bool, ConfigError> {
    env.parse(variable, default)
}

fn file_name(env: &Env, variable: &'static str) -> Result<Option<String>, ConfigError> {
    let Some(name) = env.get(variable) else {
        return Ok(None);
    };
    if name.contains('/') || name.starts_with('.') {
        return Err(ConfigError {
            variable,
            value: name.to_owned(),
            reason: "must be the name of a file, without a folder".to_owned(),
        });
    }
    Ok(Some(name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const K3S: &str = r#"
version = 3
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["/var/lib/rancher/k3s/data/cni"]
  conf_dir = "/var/lib/rancher/k3s/agent/etc/cni/net.d"
"#;
    const CONTAINERD_2: &str = r#"
version = 2
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/usr/lib/cni"
  conf_dir = "/etc/cni/net.d"
"#;

    fn plan(env: &[(&str, &str)], configurations: &[&str]) -> Install {
        let configurations: Vec<(PathBuf, String)> = configurations
            .iter()
            .map(|text| (PathBuf::from("config.toml"), (*text).to_owned()))
            .collect();
        let env: Env = env.iter().copied().collect();
        plan_install(&env, &configurations, false, |_| true)
            .unwrap()
            .expect("something to install")
    }

    #[test]
    fn folders_are_the_ones_that_the_runtime_reads() {
        let k3s = plan(&[], &[K3S, CONTAINERD_2]);
        assert_eq!(
            k3s.program_folders,
            [PathBuf::from("/host/var/lib/rancher/k3s/data/cni")]
        );
        assert_eq!(
            k3s.list_folder,
            PathBuf::from("/host/var/lib/rancher/k3s/agent/etc/cni/net.d")
        );
        let debian = plan(&[], &[CONTAINERD_2]);
        assert_eq!(debian.program_folders, [PathBuf::from("/host/usr/lib/cni")]);
        // k3s without flannel leaves the table out: containerd's own defaults hold.
        let defaults = plan(&[], &["version = 3\n"]);
        assert_eq!(
            defaults.program_folders,
            [PathBuf::from("/host/opt/cni/bin")]
        );
        assert_eq!(defaults.list_folder, PathBuf::from("/host/etc/cni/net.d"));
    }

    #[test]
    fn settings_win_over_the_runtimes_configuration() {
        let plan = plan(
            &[
                ("CNI_BIN_DIR", "/bin"),
                ("CNI_NET_DIR", "/conf"),
                ("CNI_CONF_NAME", "05-cali.conflist"),
                ("CNI_OLD_CONF_NAME", "10-calico.conflist"),
                ("CALI_HOST_ROOT", "/"),
            ],
            &[K3S],
        );
        assert_eq!(plan.program_folders, [PathBuf::from("/bin")]);
        assert_eq!(plan.list_folder, PathBuf::from("/conf"));
        assert_eq!(plan.list_name, "05-cali.conflist");
        assert_eq!(plan.replaces.as_deref(), Some("10-calico.conflist"));
    }

    #[test]
    fn the_list_is_one_that_the_plugin_reads() {
        let plan = plan(&[("CNI_MTU", "1400")], &[]);
        let list: serde_json::Value = serde_json::from_str(&plan.list).unwrap();
        // A runtime adds the name and the version of the list to what it gives to each plugin.
        let mut given = list["plugins"][0].clone();
        given["name"] = list["name"].clone();
        given["cniVersion"] = list["cniVersion"].clone();
        let plugin = cali_cni::config::Config::read(&given).unwrap();
        assert_eq!(plugin.mtu, 1400);
        assert!(plugin.container_settings.allow_ip_forwarding);
        assert_eq!(plugin.ipam.type_.as_deref(), Some("calico-ipam"));
    }

    #[test]
    fn bad_settings_are_named() {
        let check = |pairs: &[(&str, &str)], configurations: &[(PathBuf, String)]| {
            let env: Env = pairs.iter().copied().collect();
            plan_install(&env, configurations, false, |_| true)
                .unwrap_err()
                .to_string()
        };
        insta::assert_snapshot!(check(&[("CNI_CONF_NAME", "a/b")], &[]), @r#"CNI_CONF_NAME="a/b": must be the name of a file, without a folder"#);
        insta::assert_snapshot!(check(&[("CNI_NETWORK_CONFIG", "{}")], &[]), @r#"CNI_NETWORK_CONFIG="{}": has no list "plugins""#);
        insta::assert_snapshot!(check(&[("CALI_CNI_INSTALL", "maybe")], &[]), @r#"CALI_CNI_INSTALL="maybe": must be true, false or auto"#);
        let broken = [(PathBuf::from("/etc/x.toml"), "a = ".to_owned())];
        assert!(check(&[], &broken).starts_with(
            "CALI_HOST_ROOT=\"/etc/x.toml\": this configuration of containerd cannot be read"
        ));
    }

    #[test]
    fn nothing_is_installed_on_a_host_that_shows_no_folders() {
        let env: Env = std::iter::empty::<(String, String)>().collect();
        assert_eq!(plan_install(&env, &[], false, |_| false).unwrap(), None);
    }
}
