//! Archives of images, as `ctr images import` takes them: ours, and one that the pods of tests run, made of a static busybox.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::container::image::Image;
use crate::lab::checked;

/// The image of ordinary pods, and of the container that holds a pod's namespaces.
pub const BOX: &str = "docker.io/library/box:test";

/// Makes ours, or a variant of it, under the name that the manifests have.
///
/// # Panics
/// If it cannot be made.
pub(super) fn ours(folder: &Path, variant: Option<&str>) -> PathBuf {
    let work = folder.join(variant.unwrap_or("ours"));
    std::fs::create_dir(&work).expect("a folder");
    let image = Image::make(&work, variant);
    if image.libraries.is_empty() {
        return work.join("image.tar");
    }
    // Programs that were built for tests are not static: with the libraries that they ask for, in a layer that has all. A variant has
    // most of them itself, of another system.
    let libraries = match variant {
        Some(_) => image.libraries.clone(),
        None => libraries(&image.root.join("cali")),
    };
    for (library, at) in libraries {
        let to = image.root.join(at.strip_prefix("/").expect("a whole path"));
        std::fs::create_dir_all(to.parent().expect("a folder")).expect("a folder");
        std::fs::copy(&library, to).expect("a library");
    }
    let manifest = std::fs::read(work.join("image/manifest.json")).expect("a manifest");
    let manifest: Value = serde_json::from_slice(&manifest).expect("JSON");
    let name = manifest[0]["RepoTags"][0].as_str().expect("a name");
    pack(&work, name, &image.root, &image.config)
}

/// Makes the one for pods.
///
/// # Panics
/// If it cannot be made.
pub(super) fn small(folder: &Path) -> PathBuf {
    let (work, root) = (folder.join("small"), folder.join("small/root"));
    for one in ["tmp", "etc"] {
        std::fs::create_dir_all(root.join(one)).expect("a folder");
    }
    std::fs::copy("/bin/busybox", root.join("busybox")).expect("busybox-static");
    let config = json!({"Cmd": ["/busybox", "sleep", "2147483647"]});
    pack(&work, BOX, &root, &config)
}

/// The libraries of a program, with the loader, and where they belong.
fn libraries(program: &Path) -> Vec<(PathBuf, PathBuf)> {
    let output = Command::new("ldd").arg(program).output();
    let text = checked(output.expect("start ldd"), || "ldd".to_owned()).expect("libraries");
    let words = text.split_whitespace();
    words
        .filter(|word| word.starts_with('/'))
        .map(|word| (PathBuf::from(word), PathBuf::from(word)))
        .collect()
}

/// Packs a root as an image of one layer.
fn pack(folder: &Path, name: &str, root: &Path, config: &Value) -> PathBuf {
    let parts = folder.join("parts");
    std::fs::create_dir(&parts).expect("a folder");
    tar(&parts.join("layer.tar"), root, &["."]);
    let sum = Command::new("sha256sum")
        .arg(parts.join("layer.tar"))
        .output();
    let sum = checked(sum.expect("start sha256sum"), || "sha256sum".to_owned()).expect("a sum");
    let sum = sum.split(' ').next().unwrap_or_default();
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config = json!({"architecture": architecture, "os": "linux", "config": config,
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{sum}")]}});
    let manifest = json!([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]);
    for (file, content) in [("config.json", config), ("manifest.json", manifest)] {
        std::fs::write(parts.join(file), content.to_string()).expect("a file");
    }
    let archive = folder.join("packed.tar");
    let names = ["manifest.json", "config.json", "layer.tar"];
    tar(&archive, &parts, &names);
    archive
}

fn tar(archive: &Path, folder: &Path, names: &[&str]) {
    let mut tar = Command::new("tar");
    let tar = tar
        .args(["--owner=0", "--group=0", "--numeric-owner", "-cf"])
        .arg(archive)
        .arg("-C")
        .arg(folder)
        .args(names);
    checked(tar.output().expect("start tar"), || {
        format!("tar {}", archive.display())
    })
    .expect("an archive");
}
