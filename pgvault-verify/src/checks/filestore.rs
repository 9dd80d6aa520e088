//! Every file that a row of Odoo's attachments refers to is in the filestore, of its size and with its content.
//!
//! Odoo names a file by the SHA-1 of its content (`3f/3f7a...`), so a file proves itself. Source: `ir_attachment._file_write`.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use pgvault_core::{Error, ErrorKind, Result};
use serde_json::json;
use sha1::{Digest, Sha1};

use super::{Found, Restored, listed};
use crate::seed::scatter;
use crate::task::blocking;

/// Rows that are fetched at once.
const PAGE: usize = 10_000;

/// One content in so many is read when a drill takes a sample; all are looked at.
const SAMPLE: u64 = 20;

#[derive(Debug, Default)]
struct Compared {
    files: u64,
    read: u64,
    missing: Vec<String>,
    wrong: Vec<String>,
}

/// Compares the filestore in `folder` with what the rows of `database` refer to.
///
/// # Errors
/// When the server cannot be asked.
pub(super) async fn compare(restored: &Restored<'_>, database: &str, folder: &Path) -> Result<Found> {
    if !folder.is_dir() {
        return Ok(Found::failed(format!("there is no filestore at {}", folder.display()), json!({ "folder": folder })));
    }
    let mut sql = restored.connect(database).await?;
    let (seed, deep) = (restored.seed, restored.deep);
    let mut all = Compared::default();
    let _ = sql
        .simple_query(
            "BEGIN; DECLARE attachments NO SCROLL CURSOR FOR SELECT store_fname, max(file_size) FROM public.ir_attachment \
             WHERE store_fname ~ '^[0-9a-f]{2,3}/[0-9a-f]{40}$' GROUP BY 1 ORDER BY 1",
        )
        .await?;
    loop {
        let mut sets = sql.simple_query(&format!("FETCH {PAGE} FROM attachments")).await?;
        let rows = sets.pop().unwrap_or_default().rows;
        if rows.is_empty() {
            break;
        }
        let names = rows
            .iter()
            .map(|row| Ok((row.required(0)?.to_owned(), row.text(1)?.and_then(|size| size.parse::<u64>().ok()))))
            .collect::<Result<Vec<_>>>()?;
        let folder = folder.to_path_buf();
        let some = blocking(move || Ok(look(&folder, &names, seed, deep))).await?;
        all.files += some.files;
        all.read += some.read;
        all.missing.extend(some.missing);
        all.wrong.extend(some.wrong);
    }
    let _ = sql.simple_query("ROLLBACK").await?;
    sql.close().await;
    let evidence = json!({
        "folder": folder, "files": all.files, "contents_read": all.read, "missing": listed(&all.missing), "wrong": listed(&all.wrong),
    });
    Ok(match (all.missing.first(), all.wrong.first()) {
        (Some(first), _) => Found::failed(format!("{} of {} files are missing: {first}", all.missing.len(), all.files), evidence),
        (None, Some(first)) => {
            Found::failed(format!("{} of {} files have another content: {first}", all.wrong.len(), all.files), evidence)
        }
        (None, None) => Found::passed(format!("all {} files are there, {} of them read", all.files, all.read), evidence),
    })
}

fn look(folder: &Path, names: &[(String, Option<u64>)], seed: u64, deep: bool) -> Compared {
    let mut found = Compared::default();
    for (number, (name, size)) in (0_u64..).zip(names) {
        found.files += 1;
        let path = folder.join(name);
        match std::fs::metadata(&path) {
            Ok(meta) if size.is_none_or(|size| size == meta.len()) => {
                if deep || scatter(seed ^ number).is_multiple_of(SAMPLE) {
                    found.read += 1;
                    match sha1_of(&path) {
                        Ok(hash) if name.ends_with(&hash) => {}
                        Ok(hash) => found.wrong.push(format!("{name} hashes to {hash}")),
                        Err(error) => found.wrong.push(format!("{name}: {error}")),
                    }
                }
            }
            Ok(meta) => found.wrong.push(format!("{name} has {} bytes instead of {}", meta.len(), size.unwrap_or_default())),
            Err(_) => found.missing.push(name.clone()),
        }
    }
    found
}

fn sha1_of(path: &PathBuf) -> Result<String> {
    use std::fmt::Write as _;
    let mut file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let (mut hash, mut buffer) = (Sha1::new(), vec![0; 1 << 16]);
    loop {
        let read = file.read(&mut buffer).map_err(|e| Error::io("read", path, e))?;
        if read == 0 {
            break;
        }
        hash.update(buffer.get(..read).ok_or_else(|| Error::new(ErrorKind::Failed, "io", "a read went past its buffer"))?);
    }
    Ok(hash.finalize().iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    }))
}
