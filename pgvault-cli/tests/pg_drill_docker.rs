//! Restore drills in containers, by Podman's service and an image that is made of the PostgreSQL under test.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::process::Command;
use std::time::Duration;

use common::drills::{Drills, ODOO, named};
use common::{Running, sql, switch_and_archive, wait_until};
use pgvault_teststores::Podman;
use pgvault_verify::process::Install;

fn drills(more: &str) -> Drills {
    let podman = Podman::shared().unwrap();
    let image = podman.image(Install::for_tests().unwrap().bin()).unwrap();
    Drills::in_containers(more, &format!("socket = \"{}\"\nimage = \"{image}\"", podman.socket().display()))
}

/// Containers of drills whose copies lie in the folder of this site.
fn containers(drills: &Drills) -> Vec<String> {
    let mut podman = Podman::shared().unwrap().command().unwrap();
    let _ = podman.args(["ps", "--all", "--filter", "label=io.pgvault.drill", "--format", "{{.ID}} {{.Labels}}"]);
    let output = podman.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let folder = drills.site.folder().to_str().unwrap();
    String::from_utf8(output.stdout).unwrap().lines().filter(|line| line.contains(folder)).map(str::to_owned).collect()
}

#[track_caller]
fn assert_nothing_left(drills: &Drills) {
    assert_eq!(containers(drills), Vec::<String>::new());
    drills.assert_nothing_left();
}

/// The whole way in a container without a network: WAL comes through the folder, and a new base backup goes out.
#[test]
fn a_drill_in_a_container_passes_and_its_copy_can_be_kept() {
    let drills = drills("");
    let (site, server) = (&drills.site, &drills.server);
    let space = site.directory("space");
    let _ = sql(server, &format!("create tablespace fast location '{}'", space.display()));
    let _ = sql(server, ODOO);
    let _ =
        sql(server, "create table spaced(id int primary key) tablespace fast; insert into spaced select generate_series(1, 2000)");
    let _ = site.backup("local");
    let _ = sql(server, "insert into spaced select generate_series(2001, 3000)");
    let _ = switch_and_archive(server);
    drills.configure(
        "[[cluster.main.drill.check]]\nname = \"rows\"\ndatabase = \"postgres\"\nsql = \"select count(*) = 3000 from spaced\"
        [[cluster.main.drill.check]]\nname = \"no network\"\ndatabase = \"postgres\"\nsql = \"select inet_server_addr() is null\"",
    );
    let drill = drills.verify(&["--deep", "--promote-to-backup"]).expect(0).json();
    assert_eq!(drill["result"], "passed", "{drill:#}");
    assert!(drill["runner"].as_str().unwrap().contains("docker"), "{drill:#}");
    let passed = named(&drill, "passed");
    for name in ["catalog-dump", "amcheck", "page-checksums", "odoo-books:postgres", "user:rows:postgres", "roll-forward"] {
        assert!(passed.contains_key(name), "{name}: {drill:#}");
    }
    assert_nothing_left(&drills);
    let made = drill["promoted_to"].as_str().unwrap();
    let again = drills.verify(&["--backup", made]).expect(0).json();
    assert_eq!(again["result"], "passed", "{again:#}");
    assert_nothing_left(&drills);
}

/// A container that has too little memory, and one that is killed.
#[test]
fn a_container_that_ends_fails_the_drill_and_leaves_nothing() {
    let drills = drills("");
    let (site, server) = (&drills.site, &drills.server);
    let _ = sql(server, "create table t as select generate_series(1, 1000) n");
    let _ = site.backup("local");
    let _ = switch_and_archive(server);
    let check = |what: &str| format!("[[cluster.main.drill.check]]\nname = \"own\"\ndatabase = \"postgres\"\n{what}");
    let eats = "select length(string_agg(repeat('x', 1000000), '')) > 0 from generate_series(1, 900)";
    drills.configure(&format!(
        "memory = \"160MiB\"\nsettings = {{ shared_buffers = \"16MB\" }}\n{}",
        check(&format!("sql = \"{eats}\""))
    ));
    let ran = drills.verify(&[]).expect(4);
    let failed = named(&ran.json(), "failed");
    assert!(failed.values().any(|message| message.contains("memory")), "{failed:?}");
    assert!(failed.contains_key("user:own:postgres"), "{failed:?}");
    assert_nothing_left(&drills);

    let folder = site.path("drills");
    drills.configure(&check(&format!("command = [\"pkill\", \"-9\", \"-f\", \"postgres.*{}\"]", folder.display())));
    let failed = named(&drills.verify(&[]).expect(4).json(), "failed");
    assert!(failed.contains_key("shutdown") || failed.contains_key("user:own:postgres"), "{failed:?}");
    assert_nothing_left(&drills);
    // Too little even to begin.
    drills.configure("memory = \"100MiB\"");
    drills.verify(&[]).expect(2).says("allow it");
    drills.configure("");
    drills.verify(&["--image", "localhost/pgvault-missing:1"]).expect(1).says("build-image");
    assert_nothing_left(&drills);
}

/// A drill that was killed leaves a container, until the next one begins.
#[test]
fn the_container_of_a_drill_that_was_killed_goes_with_the_next() {
    let drills = drills("");
    let (site, server) = (&drills.site, &drills.server);
    let _ = sql(server, "create table t as select generate_series(1, 1000) n");
    let _ = site.backup("local");
    let _ = switch_and_archive(server);
    let marker = site.path("here");
    let script = format!("touch {}; exec sleep 300", marker.display());
    drills.configure(&format!(
        "[[cluster.main.drill.check]]\nname = \"own\"\ndatabase = \"postgres\"\ncommand = [\"sh\", \"-c\", \"{script}\"]"
    ));
    let begin = || {
        let _ = fs::remove_file(&marker);
        let running = Running::new(drills.command(&["verify"]).spawn().unwrap());
        wait_until("the drill is at its last check", Duration::from_secs(120), || marker.exists());
        assert_eq!(containers(&drills).len(), 1);
        running
    };
    assert_eq!(begin().terminate(), Some(1));
    wait_until("the container is gone", Duration::from_secs(20), || containers(&drills).is_empty());
    assert_nothing_left(&drills);

    begin().kill9();
    assert_eq!(containers(&drills).len(), 1);
    drills.configure("");
    let drill = drills.verify(&[]).expect(0).json();
    assert!(named(&drill, "warned").contains_key("leftovers"), "{drill:#}");
    assert_nothing_left(&drills);
    let mut ended = Command::new("pkill");
    let _ = ended.args(["-f", &script]).status();
}
