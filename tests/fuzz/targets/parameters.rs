//! Parses arbitrary StorageClass parameters: no panic, and only known keys with sane values pass.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| tandem::csi::parameters::fuzz(data));
