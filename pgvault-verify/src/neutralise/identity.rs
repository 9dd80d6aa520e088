//! Who a database is, to Odoo, to those who call it and to its licence.
//!
//! Source: `ir_config_parameter` and the parameters that Odoo gives a new database. Kept, the secret would let a session of production
//! into the copy, and signed links of the copy into production; kept, the uuid would count the copy's users against the licence.

use pgvault_core::env::Env;
use pgvault_core::postgres::{Connection, quote_literal};
use pgvault_core::{Error, ErrorKind, Result};

use super::columns;

/// Where a copy believes to be: a machine of its own.
const ADDRESS: &str = "http://localhost:8069";

/// What a copy has no right to.
const LICENCE: [&str; 3] = ["database.enterprise_code", "database.expiration_date", "database.expiration_reason"];

/// Gives the database an identity of its own, and gives its uuid.
///
/// # Errors
/// When the server or the system's randomness fails.
pub(super) async fn replace(sql: &mut Connection, env: &Env) -> Result<String> {
    let uuid = uuid(env)?;
    // As Odoo prints it: UTC, without a zone.
    let created = env.now().strftime("%Y-%m-%d %H:%M:%S").to_string();
    for (key, value) in [
        ("database.secret", self::uuid(env)?.as_str()),
        ("database.uuid", &uuid),
        ("database.create_date", &created),
        ("web.base.url", ADDRESS),
        ("base.login_cooldown_after", "10"),
        ("base.login_cooldown_duration", "60"),
    ] {
        set(sql, key, value).await?;
    }
    let keys: Vec<String> = LICENCE.iter().map(|key| quote_literal(key)).collect();
    let _ = sql.simple_query(&format!("DELETE FROM public.ir_config_parameter WHERE key IN ({})", keys.join(", "))).await?;
    Ok(uuid)
}

/// The value of a parameter.
///
/// # Errors
/// When the server fails.
pub(super) async fn parameter(sql: &mut Connection, key: &str) -> Result<Option<String>> {
    let statement = format!("SELECT value FROM public.ir_config_parameter WHERE key = {}", quote_literal(key));
    let rows = sql.simple_query(&statement).await?.pop().unwrap_or_default().rows;
    Ok(match rows.first() {
        Some(row) => row.text(0)?.map(ToOwned::to_owned),
        None => None,
    })
}

/// Sets a parameter, whether or not it is there.
///
/// # Errors
/// When the server fails.
pub(super) async fn set(sql: &mut Connection, key: &str, value: &str) -> Result<()> {
    let (name, text) = (quote_literal(key), quote_literal(value));
    let changed = sql.simple_query(&format!("UPDATE public.ir_config_parameter SET value = {text} WHERE key = {name}")).await?;
    if changed.first().is_some_and(|set| set.tag == "UPDATE 0") {
        // Newer versions say of each parameter what its value is.
        let is_typed = columns(sql, "ir_config_parameter").await?.iter().any(|column| column == "type");
        let statement = if is_typed {
            format!("INSERT INTO public.ir_config_parameter (key, value, type) VALUES ({name}, {text}, 'str')")
        } else {
            format!("INSERT INTO public.ir_config_parameter (key, value) VALUES ({name}, {text})")
        };
        let _ = sql.simple_query(&statement).await?;
    }
    Ok(())
}

/// A random uuid (RFC 9562, version 4).
fn uuid(env: &Env) -> Result<String> {
    let number = u128::from_be_bytes(env.random()?);
    let number = number & !(0xF << 76) | (0x4 << 76);
    let number = number & !(0x3 << 62) | (0x2 << 62);
    let hex = format!("{number:032x}");
    let part = |range: std::ops::Range<usize>| {
        hex.get(range).ok_or_else(|| Error::new(ErrorKind::Failed, "random", "a uuid has 32 digits"))
    };
    Ok(format!("{}-{}-{}-{}-{}", part(0..8)?, part(8..12)?, part(12..16)?, part(16..20)?, part(20..32)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_random_and_say_so() {
        let (one, other) = (uuid(&Env::default()).unwrap(), uuid(&Env::default()).unwrap());
        assert_ne!(one, other);
        let parts: Vec<&str> = one.split('-').collect();
        assert_eq!(parts.iter().map(|part| part.len()).collect::<Vec<_>>(), [8, 4, 4, 4, 12]);
        assert!(parts[2].starts_with('4') && "89ab".contains(&parts[3][..1]), "{one}");
    }
}
