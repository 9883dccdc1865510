//! Routes on trees made by hand.
