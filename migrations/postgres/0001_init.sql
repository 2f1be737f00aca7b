-- The data model: docs/data-model.md explains every table. Instants are UTC; *_ms and window bounds are milliseconds
-- since 1970; lo and hi of windows lie on the stream's own axis.

create table users (
    id uuid primary key,
    external_user_id text,
    first_name text,
    last_name text,
    email text,
    time_zone text not null default 'UTC',
    created_at timestamptz not null
);
create unique index users_external_user_id on users (external_user_id) where external_user_id is not null;
create unique index users_email on users (email) where email is not null;

create table api_keys (
    id uuid primary key,
    hash bytea not null unique,
    prefix text not null,
    name text not null,
    scopes text not null,
    created_at timestamptz not null,
    expires_at timestamptz,
    revoked_at timestamptz,
    last_used_at timestamptz
);

-- One grant, one refresher: the lease is refresh_owner/refresh_until; token_version only grows. Access tokens of a version
-- up to grant_version belong to an earlier grant.
create table accounts (
    id uuid primary key,
    provider text not null,
    client_id text not null,
    provider_user_id text not null,
    status text not null check (status in ('active', 'reauth')),
    reason text,
    refresh_token bytea,
    token_version bigint not null default 0,
    grant_version bigint not null default 0,
    refresh_owner text,
    refresh_until timestamptz,
    refusals bigint not null default 0,
    refused_since timestamptz,
    imported_hash bytea,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    unique (provider, client_id, provider_user_id)
) with (fillfactor = 70);

-- epoch changes with every connect, disconnect, purge, erase; page_seq with every committed page; stored_at with every
-- page that brought something.
create table connections (
    id uuid primary key,
    user_id uuid not null references users (id) on delete cascade,
    account_id uuid not null references accounts (id),
    provider text not null,
    status text not null check (status in ('active', 'revoked', 'replaced')),
    epoch bigint not null default 1,
    page_seq bigint not null default 0,
    stored_at timestamptz,
    last_success_at timestamptz,
    created_at timestamptz not null,
    updated_at timestamptz not null
) with (fillfactor = 70);
create unique index connections_user_provider on connections (user_id, provider) where status <> 'replaced';
create index connections_account on connections (account_id);

-- Covered = the union of done 'cover' windows. A position moves only together with its page.
create table windows (
    id uuid primary key,
    connection_id uuid not null references connections (id) on delete cascade,
    stream text not null,
    purpose text not null check (purpose in ('cover', 'reread')),
    lo bigint not null,
    hi bigint not null check (hi > lo),
    state text not null check (state in ('open', 'asked', 'done')),
    position text,
    verified_at timestamptz,
    last_error text
) with (fillfactor = 70);
create unique index windows_cover on windows (connection_id, stream, lo) where purpose = 'cover';
create index windows_open on windows (connection_id) where state <> 'done';

-- The row holds the only lease. No index holds lease_until, progress or updated_at: renewals stay HOT.
create table runs (
    id uuid primary key,
    connection_id uuid not null references connections (id) on delete cascade,
    user_id uuid not null,
    provider text not null,
    class bigint not null,
    source text not null,
    request text not null,
    request_key text not null,
    state text not null check (state in ('queued', 'in_progress', 'waiting', 'success', 'partial', 'failed', 'cancelled')),
    reason text,
    epoch bigint not null default 0,
    owner text,
    lease_until timestamptz,
    due_at timestamptz not null,
    attempts bigint not null default 0,
    crashes bigint not null default 0,
    committed bigint not null default 0,
    again boolean not null default false,
    cancel_requested boolean not null default false,
    progress text,
    report text,
    waiting_on text,
    created_at timestamptz not null,
    started_at timestamptz,
    ended_at timestamptz
) with (fillfactor = 70);
create unique index runs_slot on runs (connection_id) where state = 'in_progress';
create unique index runs_request on runs (request_key)
    where state in ('queued', 'waiting', 'in_progress') and not cancel_requested;
create index runs_due on runs (class, due_at) where state in ('queued', 'waiting');
create index runs_connection_due on runs (connection_id, class, due_at) where state in ('queued', 'waiting');
create index runs_user on runs (user_id, id);
create index runs_connection on runs (connection_id, id);

create table idempotency (
    api_key_id uuid not null references api_keys (id) on delete cascade,
    key text not null,
    request_hash bytea not null,
    run_id uuid not null,
    expires_at timestamptz not null,
    primary key (api_key_id, key)
);

create table data_sources (
    id bigint generated always as identity primary key,
    user_id uuid not null references users (id) on delete cascade,
    provider text not null,
    device text not null default '',
    writer text not null default '',
    software text,
    unique (user_id, provider, device, writer)
);

-- A record is a function of its parts. last_deleted_at stays when a record comes back: its marker file does too.
create table records (
    id uuid primary key,
    connection_id uuid not null references connections (id) on delete cascade,
    kind text not null,
    external_id text not null,
    data_source_id bigint not null references data_sources (id) on delete cascade,
    type text not null,
    title text,
    start_at timestamptz not null,
    end_at timestamptz,
    utc_offset_s bigint,
    zone text,
    local_day date not null,
    hash bytea not null,
    shape bigint not null,
    revision bigint not null,
    provisional boolean not null,
    stem text,
    deleted_at timestamptz,
    last_deleted_at timestamptz,
    export_due boolean not null default false,
    source_updated_at timestamptz,
    stored_at timestamptz not null,
    unique (connection_id, kind, external_id)
);
create index records_start on records (connection_id, kind, start_at);
create index records_day on records (connection_id, local_day);
create index records_export on records (connection_id) where export_due;

create table workouts (
    record_id uuid primary key references records (id) on delete cascade,
    type text not null,
    elapsed_s double precision,
    moving_s double precision,
    distance_m double precision,
    ascent_m double precision,
    elevation_high_m double precision,
    elevation_low_m double precision,
    average_speed_m_per_s double precision,
    max_speed_m_per_s double precision,
    average_heart_rate_bpm double precision,
    max_heart_rate_bpm double precision,
    average_cadence_per_min double precision,
    average_power_w double precision,
    max_power_w double precision,
    weighted_power_w double precision,
    power_measured boolean,
    work_kj double precision,
    energy_kcal double precision,
    energy_estimated boolean not null,
    average_temperature_c double precision,
    start_latitude_deg double precision,
    start_longitude_deg double precision,
    gear_id text,
    manual boolean,
    laps text,
    heart_rate_zones text,
    power_zones text,
    pace_zones text
);

-- One version of one answer, as received: body is the zstd of the bytes. Superseded, never edited. The body stands
-- last: SQLite walks through a long column to reach those behind it.
create table parts (
    id uuid primary key,
    connection_id uuid not null references connections (id) on delete cascade,
    kind text not null,
    external_id text not null,
    part text not null,
    version bigint not null,
    state text not null check (state in ('wanted', 'stored', 'none', 'unreadable', 'failed')),
    order_at timestamptz not null,
    due_at timestamptz not null,
    attempts bigint not null default 0,
    last_error text,
    body_size bigint,
    hash bytea,
    formula bigint,
    fetched_at timestamptz,
    stored_at timestamptz,
    superseded_at timestamptz,
    export_due boolean not null default false,
    body bytea
);
alter table parts alter column body set storage external;
create unique index parts_current on parts (connection_id, kind, external_id, part) where superseded_at is null;
create index parts_wanted on parts (connection_id, order_at desc) where state = 'wanted' and superseded_at is null;
create index parts_export on parts (connection_id) where export_due;
create index parts_failed on parts (connection_id) where state = 'failed' and superseded_at is null;

create table series_types (
    id bigint primary key,
    name text not null unique,
    unit text not null
);
insert into series_types (id, name, unit) values
    (1, 'heart_rate', 'bpm'),
    (2, 'resting_heart_rate', 'bpm'),
    (3, 'heart_rate_variability_sdnn', 'ms'),
    (4, 'heart_rate_recovery_one_minute', 'bpm'),
    (5, 'walking_heart_rate_average', 'bpm'),
    (7, 'heart_rate_variability_rmssd', 'ms'),
    (20, 'oxygen_saturation', 'percent'),
    (21, 'blood_glucose', 'mg_dl'),
    (22, 'blood_pressure_systolic', 'mmHg'),
    (23, 'blood_pressure_diastolic', 'mmHg'),
    (24, 'respiratory_rate', 'brpm'),
    (25, 'sleeping_breathing_disturbances', 'count'),
    (26, 'blood_alcohol_content', 'mg_dl'),
    (27, 'peripheral_perfusion_index', 'score'),
    (28, 'forced_vital_capacity', 'liters'),
    (29, 'forced_expiratory_volume_1', 'liters'),
    (30, 'peak_expiratory_flow_rate', 'L/min'),
    (31, 'breathing_disturbance_index', 'score'),
    (40, 'height', 'cm'),
    (41, 'weight', 'kg'),
    (42, 'body_fat_percentage', 'percent'),
    (43, 'body_mass_index', 'kg_m2'),
    (44, 'lean_body_mass', 'kg'),
    (45, 'body_temperature', 'celsius'),
    (46, 'skin_temperature', 'celsius'),
    (47, 'waist_circumference', 'cm'),
    (48, 'body_fat_mass', 'kg'),
    (49, 'skeletal_muscle_mass', 'kg'),
    (50, 'skin_temperature_deviation', 'celsius'),
    (51, 'skin_temperature_trend_deviation', 'celsius'),
    (60, 'vo2_max', 'ml_kg_min'),
    (61, 'six_minute_walk_test_distance', 'meters'),
    (62, 'cardiovascular_age', 'years'),
    (80, 'steps', 'count'),
    (81, 'energy', 'kcal'),
    (82, 'basal_energy', 'kcal'),
    (83, 'stand_time', 'minutes'),
    (84, 'exercise_time', 'minutes'),
    (85, 'physical_effort', 'score'),
    (86, 'flights_climbed', 'count'),
    (87, 'average_met', 'met'),
    (88, 'active_time', 'minutes'),
    (100, 'distance_walking_running', 'meters'),
    (101, 'distance_cycling', 'meters'),
    (102, 'distance_swimming', 'meters'),
    (103, 'distance_downhill_snow_sports', 'meters'),
    (104, 'distance_other', 'meters'),
    (120, 'walking_step_length', 'cm'),
    (121, 'walking_speed', 'm_per_s'),
    (122, 'walking_double_support_percentage', 'percent'),
    (123, 'walking_asymmetry_percentage', 'percent'),
    (124, 'walking_steadiness', 'percent'),
    (125, 'stair_descent_speed', 'm_per_s'),
    (126, 'stair_ascent_speed', 'm_per_s'),
    (140, 'running_power', 'watts'),
    (141, 'running_speed', 'm_per_s'),
    (142, 'running_vertical_oscillation', 'cm'),
    (143, 'running_ground_contact_time', 'ms'),
    (144, 'running_stride_length', 'cm'),
    (145, 'running_vertical_ratio', 'percent'),
    (146, 'running_stance_time_balance', 'percent'),
    (160, 'swimming_stroke_count', 'count'),
    (161, 'underwater_depth', 'meters'),
    (180, 'cadence', 'rpm'),
    (181, 'power', 'watts'),
    (182, 'speed', 'm_per_s'),
    (183, 'workout_effort_score', 'score'),
    (184, 'estimated_workout_effort_score', 'score'),
    (200, 'environmental_audio_exposure', 'dB'),
    (201, 'headphone_audio_exposure', 'dB'),
    (202, 'environmental_sound_reduction', 'dB'),
    (203, 'time_in_daylight', 'minutes'),
    (204, 'water_temperature', 'celsius'),
    (205, 'uv_exposure', 'count'),
    (206, 'inhaler_usage', 'count'),
    (207, 'weather_temperature', 'celsius'),
    (208, 'weather_humidity', 'percent'),
    (209, 'elevation', 'meters'),
    (210, 'latitude', 'degrees'),
    (211, 'longitude', 'degrees'),
    (212, 'air_temperature', 'celsius'),
    (220, 'garmin_stress_level', 'score'),
    (221, 'garmin_skin_temperature', 'celsius'),
    (222, 'garmin_fitness_age', 'years'),
    (223, 'garmin_body_battery', 'percent'),
    (500, 'electrodermal_activity', 'count'),
    (501, 'push_count', 'count'),
    (502, 'atrial_fibrillation_burden', 'count'),
    (503, 'insulin_delivery', 'count'),
    (504, 'number_of_times_fallen', 'count'),
    (505, 'number_of_alcoholic_beverages', 'count'),
    (506, 'nike_fuel', 'count'),
    (507, 'hydration', 'mL');

-- deltas are milliseconds from the sample before; the first sample stands at first_at (milliseconds).
create table sample_chunks (
    record_id uuid not null references records (id) on delete cascade,
    series_type_id bigint not null references series_types (id),
    total boolean not null,
    first_at bigint not null,
    data_source_id bigint not null references data_sources (id) on delete cascade,
    last_at bigint not null,
    utc_offset_s bigint,
    n bigint not null,
    min_value double precision not null,
    max_value double precision not null,
    sum_value double precision not null,
    hash bytea not null,
    deltas integer[] not null,
    vals double precision[] not null,
    primary key (record_id, series_type_id, total, first_at)
);
alter table sample_chunks alter column deltas set compression lz4;
alter table sample_chunks alter column vals set compression lz4;
create index sample_chunks_series on sample_chunks (data_source_id, series_type_id, first_at);

-- A snapshot of what processes share, never the truth.
create table quota_windows (
    quota_key text not null,
    name text not null,
    used bigint not null,
    quota_limit bigint not null,
    resets_at_ms bigint not null,
    updated_at timestamptz not null,
    primary key (quota_key, name)
);

-- Folders of erased users, until the process that owns the export folder has removed them.
create table erased_folders (
    path text primary key,
    erased_at timestamptz not null
);

create table export_leases (
    user_id uuid primary key references users (id) on delete cascade,
    owner text not null,
    epoch bigint not null,
    until_at timestamptz not null
);

create view samples as
select
    s.user_id,
    s.provider,
    t.name as series,
    to_timestamp((c.first_at + x.ms) / 1000.0) as recorded_at,
    x.value,
    t.unit,
    to_timestamp(c.first_at / 1000.0) as chunk_first_at,
    c.record_id
from sample_chunks c
join data_sources s on s.id = c.data_source_id
join series_types t on t.id = c.series_type_id
cross join lateral (
    select sum(u.delta) over (order by u.i) as ms, u.value
    from unnest(c.deltas, c.vals) with ordinality as u (delta, value, i)
) x;

-- The samples of one user and series in a range: chunks are picked by their index before they are unpacked.
create function samples_between(of_user uuid, of_series text, from_at timestamptz, to_at timestamptz)
returns table (provider text, recorded_at timestamptz, value double precision, unit text)
language sql stable
as $$
    select s.provider, to_timestamp((c.first_at + x.ms) / 1000.0), x.value, t.unit
    from data_sources s
    join series_types t on t.name = of_series
    join sample_chunks c on c.data_source_id = s.id and c.series_type_id = t.id
        -- A chunk never crosses midnight, so one that reaches into the range began less than a day before it.
        -- Compared as bigint, so that the index serves both bounds.
        and c.first_at >= floor(extract(epoch from from_at) * 1000)::bigint - 86400000
        and c.first_at < ceil(extract(epoch from to_at) * 1000)::bigint
        and c.last_at >= floor(extract(epoch from from_at) * 1000)::bigint
    cross join lateral (
        select sum(u.delta) over (order by u.i) as ms, u.value
        from unnest(c.deltas, c.vals) with ordinality as u (delta, value, i)
    ) x
    where s.user_id = of_user
        and to_timestamp((c.first_at + x.ms) / 1000.0) >= from_at
        and to_timestamp((c.first_at + x.ms) / 1000.0) < to_at
    order by 2
$$;
