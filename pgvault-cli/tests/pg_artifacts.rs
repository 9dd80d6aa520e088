//! Artifacts: what is put comes back as it was at a time, and nothing else does.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Stdio;

use common::{Ran, Site, run, sql, switch_and_archive};
use serde_json::Value;

/// Larger than a frame, and nothing that compresses away.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    (0..bytes).map(|_| next()).collect()
}

fn json(site: &Site, arguments: &[&str]) -> Ran {
    run(site.pgvault(&[&["--output", "json"], arguments].concat()))
}

fn put(site: &Site, arguments: &[&str]) -> Vec<Value> {
    json(site, &[&["artifact", "put"], arguments].concat()).ok().json()["artifacts"].as_array().unwrap().clone()
}

fn versions(site: &Site) -> Vec<Value> {
    site.summary(&["artifact", "list"])["artifacts"].as_array().unwrap().clone()
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap()
}

#[test]
fn versions_come_back_by_time_and_by_id_and_are_stored_once() {
    let site = Site::new();
    let _server = site.start(site.cluster("main"));
    let conf = site.write("odoo.conf", "[options]\nadmin_passwd = first\n");
    fs::set_permissions(&conf, fs::Permissions::from_mode(0o640)).unwrap();
    let conf = conf.to_str().unwrap();
    let first = put(&site, &[conf]).remove(0);
    assert_eq!((text(&first, "name"), text(&first, "mode"), &first["new"]), ("odoo.conf", "0640", &Value::Bool(true)));
    // The same again is no version; with --force it is.
    let same = put(&site, &[conf]).remove(0);
    assert_eq!((&same["new"], &same["version_id"]), (&Value::Bool(false), &first["version_id"]));
    assert_eq!(versions(&site).len(), 1);
    let large = noise(9 << 20);
    let _ = site.write("odoo.conf", &large);
    let second = put(&site, &[conf]).remove(0);
    let forced = put(&site, &[conf, "--force"]).remove(0);
    assert_eq!((versions(&site).len(), &forced["sha256"]), (3, &second["sha256"]));

    let get = |more: &[&str]| {
        let out = site.fresh("got");
        let ran = json(&site, &[&["artifact", "get", "--out", out.to_str().unwrap()], more].concat());
        (ran, out)
    };
    let (ran, out) = get(&["odoo.conf"]);
    assert_eq!(ran.ok().json()["artifact"]["version_id"], forced["version_id"]);
    assert!(fs::read(&out).unwrap() == large);
    assert_eq!(fs::metadata(&out).unwrap().permissions().mode() & 0o7777, 0o600);
    let (ran, out) = get(&["odoo.conf", "--at", text(&second, "at")]);
    assert_eq!(ran.ok().json()["artifact"]["version_id"], second["version_id"]);
    assert!(fs::read(out).unwrap() == large);
    for more in [["odoo.conf", "--at", text(&first, "at")], ["odoo.conf", "--version", text(&first, "version_id")]] {
        let (ran, out) = get(&more);
        let _ = ran.ok();
        assert_eq!(fs::read_to_string(&out).unwrap(), "[options]\nadmin_passwd = first\n");
        // What is there is not overwritten.
        let arguments = [&["artifact", "get", "--out", out.to_str().unwrap()], more.as_slice()].concat();
        let _ = site.write(out.file_name().unwrap().to_str().unwrap(), "mine");
        json(&site, &arguments).expect(2).says("[artifact.exists]");
        assert_eq!(fs::read_to_string(&out).unwrap(), "mine");
        json(&site, &[arguments.as_slice(), &["--force"]].concat()).ok();
        assert_eq!(fs::read_to_string(&out).unwrap(), "[options]\nadmin_passwd = first\n");
    }
    get(&["odoo.conf", "--at", "2020-01-01T00:00:00Z"]).0.expect(1).says("[artifact.too_early]").says(text(&first, "version_id"));
    get(&["other.conf"]).0.expect(1).says("[artifact.unknown]");
    get(&["--version", "01M7YQ0CJRQERHS1KZH3PBAPVP"]).0.expect(1).says("[artifact.unknown]");
    get(&["other.conf", "--version", text(&first, "version_id")]).0.expect(2).says("[artifact.other]");
    let shown = run(site.pgvault(&["artifact", "get", "odoo.conf", "--at", text(&first, "at"), "--out", "-"])).ok();
    assert_eq!(shown.stdout, "[options]\nadmin_passwd = first\n");
    let listed: Vec<String> = site.vaults.names().into_iter().filter(|name| name.contains("/artifact/")).collect();
    assert_eq!(listed.len(), 3);
    assert!(listed.iter().all(|name| !name.contains("odoo")), "{listed:?}");
    site.pgv(&["check"]).ok();
}

#[test]
fn directories_and_standard_input_and_what_is_refused() {
    let site = Site::new();
    let _server = site.start(site.cluster("main"));
    // As Kubernetes mounts a ConfigMap.
    let folder = site.directory("deploy");
    let _ = site.directory("deploy/..2026");
    let _ = site.directory("deploy/base");
    let _ = site.write("deploy/..2026/values.yaml", "replicas: 2\n");
    let _ = site.write("deploy/base/service.yaml", "kind: Service\n");
    symlink("..2026", folder.join("..data")).unwrap();
    symlink("..data/values.yaml", folder.join("values.yaml")).unwrap();
    let stored = put(&site, &[folder.to_str().unwrap()]);
    let names: Vec<&str> = stored.iter().map(|version| text(version, "name")).collect();
    assert_eq!(names, ["deploy/base/service.yaml", "deploy/values.yaml"]);
    // Only what has changed is a version.
    let _ = site.write("deploy/..2026/values.yaml", "replicas: 3\n");
    let again = put(&site, &[folder.to_str().unwrap(), "--name", "deploy"]);
    assert_eq!(again.iter().map(|version| version["new"].as_bool().unwrap()).collect::<Vec<_>>(), [false, true]);

    let pipe = |arguments: &[&str], input: &[u8]| {
        let mut command = site.pgvault(&[&["--output", "json", "artifact", "put"], arguments].concat());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        // It may have refused before it has read anything.
        let _ = child.stdin.take().unwrap().write_all(input);
        let ended = child.wait_with_output().unwrap();
        (ended.status.code(), String::from_utf8(ended.stderr).unwrap())
    };
    assert_eq!(pipe(&["-", "--name", "secrets/env"], b"A=1\n").0, Some(0));
    let shown = run(site.pgvault(&["artifact", "get", "secrets/env", "--out", "-"])).ok();
    assert_eq!(shown.stdout, "A=1\n");
    assert_eq!(versions(&site).iter().find(|version| version["name"] == "secrets/env").unwrap()["mode"], "0600");
    let before = versions(&site).len();
    assert!(pipe(&["-"], b"x").1.contains("[usage.name]"));
    let (code, said) = pipe(&["-", "--name", "large"], &noise((16 << 20) + 1));
    assert!(code == Some(2) && said.contains("[artifact.too_large]") && said.contains("16 MiB"), "{said}");
    assert_eq!(pipe(&["-", "--name", "just fits"], &noise(16 << 20)).0, Some(0));
    for name in ["../etc/passwd", "/etc/passwd", "a\u{1b}[2J", ""] {
        let (code, said) = pipe(&["-", "--name", name], b"x");
        assert!(code == Some(2) && said.contains("[artifact.name]"), "{name:?}: {said}");
    }
    json(&site, &["artifact", "put", "/dev/null"]).expect(2).says("[artifact.special]");
    assert_eq!(versions(&site).len(), before + 1);
}

#[test]
fn a_tampered_artifact_is_named_and_never_given() {
    let site = Site::in_directory();
    let _server = site.start(site.cluster("main"));
    let vault = site.vaults.directory(common::VAULT).unwrap();
    let path = site.write("values.yaml", noise(6 << 20));
    let stored = put(&site, &[path.to_str().unwrap()]).remove(0);
    let name = site.vaults.names().into_iter().find(|name| name.contains("/artifact/")).unwrap();
    let object = vault.join(&name);
    let whole = fs::read(&object).unwrap();
    let refused = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        fs::write(&object, bytes).unwrap();
        let out = site.fresh("got");
        json(&site, &["artifact", "get", "--version", text(&stored, "version_id"), "--out", out.to_str().unwrap()]).expect(4);
        assert!(!out.exists());
        site.pgv(&["check"]).expect(4).says(&name);
    };
    // In what is known of it, in its content, in its last bytes.
    refused(130);
    json(&site, &["artifact", "list"]).expect(4).says(&name);
    json(&site, &["artifact", "get", "values.yaml", "--out", "-"]).expect(1).says(&name);
    refused(3 << 20);
    refused(whole.len() - 60);
    fs::write(&object, whole).unwrap();
    assert_eq!(versions(&site).len(), 1);
    site.pgv(&["check"]).ok();
}

/// What belongs to a restored database is named with the way to get it.
#[test]
fn a_restore_names_the_artifacts_of_its_moment() {
    let site = Site::new();
    let server = site.start(site.cluster("main").config(site.archiving()));
    let path = site.write("odoo.conf", "old\n");
    let path = path.to_str().unwrap();
    let old = put(&site, &[path]).remove(0);
    let _ = site.backup("local");
    let _ = site.summary(&["mark", "before", "--switch"]);
    let _ = site.write("odoo.conf", "new\n");
    let new = put(&site, &[path]).remove(0);
    let _ = put(&site, &[path, "--name", "added later"]);
    let _ = sql(&server, "create table t()");
    let _ = switch_and_archive(&server);

    let checklist = |to: &str| {
        let pgdata = site.fresh("restored");
        let restored = json(&site, &["restore", "--to", to, "--pgdata", pgdata.to_str().unwrap()]).ok().json();
        restored["artifacts"].as_array().unwrap().clone()
    };
    let then = checklist("name:before");
    assert_eq!(then.len(), 1, "{then:?}");
    assert_eq!(then[0]["version_id"], old["version_id"]);
    let now = checklist("latest");
    assert_eq!(now.iter().map(|version| text(version, "name")).collect::<Vec<_>>(), ["added later", "odoo.conf"]);
    assert_eq!(now[1]["version_id"], new["version_id"]);
    // The command is one that works.
    let pgdata = site.fresh("restored");
    let shown = site.restore_into(&pgdata, "name:before", &[]).ok();
    let line = shown.stdout.lines().find(|line| line.contains("artifact get")).unwrap();
    let command = line.split("pgvault ").nth(1).unwrap();
    let out = site.folder().join("odoo.conf.restored");
    assert!(command.ends_with("--out odoo.conf.restored"), "{line}");
    run(site.pgvault(&command.split(' ').collect::<Vec<_>>())).ok();
    assert_eq!(fs::read_to_string(out).unwrap(), "old\n");
}
