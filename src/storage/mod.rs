//! Everything that is kept: one file per aggregate, one SQL text for both databases wherever they agree.
//!
//! May name model, clock, config and telemetry. What must always hold: nothing above this room knows SQL; secrets
//! arrive as ciphertext or hashes and leave the same way; whatever a page changes is changed by [`Db::commit_page`]
//! in one transaction, behind the fence of the run that does it. Time is always given, never asked of the database.

mod accounts;
mod api_keys;
mod applications;
mod connections;
mod db;
mod deliveries;
mod developers;
mod error;
mod exports;
mod insert;
mod oauth_states;
mod page;
mod provider_settings;
mod quotas;
mod records;
mod refresh_tokens;
mod run_events;
mod runs;
mod schedules;
mod users;
mod windows;

pub use accounts::{Account, NewAccount, RefreshFailure, RefreshLease, Refreshed};
pub use api_keys::{ApiKey, NewApiKey, NextApiKey};
pub use applications::Application;
pub use connections::{Access, Connected, Connection, ConnectionView, Ended, Ending, LeftGrant, NewGrant, Target};
pub use db::{Db, WorkingLock};
pub use deliveries::{
    Act, Addressee, Delivery, DeliveryClaim, DeliveryEnd, DeliveryFilter, DeliveryItem, NewDelivery, NewItem,
    SubscriptionRow,
};
pub use developers::{Bearer, Developer, DeveloperChange, NewDeveloper};
pub use error::{Error, Result};
pub use exports::{ExportPart, RecordRow as ExportRecord, SummaryRow};
pub use oauth_states::OAuthState;
pub use page::{
    Boundary, ChunkWrite, Fence, NewPart, PageState, PageWrite, PartFix, PartRow, RecordRow, RecordWrite, WantedWrite,
    WindowMove,
};
pub use provider_settings::{ProviderChange, ProviderSetting};
pub use records::{Counts, WantedPart};
pub use refresh_tokens::TokenOwner;
pub use run_events::{RunEvent, RunEventFilter};
pub use runs::{Accepted, Claim, NewRun, Run, RunFilter, Settle};
pub use schedules::{ClockRun, Clockwork, Due, Queue, ScheduleCounts, ScheduleRow, Step, Stepped, SweepDue, Turn};
pub use users::{NewUser, User, UserFilter, UserPage, UserRow};
pub use windows::{Gap, NewWindow, WindowRow};
