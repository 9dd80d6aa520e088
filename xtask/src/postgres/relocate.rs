//! Copies PostgreSQL, or another program, out of an unpacked Debian so that it runs where it lands.
//!
//! Each program gets the copied loader as its interpreter and the copied libraries as its only search path: none of it
//! meets the C library of this machine. PostgreSQL finds its `share` and `lib` folders relative to the program.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::run::{program, run_quietly};

/// Copies `usr/lib/postgresql/<version>` and its `share` folder from `root` into `destination`.
pub(super) fn postgres(root: &Path, version: u32, destination: &Path) -> Result<()> {
    let programs = format!("usr/lib/postgresql/{version}");
    for folder in [&programs, &format!("usr/share/postgresql/{version}"), "usr/share/postgresql-common"] {
        let target = destination.join(folder);
        let parent = target.parent().context("no parent folder")?;
        fs::create_dir_all(parent)?;
        // Debian keeps the sample files of one folder as absolute links into another.
        let how = if folder.ends_with("common") { "-aL" } else { "-a" };
        let copied = run_quietly(program("cp", [how]).arg(root.join(folder)).arg(parent));
        // Links of the common folder that lead nowhere are of no use to a server either.
        if !folder.ends_with("common") {
            copied?;
        }
    }
    // The compiled-to-LLVM copy of the server is large, and JIT is not what is tested.
    let library = destination.join(&programs).join("lib");
    let _ = fs::remove_dir_all(library.join("bitcode"));
    let _ = fs::remove_file(library.join("llvmjit.so"));

    let mut binaries = Vec::new();
    collect_elf(&destination.join(&programs), &mut binaries)?;
    settle(root, destination, &binaries)
}

/// Copies one program, by its path in `root`, into `destination`.
pub(super) fn one(root: &Path, path: &str, destination: &Path) -> Result<PathBuf> {
    let target = destination.join(path);
    fs::create_dir_all(target.parent().context("no parent folder")?)?;
    let _ = fs::copy(root.join(path), &target).with_context(|| format!("copy {path}"))?;
    settle(root, destination, std::slice::from_ref(&target))?;
    Ok(target)
}

/// Gives copied programs the loader and the libraries of `root`.
fn settle(root: &Path, destination: &Path, binaries: &[PathBuf]) -> Result<()> {
    let own_libraries = destination.join("so");
    fs::create_dir_all(&own_libraries)?;
    let mut loader = None;
    for needed in needed_libraries(root, destination, binaries)? {
        let name = needed.file_name().context("a library without a name")?.to_owned();
        let target = own_libraries.join(&name);
        fs::copy(root.join(needed.strip_prefix("/").unwrap_or(&needed)), &target)
            .with_context(|| format!("copy {}", needed.display()))?;
        if name.to_string_lossy().starts_with("ld-linux") {
            loader = Some(target);
        }
    }
    let loader = loader.context("ldd named no loader")?;
    for binary in binaries {
        if run_quietly(program("patchelf", ["--print-interpreter"]).arg(binary)).is_ok() {
            run_quietly(program("patchelf", ["--set-interpreter"]).arg(&loader).arg(binary))?;
        }
        // RPATH, not RUNPATH: it must also hold for the libraries of the libraries.
        run_quietly(program("patchelf", ["--force-rpath", "--set-rpath"]).arg(&own_libraries).arg(binary))?;
    }
    Ok(())
}

fn collect_elf(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            collect_elf(&entry.path(), found)?;
        } else if kind.is_file() {
            let mut magic = [0; 4];
            if fs::File::open(entry.path())?.read(&mut magic)? == 4 && magic == *b"\x7fELF" {
                found.push(entry.path());
            }
        }
    }
    Ok(())
}

/// Every library that the binaries load, as paths inside `root`, where `ldd` is asked.
fn needed_libraries(root: &Path, destination: &Path, binaries: &[PathBuf]) -> Result<BTreeSet<PathBuf>> {
    // One file without dependencies makes ldd fail; its answers about the others count all the same.
    let mut ldd = program("chroot", [root.as_os_str()]);
    ldd.args(["sh", "-c", r#"for file; do ldd "$file" 2>/dev/null; done; true"#, "sh"]);
    ldd.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    for binary in binaries {
        ldd.arg(Path::new("/").join(binary.strip_prefix(destination)?));
    }
    let answer = run_quietly(&mut ldd)?;
    Ok(answer
        .split_whitespace()
        .filter(|word| word.starts_with('/') && word.contains(".so") && !word.ends_with(':'))
        .map(PathBuf::from)
        .collect())
}
