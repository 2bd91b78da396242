//! Plugins as the rest of core sees them.

pub mod lend;
