//! Copies in containers, on Podman's service and an image of the PostgreSQL in `PGVAULT_TEST_PG` that is made here.

#![expect(clippy::unwrap_used, reason = "also in the helpers of a test, a failure is a panic")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pgvault_core::postgres::{Connection, Host, Mode};
use pgvault_teststores::Podman;
use pgvault_verify::process::{self, Account, Install, Server};
use pgvault_verify::runner::docker::{DockerOptions, DockerRunner, image};
use pgvault_verify::runner::{Ended, Needs, Runner, Running, Site};
use tempfile::TempDir;

/// Long enough for a machine that does other things.
const LIMIT: Duration = Duration::from_secs(60);

fn install() -> Install {
    Install::for_tests().unwrap()
}

fn needs() -> Needs {
    Needs { major: install().version().major(), shared_buffers: 64 << 20 }
}

fn options() -> DockerOptions {
    let podman = Podman::shared().unwrap();
    let image = podman.image(install().bin()).unwrap();
    DockerOptions { socket: Some(podman.socket().to_path_buf()), image: Some(image), ..DockerOptions::default() }
}

async fn prepared(options: DockerOptions) -> DockerRunner {
    let mut runner = DockerRunner::new(options).unwrap();
    runner.prepare(&needs()).await.unwrap();
    runner
}

fn podman(arguments: &[&str]) -> String {
    let output = Podman::shared().unwrap().command().unwrap().args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// The containers of a drill.
fn containers(drill: &str) -> Vec<String> {
    let label = format!("label=io.pgvault.drill={drill}");
    podman(&["ps", "--all", "--quiet", "--no-trunc", "--filter", &label]).lines().map(str::to_owned).collect()
}

/// A stopped cluster, and a copy of it as a restore would leave it.
struct Restored {
    original: Server,
    folder: TempDir,
    site: Site,
}

impl Restored {
    fn of(drill: &str) -> Self {
        Self::below(drill, "")
    }

    /// With the site some folders deeper.
    fn below(drill: &str, deeper: &str) -> Self {
        let mut server = Server::builder(&install())
            .config("archive_mode = on")
            .config("archive_command = 'true'")
            .config("max_connections = 37")
            .start()
            .unwrap();
        server
            .psql("create table t as select generate_series(1, 1000) n; create extension amcheck; create extension pg_trgm")
            .unwrap();
        server.stop(process::Mode::Fast).unwrap();
        let folder = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir().unwrap();
        let home = folder.path().join(deeper).join("site");
        fs::create_dir_all(&home).unwrap();
        Account::unprivileged().unwrap().own(folder.path()).unwrap();
        let pgdata = home.join("data");
        let copied = Command::new("cp").arg("-a").arg(server.pgdata()).arg(&pgdata).status().unwrap();
        assert!(copied.success());
        let name = format!("{drill}-{}", std::process::id());
        let site = Site { folder: home, pgdata, tablespaces: Vec::new(), name, user: "postgres".to_owned() };
        Self { original: server, folder, site }
    }

    async fn start(&self, options: DockerOptions) -> Box<dyn Running> {
        prepared(options).await.start(&self.site, &[("work_mem".to_owned(), "7MB".to_owned())]).await.unwrap()
    }
}

/// A connection as soon as the server takes one.
async fn connected(server: &mut dyn Running) -> Connection {
    let began = Instant::now();
    loop {
        match Connection::connect(&server.connection(), Mode::Sql).await {
            Ok(connection) => return connection,
            Err(error) => {
                if let Some(ended) = server.ended().await {
                    panic!("{ended:?}\n{}", server.log_tail().await);
                }
                assert!(began.elapsed() < LIMIT, "{error}\n{}", server.log_tail().await);
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn ask(connection: &mut Connection, sql: &str) -> String {
    connection.query_one(sql).await.unwrap().text(0).unwrap().unwrap_or_default().to_owned()
}

async fn end_of(server: &mut dyn Running) -> Ended {
    let began = Instant::now();
    loop {
        if let Some(ended) = server.ended().await {
            return ended;
        }
        assert!(began.elapsed() < LIMIT, "it runs on\n{}", server.log_tail().await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_copy_runs_in_a_container_that_may_nothing_else() {
    let restored = Restored::of("runs");
    let options = DockerOptions { memory: Some(512 << 20), processes: 77, ..options() };
    let mut runner = DockerRunner::new(options).unwrap();
    assert_eq!(runner.describe(), "docker");
    runner.prepare(&needs()).await.unwrap();
    let said = runner.describe();
    assert!(said.starts_with("docker, localhost/pgvault-test:") && said.contains(" Engine "), "{said}");
    assert!(said.contains(&install().version().to_string()), "{said}");
    assert_eq!(runner.owner(), {
        let meta = fs::metadata(&restored.site.pgdata).unwrap();
        (meta.uid(), meta.gid())
    });
    let mut server = runner.start(&restored.site, &[("work_mem".to_owned(), "7MB".to_owned())]).await.unwrap();
    let mut connection = connected(server.as_mut()).await;

    assert_eq!(ask(&mut connection, "select count(*) from t").await, "1000");
    assert_eq!(ask(&mut connection, "select max(similarity(n::text, '1000')) from t").await, "1");
    let pgdata = restored.site.pgdata.display().to_string();
    for (name, value) in
        [("data_directory", pgdata.as_str()), ("archive_mode", "off"), ("work_mem", "7MB"), ("listen_addresses", "")]
    {
        assert_eq!(ask(&mut connection, &format!("show {name}")).await, value, "{name}");
    }
    // What the container may, in its own words.
    let status = ask(&mut connection, "select pg_read_file('/proc/self/status')").await;
    for line in ["CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", &format!("Uid:\t{}", runner.owner().0)]
    {
        assert!(status.contains(line), "{line} in {status}");
    }
    let network = ask(&mut connection, "select pg_read_file('/proc/net/dev')").await;
    assert_eq!(network.lines().skip(2).filter(|line| !line.trim_start().starts_with("lo:")).count(), 0, "{network}");
    for folder in ["/", "/etc", "/usr", "/var"] {
        let written = connection.simple_query(&format!("copy (select 1) to '{}/pgvault-test'", folder.trim_end_matches('/'))).await;
        let error = written.unwrap_err().to_string();
        assert!(error.contains("Read-only file system") || error.contains("No such file"), "{folder}: {error}");
    }
    let original = restored.original.pgdata();
    assert!(original.is_dir());
    assert_eq!(ask(&mut connection, &format!("select pg_stat_file('{}', true) is null", original.display())).await, "t");
    let mounted = ask(&mut connection, "select pg_read_file('/proc/self/mountinfo')").await;
    let site = restored.site.folder.display().to_string();
    let ours: Vec<&str> = mounted.lines().filter(|line| line.contains(&site)).collect();
    assert_eq!(ours.len(), 1, "{mounted}");
    let shared = ask(&mut connection, "select pg_read_file('/proc/mounts')").await;
    assert!(shared.lines().any(|line| line.contains("/dev/shm") && line.contains("size=262144k")), "{shared}");
    let inspected = podman(&[
        "inspect",
        "--format",
        "{{.HostConfig.Memory}} {{.HostConfig.PidsLimit}} {{.HostConfig.RestartPolicy.Name}} {{.Config.StopSignal}}",
        &containers(&restored.site.name)[0],
    ]);
    assert!(inspected.starts_with("536870912 77 "), "{inspected}");
    assert!(!inspected.contains("always") && inspected.ends_with(" 2") || inspected.ends_with("SIGINT"), "{inspected}");
    // Parallel workers pass their rows through shared memory.
    connection
        .simple_query("set parallel_setup_cost = 0; set parallel_tuple_cost = 0; set min_parallel_table_scan_size = 0")
        .await
        .unwrap();
    assert_eq!(ask(&mut connection, "select sum(n) from t").await, "500500");
    connection.close().await;

    let dump = server.program("pg_dump", &["--table=t".to_owned()], LIMIT).await.unwrap();
    assert!(dump.succeeded() && dump.output.is_empty(), "{dump:?}");
    let dump = server.program("pg_dump", &["--table=missing".to_owned()], LIMIT).await.unwrap();
    assert!(dump.code == Some(1) && dump.output.contains("no matching tables were found"), "{dump:?}");
    let error = server.program("pg_missing", &[], LIMIT).await.unwrap_err();
    assert!(error.to_string().contains("run pg_missing") && error.to_string().contains("not found"), "{error}");
    let slow = server.program("sleep", &["1000".to_owned()], Duration::from_secs(1)).await.unwrap();
    assert!(slow.code.is_none() && slow.output.contains("ended after 1 s"), "{slow:?}");
    let mut connection = connected(server.as_mut()).await;
    let sleepers = "select count(*) from pg_ls_dir('/proc') p where p ~ '^[0-9]+$' and pg_read_file('/proc/' || p || '/comm', 0, 100, true) = E'sleep\\n'";
    let began = Instant::now();
    while ask(&mut connection, sleepers).await != "0" {
        assert!(began.elapsed() < LIMIT, "a program that took too long runs on");
    }
    connection.close().await;

    assert_eq!(server.ended().await, None);
    server.stop(LIMIT).await.unwrap();
    let ended = server.ended().await.unwrap();
    assert!(ended.orderly && !ended.out_of_memory, "{ended:?}");
    assert!(server.log_tail().await.contains("database system is shut down"));
    let mut control = Command::new(install().program("pg_controldata").unwrap());
    let control = control.env("LC_ALL", "C").arg(&restored.site.pgdata).output().unwrap();
    assert!(String::from_utf8_lossy(&control.stdout).contains("cluster state:               shut down"));
    assert_eq!(containers(&restored.site.name).len(), 1, "its log can be read as long as it is there");
    server.remove().await.unwrap();
    assert!(containers(&restored.site.name).is_empty());
    server.remove().await.unwrap();
    drop(server);
    let left: Vec<_> = fs::read_dir(&restored.site.folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["data"], "nothing but the copy is left");
    assert!(restored.folder.path().exists());
}

#[tokio::test]
async fn a_server_that_runs_out_of_memory_is_told_apart() {
    let restored = Restored::of("memory");
    let mut server = restored.start(DockerOptions { memory: Some(192 << 20), ..options() }).await;
    let mut connection = connected(server.as_mut()).await;
    let eaten =
        connection.simple_query("select length(string_agg(repeat(md5(g::text), 100), '')) from generate_series(1, 250000) g").await;
    assert!(eaten.is_err());
    let ended = end_of(server.as_mut()).await;
    assert!(ended.out_of_memory && !ended.orderly, "{ended:?}\n{}", server.log_tail().await);
    assert!(ended.how.contains("out of memory") && ended.how.contains("192 MiB"), "{ended:?}");
    let error = server.stop(LIMIT).await.unwrap_err();
    assert!(error.to_string().contains("out of memory"), "{error}");
    server.remove().await.unwrap();
    assert!(containers(&restored.site.name).is_empty());
}

#[tokio::test]
async fn a_container_that_somebody_kills_or_removes_is_reported_and_its_socket_fits_anywhere() {
    // A Unix socket's path has at most 107 bytes.
    let restored = Restored::below("killed", &"deep/".repeat(20));
    let mut server = restored.start(options()).await;
    connected(server.as_mut()).await.close().await;
    let Host::Unix(socket) = server.connection().endpoints[0].host.clone() else { panic!("not a socket") };
    assert!(socket.starts_with("/tmp") && !socket.starts_with(&restored.site.folder), "{}", socket.display());
    podman(&["kill", &containers(&restored.site.name)[0]]);
    let ended = end_of(server.as_mut()).await;
    assert!(ended.how.contains("killed by signal 9") && !ended.orderly && !ended.out_of_memory, "{ended:?}");
    server.remove().await.unwrap();
    drop(server);
    assert!(!socket.exists());

    // The killed server's lock file is in the copy, as after a crash of its machine.
    let mut server = restored.start(options()).await;
    connected(server.as_mut()).await.close().await;
    podman(&["rm", "--force", "--time", "0", &containers(&restored.site.name)[0]]);
    let ended = end_of(server.as_mut()).await;
    assert!(ended.how.contains("removed by somebody else") && !ended.orderly, "{ended:?}");
    server.remove().await.unwrap();
}

#[tokio::test]
async fn a_dropped_server_is_gone_and_a_copy_without_configuration_runs() {
    let restored = Restored::of("dropped");
    for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
        fs::remove_file(restored.site.pgdata.join(name)).unwrap();
    }
    let mut server = restored.start(options()).await;
    let mut connection = connected(server.as_mut()).await;
    assert_eq!(ask(&mut connection, "show max_connections").await, "37");
    assert_eq!(containers(&restored.site.name).len(), 1);
    drop(server);
    assert!(containers(&restored.site.name).is_empty());
    assert!(!restored.site.pgdata.join("postgresql.conf").exists());
}

/// Set for the process that a test starts and kills: `folder`, `socket` and `image` of its drill, and the drill's name.
const DRILL: &str = "PGVAULT_TEST_DRILL";

#[tokio::test]
async fn what_a_dead_drill_left_is_removed_and_a_living_one_is_left_alone() {
    if let Ok(drill) = std::env::var(DRILL) {
        return die_in_a_drill(&drill).await;
    }
    let restored = Restored::of("leftover");
    let options = options();
    let drill = [
        restored.site.folder.to_str().unwrap(),
        options.socket.as_ref().unwrap().to_str().unwrap(),
        options.image.as_ref().unwrap(),
        &restored.site.name,
    ];
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "what_a_dead_drill_left_is_removed_and_a_living_one_is_left_alone", "--nocapture"])
        .env(DRILL, drill.join("\n"))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let began = Instant::now();
    while podman(&["ps", "--quiet", "--filter", &format!("label=io.pgvault.drill={}", restored.site.name)]).is_empty() {
        assert_eq!(child.try_wait().unwrap(), None);
        assert!(began.elapsed() < LIMIT);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let living = containers(&restored.site.name);
    drop(prepared(options.clone()).await);
    assert_eq!(containers(&restored.site.name), living, "of a living drill");
    child.kill().unwrap();
    let _ = child.wait().unwrap();
    assert_eq!(containers(&restored.site.name), living, "nobody has removed it yet");
    drop(prepared(options).await);
    assert!(containers(&restored.site.name).is_empty());
}

/// Starts a server and waits to be killed.
async fn die_in_a_drill(drill: &str) {
    let [folder, socket, image, name] = drill.split('\n').collect::<Vec<_>>().try_into().unwrap();
    let options = DockerOptions { socket: Some(socket.into()), image: Some(image.to_owned()), ..DockerOptions::default() };
    let folder = PathBuf::from(folder);
    let pgdata = folder.join("data");
    let site = Site { folder, pgdata, tablespaces: Vec::new(), name: name.to_owned(), user: "postgres".to_owned() };
    let _server = prepared(options).await.start(&site, &[]).await.unwrap();
    tokio::time::sleep(Duration::from_secs(600)).await;
}

#[tokio::test]
async fn an_image_of_another_major_version_is_refused() {
    let mut runner = DockerRunner::new(options()).unwrap();
    let other = needs().major + 1;
    let error = runner.prepare(&Needs { major: other, ..needs() }).await.unwrap_err();
    assert_eq!(error.code(), "drill.image");
    let said = error.to_string();
    assert!(said.contains(&format!("has PostgreSQL {}, and the cluster is of PostgreSQL {other}", needs().major)), "{said}");
    let site = Restored::of("refused").site;
    assert!(runner.start(&site, &[]).await.is_err(), "a refused image runs nothing");
}

#[cfg(target_arch = "x86_64")]
#[tokio::test]
async fn an_image_with_musl_is_refused_unless_it_is_wanted() {
    // A program is musl's when it names musl's loader; this one is glibc's under that name.
    const NAME: &[u8] = b"/ld-linux-x86-64.so.2\0";
    const MUSL: &[u8] = b"/lib/ld-musl-x86_64.so.1";
    let program = install().program("postgres").unwrap();
    let mut bytes = fs::read(&program).unwrap();
    let name = bytes.windows(NAME.len()).position(|window| window == NAME).unwrap();
    let begin = bytes[..name].iter().rposition(|byte| !byte.is_ascii_graphic()).unwrap() + 1;
    let (old, end) = (String::from_utf8(bytes[begin..name + NAME.len() - 1].to_vec()).unwrap(), name + NAME.len());
    bytes[begin..end].fill(0);
    bytes[begin..begin + MUSL.len()].copy_from_slice(MUSL);
    let loader = fs::read(&old).unwrap();
    let path = program.to_str().unwrap().trim_start_matches('/').to_owned();
    let files: [(&str, &[u8]); 2] = [("usr/lib/ld-musl-x86_64.so.1", &loader), (&path, &bytes)];
    let image = Podman::shared().unwrap().image_with(install().bin(), &files).unwrap();
    let options = DockerOptions { image: Some(image), ..options() };
    let error = DockerRunner::new(options.clone()).unwrap().prepare(&needs()).await.unwrap_err();
    assert!(error.to_string().contains("has musl") && error.code() == "drill.image", "{error}");
    assert!(error.hint().unwrap().contains("Debian"), "{error:?}");
    let runner = prepared(DockerOptions { accept_musl: true, ..options.clone() }).await;
    assert!(runner.describe().contains("docker, "));

    // With musl's loader beside it, a program of glibc is one of glibc. One that was moved here from another system names its loader elsewhere.
    if begin < 4096 {
        let image = Podman::shared().unwrap().image_with(install().bin(), &files[..1]).unwrap();
        drop(prepared(DockerOptions { image: Some(image), ..options }).await);
    }
}

#[tokio::test]
async fn an_image_that_was_built_for_drills_is_taken_before_the_official_one() {
    let options = options();
    let own = image::own(needs().major);
    podman(&["tag", options.image.as_ref().unwrap(), &own]);
    let runner = prepared(DockerOptions { image: None, ..options }).await;
    assert!(runner.describe().contains(&own), "{}", runner.describe());
    podman(&["rmi", &own]);
}

#[tokio::test]
async fn a_container_with_less_memory_than_its_buffers_is_refused() {
    let options = DockerOptions { memory: Some(128 << 20), ..options() };
    let error = DockerRunner::new(options).unwrap().prepare(&Needs { shared_buffers: 128 << 20, ..needs() }).await.unwrap_err();
    assert_eq!(error.code(), "drill.memory");
    assert_eq!(error.hint(), Some("allow it 192 MiB at least"));
}

#[tokio::test]
async fn an_image_and_a_service_that_are_not_there_are_told_with_what_to_do() {
    let options = DockerOptions { image: Some("localhost/pgvault-test:absent".to_owned()), ..options() };
    let error = DockerRunner::new(options.clone()).unwrap().prepare(&needs()).await.unwrap_err();
    assert_eq!(error.code(), "drill.image");
    assert!(error.to_string().contains("localhost/pgvault-test:absent is not on this machine"), "{error}");
    assert!(error.hint().unwrap().contains("`pgvault verify build-image`"), "{error:?}");

    let folder = tempfile::tempdir().unwrap();
    let options = DockerOptions { socket: Some(folder.path().join("docker.sock")), ..options };
    let error = DockerRunner::new(options).unwrap().prepare(&needs()).await.unwrap_err();
    assert!(error.to_string().contains(&format!("{}/docker.sock", folder.path().display())), "{error}");
    assert!(error.hint().unwrap().contains("--runner process"), "{error:?}");
}
