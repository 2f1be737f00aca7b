use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! id {
    ($($(#[$doc:meta])* $name:ident),*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, sqlx::Type)]
        #[serde(transparent)]
        #[sqlx(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A new id; version 7, so ids sort by the time they were made.
            #[must_use]
            #[expect(clippy::new_without_default, reason = "a default id would suggest that two of them are equal")]
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}

id!(
    /// One of our users.
    UserId,
    /// A person's account at a provider, with its grant.
    AccountId,
    /// One of our users bound to an account.
    ConnectionId,
    /// One execution for one connection. On the wire this is the `task_id`.
    RunId,
    /// One inbound webhook call.
    DeliveryId,
    /// One thing in the world.
    RecordId,
    /// One version of one answer about a record.
    PartId,
    /// A range of a stream.
    WindowId
);
