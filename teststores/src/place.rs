//! A place of one's own in a store, how pgvault reaches it, and a look into it behind pgvault's back.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3Builder, S3ConditionalPut};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::client::Certificate;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{ClientOptions, ObjectStore, ObjectStoreExt};

use crate::client::Client;
use crate::gate::Gate;
use crate::runtime::wait;
use crate::server::{Info, Kind, Role};

/// A prefix that nobody else uses.
#[derive(Debug, Clone)]
pub struct Place {
    /// Nothing for a directory.
    server: Option<Info>,
    /// The bucket, or the directory.
    bucket: String,
    prefix: String,
    role: Role,
}

impl Place {
    pub(crate) fn new(server: &Info, bucket: &str, prefix: &str) -> Result<Self> {
        let _ = server.key(Role::Owner)?;
        Ok(Self { server: Some(server.clone()), bucket: bucket.to_owned(), prefix: prefix.to_owned(), role: Role::Owner })
    }

    /// A directory, which need not exist yet.
    pub fn directory(path: &FilePath) -> Self {
        Self { server: None, bucket: path.display().to_string(), prefix: String::new(), role: Role::Owner }
    }

    /// What it is in.
    pub fn kind(&self) -> Kind {
        self.server.as_ref().map_or(Kind::Local, |server| server.kind)
    }

    /// The bucket or container, or the directory.
    pub fn bucket(&self) -> &str {
        &self.bucket
    }

    /// What comes before the name of every object, without the last slash; nothing for a directory.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The directory, where it is one.
    pub fn path(&self) -> Option<PathBuf> {
        self.server.is_none().then(|| PathBuf::from(&self.bucket))
    }

    /// Its address, as `vault.url` has it.
    pub fn url(&self) -> String {
        let Self { bucket, prefix, .. } = self;
        match &self.server {
            None => format!("file://{bucket}"),
            Some(server) => match server.kind {
                Kind::Azurite => format!("az://{}/{bucket}/{prefix}", self.user()),
                Kind::Gcs => format!("gs://{bucket}/{prefix}"),
                _ => format!("s3://{bucket}/{prefix}"),
            },
        }
    }

    /// Another place beside it, in the same bucket or folder.
    #[must_use]
    pub fn sibling(&self, name: &str) -> Self {
        match self.path() {
            Some(path) => Self::directory(&path.with_file_name(name)),
            None => Self { prefix: format!("{}-{name}", self.prefix), ..self.clone() },
        }
    }

    /// The same place, used by somebody else.
    #[must_use]
    pub fn as_role(&self, role: Role) -> Self {
        Self { role, ..self.clone() }
    }

    /// The same place, reached through TLS.
    pub fn encrypted(&self) -> Result<Self> {
        let mut place = self.clone();
        let server = place.server.as_mut().context("a directory has no TLS")?;
        server.endpoint.clone_from(&server.tls.as_ref().with_context(|| format!("{} has no TLS", server.kind))?.endpoint);
        Ok(place)
    }

    /// The same place, reached through a gate.
    pub fn through(&self, gate: &Gate) -> Result<Self> {
        let mut place = self.clone();
        let server = place.server.as_mut().context("a directory has no gate")?;
        server.endpoint = gate.address_of(&server.endpoint)?;
        Ok(place)
    }

    /// The server's address, as pgvault is told it; nothing for a directory.
    pub fn endpoint(&self) -> Option<&str> {
        self.server.as_ref().map(|server| server.endpoint.as_str())
    }

    fn user(&self) -> &str {
        self.server.as_ref().and_then(|server| server.keys.get(&self.role)).map_or("", |key| &key.id)
    }

    fn is_encrypted(&self) -> bool {
        self.endpoint().is_some_and(|endpoint| endpoint.starts_with("https://"))
    }

    fn ca(&self) -> Result<Option<Vec<u8>>> {
        let Some(tls) = self.server.as_ref().filter(|_| self.is_encrypted()).and_then(|server| server.tls.as_ref()) else {
            return Ok(None);
        };
        Ok(Some(fs::read(&tls.ca_file).with_context(|| format!("read {}", tls.ca_file.display()))?))
    }

    /// A configuration for pgvault that begins with `[vault]`; `more` are further lines of that table, and `after` are other tables.
    pub fn config(&self, more: &str, after: &str) -> Result<String> {
        let mut text = format!("[vault]\nurl = \"{}\"\n{more}\n", self.url());
        let Some(server) = &self.server else { return Ok(format!("{text}\n{after}")) };
        let key = server.key(self.role)?;
        if let Some(tls) = server.tls.as_ref().filter(|_| self.is_encrypted()) {
            let _ = writeln!(text, "ca_file = \"{}\"", tls.ca_file.display());
        } else {
            text.push_str("allow_http = true\n");
        }
        let _ = match server.kind {
            Kind::Azurite => writeln!(text, "\n[vault.azure]\nendpoint = \"{}\"\naccess_key = \"{}\"", server.endpoint, key.secret),
            Kind::Gcs => writeln!(text, "\n[vault.gcs]\nendpoint = \"{}\"\nanonymous = true", server.endpoint),
            _ => writeln!(
                text,
                "\n[vault.s3]\nendpoint = \"{}\"\nregion = \"{}\"\naccess_key_id = \"{}\"\nsecret_access_key = \"{}\"\npath_style = true",
                server.endpoint, server.region, key.id, key.secret
            ),
        };
        Ok(format!("{text}\n{after}"))
    }

    /// Variables of the environment that lead every program of this cloud here, pgvault included.
    pub fn variables(&self) -> Result<Vec<(&'static str, String)>> {
        let Some(server) = &self.server else { return Ok(Vec::new()) };
        let key = server.key(self.role)?.clone();
        let mut variables = match server.kind {
            Kind::Azurite => vec![
                ("AZURE_STORAGE_ACCOUNT_NAME", key.id),
                ("AZURE_STORAGE_ACCOUNT_KEY", key.secret),
                ("AZURE_STORAGE_ENDPOINT", server.endpoint.clone()),
                ("AZURE_ALLOW_HTTP", "true".to_owned()),
            ],
            Kind::Gcs => vec![
                ("GOOGLE_BASE_URL", server.endpoint.clone()),
                ("GOOGLE_SKIP_SIGNATURE", "true".to_owned()),
                ("GOOGLE_ALLOW_HTTP", "true".to_owned()),
            ],
            _ => vec![
                ("AWS_ENDPOINT_URL", server.endpoint.clone()),
                ("AWS_REGION", server.region.clone()),
                ("AWS_ACCESS_KEY_ID", key.id),
                ("AWS_SECRET_ACCESS_KEY", key.secret),
                ("AWS_ALLOW_HTTP", (!self.is_encrypted()).to_string()),
            ],
        };
        if let Some(tls) = server.tls.as_ref().filter(|_| self.is_encrypted()) {
            variables.push(("SSL_CERT_FILE", tls.ca_file.display().to_string()));
        }
        Ok(variables)
    }

    /// A client for requests of one's own making, as this place's user.
    pub fn client(&self) -> Result<Client> {
        let server = self.server.as_ref().context("a directory has no client")?;
        match server.kind {
            Kind::Local | Kind::Azurite | Kind::Gcs => server.client(self.role),
            _ => Client::aws(&server.endpoint, self.ca()?.as_deref(), &server.region, server.key(self.role)?),
        }
    }

    /// The tests' own way in, which has nothing of pgvault's. Names are below the prefix.
    pub fn object_store(&self) -> Result<Arc<dyn ObjectStore>> {
        let Some(server) = &self.server else {
            fs::create_dir_all(&self.bucket).with_context(|| format!("create {}", self.bucket))?;
            return Ok(Arc::new(LocalFileSystem::new_with_prefix(&self.bucket)?));
        };
        let key = server.key(self.role)?;
        let mut client = ClientOptions::new().with_allow_http(true);
        if let Some(ca) = self.ca()? {
            client = client.with_root_certificate(Certificate::from_pem(&ca)?);
        }
        Ok(match server.kind {
            Kind::Azurite => {
                let azure = MicrosoftAzureBuilder::new().with_account(&key.id).with_access_key(&key.secret);
                let azure = azure.with_endpoint(server.endpoint.clone()).with_container_name(&self.bucket);
                Arc::new(PrefixStore::new(azure.with_client_options(client).build()?, self.prefix.as_str()))
            }
            Kind::Gcs => {
                // A token all the same: without one the client asks for credentials when it writes.
                let google = GoogleCloudStorageBuilder::new().with_base_url(&server.endpoint).with_bearer_token("test");
                let google = google.with_bucket_name(&self.bucket).with_client_options(client);
                Arc::new(PrefixStore::new(google.build()?, self.prefix.as_str()))
            }
            _ => {
                let s3 = AmazonS3Builder::new().with_endpoint(&server.endpoint).with_region(&server.region);
                let s3 = s3.with_access_key_id(&key.id).with_secret_access_key(&key.secret).with_bucket_name(&self.bucket);
                let s3 = s3.with_conditional_put(S3ConditionalPut::ETagMatch).with_client_options(client);
                Arc::new(PrefixStore::new(s3.build()?, self.prefix.as_str()))
            }
        })
    }

    /// The names of all objects, sorted. Files that a directory store is writing are none.
    pub fn names(&self) -> Result<Vec<String>> {
        if self.path().is_some_and(|path| !path.exists()) {
            return Ok(Vec::new());
        }
        let store = self.object_store()?;
        wait(async move {
            let mut names: Vec<String> = store.list(None).map_ok(|meta| meta.location.to_string()).try_collect().await?;
            names.sort();
            Ok(names)
        })
    }

    /// The one object whose name ends like this.
    pub fn find(&self, end: &str) -> Result<String> {
        let mut found = self.names()?;
        found.retain(|name| name.ends_with(end));
        match (found.pop(), found.is_empty()) {
            (Some(name), true) => Ok(name),
            (last, _) => bail!("objects that end with {end}: {found:?} {last:?}"),
        }
    }

    /// What an object holds.
    pub fn read(&self, name: &str) -> Result<Bytes> {
        let (store, path) = (self.object_store()?, Path::parse(name)?);
        wait(async move { Ok(store.get(&path).await?.bytes().await?) })
    }

    /// Overwrites an object, or makes it: what nobody but a test may do.
    pub fn replace(&self, name: &str, bytes: impl Into<Bytes>) -> Result<()> {
        let (store, path, bytes) = (self.object_store()?, Path::parse(name)?, bytes.into());
        wait(async move { Ok(store.put(&path, bytes.into()).await.map(drop)?) })
    }

    /// Removes an object, which must be there.
    pub fn remove(&self, name: &str) -> Result<()> {
        let (store, path) = (self.object_store()?, Path::parse(name)?);
        wait(async move { Ok(store.delete(&path).await?) })
    }

    /// Removes everything, as far as the store lets it go. For the end of a test: servers keep their objects in memory.
    pub fn clear(&self) -> Result<()> {
        if self.path().is_some_and(|path| !path.exists()) {
            return Ok(());
        }
        let store = self.object_store()?;
        wait(async move {
            let names = store.list(None).map_ok(|meta| meta.location).boxed();
            let mut deleted = store.delete_stream(names);
            while let Some(result) = deleted.next().await {
                let _ = result;
            }
            Ok(())
        })
    }
}

/// What each role may do, as a bucket's policy: the one that docs/stores.md recommends.
pub(crate) fn policy(bucket: &str) -> String {
    let user = |role: Role| format!("arn:aws:iam:::user/{}", role.name());
    let rule = |roles: &[Role], actions: &[&str]| {
        serde_json::json!({
            "Effect": "Allow",
            "Principal": { "AWS": roles.iter().map(|role| user(*role)).collect::<Vec<_>>() },
            "Action": actions.iter().map(|action| format!("s3:{action}")).collect::<Vec<_>>(),
            "Resource": [format!("arn:aws:s3:::{bucket}"), format!("arn:aws:s3:::{bucket}/*")],
        })
    };
    let all = [Role::Writer, Role::Restorer, Role::Pruner];
    let read = [
        "ListBucket",
        "ListBucketVersions",
        "GetBucketLocation",
        "GetBucketVersioning",
        "GetBucketObjectLockConfiguration",
        "GetLifecycleConfiguration",
        "GetObject",
        "GetObjectVersion",
        "GetObjectRetention",
        "GetObjectLegalHold",
    ];
    serde_json::json!({
        "Version": "2012-10-17",
        "Statement": [
            rule(&all, &read),
            rule(&[Role::Writer], &["PutObject", "PutObjectRetention"]),
            rule(&[Role::Pruner], &["PutObject", "DeleteObject", "DeleteObjectVersion"]),
        ],
    })
    .to_string()
}
