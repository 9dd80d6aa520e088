//! A receipt, for those who read it: one page for people, test results for a CI server. The receipt itself is the JSON.

mod html;
mod junit;
pub(crate) mod words;

pub use html::html;
pub use junit::junit;
