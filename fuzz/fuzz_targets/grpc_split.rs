//! Any bytes in any frames come out of the gRPC message splitter as they went in, in chunks that the
//! other end accepts.
#![no_main]

#[path = "../../plugins/grpc/tests/it/split.rs"]
mod split;

libfuzzer_sys::fuzz_target!(|input: &[u8]| split::check(input));
