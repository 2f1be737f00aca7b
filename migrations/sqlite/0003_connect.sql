-- One visit to a provider's consent page: single use, short lived, known by the digest of its state.
create table oauth_states (
    hash blob primary key,
    provider text not null,
    user_id blob not null references users (id) on delete cascade,
    redirect_uri text,
    callback_url text not null,
    verifier blob,
    created_at text not null,
    expires_at text not null
) strict;
create index oauth_states_expiry on oauth_states (expires_at);

-- What the person granted, in the provider's words with blanks between; null: never told.
alter table accounts add column scopes text;
alter table accounts add column username text;
-- When the token endpoint is asked at the latest: at some providers a grant that lies idle for too long ends. Null: never.
alter table accounts add column renew_at text;
create index accounts_renew on accounts (renew_at) where renew_at is not null;
