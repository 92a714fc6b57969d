//! What several test programs share.
#![allow(dead_code, reason = "each test program uses a part of it")]

pub mod diagnosis;
pub mod installation;
pub mod leash;
pub mod mounted;
pub mod points;
pub mod small_pool;
