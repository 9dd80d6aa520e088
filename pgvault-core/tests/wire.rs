//! The connection, replication and base backup modules against a real PostgreSQL.
//!
//! Needs the server binaries of PostgreSQL 15 or later (`PGVAULT_PG_BIN`, default Debian's place) and `openssl`; without
//! PostgreSQL the tests say so and pass.

// The helpers outside of test functions panic like these.
#![allow(clippy::unwrap_used, clippy::print_stderr, clippy::format_push_string)]

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use pgvault_core::postgres::{
    Acknowledgement, BackupEvent, BaseBackupOptions, ConnInfo, Connection, EntryKind, Lsn, Mode, SegmentName, ServerError,
    SlotState, WalMessage, WalSegNo, quote_literal, sqlstate,
};
use pgvault_core::{Error, ErrorKind};

/// A throwaway cluster, stopped and removed when dropped.
struct Cluster {
    dir: tempfile::TempDir,
    port: u16,
}

fn bin() -> PathBuf {
    std::env::var_os("PGVAULT_PG_BIN").map_or_else(|| "/usr/lib/postgresql/15/bin".into(), PathBuf::from)
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// PostgreSQL refuses to run as root.
fn as_postgres(program: impl AsRef<std::ffi::OsStr>) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("runuser");
    command.args(["-u", "postgres", "--"]).arg(program);
    command
}

fn run(command: &mut Command) {
    // Not `output()`: a server that was started would keep the pipe open.
    let status = command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}

fn give_to_postgres(path: &Path) {
    if is_root() {
        run(Command::new("chown").arg("-R").arg("postgres").arg(path));
    }
}

impl Cluster {
    /// Prepares a cluster without starting it. `None` when there is no PostgreSQL.
    fn new(conf: &str, hba: &str) -> Option<Self> {
        if !bin().join("initdb").exists() {
            eprintln!("skipped: no PostgreSQL in {}", bin().display());
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        give_to_postgres(dir.path());
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let this = Self { dir, port };
        let data = this.data();
        let mut initdb = as_postgres(bin().join("initdb"));
        initdb.args(["-N", "-k", "-U", "postgres", "--wal-segsize=1", "-E", "UTF8", "--locale=C.UTF-8", "-A", "trust", "-D"]);
        run(initdb.arg(&data));
        let mut all = std::fs::read_to_string(data.join("postgresql.conf")).unwrap();
        let sockets = this.dir.path().display();
        all.push_str(&format!("port = {port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{sockets}'\n"));
        all.push_str("fsync = off\nwal_sender_timeout = 6s\n");
        all.push_str(conf);
        std::fs::write(data.join("postgresql.conf"), all).unwrap();
        std::fs::write(data.join("pg_hba.conf"), hba).unwrap();
        Some(this)
    }

    fn started(conf: &str) -> Option<Self> {
        let hba = "local all all trust\nlocal replication all trust\nhost all all 127.0.0.1/32 trust\n";
        let this = Self::new(conf, hba)?;
        this.start();
        Some(this)
    }

    fn start(&self) {
        let log = self.dir.path().join("log");
        run(as_postgres(bin().join("pg_ctl")).args(["-w", "-s", "start", "-l"]).arg(log).arg("-D").arg(self.data()));
    }

    fn stop(&self, seconds: u32) -> bool {
        let mut command = as_postgres(bin().join("pg_ctl"));
        command.args(["-w", "-s", "stop", "-m", "fast", "-t", &seconds.to_string(), "-D"]).arg(self.data());
        command.status().unwrap().success()
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn socket(&self) -> String {
        format!("host={} port={} user=postgres dbname=postgres", self.dir.path().display(), self.port)
    }

    fn tcp(&self, more: &str) -> String {
        format!("host=127.0.0.1 port={} dbname=postgres {more}", self.port)
    }

    async fn sql(&self) -> Connection {
        connect(&self.socket(), Mode::Sql).await.unwrap()
    }

    async fn replication(&self) -> Connection {
        connect(&self.socket(), Mode::Replication).await.unwrap()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.data().join("postmaster.pid").exists() {
            let mut command = as_postgres(bin().join("pg_ctl"));
            let _ = command.args(["-w", "-s", "stop", "-m", "immediate", "-D"]).arg(self.data()).status();
        }
    }
}

async fn connect(conninfo: &str, mode: Mode) -> Result<Connection, Error> {
    Connection::connect(&ConnInfo::parse(conninfo, &|_| None)?, mode).await
}

fn state(error: &Error) -> &str {
    ServerError::of(error).map_or("", |server| server.sqlstate.as_str())
}

#[tokio::test]
async fn sessions_over_a_socket() {
    let Some(cluster) = Cluster::started("") else { return };
    let mut connection = cluster.sql().await;
    assert!(connection.server_major().unwrap() >= 15 && !connection.is_encrypted());
    let sets = connection.simple_query("SELECT 1 AS a, NULL AS b, 'á' AS c; SELECT 2; ").await.unwrap();
    assert_eq!(sets.len(), 2);
    assert_eq!(sets[0].columns, ["a", "b", "c"]);
    assert_eq!((sets[0].rows[0].text(1).unwrap(), sets[0].rows[0].text(2).unwrap()), (None, Some("á")));
    let error = connection.simple_query("SELECT 1/0").await.unwrap_err();
    assert_eq!((state(&error), error.kind()), ("22012", ErrorKind::Source));
    connection.simple_query("DO $$ BEGIN RAISE WARNING 'careful'; END $$").await.unwrap();
    assert_eq!(connection.take_notices()[0].message, "careful");
    let hostile = r#"a'b\"c"#;
    let row = connection.query_one(&format!("SELECT {}", quote_literal(hostile))).await.unwrap();
    assert_eq!(row.text(0).unwrap(), Some(hostile));
    assert_eq!(connection.simple_query("SELECT 1\0").await.unwrap_err().kind(), ErrorKind::Usage);
    assert_eq!(connection.simple_query("COPY pg_class TO STDOUT").await.unwrap_err().code(), "source.protocol");

    // Hosts in their order: nothing listens at the first.
    let hosts = format!("host=/nonexistent,{} port={} user=postgres", cluster.dir.path().display(), cluster.port);
    connect(&hosts, Mode::Sql).await.unwrap().close().await;
    assert!(connect(&format!("{hosts} target_session_attrs=read-write"), Mode::Replication).await.is_ok());
    assert!(connect(&format!("{hosts} target_session_attrs=prefer-standby"), Mode::Sql).await.is_ok());
    let error = connect(&format!("{hosts} target_session_attrs=standby"), Mode::Sql).await.unwrap_err();
    assert_eq!(error.code(), "source.session_attrs");
    assert_eq!(connect("host=127.0.0.1 port=1 user=x", Mode::Sql).await.unwrap_err().code(), "source.connect");

    // H19: a statement that takes longer than it may.
    let mut connection = cluster.sql().await;
    connection.set_idle_timeout(Some(Duration::from_millis(200)));
    assert_eq!(connection.simple_query("SELECT pg_sleep(60)").await.unwrap_err().code(), "source.timeout");
    assert!(!connection.is_idle());
}

/// H19: an address that accepts and then says nothing, and one that talks nonsense.
#[tokio::test]
async fn h19_a_mute_server_is_given_up() {
    use tokio::io::AsyncWriteExt;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok((mut socket, _)) = listener.accept().await {
            if kept.len() == 3 {
                socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
            }
            kept.push(socket);
        }
    });
    for more in ["sslmode=disable", "sslmode=prefer", "sslmode=require sslnegotiation=direct"] {
        let started = Instant::now();
        let conninfo = format!("host=127.0.0.1 port={port} user=u connect_timeout=1 {more}");
        assert_eq!(connect(&conninfo, Mode::Sql).await.unwrap_err().code(), "source.timeout", "{more}");
        assert!(started.elapsed() < Duration::from_secs(4));
    }
    let conninfo = format!("host=127.0.0.1 port={port} user=u connect_timeout=5 sslmode=disable");
    assert_eq!(connect(&conninfo, Mode::Sql).await.unwrap_err().code(), "source.protocol");
}

/// Certification authorities, a server certificate for `db.test`, a client's, and those of the manual's recipes.
fn make_certificates(dir: &Path) {
    let openssl = |args: &[&str]| run(Command::new("openssl").current_dir(dir).args(args));
    let self_signed = |name: &str, subject: &str| {
        let (key, crt) = (format!("{name}.key"), format!("{name}.crt"));
        openssl(&["req", "-new", "-x509", "-nodes", "-days", "2", "-subj", subject, "-keyout", &key, "-out", &crt]);
    };
    self_signed("ca", "/CN=ca");
    self_signed("other", "/CN=other");
    std::fs::write(dir.join("san"), "subjectAltName=DNS:db.test\n").unwrap();
    let issue = |name: &str, subject: &str, more: &[&str]| {
        let (key, csr, crt) = (format!("{name}.key"), format!("{name}.csr"), format!("{name}.crt"));
        openssl(&["req", "-new", "-nodes", "-subj", subject, "-keyout", &key, "-out", &csr]);
        let sign =
            ["x509", "-req", "-in", &csr, "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-out", &crt];
        openssl(&[&sign[..], more].concat());
    };
    issue("server", "/CN=ignored", &["-sha384", "-extfile", "san"]);
    issue("client", "/CN=certuser", &["-extfile", "san"]);
    // The recipes of PostgreSQL's manual: X.509 version 1, and self-signed with nothing but a common name.
    issue("v1", "/CN=db.test", &[]);
    self_signed("own", "/CN=db.test");
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

#[tokio::test]
async fn passwords_and_tls() {
    let hba = "local all postgres trust\n\
               host all md5user 127.0.0.1/32 md5\n\
               host all clearuser 127.0.0.1/32 password\n\
               hostssl all certuser 127.0.0.1/32 cert\n\
               hostssl all tlsuser 127.0.0.1/32 scram-sha-256\n\
               hostnossl all plainuser 127.0.0.1/32 scram-sha-256\n\
               host all scramuser 127.0.0.1/32 scram-sha-256\n\
               host replication all 127.0.0.1/32 scram-sha-256\n";
    let conf = "ssl = on\nssl_cert_file = 'server.crt'\nssl_key_file = 'server.key'\nssl_ca_file = 'ca.crt'\n";
    let Some(cluster) = Cluster::new(conf, hba) else { return };
    let dir = tempfile::tempdir().unwrap();
    make_certificates(dir.path());
    let install = |name: &str| {
        for (from, to) in
            [(format!("{name}.crt"), "server.crt"), (format!("{name}.key"), "server.key"), ("ca.crt".into(), "ca.crt")]
        {
            let to = cluster.data().join(to);
            std::fs::copy(dir.path().join(from), &to).unwrap();
            set_mode(&to, 0o600);
        }
        give_to_postgres(&cluster.data());
    };
    install("server");
    cluster.start();
    let mut admin = cluster.sql().await;
    let mut setup = "SET password_encryption = 'scram-sha-256';".to_owned();
    for user in ["scramuser", "clearuser", "tlsuser", "plainuser", "certuser"] {
        setup.push_str(&format!("CREATE ROLE {user} LOGIN REPLICATION PASSWORD 'se cret';"));
    }
    setup.push_str("SET password_encryption = 'md5'; CREATE ROLE md5user LOGIN PASSWORD 'se cret';");
    admin.simple_query(&setup).await.unwrap();

    for (user, tls) in [("scramuser", true), ("md5user", true), ("clearuser", true), ("tlsuser", true), ("plainuser", false)] {
        let connection = connect(&cluster.tcp(&format!("user={user} password='se cret'")), Mode::Sql).await;
        assert_eq!(connection.unwrap().is_encrypted(), tls, "{user}");
        let wrong = connect(&cluster.tcp(&format!("user={user} password=wrong")), Mode::Sql).await.unwrap_err();
        assert_eq!(state(&wrong), sqlstate::INVALID_PASSWORD, "{user}: {wrong}");
        let none = connect(&cluster.tcp(&format!("user={user}")), Mode::Sql).await.unwrap_err();
        assert_eq!(none.code(), "source.auth", "{user}: {none}");
    }

    // .pgpass, with the database field that pg_basebackup uses.
    let passfile = dir.path().join("pgpass");
    std::fs::write(&passfile, format!("127.0.0.1:{}:replication:scramuser:se cret\n", cluster.port)).unwrap();
    set_mode(&passfile, 0o600);
    let with_file = cluster.tcp(&format!("user=scramuser passfile={}", passfile.display()));
    connect(&with_file, Mode::Replication).await.unwrap().identify_system().await.unwrap();
    assert_eq!(connect(&with_file, Mode::Sql).await.unwrap_err().code(), "source.auth");
    set_mode(&passfile, 0o644);
    assert_eq!(connect(&with_file, Mode::Replication).await.unwrap_err().code(), "source.auth");

    // Every sslmode. `host` is the name to verify, `hostaddr` the way there.
    let named = |host: &str, user: &str, more: &str| {
        let more = more.replace("ROOT", dir.path().to_str().unwrap());
        format!("host={host} hostaddr=127.0.0.1 port={} dbname=postgres user={user} password='se cret' {more}", cluster.port)
    };
    let cases = [
        ("db.test", "scramuser", "sslmode=disable", Ok(false)),
        ("db.test", "tlsuser", "sslmode=disable", Err("source.server")),
        ("db.test", "scramuser", "sslmode=allow", Ok(false)),
        ("db.test", "tlsuser", "sslmode=allow", Ok(true)),
        ("db.test", "scramuser", "sslmode=prefer", Ok(true)),
        ("db.test", "plainuser", "sslmode=prefer", Ok(false)),
        ("db.test", "scramuser", "sslmode=require", Ok(true)),
        ("db.test", "plainuser", "sslmode=require", Err("source.server")),
        ("other.test", "scramuser", "sslmode=require sslrootcert=ROOT/ca.crt", Ok(true)),
        ("db.test", "scramuser", "sslmode=require sslrootcert=ROOT/other.crt", Err("source.tls")),
        ("other.test", "scramuser", "sslmode=verify-ca sslrootcert=ROOT/ca.crt", Ok(true)),
        ("db.test", "scramuser", "sslmode=verify-ca sslrootcert=ROOT/other.crt", Err("source.tls")),
        ("db.test", "scramuser", "sslmode=verify-full sslrootcert=ROOT/ca.crt", Ok(true)),
        ("db.test", "scramuser", "sslmode=verify-full sslrootcert=ROOT/ca.crt ssl_min_protocol_version=TLSv1.3", Ok(true)),
        ("other.test", "scramuser", "sslmode=verify-full sslrootcert=ROOT/ca.crt", Err("source.tls")),
        ("ignored", "scramuser", "sslmode=verify-full sslrootcert=ROOT/ca.crt", Err("source.tls")),
        ("127.0.0.1", "scramuser", "sslmode=verify-full sslrootcert=ROOT/ca.crt", Err("source.tls")),
        ("db.test", "scramuser", "sslmode=verify-full sslrootcert=ROOT/other.crt", Err("source.tls")),
        ("db.test", "scramuser", "sslmode=verify-full", Err("source.tls_config")),
        ("db.test", "scramuser", "sslmode=require channel_binding=require", Ok(true)),
        ("db.test", "scramuser", "sslmode=require channel_binding=disable", Ok(true)),
        ("db.test", "scramuser", "sslmode=disable channel_binding=require", Err("source.auth")),
        ("db.test", "clearuser", "sslmode=require channel_binding=require", Err("source.auth")),
        ("db.test", "certuser", "sslmode=require", Err("source.server")),
        ("db.test", "certuser", "sslmode=require sslcert=ROOT/client.crt sslkey=ROOT/client.key", Ok(true)),
        ("db.test", "tlsuser", "sslmode=require sslcert=ROOT/none.crt sslkey=ROOT/client.key", Err("io")),
    ];
    set_mode(&dir.path().join("client.key"), 0o600);
    for (host, user, more, expected) in cases {
        let outcome = connect(&named(host, user, more), Mode::Sql).await;
        let got = outcome.as_ref().map(Connection::is_encrypted).map_err(Error::code);
        assert_eq!(got, expected, "{host} {user} {more}: {:?}", outcome.err());
    }
    set_mode(&dir.path().join("client.key"), 0o644);
    let open = "sslmode=require sslcert=ROOT/client.crt sslkey=ROOT/client.key";
    assert_eq!(connect(&named("db.test", "certuser", open), Mode::Sql).await.unwrap_err().code(), "source.tls_config");

    // Certificates made by the manual's recipes.
    let reload = async |name: &str| {
        install(name);
        cluster.sql().await.simple_query("SELECT pg_reload_conf(); SELECT pg_sleep(1)").await.unwrap();
    };
    reload("v1").await;
    let bound = "sslmode=require channel_binding=require";
    connect(&named("db.test", "scramuser", bound), Mode::Sql).await.unwrap();
    let error =
        connect(&named("db.test", "scramuser", "sslmode=verify-full sslrootcert=ROOT/ca.crt"), Mode::Sql).await.unwrap_err();
    assert!(error.code() == "source.tls" && error.hint().unwrap().contains("version 1"), "{error:?}");
    reload("own").await;
    let own = "sslmode=verify-full sslrootcert=ROOT/own.crt channel_binding=require";
    connect(&named("db.test", "scramuser", own), Mode::Sql).await.unwrap();
    assert_eq!(connect(&named("other.test", "scramuser", own), Mode::Sql).await.unwrap_err().code(), "source.tls");
}

#[tokio::test]
async fn slots_and_streaming() {
    let Some(cluster) = Cluster::started("wal_keep_size = 200MB\n") else { return };
    let mut sql = cluster.sql().await;
    let mut connection = cluster.replication().await;
    let identity = connection.identify_system().await.unwrap();
    let control = sql.query_one("SELECT system_identifier FROM pg_control_system()").await.unwrap();
    assert_eq!(control.text(0).unwrap(), Some(identity.system_id.to_string().as_str()));
    assert_eq!((identity.timeline.0, identity.dbname.as_deref()), (1, None));
    let size = connection.wal_segment_size().await.unwrap();
    assert_eq!(size.bytes(), 1 << 20);
    assert_eq!(connection.show("server_version_num").await.unwrap().len(), 6);
    assert_eq!(connection.show("x; DROP").await.unwrap_err().kind(), ErrorKind::Usage);
    assert_eq!(connection.timeline_history(identity.timeline).await.unwrap(), None);

    // The life of a slot (R4).
    assert_eq!(connection.read_replication_slot("plain").await.unwrap(), SlotState::Missing);
    connection.create_physical_slot("plain", false, false).await.unwrap();
    assert_eq!(connection.read_replication_slot("plain").await.unwrap(), SlotState::Unreserved);
    connection.create_physical_slot("vault", false, true).await.unwrap();
    let slot = connection.read_replication_slot("vault").await.unwrap();
    let SlotState::Reserved { restart_lsn, restart_timeline } = slot else { panic!("{slot:?}") };
    assert_eq!(restart_timeline, identity.timeline);
    let error = connection.create_physical_slot("vault", false, true).await.unwrap_err();
    assert_eq!(state(&error), sqlstate::DUPLICATE_OBJECT);
    connection.create_physical_slot("temporary", true, true).await.unwrap();
    let hostile = "b\"ad'); \\";
    let error = connection.create_physical_slot(hostile, false, true).await.unwrap_err();
    // Up to 15.18 the grammar of replication commands itself refuses some of these.
    assert!(["42602", "42601"].contains(&state(&error)), "{error}");
    match connection.read_replication_slot(hostile).await {
        Ok(found) => assert_eq!(found, SlotState::Missing),
        Err(error) => assert_eq!(state(&error), "42601", "{error}"),
    }
    connection.drop_slot("plain").await.unwrap();
    assert_eq!(state(&connection.drop_slot("plain").await.unwrap_err()), sqlstate::UNDEFINED_OBJECT);

    // R3: the stream across segment boundaries is what is in pg_wal.
    sql.simple_query("CREATE TABLE t AS SELECT g, repeat('x', 100) AS filler FROM generate_series(1, 30000) g").await.unwrap();
    let end: Lsn = sql.query_one("SELECT pg_current_wal_flush_lsn()").await.unwrap().required(0).unwrap().parse().unwrap();
    let start = WalSegNo::containing(restart_lsn, size).start(size);
    // The server agrees to stream first and looks at the position afterwards; the connection survives it.
    let mut stream = connection.start_replication(Some("vault"), Lsn(0xF_0000_0000), identity.timeline).await.unwrap();
    let error = stream.next().await.unwrap_err();
    assert!(error.to_string().contains("ahead"), "{error}");
    assert_eq!(stream.next().await.unwrap_err().code(), "source.stream_ended");
    let mut stream = connection.start_replication(Some("vault"), start, identity.timeline).await.unwrap();
    let mut received = Vec::new();
    while stream.received() < end {
        if let WalMessage::Data { start, bytes, server_end, server_time } = stream.next().await.unwrap() {
            assert!(server_end >= start.advance(bytes.len() as u64) && (Timestamp::now() - server_time).get_hours() < 1);
            received.extend_from_slice(&bytes);
        }
    }
    assert!(received.len() > 3 << 20, "{} bytes", received.len());
    let mut on_disk = Vec::new();
    let mut number = WalSegNo::containing(start, size);
    while number.start(size) < end {
        let name = SegmentName::new(identity.timeline, number, size);
        on_disk.extend(std::fs::read(cluster.data().join("pg_wal").join(name.to_string())).unwrap());
        number = number.next();
    }
    assert!(on_disk.starts_with(&received));

    // R2: what is acknowledged moves the slot, what must not be is not sent.
    let received = stream.received();
    let ack = |write, flush, apply| Acknowledgement { write, flush, apply };
    let error = stream.send_status(ack(received.advance(1), Lsn(0), Lsn(0)), false, Timestamp::now()).await.unwrap_err();
    assert_eq!(error.code(), "wal.ack_refused");
    stream.send_status(ack(received, received, Lsn(0)), true, Timestamp::now()).await.unwrap();
    while !matches!(stream.next().await.unwrap(), WalMessage::Keepalive { .. }) {}
    let mut second = cluster.replication().await;
    let error = second.start_replication(Some("vault"), start, identity.timeline).await.map(drop).unwrap_err();
    assert_eq!(state(&error), sqlstate::OBJECT_IN_USE);
    stream.stop().await.unwrap();
    let after = connection.read_replication_slot("vault").await.unwrap();
    assert_eq!(after, SlotState::Reserved { restart_lsn: received, restart_timeline: identity.timeline });

    // Waits that are dropped half-way lose nothing.
    let mut stream = connection.start_replication(None, start, identity.timeline).await.unwrap();
    let mut again = Vec::new();
    while stream.received() < received {
        if let Ok(message) = tokio::time::timeout(Duration::from_micros(50), stream.next()).await
            && let WalMessage::Data { bytes, .. } = message.unwrap()
        {
            again.extend_from_slice(&bytes);
        }
    }
    assert!(on_disk.starts_with(&again));
    // The stream was not ended.
    assert_eq!(connection.identify_system().await.unwrap_err().code(), "source.busy");
}

/// R1: with everything received and acknowledged as durable, a fast shutdown takes no time and is told from a failure.
#[tokio::test(flavor = "multi_thread")]
async fn r1_a_fast_shutdown_while_streaming() {
    let Some(cluster) = Cluster::started("") else { return };
    let mut connection = cluster.replication().await;
    let identity = connection.identify_system().await.unwrap();
    let size = connection.wal_segment_size().await.unwrap();
    connection.create_physical_slot("vault", false, true).await.unwrap();
    let start = WalSegNo::containing(identity.flush_lsn, size).start(size);
    let mut stream = connection.start_replication(Some("vault"), start, identity.timeline).await.unwrap();
    let stopping = tokio::task::spawn_blocking(move || {
        std::thread::sleep(Duration::from_millis(300));
        let started = Instant::now();
        (cluster.stop(20), started.elapsed(), cluster)
    });
    let mut keepalives = 0;
    let error = loop {
        match stream.next().await {
            Ok(WalMessage::Keepalive { reply_requested, .. }) => {
                keepalives += 1;
                if !reply_requested {
                    continue;
                }
            }
            Ok(_) => {}
            Err(error) => break error,
        }
        let at = stream.received();
        stream.send_status(Acknowledgement { write: at, flush: at, apply: Lsn(0) }, false, Timestamp::now()).await.unwrap();
    };
    let (stopped, took, _cluster) = stopping.await.unwrap();
    assert!(stopped && took < Duration::from_secs(5) && keepalives < 100, "{stopped} {took:?} {keepalives}");
    assert_eq!(error.code(), "source.shutdown", "{error:?}");
}

/// R6: a standby is promoted while it is streamed from.
#[tokio::test]
async fn r6_the_end_of_a_timeline() {
    // A standby without a primary: recovery waits for WAL that never comes, until it is promoted.
    let Some(cluster) = Cluster::started("wal_keep_size = 200MB\n") else { return };
    assert!(cluster.stop(20));
    std::fs::write(cluster.data().join("standby.signal"), "").unwrap();
    give_to_postgres(&cluster.data());
    cluster.start();
    let mut sql = connect(&format!("{} target_session_attrs=standby", cluster.socket()), Mode::Sql).await.unwrap();
    let mut connection = cluster.replication().await;
    let identity = connection.identify_system().await.unwrap();
    let size = connection.wal_segment_size().await.unwrap();
    let start = WalSegNo::containing(identity.flush_lsn, size).start(size);
    let mut stream = connection.start_replication(None, start, identity.timeline).await.unwrap();
    sql.simple_query("SELECT pg_promote()").await.unwrap();
    let (next_timeline, next_start) = loop {
        if let WalMessage::EndOfTimeline { next_timeline, next_start } = stream.next().await.unwrap() {
            break (next_timeline, next_start);
        }
    };
    assert!(next_timeline.0 == 2 && next_start <= stream.received() && next_start > start);
    let history = connection.timeline_history(next_timeline).await.unwrap().unwrap();
    assert_eq!(history.name, "00000002.history");
    assert_eq!(&history.content[..], std::fs::read(cluster.data().join("pg_wal/00000002.history")).unwrap());
    // At the very end of the old timeline there is nothing left to copy; beyond it there is another history.
    let mut stream = connection.start_replication(None, next_start, identity.timeline).await.unwrap();
    assert_eq!(stream.next().await.unwrap(), WalMessage::EndOfTimeline { next_timeline, next_start });
    let beyond = next_start.advance(1 << 20);
    let error = connection.start_replication(None, beyond, identity.timeline).await.map(drop).unwrap_err();
    assert!(error.to_string().contains("not in this server's history"), "{error}");
    let next = WalSegNo::containing(next_start, size).start(size);
    let mut stream = connection.start_replication(None, next, next_timeline).await.unwrap();
    assert!(matches!(stream.next().await.unwrap(), WalMessage::Data { start, .. } if start == next));
    stream.stop().await.unwrap();
    assert_eq!(connection.identify_system().await.unwrap().timeline, next_timeline);
}

/// What a base backup brought.
#[derive(Default)]
struct Collected {
    /// Archive and path to content; `None` for what is not a file.
    entries: BTreeMap<(String, String), Option<Vec<u8>>>,
    archives: Vec<(String, String)>,
    tablespaces: usize,
    checksum_failures: bool,
    largest: usize,
}

async fn collect(connection: &mut Connection) -> Result<Collected, Error> {
    let options = BaseBackupOptions { label: "it's a \\ 'label'".to_owned(), fast_checkpoint: true, max_rate: None };
    let mut backup = connection.base_backup(&options)?;
    let mut all = Collected::default();
    let mut key = (String::new(), String::new());
    let mut positions = Vec::new();
    while let Some(event) = backup.next().await? {
        match event {
            BackupEvent::Start { lsn, .. } => positions.push(lsn),
            BackupEvent::Tablespaces(found) => all.tablespaces = found.len(),
            BackupEvent::ArchiveBegin { name, location } => {
                key.0.clone_from(&name);
                all.archives.push((name, location));
            }
            BackupEvent::Entry(entry) => {
                key.1.clone_from(&entry.path);
                let content = (entry.kind == EntryKind::File).then(Vec::new);
                assert!(all.entries.insert(key.clone(), content).is_none(), "{key:?} twice");
            }
            BackupEvent::Data(bytes) => {
                all.largest = all.largest.max(bytes.len());
                all.entries.get_mut(&key).unwrap().as_mut().unwrap().extend_from_slice(&bytes);
            }
            BackupEvent::End { lsn, checksum_failures, .. } => {
                positions.push(lsn);
                all.checksum_failures = checksum_failures;
            }
            BackupEvent::EntryEnd | BackupEvent::Progress(_) | BackupEvent::ArchiveEnd => {}
        }
    }
    assert!(positions.len() == 2 && positions[0] < positions[1]);
    Ok(all)
}

#[tokio::test]
async fn h15_a_base_backup_with_tablespaces() {
    let Some(cluster) = Cluster::started("autovacuum = off\n") else { return };
    let mut sql = cluster.sql().await;
    // CREATE TABLESPACE refuses the single quote; the recorded answer of the unit tests has one.
    let hostile = r#"spa ce "q" \bslash ácé"#;
    for (name, directory) in [("used", hostile), ("unused", "empty one")] {
        let path = cluster.dir.path().join(directory);
        std::fs::create_dir(&path).unwrap();
        give_to_postgres(&path);
        let location = quote_literal(path.to_str().unwrap());
        sql.simple_query(&format!("CREATE TABLESPACE {name} LOCATION {location}")).await.unwrap();
    }
    sql.simple_query("CREATE TABLE a TABLESPACE used AS SELECT g FROM generate_series(1, 50000) g").await.unwrap();
    sql.simple_query("CREATE TABLE b AS SELECT g FROM generate_series(1, 500000) g").await.unwrap();
    sql.simple_query("CHECKPOINT").await.unwrap();
    let catalog = "SELECT oid, pg_tablespace_location(oid) FROM pg_tablespace WHERE oid >= 16384 ORDER BY 1";
    let oids: Vec<(String, String)> = sql.simple_query(catalog).await.unwrap()[0]
        .rows
        .iter()
        .map(|row| (row.required(0).unwrap().to_owned(), row.required(1).unwrap().to_owned()))
        .collect();
    assert!(oids[0].1.ends_with(hostile));
    let mut connection = cluster.replication().await;
    let backup = collect(&mut connection).await.unwrap();
    assert!(connection.is_idle() && !backup.checksum_failures);

    // base.tar comes last, and the locations are what the catalog says.
    let mut archives = backup.archives.clone();
    assert_eq!(archives.pop(), Some(("base.tar".to_owned(), String::new())));
    archives.sort();
    assert_eq!(archives, oids.iter().map(|(oid, location)| (format!("{oid}.tar"), location.clone())).collect::<Vec<_>>());
    assert_eq!(backup.tablespaces, 3);
    let base = |path: &str| backup.entries.get(&("base.tar".to_owned(), path.to_owned()));
    let label = String::from_utf8(base("backup_label").unwrap().clone().unwrap()).unwrap();
    assert!(label.contains("LABEL: it's a \\ 'label'\n"), "{label}");
    assert!(base("tablespace_map").is_some() && base("pg_wal/archive_status") == Some(&None));
    assert!(!backup.entries.keys().any(|(_, path)| path.starts_with("pg_wal/0")));

    // Every file of the data directory and the tablespaces that does not change by itself.
    let mut compared = 0;
    let mut roots = vec![("base.tar".to_owned(), cluster.data())];
    roots.extend(oids.iter().map(|(oid, location)| (format!("{oid}.tar"), PathBuf::from(location))));
    for (archive, root) in roots {
        for entry in walkdir::WalkDir::new(&root).min_depth(1) {
            let entry = entry.unwrap();
            let path = entry.path().strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
            let relation = ["base/", "PG_", "global/", "postgresql"].iter().any(|prefix| path.starts_with(prefix));
            if !relation || !entry.file_type().is_file() || path.ends_with("pg_internal.init") || path.ends_with("pg_control") {
                continue;
            }
            let content = backup.entries.get(&(archive.clone(), path.clone())).unwrap_or_else(|| panic!("{path} is missing"));
            assert!(content.as_ref().unwrap() == &std::fs::read(entry.path()).unwrap(), "{path}");
            compared += 1;
        }
    }
    assert!(compared > 500 && backup.largest >= 16 << 10, "{compared} {}", backup.largest);

    // A page that is really damaged: a flag, a warning that names it, and nevertheless the whole backup.
    let path = sql.query_one("SELECT pg_relation_filepath('b')").await.unwrap().required(0).unwrap().to_owned();
    let file = std::fs::OpenOptions::new().write(true).open(cluster.data().join(&path)).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0x5A; 64], 8192 + 4000).unwrap();
    connection.take_notices();
    let damaged = collect(&mut connection).await.unwrap();
    assert!(damaged.checksum_failures && damaged.entries.len() == backup.entries.len());
    let notices = connection.take_notices();
    assert!(notices.iter().any(|notice| notice.message.contains(&path) && notice.message.contains("block 1")), "{notices:?}");
    connection.identify_system().await.unwrap();

    // An abandoned backup: the server notices the closed socket and can be stopped.
    let options = BaseBackupOptions { label: "abandoned".to_owned(), fast_checkpoint: true, max_rate: Some(64) };
    let mut backup = connection.base_backup(&options).unwrap();
    while !matches!(backup.next().await.unwrap(), Some(BackupEvent::Data(_))) {}
    drop(connection);
    assert!(cluster.stop(20));
}
