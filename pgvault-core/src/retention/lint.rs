//! Does a policy do what it is for?
