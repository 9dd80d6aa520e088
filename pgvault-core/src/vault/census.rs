//! How many rows the tables had when a backup was taken, and what a count of them in a restored copy proves.
//!
//! Counts of two moments differ for honest reasons: the server went on. What happened to each table between them is known from the WAL
//! that recovery has replayed ([`Touched`]), under one condition: all that the counting snapshot did *not* see must lie in that WAL.
//! It begins at the backup's start position, and a transaction that was in progress at the snapshot may have written rows before.
//! So a census says of each database whether it is [`settled`](CountedDatabase::settled): whether every transaction in progress had
//! begun behind the start position. And a copy that was recovered to less than the snapshot saw proves nothing either
//! ([`CountedDatabase::lsn`]).
//!
//! What is left is sharp: a table of which no row was added or deleted has exactly as many as were counted, and one in which none
//! was deleted at least as many. An update changes no number.
//!
//! The census is part of the manifest, which every listing reads. A table is an array there, not an object with names.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::postgres::Lsn;
use crate::postgres::wal::{Touch, Touched};

/// Rows of the tables of a cluster, as snapshots during the copying of a backup saw them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Census {
    /// Those that were looked into, also when no table of theirs was counted.
    pub databases: Vec<CountedDatabase>,
    /// How many tables were not counted, by reason: `right` (the role may not read them), `changing`, `large`, `many`, `locked`, `time`,
    /// `failed`; and under `databases` how many databases could not be looked into at all.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub left_out: BTreeMap<String, u64>,
}

impl Census {
    /// How many tables were counted.
    pub fn tables(&self) -> usize {
        self.databases.iter().map(|database| database.tables.len()).sum()
    }

    /// Counts what is left out for a reason.
    pub fn leave_out(&mut self, reason: &str, count: u64) {
        if count > 0 {
            *self.left_out.entry(reason.to_owned()).or_default() += count;
        }
    }
}

/// The tables of a database, all as one snapshot saw them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CountedDatabase {
    /// Its name.
    pub name: String,
    /// Its oid, which a rename does not change.
    pub oid: u32,
    /// True when all that the snapshot did not see lies in WAL behind the backup's start position; see the [module](self).
    pub settled: bool,
    /// A copy that was recovered up to here or further has all that the snapshot saw.
    pub lsn: Lsn,
    /// Those that were counted, small ones first.
    pub tables: Vec<CountedTable>,
}

/// How many rows a table had. Stored as the array `[schema, name, oid, filenode, rows]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CountedTable {
    /// The name of its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// Its oid in `pg_class`, which a rename does not change.
    pub oid: u32,
    /// `pg_relation_filenode`: the file that was counted. A table that is rewritten or truncated has another one.
    pub filenode: u32,
    /// Rows of the table itself, without those of tables that inherit from it.
    pub rows: u64,
}

impl Serialize for CountedTable {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        (&self.schema, &self.name, self.oid, self.filenode, self.rows).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for CountedTable {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(TableVisitor)
    }
}

struct TableVisitor;

impl<'de> Visitor<'de> for TableVisitor {
    type Value = CountedTable;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of schema, name, oid, filenode and rows")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<CountedTable, A::Error> {
        fn next<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(array: &mut A, at: usize) -> Result<T, A::Error> {
            array.next_element()?.ok_or_else(|| serde::de::Error::invalid_length(at, &TableVisitor))
        }
        let schema = next(&mut array, 0)?;
        let name = next(&mut array, 1)?;
        let (oid, filenode) = (next(&mut array, 2)?, next(&mut array, 3)?);
        let rows = next(&mut array, 4)?;
        // A newer version may say more, as it may with a new field of an object.
        while array.next_element::<IgnoredAny>()?.is_some() {}
        Ok(CountedTable { schema, name, oid, filenode, rows })
    }
}

/// A counted table as it is in a restored copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// `pg_relation_filenode`.
    pub filenode: u32,
    /// `count(*)` of the table itself (`FROM ONLY`).
    pub rows: u64,
}

/// What is known about the time between a census and a restored copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Between {
    /// What the WAL did to the rows of the counted file.
    pub touch: Touch,
    /// True when the WAL removes the counted file.
    pub was_dropped: bool,
    /// Why nothing may be concluded from the WAL, if so.
    pub doubt: Option<&'static str>,
}

/// What the comparison of two counts says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// As many rows as were counted.
    Same,
    /// Not as many, or not comparable, for a reason that the WAL gives.
    Explained(&'static str),
    /// Not as many, and it cannot be told whether that is right.
    Unsure(String),
    /// Rows are missing, or there are some that nobody added.
    Wrong(String),
}

impl CountedDatabase {
    /// What the WAL says about a table of this database.
    ///
    /// `touched` has read the WAL from the backup's start position to `reached`, where the recovery of the copy ended: the end of the
    /// last record that was replayed, before any promotion.
    pub fn between(&self, table: &CountedTable, touched: &Touched, reached: Lsn) -> Between {
        let doubt = if !self.settled {
            Some("transactions were in progress that had begun before the backup")
        } else if reached < self.lsn {
            Some("the copy was not recovered as far as the rows were counted")
        } else if !touched.is_complete() {
            Some("the WAL between could not be read")
        } else {
            None
        };
        Between { touch: touched.kind(self.oid, table.filenode), was_dropped: touched.was_dropped(self.oid, table.filenode), doubt }
    }
}

impl CountedTable {
    /// Compares the table with what is found of it, under its oid, in a restored copy; `None` when it is not there.
    pub fn compare(&self, found: Option<Found>, between: Between) -> Verdict {
        let Found { filenode, rows } = match found {
            Some(found) => found,
            None if between.was_dropped && between.doubt.is_none() => return Verdict::Explained("it was dropped since"),
            None => return between.judge(format!("{self} is not there, and the WAL does not drop it")),
        };
        if filenode != self.filenode {
            return Verdict::Explained("it was rewritten or truncated since");
        }
        if rows == self.rows {
            return Verdict::Same;
        }
        let counted = self.rows;
        let (has, was) = (format!("{self} has {}", Rows(rows)), format!("when the backup was taken it had {counted}"));
        match between.touch {
            _ if between.doubt.is_some() => between.judge(format!("{has}; {was}")),
            Touch::Changed => Verdict::Explained("rows were deleted since, or its file is new"),
            Touch::Grew if rows > self.rows => Verdict::Explained("rows were added since"),
            Touch::Grew => between.judge(format!("{has}; {was}, and the WAL since then deletes none of them")),
            Touch::Untouched | Touch::Updated => {
                between.judge(format!("{has}; {was}, and the WAL since then neither adds nor deletes one"))
            }
        }
    }
}

impl Between {
    fn judge(self, sentence: String) -> Verdict {
        match self.doubt {
            None => Verdict::Wrong(sentence),
            Some(doubt) => Verdict::Unsure(format!("{sentence}; it cannot be told whether that is right: {doubt}")),
        }
    }
}

impl fmt::Display for CountedTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

struct Rows(u64);

impl fmt::Display for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} row{}", self.0, if self.0 == 1 { "" } else { "s" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> CountedTable {
        CountedTable { schema: "public".into(), name: "orders".into(), oid: 16384, filenode: 16390, rows: 10 }
    }

    fn compare(rows: u64, touch: Touch) -> Verdict {
        table().compare(Some(Found { filenode: 16390, rows }), Between { touch, was_dropped: false, doubt: None })
    }

    fn is_wrong(verdict: &Verdict) -> bool {
        matches!(verdict, Verdict::Wrong(_))
    }

    #[test]
    fn what_wal_explains_is_not_wrong_and_all_else_is() {
        for touch in [Touch::Untouched, Touch::Updated, Touch::Grew, Touch::Changed] {
            assert_eq!(compare(10, touch), Verdict::Same);
            assert_eq!(is_wrong(&compare(9, touch)), touch != Touch::Changed, "{touch:?}");
            assert_eq!(is_wrong(&compare(11, touch)), touch < Touch::Grew, "{touch:?}");
        }
        let Verdict::Wrong(sentence) = compare(1, Touch::Grew) else { panic!() };
        assert_eq!(
            sentence,
            "public.orders has 1 row; when the backup was taken it had 10, and the WAL since then deletes none of them"
        );
    }

    #[test]
    fn another_file_explains_any_number() {
        let between = Between { touch: Touch::Untouched, was_dropped: false, doubt: None };
        let verdict = table().compare(Some(Found { filenode: 16391, rows: 0 }), between);
        assert!(matches!(verdict, Verdict::Explained(_)));
    }

    #[test]
    fn a_table_that_is_gone_must_have_been_dropped() {
        let between = |was_dropped, doubt| Between { touch: Touch::Untouched, was_dropped, doubt };
        assert!(is_wrong(&table().compare(None, between(false, None))));
        assert_eq!(table().compare(None, between(true, None)), Verdict::Explained("it was dropped since"));
        assert!(matches!(table().compare(None, between(true, Some("x"))), Verdict::Unsure(_)));
        assert!(matches!(table().compare(None, between(false, Some("x"))), Verdict::Unsure(_)));
    }

    #[test]
    fn in_doubt_nothing_is_wrong() {
        for touch in [Touch::Untouched, Touch::Updated, Touch::Grew, Touch::Changed] {
            for rows in [9, 11] {
                let between = Between { touch, was_dropped: false, doubt: Some("x") };
                let verdict = table().compare(Some(Found { filenode: 16390, rows }), between);
                assert!(matches!(verdict, Verdict::Unsure(_)), "{verdict:?}");
            }
        }
    }

    #[test]
    fn a_table_is_an_array_and_may_have_more_in_it() {
        let json = serde_json::to_string(&table()).unwrap();
        assert_eq!(json, r#"["public","orders",16384,16390,10]"#);
        assert_eq!(serde_json::from_str::<CountedTable>(&json).unwrap(), table());
        let newer = r#"["public","orders",16384,16390,10,{"of":"a newer version"},1]"#;
        assert_eq!(serde_json::from_str::<CountedTable>(newer).unwrap(), table());
        for broken in [r#"["public","orders",16384,16390]"#, r#"["public","orders",-1,16390,10]"#, "{}", "[]", "7"] {
            assert!(serde_json::from_str::<CountedTable>(broken).is_err(), "{broken}");
        }
        let newer: Census = serde_json::from_str(r#"{"databases":[],"left_out":{"new":3},"more":1}"#).unwrap();
        assert_eq!(newer.left_out["new"], 3);
    }
}
