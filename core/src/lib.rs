//! The library behind the program `sidelane`, in reading order.

pub mod front;
pub mod plugin;
