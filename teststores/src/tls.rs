//! A certificate authority of a test, and a server's certificate for `localhost` and 127.0.0.1.

use std::path::PathBuf;

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};

use crate::guard::Work;

/// Writes `ca.pem`, `cert.pem` and `key.pem` into the folder of a server; gives the first.
///
/// The server's certificate is not its own authority: a client that trusts such a one as a root refuses it as a leaf.
pub(crate) fn make(work: &Work) -> Result<PathBuf> {
    let mut authority = CertificateParams::default();
    authority.distinguished_name.push(DnType::CommonName, "pgvault test authority");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
    let mut leaf = CertificateParams::new(["localhost".to_owned(), "127.0.0.1".to_owned()])?;
    leaf.distinguished_name.push(DnType::CommonName, "localhost");
    let key = KeyPair::generate()?;
    let certificate = leaf.signed_by(&key, &authority)?;
    let _ = work.write("cert.pem", &certificate.pem())?;
    let _ = work.write("key.pem", &key.serialize_pem())?;
    work.write("ca.pem", &authority.pem())
}
