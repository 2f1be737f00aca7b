//! One who listens to the events of a user.

use std::time::Duration;

use serde_json::Value;
use wearsync::model::UserId;

/// An open event stream.
pub struct Stream {
    pub response: reqwest::Response,
    text: String,
}

impl Stream {
    /// Asks for the stream; what comes first is still to be read.
    pub async fn open(
        http: &reqwest::Client,
        url: &str,
        key: &str,
        user: UserId,
        query: &str,
        last: Option<&str>,
    ) -> Result<Self, reqwest::Error> {
        let mut request = http.get(format!("{url}/api/v1/users/{user}/sync/stream{query}")).header("X-API-Key", key);
        if let Some(last) = last {
            request = request.header("Last-Event-ID", last);
        }
        Ok(Self::new(request.send().await?.error_for_status()?))
    }

    /// An answer that has begun.
    pub fn new(response: reqwest::Response) -> Self {
        Self { response, text: String::new() }
    }

    /// Up to the next blank line; nothing when the stream has ended whole, an error when it broke.
    pub async fn try_frame(&mut self) -> Result<Option<String>, reqwest::Error> {
        loop {
            if let Some((frame, rest)) = self.text.split_once("\n\n") {
                let (frame, rest) = (frame.to_owned(), rest.to_owned());
                self.text = rest;
                return Ok(Some(frame));
            }
            let Some(chunk) = self.response.chunk().await? else { return Ok(None) };
            self.text.push_str(std::str::from_utf8(&chunk).expect("is text"));
        }
    }

    pub async fn frame(&mut self) -> Option<String> {
        let frame = tokio::time::timeout(Duration::from_secs(30), self.try_frame()).await;
        frame.expect("the stream is silent").expect("the stream breaks")
    }

    /// The next event.
    pub async fn event(&mut self) -> Value {
        loop {
            let frame = self.frame().await.expect("the stream goes on");
            if let Some(event) = event_in(&frame) {
                return event;
            }
        }
    }

    pub async fn events(&mut self, n: usize) -> Vec<Value> {
        let mut events = Vec::new();
        while events.len() < n {
            events.push(self.event().await);
        }
        events
    }
}

/// The event in a frame; none in a comment.
pub fn event_in(frame: &str) -> Option<Value> {
    if [": heartbeat", ": connected"].contains(&frame) {
        return None;
    }
    let lines: Vec<&str> = frame.lines().collect();
    let [.., name, data] = lines.as_slice() else { panic!("no event: {frame}") };
    assert_eq!(*name, "event: sync.status", "{frame}");
    let event: Value = serde_json::from_str(data.strip_prefix("data: ").expect("data")).expect("is JSON");
    match lines.as_slice() {
        [id, _, _] => assert_eq!(*id, format!("id: {}", event_id(&event))),
        lines => assert_eq!(lines.len(), 2, "{frame}"),
    }
    Some(event)
}

pub fn event_id(event: &Value) -> String {
    event["event_id"].as_str().expect("an id").to_owned()
}
