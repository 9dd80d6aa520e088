//! Letting a server stop.
//!
//! A server that is being stopped waits until its receivers have confirmed everything it has sent, and asks them to. Measured on 15.20
//! (R1, H3): it asks anew after every answer that confirms less, half a million times in 25 s, and waits for ever. So while the store
//! does not take the WAL the answer is held back, and after some of them the connection is closed: then the server stops, and the slot
//! keeps what was not confirmed.

use std::time::Duration;

use tokio::time::Instant;

use crate::{Error, ErrorKind, Result};

/// How long a stopping server waits for an answer that does not confirm everything, and how many it gets.
const ANSWER_AFTER: Duration = Duration::from_millis(400);
const ANSWERS: u32 = 5;

/// A server that asks again and again to have everything confirmed.
#[derive(Debug, Default)]
pub(super) struct Pressed {
    last: Option<Instant>,
    times: u32,
    /// When to answer.
    pub(super) answer_at: Option<Instant>,
}

impl Pressed {
    /// The server asks, and not everything is durable.
    ///
    /// # Errors
    /// `source.stopping` when it has asked often enough.
    pub(super) fn ask(&mut self) -> Result<()> {
        let now = Instant::now();
        // A question every half `wal_sender_timeout` is none of these.
        let again = self.last.is_some_and(|last| now.duration_since(last) < ANSWER_AFTER * 3);
        self.times = if again { self.times + 1 } else { 1 };
        self.last = Some(now);
        self.answer_at = Some(now + ANSWER_AFTER);
        if self.times > ANSWERS {
            return Err(Error::new(
                ErrorKind::Source,
                "source.stopping",
                "the server is stopping and waits for WAL that the store does not take; let it go, the slot keeps the WAL",
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn r1_a_stopping_server_is_let_go_and_a_living_one_is_not() {
        let mut pressed = Pressed::default();
        for _ in 0..100 {
            pressed.ask().unwrap();
            assert!(pressed.answer_at.is_some());
            tokio::time::sleep(Duration::from_secs(3)).await;
        }
        for _ in 0..ANSWERS - 1 {
            tokio::time::sleep(ANSWER_AFTER).await;
            pressed.ask().unwrap();
        }
        tokio::time::sleep(ANSWER_AFTER).await;
        pressed.ask().unwrap();
        tokio::time::sleep(ANSWER_AFTER).await;
        assert_eq!(pressed.ask().unwrap_err().code(), "source.stopping");
    }
}
