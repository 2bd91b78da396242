//! Tests of the crate as a whole; a module per area.

mod generated;
mod lane;
mod pair;
