//! Checks as the test cases of a suite, in the XML that CI servers read.

use std::time::Duration;

use pgvault_core::vault::drill::{Receipt, Verdict};
use pgvault_core::{Error, ErrorKind, Result};
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};

/// Writes the checks of a drill.
///
/// # Errors
/// When the XML cannot be written.
pub fn junit(receipt: &Receipt) -> Result<String> {
    let mut suite = TestSuite::new(format!("pgvault drill {}", receipt.cluster));
    let _ = suite.add_property(("drill", receipt.id.to_string().as_str()));
    let _ = suite.add_property(("outcome", receipt.outcome.as_str()));
    for check in &receipt.checks {
        let status = match check.verdict {
            Verdict::Passed | Verdict::Warned => TestCaseStatus::success(),
            Verdict::Failed => {
                let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
                let _ = status.set_message(check.message.as_str()).set_type("check").set_description(evidence(&check.evidence));
                status
            }
            Verdict::Skipped => {
                let mut status = TestCaseStatus::skipped();
                let _ = status.set_message(check.message.as_str());
                status
            }
        };
        let mut case = TestCase::new(check.name.as_str(), status);
        let _ = case.set_classname(format!("pgvault.drill.{}", receipt.cluster)).set_time(Duration::from_millis(check.duration_ms));
        if check.verdict == Verdict::Warned {
            let _ = case.set_system_out(format!("warning: {}", check.message));
        }
        let _ = suite.add_test_case(case);
    }
    let mut report = Report::new("pgvault");
    let _ = report.add_test_suite(suite);
    report.to_string().map_err(|e| Error::new(ErrorKind::Failed, "drill.junit", format!("write the test results: {e}")))
}

fn evidence(value: &serde_json::Value) -> String {
    serde_json::to_string_pretty(value).unwrap_or_default()
}
