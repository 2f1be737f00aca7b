# syntax=docker/dockerfile:1

FROM rust:1.95-bookworm AS build
# The image is the toolchain: without this rustup would fetch the lint tools that rust-toolchain.toml names.
ENV RUSTUP_TOOLCHAIN=1.95.0
WORKDIR /src
COPY . .
# The caches do not end up in the layer, so the binary is copied out of them.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin wearsync \
    && install -m 0755 target/release/wearsync /usr/local/bin/wearsync

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin wearsync \
    # A named volume takes the owner of the folder it is first mounted on.
    && install -d -o wearsync -g wearsync -m 0700 /data /state /exports
COPY --from=build /usr/local/bin/wearsync /usr/local/bin/wearsync
COPY --chmod=0755 scripts/first-start /usr/local/bin/wearsync-first-start
USER wearsync
ENV WEARSYNC_DATA_DIR=/data
WORKDIR /data
EXPOSE 8000
# Workers answer no HTTP; docker-compose.yml gives the API its own check.
HEALTHCHECK NONE
ENTRYPOINT ["wearsync"]
CMD ["serve"]
