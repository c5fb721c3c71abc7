//! The executable: a thin client of the node's server.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use cali_control::cni::{
    Command, Failure, PROTOCOL, Plugin, Request, Response, VERSION, WITH_NAMESPACE,
    WITHOUT_NAMESPACE,
};
use cali_control::frame::{encode, read_blocking};
use cali_control::{Hello, paths};
use cali_netlink::{NetNs, Netlink, fdpass};
use serde_json::{Value, json};

use crate::config::Config;
use crate::delegate::{self, Delegate};
use crate::spec::{self, Asked, Call, VERSIONS, code, failure, failure_of};
use crate::{tombstone, wiring};

const PROGRAM: &str = concat!("calico ", env!("CARGO_PKG_VERSION"));
/// The runtime gives up earlier; this only keeps a process from hanging for ever.
const LIMIT: Duration = Duration::from_secs(120);

/// Runs the executable: reads the environment and standard input, prints the result or the error object.
pub fn run(plugin: Plugin) -> ExitCode {
    if std::env::args()
        .nth(1)
        .is_some_and(|a| matches!(a.as_str(), "-v" | "--version"))
    {
        println!("{}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let (version, result) = match read_call() {
        Called::Answered(version, result) => (version, result),
        Called::With {
            call,
            config,
            known,
        } => answer(plugin, &call, config, &known),
    };
    print(&version, result)
}

/// Prints an answer in this version of the specification.
pub(crate) fn print(version: &str, result: Result<Value, Failure>) -> ExitCode {
    let (printed, exit) = match result {
        Ok(Value::Null) => return ExitCode::SUCCESS,
        Ok(value) => (value, ExitCode::SUCCESS),
        Err(failure) => (spec::error_object(version, &failure), ExitCode::FAILURE),
    };
    let mut text = printed.to_string();
    text.push('\n');
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => exit,
        Err(_) => ExitCode::FAILURE,
    }
}

/// What a program was called for.
pub(crate) enum Called {
    /// The version to answer in, and the answer, where it stands already.
    Answered(String, Result<Value, Failure>),
    /// A call, with the configuration as it came and what of it matters.
    With {
        call: Call,
        config: Value,
        known: Box<Config>,
    },
}

/// Reads the environment and standard input.
pub(crate) fn read_call() -> Called {
    let newest = VERSIONS[VERSIONS.len() - 1].to_owned();
    let call = match spec::asked(|name| std::env::var(name).ok()) {
        Err(failure) => return Called::Answered(newest, Err(failure)),
        Ok(Asked::Version) => {
            let answer = versions(&newest);
            return Called::Answered(newest, Ok(answer));
        }
        Ok(Asked::Call(call)) => call,
    };
    let mut text = String::new();
    let read = std::io::stdin().read_to_string(&mut text);
    let config: Value = match read
        .map_err(serde_json::Error::io)
        .and_then(|_| serde_json::from_str(&text))
    {
        Ok(config) => config,
        Err(e) => {
            let failure = failure_of(code::DECODING, "standard input is not JSON", &e);
            return Called::Answered(newest, Err(failure));
        }
    };
    match Config::read(&config) {
        Ok(known) => Called::With {
            call,
            config,
            known: Box::new(known),
        },
        Err(failure) => Called::Answered(newest, Err(failure)),
    }
}

/// The version to answer in, and the answer.
fn answer(
    plugin: Plugin,
    call: &Call,
    config: Value,
    known: &Config,
) -> (String, Result<Value, Failure>) {
    let mut request = Request {
        plugin,
        command: call.command,
        container_id: call.container_id.clone(),
        ifname: call.ifname.clone(),
        netns: call.netns.clone(),
        args: call.args.clone(),
        config,
        delegated: None,
    };
    let result = match known.delegate() {
        Some(kind) if plugin == Plugin::Network => serve_beside(kind, call, &mut request),
        _ => serve(call, &request),
    };
    (known.cni_version.clone(), result)
}

/// A call for which another plugin gives and takes the addresses.
fn serve_beside(kind: &str, call: &Call, request: &mut Request) -> Result<Value, Failure> {
    let path = std::env::var("CNI_PATH").ok();
    let other = Delegate::find(kind, path.as_deref())?;
    let config = delegate::for_others(&request.config);
    match call.command {
        Command::Add => add_beside(kind, &other, call, request),
        Command::Del => {
            // The address may be given out again only once nothing leads to the container.
            let result = serve(call, request)?;
            other.call("DEL", &config)?;
            Ok(result)
        }
        Command::Check => {
            other.call("CHECK", &config)?;
            serve(call, request)
        }
        Command::Gc | Command::Status | Command::PodCidrs => {
            let result = serve(call, request)?;
            // These came with version 1.1.
            let verb = if call.command == Command::Gc {
                "GC"
            } else {
                "STATUS"
            };
            other.call_if_known(verb, &delegate::with_version(config, &request.config))?;
            Ok(result)
        }
    }
}

fn add_beside(
    kind: &str,
    other: &Delegate<'_>,
    call: &Call,
    request: &mut Request,
) -> Result<Value, Failure> {
    let mut ranges = Vec::new();
    if delegate::needs_pod_cidrs(&request.config) {
        let question = Request {
            command: Command::PodCidrs,
            ..request.clone()
        };
        ranges = match ask(&question, None)? {
            Response::Ok(value) => serde_json::from_value(value).map_err(|e| {
                failure_of(code::IO, "cali-node's answer about the node's ranges", &e)
            })?,
            Response::Err(failure) => return Err(failure),
        };
    }
    let config = delegate::for_add(&request.config, &ranges)?;
    let given = other.call("ADD", &config)?;
    let result = delegate::addresses(kind, &given).and_then(|addresses| {
        request.delegated = Some(addresses);
        serve(call, request)
    });
    match result {
        Ok(mut result) => {
            if let Some(dns) = given.get("dns").filter(|dns| dns.is_object()) {
                result["dns"] = dns.clone();
            }
            Ok(result)
        }
        Err(failure) => {
            if let Err(e) = other.call("DEL", &config) {
                eprintln!(
                    "{}: {}; its address stays taken until DEL",
                    e.msg, e.details
                );
            }
            Err(failure)
        }
    }
}

/// The answer to `VERSION`. It repeats the caller's version, if the caller said one.
fn versions(newest: &str) -> Value {
    let mut text = String::new();
    let asked = std::io::stdin()
        .read_to_string(&mut text)
        .ok()
        .and_then(|_| serde_json::from_str::<Value>(&text).ok())
        .and_then(|config| config.get("cniVersion")?.as_str().map(str::to_owned));
    json!({"cniVersion": asked.as_deref().unwrap_or(newest), "supportedVersions": VERSIONS})
}

fn serve(call: &Call, request: &Request) -> Result<Value, Failure> {
    let netns = match call.netns.as_str() {
        "" => None,
        path => match NetNs::open_path(Path::new(path)) {
            Ok(netns) => Some(netns),
            // The sandbox is gone, and its interface with it.
            Err(_) if call.command == Command::Del => None,
            Err(e) => {
                return Err(failure_of(
                    code::ENVIRONMENT,
                    "environment variable CNI_NETNS: cannot open the namespace",
                    &e,
                ));
            }
        },
    };
    match (ask(request, netns.as_ref()), call.command) {
        (Ok(Response::Ok(value)), _) => Ok(value),
        (Ok(Response::Err(failure)), Command::Del) => {
            eprintln!(
                "{}: {}; left to the server's next start",
                failure.msg, failure.details
            );
            delete_alone(request, netns.as_ref())
        }
        (Ok(Response::Err(failure)), _) => Err(failure),
        (Err(unreachable), Command::Del) => {
            eprintln!(
                "{}: {}; left to the server's next start",
                unreachable.msg, unreachable.details
            );
            delete_alone(request, netns.as_ref())
        }
        (Err(unreachable), _) => Err(unreachable),
    }
}

/// One call of the server.
fn ask(request: &Request, netns: Option<&NetNs>) -> Result<Response, Failure> {
    let socket = paths::cni_socket();
    let code = match request.command {
        Command::Status => code::NOT_AVAILABLE,
        _ => code::TRY_AGAIN,
    };
    let away = |e: &dyn std::error::Error| {
        let msg = format!(
            "cali-node does not answer at {}; is it running on this node?",
            socket.display()
        );
        failure_of(code, msg, e)
    };
    let mut stream = UnixStream::connect(&socket).map_err(|e| away(&e))?;
    for set in [UnixStream::set_read_timeout, UnixStream::set_write_timeout] {
        set(&stream, Some(LIMIT)).map_err(|e| away(&e))?;
    }
    match netns {
        Some(netns) => {
            fdpass::send(&stream, &[WITH_NAMESPACE], netns.as_fd()).map_err(|e| away(&e))?;
        }
        None => stream
            .write_all(&[WITHOUT_NAMESPACE])
            .map_err(|e| away(&e))?,
    }
    let hello = Hello {
        protocol: PROTOCOL.to_owned(),
        version: VERSION,
        program: PROGRAM.to_owned(),
    };
    let mut bytes = encode(PROTOCOL, &hello).map_err(|e| away(&e))?;
    bytes.extend(encode(PROTOCOL, request).map_err(|e| away(&e))?);
    stream.write_all(&bytes).map_err(|e| away(&e))?;
    let greeting: Hello = read_blocking(PROTOCOL, &mut stream).map_err(|e| away(&e))?;
    if greeting.protocol != PROTOCOL {
        let msg = format!(
            "{} is not the CNI socket: it speaks {}",
            socket.display(),
            greeting.protocol
        );
        return Err(failure(code::IO, msg));
    }
    read_blocking(PROTOCOL, &mut stream).map_err(|e| away(&e))
}

/// `DEL` without the server: removes the interface, and leaves the rest to the server by a tombstone.
fn delete_alone(request: &Request, netns: Option<&NetNs>) -> Result<Value, Failure> {
    if let (Plugin::Network, Some(netns)) = (request.plugin, netns)
        && let Err(e) = remove_interface(netns, &request.ifname)
    {
        eprintln!(
            "cannot remove {} in the pod's namespace: {e}",
            request.ifname
        );
    }
    let folder = tombstone::folder(&paths::state_dir());
    match tombstone::leave(&folder, request) {
        Ok(()) => Ok(Value::Null),
        // Without a note the address would never be returned: the runtime has to ask again.
        Err(e) => Err(failure_of(
            code::IO,
            format!("cannot leave a note in {}", folder.display()),
            &e,
        )),
    }
}

fn remove_interface(netns: &NetNs, ifname: &str) -> Result<(), Box<dyn std::error::Error>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let pod = Netlink::open(netns)?;
        wiring::remove_in_pod(&pod, ifname).await?;
        Ok(())
    })
}
