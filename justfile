# The front door for people; CI calls .ci/run, which needs no just.

# list the recipes
default:
    @just --list

# format the sources
fmt:
    cargo fmt --all

# format, lints, documentation, licences and advisories; no servers needed
check:
    cargo fmt --all --check
    cargo clippy --locked --all-targets -- -D warnings
    cargo clippy --locked --all-targets --all-features -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --all-features
    cargo test --locked --test layering --test compose
    @if command -v cargo-deny >/dev/null 2>&1; then cargo deny --locked check; \
     else echo "cargo-deny is not installed, licences and advisories were not checked: cargo install --locked cargo-deny"; fi

# every test, on both databases
test *ARGS:
    scripts/test {{ARGS}}

# questions made from the OpenAPI document, sensible ones and others (schemathesis)
fuzz:
    scripts/fuzz

# the benchmarks of docs/benchmarks.md: all, or some of them; --quick for a look
bench *ARGS:
    scripts/test --exec cargo bench --locked --bench bench -- {{ARGS}}

# the crash tests with 1 000 kills per back end instead of 60 (half an hour); the figures are for docs/reliability.md
crash:
    CRASH_KILLS=1000 scripts/test --test crash -- --nocapture

# write the API document again
openapi:
    cargo run --locked --quiet -- openapi > openapi/wearsync.json.new
    mv openapi/wearsync.json.new openapi/wearsync.json

# a simulator, a server and a first sync, with nothing installed
demo:
    cargo run --locked -- demo

# PostgreSQL, Redis, the API and two workers in containers
up:
    docker compose up --build
