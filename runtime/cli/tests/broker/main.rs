//! A broker of the program `peervram`, and its clients: the commands, the protocol's page, what is packaged.

mod demo;
mod lending;
mod packaging;
mod protocol;
mod served;
