//! Text within statements and commands, whatever it contains.

/// `text` as a literal of SQL and of the replication grammar, whatever it contains.
///
/// SQL literals with a backslash become `E'...'`, so that the result does not depend on `standard_conforming_strings`.
/// The replication grammar has no such form and takes backslashes literally: use [`quote_replication_literal`] there.
pub fn quote_literal(text: &str) -> String {
    postgres_protocol::escape::escape_literal(text).trim_start().to_owned()
}

/// `text` as an identifier of SQL and of the replication grammar (`repl_scanner.l`), whatever it contains.
pub fn quote_identifier(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "\"\""))
}

/// `text` as a literal of the replication grammar, in which nothing but the quote itself is special (`repl_scanner.l`).
pub fn quote_replication_literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_stay_within_their_quotes() {
        assert_eq!(quote_literal("it's"), "'it''s'");
        assert_eq!(quote_literal(r"a\'b"), r"E'a\\''b'");
        assert_eq!(quote_replication_literal(r"a\'); DROP"), r"'a\''); DROP'");
        assert_eq!(quote_identifier(r#"a"b\"#), r#""a""b\""#);
    }
}
