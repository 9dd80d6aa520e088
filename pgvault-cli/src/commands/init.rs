//! `pgvault init`: the vault, and the cluster's keys in it. Safe to run again.

use pgvault_core::config::VaultConfig;
use pgvault_core::crypto::slot::{Method, Wrap};
use pgvault_core::env::Env;
use pgvault_core::postgres::{Connection, Mode, SystemId};
use pgvault_core::vault::Vault;
use pgvault_core::vault::keyring;
use pgvault_core::vault::layout::ClusterName;
use pgvault_core::{Error, ErrorKind, Result};
use serde_json::json;

use crate::args::{Cli, InitArgs};
use crate::context::{Context, system_id_of};
use crate::exit::Status;
use crate::output::Printer;

/// What can be done about a store that overwrites.
const SINGLE_WRITER: &str = "use a store whose conditional PUT (If-None-Match: *) works, or a newer version of this one; or `pgvault init \
     --single-writer`: then only one pgvault may write to the vault at any time, or each destroys the other's work unnoticed";

pub(crate) async fn run(cli: &Cli, printer: &Printer, args: &InitArgs) -> Result<Status> {
    let context = Context::load(cli)?;
    let (name, config) = context.cluster(&args.cluster)?;
    let place = args.copy.as_deref();
    let cluster = match (place, args.cluster.system_id) {
        // The vault knows which cluster it is.
        (Some(_), system_id) => context.vault().await?.find_cluster(name, system_id).await?,
        (None, Some(id)) => ClusterName::new(name, id)?,
        (None, None) => ClusterName::new(name, find_system_id(config).await?)?,
    };
    // Keys are read before anything is created.
    let wraps = wraps(context.vault_config(place)?)?;
    let unlock = context.vault_config(place)?.unlock()?;
    let (vault, vault_created) = if args.single_writer {
        Vault::create_for_single_writer(context.store_at(place)?, Env::default()).await?
    } else {
        Vault::create(context.store_at(place)?, Env::default()).await.map_err(|error| match error.code() {
            "store.overwrites" => error.with_hint(SINGLE_WRITER),
            _ => error,
        })?
    };
    let cluster_created = vault.create_cluster(&cluster, &wraps).await?;
    let opened = vault.unlock(&cluster, &unlock).await?;
    let recorded = keyring::record_creation(&opened).await?;
    let slots = vault.slots(opened.name()).await?;
    printer.line(format_args!("{} the vault at {}", if vault_created { "created" } else { "using" }, vault.store().location()));
    printer.line(format_args!("{} the cluster {cluster} in it", if cluster_created { "created" } else { "using" }));
    if !cluster_created && recorded {
        printer.line("finished an `init` that was interrupted");
    }
    for slot in &slots {
        printer.line(format_args!("key {} ({})", slot.key_id, slot.describe()));
    }
    if slots.iter().all(|slot| matches!(slot.method, Method::Kms { .. })) {
        printer.line(
            "only a key service opens it: whoever deletes the key there deletes the backups; add a recovery key (docs/kms.md)",
        );
    } else if cluster_created {
        printer.line("keep the key safe and in another place than the vault: without it nothing can be restored");
    }
    printer.summary(&json!({
        "vault_id": vault.document().vault_id,
        "vault_created": vault_created,
        "cluster": cluster.name,
        "system_id": cluster.system_id,
        "cluster_created": cluster_created,
        "key_ids": slots.iter().map(|s| s.key_id).collect::<Vec<_>>(),
    }));
    Ok(Status::Done)
}

/// Asks the server; when it cannot be reached, the data directory knows as well.
async fn find_system_id(config: &pgvault_core::config::ClusterConfig) -> Result<SystemId> {
    let asked = async {
        let mut connection = Connection::connect(&Context::connection(config)?, Mode::Replication).await?;
        Ok::<_, Error>(connection.identify_system().await?.system_id)
    };
    match asked.await {
        Ok(id) => Ok(id),
        Err(error) => config.pgdata.as_deref().and_then(system_id_of).ok_or(error),
    }
}

fn wraps(vault: &VaultConfig) -> Result<Vec<Wrap>> {
    // The key that `unlock` uses comes first.
    let own = match vault.identity_source() {
        Some(source) => pgvault_core::crypto::slot::recipients_of(&source.read()?)?,
        None => Vec::new(),
    };
    let mut wraps: Vec<Wrap> = own.iter().cloned().map(Wrap::Recipient).collect();
    if let Some(source) = vault.passphrase_source() {
        wraps.push(Wrap::Passphrase(source.read()?));
    }
    wraps.extend(vault.kms()?.map(Wrap::Kms));
    wraps.extend(vault.recipients.iter().filter(|recipient| !own.contains(recipient)).cloned().map(Wrap::Recipient));
    if wraps.is_empty() {
        return Err(Error::new(ErrorKind::Usage, "config.no_key", "no key is configured")
            .with_hint("set vault.passphrase_file, vault.identity_file, vault.kms or vault.recipients"));
    }
    Ok(wraps)
}
