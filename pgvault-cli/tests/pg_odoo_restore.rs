//! Restores of Odoo: as production, as a harmless copy, one database of a cluster into another server; and what is refused.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::time::Duration;

use common::odoo::{Shop, UUID, assert_same_dump, databases, dump, in_database};
use common::{Running, run, sql, wait_until};
use pgvault_verify::process::Outcome;
use pgvault_verify::side::is_sealed;
use serde_json::Value;

/// One database of the cluster, under another name, in another server: harmless, and production is what it was.
#[test]
fn one_database_of_a_cluster_is_restored_into_another_server_and_is_harmless_there() {
    let shop = Shop::new();
    let before = dump(shop.production(), "shop");
    let there = databases(shop.production());
    let modules = shop.site().write(
        "modules.sql",
        "BEGIN;\n-- a module's own\nUPDATE sale_order SET customer = 'nobody' WHERE id = 1;\nUPDATE ir_cron SET active = false WHERE id > 1;\nCOMMIT;\n",
    );
    let ran = shop.restore_database("shop", &["--as", "shop test's", "--neutralise-sql", modules.to_str().unwrap()]).ok();
    let json = ran.json();
    let odoo = &json["odoo"][0];
    assert_eq!((odoo["database"].as_str(), odoo["neutralised"].as_bool()), (Some("shop"), Some(true)), "{json:#}");
    assert_eq!(odoo["uuid_before"], UUID);
    for (kind, live, disabled) in [
        ("crons", 2, 2),
        ("mail_servers", 1, 2),
        ("fetchmail_servers", 1, 1),
        ("webhooks", 1, 1),
        ("payment_providers", 1, 1),
        ("pos_terminals", 1, 1),
    ] {
        let found = &odoo["found"][kind];
        assert_eq!((found["live"].as_u64(), found["disabled"].as_u64()), (Some(live), Some(disabled)), "{kind}: {odoo:#}");
    }
    assert_eq!(odoo["module_statements"], 2);
    assert!(json["reached"]["lsn"].is_string() && json["reached"]["timeline"] == 1, "{json:#}");
    assert_eq!(json["into"], "shop test's");

    let copy = |text: &str| in_database(&shop.other, "shop test's", text);
    assert_eq!(copy("select value from ir_config_parameter where key = 'database.is_neutralized'"), "true");
    assert_eq!(copy("select value from ir_config_parameter where key = 'database.uuid'"), odoo["uuid"].as_str().unwrap());
    assert_ne!(odoo["uuid"], UUID);
    assert_eq!(copy("select count(*) from sale_order"), "500");
    assert_eq!(copy("select customer from sale_order where id = 1"), "nobody");
    assert_eq!(copy("select count(*) from ir_mail_server where active and smtp_host <> 'invalid'"), "0");
    assert_eq!(copy("select id from ir_cron where active"), "1");

    assert_same_dump(&dump(shop.production(), "shop"), &before);
    assert_eq!(databases(shop.production()), there);
    shop.assert_nothing_left();

    // The folder that was named stays, and is nobody's server.
    let folder = shop.fresh("side");
    let ran = shop.restore_database("shop", &["--as", "named", "--pgdata", folder.to_str().unwrap()]);
    ran.ok();
    assert!(is_sealed(&folder).unwrap());
    // What is not one of Odoo's is taken as it is, and what is not there is said.
    let _ = in_database(shop.production(), "postgres", "create table plain(i int); insert into plain values (7)");
    shop.archive();
    let json = shop.restore_database("postgres", &["--as", "plain"]).ok().json();
    assert_eq!(json["odoo"].as_array().unwrap().len(), 0);
    assert_eq!(in_database(&shop.other, "plain", "select i from plain"), "7");
    shop.restore_database("shops", &[]).expect(1).says("no database `shops`").says("shop");
    shop.assert_nothing_left();
}

/// As production, nothing is somebody else's afterwards: not a row differs.
#[test]
fn as_production_changes_no_row() {
    let shop = Shop::new();
    let _ = shop.sql("insert into sale_order(customer, amount) values ('the last one', 1)");
    shop.archive();
    let production = dump(shop.production(), "shop");
    let json = shop.restore_database("shop", &["--as-production"]).ok().json();
    assert_eq!((&json["odoo"][0]["neutralised"], &json["odoo"][0]["uuid"]), (&Value::Bool(false), &Value::from(UUID)));
    assert_same_dump(&dump(&shop.other, "shop"), &production);
    shop.assert_nothing_left();

    // The whole cluster: left in recovery, and its owner's start brings it up as it was. Rows without documents need no vault of them.
    let (pgdata, files) = (shop.fresh("production"), shop.fresh("files"));
    let arguments = ["--pgdata", pgdata.to_str().unwrap(), "--filestore", files.to_str().unwrap(), "--as-production"];
    let json = shop.json(&[&["restore", "--to", "latest"], &arguments[..]].concat()).ok().json();
    assert_eq!((&json["as_production"], &json["files"][0]["unknown"]), (&Value::Bool(true), &Value::from(0)), "{json:#}");
    assert!(pgdata.join("recovery.signal").exists() && !is_sealed(&pgdata).unwrap());
    let settings = fs::read_to_string(pgdata.join("postgresql.auto.conf")).unwrap();
    assert!(!settings.contains("archive_mode") && settings.contains("recovery_target_action = 'promote'"), "{settings}");
    let reached = json["reached"]["lsn"].as_str().unwrap().to_owned();
    // What is archived meanwhile belongs to a later moment than the documents.
    let _ = shop.sql("insert into sale_order(customer, amount) values ('too late', 1)");
    shop.archive();
    let (server, outcome) = shop.site().recover(&pgdata);
    assert_eq!(outcome, Outcome::Promoted);
    assert_same_dump(&dump(&server, "shop"), &production);
    // The new timeline begins where the documents were fetched.
    let history = fs::read_to_string(pgdata.join("pg_wal/00000002.history")).unwrap();
    assert!(history.contains(&format!("1\t{reached}\t")), "{reached}: {history}");
}

/// The whole cluster as a copy: every database of Odoo in it is harmless, and it does not archive beside production.
#[test]
fn a_copy_of_the_cluster_is_harmless_before_anybody_can_start_it() {
    let shop = Shop::new();
    // Another shop, of an older version, and called as badly as it may be.
    let hostile = "o'd \"shop\" = ü";
    let _ = sql(shop.production(), &format!("create database \"{}\"", hostile.replace('"', "\"\"")));
    let _ = in_database(shop.production(), hostile, common::odoo::OLD_SHOP);
    shop.archive();
    let modules = shop.site().write("modules.sql", "UPDATE ir_module_module SET latest_version = 'was here';");
    let files = shop.fresh("files");
    let plain = ["--filestore", files.to_str().unwrap(), "--neutralise-sql"];
    let pgdata = shop.fresh("copy");
    let first = ["restore", "--to", "latest", "--pgdata", pgdata.to_str().unwrap()];
    shop.json(&[&first, &plain[..], &[modules.to_str().unwrap()]].concat()).expect(2).says("does not say for which");
    assert!(is_sealed(&pgdata).unwrap());

    let pgdata = shop.fresh("copy");
    let given = format!("{hostile}={}", modules.display());
    let first = ["restore", "--to", "latest", "--pgdata", pgdata.to_str().unwrap()];
    let json = shop.json_as_tester(&[&first, &plain[..], &[&given]].concat()).ok().json();
    let names: Vec<&str> = json["odoo"].as_array().unwrap().iter().map(|odoo| odoo["database"].as_str().unwrap()).collect();
    assert_eq!(names, [hostile, "shop"]);
    assert_eq!((&json["odoo"][0]["module_statements"], &json["odoo"][1]["module_statements"]), (&Value::from(1), &Value::from(0)));
    assert_eq!(json["odoo"][0]["found"]["payment_acquirers"]["disabled"], 1);
    assert_eq!(json["odoo"][1]["neutralised"], true);
    assert!(json["warnings"][0].as_str().unwrap().contains("s3://"), "{json:#}");
    assert_eq!(json["odoo"][0]["neutralised"], true);
    let owner = shop.site().account.uid();
    for name in [".", "base", "PG_VERSION", "postgresql.auto.conf", "global/pg_control"] {
        assert_eq!(fs::metadata(pgdata.join(name)).unwrap().uid(), owner, "{name}");
    }
    assert!(!is_sealed(&pgdata).unwrap() && !pgdata.join("recovery.signal").exists());
    let mut server = shop.site().launch(&pgdata);
    assert_eq!(server.wait_until_paused_or_promoted(Duration::from_secs(60)).unwrap(), Outcome::Promoted);
    assert_eq!(in_database(&server, "shop", "select value from ir_config_parameter where key = 'database.is_neutralized'"), "true");
    assert_eq!(in_database(&server, hostile, "select count(*) from ir_cron where active"), "1");
    assert_eq!(in_database(&server, hostile, "select distinct latest_version from ir_module_module"), "was here");
    let settings = fs::read_to_string(pgdata.join("postgresql.auto.conf")).unwrap();
    assert!(settings.contains("archive_mode = 'off'"), "{settings}");
    drop(server);

    // Documents that were never captured cannot be fetched; what was restored so far is nobody's server.
    let _ = shop.sql("insert into ir_attachment(name, type, store_fname, checksum, file_size) values ('a', 'binary', '3f/3f786850e387550fdab836ed7e6dc881de23001b', '3f786850e387550fdab836ed7e6dc881de23001b', 2)");
    shop.archive();
    let (pgdata, files) = (shop.fresh("copy"), shop.fresh("files"));
    let arguments = ["restore", "--to", "latest", "--pgdata", pgdata.to_str().unwrap(), "--filestore", files.to_str().unwrap()];
    shop.json(&arguments).expect(1).says("filestore.none_captured");
    assert!(is_sealed(&pgdata).unwrap());
}

/// While the copy still is production's twin, nobody gets in; and when the restore is told to stop just then, nobody ever will.
#[test]
fn nothing_can_connect_to_a_copy_before_its_assertions_have_passed() {
    let shop = Shop::new();
    let modules = shop.site().write("modules.sql", "UPDATE ir_cron SET active = true;\nSELECT pg_sleep(300);\n");
    let (pgdata, files) = (shop.fresh("copy"), shop.fresh("files"));
    let mut command =
        shop.site().pgvault(&["restore", "--to", "latest", "--neutralise-sql", modules.to_str().unwrap(), "--pgdata"]);
    let _ = command.arg(&pgdata).arg("--filestore").arg(&files);
    let restoring = Running::new(command.spawn().unwrap());
    // Open for writing, with everything live that its modules have switched on again.
    let postmaster = || fs::read_to_string(pgdata.join("postmaster.pid")).unwrap_or_default();
    wait_until("the copy is promoted and being neutralised", Duration::from_secs(120), || {
        !pgdata.join("recovery.signal").exists() && postmaster().lines().nth(7).is_some_and(|state| state.trim() == "ready")
    });
    assert!(is_sealed(&pgdata).unwrap());
    let known = postmaster();
    let line = |number: usize| known.lines().nth(number).unwrap_or_default().trim();
    let (pid, port, sockets, address) = (line(0), line(3), line(4), line(5));
    assert_eq!(address, "", "it listens on no address: {known}");
    assert_eq!(fs::metadata(sockets).unwrap().mode() & 0o777, 0o700, "{sockets}");
    assert!(std::net::TcpStream::connect(("127.0.0.1", port.parse().unwrap())).is_err());
    let process = Path::new("/proc").join(pid);
    assert!(process.exists());

    assert_eq!(restoring.terminate(), Some(1));
    wait_until("its server is gone", Duration::from_secs(20), || !process.exists());
    assert!(is_sealed(&pgdata).unwrap() && !pgdata.join("postmaster.opts").exists());
    let mut postgres = shop.site().command(shop.site().install.program("postgres").unwrap());
    let _ = postgres.arg("-D").arg(&pgdata);
    run(postgres).expect(1).says("no socket created for listening");
    shop.assert_nothing_left();
}

/// A custom module brings a mail server of its own and no way to switch it off: the copy is not given to anybody.
#[test]
fn a_custom_modules_live_mail_server_fails_the_copy() {
    let shop = Shop::new();
    let _ = shop.sql(
        "create function keep() returns trigger language plpgsql as $$ begin new.active := true; new.smtp_host := old.smtp_host; return new; end $$;
         create trigger keep before update on ir_mail_server for each row when (old.name = 'Orders') execute function keep()",
    );
    shop.archive();
    let ran = shop.restore_database("shop", &["--as", "copy"]).expect(4).says("mail_servers are live").says("neutralise.live");
    assert_eq!(ran.json()["error"]["exit_code"], 4);
    assert!(!databases(&shop.other).contains("copy"), "{}", databases(&shop.other));
    shop.assert_nothing_left();
    // The whole cluster stays sealed.
    let (pgdata, files) = (shop.fresh("copy"), shop.fresh("files"));
    let arguments = ["restore", "--to", "latest", "--pgdata", pgdata.to_str().unwrap(), "--filestore", files.to_str().unwrap()];
    shop.json(&arguments).expect(4).says("stays sealed");
    assert!(is_sealed(&pgdata).unwrap());
    let mut postgres = shop.site().command(shop.site().install.program("postgres").unwrap());
    let _ = postgres.arg("-D").arg(&pgdata);
    run(postgres).expect(1).says("no socket created for listening");
    // Statements that fail are named, and the database is not made.
    let modules = shop.site().write("modules.sql", "UPDATE ir_cron SET active = false;\nUPDATE nowhere SET a = 1;\n");
    let more = ["--as", "copy", "--neutralize-sql", modules.to_str().unwrap()];
    shop.restore_database("shop", &more).expect(1).says("line 2").says("UPDATE nowhere SET a = 1");
    assert!(!databases(&shop.other).contains("copy"));
    shop.assert_nothing_left();
}

/// Same name, same server or same files: both would be production's end, and both are refused before anything is restored.
#[test]
fn a6_a_copy_with_the_same_name_beside_production_is_refused() {
    let shop = Shop::new();
    let into = shop.production().conninfo();
    let one = |more: &[&str]| shop.json(&[&["restore", "--to", "latest", "--database", "shop", "--into", &into], more].concat());
    one(&[]).expect(2).says("already has a database `shop`").says("--as NEWNAME");
    one(&["--as", "postgres"]).expect(2).says("already has a database `postgres`");
    assert_eq!(shop.sql("select count(*) from sale_order"), "500");
    // Beside it, under another name, it is welcome.
    one(&["--as", "shop_copy"]).ok();
    assert_eq!(in_database(shop.production(), "shop_copy", "select count(*) from ir_cron where active"), "1");
    assert_eq!(shop.sql("select count(*) from ir_cron where active"), "3");

    let data = shop.site().directory("odoo");
    let live = data.join("filestore/shop/3f");
    fs::create_dir_all(&live).unwrap();
    fs::write(live.join("3fdoc"), "document").unwrap();
    shop.data_dir(&data);
    let refused = |files: &Path, how: &str| {
        let pgdata = shop.fresh("copy");
        let arguments = ["restore", "--to", "latest", "--pgdata", pgdata.to_str().unwrap(), "--filestore", files.to_str().unwrap()];
        shop.json(&arguments).expect(2).says("filestore.same_place").says(how);
        assert!(!pgdata.exists(), "refused before anything is written");
    };
    refused(&data.join("filestore"), "is ");
    refused(&data.join("filestore/shop"), "lies in");
    refused(&data.join("filestore/../filestore/shop"), "lies in");
    refused(&data, "contains");
    symlink(data.join("filestore"), shop.site().path("link")).unwrap();
    refused(&shop.site().path("link/shop"), "lies in");
    let twin = shop.site().directory("twin");
    fs::hard_link(live.join("3fdoc"), twin.join("3fdoc")).unwrap();
    refused(&twin, "shares");
    assert_eq!(fs::read_to_string(live.join("3fdoc")).unwrap(), "document");
}

/// A moment inside an upgrade shows half-done modules: this is said, with the restore point that was set before.
#[test]
fn a7_a_target_inside_an_upgrade_is_noticed_and_the_mark_before_offered() {
    let shop = Shop::new();
    let mark = |name: &str| sql(shop.production(), &format!("select pg_create_restore_point('{name}')"));
    let _ = mark("last year");
    let _ = mark("before the upgrade");
    let _ = shop.sql("update ir_module_module set state = 'to upgrade' where name in ('sale', 'custom_shop')");
    let _ = shop.sql("update ir_module_module set state = 'installed' where name = 'sale'");
    let _ = mark("in the middle");
    let _ = shop.sql("update ir_module_module set state = 'installed'");
    let _ = mark("after");
    let _ = shop.sql("insert into sale_order(customer) values ('later')");
    shop.archive();

    let ran = shop.restore_database("shop", &["--as", "middle", "--to-name", "in the middle"]).ok();
    let json = ran.json();
    assert!(
        ran.stderr.contains("lies within a module upgrade of `shop`: 1 of its modules are half done, custom_shop (to upgrade)"),
        "{ran:?}"
    );
    assert!(ran.stderr.contains("`before the upgrade`") && ran.stderr.contains("--to name:before the upgrade"), "{ran:?}");
    assert_eq!(json["mark_before"]["name"], "before the upgrade");
    assert_eq!(json["odoo"][0]["half_upgraded"][0]["name"], "custom_shop");
    assert_eq!(json["warnings"].as_array().unwrap().len(), 1);
    // What was offered is what was meant, and leads to no warning.
    let offered = json["mark_before"]["target"].as_str().unwrap();
    let ran = shop.restore_database("shop", &["--as", "before", "--to", offered]).ok();
    assert!(!ran.stderr.contains("upgrade"), "{ran:?}");
    assert_eq!(ran.json()["mark_before"], Value::Null);
    assert_eq!(in_database(&shop.other, "before", "select count(*) from ir_module_module where state = 'to upgrade'"), "0");

    // A name that was given again later leads there; the mark is then offered by its position.
    let _ = mark("before the upgrade");
    shop.archive();
    let again = shop.restore_database("shop", &["--as", "again", "--to-name", "in the middle"]).ok().json();
    assert_eq!(again["mark_before"]["name"], "before the upgrade");
    let target = again["mark_before"]["target"].as_str().unwrap();
    assert_eq!(target, format!("lsn:{}", json["mark_before"]["lsn"].as_str().unwrap()));
    let json = shop.restore_database("shop", &["--as", "by_position", "--to", target]).ok().json();
    assert_eq!(json["mark_before"], Value::Null);
    shop.assert_nothing_left();
}

#[test]
fn options_that_mean_nothing_together_are_refused() {
    let shop = Shop::new();
    let pgdata = shop.fresh("x");
    let pgdata = pgdata.to_str().unwrap();
    for (arguments, said) in [
        (vec!["--pgdata", pgdata], "--to"),
        (vec!["--pgdata", pgdata, "--to", "latest", "--to-name", "x"], "cannot be used with"),
        (vec!["--to", "latest"], "--pgdata"),
        (vec!["--to", "latest", "--pgdata", pgdata, "--as-production"], "--as-production and --neutralise-sql need"),
        (vec!["--to", "latest", "--database", "shop"], "--into"),
        (vec!["--to", "latest", "--pgdata", pgdata, "--into", "host=x"], "--database"),
        (vec!["--to", "latest", "--pgdata", pgdata, "--allow-missing-files"], "--filestore"),
        (
            vec!["--to", "latest", "--database", "shop", "--into", "host=x", "--as-production", "--neutralise-sql", "x"],
            "cannot be used with",
        ),
    ] {
        shop.json(&[&["restore"], &arguments[..]].concat()).expect(2).says(said);
    }
    // Statements for a database that is not there.
    let modules = shop.site().write("modules.sql", "SELECT 1");
    let given = format!("ship={}", modules.display());
    shop.restore_database("shop", &["--neutralise-sql", &given]).expect(2).says("`ship`");
    assert!(!databases(&shop.other).contains("shop"));
    assert!(!Path::new(pgdata).exists());
    shop.assert_nothing_left();
}
