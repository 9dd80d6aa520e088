//! What programs that use libpq are told, and what they say.

use pgvault_core::postgres::{ConnInfo, Host, RootCert};
use secrecy::ExposeSecret;

/// Bytes of a program's complaints that an error shows.
const SHOWN: usize = 2000;

/// The connection in libpq's keywords for another database, and the password, which is nobody's business in a list of processes.
pub(super) fn words(connection: &ConnInfo, database: &str) -> (String, Option<String>) {
    let mut words: Vec<(&str, String)> = Vec::new();
    let each = |show: &dyn Fn(&pgvault_core::postgres::Endpoint) -> String| {
        connection.endpoints.iter().map(show).collect::<Vec<_>>().join(",")
    };
    words.push((
        "host",
        each(&|endpoint| match &endpoint.host {
            Host::Tcp(name) => name.clone(),
            Host::Unix(folder) => folder.display().to_string(),
        }),
    ));
    if connection.endpoints.iter().any(|endpoint| endpoint.hostaddr.is_some()) {
        words.push(("hostaddr", each(&|endpoint| endpoint.hostaddr.map_or_else(String::new, |address| address.to_string()))));
    }
    words.push(("port", each(&|endpoint| endpoint.port.to_string())));
    words.push(("user", connection.user.clone()));
    words.push(("dbname", database.to_owned()));
    words.push(("application_name", connection.application_name.clone()));
    words.push(("sslmode", connection.ssl.mode.to_string()));
    match &connection.ssl.root {
        RootCert::File(path) => words.push(("sslrootcert", path.display().to_string())),
        RootCert::System => words.push(("sslrootcert", "system".into())),
        RootCert::Absent(_) => {}
    }
    if let Some(client) = &connection.ssl.client {
        words.push(("sslcert", client.cert.display().to_string()));
        words.push(("sslkey", client.key.display().to_string()));
    }
    words.push(("channel_binding", connection.channel_binding.to_string()));
    words.push(("target_session_attrs", connection.target_session_attrs.to_string()));
    if let Some(options) = &connection.options {
        words.push(("options", options.clone()));
    }
    if let Some(passfile) = &connection.passfile {
        words.push(("passfile", passfile.display().to_string()));
    }
    let value = |text: &str| format!("'{}'", text.replace('\\', r"\\").replace('\'', r"\'"));
    let line: Vec<String> = words.iter().map(|(word, text)| format!("{word}={}", value(text))).collect();
    let password = connection.password.as_ref().map(|password| password.expose_secret().to_owned());
    (line.join(" "), password)
}

/// The end of what a program complained of.
pub(super) fn said(stderr: &[u8]) -> String {
    let said = String::from_utf8_lossy(stderr);
    let end = said.char_indices().rev().nth(SHOWN).map_or(0, |(at, _)| at);
    said.get(end..).unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_passed_on_without_its_password() {
        let none = |_: &str| None;
        let connection = ConnInfo::parse("postgresql://odoo:s3cret@db.example:5433/postgres?sslmode=require", &none).unwrap();
        let (line, password) = words(&connection, r"it's a\b = c");
        assert!(line.contains("host='db.example' port='5433' user='odoo'"), "{line}");
        assert!(line.contains(r"dbname='it\'s a\\b = c'"), "{line}");
        assert!(line.contains("sslmode='require'") && !line.contains("s3cret"), "{line}");
        assert_eq!(password.as_deref(), Some("s3cret"));
    }
}
