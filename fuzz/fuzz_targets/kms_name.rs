#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgvault_fuzz::kms_name(data));
