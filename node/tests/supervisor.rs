//! The supervisor with a real process.
#![allow(
    clippy::unwrap_used,
    reason = "outside test functions too, this is test code"
)]

use std::path::Path;
use std::time::Duration;

use cali_netlink::{Process, Signal};
use cali_node::supervisor::{Program, Supervisor};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(10);

fn sleeper(folder: &Path) -> Program {
    Program {
        path: "/bin/sh".into(),
        arguments: vec!["-c".into(), "exec sleep 600".into()],
        environment: vec![],
        record: folder.join("bgpd.pid"),
        socket: folder.join("bgpd.sock"),
    }
}

/// The process that runs after `former` (none: at all).
async fn running(supervisor: &Supervisor, former: Option<u32>) -> u32 {
    let mut pid = supervisor.pid();
    let changed = pid.wait_for(|pid| pid.is_some() && *pid != former);
    let running = timeout(PATIENCE, changed).await.unwrap().unwrap();
    running.unwrap()
}

async fn assert_ends(process: &Process) {
    timeout(PATIENCE, process.ended()).await.unwrap().unwrap();
}

#[tokio::test]
async fn killed_program_is_started_again() {
    let folder = tempfile::tempdir().unwrap();
    let supervisor = Supervisor::start(sleeper(folder.path()));
    let first = running(&supervisor, None).await;
    Process::open(first)
        .unwrap()
        .signal(Signal::SIGKILL)
        .unwrap();
    let second = running(&supervisor, Some(first)).await;
    assert_ne!(first, second);
    supervisor.stop().await;
}

#[tokio::test]
async fn program_outlives_its_supervisor_and_is_adopted_by_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let supervisor = Supervisor::start(sleeper(folder.path()));
    let first = running(&supervisor, None).await;
    // As a kill of the daemon: nothing is told to the program.
    drop(supervisor);
    let process = Process::open(first).unwrap();
    let supervisor = Supervisor::start(sleeper(folder.path()));
    assert_eq!(running(&supervisor, None).await, first);
    // An adopted program is watched like an own one.
    process.signal(Signal::SIGKILL).unwrap();
    let second = running(&supervisor, Some(first)).await;
    let process = Process::open(second).unwrap();
    supervisor.stop().await;
    assert_ends(&process).await;
}

#[tokio::test]
async fn program_without_a_record_is_found_by_its_socket() {
    let folder = tempfile::tempdir().unwrap();
    let program = sleeper(folder.path());
    // This test's own process listens, so it is what must be found; its supervisor is dropped and not stopped.
    let _listener = tokio::net::UnixListener::bind(&program.socket).unwrap();
    let supervisor = Supervisor::start(program);
    assert_eq!(running(&supervisor, None).await, std::process::id());
}

#[tokio::test]
async fn record_of_a_process_that_has_ended_is_not_trusted() {
    let folder = tempfile::tempdir().unwrap();
    // The number of this test's process with another start time, as after a reboot.
    std::fs::write(
        folder.path().join("bgpd.pid"),
        format!(r#"{{"pid":{},"started":1}}"#, std::process::id()),
    )
    .unwrap();
    let supervisor = Supervisor::start(sleeper(folder.path()));
    assert_ne!(running(&supervisor, None).await, std::process::id());
    supervisor.stop().await;
}
