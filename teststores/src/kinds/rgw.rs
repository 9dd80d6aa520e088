//! Ceph's object gateway over a monitor and a storage daemon in memory: an S3 server of the real world, with signatures, users,
//! policies, versions, Object Lock and TLS.
//!
//! It comes from Debian's unstable release, because older ones refuse `If-Match` with a quoted tag, and runs in its root. The
//! gateway's own single-process mode (dbstore) is of no use: it drops conditions and locks. `auth = none` neither: the
//! gateway insists on Ceph's own authentication.

use std::time::Duration;

use anyhow::{Context, Result};
use pgvault_provision::debian::{Root, SHARED};
use pgvault_provision::run::run_quietly;

use crate::client::{Client, Key};
use crate::guard::{Process, Work, free_port};
use crate::server::{Info, Kind, Role, Running, Tls};
use crate::tls;

const PACKAGES: [&str; 4] = ["ceph-mon", "ceph-osd", "radosgw", "ceph-common"];

pub(crate) fn install() -> Result<Root> {
    let root = Root::unpacked("sid", "Ceph's object gateway is taken from Debian sid")?;
    let programs = ["ceph-mon", "ceph-osd", "radosgw", "ceph"];
    if !programs.iter().all(|name| root.path().join("usr/bin").join(name).is_file()) {
        root.install(&PACKAGES, None)?;
    }
    Ok(root)
}

pub(crate) fn start() -> Result<(Info, Running)> {
    let root = install()?;
    let work = Work::new("rgw")?;
    let mut ceph = Ceph { root, work, processes: Vec::new() };
    let started = ceph.start();
    match started {
        Ok(info) => Ok((info, Running { processes: ceph.processes, work: Some(ceph.work) })),
        // The servers said more than the programs that found them missing.
        Err(error) => {
            let said: Vec<String> = ceph.processes.iter().map(Process::said).filter(|said| !said.is_empty()).collect();
            if said.is_empty() { Err(error) } else { Err(error.context(said.join("\n"))) }
        }
    }
}

struct Ceph {
    root: Root,
    work: Work,
    processes: Vec<Process>,
}

impl Ceph {
    fn start(&mut self) -> Result<Info> {
        let (monitor, plain, encrypted) = (free_port()?, free_port()?, free_port()?);
        let cluster = uuid()?;
        let ca_file = tls::make(&self.work)?;
        self.configure(&cluster, monitor, plain, encrypted)?;
        for folder in ["mon", "osd", "rgw"] {
            let _ = self.work.folder(folder)?;
        }
        self.monitor(&cluster, monitor)?;
        self.storage()?;
        let mut info = Info::new(Kind::Rgw, format!("http://127.0.0.1:{plain}"), self.user(Role::Owner)?);
        for role in [Role::Writer, Role::Restorer, Role::Pruner] {
            let _ = info.keys.insert(role, self.user(role)?);
        }
        self.serve("radosgw", &["-n", "client.admin"])?;
        let client = Client::anonymous(&info.endpoint)?;
        client.wait_until_up(Duration::from_secs(120), || self.processes.iter().try_for_each(Process::ensure_running))?;
        info.tls = Some(Tls { endpoint: format!("https://localhost:{encrypted}"), ca_file });
        Ok(info)
    }

    fn configure(&self, cluster: &str, monitor: u16, plain: u16, encrypted: u16) -> Result<()> {
        let text = format!(
            "[global]
fsid = {cluster}
mon host = [v2:127.0.0.1:{monitor}/0]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = {SHARED}/keyring
run dir = {SHARED}
admin socket = {SHARED}/$name.asok
log file = {SHARED}/$name.ceph.log
debug default = 0/0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 2000
osd objectstore = memstore
memstore device bytes = {size}
# What tests delete is given back at once, and not in two hours.
rgw gc obj min wait = 1
rgw gc processor period = 5
rgw gc processor max time = 5
[mon.a]
mon data = {SHARED}/mon
[osd.0]
osd data = {SHARED}/osd
keyring = {SHARED}/osd/keyring
[client.admin]
rgw frontends = beast endpoint=127.0.0.1:{plain} ssl_endpoint=127.0.0.1:{encrypted} ssl_certificate={SHARED}/cert.pem ssl_private_key={SHARED}/key.pem
rgw data = {SHARED}/rgw
rgw crypt require ssl = false
",
            size = 12_u64 << 30
        );
        self.work.write("ceph.conf", &text).map(drop)
    }

    fn monitor(&mut self, cluster: &str, port: u16) -> Result<()> {
        let keyring = format!("{SHARED}/keyring");
        let map = format!("{SHARED}/monmap");
        let _ = self.run("ceph-authtool", &["--create-keyring", &keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *"])?;
        let mut admin = vec![keyring.as_str(), "--gen-key", "-n", "client.admin"];
        for daemon in ["mon", "osd", "mds", "mgr"] {
            admin.extend(["--cap", daemon, "allow *"]);
        }
        let _ = self.run("ceph-authtool", &admin)?;
        let address = format!("[v2:127.0.0.1:{port}]");
        let _ = self.run("monmaptool", &["--create", "--fsid", cluster, "--addv", "a", &address, &map])?;
        let _ = self.run("ceph-mon", &["-i", "a", "--mkfs", "--monmap", &map, "--keyring", &keyring])?;
        self.serve("ceph-mon", &["-i", "a"])
    }

    fn storage(&mut self) -> Result<()> {
        let id = uuid()?;
        let secret = self.run("ceph-authtool", &["--gen-print-key"])?;
        let secret = secret.trim();
        let _ = self.work.write("osd.json", &format!("{{\"cephx_secret\":\"{secret}\"}}"))?;
        // The monitor is waited for, and its end noticed.
        let _ = self.run("ceph", &["--connect-timeout", "60", "osd", "new", &id, "-i", &format!("{SHARED}/osd.json")])?;
        let keyring = format!("{SHARED}/osd/keyring");
        let _ = self.run("ceph-authtool", &["--create-keyring", &keyring, "-n", "osd.0", "--add-key", secret])?;
        let _ = self.run("ceph-osd", &["-i", "0", "--mkfs", "--osd-uuid", &id])?;
        self.serve("ceph-osd", &["-i", "0"])
    }

    fn user(&self, role: Role) -> Result<Key> {
        let key = Key { id: format!("{}-key", role.name()), secret: format!("the-secret-of-the-{}", role.name()) };
        let arguments = ["user", "create", "--uid", role.name(), "--display-name", role.name()];
        let mut arguments = arguments.to_vec();
        arguments.extend(["--access-key", &key.id, "--secret-key", &key.secret]);
        // Waits for the storage daemon, and makes the pools of the gateway.
        let _ = self.run("radosgw-admin", &arguments)?;
        Ok(key)
    }

    /// Runs a program to its end. One that waits for a server which has ended would wait for ever.
    fn run(&self, name: &str, arguments: &[&str]) -> Result<String> {
        self.processes.iter().try_for_each(Process::ensure_running)?;
        let mut command = self.root.command("timeout", Some(self.work.path()));
        command.args(["120", name]).args(arguments).args(Self::config(name));
        run_quietly(&mut command)
    }

    /// Starts a server.
    fn serve(&mut self, name: &str, arguments: &[&str]) -> Result<()> {
        let mut command = self.root.command(name, Some(self.work.path()));
        command.args(arguments).args(Self::config(name)).arg("-f");
        let process = self.work.start(name, &command)?;
        self.processes.push(process);
        Ok(())
    }

    /// The programs that make keyrings and maps know no configuration.
    fn config(name: &str) -> Vec<String> {
        match name {
            "ceph-authtool" | "monmaptool" => Vec::new(),
            _ => vec!["-c".to_owned(), format!("{SHARED}/ceph.conf")],
        }
    }
}

fn uuid() -> Result<String> {
    let path = "/proc/sys/kernel/random/uuid";
    Ok(std::fs::read_to_string(path).with_context(|| format!("read {path}"))?.trim().to_owned())
}
