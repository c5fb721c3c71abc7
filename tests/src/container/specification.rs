//! What `runc` is told about a pod of the manifests: what a kubelet and a container runtime make of its fields. Pure. A field that is
//! not known here is an error, so that nothing in the manifests is passed over.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::image::Image;
use super::seccomp;

/// What a runtime gives to a container that does not drop anything.
const DEFAULT_CAPABILITIES: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// Where a pod finds its account.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// A pod with one container, and what the API server has for it.
#[derive(Debug)]
pub struct Pod<'a> {
    /// `spec` of the template.
    pub spec: &'a Value,
    /// Name of the node.
    pub node: &'a str,
    /// Values of the ConfigMaps, by name.
    pub settings: &'a BTreeMap<String, BTreeMap<String, String>>,
    /// Folders with the values of the Secrets, by name.
    pub secrets: &'a BTreeMap<String, PathBuf>,
    /// Folder with the account's token.
    pub account: &'a Path,
    /// Port of the API server on the host's loopback.
    pub server_port: u16,
}

/// The node on which it starts.
#[derive(Debug)]
pub struct World<'a> {
    /// The image.
    pub image: &'a Image,
    /// Where the host's files are.
    pub host_root: &'a Path,
    /// The host's network namespace.
    pub network: &'a Path,
    /// The runtime's default profile.
    pub seccomp: &'a Value,
}

/// A file or folder of the host that is brought into the container.
#[derive(Debug, PartialEq, Eq)]
pub struct HostPath {
    /// Where it is.
    pub path: PathBuf,
    /// `type` of the manifest.
    pub kind: String,
}

impl HostPath {
    /// Makes it if the manifest says so.
    ///
    /// # Errors
    /// It cannot be made, or is not there.
    pub fn make(&self) -> Result<(), String> {
        let fail = |error: std::io::Error| format!("{}: {error}", self.path.display());
        match self.kind.as_str() {
            "DirectoryOrCreate" => std::fs::create_dir_all(&self.path).map_err(fail),
            "FileOrCreate" => {
                let parent = self.path.parent().unwrap_or(Path::new("/"));
                std::fs::create_dir_all(parent).map_err(fail)?;
                let mut file = std::fs::File::options();
                let file = file.create(true).append(true).open(&self.path);
                file.map(drop).map_err(fail)
            }
            "Directory" if self.path.is_dir() => Ok(()),
            other => Err(format!("{} is no {other}", self.path.display())),
        }
    }
}

/// What is needed to start it.
#[derive(Debug)]
pub struct Specification {
    /// `config.json` (<https://github.com/opencontainers/runtime-spec/blob/main/config.md>).
    pub config: Value,
    /// What has to be on the host.
    pub host_paths: Vec<HostPath>,
    /// Port and path of the readiness probe.
    pub readiness: Option<(u16, String)>,
}

fn only(what: &str, value: &Value, known: &[&str]) -> Result<(), String> {
    let names: BTreeSet<&str> = known.iter().copied().collect();
    let mut keys = value.as_object().into_iter().flatten().map(|(key, _)| key);
    match keys.find(|key| !names.contains(key.as_str())) {
        Some(key) => Err(format!("{what} has {key}, which this test does not know")),
        None => Ok(()),
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// Makes the specification.
///
/// # Errors
/// The pod says something that is not known here, or that no kubelet takes.
pub fn specification(pod: &Pod<'_>, world: &World<'_>) -> Result<Specification, String> {
    let known = [
        "serviceAccountName",
        "hostNetwork",
        "priorityClassName",
        "terminationGracePeriodSeconds",
        "nodeSelector",
        "tolerations",
        "affinity",
        "containers",
        "volumes",
    ];
    only("the pod", pod.spec, &known)?;
    if pod.spec["hostNetwork"] != true {
        return Err("the pod has a network of its own".to_owned());
    }
    let [container] = list(&pod.spec["containers"]) else {
        return Err("the pod has not one container".to_owned());
    };
    let known = [
        "name",
        "image",
        "command",
        "args",
        "env",
        "envFrom",
        "ports",
        "securityContext",
        "livenessProbe",
        "readinessProbe",
        "resources",
        "volumeMounts",
    ];
    only("the container", container, &known)?;
    let security = &container["securityContext"];
    let known = [
        "allowPrivilegeEscalation",
        "readOnlyRootFilesystem",
        "capabilities",
        "seccompProfile",
        "runAsNonRoot",
        "runAsUser",
        // Neither of the two is in the kernels on which this runs.
        "appArmorProfile",
        "seLinuxOptions",
    ];
    only("securityContext", security, &known)?;
    let user = match security["runAsUser"].as_u64() {
        Some(user) => user,
        None => text(&world.image.config["User"]).parse().unwrap_or(0),
    };
    if security["runAsNonRoot"] == true && user == 0 {
        return Err("container has runAsNonRoot and image will run as root".to_owned());
    }
    let capabilities = capabilities(&security["capabilities"])?;
    let (mounts, host_paths) = mounts(pod, container, world)?;
    let seccomp = match security["seccompProfile"]["type"].as_str() {
        Some("RuntimeDefault") => seccomp::of(world.seccomp, &capabilities)?,
        None | Some("Unconfined") => Value::Null,
        Some(other) => return Err(format!("seccompProfile is {other}")),
    };
    let words = |value: &Value| list(value).iter().map(text).collect::<Vec<_>>();
    let command = match container["command"].as_array() {
        Some(_) => words(&container["command"]),
        None => words(&world.image.config["Entrypoint"]),
    };
    let arguments = match (&container["args"], &container["command"]) {
        (Value::Array(_), _) => words(&container["args"]),
        (_, Value::Array(_)) => Vec::new(),
        _ => words(&world.image.config["Cmd"]),
    };
    let probe = &container["readinessProbe"]["httpGet"];
    let readiness = probe["port"].as_u64().map(|port| {
        let port = u16::try_from(port).unwrap_or_default();
        (port, text(&probe["path"]))
    });
    let words_to_run = [command, arguments].concat();
    let escalates = security["allowPrivilegeEscalation"] != false;
    // As containerd writes them, but for limits; of the namespaces, the host's network is that of the test.
    let config = json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": user, "gid": 0},
            "args": words_to_run,
            "env": environment(pod, container, world)?,
            "cwd": text(&world.image.config["WorkingDir"]),
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "noNewPrivileges": !escalates,
        },
        "root": {"path": world.image.root, "readonly": security["readOnlyRootFilesystem"] == true},
        "mounts": mounts,
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "mount"}, {"type": "network", "path": world.network}],
            "rootfsPropagation": "rslave",
            "seccomp": seccomp,
            "maskedPaths": ["/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    });
    Ok(Specification {
        config,
        host_paths,
        readiness,
    })
}

/// With their kernel's names.
fn capabilities(wanted: &Value) -> Result<Vec<String>, String> {
    only("capabilities", wanted, &["add", "drop"])?;
    let names = |value: &Value| list(value).iter().map(text).collect::<BTreeSet<_>>();
    let (add, drop) = (names(&wanted["add"]), names(&wanted["drop"]));
    let mut all: BTreeSet<String> = match drop.contains("ALL") {
        true => BTreeSet::new(),
        false => DEFAULT_CAPABILITIES.map(str::to_owned).into(),
    };
    all.retain(|one| !drop.contains(one));
    all.extend(add);
    Ok(all.iter().map(|name| format!("CAP_{name}")).collect())
}

fn environment(pod: &Pod<'_>, container: &Value, world: &World<'_>) -> Result<Vec<String>, String> {
    let mut all: BTreeMap<String, String> = BTreeMap::new();
    let of_image = list(&world.image.config["Env"]).iter();
    all.extend(of_image.filter_map(|one| {
        let (name, value) = one.as_str()?.split_once('=')?;
        Some((name.to_owned(), value.to_owned()))
    }));
    for from in list(&container["envFrom"]) {
        let (name, optional) = (
            &from["configMapRef"]["name"],
            &from["configMapRef"]["optional"],
        );
        match pod.settings.get(&text(name)) {
            Some(values) => all.extend(values.clone()),
            None if *optional == true => {}
            None => return Err(format!("there is no ConfigMap {name}")),
        }
    }
    for one in list(&container["env"]) {
        let field = &one["valueFrom"]["fieldRef"]["fieldPath"];
        let value = match (&one["value"], field.as_str()) {
            (Value::String(value), None) => value.clone(),
            (Value::Null, Some("spec.nodeName")) => pod.node.to_owned(),
            _ => {
                return Err(format!(
                    "the environment has {one}, which this test does not know"
                ));
            }
        };
        all.insert(text(&one["name"]), value);
    }
    // The Service of the API server; the host's loopback stands for its address.
    all.insert("KUBERNETES_SERVICE_HOST".to_owned(), "127.0.0.1".to_owned());
    all.insert(
        "KUBERNETES_SERVICE_PORT".to_owned(),
        pod.server_port.to_string(),
    );
    Ok(all
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect())
}

fn mounts(
    pod: &Pod<'_>,
    container: &Value,
    world: &World<'_>,
) -> Result<(Vec<Value>, Vec<HostPath>), String> {
    let special = |at: &str, kind: &str, options: &[&str]| json!({"destination": at, "type": kind, "source": kind, "options": options});
    let plain = ["nosuid", "noexec", "nodev"];
    let mut mounts = vec![
        special("/proc", "proc", &plain),
        special(
            "/dev",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        special("/sys", "sysfs", &[&plain[..], &["ro"]].concat()),
    ];
    let bind = |at: &str, from: &Path, options: &[&str]| json!({"destination": at, "type": "bind", "source": from, "options": options});
    for (from, at) in &world.image.libraries {
        mounts.push(bind(
            &at.display().to_string(),
            from,
            &["rbind", "rprivate", "ro"],
        ));
    }
    mounts.push(bind(ACCOUNT, pod.account, &["rbind", "rprivate", "ro"]));
    let mut host_paths = Vec::new();
    for mount in list(&container["volumeMounts"]) {
        only(
            "a mount",
            mount,
            &["name", "mountPath", "readOnly", "mountPropagation"],
        )?;
        let volume = list(&pod.spec["volumes"])
            .iter()
            .find(|volume| volume["name"] == mount["name"]);
        let volume = volume.ok_or_else(|| format!("there is no volume {}", mount["name"]))?;
        only("a volume", volume, &["name", "hostPath", "secret"])?;
        let propagation = match mount["mountPropagation"].as_str() {
            None | Some("None") => "rprivate",
            Some("HostToContainer") => "rslave",
            Some(other) => return Err(format!("mountPropagation is {other}")),
        };
        let access = if mount["readOnly"] == true {
            "ro"
        } else {
            "rw"
        };
        let at = text(&mount["mountPath"]);
        let from = match (
            volume["hostPath"]["path"].as_str(),
            volume["secret"]["secretName"].as_str(),
        ) {
            (Some(path), None) => {
                let path = on_host(world.host_root, path);
                let kind = text(&volume["hostPath"]["type"]);
                host_paths.push(HostPath {
                    path: path.clone(),
                    kind,
                });
                path
            }
            (None, Some(secret)) => {
                let folder = pod.secrets.get(secret);
                folder
                    .ok_or_else(|| format!("there is no Secret {secret}"))?
                    .clone()
            }
            _ => {
                return Err(format!(
                    "the volume {volume} is of no kind that this test knows"
                ));
            }
        };
        mounts.push(bind(&at, &from, &["rbind", propagation, access]));
    }
    Ok((mounts, host_paths))
}

/// Where a path of the host is: what is the kernel's is real.
fn on_host(root: &Path, path: &str) -> PathBuf {
    let kernels = ["/proc", "/run/netns"]
        .iter()
        .any(|one| Path::new(path).starts_with(one));
    match kernels {
        true => PathBuf::from(path),
        false => root.join(path.trim_start_matches('/')),
    }
}
