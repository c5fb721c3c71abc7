//! The pages of reference that are made from the code: `UPDATE_DOCS=1 cargo test -p cali-tests references` writes them.

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use cali_api::Kind;
    use calictl::reference;

    use crate::lab::repository;
    use crate::sources::files;

    const HOW: &str = "UPDATE_DOCS=1 cargo test -p cali-tests references";
    /// A kind of configuration, the type of its spec, where that is declared, and the packages that read it.
    const KINDS: [(Kind, &str, &str, &[&str]); 2] = [
        (
            Kind::FelixConfiguration,
            "FelixConfigurationSpec",
            "api/src/v3/felix.rs",
            &["felix", "node", "ipip-vxlan", "calictl"],
        ),
        (
            Kind::BGPConfiguration,
            "BGPConfigurationSpec",
            "api/src/v3/bgp.rs",
            &["bgpd", "felix", "node"],
        ),
    ];

    fn read(path: &Path) -> String {
        std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// Holds a page against what it should say, or writes it where that is asked for.
    fn hold(page: &str, text: &str) {
        let path = repository().join("docs").join(page);
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&path, text).unwrap();
        }
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        let differs = text
            .lines()
            .zip(kept.lines())
            .find(|(made, kept)| made != kept);
        assert!(
            kept == text,
            "docs/{page} is not what the code says, first at {differs:?} (made, kept). Write it anew: {HOW}"
        );
    }

    /// A field as it is declared.
    struct Declared {
        /// Name in Rust.
        name: String,
        meaning: String,
    }

    /// The fields of a struct by their names in manifests, and the names of its methods with what each reads.
    struct Spec {
        fields: BTreeMap<String, Declared>,
        methods: BTreeMap<String, String>,
    }

    /// `node_mesh_password` as `nodeMeshPassword`.
    fn camel_case(name: &str) -> String {
        let mut words = name.split('_');
        let first = words.next().unwrap_or_default().to_owned();
        words.fold(first, |name, word| {
            let (head, rest) = word.split_at(1);
            name + &head.to_uppercase() + rest
        })
    }

    fn quoted_after<'a>(text: &'a str, before: &str) -> Option<&'a str> {
        text.split_once(before)?
            .1
            .split_once('"')
            .map(|(name, _)| name)
    }

    impl Spec {
        fn read(source: &str, name: &str) -> Self {
            let begin = source
                .find(&format!("pub struct {name} {{"))
                .expect("the struct");
            let body = &source[begin..];
            let body = &body[..body.find("\n}").expect("its end")];
            let mut fields = BTreeMap::new();
            let (mut meaning, mut attributes) = (Vec::new(), String::new());
            for line in body.lines().skip(1).map(str::trim) {
                if let Some(doc) = line.strip_prefix("/// ") {
                    meaning.push(doc);
                    continue;
                }
                let field = line.trim_start_matches("pub ").split_once(": ");
                let is_name =
                    |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
                match field {
                    Some((field, declared)) if is_name(field) && !meaning.is_empty() => {
                        let manifest = quoted_after(declared, "= \"")
                            .or_else(|| quoted_after(&attributes, "rename = \""))
                            .map_or_else(|| camel_case(field), str::to_owned);
                        let meaning = std::mem::take(&mut meaning).join(" ");
                        let name = field.to_owned();
                        fields.insert(manifest, Declared { name, meaning });
                        attributes.clear();
                    }
                    _ => attributes.push_str(line),
                }
            }
            let methods = source
                .split_once(&format!("impl {name} {{"))
                .map(|(_, rest)| rest);
            let methods = methods
                .and_then(|rest| rest.split_once("\n}\n"))
                .map_or("", |(body, _)| body);
            let methods = methods.split("pub fn ").skip(1).filter_map(|text| {
                let (name, body) = text.split_once('(')?;
                Some((name.to_owned(), body.to_owned()))
            });
            Self {
                fields,
                methods: methods.collect(),
            }
        }

        /// Whether the code reads a field, itself or through a method of the type.
        fn is_read(&self, field: &str, code: &str) -> bool {
            has_word(code, field)
                || self
                    .methods
                    .iter()
                    .any(|(method, body)| has_word(body, field) && has_word(code, method))
        }
    }

    fn has_word(text: &str, word: &str) -> bool {
        let part_of_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        text.match_indices(word).any(|(at, _)| {
            !text[..at].ends_with(part_of_word)
                && !text[at + word.len()..].starts_with(part_of_word)
        })
    }

    /// The code of packages without their tests.
    fn code(packages: &[&str]) -> String {
        let mut code = String::new();
        for package in packages {
            for file in files(&repository().join(package).join("src"), "rs") {
                let name = file.file_name().unwrap().to_string_lossy().into_owned();
                if !name.contains("test") {
                    // A file may name its tests at its head, and have them in another.
                    let text = read(&file);
                    code += text
                        .split("#[cfg(test)]\nmod tests {")
                        .next()
                        .unwrap_or_default();
                }
            }
        }
        code
    }

    #[test]
    fn the_page_of_configuration_says_what_the_types_say() {
        let mut page = format!(
            "# Configuration resources\n\n\
             <!-- Made from the code: {HOW} -->\n\n\
             The fields of FelixConfiguration and BGPConfiguration: `default` for the cluster, `node.NAME` for one node. What is absent leaves\n\
             the layer below in force: the node's resource, the cluster's, the environment, the built-in value. Fields that are *kept* are\n\
             read, checked and written back, so that manifests of Calico stay whole, and change nothing in Cali. `calictl explain KIND.spec` shows the\n\
             fields of every kind, with those below them.\n"
        );
        for (kind, name, source, packages) in KINDS {
            let spec = Spec::read(&read(&repository().join(source)), name);
            let code = code(packages);
            let fields = reference::fields(kind).unwrap();
            assert_eq!(fields.len(), spec.fields.len(), "{kind}: schema and source");
            let mut rows = [String::new(), String::new()];
            for field in fields {
                let declared = spec.fields.get(&field.name);
                let declared =
                    declared.unwrap_or_else(|| panic!("{kind} {} in {source}", field.name));
                let read = spec.is_read(&declared.name, &code);
                let limits = field.limits.join("; ").replace('|', "\\|");
                let values = if limits.is_empty() {
                    field.shape
                } else {
                    format!("{}: {limits}", field.shape)
                };
                let row = format!("| `{}` | {values} | {} |\n", field.name, declared.meaning);
                rows[usize::from(!read)].push_str(&row);
            }
            let head = "| field | values | meaning |\n|---|---|---|\n";
            let [acted_on, kept] = rows;
            assert!(acted_on.lines().count() > 10, "{kind}: {acted_on}");
            page += &format!("\n## {kind}\n\n{head}{acted_on}");
            if !kept.is_empty() {
                page += &format!("\n### {kind}: kept without an effect\n\n{head}{kept}");
            }
        }
        hold("reference-configuration.md", &page);
    }

    #[test]
    fn the_page_of_calictl_has_every_command_with_its_flags() {
        let commands = reference::commands();
        assert!(commands.matches("\n## calictl ").count() > 30, "{commands}");
        let page = format!(
            "# Commands of calictl\n\n<!-- Made from the code: {HOW} -->\n\n\
             What `calictl help COMMAND` says, on one page; [calictl](calictl.md) is what is worth knowing first.\n\n{commands}"
        );
        hold("reference-calictl.md", &page);
    }
}
