//! WAL into the vault and out of it, on real servers: nothing lost, nothing mixed up, and no server led astray.

#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{Ran, Running, Site, client, lsn, run, sql, switch_and_archive, wait_until};
use pgvault_core::postgres::Lsn;
use pgvault_verify::process::{Mode, Outcome, Server};

const MIB16: u64 = 16 << 20;

/// Fills segments and gives the names of those that are complete.
fn fill_segments(server: &Server, count: u64) -> Vec<String> {
    let _ = sql(server, "create table if not exists filler(id serial, pad text)");
    let first = sql(server, "select pg_walfile_name(pg_current_wal_lsn())");
    for _ in 0..count {
        let _ = sql(server, "insert into filler(pad) select md5(g::text) from generate_series(1, 200) g; select pg_switch_wal()");
    }
    let first = common::segment_number(&first, MIB16).unwrap();
    (first..first + count).map(|n| format!("00000001{:08X}{:08X}", n / 256, n % 256)).collect()
}

fn push(site: &Site, path: &Path) -> Ran {
    site.pgv(&["--output", "json", "wal", "push", path.to_str().unwrap()])
}

fn fetch(site: &Site, name: &str) -> (Ran, PathBuf) {
    let destination = site.fresh("fetched");
    let ran = site.pgv(&["wal", "fetch", name, destination.to_str().unwrap()]);
    let none_half = !destination.with_extension("pgvault-tmp").exists();
    assert!(none_half, "{} left half a file", ran.line);
    assert_eq!(ran.code == Some(0), destination.exists(), "{}", ran.line);
    (ran, destination)
}

#[test]
fn r11_push_and_fetch_keep_their_contracts() {
    let site = Site::new();
    let server = site.start(site.cluster("main"));
    let names = fill_segments(&server, 5);
    let wal = |name: &str| server.pgdata().join("pg_wal").join(name);
    let offered = site.directory("offered");
    let offer = |name: &str, bytes: &[u8]| site.write(&format!("offered/{name}"), bytes);

    // R11: the same bytes twice are fine, other bytes under the same name are not, and what is stored stays.
    let bytes = fs::read(wal(&names[0])).unwrap();
    assert_eq!(push(&site, &wal(&names[0])).ok().json()["already_there"], false);
    assert_eq!(push(&site, &wal(&names[0])).ok().json()["already_there"], true);
    let mut other = bytes.clone();
    *other.last_mut().unwrap() ^= 1;
    let _ = push(&site, &offer(&names[0], &other)).expect(1).says("different contents");
    let (ran, fetched) = fetch(&site, &names[0]);
    let _ = ran.ok();
    assert!(fs::read(fetched).unwrap() == bytes);

    // T6: a truncated segment, an empty one, one under another's name: refused, and no object appears.
    let before = site.wal_objects(1);
    let whole = fs::read(wal(&names[1])).unwrap();
    for bad in [&whole[..whole.len() - 8192], &whole[..4096], &[][..]] {
        assert_ne!(push(&site, &offer(&names[1], bad)).code, Some(0));
    }
    assert_ne!(push(&site, &offer(&names[2], &whole)).code, Some(0), "a segment under another's name");
    for odd in ["foo", "00000001000000000000000G", "000000010000000000000001.gz", "xlogtemp.123", "0000000100000000000000019"] {
        let _ = push(&site, &offer(odd, &whole)).expect(2);
    }
    assert_ne!(push(&site, &offered.join(&names[3])).code, Some(0), "a file that is not there");
    assert_eq!(site.wal_objects(1), before);

    // Another cluster's segment has a name like one of ours.
    let foreign = site.cluster("foreign").create().unwrap();
    let segment = foreign.pgdata().join("pg_wal/000000010000000000000001");
    let _ = push(&site, &segment).expect(1).says("system identifier");
    assert_eq!(site.wal_objects(1), before);

    // What else PostgreSQL archives.
    for (name, bytes) in [
        (format!("{}.partial", names[1]), whole.as_slice()),
        (format!("{}.00000028.backup", names[1]), b"START WAL LOCATION: 0/2000028\n".as_slice()),
        ("00000007.history".to_owned(), b"1\t0/3000000\tno recovery target specified\n".as_slice()),
    ] {
        let path = offer(&name, bytes);
        assert_eq!(push(&site, &path).ok().json()["already_there"], false, "{name}");
        assert_eq!(push(&site, &path).ok().json()["already_there"], true, "{name}");
        let (ran, fetched) = fetch(&site, &name);
        let _ = ran.ok();
        assert!(fs::read(fetched).unwrap() == bytes, "{name}");
    }
    let _ = push(&site, &offer("00000007.history", b"1\t0/4000000\tno recovery target specified\n")).expect(1);
    site.vaults.remove_folder_of(&site.vaults.object("00000007.history"));

    killed_pushes(&site, &server, &names[1]);
    for name in &names[2..4] {
        let _ = push(&site, &wal(name)).ok();
    }
    fetches(&site, &names);
}

/// T6: a push that is killed leaves either nothing that counts, or all of it.
fn killed_pushes(site: &Site, server: &Server, name: &str) {
    let path = server.pgdata().join("pg_wal").join(name);
    let mut unfinished = 0;
    for round in 0..10u64 {
        let mut child = Running::new(site.pgvault(&["wal", "push", path.to_str().unwrap()]).spawn().unwrap());
        // No condition to wait for: a kill may come at any time.
        std::thread::sleep(Duration::from_millis(40 + 30 * round));
        if child.is_running() {
            child.kill9();
        }
        if site.wal_objects(1).contains(&format!("{name}.wal")) {
            break;
        }
        unfinished += 1;
        let _ = site.pgv(&["check", "--sizes-only"]).ok();
    }
    assert!(unfinished > 0, "no push was cut off");
    let _ = push(site, &path).ok();
    let (ran, fetched) = fetch(site, name);
    let _ = ran.ok();
    assert!(fs::read(fetched).unwrap() == fs::read(&path).unwrap());
    let _ = site.pgv(&["check"]).ok();
}

/// 0 for what is there, 1 for what is proven not to be, 255 for all else.
fn fetches(site: &Site, names: &[String]) {
    let code = |name: &str| fetch(site, name).0.code;
    assert_eq!(code(&names[3]), Some(0));
    assert_eq!(code(&names[4]), Some(1), "past the end");
    assert_eq!(code("00000001000000FF00000001"), Some(1), "far past the end");
    assert_eq!(code("00000002.history"), Some(1), "no such timeline");
    assert_eq!(code("00000001.history"), Some(1), "timeline 1 never has one");

    // A gap.
    let object = site.vaults.object(&format!("{}.wal", names[2]));
    let hidden = site.vaults.take(&object);
    let (ran, _) = fetch(site, &names[2]);
    let _ = ran.expect(255).says("gap");
    site.vaults.replace(&object, hidden.clone());
    assert_eq!(code(&names[2]), Some(0));

    // A changed object, wherever.
    let size = hidden.len();
    let right = fs::read(fetch(site, &names[2]).1).unwrap();
    for at in [3, 70, size / 2, size - 200, size - 3] {
        site.vaults.flip(&object, at);
        let (ran, fetched) = fetch(site, &names[2]);
        if at == size - 3 && ran.code == Some(0) {
            // The hash of the object, which is there for those without a key: what it guards was authenticated.
            assert!(fs::read(fetched).unwrap() == right);
        } else {
            let _ = ran.expect(255);
        }
        let _ = site.pgv(&["scrub"]).expect(4);
        site.vaults.flip(&object, at);
    }
    let _ = site.pgv(&["scrub"]).ok();
    // Cut off, and another segment's object under this name.
    let another = site.vaults.read(&site.vaults.object(&format!("{}.wal", names[3])));
    for bad in [hidden.slice(..size - 1), hidden.slice(..0), another] {
        site.vaults.replace(&object, bad);
        let (ran, _) = fetch(site, &names[2]);
        let _ = ran.expect(255);
    }
    site.vaults.replace(&object, hidden);
    assert_eq!(code(&names[2]), Some(0));

    // No vault there, another passphrase, no configuration, a destination that cannot be written.
    site.vaults.set_away(true);
    // At once, because it is patient with a store that is away.
    std::thread::scope(|scope| {
        for name in [&names[2], "00000002.history"] {
            let _ = scope.spawn(|| fetch(site, name).0.expect(255));
        }
    });
    site.vaults.set_away(false);
    let _ = site.write("passphrase", "another one\n");
    let _ = fetch(site, &names[2]).0.expect(255).says("key");
    fs::remove_file(site.path("passphrase")).unwrap();
    let _ = fetch(site, &names[2]).0.expect(255);
    let passphrase = site.write("passphrase", "correct horse battery staple\n");
    fs::set_permissions(passphrase, fs::Permissions::from_mode(0o600)).unwrap();
    let _ = site.pgv(&["wal", "fetch", &names[2], "/nowhere/at/all"]).expect(255);

    // Wrong arguments, in every order that the program understands.
    for arguments in [
        &["wal", "fetch"][..],
        &["wal", "fetch", &names[2]],
        &["wal", "fetch", &names[2], "a", "b"],
        &["wal", "fetch", "--no-such-flag", &names[2], "a"],
        &["wal", "fetch", "foo", "a"],
        &["wal", "fetch", "--cluster", "other", &names[2], "a"],
        &["wal", "fetch", "--system-id", "1", &names[2], "a"],
        &["wal", "--output", "json", "fetch", "foo", "a"],
        &["wal", "--output", "json", "fetch"],
        &["--output", "json", "wal", "--log-format=json", "fetch", "foo", "a"],
    ] {
        let _ = site.pgv(arguments).expect(255);
    }
    let mut hostile = site.pgvault(&["wal", "fetch", &names[2]]);
    hostile.arg(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"/nowhere/\xFF"));
    let _ = run(hostile).expect(255);
    let mut without = site.command(site.path("pgvault"));
    without.args(["--config", "/no/such/file", "wal", "fetch", &names[2], "a"]);
    let _ = run(without).expect(255);
    let _ = site.pgv(&["wal", "fetch", "--help"]).ok();
    assert_eq!(code(&names[2]), Some(0));
}

/// R7, H4: a server in recovery that cannot get its WAL stops; it never takes trouble for the end of the archive.
#[test]
fn r7_h4_a_server_in_recovery_stops_and_does_not_promote_when_the_vault_is_in_trouble() {
    let site = Site::new();
    let server = site.start(site.cluster("main").config(site.archiving()));
    let _ = sql(&server, "create table t(id int)");
    let _ = site.backup("local");
    let mut names = Vec::new();
    for id in 0..4 {
        let _ = sql(&server, &format!("insert into t values ({id})"));
        names.push(switch_and_archive(&server));
    }
    drop(server);
    let pgdata = site.restore("latest", &[]);
    let control = |pgdata: &Path| {
        let mut command = std::process::Command::new(site.install.program("pg_controldata").unwrap());
        command.env("LC_ALL", "C").arg(pgdata);
        let text = run(command).stdout;
        let line = text.lines().find(|line| line.starts_with("Latest checkpoint's TimeLineID")).unwrap().to_owned();
        line.rsplit(' ').next().unwrap().to_owned()
    };
    let refuses = |pgdata: &Path, what: &str| {
        let mut server = site.launch(pgdata);
        // `wal fetch` is patient with a store that is away.
        let outcome = server.wait_until_paused_or_promoted(Duration::from_secs(180));
        assert!(matches!(outcome, Err(pgvault_verify::process::Error::Ended { .. })), "{what}: {outcome:?}");
        assert!(server.log_tail().contains("exit code 255") || format!("{outcome:?}").contains("255"), "{what}: {outcome:?}");
        drop(server);
        assert_eq!(control(pgdata), "1", "{what}");
        assert!(pgdata.join("recovery.signal").exists(), "{what}");
    };
    let object = site.vaults.object(&format!("{}.wal", names[2]));
    let hidden = site.path("hidden");

    let middle = site.vaults.read(&object).len() / 2;
    site.vaults.flip(&object, middle);
    refuses(&pgdata, "a corrupt segment in the middle");
    site.vaults.flip(&object, middle);
    let taken = site.vaults.take(&object);
    refuses(&pgdata, "a gap");
    site.vaults.replace(&object, taken.clone());
    site.vaults.set_away(true);
    refuses(&pgdata, "no vault");
    site.vaults.set_away(false);
    fs::rename(site.path("passphrase"), &hidden).unwrap();
    refuses(&pgdata, "no key");
    fs::rename(&hidden, site.path("passphrase")).unwrap();

    // The same directory, once the trouble is over: everything.
    let (recovered, outcome) = site.recover(&pgdata);
    assert_eq!(outcome, Outcome::Promoted);
    assert_eq!(sql(&recovered, "select string_agg(id::text, ' ' order by id) from t"), "0 1 2 3");
    drop(recovered);

    // Asked beforehand, the plan says so instead of letting the server find out.
    let _ = site.vaults.take(&object);
    let _ = site.restore_into(&site.path("refused"), "latest", &[]).expect(5).says("gap");
    assert!(!site.path("refused").exists());
    site.vaults.replace(&object, taken);
}

/// The position that the server believes to be safe, and then how far the vault reaches.
fn acknowledged(site: &Site, server: &Server, timeline: u32) -> (Lsn, Lsn) {
    let text = sql(
        server,
        "select greatest((select max(restart_lsn) from pg_replication_slots where not temporary), \
         (select max(flush_lsn) from pg_stat_replication where application_name not like 'pgvault_backup%'))",
    );
    (text.parse().unwrap_or_default(), site.vault_end(timeline, MIB16).unwrap_or_default())
}

fn wait_for_vault(site: &Site, timeline: u32, to: Lsn) {
    wait_until(&format!("the vault reaches {to}"), Duration::from_secs(60), || {
        site.vault_end(timeline, MIB16).is_some_and(|end| end >= to)
    });
}

fn slot_is_active(server: &Server) -> bool {
    sql(server, "select count(*) from pg_replication_slots where active and not temporary") == "1"
}

#[test]
fn stream_acknowledges_only_what_is_stored_and_lets_the_server_stop() {
    let site = Site::new();
    let mut server = site.start(site.cluster("main"));
    let _ = sql(&server, "create table t(id bigserial primary key, pad text); create extension amcheck");
    let stream = site.stream();
    wait_until("the slot is made", Duration::from_secs(20), || slot_is_active(&server));
    // R4: the slot keeps WAL from its first moment, not from the first acknowledgement.
    assert_eq!(sql(&server, "select restart_lsn is not null and wal_status = 'reserved' from pg_replication_slots"), "t");
    let _ = site.backup("remote");

    // R2: whatever the moment, the server was told of nothing that is not stored.
    let script =
        site.write("writer.sql", "insert into t(pad) select repeat(md5(random()::text), 40) from generate_series(1, 20);\n");
    let load =
        client(&server, "pgbench", &["-n", "-c", "4", "-R", "200", "-T", "3600", "-f", script.to_str().unwrap(), "postgres"]);
    let start = lsn(&server, "pg_current_wal_lsn()");
    let (mut looks, mut moved, mut before) = (0, 0, Lsn::INVALID);
    wait_until("some segments were streamed", Duration::from_secs(120), || {
        let (told, stored) = acknowledged(&site, &server, 1);
        assert!(told <= stored, "the server was told {told}, the vault has {stored}");
        looks += 1;
        moved += i32::from(told > before);
        before = told;
        lsn(&server, "pg_current_wal_lsn()").0 > start.0 + 3 * MIB16
    });
    assert!(looks >= 4 && moved >= 2, "{looks} looks, moved {moved} times");

    // R2, R3: killed in the middle of it, the next one goes on without a hole.
    stream.kill9();
    let (told, stored) = acknowledged(&site, &server, 1);
    assert!(told <= stored, "{told} > {stored}");
    let at = lsn(&server, "pg_current_wal_lsn()");
    wait_until("the load went on without a stream", Duration::from_secs(60), || {
        lsn(&server, "pg_current_wal_lsn()").0 > at.0 + MIB16
    });
    let stream = site.stream();
    wait_until("streaming goes on", Duration::from_secs(30), || slot_is_active(&server));
    drop(load);

    // R1: a fast stop with the stream attached takes no time, and loses nothing.
    let began = Instant::now();
    server.stop(Mode::Fast).unwrap();
    let took = began.elapsed();
    assert!(took < Duration::from_secs(5), "the stop took {took:?}");
    server.start().unwrap();
    let rows = sql(&server, "select count(*) || ' ' || max(id) from t");
    wait_until("the stream is back", Duration::from_secs(30), || slot_is_active(&server));
    let _ = sql(&server, "select pg_switch_wal()");
    wait_for_vault(&site, 1, lsn(&server, "pg_current_wal_flush_lsn()").min_segment());

    // R3: every whole segment is byte for byte what the server wrote.
    let mut compared = 0;
    for name in site.wal_objects(1).iter().filter_map(|name| name.strip_suffix(".wal")) {
        let (ran, fetched) = fetch(&site, name);
        let _ = ran.ok();
        let original = fs::read(server.pgdata().join("pg_wal").join(name)).unwrap();
        assert!(fs::read(&fetched).unwrap() == original, "{name}");
        fs::remove_file(fetched).unwrap();
        compared += 1;
    }
    assert!(compared >= 4, "{compared} segments");
    assert_eq!(site.summary(&["list"])["gaps"].as_array().unwrap().len(), 0);
    let _ = site.pgv(&["check"]).ok();
    let (restored, outcome) = site.restore_to("latest", &[]);
    assert_eq!(outcome, Outcome::Promoted);
    assert_eq!(sql(&restored, "select count(*) || ' ' || max(id) from t"), rows);
    drop(restored);

    // Asked to end, it stores what it has.
    let _ = sql(&server, "insert into t(pad) values ('last words')");
    let last = lsn(&server, "pg_current_wal_flush_lsn()");
    wait_until("the last words are sent", Duration::from_secs(20), || {
        sql(&server, &format!("select bool_and(sent_lsn >= '{last}') from pg_stat_replication")) == "t"
    });
    std::thread::sleep(Duration::from_millis(300)); // Sent is not yet received, and nobody can be asked about that.
    assert_eq!(stream.terminate(), Some(0));
    assert!(site.vault_end(1, MIB16).unwrap() >= last);

    stop_with_the_store_down(&site, &mut server);
    foreign_server(&site);
}

/// R1, the other half: with the store down nothing can be acknowledged, and the server must be able to stop all the same.
fn stop_with_the_store_down(site: &Site, server: &mut Server) {
    let mut stream = site.stream();
    wait_until("the stream is back", Duration::from_secs(30), || slot_is_active(server));
    site.vaults.refuse_wal(true);
    let _ = sql(server, "insert into t(pad) values ('while the store is down')");
    let last = lsn(server, "pg_current_wal_flush_lsn()");
    let began = Instant::now();
    server.stop(Mode::Fast).unwrap();
    let took = began.elapsed();
    assert!(took < Duration::from_secs(5), "with the store down the stop took {took:?}");
    assert!(stream.is_running(), "trouble with the store is no reason to give up");
    site.vaults.refuse_wal(false);
    server.start().unwrap();
    wait_until("the stream is back", Duration::from_secs(60), || slot_is_active(server));
    let _ = sql(server, "select pg_switch_wal()");
    wait_for_vault(site, 1, last);
    assert_eq!(site.summary(&["list"])["gaps"].as_array().unwrap().len(), 0);
    let rows = sql(server, "select count(*) from t");
    wait_until("everything is stored", Duration::from_secs(30), || {
        site.vault_end(1, MIB16).unwrap() >= lsn(server, "pg_current_wal_lsn()").min_segment()
    });
    assert_eq!(stream.terminate(), Some(0));
    let (restored, _) = site.restore_to("latest", &[]);
    assert_eq!(sql(&restored, "select count(*) from t"), rows);
}

/// A server that is not the one the vault is for: refused at once, nothing stored, no slot left behind.
fn foreign_server(site: &Site) {
    let mut foreign = site.cluster("foreign").create().unwrap();
    foreign.start().unwrap();
    let before = site.wal_objects(1);
    site.configure_text("vault", &foreign.conninfo(), None);
    let _ = site.pgv(&["wal", "stream"]).expect(1).says("system identifier");
    let _ = site.pgv(&["backup"]).expect(1).says("system identifier");
    assert_eq!(site.wal_objects(1), before);
    assert_eq!(sql(&foreign, "select count(*) from pg_replication_slots"), "0");
}

trait Segment {
    /// The start of the segment that holds the position.
    fn min_segment(self) -> Lsn;
}

impl Segment for Lsn {
    fn min_segment(self) -> Lsn {
        Lsn(self.0 - self.0 % MIB16)
    }
}

/// R6: the stream follows a promotion; restores work before the fork, behind it, and along the abandoned timeline.
#[test]
fn r6_the_stream_follows_a_promotion() {
    let site = Site::new();
    let primary = site.start(site.cluster("main"));
    let _ = sql(&primary, "create table t(id int); insert into t values (1)");
    let mut copy = primary.client("pg_basebackup").unwrap();
    let data = site.path("standby");
    copy.args(["-X", "stream", "-c", "fast", "-D"]).arg(&data);
    assert_eq!(run(copy).code, Some(0));
    let _ = site.write("standby/standby.signal", "");
    site.account.own(&data).unwrap();
    let mut standby = Server::adopt(&site.install, &data)
        .option("primary_conninfo", primary.conninfo())
        .option("wal_keep_size", "1GB")
        .option("shared_buffers", "16MB")
        .port(5433)
        .start()
        .unwrap();
    let replayed = |standby: &Server, to: Lsn| {
        wait_until("the standby has replayed", Duration::from_secs(30), || {
            sql(standby, &format!("select coalesce(pg_last_wal_replay_lsn() >= '{to}', false)")) == "t"
        });
    };

    // From the standby, because that is where the future is.
    site.configure_text("vault", &standby.conninfo(), None);
    let stream = site.stream();
    wait_until("the slot is made", Duration::from_secs(30), || slot_is_active(&standby));
    let backup = site.backup("remote");
    assert_eq!(backup["timeline"], 1);
    let _ = sql(&primary, "insert into t values (2); select pg_create_restore_point('before the fork')");
    let before_fork = sql(&primary, "select to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')");
    let _ = sql(&primary, "insert into t values (3)");
    replayed(&standby, lsn(&primary, "pg_current_wal_flush_lsn()"));
    drop(primary);

    let _ = sql(&standby, "select pg_promote()");
    let _ = sql(&standby, "insert into t values (4)");
    let across = sql(&standby, "select to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')");
    let _ = sql(&standby, "insert into t values (5); select pg_switch_wal(); insert into t values (6)");
    let end = lsn(&standby, "pg_switch_wal()");
    wait_for_vault(&site, 2, end);
    assert!(site.wal_objects(2).contains(&"00000002.history".to_owned()));
    let listed = site.summary(&["list"]);
    assert_eq!(listed["gaps"].as_array().unwrap().len(), 0, "{listed}");

    let rows = |to: &str, more: &[&str]| {
        let (server, _) = site.restore_to(to, more);
        sql(&server, "select string_agg(id::text, ' ' order by id) from t")
    };
    assert_eq!(rows("latest", &[]), "1 2 3 4 5 6");
    assert_eq!(rows(&across, &[]), "1 2 3 4");
    assert_eq!(rows(&before_fork, &[]), "1 2");
    assert_eq!(rows("name:before the fork", &[]), "1 2");
    assert_eq!(rows("latest", &["--timeline", "1"]), "1 2 3");

    // R6: a second promotion while the stream is down; the new timeline is found again on connecting.
    assert_eq!(stream.terminate(), Some(0));
    standby.stop(Mode::Fast).unwrap();
    let _ = site.write("standby/standby.signal", "");
    standby.start().unwrap();
    let _ = sql(&standby, "select pg_promote()");
    let _ = sql(&standby, "insert into t values (7); select pg_switch_wal(); insert into t values (8)");
    let end = lsn(&standby, "pg_switch_wal()");
    let stream = site.stream();
    wait_for_vault(&site, 3, end);
    assert_eq!(rows("latest", &[]), "1 2 3 4 5 6 7 8");
    assert_eq!(rows("latest", &["--timeline", "2"]), "1 2 3 4 5 6");
    assert_eq!(stream.terminate(), Some(0));

    // H7: without the history files nothing is guessed.
    let history = site.vaults.object("00000003.history");
    let taken = site.vaults.take(&history);
    let ran = site.restore_into(&site.path("refused"), "latest", &[]);
    assert_ne!(ran.code, Some(0));
    let _ = ran.says("history");
    assert!(!site.path("refused").exists());
    let _ = fetch(&site, "00000003.history").0.expect(255);
    site.vaults.replace(&history, taken);
    let middle = site.vaults.object("00000002.history");
    let taken = site.vaults.take(&middle);
    let _ = fetch(&site, "00000002.history").0.expect(255);
    let _ = site.restore_into(&site.path("refused"), "latest", &[]).expect(5).says("history file of timeline 2");
    let ran = site.restore_into(&site.path("refused"), "latest", &["--timeline", "2"]);
    assert_ne!(ran.code, Some(0));
    let _ = ran.says("history");
    assert!(!site.path("refused").exists());
    site.vaults.replace(&middle, taken);
    let _ = fetch(&site, "00000004.history").0.expect(1);
}
