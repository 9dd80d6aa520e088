#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgvault_fuzz::filestore_run(data));
