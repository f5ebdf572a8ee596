//! The testkit: everything that tests of several daemons share.
