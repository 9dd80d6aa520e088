//! Programs with a limit of time, whose last words are kept.

use std::process::Stdio;
use std::time::Duration;

use pgvault_core::{Error, ErrorKind, Result};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::Ran;

/// Bytes of a program's output that are kept.
const KEPT: usize = 4096;

/// Runs a program to its end, or kills it at the end of `limit`. Standard output is thrown away.
///
/// # Errors
/// When it cannot be started.
pub(crate) async fn run(command: std::process::Command, limit: Duration) -> Result<Ran> {
    let program = command.get_program().to_string_lossy().into_owned();
    run_with(command, Stdio::null(), limit)
        .await
        .map_err(|e| Error::new(ErrorKind::Failed, "drill.command", format!("run {program}: {e}")).with_source(e))
}

/// As [`run`], with what it says on both outputs.
///
/// # Errors
/// When it cannot be started.
pub(crate) async fn run_and_listen(command: std::process::Command, limit: Duration) -> Result<Ran> {
    let program = command.get_program().to_string_lossy().into_owned();
    run_with(command, Stdio::piped(), limit)
        .await
        .map_err(|e| Error::new(ErrorKind::Failed, "drill.command", format!("run {program}: {e}")).with_source(e))
}

async fn run_with(command: std::process::Command, stdout: Stdio, limit: Duration) -> std::io::Result<Ran> {
    let mut command = tokio::process::Command::from(command);
    let _ = command.stdin(Stdio::null()).stdout(stdout).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn()?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let ending = async { tokio::join!(child.wait(), tail(out), tail(err)) };
    let ended = tokio::time::timeout(limit, ending).await;
    let Ok((status, out, err)) = ended else {
        child.kill().await?;
        return Ok(Ran { code: None, output: format!("it was ended after {} s", limit.as_secs()) });
    };
    let output = [out, err].into_iter().filter(|text| !text.is_empty()).collect::<Vec<_>>().join("\n");
    Ok(Ran { code: status?.code(), output })
}

/// The last words of a stream.
async fn tail(stream: Option<impl AsyncRead + Unpin>) -> String {
    let Some(mut stream) = stream else { return String::new() };
    let (mut kept, mut buffer) = (Vec::new(), [0; 4096]);
    while let Ok(read) = stream.read(&mut buffer).await {
        if read == 0 {
            break;
        }
        kept.extend_from_slice(buffer.get(..read).unwrap_or_default());
        let surplus = kept.len().saturating_sub(KEPT);
        let _ = kept.drain(..surplus);
    }
    String::from_utf8_lossy(&kept).trim_end().to_owned()
}
