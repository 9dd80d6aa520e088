//! Which Odoo databases a cluster has, and where the filestore of each is.
//!
//! Odoo's own configuration says most of it (`data_dir`, `db_name`, `dbfilter`, the connection); pgvault's wins. Where neither names
//! databases, all are asked, and those that have Odoo's tables are Odoo's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::database::{Odoo, databases};
use crate::config::OdooConfig;
use crate::postgres::{ConnInfo, SystemId};
use crate::{Error, ErrorKind, Result};

/// Where Odoo keeps its data when nobody says so: its Debian package and official image, then an installation of its own account.
const DATA_DIRS: [&str; 2] = ["/var/lib/odoo", "/var/lib/odoo/.local/share/Odoo"];

/// Odoo's configuration, as far as it matters here. Values that Odoo takes for "not given" are not given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OdooConf {
    options: BTreeMap<String, String>,
}

impl OdooConf {
    /// Reads `odoo.conf`.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when it cannot be read, or has no `[options]`.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| {
            Error::new(ErrorKind::Usage, "odoo.conf", format!("read {}: {e}", path.display()))
                .with_hint("check [cluster.NAME.odoo] config")
        })?;
        Self::parse(&text).map_err(|e| e.context(path.display()))
    }

    /// Reads the text of an `odoo.conf`, as Python's `ConfigParser` does.
    ///
    /// # Errors
    /// As [`OdooConf::read`].
    pub fn parse(text: &str) -> Result<Self> {
        let mut defaults = configparser::ini::Ini::new().defaults().clone();
        defaults.inline_comment_symbols = Some(Vec::new());
        defaults.multiline = true;
        let mut ini = configparser::ini::Ini::new_from_defaults(defaults);
        let failed = |why: String| Error::new(ErrorKind::Usage, "odoo.conf", why);
        let mut sections = ini.read(text.to_owned()).map_err(failed)?;
        let options = sections.remove("options").ok_or_else(|| failed("there is no [options]".into()))?;
        let given = |value: Option<String>| value.filter(|value| !value.is_empty() && value != "False" && value != "None");
        Ok(Self { options: options.into_iter().filter_map(|(key, value)| Some((key, given(value)?))).collect() })
    }

    /// An option.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.options.get(key).map(String::as_str)
    }

    /// `db_name`, a list.
    pub fn databases(&self) -> Vec<String> {
        let names = self.get("db_name").unwrap_or_default().split(',').map(str::trim);
        names.filter(|name| !name.is_empty()).map(str::to_owned).collect()
    }

    /// What libpq would be told.
    pub fn connection(&self) -> String {
        let keys =
            [("db_host", "host"), ("db_port", "port"), ("db_user", "user"), ("db_password", "password"), ("db_sslmode", "sslmode")];
        let quoted = |value: &str| value.replace('\\', "\\\\").replace('\'', "\\'");
        let mut words: Vec<String> =
            keys.iter().filter_map(|(ours, libpq)| Some(format!("{libpq}='{}'", quoted(self.get(ours)?)))).collect();
        words.push("dbname=postgres".into());
        words.join(" ")
    }
}

/// An Odoo database and its filestore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// The database.
    pub database: String,
    /// Its filestore, whether or not it is there.
    pub folder: PathBuf,
}

/// Where to look.
#[derive(Debug, Clone)]
pub struct Finder {
    config: OdooConfig,
    conf: OdooConf,
}

impl Finder {
    /// Reads Odoo's configuration, when there is one.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when it cannot be read.
    pub fn new(config: &OdooConfig) -> Result<Self> {
        let conf = config.config.as_deref().map(OdooConf::read).transpose()?.unwrap_or_default();
        Ok(Self { config: config.clone(), conf })
    }

    /// How to reach the server: what the cluster says, or else what Odoo's configuration does.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when that cannot be read.
    pub fn connection(&self, of_cluster: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<ConnInfo> {
        let text = if of_cluster.trim().is_empty() && self.conf.get("db_host").is_some() {
            self.conf.connection()
        } else {
            of_cluster.to_owned()
        };
        ConnInfo::parse(&text, env)
    }

    /// The filestore of a database.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when nobody says where Odoo's data are.
    pub fn folder(&self, database: &str) -> Result<PathBuf> {
        if let Some(folder) = self.config.filestores.get(database) {
            return Ok(folder.clone());
        }
        let configured = self.config.data_dir.clone().or_else(|| self.conf.get("data_dir").map(PathBuf::from));
        let usual = || DATA_DIRS.iter().map(PathBuf::from).find(|dir| dir.join("filestore").is_dir());
        let data_dir = configured.or_else(usual).ok_or_else(|| {
            Error::new(ErrorKind::Usage, "odoo.data_dir", "it is not known where Odoo keeps its files")
                .with_hint("say so: [cluster.NAME.odoo] data_dir = \"/var/lib/odoo\", or config = \"/etc/odoo/odoo.conf\"")
        })?;
        // A database called `..` would lead elsewhere.
        if database.contains('/') || matches!(database, "." | "..") {
            return Err(Error::new(ErrorKind::Usage, "odoo.database", format!("database `{database}` has no folder of its own")));
        }
        Ok(data_dir.join("filestore").join(database))
    }

    /// Directories that filestores are known to lie in.
    pub fn sources(&self) -> Vec<PathBuf> {
        let data_dir = self.config.data_dir.clone().or_else(|| self.conf.get("data_dir").map(PathBuf::from));
        let below = data_dir.map(|data_dir| data_dir.join("filestore"));
        below.into_iter().chain(self.config.filestores.values().cloned()).collect()
    }

    /// True when somebody names the database: it is meant to be Odoo's.
    pub fn names(&self, database: &str) -> bool {
        self.named().iter().any(|named| named == database)
    }

    /// The databases that somebody names.
    fn named(&self) -> Vec<String> {
        if self.config.databases.is_empty() { self.conf.databases() } else { self.config.databases.clone() }
    }

    /// The databases that may be Odoo's: those that somebody names, or all of the server that `dbfilter` lets through. Copies that were
    /// neutralised are among them.
    ///
    /// # Errors
    /// [`ErrorKind::Source`] when the server cannot be asked.
    pub async fn databases(&self, connection: &ConnInfo) -> Result<Vec<String>> {
        let named = self.named();
        if !named.is_empty() {
            return Ok(named);
        }
        let filter = self.filter();
        let all = databases(connection).await?.into_iter().map(|(database, _)| database);
        Ok(all.filter(|database| filter.as_ref().is_none_or(|filter| filter.is_match(database))).collect())
    }

    /// Finds the instances of a cluster. Without names, copies that were neutralised are none of them.
    ///
    /// # Errors
    /// [`ErrorKind::Source`] when the server cannot be asked, or a database that is named is not Odoo's.
    pub async fn find(&self, connection: &ConnInfo, system: SystemId) -> Result<Vec<Instance>> {
        let mut found = Vec::new();
        let named = self.named();
        for database in &named {
            found.push(Instance { database: database.clone(), folder: self.folder(database)? });
        }
        if !named.is_empty() {
            return Ok(found);
        }
        for database in self.databases(connection).await? {
            // The role may not be let into databases that are none of its business.
            match Odoo::connect(connection, &database, system).await {
                Ok(Some(odoo)) if !odoo.neutralised => found.push(Instance { folder: self.folder(&database)?, database }),
                Ok(_) => {}
                Err(error) if error.code() == "source.foreign" => return Err(error),
                Err(error) => tracing::warn!(%database, %error, "cannot be asked whether it is Odoo's"),
            }
        }
        Ok(found)
    }

    /// `dbfilter`, when it means the same for every host.
    fn filter(&self) -> Option<regex::Regex> {
        let text = self.conf.get("dbfilter").filter(|filter| !filter.contains("%h") && !filter.contains("%d"))?;
        // Python's `re.match`, which Odoo uses, begins at the beginning.
        match regex::Regex::new(&format!("^(?:{text})")) {
            Ok(filter) => Some(filter),
            Err(error) => {
                tracing::warn!(%error, "dbfilter cannot be read here; all databases are looked at");
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONF: &str = "# a comment\n[options]\naddons_path = /a,\n    /b\ndata_dir = /srv/odoo ; not a comment\ndb_host = False\ndb_name = shop, books\n\
                        db_password = it's\\so\nDB_USER = odoo\ndbfilter = ^shop.*$\nlist_db = True\n[queue_job]\nchannels = root:2\n";

    #[test]
    fn an_odoo_conf_is_read_as_python_reads_it() {
        let conf = OdooConf::parse(CONF).unwrap();
        assert_eq!(conf.get("data_dir"), Some("/srv/odoo ; not a comment"));
        assert_eq!((conf.get("db_host"), conf.get("db_user")), (None, Some("odoo")));
        assert_eq!(conf.databases(), ["shop", "books"]);
        let connection = ConnInfo::parse(&conf.connection(), &|_| None).unwrap();
        assert_eq!(secrecy::ExposeSecret::expose_secret(connection.password.as_ref().unwrap()), "it's\\so");
        assert_eq!(connection.user, "odoo");
        assert!(OdooConf::parse("[other]\nx = 1\n").is_err());
    }

    #[test]
    fn pgvaults_own_settings_win() {
        let conf = OdooConf::parse(CONF).unwrap();
        let finder = |config| Finder { config, conf: conf.clone() };
        assert_eq!(finder(OdooConfig::default()).folder("shop").unwrap(), Path::new("/srv/odoo ; not a comment/filestore/shop"));
        let config = OdooConfig { data_dir: Some("/data".into()), databases: vec!["x".into()], ..OdooConfig::default() };
        assert_eq!(finder(config.clone()).folder("shop").unwrap(), Path::new("/data/filestore/shop"));
        assert_eq!(finder(config.clone()).named(), ["x"]);
        let filestores = [("shop".to_owned(), PathBuf::from("/elsewhere"))].into();
        assert_eq!(finder(OdooConfig { filestores, ..config.clone() }).folder("shop").unwrap(), Path::new("/elsewhere"));
        assert!(finder(config).folder("..").is_err());
        let filter = finder(OdooConfig::default()).filter().unwrap();
        assert!(filter.is_match("shop_test") && !filter.is_match("my_shop"));
    }
}
