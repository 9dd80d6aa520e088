//! The password file, `.pgpass`.

use std::path::Path;

use secrecy::SecretString;

use super::{Endpoint, Host, SOCKET_DIRS};

/// The host field of `.pgpass` lines for a server: a socket in a default directory is `localhost`.
pub(super) fn pgpass_host(endpoint: &Endpoint) -> String {
    match &endpoint.host {
        Host::Unix(directory) if SOCKET_DIRS.iter().any(|known| directory == Path::new(known)) => "localhost".to_owned(),
        Host::Unix(directory) => directory.display().to_string(),
        Host::Tcp(name) => name.clone(),
    }
}

pub(super) enum PassfileError {
    Ignored(&'static str),
    Io(std::io::Error),
}

/// The content of a password file. `Ok(None)` when there is none, which is normal.
pub(super) fn read_passfile(path: &Path) -> Result<Option<String>, PassfileError> {
    use std::os::unix::fs::PermissionsExt;
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => return Ok(None),
        Err(error) => return Err(PassfileError::Io(error)),
    };
    if !metadata.is_file() {
        return Err(PassfileError::Ignored("it is not a plain file"));
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        return Err(PassfileError::Ignored("it has group or world access; permissions should be u=rw (0600) or less"));
    }
    let content = std::fs::read(path).map_err(PassfileError::Io)?;
    String::from_utf8(content).map(Some).map_err(|_| PassfileError::Ignored("it is not UTF-8"))
}

/// `passwordFromFile` of libpq.
pub(super) fn find_password(content: &str, host: &str, port: u16, database: &str, user: &str) -> Option<SecretString> {
    let port = port.to_string();
    content.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let rest = [host, port.as_str(), database, user].iter().try_fold(line, |rest, wanted| match_field(rest, wanted))?;
        let mut password = String::new();
        let mut chars = rest.chars();
        while let Some(c) = chars.next() {
            password.push(if c == '\\' { chars.next().unwrap_or(c) } else { c });
        }
        Some(SecretString::from(password))
    })
}

/// What follows the first field of `line`, when the field is `*` or, unescaped, `wanted`.
pub(super) fn match_field<'a>(line: &'a str, wanted: &str) -> Option<&'a str> {
    if let Some(rest) = line.strip_prefix("*:") {
        return Some(rest);
    }
    let mut value = String::new();
    let mut chars = line.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => value.push(chars.next()?.1),
            ':' => return (value == wanted).then(|| line.get(at + 1..)).flatten(),
            c => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use secrecy::ExposeSecret;

    use super::*;

    #[test]
    fn pgpass_lines_match_as_in_libpq() {
        let content = "# comment\nshort\n\
                       db.example:5432:app:bob:first\n\
                       2001\\:db8\\:\\:1:*:*:bob:six:with:colons\n\
                       *:5432:replication:*:repl\\:\\\\x\n\
                       localhost:*:*:bob:socket\n";
        let find = |host: &str, database: &str, user: &str| {
            find_password(content, host, 5432, database, user).map(|password| password.expose_secret().to_owned())
        };
        assert_eq!(find("db.example", "app", "bob").as_deref(), Some("first"));
        assert_eq!(find("2001:db8::1", "x", "bob").as_deref(), Some("six:with:colons"));
        assert_eq!(find("other", "replication", "x").as_deref(), Some(r"repl:\x"));
        assert_eq!(find("db.example", "app", "eve"), None);
        let default = Endpoint { host: Host::Unix("/var/run/postgresql".into()), hostaddr: None, port: 5432 };
        assert_eq!(find(&pgpass_host(&default), "app", "bob").as_deref(), Some("socket"));
        let other = Endpoint { host: Host::Unix("/srv/run".into()), ..default };
        assert_eq!(find(&pgpass_host(&other), "app", "bob"), None);
    }

    proptest! {
        #[test]
        fn no_line_makes_the_parser_panic(line in "\\PC{0,60}") {
            let _ = find_password(&line, "h", 1, "d", "u");
        }
    }
}
