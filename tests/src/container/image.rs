//! The image that `scripts/image` makes, unpacked as a container runtime unpacks it.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::bgp::package;
use crate::lab::{checked, programs, repository};

/// The image.
#[derive(Debug)]
pub struct Image {
    /// Its root.
    pub root: PathBuf,
    /// Its own word on how it is run: `config` of its configuration.
    pub config: Value,
    /// Libraries from elsewhere and where they belong, for programs that are not static.
    pub libraries: Vec<(PathBuf, PathBuf)>,
}

impl Image {
    /// Makes and unpacks it, or a variant of it. Its programs are those that were built for this test; these ask for the libraries of
    /// the host, which are brought into the containers. `CALI_DIST` names a folder with the static ones, which need none.
    ///
    /// # Panics
    /// If it cannot be made, or is not what a runtime takes.
    #[must_use]
    pub fn make(folder: &Path, variant: Option<&str>) -> Self {
        let shipped = std::env::var_os("CALI_DIST").map(PathBuf::from);
        let same = |path: &str| (PathBuf::from(path), PathBuf::from(path));
        let libraries = match (&shipped, variant) {
            (Some(_), _) => Vec::new(),
            (None, None) => ["/lib", "/lib64", "/usr/lib"].map(same).to_vec(),
            // It has most of them itself.
            (None, Some(variant)) => more_libraries(variant),
        };
        let programs = shipped.unwrap_or_else(|| stripped(folder));
        let archive = folder.join("image.tar");
        let made = Command::new(repository().join("scripts/image"))
            .arg(&archive)
            .env("CALI_DIST", programs)
            .env("VARIANT", variant.unwrap_or_default())
            .output();
        let made = made.expect("start scripts/image");
        checked(made, || "scripts/image".to_owned()).expect("the image");
        let (parts, root) = (folder.join("image"), folder.join("root"));
        unpack(&archive, &parts);
        let json = |name: &str| -> Value {
            let text = std::fs::read(parts.join(name)).expect("a file of the image");
            serde_json::from_slice(&text).expect("JSON")
        };
        let manifest = json("manifest.json");
        let name = |value: &Value| value.as_str().expect("a name in the manifest").to_owned();
        let layers = manifest[0]["Layers"].as_array().expect("layers");
        for layer in layers {
            unpack(&parts.join(name(layer)), &root);
        }
        let config = json(&name(&manifest[0]["Config"]));
        Self {
            root,
            config: config["config"].clone(),
            libraries: libraries
                .into_iter()
                .filter(|(from, _)| from.exists())
                .collect(),
        }
    }
}

/// What programs in Rust ask for beside libraries that those of the variant ask for as well.
fn more_libraries(variant: &str) -> Vec<(PathBuf, PathBuf)> {
    let package = package::folder(variant).expect("the packages of the variant");
    let libraries = std::fs::read_dir(package.join("usr/lib")).expect("libraries");
    let all = libraries
        .flatten()
        .map(|folder| folder.path().join("libgcc_s.so.1"));
    let at = |path: &Path| Path::new("/").join(path.strip_prefix(&package).unwrap_or(path));
    all.filter(|path| path.exists())
        .map(|path| (path.clone(), at(&path)))
        .collect()
}

/// The built programs without what debuggers read, which is nine tenths of them.
fn stripped(folder: &Path) -> PathBuf {
    let to = folder.join("programs");
    std::fs::create_dir(&to).expect("a folder");
    for name in ["cali", "calico", "calico-ipam"] {
        let mut strip = Command::new("strip");
        let strip = strip
            .arg(programs().join(name))
            .arg("-o")
            .arg(to.join(name));
        checked(strip.output().expect("start strip"), || {
            format!("strip {name}")
        })
        .expect("a built program");
    }
    to
}

fn unpack(archive: &Path, folder: &Path) {
    std::fs::create_dir_all(folder).expect("a folder");
    let mut tar = Command::new("tar");
    let tar = tar.arg("-xpf").arg(archive).arg("-C").arg(folder);
    checked(tar.output().expect("start tar"), || {
        format!("tar {}", archive.display())
    })
    .expect("an archive");
}
