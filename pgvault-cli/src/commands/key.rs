//! `pgvault key list | add | revoke | rotate`

use pgvault_core::Result;
use pgvault_core::config::SecretSource;
use pgvault_core::crypto::slot::{SlotDocument, Wrap};
use pgvault_core::vault::keyring;
use serde_json::{Value, json};

use crate::args::{Cli, KeyCommand, NewKey};
use crate::context::{Context, parse_id};
use crate::exit::Status;
use crate::output::Printer;

pub(crate) async fn run(cli: &Cli, printer: &Printer, command: &KeyCommand) -> Result<Status> {
    let context = Context::load(cli)?;
    match command {
        KeyCommand::List(args) => {
            let (name, _) = context.cluster(args)?;
            let vault = context.vault().await?;
            let cluster = vault.find_cluster(name, args.system_id).await?;
            let slots = vault.slots(&cluster).await?;
            for slot in &slots {
                printer.line(format_args!("{}  {}  {}  {}", slot.key_id, slot.created_at, slot.describe(), slot.label));
            }
            printer.summary(&json!({ "keys": slots.iter().map(describe).collect::<Vec<_>>() }));
        }
        KeyCommand::Add(args) => {
            let wrap = wrap(&context, &args.key)?;
            let cluster = context.open(&args.cluster, None).await?;
            let slot = keyring::add(&cluster, &wrap, &args.key.label).await?;
            printer.line(format_args!("added key {} ({})", slot.key_id, slot.describe()));
            printer.summary(&json!({ "added": describe(&slot) }));
        }
        KeyCommand::Revoke(args) => {
            let key_id = parse_id(&args.key_id)?;
            let cluster = context.open(&args.cluster, None).await?;
            keyring::revoke(&cluster, key_id).await?;
            printer
                .line(format_args!("revoked key {key_id}; whoever opened the vault with it before may have kept the master key"));
            printer.summary(&json!({ "revoked": key_id }));
        }
        KeyCommand::Rotate(args) => {
            let (old, wrap) = (parse_id(&args.key_id)?, wrap(&context, &args.key)?);
            let cluster = context.open(&args.cluster, None).await?;
            let slot = keyring::rotate(&cluster, old, &wrap, &args.key.label).await?;
            let epoch = if args.new_data_key { Some(keyring::start_epoch(&cluster).await?) } else { None };
            printer.line(format_args!("replaced key {old} by {} ({})", slot.key_id, slot.describe()));
            if let Some(epoch) = epoch {
                printer.line(format_args!("new data is encrypted with the data key of epoch {epoch}"));
            }
            printer.summary(&json!({ "revoked": old, "added": describe(&slot), "epoch_id": epoch }));
        }
    }
    Ok(Status::Done)
}

fn wrap(context: &Context, key: &NewKey) -> Result<Wrap> {
    match (&key.recipient, &key.new_passphrase_file, &key.kms) {
        (Some(recipient), _, _) => Ok(Wrap::Recipient(recipient.clone())),
        (None, Some(file), _) => SecretSource::File(file.clone()).read().map(Wrap::Passphrase),
        (None, None, Some(name)) => context.config.vault.other_kms(name).map(Wrap::Kms),
        (None, None, None) => Err(pgvault_core::Error::new(pgvault_core::ErrorKind::Usage, "key.none", "no new key was given")),
    }
}

fn describe(slot: &SlotDocument) -> Value {
    json!({ "key_id": slot.key_id, "label": slot.label, "created_at": slot.created_at, "type": slot.describe() })
}
