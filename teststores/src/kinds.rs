//! Where each server comes from and how it is started; see the table in the [crate's documentation](crate).

pub(crate) mod azurite;
pub(crate) mod garage;
pub(crate) mod localstack;
pub(crate) mod rgw;
pub(crate) mod s3rver;
pub(crate) mod s3s;
