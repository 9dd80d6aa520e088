//! `wal fetch` with what was fetched ahead: faster, and in nothing else different.

#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Ran, Site, run, sql, switch_and_archive, wait_until};
use pgvault_verify::process::{Mode, Outcome, Server};

/// Short enough to wait for, long enough for a slow machine.
const IDLE: &str = "3000";

/// Settings of `[cluster.main.wal]`, behind the configuration that is there.
fn configure(site: &Site, prefetch: u32) {
    let text = fs::read_to_string(site.path("pgvault.toml")).unwrap();
    let text = text.split("\n[cluster.main.wal]").next().unwrap();
    let base = site.path("cache");
    let _ = site.write(
        "pgvault.toml",
        format!("{text}\n[cluster.main.wal]\nprefetch = {prefetch}\nprefetch_dir = \"{}\"\n", base.display()),
    );
}

/// A server with small segments that archives, a backup of it, and the segments behind that.
fn archive(site: &Site, count: u32) -> (Server, Vec<String>) {
    let builder = site.cluster("main").wal_segment_mib(1).config(site.archiving()).config("wal_keep_size = 0");
    let server = site.start(builder);
    let _ = sql(&server, "create table t(id bigserial, pad text)");
    let _ = site.backup("local");
    let names = (0..count).map(|_| fill(&server)).collect();
    configure(site, 8);
    (server, names)
}

fn fill(server: &Server) -> String {
    let _ = sql(server, "insert into t(pad) select repeat(md5(g::text), 8) from generate_series(1, 1500) g");
    switch_and_archive(server)
}

const ROWS: &str = "select count(*) || ' ' || md5(string_agg(id || pad, ' ' order by id)) from t";

/// The prefetchers of this site.
fn prefetchers(site: &Site) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let line = String::from_utf8_lossy(&fs::read(entry.path().join("cmdline")).unwrap_or_default()).replace('\0', " ");
        if line.contains(" prefetch ") && line.contains(site.folder().to_str().unwrap()) {
            found.push(pid);
        }
    }
    found
}

fn kill9(pid: i32) {
    let _ = rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), rustix::process::Signal::KILL);
}

/// True when everything that a process had open is closed; its command line is gone before that.
fn is_dead(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_none_or(|rest| rest.is_empty() || rest.starts_with('Z'))
}

/// What lies in the cache: whole segments only.
fn cached(site: &Site) -> BTreeSet<String> {
    let files = common::files_below(&site.path("cache"));
    let names = files.iter().filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()));
    names.filter(|name| name.len() == 24).collect()
}

fn cached_file(site: &Site, name: &str) -> PathBuf {
    common::files_below(&site.path("cache")).into_iter().find(|path| path.ends_with(name)).unwrap()
}

fn wait_for_cached(site: &Site, name: &str) {
    wait_until(&format!("{name} is cached"), Duration::from_secs(30), || cached(site).contains(name));
}

/// Fetches the first, and waits for all that are fetched ahead: several at once, so that the last may come before the first.
fn warm(site: &Site, pgdata: &Path, names: &[String]) {
    let _ = assert_fetches(site, pgdata, &names[0]);
    names[1..=8].iter().for_each(|name| wait_for_cached(site, name));
}

/// Nothing is left of prefetching: neither a process nor a file.
#[track_caller]
fn assert_over(site: &Site) {
    wait_until("prefetching is over", Duration::from_secs(20), || prefetchers(site).is_empty());
    let left = common::files_below(&site.path("cache"));
    assert!(left.is_empty(), "{left:?}");
}

/// Nothing in the data directory is ours.
#[track_caller]
fn assert_no_strangers(pgdata: &Path) {
    let ours = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().contains("pgvault"));
    let strangers: Vec<_> = common::files_below(pgdata).into_iter().filter(ours).collect();
    assert_eq!(strangers, Vec::<PathBuf>::new());
}

/// `wal fetch` as the server calls it: its folder is the data directory, and it logs what it does.
fn fetch(site: &Site, pgdata: &Path, name: &str) -> Ran {
    fetch_to(site, pgdata, name, "pg_wal/RECOVERYXLOG")
}

fn fetch_to(site: &Site, pgdata: &Path, name: &str, destination: &str) -> Ran {
    let mut command = site.pgvault(&["wal", "fetch", name, destination]);
    command.current_dir(pgdata).env("PGVAULT_LOG", "info").env("PGVAULT_PREFETCH_IDLE_MS", IDLE);
    run(command)
}

const HIT: &str = "taken from the cache";

fn is_hit(ran: &Ran) -> bool {
    format!("{}{}", ran.stdout, ran.stderr).contains(HIT)
}

/// The segment as the vault gives it without any cache: to a place that is not in a data directory.
fn truth(site: &Site, name: &str) -> Vec<u8> {
    let destination = site.fresh("truth");
    let ran = site.pgv(&["wal", "fetch", name, destination.to_str().unwrap()]).ok();
    assert!(!is_hit(&ran));
    fs::read(destination).unwrap()
}

#[track_caller]
fn assert_fetches(site: &Site, pgdata: &Path, name: &str) -> Ran {
    let destination = pgdata.join("pg_wal/RECOVERYXLOG");
    let _ = fs::remove_file(&destination);
    let ran = fetch(site, pgdata, name).ok();
    assert!(fs::read(destination).unwrap() == truth(site, name), "{name} differs");
    ran
}

/// `restore_command` in the way that the tests want it.
fn restore_command(site: &Site) -> String {
    format!(
        "PGVAULT_LOG=info PGVAULT_PREFETCH_IDLE_MS={IDLE} {} --config {} wal fetch \"%f\" \"%p\"",
        site.path("pgvault").display(),
        site.path("pgvault.toml").display()
    )
}

fn launch(site: &Site, pgdata: &Path, restore_command: &str) -> Server {
    Server::adopt(&site.install, pgdata)
        .option("fsync", "off")
        .option("shared_buffers", "16MB")
        .option("restore_command", restore_command)
        .launch()
        .unwrap()
}

fn hits(server: &Server) -> usize {
    fs::read_to_string(server.log()).unwrap().matches(HIT).count()
}

#[test]
fn a_recovery_with_prefetch_gives_the_same_rows_as_one_without_and_leaves_nothing() {
    let site = Site::new();
    let (server, _) = archive(&site, 20);
    let rows = sql(&server, ROWS);
    drop(server);
    for prefetch in [0, 8] {
        configure(&site, prefetch);
        let pgdata = site.restore("latest", &[]);
        let mut recovered = launch(&site, &pgdata, &restore_command(&site));
        assert_eq!(recovered.wait_until_paused_or_promoted(Duration::from_secs(120)).unwrap(), Outcome::Promoted);
        assert_eq!(sql(&recovered, ROWS), rows, "{prefetch}");
        let hits = hits(&recovered);
        if prefetch == 0 {
            assert_eq!(hits, 0);
            assert!(!site.path("cache").exists());
        } else {
            assert!(hits >= 8, "{hits} segments came from the cache");
            // The end of recovery is seen before the idle time is over.
            assert_over(&site);
        }
        assert_no_strangers(&pgdata);
    }
}

/// Without a server, so that every step is seen.
#[test]
fn what_lies_in_the_cache_is_doubted_and_the_vault_decides() {
    let site = Site::new();
    let (server, names) = archive(&site, 22);
    drop(server);
    let pgdata = site.restore("latest", &[]);

    // Eight ahead, and not one more.
    warm(&site, &pgdata, &names);
    assert_eq!(cached(&site), names[1..=8].iter().cloned().collect());
    let folder = cached_file(&site, &names[1]).parent().unwrap().to_owned();
    assert_eq!(fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700);
    assert!(is_hit(&assert_fetches(&site, &pgdata, &names[1])));
    wait_for_cached(&site, &names[9]);

    // Poisoned: not used, and told by the vault instead.
    let poison = |name: &str, spoil: &dyn Fn(&Path)| {
        wait_for_cached(&site, name);
        spoil(&cached_file(&site, name));
        assert!(!is_hit(&assert_fetches(&site, &pgdata, name)), "{name} was used");
    };
    poison(&names[2], &|path| {
        let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 700_000).unwrap();
        file.write_all_at(&[byte[0] ^ 1], 700_000).unwrap();
    });
    poison(&names[3], &|path| fs::OpenOptions::new().write(true).open(path).unwrap().set_len(500_000).unwrap());
    poison(&names[4], &|path| {
        fs::rename(path, site.path("aside")).unwrap();
        symlink(site.path("aside"), path).unwrap();
    });
    poison(&names[5], &|path| {
        wait_for_cached(&site, &names[6]);
        let _ = fs::copy(cached_file(&site, &names[6]), path).unwrap();
    });
    assert!(is_hit(&assert_fetches(&site, &pgdata, &names[6])), "the others are as good as before");

    // Two at once: the same segment to the same place, and to two places.
    wait_for_cached(&site, &names[7]);
    std::thread::scope(|scope| {
        let racing: Vec<_> = ["pg_wal/RECOVERYXLOG", "pg_wal/RECOVERYXLOG", "pg_wal/OTHER", "pg_wal/OTHER"]
            .map(|destination| scope.spawn(|| fetch_to(&site, &pgdata, &names[7], destination).ok()))
            .into();
        for fetched in racing {
            let _ = fetched.join().unwrap();
        }
    });
    let right = truth(&site, &names[7]);
    for destination in ["RECOVERYXLOG", "OTHER"] {
        assert!(fs::read(pgdata.join("pg_wal").join(destination)).unwrap() == right);
        assert!(!pgdata.join("pg_wal").join(destination).with_extension("pgvault-tmp").exists());
    }

    // Exit 1 is the vault's to say, and a gap is never passed over because there is a cache.
    let object = site.vaults.object(&format!("{}.wal", names[20]));
    let hidden = site.vaults.take(&object);
    for name in &names[8..20] {
        wait_for_cached(&site, name);
        assert!(is_hit(&assert_fetches(&site, &pgdata, name)));
    }
    let _ = fetch(&site, &pgdata, &names[20]).expect(255).says("gap");
    site.vaults.replace(&object, hidden);
    let _ = assert_fetches(&site, &pgdata, &names[20]);
    let _ = assert_fetches(&site, &pgdata, &names[21]);
    let _ = fetch(&site, &pgdata, &name_after(&names[21])).expect(1);
    // Everything was handed out: it ends by itself.
    assert_over(&site);

    killed(&site, &pgdata, &names);
    gone(&site, &pgdata, &names);
    untrusted(&site, &pgdata, &names);
}

/// The name of the next segment.
fn name_after(name: &str) -> String {
    let number = common::segment_number(name, 1 << 20).unwrap() + 1;
    format!("{}{:08X}{:08X}", &name[..8], number / 4096, number % 4096)
}

/// Killed at any moment: what it leaves is not used, and the next one begins with nothing.
fn killed(site: &Site, pgdata: &Path, names: &[String]) {
    let mut left = 0;
    for round in 0..8 {
        let _ = assert_fetches(site, pgdata, &names[0]);
        // At any moment of its life, from its first on.
        wait_until("it runs", Duration::from_secs(60), || !prefetchers(site).is_empty());
        std::thread::sleep(Duration::from_millis(60 * round));
        let running = prefetchers(site);
        for pid in &running {
            kill9(*pid);
        }
        wait_until("it is dead", Duration::from_secs(10), || running.iter().all(|pid| is_dead(*pid)));
        left += common::files_below(&site.path("cache")).len();
        assert!(!is_hit(&assert_fetches(site, pgdata, &names[1])), "what a dead prefetcher left was used");
        for pid in prefetchers(site) {
            kill9(pid);
        }
    }
    assert!(left > 0, "no prefetcher was cut off");
    wait_until("it is dead", Duration::from_secs(10), || prefetchers(site).is_empty());
    warm(site, pgdata, names);
    assert!(is_hit(&assert_fetches(site, pgdata, &names[1])));
    // Nobody asks any more.
    assert_over(site);
}

/// The server, the vault or the cache goes away: so does the prefetcher.
fn gone(site: &Site, pgdata: &Path, names: &[String]) {
    let warm = || warm(site, pgdata, names);
    warm();
    let folder = cached_file(site, &names[1]).parent().unwrap().to_owned();
    fs::remove_dir_all(folder).unwrap();
    assert_over(site);
    // T20: a data directory that was made anew at the same place has nothing in common with the one before.
    warm();
    let away = site.path("away");
    fs::rename(pgdata.join("pg_wal"), &away).unwrap();
    fs::create_dir(pgdata.join("pg_wal")).unwrap();
    site.account.own(&pgdata.join("pg_wal")).unwrap();
    assert!(!is_hit(&assert_fetches(site, pgdata, &names[1])));
    fs::remove_dir_all(pgdata.join("pg_wal")).unwrap();
    fs::rename(away, pgdata.join("pg_wal")).unwrap();
    assert_over(site);
    warm();
    fs::rename(pgdata.join("recovery.signal"), pgdata.join("was")).unwrap();
    assert_over(site);
    fs::rename(pgdata.join("was"), pgdata.join("recovery.signal")).unwrap();

    // R7: with a warm cache and no vault, what is cached is given, and then it is trouble and not the end of the archive.
    warm();
    site.vaults.set_away(true);
    assert!(is_hit(&fetch(site, pgdata, &names[1]).ok()));
    // At once, because it is patient with a store that is away.
    std::thread::scope(|scope| {
        for name in [&names[9], "00000002.history"] {
            let _ = scope.spawn(|| fetch(site, pgdata, name).expect(255));
        }
    });
    site.vaults.set_away(false);
    wait_until("it is over", Duration::from_secs(20), || prefetchers(site).is_empty());
}

/// A folder that is not fit for WAL: no prefetching, and nothing worse.
fn untrusted(site: &Site, pgdata: &Path, names: &[String]) {
    let base = site.path("cache");
    let _ = fs::remove_dir_all(&base);
    let none = |what: &str| {
        for name in &names[..3] {
            assert!(!is_hit(&assert_fetches(site, pgdata, name)), "{what}");
        }
        wait_until("it has given up", Duration::from_secs(10), || prefetchers(site).is_empty());
    };
    let elsewhere = site.directory("elsewhere");
    symlink(&elsewhere, &base).unwrap();
    none("a link");
    assert!(common::files_below(&elsewhere).is_empty());
    fs::remove_file(&base).unwrap();
    fs::create_dir(&base).unwrap();
    site.account.own(&base).unwrap();
    fs::set_permissions(&base, fs::Permissions::from_mode(0o777)).unwrap();
    none("everybody's folder");
    fs::remove_dir_all(&base).unwrap();
    fs::write(&base, "a file").unwrap();
    none("a file");
    fs::remove_file(&base).unwrap();
}

/// R7, H4: a warm cache does not hide that the vault is in trouble.
#[test]
fn r7_h4_a_store_that_goes_away_during_replay_stops_the_server_and_does_not_promote_it() {
    let site = Site::new();
    let (server, _) = archive(&site, 16);
    let rows = sql(&server, ROWS);
    drop(server);
    let pgdata = site.restore("latest", &[]);
    let (counter, asked, gone) = (site.directory("counter"), site.path("counter/asked"), site.path("counter/gone"));
    // The vault vanishes while the sixth segment is asked for.
    let sabotage = format!(
        "touch {0}/\"%f\"; test `ls {0} | wc -l` -ne 8 || {{ touch {1}; while test ! -e {2}; do sleep 0.05; done; }}; {3}",
        counter.display(),
        asked.display(),
        gone.display(),
        restore_command(&site)
    );
    let mut stopped = launch(&site, &pgdata, &sabotage);
    wait_until("the segment is asked for", Duration::from_secs(60), || asked.exists());
    site.vaults.set_away(true);
    let _ = site.write("counter/gone", "");
    // `wal fetch` is patient with a store that is away.
    let outcome = stopped.wait_until_paused_or_promoted(Duration::from_secs(180));
    assert!(matches!(outcome, Err(pgvault_verify::process::Error::Ended { .. })), "{outcome:?}");
    assert!(stopped.log_tail().contains("255") || format!("{outcome:?}").contains("255"), "{outcome:?}");
    assert!(pgdata.join("recovery.signal").exists());
    drop(stopped);
    site.vaults.set_away(false);
    let mut recovered = launch(&site, &pgdata, &restore_command(&site));
    assert_eq!(recovered.wait_until_paused_or_promoted(Duration::from_secs(120)).unwrap(), Outcome::Promoted);
    assert_eq!(sql(&recovered, ROWS), rows);
    drop(recovered);
    wait_until("prefetching is over", Duration::from_secs(20), || prefetchers(&site).is_empty());
}

/// T3: replay crosses to another timeline, and the cache with it.
#[test]
fn t3_a_timeline_switch_leaves_the_cache_of_the_old_one() {
    let site = Site::new();
    let (server, names) = archive(&site, 6);
    drop(server);
    let pgdata = site.restore("latest", &[]);
    let mut second = Server::adopt(&site.install, &pgdata)
        .option("fsync", "off")
        .option("archive_mode", "on")
        .option(
            "archive_command",
            format!("{} --config {} wal push \"%p\"", site.path("pgvault").display(), site.path("pgvault.toml").display()),
        )
        .launch()
        .unwrap();
    assert_eq!(second.wait_until_paused_or_promoted(Duration::from_secs(60)).unwrap(), Outcome::Promoted);
    let newer: Vec<String> = (0..8).map(|_| fill(&second)).collect();
    assert!(newer[0].starts_with("00000002"));
    let rows = sql(&second, ROWS);
    drop(second);

    let pgdata = site.restore("latest", &[]);
    let mut third = launch(&site, &pgdata, &restore_command(&site));
    assert_eq!(third.wait_until_paused_or_promoted(Duration::from_secs(120)).unwrap(), Outcome::Promoted);
    assert_eq!(sql(&third, ROWS), rows);
    assert!(hits(&third) > 0);
    drop(third);
    assert_over(&site);

    // Step by step: warm on the first, asked for the second.
    let pgdata = site.restore("latest", &[]);
    let _ = assert_fetches(&site, &pgdata, &names[0]);
    wait_for_cached(&site, &names[2]);
    let _ = assert_fetches(&site, &pgdata, &newer[0]);
    wait_for_cached(&site, &newer[2]);
    assert!(cached(&site).iter().all(|name| name.starts_with("00000002")), "{:?}", cached(&site));
    assert!(is_hit(&assert_fetches(&site, &pgdata, &newer[1])));
    assert_over(&site);
}

/// `pg_rewind -c` fetches through the same command, backwards at first, and looks at every file below the data directory.
#[test]
fn pg_rewind_fetches_what_the_old_primary_has_removed() {
    let site = Site::new();
    let (mut old, _) = archive(&site, 2);
    let mut copy = old.client("pg_basebackup").unwrap();
    let data = site.path("standby");
    copy.args(["-X", "stream", "-c", "fast", "-D"]).arg(&data);
    assert_eq!(run(copy).code, Some(0));
    let _ = site.write("standby/standby.signal", "");
    site.account.own(&data).unwrap();
    let new = Server::adopt(&site.install, &data).option("primary_conninfo", old.conninfo()).port(5433).start().unwrap();
    wait_until("the standby follows", Duration::from_secs(30), || sql(&old, "select count(*) from pg_stat_replication") == "1");
    let _ = sql(&new, "select pg_promote()");
    let _ = sql(&new, "insert into t(pad) values ('of the new one')");
    // The old one has not noticed, and writes what will have to go.
    let lost: Vec<String> = (0..8).map(|_| fill(&old)).collect();
    let _ = sql(&old, "checkpoint");
    old.stop(Mode::Fast).unwrap();
    for name in &lost {
        let _ = fs::remove_file(old.pgdata().join("pg_wal").join(name));
    }
    let conf = old.pgdata().join("postgresql.auto.conf");
    fs::write(&conf, format!("restore_command = '{}'\n", restore_command(&site))).unwrap();
    let mut rewind = site.command(site.install.program("pg_rewind").unwrap());
    rewind.arg("-c").arg("--target-pgdata").arg(old.pgdata()).arg("--source-server").arg(new.conninfo());
    rewind.current_dir(old.pgdata());
    let ran = run(rewind).ok();
    assert!(is_hit(&ran), "{}{}", ran.stdout, ran.stderr);
    assert_no_strangers(old.pgdata());
    drop(new);
    assert_over(&site);
}

/// A small file system of its own; only where this process may mount one.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(site: &Site, path: PathBuf) -> Option<Self> {
        let options = format!("size=3m,mode=0700,uid={},gid={}", site.account.uid(), site.account.gid());
        let mut mount = std::process::Command::new("mount");
        let mounted = mount.args(["-t", "tmpfs", "-o", &options, "pgvault"]).arg(&path).output();
        mounted.is_ok_and(|output| output.status.success()).then_some(Self(path))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_ends_prefetching_and_nothing_else() {
    let site = Site::new();
    let (server, names) = archive(&site, 8);
    drop(server);
    let pgdata = site.restore("latest", &[]);
    let Some(disk) = SmallDisk::mount(&site, site.directory("cache")) else {
        eprintln!("skipped: this process may not mount a file system");
        return;
    };
    let _ = assert_fetches(&site, &pgdata, &names[0]);
    wait_until("it has given up", Duration::from_secs(20), || {
        prefetchers(&site).is_empty() && common::files_below(&disk.0).iter().any(|path| path.ends_with("rest"))
    });
    assert!(cached(&site).is_empty(), "a full disk stays full");
    for name in &names {
        assert!(!is_hit(&assert_fetches(&site, &pgdata, name)));
        assert!(prefetchers(&site).is_empty(), "it is tried again at once");
    }
    let _ = fetch(&site, &pgdata, &name_after(&names[7])).expect(1);
}
