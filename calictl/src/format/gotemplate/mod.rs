//! `-o go-template=TEMPLATE`: Go's `text/template` as users of `kubectl` write it.
//!
//! There are fields (`.spec.cidr`), variables, `if`/`else if`/`else`, `range` (with index and `else`), `with`, pipelines,
//! parentheses, comments, trimming (`{{-`, `-}}`) and the functions of [`functions`]. There is no `define`, `template`,
//! `block`, `break` or `continue`, and no method is called.
//!
//! Two things are kinder than in Go: a field of nothing is nothing (`<no value>`) instead of an error, and where there is no
//! field of the name exactly, one that differs in case counts (`.Spec.CIDR`), since `calicoctl` has the names of Go's structs.

mod eval;
mod functions;
mod lex;
mod parse;

use anyhow::{Context, Result, anyhow};
use serde_json::Value;

/// A template, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Template(Vec<parse::Node>);

impl Template {
    pub(crate) fn parse(text: &str) -> Result<Self> {
        // In one text: `clap` shows no causes.
        parse::template(text)
            .map(Self)
            .map_err(|error| anyhow!("this is no Go template: {error:#}"))
    }

    pub(crate) fn render(&self, value: &Value) -> Result<String> {
        eval::render(&self.0, value).context("the Go template fails")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn shown(template: &str) -> String {
        let list = json!({"kind": "IPPoolList", "items": [
            {"metadata": {"name": "a", "labels": {"app.io/tier": "db", "x": "y"}}, "spec": {"cidr": "10.0.0.0/16", "ports": [1, 2]}},
            {"metadata": {"name": "b", "labels": {}}, "spec": {"ports": [], "on": true, "ratio": 0.5, "secret": "aGk="}},
        ]});
        Template::parse(template)
            .and_then(|template| template.render(&list))
            .unwrap_or_else(|error| panic!("{template}: {error:#}"))
    }

    #[test]
    fn templates_of_kubectl_give_what_kubectl_gives() {
        for (template, expected) in [
            (
                r#"{{range .items}}{{.metadata.name}}{{"\n"}}{{end}}"#,
                "a\nb\n",
            ),
            ("{{len .items}} {{.kind}}", "2 IPPoolList"),
            (
                "{{range $i, $e := .items}}{{if $i}}, {{end}}{{$i}}={{$e.metadata.name}}{{end}}",
                "0=a, 1=b",
            ),
            (
                "{{range .items}}{{with .spec.cidr}}<{{.}}>{{else}}none{{end}}{{end}}",
                "<10.0.0.0/16>none",
            ),
            (
                r#"{{range .items}}{{if eq .metadata.name "a" "c"}}1{{else if .spec.on}}2{{else}}3{{end}}{{end}}"#,
                "12",
            ),
            (
                r#"{{index (index .items 0).metadata.labels "app.io/tier"}}"#,
                "db",
            ),
            (
                r#"{{range $k, $v := (index .items 0).metadata.labels}}{{$k}}={{$v}};{{end}}"#,
                "app.io/tier=db;x=y;",
            ),
            (
                r#"{{range .items}}{{printf "%-4s|%3d|%q|%v" .metadata.name (len .spec.ports) .metadata.name .spec.ports}}{{"\n"}}{{end}}"#,
                "a   |  2|\"a\"|[1 2]\nb   |  0|\"b\"|[]\n",
            ),
            ("{{.nothing}} {{.nothing.more}}", "<no value> <no value>"),
            ("{{range .nothing}}x{{else}}empty{{end}}", "empty"),
            (
                "a  {{- /* a comment */ -}}  b {{ 1 -}} \n c {{- 2}}",
                "ab 1c2",
            ),
            (
                "{{$x := 1}}{{range .items}}{{$x = len .spec.ports}}{{end}}{{$x}}",
                "0",
            ),
            (
                r#"{{and .kind "yes"}} {{or .nothing "no"}} {{not .kind}} {{ne 1 2}} {{lt 1 2}} {{ge "b" "c"}}"#,
                "yes no false true true false",
            ),
            (r#"{{.kind | printf "%s-%s" "k"}}"#, "k-IPPoolList"),
            ("{{(index .items 1).spec.ratio}}", "0.5"),
            ("{{(index .items 1).spec.secret | base64decode}}", "hi"),
            (
                "{{(index .items 0).metadata.labels}}",
                "map[app.io/tier:db x:y]",
            ),
            (r#"{{join (index .items 0).spec.ports ","}}"#, "1,2"),
            (r#"{{exists . "items"}} {{exists . "other"}}"#, "true false"),
            (
                "{{$.kind}}{{range .items}}{{$.kind}}{{end}}",
                "IPPoolListIPPoolListIPPoolList",
            ),
            ("{{(index .Items 0).Spec.CIDR}}", "10.0.0.0/16"),
            (
                "{{slice .kind 0 2}}{{print 1 2 \"x\"}}{{println}}",
                "IP1 2x\n",
            ),
            ("{{`raw \\n`}}{{\"\\t\"}}", "raw \\n\t"),
            (
                r#"{{if and (gt (len .items) 1) (not .nothing)}}many{{end}}"#,
                "many",
            ),
            ("a }} b", "a }} b"),
        ] {
            assert_eq!(shown(template), expected, "{template}");
        }
    }

    #[test]
    fn what_is_no_template_is_refused_with_its_reason() {
        for (template, reason) in [
            ("{{.a", "\"}}\" is missing"),
            ("{{range .items}}x", "{{range}} has no {{end}}"),
            ("{{end}}", "{{end}} without"),
            ("{{if}}x{{end}}", "a value is missing"),
            ("{{nosuch .a}}", "there is no function \"nosuch\""),
            ("{{define \"x\"}}{{end}}", "{{define}} is not supported"),
            ("{{$x}}", "there is no variable $x"),
            ("{{\"a}}", "is not closed"),
            ("{{.a | }}", "a value is missing"),
            ("{{(.a}}", "\")\" is missing"),
        ] {
            let error = Template::parse(template).expect_err(template);
            assert!(
                format!("{error:#}").contains(reason),
                "{template}: {error:#}"
            );
        }
    }

    #[test]
    fn what_cannot_be_computed_says_why() {
        let list = json!({"items": [1]});
        for (template, reason) in [
            ("{{index .items 7}}", "index 7 of 1"),
            ("{{len 3}}", "len of a number"),
            ("{{lt 1 \"a\"}}", "cannot compare"),
            ("{{range 3.5}}{{end}}", "cannot range over"),
            ("{{printf \"%d\" \"x\"}}", "%!d(string=x)"),
            ("{{index .items}}{{eq 1}}", "eq takes at least 2"),
        ] {
            let rendered = Template::parse(template).and_then(|template| template.render(&list));
            let said = match rendered {
                Ok(text) => text,
                Err(error) => format!("{error:#}"),
            };
            assert!(said.contains(reason), "{template}: {said}");
        }
    }
}
