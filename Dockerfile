# The image of every role. BASE is Debian or a relative of it with apt; BUILD has the Rust toolchain and a C compiler.
ARG BASE=debian:12-slim
ARG BUILD=rust:1.95-bookworm

FROM ${BUILD} AS build
WORKDIR /source
COPY Cargo.toml Cargo.lock build.rs ./
COPY proto proto
COPY src src
RUN cargo build --release --locked

FROM ${BASE}
# mkfs, fsck and the resizers of both filesystems; mount and blkid.
RUN apt-get update \
 && apt-get install -y --no-install-recommends e2fsprogs mount util-linux xfsprogs \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /source/target/release/tandem /usr/local/bin/tandem
ENTRYPOINT ["/usr/local/bin/tandem"]
