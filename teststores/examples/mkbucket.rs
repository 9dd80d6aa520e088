//! Makes a bucket in a server that runs, and says its name.
#![expect(clippy::print_stdout, clippy::unwrap_used)]
fn main() {
    let kind: pgvault_teststores::Kind = match std::env::args().nth(1).unwrap().as_str() {
        "azure" => "azurite".parse().unwrap(),
        other => other.parse().unwrap(),
    };
    let lock = kind.is_s3();
    println!("{}", pgvault_teststores::Server::shared(kind).unwrap().bucket(lock).unwrap().bucket());
}
