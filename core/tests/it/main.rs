//! The library against the program, one module per behaviour: what needs many of one role at once, and
//! the other as it is run.

mod herd;
