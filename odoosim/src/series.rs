//! What differs between the series of Odoo.

/// A series of Odoo, as far as its storage of attachments is concerned: 15 to 17 behave as 14 and 18 do, 20 stands for 19.5 too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Series {
    /// 14.0: file before row, no index on `store_fname`, still takes up paths with three digits.
    V14,
    /// 18.0: file before row.
    V18,
    /// 19.0 (and 18.3): row before file, both before COMMIT.
    V19,
    /// 20.0 (and 19.5): row before file, files appear by renaming, garbage collection without a lock.
    V20,
}

impl Series {
    /// Every series, in their order.
    pub const ALL: [Self; 4] = [Self::V14, Self::V18, Self::V19, Self::V20];

    /// Its major version.
    pub fn major(self) -> u32 {
        match self {
            Self::V14 => 14,
            Self::V18 => 18,
            Self::V19 => 19,
            Self::V20 => 20,
        }
    }

    /// The content is written before the INSERT or UPDATE is sent, so nothing keeps the garbage collection away from it yet.
    pub fn writes_before_row(self) -> bool {
        matches!(self, Self::V14 | Self::V18)
    }

    /// An error of the disk is logged, and the row is committed all the same.
    pub fn swallows_write_errors(self) -> bool {
        matches!(self, Self::V14 | Self::V18)
    }

    /// A content that lies below three digits (as Odoo 7 wrote it) is used where it is. Removed in 17.2.
    pub fn uses_retro_paths(self) -> bool {
        self == Self::V14
    }

    /// Written beside its name and renamed; readers never see a part.
    pub fn replaces_atomically(self) -> bool {
        self == Self::V20
    }

    /// The garbage collection locks the table; otherwise it goes by the age of the marks.
    pub fn locks_for_gc(self) -> bool {
        self != Self::V20
    }

    /// Where a `store_fname` lies below the filestore: Odoo drops some characters before it joins the two.
    pub fn path_of(self, store_fname: &str) -> String {
        let dropped: &[char] = if self >= Self::V19 { &['.', ':'] } else { &['.'] };
        store_fname.replace(dropped, "").trim_matches(['/', '\\']).to_owned()
    }
}

/// True for a `store_fname` that names a file of the filestore, also outside the sha1 scheme; false for an object of a store
/// (`s3://bucket/key`, `azure://container/key`, `code://path`).
pub fn is_local(store_fname: &str) -> bool {
    !store_fname.contains("://")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_names_are_resolved_as_odoo_does() {
        assert_eq!(Series::V18.path_of("/import/a.b:c.pdf"), "import/ab:cpdf");
        assert_eq!(Series::V19.path_of("/import/a.b:c.pdf/"), "import/abcpdf");
        assert_eq!(Series::V14.path_of("../../etc/passwd"), "etc/passwd");
        assert!(is_local("ab/abc") && !is_local("s3://bucket/abc"));
    }
}
