//! A worker of Odoo: requests that create, change and delete attachments, each a transaction.
//!
//! What comes before what is the whole point, so here is the order, by series; a `|` is a [`Pause`].
//!
//! - **create**, 14 and 18: look for the content | create the file | write | write the rest | mark | INSERT | COMMIT. 14 looks below three
//!   digits first. A content that is there is neither written nor marked.
//! - **create**, 19: look | INSERT | look again | create the file | write | write the rest | mark | COMMIT.
//! - **create**, 20: INSERT | look | mark | write beside it | write the rest | rename | COMMIT.
//! - **change**: 14 and 18 write as above | mark the old one | UPDATE. 19: look | UPDATE | mark the old one | write. 20: UPDATE, and lock the
//!   row | mark the old one | write.
//! - **delete**: DELETE | mark | COMMIT.
//!
//! Transactions are REPEATABLE READ, and their first query comes before the first file.

use std::fmt::Write as _;

use pgvault_core::postgres::{Connection, quote_literal};
use pgvault_core::{Error, ErrorKind, Result};

use crate::content::Content;
use crate::filestore::{Found, WRITE_SUFFIX, suffixed};
use crate::ledger::Step;
use crate::odoo::Odoo;
use crate::pause::Pause;
use crate::series::is_local;

/// The id of a row of `ir_attachment`.
pub type AttachmentId = i64;

/// An attachment as the worker's transaction sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// Its id.
    pub id: AttachmentId,
    /// Where its content is, if not in the database.
    pub store_fname: Option<String>,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub struct Worker {
    odoo: Odoo,
    pause: Pause,
    connection: Connection,
    stores_files: bool,
    disk_fails_after: Option<usize>,
}

impl Worker {
    /// A worker with a connection of its own.
    ///
    /// # Errors
    /// When the server refuses it.
    pub async fn connect(odoo: &Odoo, pause: &Pause) -> Result<Self> {
        let connection = odoo.lease(pause).await?;
        Ok(Self { odoo: odoo.clone(), pause: pause.clone(), connection, stores_files: true, disk_fails_after: None })
    }

    /// Ends without a transaction open.
    pub fn leave(self) {
        self.odoo.give_back(self.connection);
    }

    async fn sql(&mut self, what: &'static str, sql: &str) -> Result<Option<String>> {
        let _: Step = self.pause.here(what).await;
        let sets = self.connection.simple_query(sql).await?;
        let row = sets.last().and_then(|set| set.rows.first());
        Ok(row.map(|row| row.text(0)).transpose()?.flatten().map(str::to_owned))
    }

    /// A change of attachments. It would take its lock of the table by itself; but of several that wait for that lock any could be the
    /// first behind it, and what happens then would not be the seed's choice. So the lock alone is waited for, and the change is sent
    /// when it is this worker's turn.
    async fn change(&mut self, what: &'static str, sql: &str) -> Result<Option<String>> {
        let _ = self.sql(what, "lock table ir_attachment in row exclusive mode").await?;
        let sets = self.connection.simple_query(sql).await?;
        let row = sets.last().and_then(|set| set.rows.first());
        Ok(row.map(|row| row.text(0)).transpose()?.flatten().map(str::to_owned))
    }

    /// Begins a transaction and reads where contents are stored, which fixes what the transaction sees.
    ///
    /// # Errors
    /// When a query fails.
    pub async fn begin(&mut self) -> Result<()> {
        let location = "select value from ir_config_parameter where key = 'ir_attachment.location'";
        let _ = self.sql("begin", "begin isolation level repeatable read").await?;
        self.stores_files = self.sql("read the settings", location).await?.as_deref() != Some("db");
        Ok(())
    }

    /// Commits. With `synchronous_commit` as it is by default, what was committed is in the WAL when this returns.
    ///
    /// # Errors
    /// When the server refuses, which rolls back.
    pub async fn commit(&mut self) -> Result<()> {
        self.sql("commit", "commit").await.map(drop)
    }

    /// Rolls back. Files and marks stay.
    ///
    /// # Errors
    /// When the query fails.
    pub async fn rollback(&mut self) -> Result<()> {
        self.disk_fails_after = None;
        self.sql("rollback", "rollback").await.map(drop)
    }

    /// The `n`th attachment that the transaction sees, counting round, if there is any.
    ///
    /// # Errors
    /// When the query fails.
    pub async fn nth(&mut self, n: u64) -> Result<Option<Attachment>> {
        let sql = format!(
            "select id, store_fname from ir_attachment order by id \
             offset (select {n} % greatest(count(*), 1) from ir_attachment) limit 1"
        );
        let sets = self.connection.simple_query(&sql).await?;
        let Some(row) = sets.first().and_then(|set| set.rows.first()) else { return Ok(None) };
        let id = row.required(0)?.parse().unwrap_or_default();
        Ok(Some(Attachment { id, store_fname: row.text(1)?.map(str::to_owned) }))
    }

    /// Makes the disk fail in the next write of content, after this many bytes: full, or gone.
    pub fn fail_disk_after(&mut self, bytes: usize) {
        self.disk_fails_after = Some(bytes);
    }

    /// Creates an attachment with this content, new or not.
    ///
    /// # Errors
    /// `odoo.collision` when something else lies under the content's name; the disk's error from 19 on; what the server says. The caller
    /// rolls back, as Odoo does.
    pub async fn attach(&mut self, content: &Content) -> Result<AttachmentId> {
        if !self.stores_files {
            return self.attach_in_database(content).await;
        }
        let store_fname = if self.odoo.series().writes_before_row() {
            self.write(content).await?
        } else {
            if self.odoo.series().locks_for_gc() {
                let _ = self.look(&content.store_fname(), content).await?;
            }
            content.store_fname()
        };
        let id = self.insert(&values(&store_fname, content)).await?;
        if !self.odoo.series().writes_before_row() {
            let _ = self.write(content).await?;
        }
        Ok(id)
    }

    /// Gives an attachment another content.
    ///
    /// # Errors
    /// As [`attach`](Self::attach), and `odoo.missing` when there is no such row any more.
    pub async fn overwrite(&mut self, attachment: &Attachment, content: &Content) -> Result<()> {
        let series = self.odoo.series();
        let old = attachment.store_fname.as_deref().filter(|old| is_local(old)).map(str::to_owned);
        let mut store_fname = content.store_fname();
        if series.writes_before_row() {
            store_fname = self.write(content).await?;
            if let Some(old) = &old {
                self.mark(old).await?;
            }
        } else if series.locks_for_gc() {
            let _ = self.look(&store_fname, content).await?;
        }
        self.update(attachment.id, &store_fname, content).await?;
        if series.writes_before_row() {
            return Ok(());
        }
        // The 20 series knows that the old name is the new one, 19 does not.
        if let Some(old) = old.filter(|old| series.locks_for_gc() || *old != store_fname) {
            self.mark(&old).await?;
        }
        self.write(content).await.map(drop)
    }

    /// Deletes an attachment.
    ///
    /// # Errors
    /// What the server says; the disk's error.
    pub async fn unlink(&mut self, attachment: &Attachment) -> Result<()> {
        let _ = self.change("delete", &format!("delete from ir_attachment where id = {}", attachment.id)).await?;
        match &attachment.store_fname {
            // Modules that keep contents elsewhere delete them there.
            Some(store_fname) if is_local(store_fname) => self.mark(store_fname).await,
            _ => Ok(()),
        }
    }

    /// Creates an attachment whose content is in its row.
    ///
    /// # Errors
    /// What the server says.
    pub async fn attach_in_database(&mut self, content: &Content) -> Result<AttachmentId> {
        let mut hex = String::from("\\x");
        for byte in content.bytes() {
            let _ = write!(hex, "{byte:02x}");
        }
        let (size, sha1) = (content.bytes().len(), content.sha1());
        self.insert(&format!("'binary', null, {}, null, {size}, '{sha1}'", quote_literal(&hex))).await
    }

    /// Creates an attachment without content.
    ///
    /// # Errors
    /// What the server says.
    pub async fn attach_empty(&mut self) -> Result<AttachmentId> {
        self.insert(&format!("'binary', null, null, null, 0, '{}'", Content::new([]).sha1())).await
    }

    /// Creates an attachment that is only an address.
    ///
    /// # Errors
    /// What the server says.
    pub async fn attach_url(&mut self, url: &str) -> Result<AttachmentId> {
        self.insert(&format!("'url', null, null, {}, null, null", quote_literal(url))).await
    }

    /// Creates an attachment whose content is an object elsewhere: `s3://bucket`, `azure://container`, `code:/`.
    ///
    /// # Errors
    /// What the server says.
    pub async fn attach_remote(&mut self, place: &str, content: &Content) -> Result<AttachmentId> {
        self.insert(&values(&format!("{place}/{}", content.sha1()), content)).await
    }

    /// Creates an attachment for a file of any name, as imports do: the file first, and no mark.
    ///
    /// # Errors
    /// What the server or the disk says.
    pub async fn attach_named(&mut self, store_fname: &str, content: &Content) -> Result<AttachmentId> {
        let _: Step = self.pause.here("plant").await;
        self.odoo.filestore().plant(store_fname, content)?;
        self.insert(&values(store_fname, content)).await
    }

    async fn insert(&mut self, values: &str) -> Result<AttachmentId> {
        let now = self.odoo.now().strftime("%Y-%m-%d %H:%M:%S").to_string();
        let sql = format!(
            "insert into ir_attachment (name, res_model, res_id, mimetype, create_uid, create_date, write_uid, write_date, \
             type, store_fname, db_datas, url, file_size, checksum) values ('file.bin', 'res.partner', 1, 'application/octet-stream', \
             1, '{now}', 1, '{now}', {values}) returning id"
        );
        Ok(self.change("insert", &sql).await?.and_then(|id| id.parse().ok()).unwrap_or_default())
    }

    async fn update(&mut self, id: AttachmentId, store_fname: &str, content: &Content) -> Result<()> {
        let now = self.odoo.now().strftime("%Y-%m-%d %H:%M:%S").to_string();
        let sql = format!(
            "update ir_attachment set type = 'binary', store_fname = {}, db_datas = null, file_size = {}, checksum = '{}', \
             write_date = '{now}' where id = {id} returning id",
            quote_literal(store_fname),
            content.bytes().len(),
            content.sha1()
        );
        match self.change("update", &sql).await? {
            Some(_) => Ok(()),
            None => Err(Error::new(ErrorKind::NotFound, "odoo.missing", format!("attachment {id} does not exist"))),
        }
    }

    async fn mark(&mut self, store_fname: &str) -> Result<()> {
        let _: Step = self.pause.here("mark").await;
        self.odoo.filestore().mark(store_fname, self.odoo.now())
    }

    /// True when the content is there. Something else in its place is an error.
    async fn look(&mut self, store_fname: &str, content: &Content) -> Result<bool> {
        let _: Step = self.pause.here("look").await;
        match self.odoo.filestore().look(store_fname, content)? {
            Found::Absent => Ok(false),
            Found::Same => Ok(true),
            Found::Other => {
                let message = format!("the attachment {store_fname} collides with an existing file");
                Err(Error::new(ErrorKind::Conflict, "odoo.collision", message))
            }
        }
    }

    /// Writes a content that is not there; gives its name.
    async fn write(&mut self, content: &Content) -> Result<String> {
        let (series, odoo) = (self.odoo.series(), self.odoo.clone());
        if series.uses_retro_paths() && odoo.filestore().path(&content.retro_store_fname()).is_file() {
            return Ok(content.retro_store_fname());
        }
        let store_fname = content.store_fname();
        if odoo.rules().marks_existing {
            self.mark(&store_fname).await?;
        }
        if self.look(&store_fname, content).await? {
            return Ok(store_fname);
        }
        let written = if series.replaces_atomically() {
            self.replace(&store_fname, content).await
        } else {
            self.fill(&store_fname, content).await
        };
        match written {
            Err(error) if series.swallows_write_errors() && error.code() == "odoo.disk" => {}
            other => other?,
        }
        Ok(store_fname)
    }

    /// Until 19: in its place, then the mark.
    async fn fill(&mut self, store_fname: &str, content: &Content) -> Result<()> {
        let odoo = self.odoo.clone();
        let path = odoo.filestore().path(store_fname);
        let _: Step = self.pause.here("create the file").await;
        let mut file = odoo.filestore().create(&path)?;
        odoo.filestore().observe(store_fname)?;
        for (what, part) in self.parts(content) {
            let _: Step = self.pause.here(what).await;
            odoo.filestore().append(&mut file, &path, part)?;
            odoo.filestore().observe(store_fname)?;
        }
        self.disk_error(store_fname)?;
        self.mark(store_fname).await
    }

    /// 20: the mark, then beside its place, then the name.
    async fn replace(&mut self, store_fname: &str, content: &Content) -> Result<()> {
        let odoo = self.odoo.clone();
        self.mark(store_fname).await?;
        let beside = suffixed(&odoo.filestore().path(store_fname), WRITE_SUFFIX);
        let _: Step = self.pause.here("create the file").await;
        let mut file = odoo.filestore().create(&beside)?;
        for (what, part) in self.parts(content) {
            let _: Step = self.pause.here(what).await;
            odoo.filestore().append(&mut file, &beside, part)?;
            // Two who write the same content share the file beside, and the other may have renamed it already.
            odoo.filestore().observe(store_fname)?;
        }
        self.disk_error(store_fname)?;
        let _: Step = self.pause.here("rename").await;
        odoo.filestore().publish(&beside, store_fname)
    }

    /// The writes of a content: two, so that a part of it is to be seen, and no more than the disk takes.
    fn parts<'c>(&self, content: &'c Content) -> [(&'static str, &'c [u8]); 2] {
        let bytes = content.bytes();
        let end = self.disk_fails_after.unwrap_or(bytes.len()).min(bytes.len());
        let half = (bytes.len() / 2).min(end);
        let part = |range: std::ops::Range<usize>| bytes.get(range).unwrap_or_default();
        [("write", part(0..half)), ("write the rest", part(half..end))]
    }

    fn disk_error(&mut self, store_fname: &str) -> Result<()> {
        match self.disk_fails_after.take() {
            Some(_) => Err(Error::new(ErrorKind::Failed, "odoo.disk", format!("write {store_fname}: no space left on device"))),
            None => Ok(()),
        }
    }
}

/// The values of a row whose content is not in the database.
fn values(store_fname: &str, content: &Content) -> String {
    let name = quote_literal(store_fname);
    format!("'binary', {name}, null, null, {}, '{}'", content.bytes().len(), content.sha1())
}
