//! TLS to a PostgreSQL server, with the meaning libpq gives to `sslmode`.
//!
//! rustls with the aws-lc-rs provider, passed explicitly: whether some other crate of the process installed a default
//! provider must not decide anything here. rustls has one policy, that of browsers; libpq has four, and servers carry
//! certificates that browsers would refuse. What is added to rustls' verification, all of it as OpenSSL does for libpq:
//!
//! - without root certificates nothing is verified but the handshake's signature;
//! - the name is only compared at `verify-full`;
//! - a self-signed server certificate that is itself the root certificate (the first recipe of PostgreSQL's manual);
//! - a certificate without alternative names is matched by its common name.
//!
//! Source: `src/interfaces/libpq/fe-secure-openssl.c` and `fe-secure-common.c`.

use std::fmt;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature_with_raw_key};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use sha2::{Digest, Sha256, Sha384, Sha512};

use super::conninfo::{Endpoint, Host, RootCert, SslMode, SslNegotiation, SslSettings};
use crate::{Error, ErrorKind, Result};

fn unusable(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Usage, "source.tls_config", message)
}

/// The client configuration for these settings. Certificates are read anew each time, so that renewed ones are used.
pub(super) fn client_config(ssl: &SslSettings) -> Result<Arc<ClientConfig>> {
    let roots = match &ssl.root {
        RootCert::Absent(place) if matches!(ssl.mode, SslMode::VerifyCa | SslMode::VerifyFull) => {
            let place = place.as_ref().map_or_else(|| "~/.postgresql/root.crt".to_owned(), |path| path.display().to_string());
            return Err(unusable(format!("sslmode={} needs a root certificate, and {place} does not exist", ssl.mode))
                .with_hint("set sslrootcert to the authority's certificate, or to `system`"));
        }
        RootCert::Absent(_) => None,
        RootCert::File(path) => Some(certificates(path)?),
        RootCert::System => {
            let found = rustls_native_certs::load_native_certs();
            for error in found.errors {
                tracing::warn!(%error, "a certificate of the system cannot be read");
            }
            Some(found.certs)
        }
    };
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = Arc::new(Verifier::new(&provider, roots, ssl.mode == SslMode::VerifyFull)?);
    let versions: &[_] = if ssl.only_tls13 { &[&rustls::version::TLS13] } else { rustls::ALL_VERSIONS };
    let refused = |error: rustls::Error| unusable(format!("TLS cannot be set up: {error}")).with_source(error);
    let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(versions).map_err(refused)?;
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let mut config = match &ssl.client {
        None => builder.with_no_client_auth(),
        Some(client) => {
            let chain = certificates(&client.cert)?;
            let key = private_key(&client.key)?;
            builder.with_client_auth_cert(chain, key).map_err(refused)?
        }
    };
    config.enable_sni = ssl.sni;
    if ssl.negotiation == SslNegotiation::Direct {
        config.alpn_protocols = vec![b"postgresql".to_vec()];
    }
    Ok(Arc::new(config))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let pem = std::fs::read(path).map_err(|error| Error::io("read the certificate", path, error))?;
    let found: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(unusable(format!("{} contains no PEM certificate", path.display()))),
        Err(error) => Err(unusable(format!("{} is not a PEM file: {error}", path.display()))),
    }
}

/// Reads a private key, refusing a file that others may read: libpq's rule (0600, or 0640 when root owns it).
fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    let metadata = std::fs::metadata(path).map_err(|error| Error::io("read the private key", path, error))?;
    let allowed = if metadata.uid() == 0 { 0o640 } else { 0o600 };
    if metadata.mode() & 0o777 & !allowed & 0o077 != 0 {
        return Err(unusable(format!("private key file {} has group or world access", path.display())).with_hint(
            "permissions should be u=rw (0600) or less if owned by the current user, u=rw,g=r (0640) or less if by root",
        ));
    }
    let pem = zeroize::Zeroizing::new(std::fs::read(path).map_err(|error| Error::io("read the private key", path, error))?);
    PrivateKeyDer::from_pem_slice(&pem)
        .map_err(|error| unusable(format!("{} holds no usable private key (PEM, not encrypted): {error}", path.display())))
}

/// The name to verify and to send as SNI. A host name that cannot be in a certificate becomes the address, which then
/// fails at `verify-full` only.
pub(super) fn server_name(endpoint: &Endpoint, address: IpAddr) -> ServerName<'static> {
    match &endpoint.host {
        Host::Tcp(name) => ServerName::try_from(name.clone()).unwrap_or_else(|_| ServerName::from(address)),
        Host::Unix(_) => ServerName::from(address),
    }
}

/// What to do about a failed handshake.
pub(super) fn hint(error: &std::io::Error) -> &'static str {
    let text = error.to_string();
    if text.contains("UnsupportedCertVersion") {
        "the server's certificate is of X.509 version 1: issue it again with extensions (openssl x509 -req -extfile ...)"
    } else if text.contains("NotValidForName") || text.contains("not valid for name") || text.contains("not valid for any name") {
        "the certificate is for another host: connect by the name it carries, or reissue it with that subjectAltName"
    } else if text.contains("UnknownIssuer") {
        "the certificate is not signed by the authority in sslrootcert"
    } else {
        "compare sslmode, sslrootcert and the server's ssl_cert_file"
    }
}

/// Verifies as libpq does; see the [module documentation](self).
struct Verifier {
    roots: Option<Roots>,
    check_name: bool,
    algorithms: WebPkiSupportedAlgorithms,
}

struct Roots {
    store: RootCertStore,
    certificates: Vec<CertificateDer<'static>>,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let roots = self.roots.as_ref().map_or(0, |roots| roots.certificates.len());
        f.debug_struct("Verifier").field("roots", &roots).field("check_name", &self.check_name).finish_non_exhaustive()
    }
}

impl Verifier {
    fn new(provider: &CryptoProvider, roots: Option<Vec<CertificateDer<'static>>>, check_name: bool) -> Result<Self> {
        let roots = match roots {
            None => None,
            Some(certificates) => {
                let mut store = RootCertStore::empty();
                let (used, _) = store.add_parsable_certificates(certificates.iter().cloned());
                if used == 0 {
                    return Err(unusable("none of the root certificates can be used"));
                }
                Some(Roots { store, certificates })
            }
        };
        Ok(Self { roots, check_name, algorithms: provider.signature_verification_algorithms })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        let Some(roots) = &self.roots else { return Ok(ServerCertVerified::assertion()) };
        let parsed = ParsedCertificate::try_from(end_entity)?;
        if roots.certificates.contains(end_entity) {
            // Trusted by name and key; webpki has no notion of it and refuses the CA flag that such a certificate has.
            Certificate::parse(end_entity).ok_or(CertificateError::BadEncoding)?.check_validity(now)?;
        } else {
            verify_server_cert_signed_by_trust_anchor(&parsed, &roots.store, intermediates, now, self.algorithms.all)?;
        }
        if self.check_name
            && let Err(error) = verify_server_name(&parsed, name)
        {
            let no_names = matches!(
                &error,
                rustls::Error::InvalidCertificate(CertificateError::NotValidForNameContext { presented, .. }) if presented.is_empty()
            );
            let common = if no_names { Certificate::parse(end_entity).and_then(|it| it.common_name()) } else { None };
            if !common.is_some_and(|common| matches_common_name(&common, &name.to_str())) {
                return Err(error);
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    /// By the bare key, so that certificates that webpki cannot parse (version 1, as `openssl x509 -req` makes them by the
    /// recipe of PostgreSQL's manual) can be used where they are not verified.
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let parsed = Certificate::parse(certificate).ok_or(CertificateError::BadEncoding)?;
        let key = SubjectPublicKeyInfoDer::from(parsed.public_key);
        verify_tls13_signature_with_raw_key(message, &key, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// `pq_verify_peer_name_matches_certificate_name`: equal, or a wildcard for exactly one label.
fn matches_common_name(common: &str, host: &str) -> bool {
    let (common, host) = (common.to_ascii_lowercase(), host.to_ascii_lowercase());
    if common.contains('\0') || common.is_empty() {
        return false;
    }
    match common.strip_prefix("*.") {
        Some(domain) => {
            let rest = host.split_once('.').filter(|(label, _)| !label.is_empty()).map(|(_, rest)| rest);
            domain.contains('.') && rest == Some(domain) && host.parse::<IpAddr>().is_err()
        }
        None => common == host,
    }
}

/// The channel binding data of RFC 5929 `tls-server-end-point`: the certificate, hashed with the hash function of its own
/// signature, MD5 and SHA-1 replaced by SHA-256. `None` when the signature has no such function (Ed25519): the RFC leaves
/// that undefined, and PostgreSQL servers cannot do it either.
pub(super) fn tls_server_end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    Some(match Certificate::parse(certificate)?.signature_hash()? {
        Hash::Sha256 => Sha256::digest(certificate).to_vec(),
        Hash::Sha384 => Sha384::digest(certificate).to_vec(),
        Hash::Sha512 => Sha512::digest(certificate).to_vec(),
    })
}

#[derive(Debug, PartialEq, Eq)]
enum Hash {
    Sha256,
    Sha384,
    Sha512,
}

/// The fields of an X.509 certificate (RFC 5280, 4.1) that rustls does not hand out.
struct Certificate<'a> {
    algorithm: &'a [u8],
    validity: &'a [u8],
    subject: &'a [u8],
    public_key: &'a [u8],
}

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OID: u8 = 0x06;
const INTEGER: u8 = 0x02;

/// An element of DER: its tag, content and everything including the header. Takes it off `input`.
fn element<'a>(input: &mut &'a [u8]) -> Option<(u8, &'a [u8], &'a [u8])> {
    let whole = *input;
    let (&tag, rest) = whole.split_first()?;
    let (&first, mut rest) = rest.split_first()?;
    let mut length = usize::from(first);
    if first >= 0x80 {
        let (digits, after) = rest.split_at_checked(usize::from(first & 0x7F))?;
        if digits.is_empty() || digits.len() > 3 {
            return None;
        }
        length = digits.iter().fold(0, |length, digit| length << 8 | usize::from(*digit));
        rest = after;
    }
    let (content, after) = rest.split_at_checked(length)?;
    let all = whole.get(..whole.len() - after.len())?;
    *input = after;
    Some((tag, content, all))
}

/// The content of the next element, which must have this tag.
fn expect<'a>(input: &mut &'a [u8], tag: u8) -> Option<&'a [u8]> {
    element(input).filter(|(found, ..)| *found == tag).map(|(_, content, _)| content)
}

impl<'a> Certificate<'a> {
    fn parse(mut der: &'a [u8]) -> Option<Self> {
        let mut certificate = expect(&mut der, SEQUENCE)?;
        let mut tbs = expect(&mut certificate, SEQUENCE)?;
        let algorithm = expect(&mut certificate, SEQUENCE)?;
        if tbs.first() == Some(&0xA0) {
            element(&mut tbs)?;
        }
        expect(&mut tbs, INTEGER)?;
        expect(&mut tbs, SEQUENCE)?;
        expect(&mut tbs, SEQUENCE)?;
        let validity = expect(&mut tbs, SEQUENCE)?;
        let subject = expect(&mut tbs, SEQUENCE)?;
        let (_, _, public_key) = element(&mut tbs).filter(|(tag, ..)| *tag == SEQUENCE)?;
        Some(Self { algorithm, validity, subject, public_key })
    }

    fn check_validity(&self, now: UnixTime) -> std::result::Result<(), CertificateError> {
        let mut validity = self.validity;
        let (Some(from), Some(to)) = (time(&mut validity), time(&mut validity)) else { return Err(CertificateError::BadEncoding) };
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        if now < from {
            return Err(CertificateError::NotValidYet);
        }
        if now > to {
            return Err(CertificateError::Expired);
        }
        Ok(())
    }

    /// The last common name of the subject: the most specific one, which OpenSSL takes too.
    fn common_name(&self) -> Option<String> {
        let mut names = self.subject;
        let mut found = None;
        while !names.is_empty() {
            let mut attributes = expect(&mut names, SET)?;
            while !attributes.is_empty() {
                let mut attribute = expect(&mut attributes, SEQUENCE)?;
                let is_common_name = expect(&mut attribute, OID)? == [0x55, 0x04, 0x03];
                let (tag, value, _) = element(&mut attribute)?;
                // UTF8String, PrintableString, IA5String, T61String (of which only the ASCII part is understood).
                if is_common_name && matches!(tag, 0x0C | 0x13 | 0x16 | 0x14) {
                    found = std::str::from_utf8(value).ok().map(str::to_owned);
                }
            }
        }
        found
    }

    fn signature_hash(&self) -> Option<Hash> {
        let mut algorithm = self.algorithm;
        let oid = expect(&mut algorithm, OID)?;
        let rsa = oid.strip_prefix(&[0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01]);
        let ecdsa = oid.strip_prefix(&[0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x04]);
        match (rsa, ecdsa) {
            // md5, sha1, sha256 with RSA; sha1 with ECDSA; the SHA-2 family with ECDSA.
            (Some([4 | 5 | 11]), _) | (_, Some([1] | [3, 2])) => Some(Hash::Sha256),
            (Some([12]), _) | (_, Some([3, 3])) => Some(Hash::Sha384),
            (Some([13]), _) | (_, Some([3, 4])) => Some(Hash::Sha512),
            // RSASSA-PSS names the hash in its parameters: [0] { SEQUENCE { OID } }, SHA-1 when left out.
            (Some([10]), _) => {
                let mut parameters = expect(&mut algorithm, SEQUENCE)?;
                let Some(mut hash) = expect(&mut parameters, 0xA0) else { return Some(Hash::Sha256) };
                let mut hash = expect(&mut hash, SEQUENCE)?;
                match expect(&mut hash, OID)?.strip_prefix(&[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02])? {
                    [1] => Some(Hash::Sha256),
                    [2] => Some(Hash::Sha384),
                    [3] => Some(Hash::Sha512),
                    _ => None,
                }
            }
            _ => None,
        }
    }
}

/// A `UTCTime` or `GeneralizedTime` in seconds since 1970 (RFC 5280, 4.1.2.5: always with seconds and `Z`).
fn time(input: &mut &[u8]) -> Option<i64> {
    let (tag, text, _) = element(input)?;
    let text = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
    let (year, rest) = match tag {
        0x17 => {
            let (year, rest) = text.split_at_checked(2)?;
            let year: i16 = year.parse().ok()?;
            (if year < 50 { 2000 + year } else { 1900 + year }, rest)
        }
        0x18 => {
            let (year, rest) = text.split_at_checked(4)?;
            (year.parse().ok()?, rest)
        }
        _ => return None,
    };
    if rest.len() != 10 {
        return None;
    }
    let part = |at: usize| rest.get(at..at + 2)?.parse::<i8>().ok();
    let civil = jiff::civil::DateTime::new(year, part(0)?, part(2)?, part(4)?, part(6)?, part(8)?, 0).ok()?;
    Some(jiff::tz::TimeZone::UTC.to_timestamp(civil).ok()?.as_second())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn common_names_match_as_in_libpq() {
        for (common, host) in
            [("db", "DB"), ("db.example.com", "db.example.com"), ("*.example.com", "db.example.com"), ("10.0.0.1", "10.0.0.1")]
        {
            assert!(matches_common_name(common, host), "{common} {host}");
        }
        for (common, host) in [
            ("*.example.com", "example.com"),
            ("*.example.com", "a.b.example.com"),
            ("*.com", "example.com"),
            ("*", "db"),
            ("*.0.0.1", "10.0.0.1"),
            ("db\0.evil", "db\0.evil"),
            ("", ""),
        ] {
            assert!(!matches_common_name(common, host), "{common} {host}");
        }
    }

    #[test]
    fn times_of_certificates() {
        let of = |tag, text: &str| {
            let mut der = vec![tag, u8::try_from(text.len()).unwrap()];
            der.extend_from_slice(text.as_bytes());
            time(&mut &der[..])
        };
        assert_eq!(of(0x17, "700101000000Z"), Some(0));
        assert_eq!(of(0x17, "491231235959Z"), Some(2_524_607_999));
        assert_eq!(of(0x18, "20500101000000Z"), Some(2_524_608_000));
        assert_eq!(of(0x17, "700101000000"), None);
        assert_eq!(of(0x17, "701301000000Z"), None);
    }

    proptest! {
        #[test]
        fn no_certificate_makes_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = tls_server_end_point(&bytes);
            if let Some(certificate) = Certificate::parse(&bytes) {
                let _ = certificate.common_name();
                let _ = certificate.check_validity(UnixTime::since_unix_epoch(std::time::Duration::ZERO));
            }
            let _ = time(&mut &bytes[..]);
        }
    }
}
