//! Replays every stored input of the fuzz targets, so that what was once found stays fixed on any toolchain.

#![expect(clippy::unwrap_used, unreachable_pub, reason = "a test; its modules are shared")]

#[path = "corpus/seeds.rs"]
mod seeds;
#[path = "corpus/targets.rs"]
mod targets;

use std::path::{Path, PathBuf};

fn fuzz_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz")
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let Ok(listed) = std::fs::read_dir(directory) else { return Vec::new() };
    let mut files: Vec<_> = listed.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn every_stored_input_keeps_its_promises() {
    for (name, target) in targets::TARGETS {
        let corpus = files(&fuzz_dir().join("corpus").join(name));
        assert!(!corpus.is_empty(), "{name} has no corpus");
        for file in corpus.into_iter().chain(files(&fuzz_dir().join("regressions").join(name))) {
            let bytes = std::fs::read(&file).unwrap();
            let outcome = std::panic::catch_unwind(|| target(&bytes));
            assert!(outcome.is_ok(), "{}", file.display());
        }
    }
}

/// A directory without a target is an input that nobody replays.
#[test]
fn every_stored_input_has_a_target() {
    for kind in ["corpus", "regressions"] {
        for directory in files(&fuzz_dir().join(kind)) {
            let name = directory.file_name().unwrap().to_str().unwrap();
            assert!(targets::TARGETS.iter().any(|(target, _)| *target == name), "{}", directory.display());
        }
    }
}

/// `cargo test -p pgvault-core --test fuzz_corpus -- --ignored write_seeds` writes the seeds that are made from real encodings.
#[test]
#[ignore = "writes into the source tree"]
fn write_seeds() {
    for (target, name, bytes) in seeds::all() {
        let directory = fuzz_dir().join("corpus").join(target);
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join(name), bytes).unwrap();
    }
}
